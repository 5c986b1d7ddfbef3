"""Pure. vLLM's AsyncLLM with adapter slots that this project manages."""
