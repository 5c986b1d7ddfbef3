"""Shell. `loraplex status`: the workers of a running gateway, wanted and present, and the
reason.
"""

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

COLUMNS = ("model", "wanted", "serving", "starting", "draining", "queued", "bounds")


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "status",
        help="workers of a running gateway: wanted, present, and why",
        description="How many workers each model has and should have, and why.",
    )
    gateway_flags(parser)
    parser.add_argument("--json", action="store_true", help="print the gateway's own answer")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    try:
        gateway = GatewayClient(args.url, read_key(args.key_file))
        status, answer = gateway.call("GET", "/admin/autoscale", {})
    except CommandFailed as exc:
        print(f"loraplex status: {exc}", file=sys.stderr)
        return 1
    if status != 200:
        print(f"loraplex status: {args.url} answered {status}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(answer))
        return 0
    show_table(COLUMNS, [_row(name, model) for name, model in answer["models"].items()])
    for name, model in answer["models"].items():
        if model.get("scales") and model.get("reason"):
            print(f"{name}: {model['reason']}")
    if not answer["supervisor"]:
        print("The workers are started by somebody else: nothing here scales them.")
    return 0


def _row(name: str, model: dict[str, Any]) -> list[object]:
    if "wanted" not in model:
        return [name, "-", model["present"], "-", "-", model["queued"], "-"]
    bounds = f"{model['min_replicas']}-{model['max_replicas']}" if model["scales"] else "fixed"
    counts = [model[column] for column in COLUMNS[1:6]]
    return [name, *counts, bounds]
