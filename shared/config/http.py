"""Pure. What `gateway:` says of the HTTP side: timeouts and sizes of connections, what one request
may ask for, and the certificate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from msgspec import Meta

from shared.config.parts import Positive, Seconds, Text
from shared.config.section import Finding, Section

_KIB, _MIB = 1 << 10, 1 << 20


class HTTPConfig(Section, frozen=True, kw_only=True):
    """Of each gateway process. `header_timeout_s` runs from a request's first byte to the end of
    its head, and from a new connection to its first byte; `idle_timeout_s` between two requests.

    `max_connections_per_client` 0: three quarters of all, since a proxy is one client too.
    """

    header_timeout_s: Seconds = 10.0
    idle_timeout_s: Seconds = 75.0
    max_connections: Positive = 8192
    max_connections_per_client: Annotated[int, Meta(ge=0)] = 0
    max_unfinished_body_bytes: Positive = 256 * _MIB


class RequestBoundsConfig(Section, frozen=True, kw_only=True):
    """How much one request may ask of a worker. `max_sequences`: its prompts times `n`."""

    max_messages: Positive = 2048
    max_sequences: Positive = 64
    max_prompt_bytes: Positive = 8 * _MIB
    max_structured_choices: Positive = 1000
    max_structured_bytes: Positive = 64 * _KIB


class TLSConfig(Section, frozen=True, kw_only=True):
    """PEM files; both are read again when one of them changes."""

    certificate: Text | None = None
    key: Text | None = None

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> Iterator[Finding]:
        for name, other in (("certificate", "key"), ("key", "certificate")):
            if values.get(name) is None and values.get(other) is not None:
                yield Finding((name,), f"is missing; {other} is given", other=(other,))
