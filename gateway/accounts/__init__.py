"""Pure. Who may ask: API keys."""
