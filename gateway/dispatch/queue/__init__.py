"""Pure. Waiting requests: who is admitted next, who is refused, and who is not worth beginning."""
