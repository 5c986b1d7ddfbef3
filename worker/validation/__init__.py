"""Pure. An adapter is checked here before the engine sees it."""
