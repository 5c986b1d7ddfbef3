"""Pure. Processes, signals, logs, small files of state."""
