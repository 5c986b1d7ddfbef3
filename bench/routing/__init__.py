"""Pure. Routing policies in virtual time, with the production code."""
