"""Pure. The flags of `python -m bench.load`, and what they mean."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn
from urllib.parse import urlsplit

from bench.load.measure import Slo
from bench.load.workload import (
    Arrival,
    AtOnce,
    BaseOnly,
    Bursts,
    Constant,
    Distinct,
    Gamma,
    Identical,
    Length,
    Mix,
    Poisson,
    Uniform,
    Workload,
    Zipf,
    parse_length,
)

DEFAULT_REQUESTS = 200


@dataclass(frozen=True, slots=True)
class LoadTarget:
    """How requests are put: `adapters` are names for the report, `models` what the request's
    `model` says, both by adapter index.
    """

    endpoint: str
    stream: bool
    base_model: str
    adapters: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    ignore_eos: bool = False
    ask_usage: bool = True
    extra_body: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LoadPace:
    """`concurrency` requests at a time, or None for the arrival times of the workload; ends after
    `requests` or `duration_s`, whichever is first.

    `ramp_s`: the callers of a closed loop begin evenly spread over this time, not all in the same
    instant. `most_open` bounds an open loop: a request that is due while so many are in flight is
    not sent and counts as the error `client_saturated`.
    """

    concurrency: int | None
    requests: int | None
    duration_s: float | None
    most_open: int = 10_000
    ramp_s: float = 0.0


class UsageError(Exception):
    """Flags that make no sense; the message says which and what to give."""


@dataclass(frozen=True, slots=True)
class Options:
    """`target` and `workload` are complete but for what only the server knows: the base model's
    name and the adapters it lists.
    """

    url: str
    target: LoadTarget
    workload: Workload
    pace: LoadPace
    slo: Slo
    model_format: str
    adapters_from_models: bool
    warm_up: int
    warm_adapters: bool
    api_key_env: str | None
    timeout_s: float
    max_error_rate: float
    json_file: str | None
    plot_file: str | None
    top: int
    quiet: bool


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see --help)")


def _length(text: str) -> Length:
    try:
        return parse_length(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def _natural(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number


def _share(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m bench.load",
        description="Load test for any OpenAI-compatible server that serves adapters of a base "
        "model.",
    )
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
        type=_positive,
        default=120.0,
        metavar="S",
        help="of one request, seconds (default %(default)s)",
    )

    add = parser.add_argument_group("adapters").add_argument
    add("--adapters", metavar="A,B,C", help="their names")
    add("--num-adapters", type=_count, metavar="N", help="N names made with --adapter-format")
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
    add("--alpha", type=_positive, default=1.0, help="of the Zipf mix (default %(default)s)")
    add(
        "--base-share",
        type=_share,
        default=0.0,
        metavar="SHARE",
        help="share of requests that go to the base model (default 0)",
    )

    add = parser.add_argument_group(
        "arrivals: open loop with --rate, closed loop with --concurrency"
    ).add_argument
    add("--rate", type=_positive, metavar="R", help="requests per second")
    add(
        "--arrivals",
        choices=("poisson", "gamma", "constant", "bursts", "at-once"),
        help="of an open loop (default poisson)",
    )
    add(
        "--cv",
        type=_positive,
        default=2.0,
        help="of gamma arrivals: 1 is Poisson, above is burstier (default %(default)s)",
    )
    add(
        "--burst",
        type=_count,
        default=16,
        metavar="N",
        help="requests per burst (default %(default)s)",
    )
    add("--concurrency", type=_count, metavar="C", help="requests in flight at any time")
    add(
        "--ramp",
        type=_positive,
        metavar="S",
        help="closed loop: the callers begin spread over S seconds (default: all at once)",
    )
    add(
        "--requests",
        type=_count,
        metavar="N",
        help=f"end after N requests (default {DEFAULT_REQUESTS} if there is no --duration)",
    )
    add("--duration", type=_positive, metavar="S", help="end after S seconds")
    add(
        "--max-open",
        type=_count,
        default=10_000,
        metavar="N",
        help="open loop: at N in flight, requests are not sent but counted as errors",
    )

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
        type=_natural,
        default=0,
        metavar="N",
        help="shared prefixes to choose from (default 0)",
    )
    add(
        "--prefix-tokens",
        type=_natural,
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
    add("--seed", type=_natural, default=0)

    add = parser.add_argument_group("warm-up, not counted").add_argument
    add("--warmup", type=_natural, default=0, metavar="N", help="N requests before the test")
    add("--warm-adapters", action="store_true", help="each adapter once before the test")

    add = parser.add_argument_group("result").add_argument
    add("--slo-ttft-ms", type=_positive, metavar="MS", help="goodput: time to first token")
    add(
        "--slo-itl-ms",
        type=_positive,
        metavar="MS",
        help="goodput: mean time per output token after the first, of each request",
    )
    add("--slo-e2e-ms", type=_positive, metavar="MS", help="goodput: time to the whole answer")
    add(
        "--max-error-rate",
        type=_share,
        default=0.0,
        metavar="SHARE",
        help="exit 1 above it (default 0)",
    )
    add("--json", metavar="FILE", help="write everything as JSON")
    add("--plot", metavar="FILE", help="write a PNG")
    add("--top", type=_count, default=20, metavar="N", help="adapters listed (default %(default)s)")
    add("--quiet", action="store_true", help="no progress on stderr")
    return parser


def parse(arguments: Sequence[str]) -> Options:
    """Reads the flags. Raises: UsageError; SystemExit for --help."""
    flags = _parser().parse_args(arguments)
    if urlsplit(flags.url).scheme not in ("http", "https"):
        raise UsageError(f"--url {flags.url!r} is no http:// or https:// URL")
    if not flags.stream and (flags.slo_ttft_ms or flags.slo_itl_ms):
        raise UsageError(
            "without a stream no tokens can be timed: give --slo-e2e-ms instead of "
            "--slo-ttft-ms and --slo-itl-ms"
        )
    return Options(
        url=flags.url,
        target=_target(flags),
        workload=_workload(flags),
        pace=_pace(flags),
        slo=Slo(
            _seconds(flags.slo_ttft_ms), _seconds(flags.slo_itl_ms), _seconds(flags.slo_e2e_ms)
        ),
        model_format=flags.model_format,
        adapters_from_models=flags.adapters_from_models,
        warm_up=flags.warmup,
        warm_adapters=flags.warm_adapters,
        api_key_env=flags.api_key_env,
        timeout_s=flags.timeout,
        max_error_rate=flags.max_error_rate,
        json_file=flags.json,
        plot_file=flags.plot,
        top=flags.top,
        quiet=flags.quiet,
    )


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


def _target(flags: argparse.Namespace) -> LoadTarget:
    adapters = _adapter_names(flags)
    try:
        models = tuple(
            flags.model_format.format(base=flags.model, adapter=name) for name in adapters
        )
        extra_body: Any = json.loads(flags.extra_body)
    except (LookupError, ValueError) as error:
        raise UsageError(f"--model-format or --extra-body cannot be read: {error}") from error
    if not isinstance(extra_body, dict):
        raise UsageError("--extra-body is no JSON object")
    return LoadTarget(
        endpoint=flags.endpoint,
        stream=flags.stream,
        base_model=flags.model,
        adapters=adapters,
        models=models,
        ignore_eos=flags.ignore_eos,
        ask_usage=flags.usage,
        extra_body=extra_body,
    )


def _adapter_names(flags: argparse.Namespace) -> tuple[str, ...]:
    if sum(map(bool, (flags.adapters, flags.num_adapters, flags.adapters_from_models))) > 1:
        raise UsageError("give one of --adapters, --num-adapters and --adapters-from-models")
    if flags.adapters:
        return tuple(name for name in flags.adapters.split(",") if name)
    try:
        return tuple(
            flags.adapter_format.format(number) for number in range(flags.num_adapters or 0)
        )
    except (LookupError, ValueError) as error:
        raise UsageError(
            f"--adapter-format {flags.adapter_format!r} cannot be used: {error}"
        ) from error


def _workload(flags: argparse.Namespace) -> Workload:
    has_adapters = bool(flags.adapters or flags.num_adapters or flags.adapters_from_models)
    mix: Mix
    match flags.mix or ("zipf" if has_adapters else "base"):
        case "base":
            mix = BaseOnly()
        case _ if not has_adapters:
            raise UsageError(
                f"--mix {flags.mix} needs --adapters, --num-adapters or --adapters-from-models"
            )
        case "distinct":
            mix = Distinct()
        case "uniform":
            mix = Uniform()
        case "identical":
            mix = Identical()
        case _:
            mix = Zipf(flags.alpha)
    if bool(flags.prefixes) != bool(flags.prefix_tokens):
        raise UsageError("shared prefixes need both --prefixes and --prefix-tokens")
    return Workload(
        arrival=_arrival(flags),
        mix=mix,
        adapters=len(_adapter_names(flags)),
        prompt=flags.prompt_tokens,
        output=flags.output_tokens,
        seed=flags.seed,
        base_share=flags.base_share,
        prefixes=flags.prefixes,
        prefix_tokens=flags.prefix_tokens,
    )


def _arrival(flags: argparse.Namespace) -> Arrival:
    if flags.concurrency:
        if flags.rate or flags.arrivals:
            raise UsageError("--concurrency is a closed loop: it has no --rate and no --arrivals")
        return AtOnce()
    if flags.ramp:
        raise UsageError("--ramp spreads the callers of a closed loop: give --concurrency")
    if flags.arrivals == "at-once":
        if flags.duration and not flags.requests:
            raise UsageError("--arrivals at-once needs --requests")
        return AtOnce()
    if not flags.rate:
        raise UsageError(
            "give --rate (open loop), --concurrency (closed loop) or --arrivals at-once"
        )
    match flags.arrivals:
        case "gamma":
            return Gamma(flags.rate, flags.cv)
        case "constant":
            return Constant(flags.rate)
        case "bursts":
            return Bursts(flags.rate, flags.burst)
        case _:
            return Poisson(flags.rate)


def _pace(flags: argparse.Namespace) -> LoadPace:
    requests = flags.requests if flags.requests or flags.duration else DEFAULT_REQUESTS
    return LoadPace(
        concurrency=flags.concurrency,
        requests=requests,
        duration_s=flags.duration,
        most_open=flags.max_open,
        ramp_s=flags.ramp or 0.0,
    )
