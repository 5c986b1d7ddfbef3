"""Pure. The disk cache of adapters that a host's workers share."""
