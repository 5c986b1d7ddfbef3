"""Pure. The operators' HTTP API under /admin: adapters, aliases, pins, scaling."""
