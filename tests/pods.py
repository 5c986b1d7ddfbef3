"""Shell. Pods of the chart as processes on this machine: what the kubelet and the control plane of
Kubernetes would do with the rendered objects, on addresses of loopback.

Every pod has an address of its own (127.x.y.z), so that all bind the ports of the chart. Only this
is changed: `0.0.0.0` in the config becomes the pod's address, and folders and the probe port become
free ones. Names are looked up in a file that stands for the cluster's DNS.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import re
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from tests.store_servers import free_port
from tests.unit.deploy.chart import Object, config_text, container_of, of_kind, pod_of

START_S = 120.0
POLL_S = 0.05
DNS = """\
import json, os, socket
real = socket.getaddrinfo
def getaddrinfo(host, port, family=0, type=0, proto=0, flags=0):
    names = json.load(open(os.environ["TEST_DNS"]))
    if host not in names:
        return real(host, port, family, type, proto, flags)
    if not names[host]:
        raise socket.gaierror(socket.EAI_NONAME, "no address")
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port or 0)) for ip in names[host]]
socket.getaddrinfo = getaddrinfo
"""
"""The cluster's name server, in every process, as sitecustomize.py."""


@dataclass
class Pod:
    """One process of one container."""

    name: str
    ip: str
    container: Object
    command: list[str]
    env: dict[str, str]
    log: Path
    ports: dict[str, int]
    process: asyncio.subprocess.Process | None = None

    async def probe(self, kind: str) -> bool:
        """As the kubelet asks: any status from 200 to 399 is a yes."""
        get = self.container[kind]["httpGet"]
        url = f"http://{self.ip}:{self.ports[get['port']]}{get['path']}"
        try:
            async with aiohttp.ClientSession() as client, client.get(url) as answer:
                return 200 <= answer.status < 400
        except aiohttp.ClientError:
            return False

    async def until(self, kind: str) -> None:
        async with asyncio.timeout(START_S):
            while not await self.probe(kind):
                assert self.process is not None and self.process.returncode is None, self.output()
                await asyncio.sleep(POLL_S)

    def output(self) -> str:
        return self.log.read_text(errors="replace")


@dataclass
class PodCluster:
    """`ready` are the pods behind the Service; the test that uses it is the control plane."""

    objects: list[Object]
    folder: Path
    network: str = field(default_factory=lambda: f"127.{100 + os.getpid() % 150}")
    pods: dict[str, Pod] = field(default_factory=dict)
    ready: list[Pod] = field(default_factory=list)
    numbers: Any = field(default_factory=lambda: itertools.count(1))

    def __post_init__(self) -> None:
        (self.folder / "site").mkdir(exist_ok=True)
        (self.folder / "site/sitecustomize.py").write_text(DNS)
        self._write_names()

    async def start(self, workload: Object, name: str) -> Pod:
        """A pod of the workload; it is in the DNS at once, as `publishNotReadyAddresses` says."""
        number = next(self.numbers)
        container = container_of(workload)
        home = self.folder / f"{name}-{number}"
        home.mkdir()
        ports = {p["name"]: p["containerPort"] for p in container["ports"]}
        words = list(container["command"])
        ip = f"{self.network}.{os.getpid() // 150 % 250}.{number}"
        env = self._env(container, name, ip)
        if "probes" in ports:
            ports["probes"] = free_port()
            words[words.index("--probe-port") + 1] = str(ports["probes"])
        config = home / "loraplex.yaml"
        config.write_text(
            config_text(self.objects)
            .replace("0.0.0.0", ip)
            .replace("/var/lib/loraplex/state", str(home / "state"))
        )
        words = [
            re.sub(r"\$\((\w+)\)", lambda m: env[m[1]], word).replace(
                "/etc/loraplex/loraplex.yaml", str(config)
            )
            for word in words
        ]
        words[0] = str(Path(sys.executable).with_name(words[0]))
        pod = Pod(name, ip, container, words, env | {"HOME": str(home)}, home / "log", ports)
        with pod.log.open("wb") as out:
            pod.process = await asyncio.create_subprocess_exec(
                *words, env=pod.env, cwd=home, stdout=out, stderr=out
            )
        self.pods[name] = pod
        self._write_names()
        return pod

    async def stop(self, pod: Pod, workload: Object) -> int:
        """As a pod ends: out of the Service, then its preStop hook, then SIGTERM, then SIGKILL."""
        assert pod.process is not None
        if pod in self.ready:
            self.ready.remove(pod)
        grace_s = pod_of(workload)["terminationGracePeriodSeconds"]
        try:
            async with asyncio.timeout(grace_s):
                await self._pre_stop(pod)
                with contextlib.suppress(ProcessLookupError):
                    pod.process.send_signal(signal.SIGTERM)
                status = await pod.process.wait()
        except TimeoutError:
            pod.process.kill()
            status = await pod.process.wait()
        del self.pods[pod.name]
        self._write_names()
        return status

    async def _pre_stop(self, pod: Pod) -> None:
        hook = pod.container["lifecycle"]["preStop"]
        if "sleep" in hook:
            await asyncio.sleep(hook["sleep"]["seconds"])
            return
        port = str(pod.ports["probes"])
        program, *words = hook["exec"]["command"]
        assert program == "python3" and words[-1].isdigit()
        done = await asyncio.create_subprocess_exec(
            sys.executable, *words[:-1], port, env=pod.env, cwd=pod.log.parent
        )
        assert await done.wait() == 0

    async def close(self) -> None:
        for pod in self.pods.values():
            if pod.process is not None and pod.process.returncode is None:
                pod.process.kill()
                await pod.process.wait()

    def _write_names(self) -> None:
        """What the DNS says of headless Services: the addresses of the pods that they select."""
        names = {}
        for service in of_kind(self.objects, "Service"):
            if service["spec"].get("clusterIP") == "None":
                component = service["spec"]["selector"]["app.kubernetes.io/component"]
                ips = [p.ip for p in self.pods.values() if p.container["name"] == component]
                names[f"{service['metadata']['name']}.space.svc"] = ips
        aside = self.folder / "names.new"
        aside.write_text(json.dumps(names))
        aside.rename(self.folder / "names.json")

    def _env(self, container: Object, name: str, ip: str) -> dict[str, str]:
        secrets = {s["metadata"]["name"]: s["data"] for s in of_kind(self.objects, "Secret")}
        fields = {"metadata.name": name, "status.podIP": ip}
        found = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(self.folder / "site"),
            "TEST_DNS": str(self.folder / "names.json"),
        }
        for entry in container["env"]:
            found[entry["name"]] = _value(entry, secrets, fields)
        return found


def _value(
    entry: Mapping[str, Any], secrets: Mapping[str, Mapping[str, str]], fields: Mapping[str, str]
) -> str:
    if "value" in entry:
        return str(entry["value"])
    source = entry["valueFrom"]
    if "fieldRef" in source:
        return fields[source["fieldRef"]["fieldPath"]]
    ref = source["secretKeyRef"]
    return base64.b64decode(secrets[ref["name"]][ref["key"]]).decode()
