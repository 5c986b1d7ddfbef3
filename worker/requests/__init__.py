"""Pure. The requests of this worker: open ones, what their answers send, and what is kept."""
