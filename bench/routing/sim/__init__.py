"""Pure. The virtual-time simulator behind `python -m bench.routing`: production gateway
code over workers whose timing is a table.
"""
