"""Pure. What a routing study found: figures, tables and pictures."""
