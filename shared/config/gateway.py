"""Pure. The `gateway:` section, which is ours: where the gateway listens, what it admits, and how
it reaches its workers.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from shared.config.llm_sections import Positive, Seconds, SecondsOrNone, Text
from shared.config.section import Finding, Section, shown

Port = Annotated[int, Meta(ge=0, le=65535)]  # 0: any free port

RoutingPolicy = Literal["expected-ttft", "ray", "residency-p2c"]
"""The policies that gateway/routing/registry.py makes. docs/ROUTING.md says which to choose."""

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TCP = re.compile(r"tcp://(?P<host>\[[0-9A-Fa-f:.%]+\]|[^\s/:@\[\]]+):(?P<port>[0-9]{1,5})")
DNS_SCHEME = "dns://"
"""`dns://name:port` stands for a gateway at each of the name's addresses (gRPC's scheme)."""
_KIB = 1 << 10
_MIB = 1 << 20
_GIB = 1 << 30
_HEARTBEATS_PER_LEASE = 3  # so the loss of one heartbeat changes nothing
_KEYS_HINT = (
    "keys do not belong in this file; name a variable in api_keys_env (comma-separated "
    "keys) or a file in api_keys_file (one per line)"
)
_ADMIN_KEYS_HINT = _KEYS_HINT.replace("api_keys", "admin_keys")


class LinkConfig(Section, frozen=True, kw_only=True):
    """The sockets between gateway and workers, one for control and one for data. Each is "ipc"
    (same machine) or tcp://host:port.

    On TCP the link needs `secret_env`, the name of a variable with a shared secret, or an explicit
    `insecure: true`. On loopback, gateway and workers with the same state_dir make a secret
    themselves.

    `peer` is where a worker gives adapters to workers of other hosts. It is tcp://host:port, "off"
    or "auto". With port 0 it takes any free port, else the first free port from that one on. "auto"
    means every address and any free port if the link leaves this machine and has a secret, else
    "off".
    """

    REFUSED: ClassVar[Mapping[str, str]] = {
        "secret": "secrets do not belong in this file; name an environment variable in secret_env"
    }
    SECRET: ClassVar[frozenset[str]] = frozenset({"secret_env"})

    control: Text = "ipc"
    data: Text = "ipc"
    peer: Text = "auto"
    secret_env: Text | None = None
    insecure: bool = False

    @property
    def peer_endpoint(self) -> str:
        """What a worker binds for its peers; "": nothing."""
        if self.peer != "auto":
            return "" if self.peer == "off" else self.peer
        match = _TCP.fullmatch(self.control)
        return (
            "tcp://0.0.0.0:0"
            if match is not None and not is_loopback(match["host"]) and self.secret_env
            else ""
        )

    @classmethod
    def prepare(cls, given: dict[str, Any]) -> dict[str, Any]:
        if given.get("peer") is False:  # YAML 1.1 reads `off` as a boolean
            given["peer"] = "off"
        return given

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> Iterator[Finding]:
        hosts = {}
        for name, words in (("control", ("ipc",)), ("data", ("ipc",)), ("peer", ("off", "auto"))):
            endpoint = values.get(name)
            if endpoint is None or endpoint in words:
                continue
            match = _TCP.fullmatch(endpoint)
            if match is None or not 0 <= int(match["port"]) <= 65535:
                yield Finding(
                    (name,),
                    f"expected {', '.join(words)} or tcp://host:port, got {shown(endpoint)}",
                )
            else:
                hosts[name] = match["host"]
        control, data = values.get("control"), values.get("data")
        if control is not None and data is not None:
            if (control == "ipc") != (data == "ipc"):
                yield Finding(
                    ("data",),
                    "control and data must both be ipc, or both tcp://host:port",
                    other=("control",),
                )
            elif control == data != "ipc" and not control.endswith(":0"):
                yield Finding(("data",), "control and data need two ports", other=("control",))
        yield from _variable_rule("secret_env", values.get("secret_env"))
        if values.get("secret_env") is None and values.get("insecure") is False:
            for name, host in hosts.items():
                # on loopback the processes of one state_dir make a secret
                if not is_loopback(host):
                    yield Finding(
                        (name,),
                        f"{shown(host)} is reachable from other machines; set secret_env to the "
                        "name of a variable with a shared secret, or insecure: true on a private "
                        "network",
                    )


class HTTPConfig(Section, frozen=True, kw_only=True):
    """The HTTP server of each gateway process. `header_timeout_s` bounds two times: from a
    request's first byte to the end of its head, and from a new connection to its first byte.
    `idle_timeout_s` bounds the time between two requests.

    `max_connections_per_client` 0 means three quarters of `max_connections`, because a proxy counts
    as one client.
    """

    header_timeout_s: Seconds = 10.0
    idle_timeout_s: Seconds = 75.0
    max_connections: Positive = 8192
    max_connections_per_client: Annotated[int, Meta(ge=0)] = 0
    max_unfinished_body_bytes: Positive = 256 * _MIB
    max_open_body_bytes: Positive = 1024 * _MIB


class RequestBoundsConfig(Section, frozen=True, kw_only=True):
    """How much one request may ask of a worker. `max_sequences` bounds its number of prompts times
    `n`. With `processor_options` it may say to what sizes vLLM scales pictures.
    """

    max_messages: Positive = 2048
    max_sequences: Positive = 64
    max_prompt_bytes: Positive = 8 * _MIB
    max_structured_choices: Positive = 1000
    max_structured_bytes: Positive = 64 * _KIB
    processor_options: bool = False


class TLSConfig(Section, frozen=True, kw_only=True):
    """PEM files. Both are read again when one of them changes."""

    certificate: Text | None = None
    key: Text | None = None

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> Iterator[Finding]:
        for name, other in (("certificate", "key"), ("key", "certificate")):
            if values.get(name) is None and values.get(other) is not None:
                yield Finding((name,), f"is missing; {other} is given", other=(other,))


class TracesConfig(Section, frozen=True, kw_only=True):
    """OpenTelemetry traces. `endpoint` is where they go by OTLP over HTTP; none: there are none.
    `sample` is the share of requests that are traced where the client's `traceparent` does not say
    it. With `prompts`, a trace has the request's body.
    """

    endpoint: Text | None = None
    sample: Annotated[float, Meta(ge=0, le=1)] = 0.01
    prompts: bool = False

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> Iterator[Finding]:
        endpoint = values.get("endpoint")
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            yield Finding(("endpoint",), f"expected http://... or https://..., not {endpoint!r}")


class GatewayConfig(Section, frozen=True, kw_only=True):
    """One gateway. `state_dir` holds cached adapters and sockets. `processes` gateway processes
    share one port.

    `disk_cache_bytes` bounds the cached adapters of this machine, of all its workers together; 0
    means as much as the disk holds. With `resume`, an answer goes on at another worker when its own
    worker is lost. For that, at most `resume_max_tokens` tokens of each stream are kept, and
    `resume_max_bytes` of all streams.

    `allowed_origins` are web pages that may call `/v1` from a browser ("*": all). A gateway on
    loopback without keys answers only to its own names; `allowed_hosts` adds more.

    With `private_prefix_cache`, the engine reuses what it has computed for a prompt's beginning for
    the account alone whose prompt that was.
    """

    REFUSED: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("api_keys", "api_key"), _KEYS_HINT),
        **dict.fromkeys(("admin_keys", "admin_key"), _ADMIN_KEYS_HINT),
    }
    SECRET: ClassVar[frozenset[str]] = frozenset({"api_keys_env", "admin_keys_env"})

    host: Text = "127.0.0.1"
    port: Port = 8000
    processes: Positive = 1
    api_keys_env: Text | None = None
    api_keys_file: Text | None = None
    keys_file: Text | None = None
    max_body_bytes: Positive = 32 * _MIB
    max_concurrent_requests: Positive = 4096
    max_queued_requests: Annotated[int, Meta(ge=0)] = 1024
    queue_timeout_s: Seconds = 60.0
    request_timeout_s: Seconds = 600.0
    progress_s: SecondsOrNone | None = 5.0
    adapter_settle_s: SecondsOrNone = 12.0
    catalog_refresh_s: Seconds = 30.0
    drain_s: SecondsOrNone = 20.0
    kill_s: SecondsOrNone = 5.0
    lease_s: Seconds = 0.9
    heartbeat_s: Seconds = 0.1
    hang_s: Seconds = 5.0
    engine_suspect_s: Seconds = 5.0
    engine_kill_s: Seconds = 20.0
    warm_up_s: SecondsOrNone = 10.0
    keep_answers_s: SecondsOrNone = 60.0
    max_kept_answers: Positive = 1000
    max_kept_answer_bytes: Positive = 64 * _MIB
    link: LinkConfig = msgspec.field(default_factory=LinkConfig)
    state_dir: Text = "~/.cache/loraplex"
    # about 2,000 adapters of 26 MiB, and a quarter of a usual node's disk
    disk_cache_bytes: Annotated[int, Meta(ge=0)] = 50 * _GIB
    routing_policy: RoutingPolicy = "expected-ttft"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    slow_reader_bytes: Positive = _MIB
    usage_months: Annotated[int, Meta(ge=0)] = 13
    admin_keys_env: Text | None = None
    admin_keys_file: Text | None = None
    stream_gap_s: SecondsOrNone | None = 0.04
    grammar_cpu_s: SecondsOrNone | None = 0.01  # a decode step of a large model
    http: HTTPConfig = msgspec.field(default_factory=HTTPConfig)
    bounds: RequestBoundsConfig = msgspec.field(default_factory=RequestBoundsConfig)
    tls: TLSConfig = msgspec.field(default_factory=TLSConfig)
    traces: TracesConfig = msgspec.field(default_factory=TracesConfig)
    allowed_origins: tuple[Text, ...] = ()
    allowed_hosts: tuple[Text, ...] = ()
    resume: bool = True
    resume_max_tokens: Positive = 131_072  # 512 KiB per stream
    resume_max_bytes: Positive = 256 * _MIB
    private_prefix_cache: bool = False

    @property
    def asks_for_keys(self) -> bool:
        """Whether clients need a key."""
        return any((self.api_keys_env, self.api_keys_file, self.keys_file))

    @classmethod
    def prepare(cls, given: dict[str, Any]) -> dict[str, Any]:
        if isinstance(given.get("log_level"), str):
            given["log_level"] = given["log_level"].lower()
        return given

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> Iterator[Finding]:
        yield from _variable_rule("api_keys_env", values.get("api_keys_env"))
        yield from _variable_rule("admin_keys_env", values.get("admin_keys_env"))
        lease_s, heartbeat_s = values.get("lease_s"), values.get("heartbeat_s")
        if (
            lease_s is not None
            and heartbeat_s is not None
            and lease_s < _HEARTBEATS_PER_LEASE * heartbeat_s
        ):
            text = (
                f"must be at least {_HEARTBEATS_PER_LEASE} heartbeats "
                f"({_HEARTBEATS_PER_LEASE * heartbeat_s:g}), or one lost heartbeat loses a "
                "worker"
            )
            yield Finding(("lease_s",), text, other=("heartbeat_s",))
        host = values.get("host")
        keys = [values.get(key) for key in ("api_keys_env", "api_keys_file", "keys_file")]
        if host is not None and not _is_host(host):
            text = f"expected an address or a name, without http:// and port, got {shown(host)}"
            yield Finding(("host",), text)
        elif host is not None and not is_loopback(host) and keys == [None] * 3:
            text = (
                f"{shown(host)} is reachable from other machines and no API keys are "
                "required; set keys_file, api_keys_env or api_keys_file"
            )
            yield Finding(("host",), text, "warning")
        if values.get("private_prefix_cache") and keys == [None] * 3:
            text = "has no effect without API keys, because all requests are of one account"
            yield Finding(("private_prefix_cache",), text, "warning")


def is_endpoint(text: str) -> bool:
    """Whether a worker can connect to it: `tcp://host:port`, `dns://host:port`, or the
    `ipc://path` of `serve`.
    """
    tcp = "tcp://" + text.removeprefix(DNS_SCHEME) if text.startswith(DNS_SCHEME) else text
    match = _TCP.fullmatch(tcp)
    return text.startswith("ipc:///") or (match is not None and 0 < int(match["port"]) <= 65535)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`. A name other than localhost may be any machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _is_host(text: str) -> bool:
    """Whether it may be a name or an address; only an IPv6 address holds colons."""
    try:
        return bool(ipaddress.ip_address(text.strip("[]")))
    except ValueError:
        return not set(text) & set(":/ ")


def _variable_rule(key: str, name: str | None) -> Iterator[Finding]:
    if name is not None and _VARIABLE.fullmatch(name) is None:
        yield Finding(
            (key,),
            "expected the name of an environment variable (letters, digits and _), not its value",
        )
