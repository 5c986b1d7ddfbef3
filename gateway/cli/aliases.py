"""Shell. `loraplex aliases ...`: shows and changes the aliases of a running gateway over its HTTP
paths.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime
from typing import Any

from gateway.cli.client import CommandFailed, GatewayClient, common_flags, read_key, show_table
from shared.errors import ConfigError

SET_HELP = (
    "let an alias stand for an adapter, or for several by weight; returns once they are "
    "loaded somewhere"
)
TIMEOUT_S = 120.0  # of the gateway's own waiting for the loads


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "aliases",
        help="names for adapters of a running gateway",
        description=__doc__.partition(". ")[2],
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    common = common_flags("ALIAS may also be BASE:ALIAS")
    ls = actions.add_parser(
        "ls", parents=[common], help="every alias: its adapters, their shares, requests and errors"
    )
    ls.set_defaults(run=lambda args: _run(_ls, args))
    setting = actions.add_parser("set", parents=[common], help=SET_HELP, description=SET_HELP)
    setting.add_argument("alias", metavar="ALIAS")
    setting.add_argument(
        "shares",
        metavar="ADAPTER[=WEIGHT]",
        nargs="+",
        help="`v8`, `v8@0a1b2c3d`, or `v7=90 v8=10`",
    )
    setting.add_argument(
        "--now", action="store_true", help="do not wait until the adapters are loaded"
    )
    setting.set_defaults(run=lambda args: _run(_set, args))
    rm = actions.add_parser(
        "rm", parents=[common], help="take an alias away; the config's of the same name holds again"
    )
    rm.add_argument("alias", metavar="ALIAS")
    rm.set_defaults(run=lambda args: _run(_rm, args))


def _run(action: Any, args: argparse.Namespace) -> int:
    try:
        action(args, GatewayClient(args.url, read_key(args.key_file)))
    except CommandFailed as exc:
        print(f"loraplex aliases {args.action}: {exc}", file=sys.stderr)
        return 1
    return 0


def _ls(args: argparse.Namespace, gateway: GatewayClient) -> None:
    _show(
        args,
        [
            entry
            for entry in _aliases(gateway)
            if args.base in (None, entry["model"].partition(":")[0])
        ],
    )


def _set(args: argparse.Namespace, gateway: GatewayClient) -> None:
    """Sets only the shares. The bounds of the automatic rollback stay as they are."""
    body: dict[str, object] = {"shares": [_share(text) for text in args.shares]}
    base, colon, alias = args.alias.partition(":")
    if not colon:
        base, alias = "", args.alias
    for entry in _aliases(gateway):
        of, _, name = entry["model"].partition(":")
        if name == alias and (base or args.base or of) == of:
            body["rollback"] = entry["rollback"]
    _, entry = gateway.call("PUT", _path(args), {"now": "1"} if args.now else {}, body, TIMEOUT_S)
    _show(args, [entry])


def _rm(args: argparse.Namespace, gateway: GatewayClient) -> None:
    _, answer = gateway.call("DELETE", _path(args), {})
    if args.json:
        print(json.dumps(answer, indent=1))
        return
    print(
        f"{answer['deleted']}: deleted"
        + (", and the config's holds again" if answer["now"] else "")
    )
    if answer["now"]:
        _show(args, [answer["now"]])


def _aliases(gateway: GatewayClient) -> list[Any]:
    _, answer = gateway.call("GET", "/admin/aliases", {})
    if not isinstance(answer, dict) or "aliases" not in answer:
        raise CommandFailed(
            f"{gateway.url} does not answer like a Loraplex gateway; is --url right?"
        )
    return list(answer["aliases"])


def _share(text: str) -> dict[str, object]:
    adapter, equals, weight = text.partition("=")
    if not equals:
        return {"adapter": adapter}
    try:
        return {"adapter": adapter, "weight": float(weight)}
    except ValueError:
        raise ConfigError(
            f"`{text}`: expected ADAPTER=WEIGHT with a number as the weight"
        ) from None


def _path(args: argparse.Namespace) -> str:
    return "/admin/aliases/" + (
        args.alias if ":" in args.alias or not args.base else f"{args.base}:{args.alias}"
    )


def _show(args: argparse.Namespace, entries: list[Any]) -> None:
    if args.json:
        print(json.dumps(entries, indent=1))
        return
    rows = [
        (
            entry["model"] if not n else "",
            share["adapter"],
            f"{share['weight']:g}",
            share["requests"],
            share["errors"],
            entry["source"] if not n else "",
            _fate(share)
            or ("hides the adapter of this name" if entry["hides_adapter"] and not n else ""),
        )
        for entry in entries
        for n, share in enumerate(entry["shares"])
    ]
    show_table(("ALIAS", "ADAPTER", "WEIGHT", "REQUESTS", "ERRORS", "FROM", ""), rows)


def _fate(share: dict[str, Any]) -> str:
    rollback = share["rolled_back"]
    if not rollback:
        return ""
    return (
        "rolled back "
        f"{datetime.fromtimestamp(rollback['at']).astimezone().isoformat(timespec='seconds')}: "
        f"{rollback['reason']}"
    )
