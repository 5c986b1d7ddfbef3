"""Pure. Ray Serve LLM's configuration and ours, read into frozen structs."""
