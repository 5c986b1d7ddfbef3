"""Pure. The configuration, Ray Serve LLM's and our own, read into frozen structs."""
