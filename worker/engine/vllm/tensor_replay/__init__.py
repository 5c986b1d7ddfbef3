"""Pure. What vLLM does for an adapter, tensor by tensor, is recorded once and then repeated."""
