"""Pure. The settings of one worker process. They are read once and passed on."""

from __future__ import annotations

from pathlib import Path

import msgspec

from shared.config.llm import LLMConfig


class KeepBounds(msgspec.Struct, frozen=True):
    """An answer that a client may ask for again is kept for `keep_s` after its end, or after the
    last listener has left. 0: none is.
    """

    keep_s: float
    max_answers: int
    max_bytes: int


class WorkerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The settings of one worker process. All times are in seconds.

    `worker` is the worker's id, and `epoch` the number of this life of it. `gateways` are the
    control endpoints: tcp://host:port, or dns://name:port for a gateway at each of the name's
    addresses. `disk_cache_bytes` bounds the disk cache; 0 means as much as the disk holds.
    `download_timeout_s` is how long a download may go without a byte (None: no bound). The worker
    binds `peer` to give files to workers of other hosts ("": it binds nothing). They are told
    `peer_host` (a host or host:port), if it is set. `stream_gap_s` is the longest gap between two
    events of a stream while the CPU is short. `grammar_cpu_s` is the CPU time that a grammar may
    take for each token (0: no bound). `lru`: see Residency. An engine that makes no progress for
    `engine_suspect_s` is suspect, and after `engine_kill_s` more it is killed.
    A new worker loads what gateways want loaded for at most `warm_up_s` before it serves.
    `probe_port` answers probes of Kubernetes (None: nothing does). `run_dir` is a folder that
    somebody else removes after the end of this process.
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
    grammar_cpu_s: float = 0.0
    lru: bool = False
    engine_suspect_s: float = 5.0
    engine_kill_s: float = 20.0
    probe_port: int | None = None
    warm_up_s: float = 10.0
    run_dir: Path | None = None
    keep_answers: KeepBounds = KeepBounds(60.0, 1000, 64 << 20)

    @property
    def base(self) -> str:
        return self.model.model_id
