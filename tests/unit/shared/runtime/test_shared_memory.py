"""Shell. Shared memory of a process that was killed goes, and that of others stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest

from shared.runtime.owned_folder import PREFIX, sweep, temporary_folder
from shared.runtime.shared_memory import SEGMENTS, SUFFIX, note_segments, remove_segments

OWNER = """
import mmap, os, sys
name = sys.argv[1]
fd = os.open("/dev/shm/" + name, os.O_CREAT | os.O_RDWR, 0o600)
os.ftruncate(fd, 4096)
held = mmap.mmap(fd, 4096)
print("mapped", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def owner() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that has mapped a segment, and the segment's name, which has a space in it."""
    name = f"loraplex test {os.getpid()}"
    child = subprocess.Popen(
        [sys.executable, "-c", OWNER, name], stdin=-1, stdout=-1, text=True, bufsize=1
    )
    assert child.stdout is not None and child.stdout.readline() == "mapped\n"
    yield child, name
    child.kill()
    child.wait()
    (SEGMENTS / name).unlink(missing_ok=True)


def test_what_a_killed_process_had_mapped_is_removed_and_nothing_else(
    owner: tuple[subprocess.Popen[str], str], tmp_path: Path
) -> None:
    child, name = owner
    place = tmp_path / f"w0{SUFFIX}"
    other = SharedMemory(create=True, size=4096)
    try:
        note_segments(place, [child.pid])
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert (SEGMENTS / name).exists(), "the kernel keeps it"
        remove_segments(place)
        assert not (SEGMENTS / name).exists() and not place.exists()
        assert (SEGMENTS / other.name.lstrip("/")).exists()
    finally:
        other.close()
        other.unlink()


def test_names_that_were_noted_before_stay_noted(
    owner: tuple[subprocess.Popen[str], str], tmp_path: Path
) -> None:
    child, name = owner
    place = tmp_path / f"w0{SUFFIX}"
    note_segments(place, [child.pid])
    note_segments(place, [os.getpid()])
    assert name in place.read_text().split("\n")


def test_a_process_without_shared_memory_leaves_no_note(tmp_path: Path) -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        note_segments(tmp_path / "w0.shm", [child.pid, 0])
        assert not (tmp_path / "w0.shm").exists()
    finally:
        child.kill()
        child.wait()


def test_a_note_cannot_name_a_file_elsewhere(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.touch()
    (tmp_path / "w0.shm").write_text(f"../..{victim}\n{victim}")
    remove_segments(tmp_path / "w0.shm")
    assert victim.exists()


def test_the_folder_of_a_killed_owner_takes_the_shared_memory_along(
    owner: tuple[subprocess.Popen[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child, name = owner
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with temporary_folder() as folder:
        note_segments(folder / f"w0{SUFFIX}", [child.pid])
        sweep()
        assert (SEGMENTS / name).exists(), "its owner lives"
        kept = tmp_path / f"{PREFIX}dead"
        folder.rename(kept)  # as if the owner had been killed: nobody removes it
    assert (SEGMENTS / name).exists()
    sweep()
    assert not kept.exists() and not (SEGMENTS / name).exists()
