"""Pure. What the dispatcher hears from the workers, and what it sends to them."""
