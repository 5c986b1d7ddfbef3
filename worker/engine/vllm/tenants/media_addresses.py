"""Shell. From where the pictures, sounds and videos of requests may be fetched. A worker reaches
what clients do not: its own machine, its network, and the cloud's service that hands out keys.

So it connects to public addresses alone. That is looked at for each connection, so neither a name
nor a redirect leads elsewhere. Where an operator names `allowed_media_domains`, those decide.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Collection
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import aiohttp
from vllm import connections
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media import MediaConnector

_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")  # IPv4 behind a translator
_OF_CLOUDS = frozenset({ipaddress.ip_address("168.63.129.16")})
"""Public in form. Azure's machines get their secrets there."""
Address = tuple[str, int]
# vLLM's own, however often they are replaced
_any_client = connections.HTTPConnection.get_async_client
_load_from_url = MediaConnector.load_from_url


def fetch_from_public_addresses(allowed_domains: Collection[str] | None) -> None:
    """Called for each engine, before anything is fetched. A second call replaces the first."""
    MediaConnector.load_from_url = _load_contents
    client = _any_client if allowed_domains else _public_client
    connections.HTTPConnection.get_async_client = client


def is_public(address: str) -> bool:
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inside = found.ipv4_mapped or found.sixtofour or (found.teredo or (None, None))[1]
        if inside is None and found in _TRANSLATED:
            inside = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        found = inside or found
    return found.is_global and not found.is_multicast and found not in _OF_CLOUDS


async def _public_client(connection: Any) -> aiohttp.ClientSession:
    """`HTTPConnection.get_async_client`, whose client opens its sockets here."""
    if connection._async_client is None or not connection.reuse_client:
        sockets = aiohttp.TCPConnector(socket_factory=_opening(_proxies()))
        connection._async_client = aiohttp.ClientSession(trust_env=True, connector=sockets)
    client: aiohttp.ClientSession = connection._async_client
    return client


def _opening(proxies: Collection[Address]) -> Callable[[Any], socket.socket]:
    def opened(info: Any) -> socket.socket:
        family, kind, protocol, _, (host, port, *_) = info
        if not is_public(host) and (host, port) not in proxies:
            raise VLLMValidationError(
                "Media are fetched from public addresses only. Send the contents in a data URL.",
                parameter="url",
            )
        return socket.socket(family, kind, protocol)

    return opened


def _proxies() -> set[Address]:
    """The addresses of the environment's proxies, which decide themselves what is reached."""
    found: set[Address] = set()
    for proxy in getproxies().values():
        try:
            parts = urlsplit(proxy)
            port = parts.port or (443 if parts.scheme == "https" else 80)
            infos = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
        except (OSError, ValueError):
            continue
        found.update((str(info[4][0]), port) for info in infos)
    return found


def _load_contents(connector: Any, url: str, media_io: Any, **more: Any) -> Any:
    """`MediaConnector.load_from_url`, which vLLM calls for media to embed or to score. It waits in
    the thread that reads the texts of all requests, for up to 105 s if a server does not answer.
    """
    if url[:5].lower() != "data:":
        raise VLLMValidationError(
            "Media to embed or to score are not fetched. Send the contents in a data URL.",
            parameter="url",
        )
    return _load_from_url(connector, url, media_io, **more)
