"""Pure. The catalog: which adapters exist, which version answers, aliases, pins."""
