"""Shell. `loraplex adapters ...`: shows and changes the adapters of a running gateway over its HTTP
paths, and checks adapters without a gateway.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from gateway.cli.client import (
    SHOWN,
    CommandFailed,
    GatewayClient,
    common_flags,
    read_key,
    show_table,
)
from loraplex.start import command
from shared.option_numbers import seconds

DONE = {
    "load": "loaded",
    "unload": "unloaded",
    "pin": "pinned",
    "unpin": "unpinned",
    "prefetch": "prefetched",
    "evict": "evicted",
}
HELP = {
    "load": "look at the store now and bring the adapter into a slot",
    "unload": "take the adapter out of every engine; its files stay on disk",
    "pin": "keep the adapter in a slot of every worker, restarts included",
    "unpin": "let it make room for others again",
    "prefetch": "bring the adapter onto the workers' disks (--gpu: into a slot)",
    "evict": "take the adapter out of the engines",
}


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "adapters",
        help="look after the adapters of a running gateway",
        description=__doc__.partition(". ")[2],
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    common = common_flags("NAME may also be BASE:ADAPTER")
    _add_views(actions, common)
    for action, text in HELP.items():
        _add_action(actions, common, action, text)
    _add_validate(actions)
    _add_verify(actions)
    _add_convert(actions)


def _add_views(actions: Any, common: argparse.ArgumentParser) -> None:
    ls = actions.add_parser(
        "ls", parents=[common], help="every adapter: where it is, how often it was asked for"
    )
    ls.add_argument(
        "--state",
        help="only those that are listed, cached, warm, loading, loaded, pinned or invalid",
    )
    ls.add_argument(
        "--skipped",
        action="store_true",
        help="instead, the folders of the store that are no adapters, and why",
    )
    ls.set_defaults(run=lambda args: _run(_ls, args))
    show = actions.add_parser("show", parents=[common], help="one adapter, worker by worker")
    show.add_argument("name", metavar="NAME")
    show.set_defaults(run=lambda args: _run(_show, args))


def _add_action(actions: Any, common: argparse.ArgumentParser, action: str, text: str) -> None:
    doing = actions.add_parser(action, parents=[common], help=text, description=text)
    doing.add_argument("name", metavar="NAME")
    doing.add_argument(
        "--timeout",
        type=seconds,
        default=60.0,
        metavar="SECONDS",
        help="how long to wait for the workers (default 60)",
    )
    if action == "load":
        doing.add_argument(
            "--all",
            action="store_true",
            help="on every worker, not only where requests would go",
        )
    elif action != "unload":
        doing.add_argument("--worker", help="on this worker only")
    if action == "prefetch":
        doing.add_argument("--gpu", action="store_true", help="into a slot, not only onto the disk")
    doing.set_defaults(run=lambda args: _run(_act, args))


def _add_validate(actions: Any) -> None:
    validate = actions.add_parser(
        "validate",
        help="check an adapter as a worker would, without a gateway",
        description=VALIDATE,
    )
    validate.add_argument(
        "path",
        metavar="PATH_OR_URL",
        help="a folder, s3://bucket/folder, gs://bucket/folder or hf://org/repo@revision",
    )
    validate.add_argument(
        "--config", required=True, help="the config with the base model that it is for"
    )
    validate.add_argument(
        "--model", metavar="BASE", help="which model of the config, if it has several"
    )
    validate.add_argument("--json", action="store_true", help="print the verdict as JSON")
    validate.set_defaults(run=_validate)


def _add_verify(actions: Any) -> None:
    verify = actions.add_parser(
        "verify",
        help="compare a served adapter with PEFT on this host, token by token",
        description=VERIFY,
    )
    verify.add_argument("name", metavar="NAME")
    verify.add_argument("--config", required=True, help="the config that the gateway serves")
    verify.add_argument("--model", metavar="BASE", help="which of its models, if it has several")
    verify.add_argument("--url", default="http://127.0.0.1:8000", help="the gateway")
    verify.add_argument("--close", default="0.02", help="difference of logprobs that is no fault")
    verify.set_defaults(run=_verify)


def _add_convert(actions: Any) -> None:
    convert = actions.add_parser(
        "convert",
        help="make safetensors of pickled weights, or a plain LoRA of other kinds",
        description=CONVERT,
    )
    convert.add_argument("folder", metavar="FOLDER", help="the adapter's folder")
    convert.add_argument("--out", help="folder of the plain LoRA (default FOLDER-lora)")
    convert.add_argument("--max-rank", help="bound of its rank (default 64)")
    convert.add_argument("--base", help="folder of the base model, for PiSSA and OLoRA")
    convert.add_argument("--initial", help="or: the adapter as its training began")
    convert.set_defaults(run=_convert)


VALIDATE = (
    "Check an adapter with exactly the checks that a worker makes. Exit status: 0 valid, 1 "
    "not valid, 2 it could not be checked."
)


def _validate(args: argparse.Namespace) -> int:
    """Replaces this process by a worker's validation, which may import model code and read
    weights.
    """
    rest = (["--model", args.model] if args.model else []) + (["--json"] if args.json else [])
    sys.stdout.flush()
    words = command("worker.validation", args.path, "--config", args.config, *rest)
    os.execv(sys.executable, words)


VERIFY = (
    "Ask the gateway for a few greedy answers and compare each token with PEFT and transformers in "
    "float32 on this host. Exit status: 0 the same, 1 different, 2 it could not be compared. Of an "
    "engine in bfloat16 take --close 0.2. A key comes from LORAPLEX_API_KEY."
)


def _verify(args: argparse.Namespace) -> int:
    rest = ["--config", args.config, "--url", args.url, "--close", args.close]
    rest += ["--model", args.model] if args.model else []
    sys.stdout.flush()
    os.execv(sys.executable, command("worker.validation.oracle", args.name, *rest))


CONVERT = (
    "Pickled weights (adapter_model.bin) become safetensors beside them, without running any code. "
    "LoHa, LoKr, AdaLoRA, PiSSA and OLoRA become a plain LoRA in a folder of its own, and the "
    "error of the conversion is printed."
)


def _convert(args: argparse.Namespace) -> int:
    flags = {"--out": args.out, "--max-rank": args.max_rank}
    flags |= {"--base": args.base, "--initial": args.initial}
    rest = [word for flag, value in flags.items() if value is not None for word in (flag, value)]
    sys.stdout.flush()
    os.execv(sys.executable, command("worker.validation.convert", args.folder, *rest))


def _run(action: Any, args: argparse.Namespace) -> int:
    try:
        return int(action(args, GatewayClient(args.url, read_key(args.key_file))))
    except CommandFailed as exc:
        print(f"loraplex adapters {args.action}: {exc}", file=sys.stderr)
        return 1


def _ls(args: argparse.Namespace, gateway: GatewayClient) -> int:
    if args.skipped:
        return _ls_skipped(args, gateway)
    query = {k: v for k, v in (("base", args.base), ("state", args.state)) if v}
    rows: list[dict[str, Any]] = []
    while True:
        _, page = gateway.call("GET", "/admin/adapters", query)
        if not isinstance(page, dict) or "adapters" not in page:
            raise CommandFailed(
                f"{gateway.url} does not answer like a Loraplex gateway; is --url right?"
            )
        rows += page["adapters"]
        if not page["next"]:
            break
        query["after"] = page["next"]
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    show_table(
        ("NAME", "STATE", "RANK", "MIB", "HITS", "LAST USED", "WORKERS"),
        [
            (
                f"{r['base']}:{r['name']}",
                r["state"],
                r["rank"] or "-",
                f"{r['bytes'] / 2**20:.1f}" if r["bytes"] is not None else "-",
                r["hits"],
                (r["last_used"] or "-")[:19],
                " ".join(_place(w) for w in r["workers"]) or "-",
            )
            for r in rows
        ],
    )
    if page["skipped"]:
        print(f"{page['skipped']} folders of the store are skipped; --skipped says why")
    return 0


def _ls_skipped(args: argparse.Namespace, gateway: GatewayClient) -> int:
    _, found = gateway.call("GET", "/admin/skipped", {"base": args.base} if args.base else {})
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    show_table(
        ("BASE", "FOLDER", "REASON"),
        [(s["base"], s["folder"], s["reason"]) for s in found["skipped"]],
    )
    if (more := found["total"] - len(found["skipped"])) > 0:
        print(f"and {more} more")
    return 0


def _show(args: argparse.Namespace, gateway: GatewayClient) -> int:
    base, name = _target(args)
    _, found = gateway.call("GET", f"/admin/adapters/{name}", {"base": base} if base else {})
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    for key in SHOWN if found.get("update") else [key for key in SHOWN if key != "serving"]:
        value = found.get(key)
        if value not in (None, [], False):
            print(
                f"{key.replace('_', ' ') + ':':14}"
                f"{', '.join(value) if isinstance(value, list) else value}"
            )
    if not found["in_store"]:
        print("the store does not have it any more")
    if found["workers"]:
        print()
        rows = [
            (w["worker"], w["tier"], w["digest"], w["in_flight"], _notes(w))
            for w in found["workers"]
        ]
        show_table(("WORKER", "TIER", "DIGEST", "IN FLIGHT", ""), rows)
    return 0


def _act(args: argparse.Namespace, gateway: GatewayClient) -> int:
    base, name = _target(args)
    query = {"timeout_s": f"{args.timeout:g}"}
    if args.action in ("load", "unload"):
        query |= {"all": "1"} if getattr(args, "all", False) else {}
        body = {"lora_name": f"{base}:{name}" if base else name}
        _, answer = gateway.call(
            "POST", f"/v1/{args.action}_lora_adapter", query, body, args.timeout
        )
    else:
        query |= {"base": base} if base else {}
        query |= {"worker": args.worker} if args.worker else {}
        query |= {"tier": "gpu"} if getattr(args, "gpu", False) else {}
        _, answer = gateway.call(
            "POST", f"/admin/adapters/{name}/{args.action}", query, {}, args.timeout
        )
    return _report(args, answer)


def _report(args: argparse.Namespace, answer: Any) -> int:
    results = answer["results"] if isinstance(answer, dict) else []
    failed = [r for r in results if not r["ok"]]
    if args.json:
        print(json.dumps(answer, indent=1))
    elif not isinstance(answer, dict):
        print(answer)  # vLLM's paths answer in words
    elif not results:
        print(f"{args.name}: no worker serves now; it is remembered for those that come")
    else:
        for result in results:
            print(
                f"{result['worker']}: "
                + (DONE[args.action] if result["ok"] else f"{result['code']}: {result['message']}")
            )
    return 1 if failed else 0


def _target(args: argparse.Namespace) -> tuple[str | None, str]:
    """(base model or None, adapter name). A base model's id has no colon, but an adapter's name
    may.
    """
    if args.base:
        return args.base, args.name.removeprefix(f"{args.base}:")
    base, colon, name = args.name.partition(":")
    return (base, name) if colon else (None, args.name)


def _place(worker: dict[str, Any]) -> str:
    return (
        f"{worker['worker']}:{worker['tier']}"
        + ("..." if worker["loading"] else "")
        + ("*" if worker["pinned"] else "")
    )


def _notes(worker: dict[str, Any]) -> str:
    return ", ".join(word for word in ("pinned", "loading", "steady") if worker.get(word))
