"""Pure. An engine without a model, for load tests."""
