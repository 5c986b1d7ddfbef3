"""Shell. One load generator in a process of its own: `python -m bench.fleet.generator FILE [flags
of bench.load]` writes what it saw to FILE.

The first SIGINT ends the sending, not what is in flight.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec
import uvloop

from bench.fleet.figures import Seen
from bench.load.__main__ import measure, raise_open_files_limit
from bench.load.options import parse
from shared.runtime.process import follow_parent


def main() -> int:
    follow_parent()
    raise_open_files_limit()
    run = uvloop.run(measure(parse(sys.argv[2:])))
    length_s = max((o.ended_s for o in run.outcomes), default=0.0)
    seen = Seen(
        start_s=run.meter.start_s,
        outcomes=list(run.outcomes),
        tokens_by_bin=dict(run.meter.tokens_by_bin),
        cpu_share=run.cpu_s / length_s if length_s else 0.0,
        machine_busy=run.busy_share,
    )
    out = Path(sys.argv[1])
    aside = out.with_suffix(".part")
    aside.write_bytes(msgspec.msgpack.encode(seen))
    os.replace(aside, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
