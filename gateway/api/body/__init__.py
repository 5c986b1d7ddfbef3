"""Pure. What is read of the body of a request for tokens, and how much it may ask for."""
