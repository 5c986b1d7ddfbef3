"""Shell. What all commands of the CLI share: how they ask a running gateway, and how they print."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shared.config.gateway import is_loopback
from shared.errors import ConfigError

KEY_ENV = "LORAPLEX_ADMIN_KEY"


DEFAULT_URL = "http://127.0.0.1:8000"


SHOWN = (
    *("base", "name", "digest", "state", "update", "serving", "bytes", "rank", "hits", "last_used"),
    *("to_be_pinned", "preload", "code", "reason"),
)
"""Of an adapter, in this order; `serving` only while it is not `digest`."""


SLACK_S = 10.0  # beyond what the gateway itself waits for its workers


class Failed(Exception):
    """What the person at the terminal must know; exit status 1."""


def common_flags(instead: str) -> argparse.ArgumentParser:
    """What every action that speaks to a gateway takes. `instead` says what makes --base
    needless.
    """
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--url", default=DEFAULT_URL, help=f"of the gateway (default {DEFAULT_URL})"
    )
    common.add_argument("--base", help=f"base model, where there are several; {instead}")
    common.add_argument(
        "--key-file", type=Path, help=f"file with the admin key (default: the variable {KEY_ENV})"
    )
    common.add_argument("--json", action="store_true", help="print the gateway's own answer")
    return common


def read_key(file: Path | None) -> str:
    if file is None:
        return os.environ.get(KEY_ENV, "").strip()
    try:
        return file.expanduser().read_text().strip().partition("\n")[0]
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"--key-file: cannot read {file}: {exc}") from exc


class Gateway:
    """Its HTTP paths. Raises Failed with what to do for whatever is not an answer."""

    def __init__(self, url: str, key: str) -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            right = parts.scheme in ("http", "https") and parts.port != 0
        except ValueError:  # brackets or a port that cannot be
            right = False
        if not right or not parts.hostname:
            raise ConfigError(f"--url: expected http://host:port, got {url}")
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._opener = urllib.request.build_opener(
            *([urllib.request.ProxyHandler({})] if is_loopback(parts.hostname) else [])
        )

    def call(
        self,
        method: str,
        path: str,
        query: dict[str, str],
        body: object = None,
        timeout_s: float = 60.0,
    ) -> tuple[int, Any]:
        url = f"{self.url}{urllib.parse.quote(path)}" + (
            f"?{urllib.parse.urlencode(query)}" if query else ""
        )
        data = json.dumps(body).encode() if method in ("POST", "PUT") else None
        kind = {"Content-Type": "application/json"} if data is not None else {}
        request = urllib.request.Request(url, data, {**self._headers, **kind}, method=method)
        try:
            with self._opener.open(request, timeout=timeout_s + SLACK_S) as answer:
                return answer.status, _decoded(answer.read())
        except urllib.error.HTTPError as exc:
            return exc.code, self._explained(exc.code, _decoded(exc.read()))
        except (OSError, UnicodeError, http.client.HTTPException) as exc:
            reason = getattr(exc, "reason", exc)
            raise Failed(
                f"no gateway answers at {self.url} ({reason}); is it running, is --url right?"
            ) from exc

    def lines(
        self, method: str, path: str, query: dict[str, str], silence_s: float
    ) -> Iterator[Any]:
        """An answer of JSON lines, each as it comes; `silence_s` may lie between two."""
        url = f"{self.url}{path}?{urllib.parse.urlencode(query)}"
        request = urllib.request.Request(url, b"{}", self._headers, method=method)
        request.add_header("Content-Type", "application/json")
        try:
            with self._opener.open(request, timeout=silence_s + SLACK_S) as answer:
                for line in answer:
                    yield json.loads(line)
        except urllib.error.HTTPError as exc:
            self._explained(exc.code, _decoded(exc.read()))
        except (OSError, ValueError, http.client.HTTPException) as exc:
            raise Failed(f"{self.url} broke off ({getattr(exc, 'reason', exc)})") from exc

    def events(self, path: str, timeout_s: float = 30.0) -> Iterator[Any]:
        """The JSON events of a stream, until it ends."""
        request = urllib.request.Request(self.url + path, None, self._headers)
        try:
            with self._opener.open(request, timeout=timeout_s) as answer:
                for line in answer:
                    if line.startswith(b"data: "):
                        yield _decoded(line[6:])
        except urllib.error.HTTPError as exc:
            self._explained(exc.code, _decoded(exc.read()))
        except (OSError, http.client.HTTPException) as exc:
            reason = getattr(exc, "reason", exc)
            raise Failed(f"no gateway answers at {self.url} any more ({reason})") from exc

    def _explained(self, status: int, answer: Any) -> Any:
        said = answer.get("error", {}).get("message", "") if isinstance(answer, dict) else ""
        if status == 401:
            how = "is wrong" if self._headers else "is needed"
            raise Failed(f"an admin key {how}: set {KEY_ENV}, or give --key-file FILE ({said})")
        if status == 403 or not isinstance(answer, dict) or "results" not in answer:
            raise Failed(said or f"{self.url} answered {status}; is this a Loraplex gateway?")
        return answer


def _decoded(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return raw.decode(errors="replace")


def show_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    lines = [head, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(head))]
    for line in _padded(lines, widths):
        print(line)


def _padded(lines: Sequence[Sequence[str]], widths: Sequence[int]) -> Iterator[str]:
    for line in lines:
        yield "  ".join(
            cell.ljust(width) for cell, width in zip(line, widths, strict=True)
        ).rstrip()
