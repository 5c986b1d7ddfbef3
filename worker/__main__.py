"""Shell. The composition root of a worker process. It reads the settings, builds the engine, the
store, the disk cache and one session per gateway, and runs the Agent. SIGTERM drains the worker.

    python -m worker CONFIG --gateway ENDPOINT [--gateway ...]
        [--model ID] [--worker NAME] [--peer-host HOST[:PORT]] [--probe-port PORT]
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import secrets
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from loraplex.start import command
from shared.config.gateway import is_endpoint
from shared.config.llm import LLMConfig, Settings
from shared.config.llm_sections import BUCKETS
from shared.config.settings_file import SERVE_SETTINGS, read_settings
from shared.errors import ConfigError, LoraplexError
from shared.link.secret import link_secret
from shared.link.sockets import open_context
from shared.runtime import log as runtime_log
from shared.runtime.owned_folder import temporary_folder
from shared.runtime.process import follow_parent, on_reload_signal, on_stop_signals
from shared.stores import open_store
from shared.stores.mirror import local_model
from shared.stores.transfer import TransferRetries
from shared.supervision.client import report_exit_reason
from worker.agent import Agent
from worker.disk.cache import DiskCache
from worker.engine.base import Engine
from worker.engine.factory import open_engine
from worker.gateways import Gateways
from worker.loop_watch import watch_loop
from worker.peers.client import Peers
from worker.peers.server import open_peer_server
from worker.session import GatewaySession
from worker.settings import KeepBounds, WorkerSettings

log = logging.getLogger("loraplex.worker")

CRASHED = 70
"""Exit status of a worker that an exception ended (EX_SOFTWARE of sysexits.h)."""
EPOCH_BITS = 53
"""The epoch is a random number of this many bits. It is no clock value, because a clock may go
back. A gateway takes an epoch that it has not seen before for a newer life of the worker.
"""
MAX_SOCKET_FOLDER = 107 - 37
"""Longest folder, in characters, in which vLLM can bind its sockets. Linux allows 107 characters
for a socket's path; a slash and the name that vLLM adds take 37 of them. In a longer folder the
engine would not start.
"""


async def serve(
    settings: WorkerSettings, make_engine: Callable[[LLMConfig, float, float], Engine] = open_engine
) -> int:
    """Runs one worker until it is stopped. Returns the exit status.

    Raises ConfigError, StoreUnavailable or LinkError if the worker cannot begin.
    """
    settings = await _with_local_model(settings)
    model = settings.model
    engine = make_engine(model, settings.stream_gap_s, settings.grammar_cpu_s)
    context = open_context()
    secret = link_secret(
        settings.secret_env, settings.insecure, settings.gateways, settings.state_dir
    )
    gateways = Gateways(
        settings.gateways,
        lambda endpoint: GatewaySession(context, endpoint, settings.worker, settings.epoch, secret),
    )
    pace = TransferRetries(settings.download_timeout_s, settings.max_download_tries)
    cache = DiskCache(settings.state_dir / "adapters", settings.disk_cache_bytes, pace)
    # Files of peers get an I/O thread of their own. So no token waits while a piece of a file is
    # encrypted.
    files = open_context()
    peers = Peers(files, settings.worker, settings.epoch, secret, pace)
    async with contextlib.AsyncExitStack() as stack:
        store = None
        if model.adapters_path is not None and model.lora_config is not None:
            store = await stack.enter_async_context(
                open_store(model.adapters_path, msgspec.structs.asdict(model.lora_config.store))
            )
        peer_endpoint = (
            await stack.enter_async_context(_peer_server(files, settings, cache, secret))
            if store is not None and settings.peer
            else ""
        )
        stack.callback(peers.close)
        stack.enter_context(watch_loop(context, settings, gateways, secret))
        agent = Agent(settings, engine, store, cache, gateways, peers, peer_endpoint)
        on_stop_signals(agent.stop, lambda: agent.stop("Ctrl-C, again"))
        on_reload_signal(lambda: log.info("SIGHUP: a worker reads its config at its start alone"))
        await agent.run()
        if agent.exit_code:
            report_exit_reason(agent.reason)
    context.term()
    files.term()
    return agent.exit_code


async def _with_local_model(settings: WorkerSettings) -> WorkerSettings:
    """Copies a base model that lies in a bucket to this host's disk. vLLM's own streaming loader
    needs no copy, and the simulated engine needs no model. Raises ConfigError.
    """
    model = settings.model
    streamed = str(model.engine_kwargs.get("load_format", "")).startswith("runai_streamer")
    if model.llm_engine == "sim" or streamed or not model.model_source.startswith(BUCKETS):
        return settings
    options, adapters = None, model.adapters_path or ""
    if model.lora_config is not None and adapters[:5] == model.model_source[:5]:
        # adapters and model lie in the same cloud
        options = msgspec.structs.asdict(model.lora_config.store)
    folder = await local_model(model.model_source, settings.state_dir / "models", options)
    loading = msgspec.structs.replace(model.model_loading_config, model_source=str(folder))
    local = msgspec.structs.replace(model, model_loading_config=loading)
    return msgspec.structs.replace(settings, model=local)


def _peer_server(
    context: Any, settings: WorkerSettings, cache: DiskCache, secret: str | None
) -> AbstractAsyncContextManager[str]:
    """Serves this host's adapter files while inside. Yields the endpoint that other hosts
    are told.
    """
    named, gateway = settings.peer_host, settings.gateways[0]
    return open_peer_server(
        context,
        settings.peer,
        cache,
        secret=secret,
        insecure=settings.insecure,
        named=named,
        gateway=gateway,
    )


@contextlib.contextmanager
def engine_sockets(config: str) -> Iterator[Path]:
    """Names a folder for the sockets that vLLM binds and never removes, and yields it. It is the
    run folder of `loraplex serve`, which `serve` removes at its end. Without `serve` it is a
    temporary folder, which ends with this process.
    """
    with contextlib.ExitStack() as stack:
        if config.endswith(SERVE_SETTINGS):
            folder = str(Path(config).parent)
        else:
            folder = str(stack.enter_context(temporary_folder()))
        if len(folder) <= MAX_SOCKET_FOLDER:
            os.environ.setdefault("VLLM_RPC_BASE_PATH", folder)
        yield Path(folder)


def worker_settings(
    settings: Settings,
    model_id: str | None,
    worker: str | None,
    gateways: list[str],
    peer_host: str | None = None,
    probe_port: int | None = None,
) -> WorkerSettings:
    """The settings of this worker: the chosen model's part of `settings`, and what the command line
    says.

    Raises ConfigError if it is not clear which model to serve, or if no gateway is named.
    """
    g = settings.gateway
    model = _chosen_model(settings, model_id)
    _check_gateways(gateways)
    return WorkerSettings(
        worker=worker or f"{_safe(socket.gethostname())}-{os.getpid()}",
        epoch=secrets.randbits(EPOCH_BITS),
        model=model,
        gateways=tuple(gateways),
        state_dir=Path(g.state_dir).expanduser(),
        secret_env=g.link.secret_env,
        heartbeat_s=g.heartbeat_s,
        drain_s=g.drain_s,
        disk_cache_bytes=g.disk_cache_bytes,
        download_timeout_s=model.lora_config.download_timeout_s if model.lora_config else None,
        max_download_tries=model.lora_config.max_download_tries if model.lora_config else 1,
        peer=g.link.peer_endpoint,
        peer_host=peer_host,
        insecure=g.link.insecure,
        stream_gap_s=g.stream_gap_s or 0.0,
        grammar_cpu_s=g.grammar_cpu_s or 0.0,
        lru=g.routing_policy == "ray",
        engine_suspect_s=g.engine_suspect_s,
        engine_kill_s=g.engine_kill_s,
        probe_port=probe_port,
        warm_up_s=g.warm_up_s,
        keep_answers=KeepBounds(g.keep_answers_s, g.max_kept_answers, g.max_kept_answer_bytes),
    )


def _chosen_model(settings: Settings, model_id: str | None) -> LLMConfig:
    """Raises ConfigError if it is not clear which model to serve."""
    if model_id is None and len(settings.models) > 1:
        raise ConfigError(
            f"{settings.source} has several models: choose one with --model "
            f"({', '.join(m.model_id for m in settings.models)})"
        )
    model = settings.models[0] if model_id is None else settings.model(model_id)
    if model is None:
        raise ConfigError(
            f"{settings.source} has no model `{model_id}` (it has "
            f"{', '.join(m.model_id for m in settings.models)})"
        )
    return model


def _check_gateways(gateways: list[str]) -> None:
    """Raises ConfigError if no gateway is named, or one is not an endpoint."""
    if not gateways:
        raise ConfigError(
            "name at least one gateway: --gateway tcp://host:port (the address that "
            "the gateway prints as workers_at)"
        )
    wrong = next((endpoint for endpoint in gateways if not is_endpoint(endpoint)), None)
    if wrong is not None:
        raise ConfigError(
            f"--gateway {wrong}: expected tcp://host:port, the address that the gateway prints as "
            "workers_at, or dns://name:port for all gateways of a name"
        )


def main(argv: list[str] | None = None) -> int:
    """Runs one worker; returns its exit status: 0 after a drain, 2 if the worker could not begin,
    CRASHED after an unexpected exception.
    """
    parser = argparse.ArgumentParser(prog="python -m worker", description="One worker process.")
    parser.add_argument("config")
    parser.add_argument("--gateway", action="append", default=[], metavar="ENDPOINT")
    parser.add_argument("--model", metavar="ID")
    parser.add_argument("--worker", metavar="NAME")
    parser.add_argument("--peer-host", metavar="HOST[:PORT]")
    parser.add_argument("--probe-port", type=int, metavar="PORT")
    args = parser.parse_args(argv)
    follow_parent()
    try:
        settings = read_settings(args.config)
        mine = worker_settings(
            settings, args.model, args.worker, args.gateway, args.peer_host, args.probe_port
        )
        runtime_log.set_up(mine.worker, settings.gateway.log_level)
        with engine_sockets(args.config) as run_dir:
            return uvloop.run(serve(msgspec.structs.replace(mine, run_dir=run_dir)))
    except LoraplexError as exc:
        report_exit_reason(exc.message)
        # the one message a person must see
        print(f"loraplex worker: {exc.message}", file=sys.stderr)  # noqa: T201
        return 2
    except Exception as exc:
        # This is a bug, ours or a library's. `serve` prints one line of it; the traceback goes to
        # stderr.
        report_exit_reason(f"{type(exc).__name__}: {exc}")
        traceback.print_exc()
        return CRASHED


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]", "-", name)


def run(argv: list[str]) -> None:
    """Runs main() in a child that the zygote has forked. The child must never return into its
    parent's code, so this function ends the process.
    """
    status = CRASHED
    try:
        status = main(argv)
    except BaseException as exc:
        if isinstance(exc, SystemExit) and isinstance(exc.code, int):
            status = exc.code
        else:
            report_exit_reason(f"{type(exc).__name__}: {exc}")
            traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    # Run as a script. The processes that vLLM spawns then find this code and end with this process
    # (see loraplex/start.py).
    os.execv(sys.executable, command("worker", *sys.argv[1:]))
