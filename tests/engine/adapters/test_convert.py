"""Pickled weights become safetensors, and nothing in the pickle runs."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shared.errors import ConfigError
from worker.validation.convert import convert


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_text("{}")
    return tmp_path


def test_the_tensors_are_the_same_and_the_pickle_stays(folder: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(4, 3).t()}
    torch.save(tensors, folder / "adapter_model.bin")
    assert convert(folder) == "adapter_model.safetensors"
    made = load_file(folder / "adapter_model.safetensors")
    assert made.keys() == tensors.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in tensors.items())
    assert (folder / "adapter_model.bin").exists()
    with pytest.raises(ConfigError, match="already"):
        convert(folder)


class Trap:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self._path),)


def test_code_in_a_pickle_does_not_run(folder: Path) -> None:
    trap = folder / "sprung"
    for save in (lambda o, f: torch.save(o, f), lambda o, f: f.write_bytes(pickle.dumps(o))):
        save({"a": Trap(trap)}, folder / "adapter_model.bin")
        with pytest.raises(ConfigError, match="holds more than weights"):
            convert(folder)
    assert not trap.exists() and not (folder / "adapter_model.safetensors").exists()


def test_a_folder_that_is_none_of_an_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no adapter_config\.json"):
        convert(tmp_path)
    with pytest.raises(ConfigError, match=r"no adapter_config\.json"):
        convert(tmp_path / "nowhere")
