"""Pure. The messages between `serve` and its child processes: who lives, who hangs, who
has ended.
"""
