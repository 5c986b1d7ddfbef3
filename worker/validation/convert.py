"""Shell. Makes safetensors of an adapter's weights that are a pickle, without running any code that
may be in it; for `loraplex adapters convert`.

python -m worker.validation.convert FOLDER

torch reads the pickle with `weights_only=True`: tensors and plain containers, nothing else. The
pickle stays where it is; it is nobody's once the safetensors lie beside it.
"""

from __future__ import annotations

import argparse
import os
import pickle
import sys
from pathlib import Path

from shared.adapters.identity import CONFIG_FILE, PICKLED_WEIGHTS, WEIGHTS_FILE, choose_weights
from shared.errors import ConfigError

DONE, FAILED = 0, 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="loraplex adapters convert", description="Convert pickled weights to safetensors."
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    try:
        sys.stdout.write(f"{folder / convert(folder)}\n")
    except ConfigError as exc:
        sys.stderr.write(f"loraplex adapters convert: {exc.message}\n")
        return FAILED
    return DONE


def convert(folder: Path) -> str:
    """The name of the file that was written. Raises ConfigError with the reason why none was."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if CONFIG_FILE not in names:
        raise ConfigError(f"{folder} is no adapter's folder: it has no {CONFIG_FILE}.")
    if weights := choose_weights(names):
        raise ConfigError(f"{folder} has safetensors already ({weights[0]}).")
    name = next((n for n in PICKLED_WEIGHTS if n in names), None)
    if name is None:
        raise ConfigError(f"{folder} has no weights: neither {' nor '.join(PICKLED_WEIGHTS)}.")
    try:
        import torch
        from safetensors.torch import save_file
    except ImportError as exc:
        raise ConfigError(f"To convert needs torch and safetensors: {exc}.") from exc
    try:
        found = torch.load(folder / name, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as exc:
        why = str(exc).splitlines()[0][:200]
        raise ConfigError(f"{name} holds more than weights, or is broken: {why}") from exc
    if not isinstance(found, dict) or not all(isinstance(t, torch.Tensor) for t in found.values()):
        raise ConfigError(f"{name} is no table of tensors.")
    # written whole under another name: a store that lists meanwhile sees all of it or nothing
    part = folder / f".{WEIGHTS_FILE}.part"
    save_file(
        {n: t.clone().contiguous() for n, t in found.items()}, part, metadata={"format": "pt"}
    )
    os.replace(part, folder / WEIGHTS_FILE)
    return WEIGHTS_FILE


if __name__ == "__main__":
    sys.exit(main())
