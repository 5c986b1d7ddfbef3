"""Shell. The built wheel, used from a folder with files named like our packages."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.harness import ROOT, make_adapter, sim_config

NAMES = ("loraplex", "gateway", "worker", "shared", "bench")
STOP_S = 60.0
MINE = "raise SystemExit('the file of the user was imported: ' + __file__)\n"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install` of the wheel puts into site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in (*NAMES, "pyproject.toml", "README.md"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run(
        [*pip, "wheel", *offline, "--no-build-isolation", "-w", folder, source], check=True
    )
    target = folder / "site"
    subprocess.run(
        [*pip, "install", *offline, "--target", target, *folder.glob("*.whl")], check=True
    )
    return target


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's folder with every name of ours, as a package or as a module."""
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(MINE)
    (tmp_path / "shared.py").unlink()
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/__init__.py").write_text(MINE)
    make_adapter(tmp_path / "adapters", "pirate")
    config = sim_config(tmp_path / "adapters", state_dir=str(tmp_path / "state"), port=0)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def environment(site: Path, **more: str) -> dict[str, str]:
    """`site` is where this Python finds us, before the editable install of the checkout."""
    bare = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return {**bare, "PYTHONPATH": str(site), **more}


async def serves(project: Path, env: dict[str, str], command: Path) -> str:
    """Starts `loraplex serve` in the folder and stops it once all workers serve. Returns its
    output.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", str(command), "serve", "config.yaml"),
        stdout=-1,
        stderr=asyncio.subprocess.STDOUT,
        cwd=project,
        env=env,
    )
    said = b""
    try:
        async with asyncio.timeout(STOP_S):
            assert process.stdout is not None
            while line := await process.stdout.readline():
                said += line
                if b"serves at" in line:
                    process.send_signal(signal.SIGINT)
            await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return said.decode()


async def test_no_file_of_the_folder_it_is_started_in_is_imported(
    site: Path, project: Path
) -> None:
    said = await serves(project, environment(site), site / "bin/loraplex")
    assert "serves at" in said and "was imported" not in said, said


async def test_a_pythonpath_of_the_users_own_shadows_none_of_our_packages(
    site: Path, project: Path
) -> None:
    (project / "loraplex.py").unlink()  # the only top-level name that is ours
    path = f"{project}{os.pathsep}{site}"
    said = await serves(project, environment(site, PYTHONPATH=path), site / "bin/loraplex")
    assert "serves at" in said and "was imported" not in said, said


def logged(n: int) -> str:
    """A line of an access log: one of ten requests a second, for one of twenty adapters."""
    times = {"queue_ms": 0.0, "ttft_ms": 50.0, "load_ms": 20.0 * (n % 4 == 0), "total_ms": 150.0}
    tokens = {"prompt_tokens": 20, "output_tokens": 5}
    model = {"model": f"m:a{n % 20}", "adapter": f"a{n % 20}"}
    return json.dumps({"ts": n / 10, "event": "request", **model, **times, **tokens})


def test_the_wheel_holds_the_load_test_and_the_simulator_and_no_other_benchmark(
    site: Path, tmp_path: Path
) -> None:
    folders = {p.name for p in (site / "bench").iterdir() if p.is_dir()} - {"__pycache__"}
    assert folders == {"load", "routing"}
    log = tmp_path / "gateway.log"
    log.write_text("\n".join(logged(n) for n in range(200)))
    advise = ("advise", "--from", log, "--workers", "2", "--slots", "8", "--simulate")
    said = subprocess.run(
        [sys.executable, "-P", site / "bin/loraplex", *advise],
        env=environment(site),
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0 and "misses with 2 worker(s)" in said.stdout, said.stderr
    done = subprocess.run(
        [sys.executable, "-P", site / "bin/loraplex", "bench", "load", "--help"],
        env=environment(site),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "--adapters-from-models" in done.stdout, done.stderr


@pytest.mark.parametrize("module", ["worker.validation", "worker", "gateway", "bench.load"])
def test_every_process_that_the_command_starts_takes_our_packages(
    site: Path, project: Path, module: str
) -> None:
    start = site / "loraplex/start.py"
    done = subprocess.run(
        [sys.executable, "-P", start, module, "--help"],
        env=environment(site, PYTHONPATH=f"{project}{os.pathsep}{site}"),
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr


def test_the_python_surface_says_which_package_of_the_users_is_in_its_way(
    site: Path, tmp_path: Path
) -> None:
    (tmp_path / "shared.py").write_text("")
    script = tmp_path / "script.py"
    script.write_text("import shared\nfrom loraplex import run\n")
    done = subprocess.run(
        [sys.executable, script], env=environment(site), capture_output=True, text=True, check=False
    )
    assert f"imported {tmp_path}/shared.py" in done.stderr and "rename yours" in done.stderr


def test_the_python_surface_works_beside_a_package_that_the_user_has_not_imported_yet(
    site: Path, project: Path
) -> None:
    (project / "loraplex.py").unlink()
    script = project / "script.py"
    script.write_text("from loraplex import LLMConfig, build_openai_app, run\nprint('ok')\n")
    done = subprocess.run(
        [sys.executable, script], env=environment(site), capture_output=True, text=True, check=False
    )
    assert done.stdout == "ok\n", done.stderr
