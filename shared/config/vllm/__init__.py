"""Pure. What the installed vLLM says of a configuration."""
