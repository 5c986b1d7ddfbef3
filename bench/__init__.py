"""Pure. Load generation and measurement: `python -m bench.load` speaks HTTP to any
OpenAI-compatible server.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The checkout that this package lies in: examples, deploy files and results are found from
here.
"""
