"""Shell. Converts adapters that cannot be served as they are, for `loraplex adapters convert`.

    python -m worker.validation.convert FOLDER [--out FOLDER] [--max-rank N] [--base FOLDER]

Pickled weights become safetensors, without running any code that the pickle may hold. LoHa, LoKr,
AdaLoRA, PiSSA and OLoRA become a plain LoRA in a folder of its own (see plain_lora.py).

torch reads the pickle with `weights_only=True`, which allows tensors and plain containers only. The
pickle stays where it is. Once the safetensors file lies beside it, no reader uses the pickle.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
from pathlib import Path

from shared.adapters.identity import CONFIG_FILE, PICKLED_WEIGHTS, WEIGHTS_FILE, choose_weights
from shared.errors import ConfigError

DONE, FAILED = 0, 1
MAX_RANK = 64
"""Of a plain LoRA that is made, unless another bound is asked for."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="loraplex adapters convert", description="Convert pickled weights to safetensors."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--max-rank", type=int, default=MAX_RANK)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--initial", type=Path)
    args = parser.parse_args(argv)
    folder = args.folder
    try:
        if _is_other_kind(folder):
            _make_plain(args)
        else:
            sys.stdout.write(f"{folder / convert(folder)}\n")
    except ConfigError as exc:
        sys.stderr.write(f"loraplex adapters convert: {exc.message}\n")
        return FAILED
    return DONE


def _is_other_kind(folder: Path) -> bool:
    """Whether it has safetensors already, of a kind that can become a plain LoRA."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        found = choose_weights([path.name for path in folder.iterdir()])
    except (OSError, ValueError):
        return False
    if not found or not isinstance(config, dict):
        return False
    try:
        from worker.validation.plain_lora import convertible
    except ImportError as exc:
        raise ConfigError(f"To convert needs torch and safetensors: {exc}.") from exc
    return convertible(config) or bool(config.get("layer_replication"))


def _make_plain(args: argparse.Namespace) -> None:
    from worker.validation.plain_lora import to_plain_lora

    folder: Path = args.folder
    out = args.out or folder.with_name(f"{folder.resolve().name}-lora")
    made = to_plain_lora(folder, out, args.max_rank, args.base, args.initial)
    sys.stdout.write(
        f"{out}: {made.kind} as a plain LoRA of rank {made.rank}, {made.modules} modules; "
        f"error of the conversion {made.error:.2g} of a module's change\n"
    )


def convert(folder: Path) -> str:
    """Converts the folder's weights. Returns the name of the file that was written. Raises
    ConfigError with the reason why none was.
    """
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
    # Written under another name first, so a store that lists meanwhile sees all of it or nothing.
    part = folder / f".{WEIGHTS_FILE}.part"
    save_file(
        {n: t.clone().contiguous() for n, t in found.items()}, part, metadata={"format": "pt"}
    )
    os.replace(part, folder / WEIGHTS_FILE)
    return WEIGHTS_FILE


if __name__ == "__main__":
    sys.exit(main())
