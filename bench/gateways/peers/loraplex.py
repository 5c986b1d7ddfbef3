"""Shell. This project as one of the peers: its gateway as it is deployed, and mock workers behind
the link instead of an HTTP engine.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import yaml

from bench import ROOT
from bench.cluster import start_gateway, until_listening
from bench.gateways.peers.peer import PeerPlace, Running
from bench.process import NotStarted, Process, until_answers

READY_S = 60.0


@dataclass(frozen=True, slots=True)
class Loraplex:
    """`processes` gateways behind one port; `workers` mock workers in one process; adapters from
    the folder `adapters`, if one is named. `root` is the checkout whose gateway and agent run.
    """

    name: str = "loraplex"
    heavy: bool = False
    processes: int = 1
    workers: int = 1
    adapters: Path | None = None
    max_concurrent_requests: int = 8_192
    root: Path = ROOT

    def install(self, cache: Path, may_install: bool) -> str:
        return version("loraplex")

    @contextlib.asynccontextmanager
    async def running(self, place: PeerPlace) -> AsyncIterator[Running]:
        """Raises NotStarted."""
        config = place.folder / "loraplex.yaml"
        config.write_text(yaml.safe_dump(self._config(place)))
        run_dir = place.folder / "run"
        with contextlib.ExitStack() as stack:
            gateways = []
            for index in range(self.processes):
                log = place.folder / f"g{index}.log"
                gateways.append(start_gateway(config, run_dir, log, index=index, root=self.root))
                stack.callback(gateways[-1].stop)
            endpoints = [
                await until_listening(gateway, run_dir, index)
                for index, gateway in enumerate(gateways)
            ]
            argv = [
                sys.executable,
                "-m",
                "bench.gateways.mock_engine",
                "worker",
                str(config),
                "--workers",
                str(self.workers),
            ]
            engine = Process(
                [*argv, *(f"--gateway={e}" for e in endpoints)],
                place.folder / "worker.log",
                cwd=self.root,
            )
            stack.callback(engine.stop)
            try:
                await until_answers(place.port, "/ready", gateways[0], READY_S)
            except NotStarted as exc:
                raise NotStarted(f"{exc}\nworker: {engine.last_words()}") from exc
            yield Running(f"http://127.0.0.1:{place.port}", tuple(gateways), engine)

    def _config(self, place: PeerPlace) -> dict[str, object]:
        model: dict[str, object] = {
            "model_loading_config": {"model_id": "base"},
            "llm_engine": "sim",
        }
        if self.adapters is not None:
            model["lora_config"] = {
                "dynamic_lora_loading_path": str(self.adapters),
                "max_num_adapters_per_replica": 64,
            }
        gateway = {
            "host": "127.0.0.1",
            "port": place.port,
            "processes": self.processes,
            "state_dir": str(place.folder / "state"),
            "max_concurrent_requests": self.max_concurrent_requests,
        }
        return {"llm_configs": [model], "gateway": gateway}
