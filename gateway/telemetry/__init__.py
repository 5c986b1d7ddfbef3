"""Pure. Counters, Prometheus, access log."""
