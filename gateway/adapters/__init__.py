"""Pure. The adapters: which exist, which version answers, aliases, pins."""
