"""Shell. `python -m bench.micro.sse`: what it costs to read the head of a request and to frame an event for the client."""

from __future__ import annotations

import json

from bench.micro.timing import show
from bench.micro.wire import BODY, EVENT
from gateway.openai import parse_head

JOINED = 8


def main() -> None:
    chunk = json.loads(EVENT[6:])
    events = [EVENT] * JOINED
    show(
        "Requests and events",
        {
            f"head of a request of {len(BODY):,} bytes": (lambda: parse_head(BODY), 1, "request"),
            "the whole of it with json, for comparison": (lambda: json.loads(BODY), 1, "request"),
            f"frame an event of {len(EVENT)} bytes": (lambda: b"%x\r\n%b\r\n" % (len(EVENT), EVENT), 1, "event"),
            f"frame {JOINED} events as one": (lambda: _frame(b"".join(events)), JOINED, "event"),
            "render the event with json, for comparison": (lambda: b"data: " + json.dumps(chunk).encode() + b"\n\n", 1, "event"),
        },
    )


def _frame(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


if __name__ == "__main__":
    main()
