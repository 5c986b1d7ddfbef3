"""Shell. What adapters are to vLLM: their files, and the layers that they change."""
