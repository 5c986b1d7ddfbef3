"""Pure. The gateways that are compared, by name."""

from __future__ import annotations

from typing import TypeAlias

from bench.peers.loraplex import Loraplex
from bench.peers.peer import Peer
from bench.peers.proxies import HAPROXY, NGINX
from bench.peers.routers import LITELLM, PRODUCTION_STACK, RAY, SGLANG_ROUTER, SMG, VLLM_ROUTER

AnyPeer: TypeAlias = Peer | Loraplex

PEERS: dict[str, AnyPeer] = {
    peer.name: peer for peer in (NGINX, Loraplex(), VLLM_ROUTER, SMG, SGLANG_ROUTER, HAPROXY, PRODUCTION_STACK, LITELLM, RAY)
}
"""In the order in which they run."""
