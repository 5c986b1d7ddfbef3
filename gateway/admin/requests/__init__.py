"""Pure. One request as operators see it: its timeline, and in words what it waited for."""
