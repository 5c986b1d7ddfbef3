"""Shell. Checks before anything starts whether the gateway can listen at its configured address."""

from __future__ import annotations

import errno
import socket

from shared.config.gateway import GatewayConfig
from shared.errors import ConfigError


def check_address(gateway: GatewayConfig) -> None:
    """Raises ConfigError if no gateway process could listen there. Port 0 always passes."""
    try:
        found = socket.getaddrinfo(gateway.host, gateway.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        raise ConfigError(why_not_listening(gateway, exc)) from exc
    failures = []
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as exc:
            failures.append(exc)
    # a name may also have an address that this machine lacks, such as ::1 without IPv6
    if len(failures) == len(found) or any(f.errno == errno.EADDRINUSE for f in failures):
        raise ConfigError(why_not_listening(gateway, failures[0])) from failures[0]


def why_not_listening(gateway: GatewayConfig, error: OSError | UnicodeError) -> str:
    """The message for an operator whose gateway cannot listen at its configured address."""
    where = f"cannot listen on {gateway.host}:{gateway.port}"
    number = None if isinstance(error, socket.gaierror | UnicodeError) else error.errno
    if number in (None, errno.EADDRNOTAVAIL):
        return (
            f"{where}: {gateway.host} is no address of this machine; choose another with "
            "gateway.host (`serve` also takes --host)"
        )
    why = "the port is in use" if number == errno.EADDRINUSE else str(error)
    return (
        f"{where}: {why}; choose another with gateway.port (`serve` also takes --port), or stop "
        "what uses it"
    )
