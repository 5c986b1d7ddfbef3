"""Shell. What a gateway under test is to the benchmark, and how one comes onto this machine: from
PyPI into its own environment, or from Debian.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench.process import Process, until_answers

INSTALL_S = 900
READY_S = 60.0


class PeerSkipped(Exception):
    """The peer cannot take part. The message says why."""


@dataclass(frozen=True, slots=True)
class PeerPlace:
    """Where one run of one peer happens: `cache` holds what is installed, `folder` is for this run
    alone, `engine_port` is the mock engine's.
    """

    cache: Path
    folder: Path
    port: int
    engine_port: int


@dataclass(frozen=True, slots=True)
class Running:
    """A gateway that answers at `url`. `engine` is what generates behind it, where that is not the
    shared mock engine; its CPU is not the gateway's.
    """

    url: str
    gateway: tuple[Process, ...]
    engine: Process | None = None
    key_env: str | None = None


@dataclass(frozen=True, slots=True)
class Command:
    """How to start an HTTP peer, and what to ask it to know that it is ready."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    ready_path: str = "/v1/models"
    ready_s: float = READY_S
    key_env: str | None = None


@dataclass(frozen=True, slots=True)
class Peer:
    """One gateway. `heavy` ones use CPU while idle, so they run alone.

    `install` makes it available and returns its version; with False for its second argument it only
    looks. Raises Skipped.
    """

    name: str
    install: Callable[[Path, bool], str]
    command: Callable[[PeerPlace], Command]
    heavy: bool = False

    @contextlib.asynccontextmanager
    async def running(self, place: PeerPlace) -> AsyncIterator[Running]:
        """Raises NotStarted."""
        how = self.command(place)
        process = Process(how.argv, place.folder / "log", how.env, place.folder)
        try:
            headers = f"Authorization: Bearer {os.environ[how.key_env]}\r\n" if how.key_env else ""
            await until_answers(place.port, how.ready_path, process, how.ready_s, headers)
            yield Running(f"http://127.0.0.1:{place.port}", (process,), key_env=how.key_env)
        finally:
            process.stop()


def from_pypi(environment: str, requirement: str, package: str) -> Callable[[Path, bool], str]:
    """Installs `requirement` into a virtual environment of its own below the cache."""

    def install(cache: Path, may_install: bool) -> str:
        folder = cache / environment
        version = _version(folder, package)
        if version is None and may_install:
            _run([sys.executable, "-m", "venv", str(folder)], f"no environment for {package}")
            _run(
                [str(folder / "bin" / "pip"), "install", "-q", requirement],
                f"{requirement} does not install from the package index",
            )
            version = _version(folder, package)
        if version is None:
            raise PeerSkipped(
                f"{package} is not installed in {environment} (run without --no-install)"
            )
        return version

    return install


def _version(folder: Path, package: str) -> str | None:
    python = folder / "bin" / "python"
    if not python.exists():
        return None
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    done = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    return done.stdout.strip() if done.returncode == 0 else None


def from_debian(package: str, binary: str, version_flag: str) -> Callable[[Path, bool], str]:
    """The installed program if there is one; else the distribution's package, unpacked below the
    cache: no root needed, nothing is started.
    """

    def install(cache: Path, may_install: bool) -> str:
        if (
            shutil.which(binary, path=_search_path()) is None
            and not _unpacked(cache, package, binary).exists()
        ):
            if not may_install:
                raise PeerSkipped(f"{binary} is not installed (run without --no-install)")
            _unpack(cache / package, package)
        path = program(cache, package, binary)
        done = subprocess.run(
            [path, version_flag],
            capture_output=True,
            text=True,
            check=False,
            env=library_path(cache, package),
            timeout=20,
        )
        if done.returncode != 0:
            raise PeerSkipped(
                f"{binary} does not run here: {(done.stderr or done.stdout).strip()[:200]}"
            )
        words = (done.stdout + done.stderr).replace("/", " ").split()
        return next((w for w in words if w[0].isdigit() and "." in w), "unknown")

    return install


def program(cache: Path, package: str, binary: str) -> str:
    return shutil.which(binary, path=_search_path()) or str(_unpacked(cache, package, binary))


def library_path(cache: Path, package: str) -> dict[str, str]:
    """The environment in which an unpacked program finds the libraries that were unpacked with
    it.
    """
    folders = sorted({str(p.parent) for p in (cache / package).glob("usr/lib/**/*.so*")})
    return os.environ | ({"LD_LIBRARY_PATH": ":".join(folders)} if folders else {})


def _search_path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin:/sbin"


def _unpacked(cache: Path, package: str, binary: str) -> Path:
    return cache / package / "usr" / "sbin" / binary


def _unpack(folder: Path, package: str) -> None:
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise PeerSkipped(
            f"{package} is not installed, and this is no Debian system to take its package from"
        )
    aside = folder.with_name(f".{package}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    plan = _run(
        ["apt-get", "-s", "install", "--no-install-recommends", package],
        f"{package} has no package here",
    )
    wanted = [line.split()[1] for line in plan.splitlines() if line.startswith("Inst ")]
    _run(["apt-get", "download", *wanted], f"the packages of {package} cannot be downloaded", aside)
    for archive in aside.glob("*.deb"):
        _run(["dpkg", "-x", str(archive), str(aside)], f"{archive.name} cannot be unpacked")
        archive.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def _run(argv: list[str], otherwise: str, cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, check=False, timeout=INSTALL_S, cwd=cwd
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise PeerSkipped(f"{otherwise}: {exc}") from exc
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise PeerSkipped(f"{otherwise}: {lines[-1] if lines else done.returncode}")
    return done.stdout
