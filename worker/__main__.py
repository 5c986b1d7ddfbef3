"""Shell. Composition root of a worker process: settings -> engine, store, sessions -> Agent;
SIGTERM drains.

python -m worker CONFIG --gateway ENDPOINT [--gateway ...]
    [--model ID] [--worker NAME] [--peer-host HOST[:PORT]]
"""

from __future__ import annotations

import argparse
import contextlib
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
from shared.config.parts import BUCKETS
from shared.config.settings_file import SERVE_SETTINGS, read_settings
from shared.errors import ConfigError, LoraplexError
from shared.link.secret import link_secret
from shared.link.sockets import open_context
from shared.runtime import log as runtime_log
from shared.runtime.owned_folder import temporary_folder
from shared.runtime.process import follow_parent, on_stop_signals
from shared.stores import open_store
from shared.stores.mirror import local_model
from shared.stores.transfer import Pace
from shared.supervision.client import say_last_words
from worker.agent import Agent
from worker.disk.cache import DiskCache
from worker.engine.base import Engine
from worker.engine.factory import open_engine
from worker.peers.client import Peers
from worker.peers.server import open_peer_server
from worker.session import GatewaySession
from worker.settings import WorkerSettings

CRASHED = 70
"""Exit status of a worker that an exception ended (EX_SOFTWARE of sysexits.h)."""
EPOCH_BITS = 53
"""Random: no clock, which may go back, says which of two lives is the newer one. A gateway takes
one that it has not seen before for newer.
"""
MAX_SOCKET_FOLDER = 107 - 37
"""What Linux allows for a socket's path, less a slash and vLLM's 36 characters; a longer folder
would keep the engine from starting.
"""


async def serve(
    settings: WorkerSettings, make_engine: Callable[[LLMConfig, float], Engine] = open_engine
) -> int:
    """One worker, until it is stopped. Returns the exit status."""
    settings = await _with_local_model(settings)
    model = settings.model
    engine = make_engine(model, settings.stream_gap_s)
    context = open_context()
    secret = link_secret(
        settings.secret_env, settings.insecure, settings.gateways, settings.state_dir
    )
    sessions = [
        GatewaySession(context, endpoint, settings.worker, settings.epoch, secret)
        for endpoint in settings.gateways
    ]
    pace = Pace(settings.download_timeout_s, settings.max_download_tries)
    cache = DiskCache(settings.state_dir / "adapters", settings.disk_cache_bytes, pace)
    # an I/O thread of their own: no token waits while a piece of a file is encrypted
    files = open_context()
    peers = Peers(files, settings.worker, settings.epoch, secret, pace)
    async with contextlib.AsyncExitStack() as stack:
        store = None
        if model.adapters_path is not None and model.lora_config is not None:
            store = await stack.enter_async_context(
                open_store(model.adapters_path, msgspec.structs.asdict(model.lora_config.store))
            )
        told = (
            await stack.enter_async_context(_peer_server(files, settings, cache, secret))
            if store is not None and settings.peer
            else ""
        )
        stack.callback(peers.close)
        agent = Agent(settings, engine, store, cache, sessions, peers, told)
        on_stop_signals(agent.stop)
        await agent.run()
        if agent.exit_code:
            say_last_words(agent.reason)
    context.term()
    files.term()
    return agent.exit_code


async def _with_local_model(settings: WorkerSettings) -> WorkerSettings:
    """A base model in a bucket comes to this host's disk first, unless vLLM streams it from
    there. Raises ConfigError.
    """
    model = settings.model
    streamed = str(model.engine_kwargs.get("load_format", "")).startswith("runai_streamer")
    if model.llm_engine == "sim" or streamed or not model.model_source.startswith(BUCKETS):
        return settings
    options, adapters = None, model.adapters_path or ""
    if model.lora_config is not None and adapters[:5] == model.model_source[:5]:
        options = msgspec.structs.asdict(model.lora_config.store)  # the same cloud
    folder = await local_model(model.model_source, settings.state_dir / "models", options)
    loading = msgspec.structs.replace(model.model_loading_config, model_source=str(folder))
    local = msgspec.structs.replace(model, model_loading_config=loading)
    return msgspec.structs.replace(settings, model=local)


def _peer_server(
    context: Any, settings: WorkerSettings, cache: DiskCache, secret: str | None
) -> AbstractAsyncContextManager[str]:
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
def engine_sockets(config: str) -> Iterator[None]:
    """A place for the sockets that vLLM binds and never removes: the run folder of `serve`, which
    ends with it, else one that ends with us.
    """
    with contextlib.ExitStack() as stack:
        if config.endswith(SERVE_SETTINGS):
            folder = str(Path(config).parent)
        else:
            folder = str(stack.enter_context(temporary_folder()))
        if len(folder) <= MAX_SOCKET_FOLDER:
            os.environ.setdefault("VLLM_RPC_BASE_PATH", folder)
        yield


def worker_settings(
    settings: Settings,
    model_id: str | None,
    worker: str | None,
    gateways: list[str],
    peer_host: str | None = None,
) -> WorkerSettings:
    """Raises ConfigError if it is not clear which model to serve, or no gateway is named."""
    g = settings.gateway
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
    if not gateways:
        raise ConfigError(
            "name at least one gateway: --gateway tcp://host:port (the address that "
            "the gateway prints as workers_at)"
        )
    wrong = next((endpoint for endpoint in gateways if not is_endpoint(endpoint)), None)
    if wrong is not None:
        raise ConfigError(
            f"--gateway {wrong}: expected tcp://host:port, the address that the gateway prints as "
            "workers_at"
        )
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
        lru=g.routing_policy == "ray",
        engine_suspect_s=g.engine_suspect_s,
        engine_kill_s=g.engine_kill_s,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m worker", description="One worker process.")
    parser.add_argument("config")
    parser.add_argument("--gateway", action="append", default=[], metavar="ENDPOINT")
    parser.add_argument("--model", metavar="ID")
    parser.add_argument("--worker", metavar="NAME")
    parser.add_argument("--peer-host", metavar="HOST[:PORT]")
    args = parser.parse_args(argv)
    follow_parent()
    try:
        settings = read_settings(args.config)
        mine = worker_settings(settings, args.model, args.worker, args.gateway, args.peer_host)
        runtime_log.set_up(mine.worker, settings.gateway.log_level)
        with engine_sockets(args.config):
            return uvloop.run(serve(mine))
    except LoraplexError as exc:
        say_last_words(exc.message)
        print(f"loraplex worker: {exc.message}", file=sys.stderr)  # noqa: T201 - the one message a person must see
        return 2
    except Exception as exc:
        # a bug of ours or of a library: said in one line to `serve`, in full here
        say_last_words(f"{type(exc).__name__}: {exc}")
        traceback.print_exc()
        return CRASHED


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]", "-", name)


def run(argv: list[str]) -> None:
    """For the zygote: main() in a forked child, which must never return into its parent's code."""
    status = CRASHED
    try:
        status = main(argv)
    except BaseException as exc:
        if isinstance(exc, SystemExit) and isinstance(exc.code, int):
            status = exc.code
        else:
            say_last_words(f"{type(exc).__name__}: {exc}")
            traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    # as a script, so that what vLLM spawns finds us and ends with us (loraplex/start.py)
    os.execv(sys.executable, command("worker", *sys.argv[1:]))
