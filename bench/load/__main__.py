"""Shell. `loraplex bench load`: a load test for any OpenAI-compatible server that serves adapters
of a base model.

    loraplex bench load --url http://127.0.0.1:8000 --adapters-from-models --rate 20 \\
        --duration 30 --warm-adapters
    loraplex bench load --url http://127.0.0.1:8000 --model base --num-adapters 100 \\
        --mix zipf --alpha 1.0 --concurrency 64 --requests 1000

The exit status is 0. It is 1 if more requests failed than --max-error-rate allows, and 2 if the
test could not run, for example because the flags are wrong or no server answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import gc
import importlib.metadata
import os
import platform
import resource
import shlex
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import uvloop

from bench.load import workload as wl
from bench.load.client import LoadClient
from bench.load.flags import UsageError
from bench.load.measure import LoadRun, Meter
from bench.load.options import LoadPace, LoadTarget, Options, parse
from bench.load.plot import plot
from bench.load.report import document, table
from bench.load.runner import LoadProgress, drive
from bench.provenance import cpu_model

WARM_UP_AT_ONCE = 16
PROGRESS_EVERY_S = 2.0
GC_THRESHOLD = 50_000
"""Nothing here makes cycles worth collecting; a collection over all outcomes would show up in the
latencies.
"""

CpuTimes: TypeAlias = tuple[float, float]


class CannotRun(Exception):
    """The test cannot start; the message says why and what to do."""


class _Model(msgspec.Struct):
    id: str
    parent: str | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one load test. Returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        options = parse(arguments)
        raise_open_files_limit()
        run = uvloop.run(measure(options, ["loraplex", "bench", "load", *arguments]))
    except (UsageError, CannotRun) as error:
        print(f"loraplex bench load: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return _publish(options, run)


def _publish(options: Options, run: LoadRun) -> int:
    made = document(run)
    command = shlex.join(made["command"])
    print(command, table(made), sep="\n\n")
    try:
        if options.json_file:
            Path(options.json_file).write_bytes(
                msgspec.json.format(msgspec.json.encode(made), indent=1) + b"\n"
            )
        if options.plot_file:
            title = (
                f"{command}\n{made['host']['cpu_model']}, "
                f"{made['host']['cores']} cores, {made['started_at']}"
            )
            plot(run, made, options.plot_file, title)
    except (OSError, ImportError) as error:
        print(f"loraplex bench load: the result could not be written: {error}", file=sys.stderr)
        return 2
    if not run.outcomes:
        print("loraplex bench load: nothing was sent", file=sys.stderr)
        return 1
    return 1 if made["requests"]["error_rate"] > options.max_error_rate else 0


async def measure(options: Options, command: Sequence[str] = ()) -> LoadRun:
    """Warms up, sends the load and returns what was seen. Raises: CannotRun."""
    started_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    async with LoadClient(
        options.url, timeout_s=options.timeout_s, api_key=_api_key(options)
    ) as client:
        target = await _find_target(client, options)
        load = dataclasses.replace(options.workload, adapters=len(target.models))
        warmed, warm_up, warm_up_failed = await _warm_up(client, target, load, options)
        progress = LoadProgress()
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD)
        machine, cpu_s, meter = _machine_cpu_s(), time.process_time(), Meter(time.perf_counter())
        async with _watched(progress, quiet=options.quiet):
            await drive(client, target, load, wl.requests(load), options.pace, meter, progress)
        cpu_s, busy_share = time.process_time() - cpu_s, _busy_share(machine, _machine_cpu_s())
    return LoadRun(
        outcomes=progress.outcomes,
        meter=meter,
        slo=options.slo,
        open_loop=options.pace.concurrency is None,
        cpu_s=cpu_s,
        busy_share=busy_share,
        adapters_known=len(target.models),
        warmed=warmed,
        warm_up=warm_up,
        warm_up_failed=warm_up_failed,
        top=options.top,
        about={
            "started_at": started_at,
            "command": list(command),
            "seed": load.seed,
            "versions": _versions(),
            "host": {
                "cores": os.cpu_count(),
                "cpu_model": cpu_model(),
                "platform": platform.platform(),
                "busy_share": busy_share,
            },
            "load": _load_facts(options, target, load),
        },
    )


def _api_key(options: Options) -> str | None:
    if options.api_key_env is None:
        return None
    if not (key := os.environ.get(options.api_key_env)):
        raise CannotRun(f"--api-key-env names {options.api_key_env}, which is not set")
    return key


async def _find_target(client: LoadClient, options: Options) -> LoadTarget:
    """Completes the target with what the server says about its models. Raises: CannotRun if there
    is no server or it lacks what is asked.
    """
    target = options.target
    try:
        reply = await client.get("/v1/models")
    except (OSError, TimeoutError) as error:
        raise CannotRun(
            f"no server answers at {options.url} ({error or 'no answer in time'}); "
            "start it first, or correct --url"
        ) from error
    if target.base_model and not options.adapters_from_models:
        return target  # a peer need not list its models
    if reply.status != 200:
        raise CannotRun(
            f"GET /v1/models answered {reply.status}; give --model and --adapters, or "
            "--api-key-env if the server wants a key"
        )
    try:
        models = msgspec.json.decode(reply.body, type=_Models).data
    except msgspec.MsgspecError as error:
        raise CannotRun(f"GET /v1/models did not answer with a list of models: {error}") from error
    base_model = target.base_model or next(
        (model.id for model in models if model.parent is None), ""
    )
    if not base_model:
        raise CannotRun("GET /v1/models lists no base model; give --model")
    target = dataclasses.replace(target, base_model=base_model)
    if not options.adapters_from_models:
        return dataclasses.replace(
            target,
            models=tuple(
                options.model_format.format(base=base_model, adapter=name)
                for name in target.adapters
            ),
        )
    adapters = tuple(model.id for model in models if model.parent == base_model)
    if not adapters:
        parents = sorted({model.parent for model in models if model.parent is not None})
        raise CannotRun(
            f"GET /v1/models lists no adapter whose parent is {base_model!r} (parents "
            f"there: {', '.join(parents) or 'none'})"
        )
    return dataclasses.replace(
        target,
        adapters=tuple(name.removeprefix(f"{base_model}:") for name in adapters),
        models=adapters,
    )


async def _warm_up(
    client: LoadClient, target: LoadTarget, load: wl.Workload, options: Options
) -> tuple[frozenset[str | None], int, int]:
    """Requests that do not count. Returns the adapters that answered, how many were sent, how many
    failed. Raises: CannotRun if all did.
    """
    # other prompts, or the server's prefix cache would know those of the test
    other = dataclasses.replace(load, seed=-1 - load.seed)
    requests = [*islice(wl.requests(other), options.warm_up)]
    if options.warm_adapters:
        plain = next(wl.requests(dataclasses.replace(other, mix=wl.BaseOnly())))
        requests += [
            dataclasses.replace(plain, index=len(requests) + adapter, adapter=adapter)
            for adapter in range(len(target.models))
        ]
    if not requests:
        return frozenset(), 0, 0
    if not options.quiet:
        print(f"warming up with {len(requests)} requests ...", file=sys.stderr, flush=True)
    progress = LoadProgress()
    pace = LoadPace(
        concurrency=min(options.pace.concurrency or WARM_UP_AT_ONCE, WARM_UP_AT_ONCE),
        requests=None,
        duration_s=None,
    )
    async with _watched(progress, quiet=options.quiet):
        await drive(client, target, other, requests, pace, Meter(time.perf_counter()), progress)
    failed = [outcome for outcome in progress.outcomes if outcome.error is not None]
    if failed and len(failed) == len(progress.outcomes):
        raise CannotRun(
            f"every warm-up request failed, the first with {failed[0].error}: {failed[0].detail}"
        )
    return (
        frozenset(outcome.adapter for outcome in progress.outcomes if outcome.error is None),
        len(progress.outcomes),
        len(failed),
    )


@contextlib.asynccontextmanager
async def _watched(progress: LoadProgress, *, quiet: bool) -> AsyncIterator[None]:
    """Prints a line now and then; the first Ctrl-C ends the sending (the report still comes), the
    second ends the process.
    """
    loop = asyncio.get_running_loop()

    def stop() -> None:
        progress.stop = True
        loop.remove_signal_handler(signal.SIGINT)
        print(
            "stopping; waiting for what is in flight (Ctrl-C again to leave now)",
            file=sys.stderr,
            flush=True,
        )

    async def tell() -> None:
        begun_s = time.perf_counter()
        while True:
            await asyncio.sleep(PROGRESS_EVERY_S)
            after_s = time.perf_counter() - begun_s
            text = (
                f"{after_s:6.0f} s  {len(progress.outcomes)} ended, {progress.failed} "
                f"failed, {progress.in_flight} in flight"
            )
            print(text, file=sys.stderr, flush=True)

    loop.add_signal_handler(signal.SIGINT, stop)
    try:
        async with asyncio.TaskGroup() as group:
            teller = None if quiet else group.create_task(tell(), name="progress")
            yield
            if teller is not None:
                teller.cancel()
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def raise_open_files_limit() -> None:
    """A connection per request in flight needs a file each: take what the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _load_facts(options: Options, target: LoadTarget, load: wl.Workload) -> dict[str, Any]:
    def tagged(part: wl.ArrivalProcess | wl.Mix | wl.Length) -> dict[str, Any]:
        return {"kind": type(part).__name__.lower(), **dataclasses.asdict(part)}

    pace = dataclasses.asdict(options.pace)
    target_facts = {
        "endpoint": target.endpoint,
        "stream": target.stream,
        "base_model": target.base_model,
        "ignore_eos": target.ignore_eos,
    }
    return {
        "url": options.url,
        **target_facts,
        "extra_body": target.extra_body,
        "loop": "open" if options.pace.concurrency is None else "closed",
        "arrival": tagged(load.arrival) if options.pace.concurrency is None else None,
        **pace,
        "mix": tagged(load.mix),
        "adapters": load.adapters,
        "base_share": load.base_share,
        "prompt": tagged(load.prompt),
        "output": tagged(load.output),
        "prefixes": load.prefixes,
        "prefix_tokens": load.prefix_tokens,
        "warm_adapters": options.warm_adapters,
        "timeout_s": options.timeout_s,
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("loraplex", "uvloop", "msgspec"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _machine_cpu_s() -> CpuTimes | None:
    """Ticks that all cores of the machine spent (working, in all); None where /proc is not."""
    try:
        ticks = [
            int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        ]
    except (OSError, ValueError):
        return None
    # fields 3 and 4: idle, waiting for I/O
    return float(sum(ticks) - ticks[3] - ticks[4]), float(sum(ticks))


def _busy_share(before: CpuTimes | None, after: CpuTimes | None) -> float | None:
    if before is None or after is None or after[1] <= before[1]:
        return None
    return (after[0] - before[0]) / (after[1] - before[1])


if __name__ == "__main__":
    sys.exit(main())
