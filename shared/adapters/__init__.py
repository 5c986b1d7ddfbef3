"""Pure. What an adapter is: its identity, its files, its config, its tensors."""
