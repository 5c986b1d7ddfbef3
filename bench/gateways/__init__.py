"""Pure. Gateways side by side over one mock engine."""
