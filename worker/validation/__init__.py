"""Pure. The checks that an adapter must pass before the engine gets it."""
