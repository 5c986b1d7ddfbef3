"""Pure. The addresses of the link at which a gateway process and its workers meet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shared.config.llm import Settings

IPC = "ipc"


@dataclass(frozen=True, slots=True)
class LinkAddresses:
    """The two endpoints that one gateway process binds for its workers."""

    control: str
    data: str


def link_addresses(settings: Settings, index: int, run_dir: Path) -> LinkAddresses:
    """The endpoints of gateway process `index`, from the settings.

    `ipc` becomes a socket in the run folder. For `tcp://host:port`, each process uses the port plus
    two per process before it, so no two processes share one.
    """
    link = settings.gateway.link
    return LinkAddresses(
        _endpoint(link.control, "control", index, run_dir),
        _endpoint(link.data, "data", index, run_dir),
    )


def is_only_gateway(settings: Settings) -> bool:
    """Whether no other gateway process can have the same workers. Those that come by TCP may know
    of gateways on other machines.
    """
    g = settings.gateway
    return g.processes == 1 and g.link.control == IPC


def _endpoint(wanted: str, kind: str, index: int, run_dir: Path) -> str:
    if wanted == IPC:
        return f"ipc://{run_dir}/g{index}.{kind}"
    host, _, port = wanted.rpartition(":")
    return wanted if port in ("0", "*") else f"{host}:{int(port) + 2 * index}"
