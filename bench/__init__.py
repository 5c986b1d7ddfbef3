"""Pure. The benchmarks. `bench.load` is a load test for any OpenAI-compatible server. The others
start what they measure.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The checkout that this package lies in: examples, deploy files and results are found from
here.
"""
