"""Shell. `loraplex why REQUEST_ID`: says in words how the time of one request was spent."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from gateway.cli.client import (
    CommandFailed,
    GatewayClient,
    gateway_flags,
    read_key,
    show_table,
)

BAR = 40  # characters of the longest phase


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "why",
        help="what a request waited for, and what would have made it faster",
        description="The id is in the answer's header x-request-id and in the access log.",
    )
    parser.add_argument("request_id", metavar="REQUEST_ID")
    gateway_flags(parser)
    parser.add_argument("--json", action="store_true", help="print the gateway's own answer")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if not args.request_id.strip():
        print("loraplex why: the request's id is empty", file=sys.stderr)
        return 2
    path = f"/admin/requests/{args.request_id}"
    try:
        status, answer = GatewayClient(args.url, read_key(args.key_file)).call("GET", path, {})
    except CommandFailed as exc:
        print(f"loraplex why: {exc}", file=sys.stderr)
        return 1
    if status != 200:
        print(f"loraplex why: {args.url} answered {status}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(answer))
        return 0
    _show(answer)
    return 0


def _show(answer: dict[str, Any]) -> None:
    for sentence in answer["words"]:
        print(sentence)
    print()
    spent = {name: ms for name, ms in answer["phases_ms"].items() if ms}
    longest = max(spent.values(), default=1.0)
    for name, ms in spent.items():
        print(f"  {name:<8} {ms:>10.1f} ms  {'#' * max(1, round(BAR * ms / longest))}")
    decision = answer["decision"]
    if decision["candidates"]:
        print("\nThe choice, in milliseconds:")
        terms = list(decision["candidates"][0]["terms_ms"])
        rows = [
            [c["worker"], c["tier"], c["cost_ms"], *(c["terms_ms"][t] for t in terms), c["note"]]
            for c in decision["candidates"]
        ]
        show_table(["worker", "tier", "cost", *terms, "note"], rows)
    if answer["faster"]:
        print("\nWhat would have made it faster:")
        for line in answer["faster"]:
            print(f"  {line}")
