"""Pure. What `serve` and its child processes tell each other about life and death."""
