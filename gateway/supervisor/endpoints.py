"""Pure. Where a gateway process finds its sockets: derived from the settings, its index and the run
folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shared.config.llm import Settings


@dataclass(frozen=True, slots=True)
class Endpoints:
    """What one gateway process binds for its workers."""

    control: str
    data: str


def endpoints(settings: Settings, index: int, run_dir: Path) -> Endpoints:
    """`ipc` becomes a socket in the run folder; `tcp://host:port` is shifted by two ports per
    process, so that every process has its own pair.
    """
    link = settings.gateway.link
    return Endpoints(
        _endpoint(link.control, "control", index, run_dir),
        _endpoint(link.data, "data", index, run_dir),
    )


def _endpoint(wanted: str, kind: str, index: int, run_dir: Path) -> str:
    if wanted == "ipc":
        return f"ipc://{run_dir}/g{index}.{kind}"
    host, _, port = wanted.rpartition(":")
    return wanted if port in ("0", "*") else f"{host}:{int(port) + 2 * index}"
