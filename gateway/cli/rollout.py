"""Shell. `loraplex rollout`: replaces the workers of a running gateway one after the other."""

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
)
from shared.option_numbers import seconds, seconds_or_none


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "rollout",
        help="replace all workers, one after the other, without a failed request",
        description="Each worker's adapters are loaded elsewhere, its streams move, it ends and is "
        "started again by whoever started it; then comes the next one. Ctrl-C ends it in between.",
    )
    gateway_flags(parser)
    parser.add_argument("--model", help="workers of this base model alone")
    parser.add_argument("--worker", help="this worker alone; does not wait for its successor")
    parser.add_argument(
        "--wait",
        type=seconds_or_none,
        default=0.0,
        metavar="S",
        help="before streams move (default: 0)",
    )
    parser.add_argument(
        "--timeout", type=seconds, default=600.0, metavar="S", help="for a worker to come back"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    query = {"wait_s": f"{args.wait:g}"} if args.wait else {}
    try:
        gateway = GatewayClient(args.url, read_key(args.key_file))
        if args.worker:
            path = f"/admin/workers/{args.worker}/drain"
            _, answer = gateway.call("POST", path, query, timeout_s=args.wait + args.timeout)
            print(json.dumps(answer))
            return 0
        query |= {"timeout_s": f"{args.timeout:g}"} | ({"model": args.model} if args.model else {})
        last: dict[str, Any] = {}
        for last in gateway.lines("POST", "/admin/rollout", query, args.timeout):
            print(_progress_line(last), flush=True)
    except CommandFailed as exc:
        print(f"loraplex rollout: {exc}", file=sys.stderr)
        return 1
    return 0 if "done" in last else 1


def _progress_line(step: dict[str, Any]) -> str:
    if "error" in step:
        return f"failed: {step['error']}"
    if "done" in step:
        return f"{step['done']} worker(s) replaced"
    if step["step"] == "draining":
        return (
            f"{step['worker']}: draining, {step['requests']} request(s) move, "
            f"{step['warmed']} adapter(s) loaded elsewhere"
        )
    return f"{step['worker']}: replaced after {step['took_s']} s"
