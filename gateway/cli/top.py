"""Shell. `loraplex top`: shows the fleet in the terminal, once a second."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gateway.cli.client import (
    CommandFailed,
    GatewayClient,
    Unreachable,
    gateway_flags,
    read_key,
    table,
)
from shared.runtime.log import one_line

HOME_AND_CLEAR = "\x1b[H\x1b[J"
LAST_REQUESTS = 10
LEAST_REQUESTS = 3
"""Of them are shown even where the workers fill the terminal."""
AGAIN_S = 1.0
COLUMNS = (
    *("worker", "model", "state", "requests", "slots busy/full/all", "kv", "step ms"),
    *("load ms", "stall ms", "moved", "restarts", "why"),
)
REQUEST_COLUMNS = ("request", "model", "worker", "outcome", "tier", "ttft ms", "total ms")
DISPENSABLE = (
    *("stall ms", "load ms", "moved", "restarts", "step ms", "kv"),
    *("model", "tier", "slots busy/full/all"),
)
"""Columns that a narrow terminal goes without, the first ones first."""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "top",
        help="the fleet of a running gateway, live",
        description="Workers and the last requests, once a second, until Ctrl-C.",
    )
    gateway_flags(parser)
    parser.add_argument("--once", action="store_true", help="print one state and end")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    client = GatewayClient(args.url, read_key(args.key_file))
    last: list[dict[str, Any]] = []
    seen = False
    while True:
        lost = "The gateway has ended the connection."
        try:
            for event in client.events("/admin/live"):
                last = _newest(event["requests"], last)
                _print(event, last, live=not args.once and sys.stdout.isatty())
                if args.once:
                    return 0
                seen = True
        except CommandFailed as exc:
            if not (seen and isinstance(exc, Unreachable)):
                print(f"loraplex top: {exc}", file=sys.stderr)
                return 1
            lost = str(exc)
        print(f"{lost} Trying again ...", file=sys.stderr)
        time.sleep(AGAIN_S)


def _newest(news: list[dict[str, Any]], last: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A new connection tells of some requests once more."""
    known = {(r["id"], r["at"]) for r in last}
    return [*(r for r in news if (r["id"], r["at"]) not in known), *last][:LAST_REQUESTS]


def _print(event: dict[str, Any], last: list[dict[str, Any]], *, live: bool) -> None:
    if live:
        size = shutil.get_terminal_size()
        lines = screen(event, last, size.columns, size.lines)
        print(HOME_AND_CLEAR + "\n".join(lines), flush=True)
    else:
        print("\n".join(screen(event, last)), flush=True)


def screen(
    event: dict[str, Any], last: list[dict[str, Any]], width: int = 0, height: int = 0
) -> list[str]:
    """The lines of one state. They fit a terminal of this size; 0: whatever their size."""
    head = [*_models(event), ""]
    requests = list(_table(REQUEST_COLUMNS, [_request(r) for r in last], width)) if last else []
    room = max(height - len(head) - 1, 0) if height else sys.maxsize  # the cursor has a line, too
    kept = requests[: 1 + max(LEAST_REQUESTS, room - len(event["workers"]) - 2)]
    workers = list(_workers(event, width))
    for_workers = room - len(kept) - bool(kept)
    if len(workers) > for_workers:
        shown = max(for_workers - 1, 1)
        workers = [*workers[:shown], f"... and {len(workers) - shown} more"]
    lines = [*head, *workers, *(["", *kept] if kept else [])]
    return [one_line(line)[: width or None] for line in lines[: room + len(head)]]


def _models(event: dict[str, Any]) -> Iterator[str]:
    for name, model in event["scaling"]["models"].items():
        wanted = f" of {model['wanted']} wanted" if "wanted" in model else ""
        # where the number of workers is fixed, the rule's reasons decide nothing
        why = f" ({model['reason']})" if model.get("scales") and model.get("reason") else ""
        workers = "worker" if model["present"] == 1 else "workers"
        yield f"{name}: {model['present']} {workers}{wanted}, {model['queued']} queued{why}"
    yield f"{event['open_requests']} requests open, policy {event['policy']}"


def _workers(event: dict[str, Any], width: int) -> Iterator[str]:
    if event["workers"]:
        yield from _table(COLUMNS, [_worker(w) for w in event["workers"]], width)
    elif any(model.get("wanted", 1) for model in event["scaling"]["models"].values()):
        yield "No worker is here. Why none starts is in the log of whoever starts them."
    else:
        yield "No worker is wanted now. The next request starts one."


def _table(
    columns: Sequence[str], rows: Sequence[Mapping[str, object]], width: int
) -> Iterator[str]:
    """Without dispensable columns, as far as the width asks for it."""
    left = list(columns)
    for gone in ("", *DISPENSABLE):
        left = [name for name in left if name != gone]
        lines = list(table(left, [[row[name] for name in left] for row in rows]))
        if not width or max(map(len, lines)) <= width:
            break
    yield from lines


def _worker(w: dict[str, Any]) -> dict[str, object]:
    return {
        "worker": w["id"],
        "model": w["base"],
        "state": w["state"],
        "requests": f"{w['load']}/{w['capacity']}",
        "slots busy/full/all": f"{w['slots_busy']}/{w['slots_loaded']}/{w['slots']}",
        "kv": f"{w['kv_usage']:.0%}",
        "step ms": w["step_ms"],
        "load ms": w["load_ms"],
        "stall ms": w["stall_ms"],
        "moved": w["moved"],
        "restarts": w["restarts"],
        "why": w["reason"],
    }


def _request(r: dict[str, Any]) -> dict[str, object]:
    model = r["base"] if r["adapter"] is None else f"{r['base']}:{r['adapter']}"
    refused = r["engine_status"] and f"engine: {r['engine_status']}"
    shown = (r["id"], model, r["worker"], r["code"] or refused or r["outcome"], r["tier"])
    cells = (*shown, r["ttft_ms"], r["total_ms"])
    return {
        name: "-" if cell is None else cell
        for name, cell in zip(REQUEST_COLUMNS, cells, strict=True)
    }
