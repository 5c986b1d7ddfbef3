"""Pure. The start of a vLLM engine: which versions fit, what it is at, and its first requests."""
