"""Shell. What keeps the tenants of one engine apart."""
