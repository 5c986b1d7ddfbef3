"""Pure. The gateways that are compared, by name."""

from __future__ import annotations

from typing import TypeAlias

from bench.gateways.peers.loraplex import Loraplex
from bench.gateways.peers.peer import Peer
from bench.gateways.peers.proxies import HAPROXY, NGINX
from bench.gateways.peers.routers import (
    LITELLM,
    PRODUCTION_STACK,
    RAY,
    SGLANG_ROUTER,
    SMG,
    VLLM_ROUTER,
)

AnyPeer: TypeAlias = Peer | Loraplex

PEERS: dict[str, AnyPeer] = {
    peer.name: peer
    for peer in (
        NGINX,
        Loraplex(),
        VLLM_ROUTER,
        SMG,
        SGLANG_ROUTER,
        HAPROXY,
        PRODUCTION_STACK,
        LITELLM,
        RAY,
    )
}
"""In the order in which they run."""
