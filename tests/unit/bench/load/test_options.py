"""The options of the load test, and which of them contradict each other."""

from __future__ import annotations

import pytest

from bench.load.flags import DEFAULT_REQUESTS, UsageError
from bench.load.options import Options, parse
from bench.load.workload import BaseOnly, Bursts, Fixed, Gamma, LogNormal, Poisson, Zipf


def _parse(flags: str) -> Options:
    return parse(flags.split())


def test_flags_become_a_workload() -> None:
    options = _parse(
        "--model m --num-adapters 3 --rate 20 --duration 5 --prompt-tokens "
        "lognormal:128:0.5 --output-tokens 16 --seed 4"
    )
    assert options.target.models == ("m:adapter-0000", "m:adapter-0001", "m:adapter-0002")
    load = options.workload
    assert (load.mix, load.arrival, load.prompt, load.output, load.seed) == (
        Zipf(1.0),
        Poisson(20.0),
        LogNormal(128, 0.5),
        Fixed(16),
        4,
    )
    assert (options.pace.concurrency, options.pace.requests, options.pace.duration_s) == (
        None,
        None,
        5.0,
    )


def test_peers_that_use_bare_adapter_names_are_asked_for_them() -> None:
    assert _parse(
        "--model m --adapters a,b --model-format {adapter} --concurrency 2"
    ).target.models == ("a", "b")


def test_without_adapters_the_base_is_asked_a_default_number_of_times() -> None:
    options = _parse("--concurrency 8")
    assert (options.workload.mix, options.pace.concurrency, options.pace.requests) == (
        BaseOnly(),
        8,
        DEFAULT_REQUESTS,
    )


def test_the_shape_of_arrivals_is_taken_from_its_flags() -> None:
    assert _parse("--rate 5 --arrivals gamma --cv 3").workload.arrival == Gamma(5.0, 3.0)
    assert _parse("--rate 5 --arrivals bursts --burst 4").workload.arrival == Bursts(5.0, 4)


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--rate 5 --concurrency 3",
        "--rate 0",
        "--rate 5 --mix zipf",
        "--rate 5 --adapters a --num-adapters 3",
        "--rate 5 --url localhost:8000",
        "--rate 5 --prompt-tokens 0",
        "--rate 5 --extra-body [1]",
        "--rate 5 --extra-body {",
        "--rate 5 --no-stream --slo-ttft-ms 5",
        "--rate 5 --prefixes 3",
        "--arrivals at-once --duration 3",
        "--rate 5 --num-adapters 2 --adapter-format {x}",
        "--rate 5 --adapters a --model-format {nope}",
        "--rate 5 --max-error-rate 2",
        "--rate 5 --bogus",
    ],
)
def test_flags_that_make_no_sense_are_refused(flags: str) -> None:
    with pytest.raises(UsageError):
        _parse(flags)
