"""Pure. What a load test does, made of the flags of `loraplex bench load`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from bench.load.flags import DEFAULT_REQUESTS, UsageError, make_parser
from bench.load.measure import Slo
from bench.load.workload import (
    ArrivalProcess,
    AtOnce,
    BaseOnly,
    Bursts,
    Constant,
    Distinct,
    Gamma,
    Identical,
    Mix,
    Poisson,
    Uniform,
    Workload,
    Zipf,
)


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


def parse(arguments: Sequence[str]) -> Options:
    """Reads the flags. Raises: UsageError; SystemExit for --help."""
    flags = make_parser().parse_args(arguments)
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


def _arrival(flags: argparse.Namespace) -> ArrivalProcess:
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
