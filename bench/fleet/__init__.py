"""Pure. One run over several GPUs: `python -m bench.fleet` starts a gateway and workers, and
measures throughput, policies and a worker's death.
"""
