"""Shell. `loraplex top`: the fleet in a terminal, once a second."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from gateway.cli.client import DEFAULT_URL, KEY_ENV, Failed, Gateway, read_key, show_table

HOME_AND_CLEAR = "\x1b[H\x1b[J"
LAST_REQUESTS = 10
COLUMNS = ("worker", "model", "state", "load", "slots", "kv", "step ms", "load ms", "why")


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "top",
        help="the fleet of a running gateway, live",
        description="Workers and the last requests, once a second, until Ctrl-C.",
    )
    parser.add_argument("--url", default=DEFAULT_URL, help=f"gateway (default {DEFAULT_URL})")
    parser.add_argument(
        "--key-file", type=Path, help=f"file with the admin key (default: {KEY_ENV})"
    )
    parser.add_argument("--once", action="store_true", help="print one state and end")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    last: list[dict[str, Any]] = []
    try:
        for event in Gateway(args.url, read_key(args.key_file)).events("/admin/live"):
            last = [*event["requests"], *last][:LAST_REQUESTS]
            if not args.once and sys.stdout.isatty():
                print(HOME_AND_CLEAR, end="")
            _show(event, last)
            if args.once:
                return 0
    except Failed as exc:
        print(f"loraplex top: {exc}", file=sys.stderr)
        return 1
    return 0


def _show(event: dict[str, Any], last: list[dict[str, Any]]) -> None:
    for name, model in event["scaling"]["models"].items():
        wanted = f" of {model['wanted']} wanted" if "wanted" in model else ""
        why = f" ({model['reason']})" if model.get("reason") else ""
        print(f"{name}: {model['present']} workers{wanted}, {model['queued']} queued{why}")
    print(f"{event['open_requests']} requests open, policy {event['policy']}\n")
    show_table(COLUMNS, [_worker(w) for w in event["workers"]])
    if last:
        print()
        head = ("request", "model", "worker", "outcome", "tier", "ttft ms", "total ms")
        show_table(head, [_request(r) for r in last])
    sys.stdout.flush()


def _worker(w: dict[str, Any]) -> list[object]:
    slots = f"{w['slots_busy']}/{w['slots_loaded']}/{w['slots']}"
    load = f"{w['load']}/{w['capacity']}"
    kv = f"{w['kv_usage']:.0%}"
    return [
        w["id"],
        w["base"],
        w["state"],
        load,
        slots,
        kv,
        w["step_ms"],
        w["load_ms"],
        w["reason"],
    ]


def _request(r: dict[str, Any]) -> list[object]:
    model = r["base"] if r["adapter"] is None else f"{r['base']}:{r['adapter']}"
    shown = [r["worker"], r["code"] or r["outcome"], r["tier"], r["ttft_ms"], r["total_ms"]]
    return [r["id"], model, *("-" if cell is None else cell for cell in shown)]
