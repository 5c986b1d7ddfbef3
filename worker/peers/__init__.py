"""Pure. Adapter files from worker to worker."""
