"""The load test as a user runs it, against a server of known timing that misbehaves on request.

Run as a program, this file is that server: a small OpenAI-compatible aiohttp server in a process of
its own. The adapter part of a model's name may name a fault (`cut`, `no-done`, `status-500`, ...).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.harness import ROOT

TTFT_S, ITL_S, COLD_S = 0.050, 0.010, 0.150
BASE = "base"
ADAPTERS = ("pirate", "haiku", "shouting")


# --- the peer -------------------------------------------------------------------------------------


class Peer:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.seen: set[str] = set()
        self.log: list[dict[str, Any]] = []

    async def models(self, _: web.Request) -> web.Response:
        models = [
            {"id": BASE, "object": "model"},
            *({"id": f"{BASE}:{name}", "object": "model", "parent": BASE} for name in ADAPTERS),
        ]
        return web.json_response({"object": "list", "data": models})

    async def requests(self, _: web.Request) -> web.Response:
        return web.json_response(self.log)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        fault = body["model"].partition(":")[2] or body["model"]
        cold = ":" in body["model"] and body["model"] not in self.seen
        self.seen.add(body["model"])
        self.log.append(
            {"path": request.path, "authorization": request.headers.get("Authorization"), **body}
        )
        headers = (
            {"x-loraplex-worker": "w1", "x-loraplex-adapter-tier": "disk" if cold else "gpu"}
            if self.options.headers
            else {}
        )
        if fault.startswith("status-"):
            error = {
                "message": f"asked to fail with {fault}",
                "type": "server_error",
                "code": None,
                "param": None,
            }
            return web.json_response({"error": error}, status=int(fault.removeprefix("status-")))
        if fault == "html":
            return web.Response(text="<html>hello</html>", content_type="text/html")
        if fault == "hang":
            await asyncio.sleep(3600)
        await asyncio.sleep(self.options.ttft_s + (self.options.cold_s if cold else 0.0))
        tokens = body["max_tokens"] - (fault == "short")
        if not body.get("stream"):
            await asyncio.sleep(self.options.itl_s * (tokens - 1))
            return web.json_response(self.whole(request.path, tokens), headers=headers)
        return await self.stream(request, body, fault, tokens, headers)

    def whole(self, path: str, tokens: int) -> dict[str, Any]:
        text = "word " * tokens
        choice = (
            {"message": {"role": "assistant", "content": text}}
            if "chat" in path
            else {"text": text}
        )
        return {
            "choices": [{"index": 0, **choice, "finish_reason": "length"}],
            "usage": {"prompt_tokens": 7, "completion_tokens": tokens},
        }

    async def stream(
        self,
        request: web.Request,
        body: dict[str, Any],
        fault: str,
        tokens: int,
        headers: dict[str, str],
    ) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream; charset=utf-8", **headers}
        )
        await response.prepare(request)
        chat = "chat" in request.path

        async def send(event: dict[str, Any] | str) -> None:
            await response.write(
                f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode()
            )

        def chunk(text: str, finish_reason: str | None) -> dict[str, Any]:
            part = {"delta": {"content": text}} if chat else {"text": text}
            return {
                "id": "cmpl-1",
                "object": "chat.completion.chunk",
                "created": 1,
                "model": body["model"],
                "choices": [{"index": 0, **part, "finish_reason": finish_reason}],
            }

        if chat:
            await send(
                chunk("", None)
                | {
                    "choices": [
                        {
                            "index": 0,
                            "delta": {"role": "assistant", "content": ""},
                            "finish_reason": None,
                        }
                    ]
                }
            )
        for token in range(tokens):
            if token:
                await asyncio.sleep(self.options.itl_s)
            last = token == tokens - 1 and fault != "no-finish"
            await send(chunk(f"word{token} ", "length" if last else None))
            if token == 2 and fault == "cut":
                assert request.transport is not None
                request.transport.abort()
                return response
            if token == 2 and fault == "error-event":
                await send({"error": {"message": "the engine died", "code": 500}})
            if token == 2 and fault == "garbage":
                await send("{nonsense")
        if body.get("stream_options", {}).get("include_usage"):
            await send({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": tokens}})
        if fault != "no-done":
            await send("[DONE]")
        return response


def serve() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ttft-s", type=float, default=TTFT_S)
    parser.add_argument("--itl-s", type=float, default=ITL_S)
    parser.add_argument("--cold-s", type=float, default=0.0)
    parser.add_argument("--headers", action="store_true")
    peer = Peer(parser.parse_args())
    app = web.Application()
    app.add_routes([web.get("/v1/models", peer.models), web.get("/requests", peer.requests)])
    app.add_routes(
        [web.post("/v1/chat/completions", peer.answer), web.post("/v1/completions", peer.answer)]
    )
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    sys.stdout.write(f"{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    web.run_app(app, sock=listener, print=None, handler_cancellation=True, shutdown_timeout=0.1)


# --- the tests ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """A finished run of the command, with its JSON if it wrote one."""

    status: int
    out: str
    err: str
    made: dict[str, Any]


def _start_peer(*flags: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, __file__, *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, f"http://127.0.0.1:{int(process.stdout.readline())}"


@pytest.fixture
def peer(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a running peer, started with the flags that the test passes as parameter."""
    process, url = _start_peer(*getattr(request, "param", ()))
    try:
        yield url
    finally:
        process.terminate()
        process.communicate(timeout=10)


def _load(
    *flags: str, json_file: Path | None = None, environment: dict[str, str] | None = None
) -> Ended:
    command = [
        sys.executable,
        "-m",
        "bench.load",
        "--quiet",
        *flags,
        *(["--json", str(json_file)] if json_file else []),
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    made = json.loads(json_file.read_text()) if json_file and json_file.exists() else {}
    return Ended(done.returncode, done.stdout, done.stderr, made)


def _flags(text: str) -> list[str]:
    return text.split()


def _log(url: str) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"{url}/requests", timeout=10) as answer:
        return list(json.load(answer))


@pytest.mark.parametrize("peer", [("--cold-s", str(COLD_S))], indirect=True)
def test_counts_are_exact_and_times_are_the_peers_own(peer: str, tmp_path: Path) -> None:
    flags = _flags(
        "--adapters-from-models --concurrency 4 --requests 40 --output-tokens 10 --mix "
        "uniform --ignore-eos --slo-ttft-ms 1000 --slo-itl-ms 500"
    )
    ended = _load(
        "--url",
        peer,
        *flags,
        "--plot",
        str(tmp_path / "plot.png"),
        json_file=tmp_path / "load.json",
    )
    made = ended.made
    assert ended.status == 0, ended.out + ended.err
    assert made["schema"] == "loraplex.bench.load/1"
    assert (made["requests"]["sent"], made["requests"]["succeeded"], made["errors"]) == (40, 40, {})
    assert (
        made["throughput"]["output_tokens"],
        made["throughput"]["tokens_counted_by"],
        made["itl"]["count"],
    ) == (400, "usage", 360)
    assert made["ttft_cold"]["count"] == 3
    assert TTFT_S + COLD_S <= made["ttft_cold"]["p50"] <= TTFT_S + COLD_S + 0.25
    assert TTFT_S <= made["ttft_warm"]["p50"] <= TTFT_S + 0.1
    assert ITL_S * 0.9 <= made["itl"]["p50"] <= ITL_S * 3
    assert made["e2e"]["p50"] >= TTFT_S + 9 * ITL_S
    assert made["goodput"]["share"] == 1.0
    assert sum(row["requests"] for row in made["adapters"]["top"]) == 40
    assert {row["adapter"] for row in made["adapters"]["top"]} == set(ADAPTERS)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert {request["model"] for request in _log(peer)} == {f"{BASE}:{name}" for name in ADAPTERS}


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("status-500", "http_500"),
        ("status-503", "http_503"),
        ("cut", "closed_early"),
        ("no-done", "no_done"),
        ("no-finish", "no_finish_reason"),
        ("error-event", "error_event"),
        ("html", "not_a_stream"),
        ("garbage", "bad_event"),
        ("hang", "timeout"),
        ("short", "wrong_length"),
    ],
)
def test_a_misbehaving_server_is_caught_and_the_error_named(
    peer: str, tmp_path: Path, fault: str, error: str
) -> None:
    flags = [
        "--model",
        BASE,
        "--adapters",
        f"fine,{fault}",
        *_flags(
            "--mix distinct --concurrency 2 --requests 8 --output-tokens 5 --ignore-eos --timeout 1"
        ),
    ]
    ended = _load("--url", peer, *flags, json_file=tmp_path / "load.json")
    assert ended.status == 1
    assert {kind: entry["count"] for kind, entry in ended.made["errors"].items()} == {error: 4}
    assert ended.made["requests"]["succeeded"] == 4
    assert error in ended.out


def test_errors_within_the_allowed_rate_leave_the_status_at_zero(peer: str) -> None:
    flags = [
        "--model",
        BASE,
        "--adapters",
        "fine,status-503",
        *_flags("--mix distinct --concurrency 2 --requests 4 --output-tokens 2"),
    ]
    assert _load("--url", peer, *flags, "--max-error-rate", "0.5").status == 0
    assert _load("--url", peer, *flags, "--max-error-rate", "0.4").status == 1


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_both_endpoints_work_streamed_or_not(
    peer: str, tmp_path: Path, endpoint: str, stream: str
) -> None:
    flags = _flags(
        "--concurrency 2 --requests 6 --output-tokens 4 --prompt-tokens 9 --slo-e2e-ms 5000"
    )
    ended = _load(
        "--url",
        f"{peer}/v1",
        "--endpoint",
        endpoint,
        stream,
        *flags,
        json_file=tmp_path / "load.json",
    )
    assert ended.status == 0, ended.out + ended.err
    assert ended.made["throughput"]["output_tokens"] == 24
    assert (ended.made["ttft"] is None) == (stream == "--no-stream")
    assert ended.made["e2e"]["p50"] >= TTFT_S + 3 * ITL_S
    asked = _log(peer)
    assert {request["path"] for request in asked} == {
        "/v1/chat/completions" if endpoint == "chat" else "/v1/completions"
    }
    prompts = [
        request["messages"][0]["content"] if endpoint == "chat" else request["prompt"]
        for request in asked
    ]
    assert [len(prompt.split()) for prompt in prompts] == [9] * 6
    assert {(request["model"], request["max_tokens"]) for request in asked} == {(BASE, 4)}


@pytest.mark.parametrize("peer", [("--ttft-s", "0.3", "--itl-s", "0")], indirect=True)
def test_an_open_loop_keeps_sending_while_answers_are_slow(peer: str, tmp_path: Path) -> None:
    flags = _flags("--rate 50 --arrivals constant --requests 50 --output-tokens 2 --timeout 20")
    made = _load("--url", peer, *flags, json_file=tmp_path / "load.json").made
    assert made["requests"]["succeeded"] == 50
    assert 0.98 + 0.3 <= made["duration_s"] <= 3.0  # one after another it would take 15 s
    assert made["generator"]["lag"]["count"] == 50
    assert made["ttft"]["p50"] >= 0.3


def test_a_generator_that_cannot_keep_up_says_so_and_its_delay_counts_as_latency(
    peer: str, tmp_path: Path
) -> None:
    # long prompts take the generator a while
    flags = _flags("--arrivals at-once --requests 300 --prompt-tokens 5000 --output-tokens 1")
    ended = _load("--url", peer, *flags, json_file=tmp_path / "load.json")
    lag = ended.made["generator"]["lag"]
    assert lag["max"] > 0.02
    assert not ended.made["generator"]["kept_up"]
    assert "WARNING     the generator" in ended.out
    assert ended.made["ttft"]["max"] >= TTFT_S + lag["p50"]


def test_an_open_loop_counts_what_it_may_not_send(peer: str, tmp_path: Path) -> None:
    flags = _flags("--arrivals at-once --requests 20 --max-open 5 --output-tokens 2")
    ended = _load("--url", peer, *flags, json_file=tmp_path / "load.json")
    assert (
        ended.status,
        ended.made["errors"]["client_saturated"]["count"],
        ended.made["requests"]["succeeded"],
    ) == (1, 15, 5)
    assert len(_log(peer)) == 5


@pytest.mark.parametrize("peer", [("--headers", "--cold-s", str(COLD_S))], indirect=True)
def test_the_servers_headers_decide_what_was_cold(peer: str, tmp_path: Path) -> None:
    flags = [
        "--model",
        BASE,
        "--adapters",
        "a,b",
        *_flags("--mix distinct --concurrency 1 --requests 6 --output-tokens 2"),
    ]
    made = _load("--url", peer, *flags, json_file=tmp_path / "load.json").made
    assert (made["cold"]["by"], made["tiers"], made["workers"]) == (
        "header",
        {"gpu": 4, "disk": 2},
        {"w1": 6},
    )
    assert (made["ttft_cold"]["count"], made["ttft_warm"]["count"]) == (2, 4)


@pytest.mark.parametrize("peer", [("--cold-s", str(COLD_S))], indirect=True)
def test_warming_every_adapter_leaves_none_cold_and_is_not_counted(
    peer: str, tmp_path: Path
) -> None:
    flags = _flags(
        "--adapters-from-models --warm-adapters --warmup 2 --concurrency 3 --requests "
        "9 --output-tokens 2"
    )
    made = _load("--url", peer, *flags, json_file=tmp_path / "load.json").made
    assert (made["requests"]["sent"], made["requests"]["warm_up"], made["ttft_cold"]) == (
        9,
        5,
        None,
    )
    prompts = [request["messages"][0]["content"] for request in _log(peer)]
    assert len(set(prompts)) == len(prompts) == 14  # no prompt of the test was seen before
    assert made["ttft"]["p50"] < TTFT_S + COLD_S


def test_the_same_seed_sends_the_same_requests(peer: str) -> None:
    flags = [
        *_flags(
            "--model base --num-adapters 5 --rate 200 --requests 12 --output-tokens "
            "uniform:1:4 --seed"
        ),
        "3",
    ]
    for _ in range(2):
        assert _load("--url", peer, *flags).status == 0
    asked = [
        (request["model"], request["max_tokens"], request["messages"][0]["content"])
        for request in _log(peer)
    ]
    assert sorted(asked[:12]) == sorted(asked[12:])


def test_the_key_comes_from_the_environment_and_is_printed_nowhere(
    peer: str, tmp_path: Path
) -> None:
    flags = _flags("--concurrency 1 --requests 1 --output-tokens 1 --api-key-env BENCH_KEY")
    ended = _load(
        "--url",
        peer,
        *flags,
        json_file=tmp_path / "load.json",
        environment={"BENCH_KEY": "swordfish"},
    )
    assert _log(peer)[0]["authorization"] == "Bearer swordfish"
    assert "swordfish" not in ended.out + ended.err + (tmp_path / "load.json").read_text()


def test_a_server_that_is_not_there_is_said_so_with_status_2() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: nobody else can answer there
        ended = _load("--url", f"http://127.0.0.1:{unused.getsockname()[1]}", "--rate", "5")
    assert ended.status == 2
    assert "no server answers at" in ended.err


def test_flags_that_make_no_sense_end_with_status_2_and_a_sentence() -> None:
    ended = _load("--rate", "5", "--concurrency", "3")
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert "--concurrency is a closed loop" in ended.err


def test_adapters_that_the_server_does_not_list_are_asked_for_in_vain(peer: str) -> None:
    ended = _load("--url", peer, "--model", "other", "--adapters-from-models", "--rate", "5")
    assert ended.status == 2
    assert "no adapter whose parent is 'other'" in ended.err


def test_a_warm_up_in_which_everything_fails_ends_the_test(peer: str) -> None:
    ended = _load(
        "--url", peer, "--model", BASE, "--adapters", "status-500", "--warm-adapters", "--rate", "5"
    )
    assert ended.status == 2
    assert "asked to fail with status-500" in ended.err


def test_ctrl_c_ends_the_sending_and_still_reports(peer: str) -> None:
    command = [
        sys.executable,
        "-m",
        "bench.load",
        "--url",
        peer,
        "--concurrency",
        "2",
        "--duration",
        "600",
        "--output-tokens",
        "3",
    ]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert "ended" in process.stderr.readline()  # its first line of progress
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert "TTFT" in out


if __name__ == "__main__":
    serve()
