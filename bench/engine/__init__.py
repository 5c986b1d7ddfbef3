"""Pure. The worker's engine beside `vllm serve`, on a CPU or a GPU."""
