"""Pure. Studies of routing policies: their plans, their runs, and what came of them."""
