"""Pure. What vLLM does for every adapter, tensor by tensor, is recorded once and then repeated."""
