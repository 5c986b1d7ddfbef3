"""Pure. The flags of `loraplex bench load`, and how the text of each is read."""

from __future__ import annotations

import argparse
from typing import NoReturn

from bench.load.workload import Length, parse_length
from shared.option_numbers import count, natural, positive, share

DEFAULT_REQUESTS = 200


class UsageError(Exception):
    """Flags that make no sense; the message says which and what to give."""


def make_parser() -> argparse.ArgumentParser:
    """Raises UsageError where argparse would exit."""
    parser = _Parser(
        prog="loraplex bench load",
        description="Load test for any OpenAI-compatible server that serves adapters of a base "
        "model.",
    )
    _add_server_flags(parser)
    _add_adapter_flags(parser)
    _add_arrival_flags(parser)
    _add_request_flags(parser)
    _add_warm_up_flags(parser)
    _add_result_flags(parser)
    return parser


def _add_server_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("server").add_argument
    add(
        "--url",
        default="http://127.0.0.1:8000",
        help="where the server is, with or without /v1 (default %(default)s)",
    )
    add(
        "--model",
        default="",
        metavar="BASE",
        help="the base model's name (default: the first that GET /v1/models lists without a "
        "parent)",
    )
    add("--endpoint", choices=("chat", "completions"), default="chat")
    add("--stream", action=argparse.BooleanOptionalAction, default=True)
    add("--api-key-env", metavar="NAME", help="environment variable that holds the API key")
    add(
        "--timeout",
        type=positive,
        default=120.0,
        metavar="S",
        help="of one request, seconds (default %(default)s)",
    )


def _add_adapter_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("adapters").add_argument
    add("--adapters", metavar="A,B,C", help="their names")
    add("--num-adapters", type=count, metavar="N", help="N names made with --adapter-format")
    add("--adapter-format", default="adapter-{:04d}", help="default %(default)s, from 0")
    add(
        "--adapters-from-models",
        action="store_true",
        help="those that GET /v1/models lists with the base model as `parent`",
    )
    add(
        "--model-format",
        default="{base}:{adapter}",
        help="the request's model (default %(default)s; vllm serve wants {adapter})",
    )
    add(
        "--mix",
        choices=("base", "distinct", "uniform", "zipf", "identical"),
        help="default: zipf if there are adapters, else base",
    )
    add("--alpha", type=positive, default=1.0, help="of the Zipf mix (default %(default)s)")
    add(
        "--base-share",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="share of requests that go to the base model (default 0)",
    )


def _add_arrival_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "arrivals: open loop with --rate, closed loop with --concurrency"
    ).add_argument
    add("--rate", type=positive, metavar="R", help="requests per second")
    add(
        "--arrivals",
        choices=("poisson", "gamma", "constant", "bursts", "at-once"),
        help="of an open loop (default poisson)",
    )
    add(
        "--cv",
        type=positive,
        default=2.0,
        help="of gamma arrivals: 1 is Poisson, above is burstier (default %(default)s)",
    )
    add(
        "--burst",
        type=count,
        default=16,
        metavar="N",
        help="requests per burst (default %(default)s)",
    )
    add("--concurrency", type=count, metavar="C", help="requests in flight at any time")
    add(
        "--ramp",
        type=positive,
        metavar="S",
        help="closed loop: the callers begin spread over S seconds (default: all at once)",
    )
    add(
        "--requests",
        type=count,
        metavar="N",
        help=f"end after N requests (default {DEFAULT_REQUESTS} if there is no --duration)",
    )
    add("--duration", type=positive, metavar="S", help="end after S seconds")
    add(
        "--max-open",
        type=count,
        default=10_000,
        metavar="N",
        help="open loop: at N in flight, requests are not sent but counted as errors",
    )


def _add_request_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "requests: lengths are 128, uniform:16:256 or lognormal:MEDIAN:SIGMA[:MOST]"
    ).add_argument
    add(
        "--prompt-tokens",
        type=_length,
        default="128",
        metavar="LENGTH",
        help="in common words, about a token each (default %(default)s)",
    )
    add(
        "--output-tokens",
        type=_length,
        default="64",
        metavar="LENGTH",
        help="max_tokens (default %(default)s)",
    )
    add(
        "--prefixes",
        type=natural,
        default=0,
        metavar="N",
        help="shared prefixes to choose from (default 0)",
    )
    add(
        "--prefix-tokens",
        type=natural,
        default=0,
        metavar="N",
        help="length of a shared prefix, on top of --prompt-tokens",
    )
    add(
        "--ignore-eos",
        action="store_true",
        help="ask for exactly the output tokens (vLLM's ignore_eos), and check it",
    )
    add(
        "--usage",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask for usage in streams",
    )
    add(
        "--extra-body",
        default="{}",
        metavar="JSON",
        help="fields for every request's body, e.g. '{\"temperature\": 0.7}'",
    )
    add("--seed", type=natural, default=0)


def _add_warm_up_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("warm-up, not counted").add_argument
    add("--warmup", type=natural, default=0, metavar="N", help="N requests before the test")
    add("--warm-adapters", action="store_true", help="each adapter once before the test")


def _add_result_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("result").add_argument
    add("--slo-ttft-ms", type=positive, metavar="MS", help="goodput: time to first token")
    add(
        "--slo-itl-ms",
        type=positive,
        metavar="MS",
        help="goodput: mean time per output token after the first, of each request",
    )
    add("--slo-e2e-ms", type=positive, metavar="MS", help="goodput: time to the whole answer")
    add(
        "--max-error-rate",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="exit 1 above it (default 0)",
    )
    add("--json", metavar="FILE", help="write everything as JSON")
    add("--plot", metavar="FILE", help="write a PNG")
    add("--top", type=count, default=20, metavar="N", help="adapters listed (default %(default)s)")
    add("--quiet", action="store_true", help="no progress on stderr")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see --help)")


def _length(text: str) -> Length:
    try:
        return parse_length(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
