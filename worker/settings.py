"""Pure. What one worker process is told; read once, passed on."""

from __future__ import annotations

from pathlib import Path

import msgspec

from shared.config.llm import LLMConfig


class WorkerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Times in seconds. `epoch` grows with every start of a worker of this id.

    `stream_gap_s`: how far apart two events of a stream may be to save work while the CPU is short.
    `disk_cache_bytes` 0 means as much as the disk holds; `download_timeout_s` bounds the time
    without a byte (None: no bound). `peer` is bound for workers of other hosts (empty: nothing is),
    who are told of it at `peer_host`, a host or host:port, if it is named. `lru`: see Residency.
    """

    worker: str
    epoch: int
    model: LLMConfig
    gateways: tuple[str, ...]
    state_dir: Path
    secret_env: str | None = None
    heartbeat_s: float = 0.1
    drain_s: float = 20.0
    disk_cache_bytes: int = 0
    download_timeout_s: float | None = 30.0
    max_download_tries: int = 3
    peer: str = ""
    peer_host: str | None = None
    insecure: bool = False
    stream_gap_s: float = 0.0
    lru: bool = False
    engine_suspect_s: float = 5.0
    engine_kill_s: float = 20.0

    @property
    def base(self) -> str:
        return self.model.model_id
