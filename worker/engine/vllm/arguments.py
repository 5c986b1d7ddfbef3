"""Shell. Prints the names that `engine_kwargs` may hold, as a JSON list: `loraplex check` asks this
in a process of its own.

python -m worker.engine.vllm.arguments
"""

from __future__ import annotations

import json
import sys


def main() -> int:
    from worker.engine.vllm.engine import known_arguments

    sys.stdout.write(json.dumps(sorted(known_arguments())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
