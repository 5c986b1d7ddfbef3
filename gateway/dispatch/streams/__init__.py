"""Pure. The answers that are under way: which client gets a frame, and what each has seen."""
