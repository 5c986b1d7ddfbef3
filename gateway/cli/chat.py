"""Shell. `loraplex chat MODEL`: a conversation with a model or an adapter in the terminal. After
each answer it prints who gave it and how fast.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import importlib
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gateway.cli.client import DEFAULT_URL, CommandFailed, opener_for
from shared.errors import ConfigError
from shared.option_numbers import number

KEY_ENV = "LORAPLEX_API_KEY"
ENDS = ("/exit", "/quit")
CLEAR = "/clear"
_COMMANDS = dict.fromkeys((*range(0x20), *range(0x7F, 0xA0)), "\N{REPLACEMENT CHARACTER}")
_COMMANDS |= {ord("\n"): "\n", ord("\t"): "\t", ord("\r"): ""}
SILENCE_S = 300.0
"""The longest wait for the next piece of an answer. The first may have to wait for a worker to
start.
"""


@dataclass(slots=True)
class AnswerFacts:
    """What is known of one answer. Times are in seconds."""

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
    parser.add_argument("--temperature", type=number)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    in_terminal = sys.stdin.isatty() and args.prompt is None
    if in_terminal:
        _edit_lines()
        print("Ctrl-C stops an answer; Ctrl-D or /exit ends the conversation.", file=sys.stderr)
    if args.prompt is not None and not args.prompt.strip():
        raise ConfigError("--prompt: expected a question, got an empty text")
    opening = [{"role": "system", "content": args.system}] if args.system else []
    conversation: list[dict[str, str]] = [*opening]
    while True:
        try:
            question = _read_question() if args.prompt is None else args.prompt
        except KeyboardInterrupt:
            if not in_terminal:
                raise
            print()  # what was typed is dropped, as in a shell
            continue
        if question is None or (args.prompt is None and question.strip() in ENDS):
            return 0
        if args.prompt is None and question.strip() in ("", CLEAR):
            conversation = [*opening] if question.strip() == CLEAR else conversation
            continue
        conversation.append({"role": "user", "content": question})
        facts = AnswerFacts()
        try:
            _answer(args, conversation, facts)
        except (CommandFailed, KeyboardInterrupt) as exc:
            print("\n" * bool(facts.text), end="", flush=True)
            if isinstance(exc, CommandFailed):
                print(f"loraplex chat: {exc}", file=sys.stderr)
            elif args.prompt is not None:
                raise
            else:
                print("stopped", file=sys.stderr)
            if args.prompt is not None:
                return 1
            conversation.pop()
            continue
        conversation.append({"role": "assistant", "content": facts.text})
        print(f"\n{summary(facts)}", file=sys.stderr)
        if args.prompt is not None:
            return 0


def _read_question() -> str | None:
    """The next question from the terminal. None: the input has ended."""
    try:
        return input("> ")
    except EOFError:
        print()
        return None


def _edit_lines() -> None:
    """Lines can be edited, and earlier ones called back, where Python has it."""
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")


def for_terminal(text: str) -> str:
    """The text without characters that command a terminal: a model may write them, too."""
    return text.translate(_COMMANDS)


def _answer(
    args: argparse.Namespace, conversation: list[dict[str, str]], facts: AnswerFacts
) -> None:
    """Prints the answer as it comes, and fills in the facts. Raises CommandFailed."""
    in_terminal = sys.stdout.isatty()
    body: dict[str, Any] = {
        "model": args.model,
        "messages": conversation,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": args.max_tokens,
    }
    if args.temperature is not None:
        body["temperature"] = args.temperature
    began = time.monotonic()
    for event in _events(args.url, body, facts):
        if error := event.get("error"):
            told = str(error.get("message", error)) if isinstance(error, dict) else str(error)
            raise CommandFailed(f"the answer broke off: {told}" if facts.text else told)
        facts.tokens = (event.get("usage") or {}).get("completion_tokens", facts.tokens)
        for choice in event.get("choices", ()):
            piece = choice.get("delta", {}).get("content") or ""
            if piece and not facts.ttft_s:
                facts.ttft_s = time.monotonic() - began
            facts.text += piece
            print(for_terminal(piece) if in_terminal else piece, end="", flush=True)
    facts.total_s = time.monotonic() - began


def _events(url: str, body: object, facts: AnswerFacts) -> Iterator[dict[str, Any]]:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY_ENV, "").strip():
        headers["Authorization"] = f"Bearer {key}"
    # `serve` prints its address with /v1, as clients take it
    base = url.rstrip("/").removesuffix("/v1")
    address, opener = f"{base}/v1/chat/completions", opener_for(url)
    try:
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        with opener.open(request, timeout=SILENCE_S) as answer:
            facts.headers = {name.lower(): value for name, value in answer.headers.items()}
            for line in answer:
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])
                elif line.startswith(b"data: [DONE]"):
                    return
        raise CommandFailed(f"{url} ended the answer before it was whole")
    except urllib.error.HTTPError as exc:
        raise CommandFailed(_words(exc)) from exc
    except (OSError, ValueError, http.client.HTTPException) as exc:
        reason = getattr(exc, "reason", exc)
        if facts.headers:
            raise CommandFailed(f"{url} broke off the answer ({reason})") from exc
        raise CommandFailed(f"no gateway answers at {url} ({reason}); is --url right?") from exc


def _words(exc: urllib.error.HTTPError) -> str:
    try:
        message = json.loads(exc.read())["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"answered {exc.code}"
    hint = f" (the key is read from {KEY_ENV})" if exc.code == 401 else ""
    return f"{message}{hint}"


def summary(facts: AnswerFacts) -> str:
    """One line: who answered, where the adapter came from, and how fast."""
    head = facts.headers
    worker, tier = head.get("x-loraplex-worker"), head.get("x-loraplex-adapter-tier")
    parts = [f"worker {worker}" if worker else "", f"adapter from {tier}" if tier else ""]
    parts.append(f"first token {facts.ttft_s * 1e3:.0f} ms")
    after_first_s = facts.total_s - facts.ttft_s
    if facts.tokens > 1 and after_first_s > 0:
        parts.append(f"{(facts.tokens - 1) / after_first_s:.0f} tokens/s")
    parts.append(f"{facts.tokens} tokens")
    return "[" + ", ".join(part for part in parts if part) + "]"
