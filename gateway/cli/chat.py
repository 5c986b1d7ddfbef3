"""Shell. `loraplex chat MODEL`: a conversation with a model or adapter in the terminal, and for
each answer who gave it and how fast.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gateway.cli.client import DEFAULT_URL, Failed
from shared.config.gateway import is_loopback

KEY_ENV = "LORAPLEX_API_KEY"
ENDS = ("/exit", "/quit")
SILENCE_S = 300.0
"""Between two pieces of an answer; the first may wait for a worker to start."""


@dataclass(slots=True)
class Told:
    """What is known of one answer once it has ended. Times in seconds."""

    headers: Mapping[str, str] = field(default_factory=dict)
    text: str = ""
    ttft_s: float = 0.0
    total_s: float = 0.0
    tokens: int = 0


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "chat",
        help="talk to a model in the terminal",
        description="A conversation with MODEL, or one answer to --prompt. /exit ends it, "
        "/clear forgets what was said.",
    )
    parser.add_argument("model", metavar="MODEL", help="a base model, or base:adapter")
    parser.add_argument("--url", default=DEFAULT_URL, help=f"gateway (default {DEFAULT_URL})")
    parser.add_argument("--system", help="the system prompt")
    parser.add_argument("--prompt", help="ask this alone and end")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    opening = [{"role": "system", "content": args.system}] if args.system else []
    said: list[dict[str, str]] = [*opening]
    while True:
        question = args.prompt if args.prompt is not None else _asked()
        if question is None or question.strip() in ENDS:
            return 0
        if question.strip() == "/clear":
            said = [*opening]
            continue
        if not question.strip():
            continue
        said.append({"role": "user", "content": question})
        try:
            told = _answer(args, said)
        except Failed as exc:
            print(f"loraplex chat: {exc}", file=sys.stderr)
            said.pop()
            if args.prompt is not None:
                return 1
            continue
        said.append({"role": "assistant", "content": told.text})
        print(f"\n{summary(told)}", file=sys.stderr)
        if args.prompt is not None:
            return 0


def _asked() -> str | None:
    """None: the input has ended."""
    try:
        return input("> ")
    except EOFError:
        return None


def _answer(args: argparse.Namespace, said: list[dict[str, str]]) -> Told:
    body: dict[str, Any] = {
        "model": args.model,
        "messages": said,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": args.max_tokens,
    }
    if args.temperature is not None:
        body["temperature"] = args.temperature
    told, began = Told(), time.monotonic()
    for event in _events(args.url, body, told):
        error = event.get("error")
        if error:
            raise Failed(str(error.get("message", error)))
        told.tokens = (event.get("usage") or {}).get("completion_tokens", told.tokens)
        for choice in event.get("choices", ()):
            piece = choice.get("delta", {}).get("content") or ""
            if piece and not told.ttft_s:
                told.ttft_s = time.monotonic() - began
            told.text += piece
            print(piece, end="", flush=True)
    told.total_s = time.monotonic() - began
    return told


def _events(url: str, body: object, told: Told) -> Iterator[dict[str, Any]]:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY_ENV, "").strip():
        headers["Authorization"] = f"Bearer {key}"
    address = f"{url.rstrip('/')}/v1/chat/completions"
    try:
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        local = is_loopback(urllib.parse.urlsplit(address).hostname or "")
        opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))
        with opener.open(request, timeout=SILENCE_S) as answer:
            told.headers = {name.lower(): value for name, value in answer.headers.items()}
            for line in answer:
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])
    except urllib.error.HTTPError as exc:
        raise Failed(_words(exc)) from exc
    except (OSError, ValueError, http.client.HTTPException) as exc:
        reason = getattr(exc, "reason", exc)
        raise Failed(f"no gateway answers at {url} ({reason}); is --url right?") from exc


def _words(exc: urllib.error.HTTPError) -> str:
    try:
        message = json.loads(exc.read())["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"answered {exc.code}"
    hint = f" (the key is read from {KEY_ENV})" if exc.code == 401 else ""
    return f"{message}{hint}"


def summary(told: Told) -> str:
    """Who answered, from where, and how fast."""
    head = told.headers
    worker, tier = head.get("x-loraplex-worker"), head.get("x-loraplex-adapter-tier")
    parts = [f"worker {worker}" if worker else "", f"adapter from {tier}" if tier else ""]
    parts.append(f"first token {told.ttft_s * 1e3:.0f} ms")
    after_first_s = told.total_s - told.ttft_s
    if told.tokens > 1 and after_first_s > 0:
        parts.append(f"{(told.tokens - 1) / after_first_s:.0f} tokens/s")
    parts.append(f"{told.tokens} tokens")
    return "[" + ", ".join(part for part in parts if part) + "]"
