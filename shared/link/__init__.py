"""Pure. What this room is for: say it."""
