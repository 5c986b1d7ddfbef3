"""Pure. The engine behind one protocol: vLLM or simulated."""
