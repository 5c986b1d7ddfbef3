"""Pure. Messages between gateway and worker, and the ZeroMQ sockets that carry them."""
