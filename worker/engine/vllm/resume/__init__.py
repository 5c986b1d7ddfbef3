"""Pure. How an answer that began on another worker goes on in vLLM."""
