"""Pure. The adapter's state machine in a worker: who is resident, who makes room."""
