"""Pure. The gateway: everything between a client's HTTP request and a worker."""
