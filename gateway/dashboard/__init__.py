"""Pure. The page at /ui, from the gateway's own files."""
