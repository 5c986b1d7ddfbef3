"""Pure. Requests that wait: who is admitted next, who is refused, and who is not worth beginning."""
