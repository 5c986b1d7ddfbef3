"""Shell. `loraplex keys ...`: makes, lists and revokes API keys in a keys file. A running gateway
reads the file again by itself. The file holds only digests, so a key is shown once.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from gateway.accounts import key_file
from gateway.accounts.key_file import KeyEntry, LimitsEntry
from gateway.accounts.keys import read_key_file
from gateway.cli.client import show_table
from shared.config.settings_file import read_settings
from shared.errors import ConfigError

KEY_BYTES = 32
SHOWN = 8
"""How many characters of a key are kept, so that a person can recognise it."""
LIMITS = tuple(LimitsEntry.__struct_fields__)


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "keys", help="API keys in a keys file", description=__doc__.partition(". ")[2]
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    common = argparse.ArgumentParser(add_help=False)
    where = common.add_mutually_exclusive_group(required=True)
    where.add_argument("--file", type=Path, help="the keys file (gateway.keys_file)")
    where.add_argument("--config", help="the config that names it")
    new = actions.add_parser("new", parents=[common], help="make a key and print it, once")
    new.add_argument("name", metavar="NAME", help="stands for the key in metrics, logs and usage")
    new.add_argument("--expires", metavar="WHEN", help="a date, a time, or 30d, 12h")
    new.add_argument("--models", metavar="GLOB", nargs="+", help="base models; default: all")
    new.add_argument("--adapters", metavar="GLOB", nargs="*", help="adapters; default: all")
    new.add_argument("--priority", metavar="N", nargs=2, type=int, help="first and last")
    new.add_argument("--weight", type=float, help="share beside other keys; default: 1")
    for limit in LIMITS:
        new.add_argument(f"--{limit.replace('_', '-')}", metavar="N", type=int)
    new.set_defaults(run=_new)
    ls = actions.add_parser("ls", parents=[common], help="every key, without the key")
    ls.set_defaults(run=_ls)
    revoke = actions.add_parser("revoke", parents=[common], help="take keys away")
    revoke.add_argument("names", metavar="NAME", nargs="+")
    revoke.set_defaults(run=_revoke)


def _new(args: argparse.Namespace) -> int:
    key = f"lp-{secrets.token_urlsafe(KEY_BYTES)}"
    given: dict[str, Any] = {
        "expires": args.expires and _expiry(args.expires),
        "models": args.models and tuple(args.models),
        "adapters": None if args.adapters is None else tuple(args.adapters),
        "priority": args.priority and tuple(args.priority),
        "weight": args.weight,
    }
    with _in_words_of_the_command(("KeyEntry: ", ""), ("LimitsEntry: ", "")):
        entry = KeyEntry(
            name=args.name,
            sha256=hashlib.sha256(key.encode()).hexdigest(),
            starts=key[:SHOWN],
            limits=LimitsEntry(**{limit: getattr(args, limit) for limit in LIMITS}),
            **{name: value for name, value in given.items() if value is not None},
        )

    def add(entries: list[KeyEntry]) -> list[KeyEntry]:
        if any(other.name == entry.name for other in entries):
            raise ConfigError(f"there is a key {entry.name} already; revoke it or choose a name")
        return [*entries, entry]

    _change(_path(args), add)
    print(key)
    print("Keep it: it is not shown again.", file=sys.stderr)
    return 0


def _ls(args: argparse.Namespace) -> int:
    rows = []
    with _in_words_of_the_command(*[("gateway.keys_file: ", "--file: ")] * bool(args.file)):
        entries = read_key_file(_path(args))
    for entry in entries:
        limits = {limit: getattr(entry.limits, limit) for limit in LIMITS}
        rows.append(
            [
                entry.name,
                f"{entry.starts}..." if entry.starts else "",
                entry.expires or "never",
                " ".join(entry.models),
                " ".join(entry.adapters) or "none",
                f"{entry.weight:g}",
                " ".join(f"{k}={v}" for k, v in limits.items() if v is not None),
            ]
        )
    show_table(["name", "key", "expires", "models", "adapters", "weight", "limits"], rows)
    return 0


def _revoke(args: argparse.Namespace) -> int:
    def remove(entries: list[KeyEntry]) -> list[KeyEntry]:
        missing = set(args.names) - {entry.name for entry in entries}
        if missing:
            raise ConfigError(f"there is no key {', '.join(sorted(missing))}; see `keys ls`")
        return [entry for entry in entries if entry.name not in args.names]

    _change(_path(args), remove)
    return 0


@contextlib.contextmanager
def _in_words_of_the_command(*names: tuple[str, str]) -> Iterator[None]:
    """An error inside names what the person wrote, not our class or another way to say it."""
    try:
        yield
    except ConfigError as exc:
        message = exc.message
        for ours, theirs in names:
            message = message.replace(ours, theirs)
        raise ConfigError(message) from exc


def _path(args: argparse.Namespace) -> Path:
    if args.file is not None:
        return Path(args.file)
    named = read_settings(args.config).gateway.keys_file
    if named is None:
        raise ConfigError(f"{args.config}: set gateway.keys_file, or name the file with --file")
    return Path(named).expanduser()


def _change(path: Path, change: Callable[[list[KeyEntry]], list[KeyEntry]]) -> None:
    """Changes the file under a lock that every `loraplex keys` takes. The new file replaces the old
    one in one step, so a gateway never reads half of it.
    """
    try:
        with path.with_name(f".{path.name}.lock").open("a") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            entries = read_key_file(path) if path.exists() else []
            aside = path.with_name(f".{path.name}.new")
            descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(key_file.to_text(change(entries)))
                file.flush()
                os.fsync(file.fileno())
            aside.rename(path)
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be written: {exc.strerror}") from exc


def _expiry(given: str) -> str:
    """`30d` and `12h` count from now. Any other text is written into the file as it is."""
    number, unit = given[:-1], given[-1:]
    if number.isdigit() and unit in ("d", "h"):
        ahead = timedelta(**{{"d": "days", "h": "hours"}[unit]: int(number)})
        return (datetime.now(UTC) + ahead).isoformat(timespec="seconds")
    return given
