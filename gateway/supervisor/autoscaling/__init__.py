"""Pure. How many workers each model should have: the load over time, the decision, its limits."""
