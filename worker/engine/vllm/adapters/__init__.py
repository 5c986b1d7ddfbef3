"""Shell. Brings adapters into the engine, from the side of the process that serves."""
