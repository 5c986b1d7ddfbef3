"""Pure. Load generation and measurement: `python -m bench.load` speaks HTTP to any OpenAI-compatible server."""
