"""Pure. Which worker gets a request: policies and their costs."""
