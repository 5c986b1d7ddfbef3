"""Pure. The queue of requests that no worker takes now, in fair order."""
