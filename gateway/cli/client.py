"""Shell. What the commands of the CLI share: requests to a running gateway, and printed tables."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Generator, Iterator, Sequence
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
"""The fields of an adapter that are printed, in this order. `serving` is left out if it equals
`digest`.
"""


SLACK_S = 10.0  # beyond what the gateway itself waits for its workers


class CommandFailed(Exception):
    """The message for the person at the terminal. The exit status is 1."""


class Unreachable(CommandFailed):
    """No gateway answers, or it does not answer any more. It may come back."""


def gateway_flags(parser: argparse.ArgumentParser) -> None:
    """Which gateway is asked, and with which key: `--url` and `--key-file`."""
    parser.add_argument(
        "--url", default=DEFAULT_URL, help=f"of the gateway (default {DEFAULT_URL})"
    )
    parser.add_argument(
        "--key-file", type=Path, help=f"file with the admin key (default: the variable {KEY_ENV})"
    )


def common_flags(instead: str) -> argparse.ArgumentParser:
    """The options of every command that asks a gateway. `instead` is the hint for a command that
    does not need --base.
    """
    common = argparse.ArgumentParser(add_help=False)
    gateway_flags(common)
    common.add_argument("--base", help=f"base model, where there are several; {instead}")
    common.add_argument("--json", action="store_true", help="print the gateway's own answer")
    return common


def read_key(file: Path | None) -> str:
    """The admin key: the first line of the file, or else the variable LORAPLEX_ADMIN_KEY. It may be
    empty.

    Raises ConfigError if the file cannot be read.
    """
    if file is None:
        return os.environ.get(KEY_ENV, "").strip()
    try:
        return file.expanduser().read_text().strip().partition("\n")[0]
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"--key-file: cannot read {file}: {exc}") from exc


def opener_for(url: str) -> urllib.request.OpenerDirector:
    """What opens the paths below the address that `--url` names. It asks no proxy for loopback.

    Raises ConfigError if that is no address.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        right = parts.scheme in ("http", "https") and parts.port != 0
    except ValueError:  # brackets or a port that cannot be
        right = False
    if not right or not parts.hostname:
        raise ConfigError(f"--url: expected http://host:port, got {url}")
    return urllib.request.build_opener(
        *([urllib.request.ProxyHandler({})] if is_loopback(parts.hostname) else [])
    )


class GatewayClient:
    """Asks the HTTP paths of a gateway.

    Every method raises CommandFailed with a message that says what to do, if the gateway cannot be
    reached or refuses.
    """

    def __init__(self, url: str, key: str) -> None:
        self._opener = opener_for(url)
        self.url, self.key = url.rstrip("/"), key
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def call(
        self,
        method: str,
        path: str,
        query: dict[str, str],
        body: object = None,
        timeout_s: float = 60.0,
    ) -> tuple[int, Any]:
        """(status, answer) of one request. The answer is decoded JSON, or text if it is no JSON."""
        # a name of the command line may hold bytes that are no text; the gateway says so
        url = f"{self.url}{urllib.parse.quote(path, errors='surrogateescape')}" + (
            f"?{urllib.parse.urlencode(query, errors='surrogateescape')}" if query else ""
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
            raise self._unanswered(exc) from exc

    def lines(
        self, method: str, path: str, query: dict[str, str], silence_s: float
    ) -> Iterator[Any]:
        """Yields the JSON lines of an answer as they come. At most `silence_s` may pass between
        two.
        """
        url = f"{self.url}{path}?{urllib.parse.urlencode(query)}"
        request = urllib.request.Request(url, b"{}", self._headers, method=method)
        request.add_header("Content-Type", "application/json")
        try:
            with self._opener.open(request, timeout=silence_s + SLACK_S) as answer:
                for line in answer:
                    yield json.loads(line)
        except urllib.error.HTTPError as exc:
            self._explained(exc.code, _decoded(exc.read()))
        except urllib.error.URLError as exc:
            raise self._unanswered(exc) from exc
        except (OSError, ValueError, http.client.HTTPException) as exc:
            raise CommandFailed(f"{self.url} broke off ({getattr(exc, 'reason', exc)})") from exc

    def events(self, path: str, timeout_s: float = 30.0) -> Generator[Any, None, None]:
        """Yields the JSON events of a server-sent stream until it ends."""
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
            raise Unreachable(f"no gateway answers at {self.url} ({reason})") from exc

    def _unanswered(self, exc: Exception) -> Unreachable:
        reason = getattr(exc, "reason", exc)
        return Unreachable(
            f"no gateway answers at {self.url} ({reason}); is it running, is --url right?"
        )

    def _explained(self, status: int, answer: Any) -> Any:
        error = answer.get("error") if isinstance(answer, dict) else None
        message = error.get("message", "") if isinstance(error, dict) else ""
        if status == 401:
            how = "is wrong" if self._headers else "is needed"
            raise CommandFailed(
                f"an admin key {how}: set {KEY_ENV}, or give --key-file FILE ({message})"
            )
        if status == 403 or not isinstance(answer, dict) or "results" not in answer:
            raise CommandFailed(
                message or f"{self.url} answered {status}; is this a Loraplex gateway?"
            )
        return answer


def _decoded(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return raw.decode(errors="replace")


def show_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints the rows below the head, in columns that are wide enough for all cells."""
    for line in table(head, rows):
        print(line)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    """The lines that `show_table` prints."""
    lines = [head, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(head))]
    yield from _padded(lines, widths)


def _padded(lines: Sequence[Sequence[str]], widths: Sequence[int]) -> Iterator[str]:
    for line in lines:
        yield "  ".join(
            cell.ljust(width) for cell, width in zip(line, widths, strict=True)
        ).rstrip()
