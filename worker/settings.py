"""Pure. What one worker process is told; read once, passed on."""

from __future__ import annotations

from pathlib import Path

import msgspec

from shared.config import LLMConfig


class WorkerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Times in seconds. `epoch` grows with every start of a worker of this id; `capacity` 0 means what the engine can run at once."""

    worker: str
    epoch: int
    model: LLMConfig
    gateways: tuple[str, ...]
    state_dir: Path
    secret_env: str | None = None
    heartbeat_s: float = 0.1
    drain_s: float = 20.0
    capacity: int = 0
    disk_budget_bytes: int = 0
    download_timeout_s: float | None = 30.0

    @property
    def base(self) -> str:
        return self.model.model_id
