"""Pure. The worker: one engine, its adapter slots, and a session with every gateway."""
