"""Pure. From an admitted request to a worker and back: queue, fairness, reservations, answers."""
