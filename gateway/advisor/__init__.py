"""Pure. How many slots, workers and pins the traffic needs: closed forms, and what they advise."""
