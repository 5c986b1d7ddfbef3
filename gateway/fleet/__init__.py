"""Pure. What is known of the workers: membership, load, residency."""
