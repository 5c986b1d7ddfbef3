"""Pure. Operators' HTTP API under /admin: adapters, aliases, pins."""
