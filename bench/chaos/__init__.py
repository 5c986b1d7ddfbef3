"""Pure. Processes that are killed, stopped, cut off, drained and replaced under load, and answers
that are counted: `python -m bench.chaos`.
"""
