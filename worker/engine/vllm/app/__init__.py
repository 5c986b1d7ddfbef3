"""Pure. vLLM's own HTTP app as a part of the engine: requests in, answers out, errors in
our shape.
"""
