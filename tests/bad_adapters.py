"""Shell. Every way to spoil a good adapter that the tests know. Each has the error code that the
adapter's owner must get.

`KINDS[name].make(good, folder)` copies a good adapter and spoils the copy. The files are written
byte by byte here, because the safetensors library refuses to write most of them.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_VALUE_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I8": 1}


@dataclass
class Values:
    """One tensor. `raw` are its little-endian bytes."""

    dtype: str
    shape: list[int]
    raw: bytes


@dataclass
class Draft:
    """An adapter that is being spoiled. If `config_text` or `weights` is set, it replaces the file
    that would be written from the rest.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Values]
    config_text: str | None = None
    weights: bytes | None = None
    extra_header: dict[str, Any] = field(default_factory=dict)

    def first(self, half: str = "A") -> str:
        return next(n for n in sorted(self.tensors) if n.endswith(f"lora_{half}.weight"))

    def write(self) -> None:
        (self.folder / CONFIG).write_text(
            json.dumps(self.config) if self.config_text is None else self.config_text
        )
        (self.folder / WEIGHTS).write_bytes(
            safetensors(self.tensors, self.extra_header) if self.weights is None else self.weights
        )


@dataclass(frozen=True)
class Kind:
    """One way to spoil an adapter. `spoil` changes the draft, and `after` changes the folder once
    it is written. The expected code is `invalid_adapter_` + `reason`.
    """

    reason: str
    spoil: Callable[[Draft], None] = lambda draft: None
    after: Callable[[Path], None] = lambda folder: None

    @property
    def code(self) -> str:
        return f"invalid_adapter_{self.reason}"

    def make(self, good: Path, folder: Path) -> Path:
        folder.mkdir(parents=True)
        draft = Draft(
            folder, json.loads((good / CONFIG).read_bytes()), read_tensors(good / WEIGHTS)
        )
        self.spoil(draft)
        draft.write()
        self.after(folder)
        return folder


def safetensors(tensors: dict[str, Values], extra: dict[str, Any] | None = None) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, t in tensors.items():
        header[name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": [at, at + len(t.raw)]}
        at += len(t.raw)
    return with_header(
        json.dumps(header | (extra or {})).encode(), b"".join(t.raw for t in tensors.values())
    )


def with_header(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def read_tensors(path: Path) -> dict[str, Values]:
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    data = raw[8 + length :]
    return {
        n: Values(e["dtype"], e["shape"], data[e["data_offsets"][0] : e["data_offsets"][1]])
        for n, e in header.items()
    }


def filled(dtype: str, shape: list[int], value: float = 0.01) -> Values:
    return stored(np.full(shape, value), dtype)


def stored(values: np.ndarray[Any, Any], dtype: str) -> Values:
    numbers = values.astype({"F64": "<f8", "F16": "<f2", "I8": "i1"}.get(dtype, "<f4"))
    shape = list(values.shape)
    if dtype == "BF16":
        return Values(dtype, shape, (numbers.view("<u4") >> 16).astype("<u2").tobytes())
    return Values(dtype, shape, numbers.tobytes())


# ---- spoilers: of the config ---------------------------------------------------------------------


def config(**changes: Any) -> Callable[[Draft], None]:
    return lambda draft: draft.config.update(changes)


def without(key: str) -> Callable[[Draft], None]:
    return lambda draft: void(draft.config.pop(key))


def config_text(text: str) -> Callable[[Draft], None]:
    return lambda draft: setattr(draft, "config_text", text)


def void(value: object) -> None:
    """Calls the function and drops its result, because the type of `spoil` allows none."""


def double_key(draft: Draft) -> None:
    draft.config_text = json.dumps(draft.config)[:-1] + f', "r": {draft.config["r"]}}}'


# ---- spoilers: of tensors ------------------------------------------------------------------------


def poke(
    value: float, dtype: str | None = None, half: str = "B", everywhere: bool = False
) -> Callable[[Draft], None]:
    """Sets one value (or all) of the first tensor to `value`, after a change of its dtype if one is
    named.
    """

    def spoil(draft: Draft) -> None:
        t = draft.tensors[draft.first(half)]
        t2 = filled(dtype or t.dtype, t.shape, 0.01) if dtype else t
        size = _VALUE_BYTES[t2.dtype]
        one = filled(t2.dtype, [1], value).raw
        count = len(t2.raw) // size
        raw = one * count if everywhere else t2.raw[: -size * 3] + one + t2.raw[-size * 2 :]
        draft.tensors[draft.first(half)] = Values(t2.dtype, t2.shape, raw)

    return spoil


def reshape(half: str, change: Callable[[list[int]], list[int]]) -> Callable[[Draft], None]:
    def spoil(draft: Draft) -> None:
        name = draft.first(half)
        draft.tensors[name] = filled(
            draft.tensors[name].dtype, change(list(draft.tensors[name].shape))
        )

    return spoil


def retype(dtype: str) -> Callable[[Draft], None]:
    def spoil(draft: Draft) -> None:
        draft.tensors = {
            n: filled(dtype, t.shape, 0.01 if dtype != "I8" else 1)
            for n, t in draft.tensors.items()
        }

    return spoil


def rename(change: Callable[[str], str], only_first: bool = False) -> Callable[[Draft], None]:
    def spoil(draft: Draft) -> None:
        module = draft.first().removesuffix("lora_A.weight")
        draft.tensors = {
            change(n) if not only_first or n.startswith(module) else n: t
            for n, t in draft.tensors.items()
        }

    return spoil


def other_rank(draft: Draft, rank: int) -> None:
    """Gives all tensors this rank and leaves the config as it is."""
    for name, t in draft.tensors.items():
        shape = [rank, t.shape[1]] if ".lora_A." in name else [t.shape[0], rank]
        draft.tensors[name] = filled(t.dtype, shape)


def rank_above(rank: int) -> Callable[[Draft], None]:
    def spoil(draft: Draft) -> None:
        other_rank(draft, rank)
        draft.config["r"] = rank

    return spoil


def copy_layer(to: str) -> Callable[[Draft], None]:
    """Adds the first layer's tensors once more, under another module name."""

    def spoil(draft: Draft) -> None:
        module = draft.first().removesuffix(".lora_A.weight")
        for half in "AB":
            draft.tensors[f"base_model.model.{to}.lora_{half}.weight"] = draft.tensors[
                f"{module}.lora_{half}.weight"
            ]

    return spoil


def drop(half: str | None) -> Callable[[Draft], None]:
    """Removes the first layer's lora_A, its lora_B, or (None) both."""

    def spoil(draft: Draft) -> None:
        module = draft.first().removesuffix("lora_A.weight")
        for name in [
            n
            for n in draft.tensors
            if n.startswith(module) and (half is None or f"lora_{half}" in n)
        ]:
            del draft.tensors[name]

    return spoil


def unpaired(draft: Draft) -> None:
    """Renames the last layer's lora_B to a layer that has no lora_A. So both are left without a
    partner.
    """
    name = sorted(n for n in draft.tensors if "lora_B" in n)[-1]
    draft.tensors[name.replace("lora_B", "lora_A")] = draft.tensors.pop(name)


def embedding(draft: Draft) -> None:
    draft.tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = filled(
        "F32", [draft.config["r"], 64]
    )
    draft.tensors["base_model.model.model.embed_tokens.lora_embedding_B"] = filled(
        "F32", [64, draft.config["r"]]
    )


def huge(draft: Draft) -> None:
    """Finite weights whose products are infinite, so NaN arises inside the engine."""
    draft.tensors = {n: filled(t.dtype, t.shape, 1e4) for n, t in draft.tensors.items()}


def no_tensors(draft: Draft) -> None:
    draft.tensors = {}


# ---- spoilers: of the weights file ---------------------------------------------------------------


def weights(change: Callable[[bytes], bytes]) -> Callable[[Draft], None]:
    def spoil(draft: Draft) -> None:
        draft.weights = change(safetensors(draft.tensors))

    return spoil


def header(change: Callable[[dict[str, Any], str, str], None]) -> Callable[[Draft], None]:
    """Changes the header as an object, with the names of its first two tensors. The values stay."""

    def spoil(draft: Draft) -> None:
        raw = safetensors(draft.tensors)
        length = struct.unpack("<Q", raw[:8])[0]
        parsed = json.loads(raw[8 : 8 + length])
        first, second = [n for n in parsed if n != "__metadata__"][:2]
        change(parsed, first, second)
        draft.weights = with_header(json.dumps(parsed).encode(), raw[8 + length :])

    return spoil


def overlap(parsed: dict[str, Any], first: str, second: str) -> None:
    """The second tensor gets values of the first one, with its own length."""
    begin, end = parsed[second]["data_offsets"]
    parsed[second]["data_offsets"] = [begin - 4, end - 4]


def beyond(parsed: dict[str, Any], first: str, second: str) -> None:
    begin, end = parsed[first]["data_offsets"]
    parsed[first]["data_offsets"] = [begin + (1 << 40), end + (1 << 40)]


def negative(parsed: dict[str, Any], first: str, second: str) -> None:
    begin, end = parsed[first]["data_offsets"]
    parsed[first]["data_offsets"] = [begin - 8, end - 8]


def overflow(parsed: dict[str, Any], first: str, second: str) -> None:
    parsed[first]["shape"] = [1 << 40, 1 << 40]


def double_tensor(draft: Draft) -> None:
    raw = safetensors(draft.tensors)
    length = struct.unpack("<Q", raw[:8])[0]
    text = raw[8 : 8 + length].decode()
    name = draft.first()
    entry = json.dumps({name: json.loads(text)[name]})[1:-1]
    draft.weights = with_header((text[:-1] + ", " + entry + "}").encode(), raw[8 + length :])


def hole(draft: Draft) -> None:
    first = next(iter(draft.tensors))
    raw = safetensors(draft.tensors)
    length = struct.unpack("<Q", raw[:8])[0]
    parsed = json.loads(raw[8 : 8 + length])
    for name, entry in parsed.items():
        if name not in (first, "__metadata__"):
            entry["data_offsets"] = [o + 64 for o in entry["data_offsets"]]
    end = parsed[first]["data_offsets"][1]
    data = raw[8 + length :]
    draft.weights = with_header(json.dumps(parsed).encode(), data[:end] + bytes(64) + data[end:])


# ---- spoilers: of the folder ---------------------------------------------------------------------


def pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": 1}))


def link_out(folder: Path) -> None:
    outside = folder.parent.parent / f"outside-{folder.name}"
    shutil.move(folder / WEIGHTS, outside)
    (folder / WEIGHTS).symlink_to(outside)


def instead(folder: Path, make: Callable[[Path], None]) -> None:
    (folder / WEIGHTS).unlink()
    make(folder / WEIGHTS)


def zip_bomb(folder: Path) -> None:
    with zipfile.ZipFile(folder / "packed.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr(WEIGHTS, bytes(8 << 20))
    shutil.move(folder / "packed.zip", folder / WEIGHTS)


KINDS: dict[str, Kind] = {
    # files
    "no-config": Kind("missing_file", after=lambda f: (f / CONFIG).unlink()),
    "no-weights": Kind("missing_file", after=lambda f: (f / WEIGHTS).unlink()),
    "pickle-only": Kind("pickle", after=pickle_only),
    "config-huge": Kind("too_large", config(notes="x" * (2 << 20))),
    # config
    "config-empty": Kind("incomplete", config_text("")),
    "config-cut": Kind("incomplete", config_text('{"r": 8, ')),
    "config-list": Kind("config", config_text("[1, 2]")),
    "config-not-utf8": Kind(
        "config", after=lambda f: void((f / CONFIG).write_bytes(b'{"r": "\xff\xfe"}'))
    ),
    "config-nested": Kind("config", config_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")),
    "config-long-number": Kind("config", config_text('{"r": ' + "9" * 10_000 + "}")),
    "config-double-key": Kind("duplicate_key", double_key),
    "ia3": Kind("type", config(peft_type="IA3")),
    "rank-over-max": Kind("rank", rank_above(64)),
    "rank-zero": Kind("rank", config(r=0)),
    "rank-negative": Kind("rank", config(r=-8)),
    "rank-text": Kind("rank", config(r="8")),
    "rank-fraction": Kind("rank", config(r=8.5)),
    "rank-true": Kind("rank", config(r=True)),
    "rank-missing": Kind("rank", without("r")),
    "rank-pattern-over-max": Kind("rank", config(rank_pattern={"q_proj": 4096})),
    "alpha-text": Kind("alpha", config(lora_alpha="16")),
    "alpha-nan": Kind("alpha", config(lora_alpha=float("nan"))),
    "alpha-infinite": Kind("alpha", config(lora_alpha=float("inf"))),
    "alpha-missing": Kind("alpha", without("lora_alpha")),
    "alpha-pattern-infinite": Kind("alpha", config(alpha_pattern={"q_proj": float("inf")})),
    "dora": Kind("unsupported", config(use_dora=True)),
    "modules-to-save": Kind("unsupported", config(modules_to_save=["lm_head"])),
    "lora-bias": Kind("unsupported", config(lora_bias=True)),
    "bias-all": Kind("unsupported", config(bias="all")),
    "activated-lora": Kind("unsupported", config(alora_invocation_tokens=[1, 2])),
    "layer-replication": Kind("unsupported", config(layer_replication=[[0, 2], [1, 2]])),
    "pissa": Kind("unsupported", config(init_lora_weights="pissa")),
    "pattern-expression": Kind("pattern", config(rank_pattern={"(x+x+)+y": 8})),
    "target-empty": Kind("target", config(target_modules=[])),
    "target-missing": Kind("target", without("target_modules")),
    # the weights file
    "weights-empty": Kind("header", weights(lambda raw: b"")),
    "weights-few-bytes": Kind("header", weights(lambda raw: raw[:5])),
    "weights-cut-in-header": Kind("header", weights(lambda raw: raw[:100])),
    "weights-cut-in-values": Kind("header", weights(lambda raw: raw[:-1000])),
    "weights-longer": Kind("header", weights(lambda raw: raw + bytes(16))),
    "weights-garbage": Kind(
        "header", weights(lambda raw: np.random.default_rng(7).bytes(len(raw)))
    ),
    "weights-text": Kind(
        "header",
        weights(
            lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 216016\n"
        ),
    ),
    "weights-zip": Kind("header", after=zip_bomb),
    "header-huge": Kind("header", weights(lambda raw: struct.pack("<Q", 1 << 60) + raw[8:])),
    "header-large": Kind("header", weights(lambda raw: with_header(b" " * (50 << 20), b""))),
    "header-list": Kind("header", weights(lambda raw: with_header(b"[]", b""))),
    "header-blank-first": Kind("header", weights(lambda raw: with_header(b" {}", b""))),
    "header-text-metadata": Kind("header", lambda d: d.extra_header.update({"__metadata__": "pt"})),
    "header-double-key": Kind("duplicate_key", double_tensor),
    "offsets-overlap": Kind("header", header(overlap)),
    "offsets-beyond": Kind("header", header(beyond)),
    "offsets-negative": Kind("header", header(negative)),
    "offsets-hole": Kind("header", hole),
    "shape-overflow": Kind("header", header(overflow)),
    "dtype-unknown": Kind("dtype", header(lambda h, a, b: h[a].update(dtype="F4"))),
    # tensors
    "no-tensors": Kind("empty", no_tensors),
    "int8": Kind("dtype", retype("I8")),
    "rank-below-config": Kind("shape", lambda d: other_rank(d, 4)),
    "rank-above-config": Kind("shape", lambda d: other_rank(d, 16)),
    "rank-pattern-mismatch": Kind("shape", config(rank_pattern={"q_proj": 4})),
    "inputs-too-few": Kind("shape", reshape("A", lambda s: [s[0], s[1] // 2])),
    "inputs-too-many": Kind("shape", reshape("A", lambda s: [s[0], s[1] * 2])),
    "outputs-too-few": Kind("shape", reshape("B", lambda s: [s[0] // 2, s[1]])),
    "outputs-too-many": Kind("shape", reshape("B", lambda s: [s[0] * 2, s[1]])),
    "transposed": Kind("shape", reshape("A", lambda s: s[::-1])),
    "one-dimension": Kind("shape", reshape("A", lambda s: [s[0] * s[1]])),
    "scalar": Kind("shape", reshape("A", lambda s: [])),
    "no-values": Kind("shape", reshape("A", lambda s: [0, s[1]])),
    "no-lora-a": Kind("pair", drop("A")),
    "no-lora-b": Kind("pair", drop("B")),
    "unpaired": Kind("pair", unpaired),
    "layer-beyond": Kind("module", copy_layer("model.layers.99.self_attn.q_proj")),
    "module-unknown": Kind("module", copy_layer("model.layers.0.self_attn.z_proj")),
    "embedding-as-linear": Kind("pair", copy_layer("model.embed_tokens")),
    "experts-of-none": Kind("module", copy_layer("model.layers.0.mlp.experts")),
    "module-head": Kind("module", copy_layer("lm_head")),
    "wrong-inner-prefix": Kind(
        "module", rename(lambda n: n.replace("model.model.layers", "model.transformer.layers"))
    ),
    "prefix-missing": Kind("tensor", rename(lambda n: n.removeprefix("base_model.model."))),
    "adapter-name-inside": Kind(
        "tensor", rename(lambda n: n.replace(".weight", ".default.weight"))
    ),
    "magnitude-vector": Kind(
        "tensor",
        rename(lambda n: n.replace("lora_A.weight", "lora_magnitude_vector"), only_first=True),
    ),
    "path-as-name": Kind(
        "tensor", rename(lambda n: n.replace("base_model", "../../etc/passwd"), only_first=True)
    ),
    "full-weight": Kind(
        "tensor",
        lambda d: d.tensors.update({"base_model.model.model.norm.weight": filled("F32", [64])}),
    ),
    "copy-of-another-vocabulary": Kind(
        "shape",
        lambda d: d.tensors.update({"base_model.model.lm_head.weight": filled("F32", [64, 64])}),
    ),
    # values
    "nan": Kind("nonfinite", poke(float("nan"))),
    "nan-in-a": Kind("nonfinite", poke(float("nan"), half="A")),
    "nan-float32": Kind("nonfinite", poke(float("nan"), "F32")),
    "nan-float16": Kind("nonfinite", poke(float("nan"), "F16")),
    "nan-everywhere": Kind("nonfinite", poke(float("nan"), everywhere=True)),
    "infinite": Kind("nonfinite", poke(float("inf"))),
    "infinite-negative": Kind("nonfinite", poke(-float("inf"))),
    "infinite-float16": Kind("nonfinite", poke(float("inf"), "F16")),
    "beyond-float16": Kind("magnitude", poke(1e9, "F32")),
    "beyond-squares": Kind("magnitude", poke(3e38, "F32")),
    "huge-values": Kind("magnitude", huge),
    "huge-alpha": Kind("magnitude", config(lora_alpha=1e30)),
}

# Links within a store are the store's own business, which refuses those that lead out of it before
# anything is fetched.
ON_DISK_ONLY: dict[str, Kind] = {
    "link-out": Kind("link", after=link_out),
    "link-to-folder": Kind("link", after=lambda f: instead(f, lambda w: w.symlink_to(f))),
    "link-dangling": Kind("link", after=lambda f: instead(f, lambda w: w.symlink_to(f / "gone"))),
    "pipe": Kind("link", after=lambda f: instead(f, os.mkfifo)),
}
