"""Shell. Gateways made for LLM engines: three in Rust, LiteLLM in Python, and Ray Serve in the
shape of its LLM application.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench.gateways.peers.peer import Command, Peer, PeerPlace, PeerSkipped, from_pypi
from bench.process import free_ports

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_ENDPOINT": "http://127.0.0.1:9",
    "DO_NOT_TRACK": "1",
    "RUST_LOG": "warn",
}
"""No router needs a tokenizer to pass bytes on; one of them would look for it on the network at its
start.
"""
KEY_ENV = "BENCH_PEER_KEY"
KEY = "sk-bench"
RAY_READY_S = 120.0
LITELLM_READY_S = 90.0


def _bin(place: PeerPlace, environment: str, name: str) -> str:
    return str(place.cache / environment / "bin" / name)


def _listening(place: PeerPlace) -> tuple[str, ...]:
    return (
        "--host",
        "127.0.0.1",
        "--port",
        str(place.port),
        "--worker-urls",
        f"http://127.0.0.1:{place.engine_port}",
    )


def _vllm_router(place: PeerPlace) -> Command:
    options = (
        "--policy",
        "round_robin",
        "--log-level",
        "warning",
        "--prometheus-port",
        str(free_ports(1)[0]),
    )
    return Command(
        (_bin(place, "vllm-router", "vllm-router"), *_listening(place), *options),
        OFFLINE,
        "/health",
    )


def _smg(place: PeerPlace) -> Command:
    options = (
        "--policy",
        "round_robin",
        "--backend",
        "openai",
        "--log-level",
        "warn",
        "--prometheus-port",
        str(free_ports(1)[0]),
    )
    return Command(
        (_bin(place, "smg", "smg"), "launch", *_listening(place), *options, *UNLIMITED),
        OFFLINE,
        "/health",
    )


def _sglang_router(place: PeerPlace) -> Command:
    options = (
        "--policy",
        "round_robin",
        "--log-level",
        "warn",
        "--prometheus-port",
        str(free_ports(1)[0]),
    )
    launch = (_bin(place, "sglang-router", "python"), "-m", "sglang_router.launch_router")
    return Command((*launch, *_listening(place), *options, *UNLIMITED), OFFLINE, "/health")


UNLIMITED = ("--max-concurrent-requests", "-1")

LITELLM_CONF = """
model_list:
  - model_name: base
    litellm_params:
      model: openai/base
      api_base: http://127.0.0.1:{engine_port}/v1
      api_key: none
litellm_settings:
  telemetry: false
  request_timeout: 120
general_settings:
  master_key: {key}
"""


def _litellm(place: PeerPlace) -> Command:
    conf = place.folder / "litellm.yaml"
    conf.write_text(LITELLM_CONF.format(engine_port=place.engine_port, key=KEY))
    env = OFFLINE | {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_MASTER_KEY": KEY,
        "LITELLM_LOG": "ERROR",
    }
    argv = (
        _bin(place, "litellm", "litellm"),
        "--config",
        str(conf),
        "--host",
        "127.0.0.1",
        "--port",
        str(place.port),
        "--num_workers",
        "1",
    )
    return Command(argv, env, "/health/liveliness", LITELLM_READY_S, KEY_ENV)


def _ray(place: PeerPlace) -> Command:
    app = str(Path(__file__).with_name("ray_app.py"))
    env = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "PYTHONPATH": ""}
    return Command(
        (_bin(place, "ray", "python"), app, str(place.port)), env, "/v1/models", RAY_READY_S
    )


def _nowhere(cache: Path, may_install: bool) -> str:
    raise PeerSkipped(
        "vLLM production-stack's router is not on PyPI; it installs from its repository"
    )


VLLM_ROUTER = Peer(
    "vllm-router", from_pypi("vllm-router", "vllm-router", "vllm-router"), _vllm_router
)
SMG = Peer("smg", from_pypi("smg", "smg", "smg"), _smg)
SGLANG_ROUTER = Peer(
    "sglang-router", from_pypi("sglang-router", "sglang-router", "sglang-router"), _sglang_router
)
LITELLM = Peer("litellm", from_pypi("litellm", "litellm[proxy]", "litellm"), _litellm, heavy=True)
RAY = Peer("ray-serve", from_pypi("ray", "ray[serve]", "ray"), _ray, heavy=True)
PRODUCTION_STACK = Peer("production-stack", _nowhere, lambda place: Command((sys.executable,)))
