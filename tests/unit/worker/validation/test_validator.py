"""The validator on real folders: good adapters, every kind of bad one, and bad values at every
place of a file.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.adapters.base_layers import BaseShapes, shapes_from_config
from shared.adapters.checks import AdapterLimits
from shared.adapters.identity import CONFIG_FILE, WEIGHTS_FILE, StoredFile
from shared.adapters.safetensors import VALUE_BYTES, Tensor
from shared.config.llm import LLMConfig
from shared.errors import ConfigError, InvalidAdapter
from shared.stores import transfer
from shared.stores.transfer import FilePart, parts_of
from tests.bad_adapters import CONFIG, KINDS, ON_DISK_ONLY, WEIGHTS, filled, safetensors, stored
from worker.engine.vllm.lora.files import weight_files
from worker.validation import validator as validator_module
from worker.validation import values
from worker.validation.base_model import read_base_shapes
from worker.validation.validator import Validator
from worker.validation.values import PIECE_BYTES, read_header

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
found = shapes_from_config(MODEL)
assert found is not None
BASE: BaseShapes = found
RANK = 8


def make_good(folder: Path, dtype: str = "BF16") -> Path:
    folder.mkdir()
    kinds = ["q_proj", "v_proj", "down_proj"]
    tensors = {}
    for module, (outputs, inputs) in BASE.modules.items():
        if module.rpartition(".")[2] in kinds:
            tensors[f"base_model.model.{module}.lora_A.weight"] = filled(dtype, [RANK, inputs])
            tensors[f"base_model.model.{module}.lora_B.weight"] = filled(
                dtype, [outputs, RANK], 0.02
            )
    (folder / WEIGHTS).write_bytes(safetensors(tensors))
    (folder / CONFIG).write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "r": RANK,
                "lora_alpha": 16,
                "target_modules": kinds,
                "bias": "none",
            }
        )
    )
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_good(tmp_path_factory.mktemp("adapters") / "good")


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_a_good_adapter_passes_and_its_facts_are_told(tmp_path: Path, dtype: str) -> None:
    folder = make_good(tmp_path / "a", dtype)
    facts = Validator(BASE, 16).check(folder)
    assert (facts.rank, facts.modules) == (RANK, ("down_proj", "q_proj", "v_proj"))
    assert facts.size_bytes == sum(p.stat().st_size for p in folder.iterdir())


@pytest.mark.parametrize("name", [*KINDS, *ON_DISK_ONLY])
def test_a_bad_adapter_is_refused_with_its_code(tmp_path: Path, good: Path, name: str) -> None:
    kind = (KINDS | ON_DISK_ONLY)[name]
    folder = kind.make(good, tmp_path / "store" / "bad")
    with pytest.raises(InvalidAdapter) as caught:
        Validator(BASE, 16).check(folder)
    assert caught.value.code == kind.code
    assert (
        str(tmp_path) not in caught.value.message
        and caught.value.message.isascii()
        and len(caught.value.message) < 500
    )


def test_there_are_many_kinds_of_bad_adapters() -> None:
    assert len(KINDS) >= 30 and len({k.code for k in KINDS.values()}) >= 15


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_value_is_found_wherever_it_is(tmp_path: Path, dtype: str, value: float) -> None:
    """At the first and last place of a tensor that is read in several pieces, and where two pieces
    meet.
    """
    size = VALUE_BYTES[dtype]
    inputs = (2 * PIECE_BYTES // size) // RANK + 3
    module = "model.layers.0.self_attn.q_proj"
    validator = Validator(BaseShapes({module: (4, inputs)}), 16)
    a, b = filled(dtype, [RANK, inputs]), filled(dtype, [4, RANK])
    one = filled(dtype, [1], value).raw
    (tmp_path / CONFIG).write_text(
        json.dumps({"r": RANK, "lora_alpha": 16, "target_modules": ["q_proj"]})
    )
    for at in (None, 0, PIECE_BYTES - size, PIECE_BYTES, len(a.raw) - size):
        raw = a.raw if at is None else a.raw[:at] + one + a.raw[at + size :]
        spoiled = type(a)(dtype, a.shape, raw)
        name = f"base_model.model.{module}.lora_"
        (tmp_path / WEIGHTS).write_bytes(
            safetensors({f"{name}A.weight": spoiled, f"{name}B.weight": b})
        )
        if at is None:
            validator.check(tmp_path)
            continue
        with pytest.raises(InvalidAdapter) as caught:
            validator.check(tmp_path)
        assert caught.value.reason == "nonfinite", at


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_the_norm_is_that_of_the_values_in_every_type(tmp_path: Path, dtype: str) -> None:
    """|A| = 20 and |B| = 50 make a change of 1000. A bound just below refuses it, and one just
    above does not.
    """
    (tmp_path / CONFIG).write_text(
        json.dumps({"r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]})
    )
    name = "base_model.model.m.q_proj.lora_"
    values = {
        f"{name}A.weight": filled(dtype, [1, 100], 2.0),
        f"{name}B.weight": filled(dtype, [100, 1], -5.0),
    }
    (tmp_path / WEIGHTS).write_bytes(safetensors(values))
    Validator(None, 16, AdapterLimits(max_change=1000.1)).check(tmp_path)
    with pytest.raises(InvalidAdapter, match=r"more than 999\.9"):
        Validator(None, 16, AdapterLimits(max_change=999.9)).check(tmp_path)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("sign", [1, -1])
def test_one_large_value_is_not_taken_for_a_large_norm(
    tmp_path: Path, dtype: str, sign: int
) -> None:
    """Among 10,000 values, which would be beyond all measure if all of them were as large."""
    (tmp_path / CONFIG).write_text(
        json.dumps({"r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]})
    )
    name = "base_model.model.m.q_proj.lora_"
    a, b = np.zeros((1, 10_000)), np.zeros((10_000, 1))
    a[0, 7], b[9, 0] = sign * 1024, sign * 1.5
    values = {f"{name}A.weight": stored(a, dtype), f"{name}B.weight": stored(b, dtype)}
    (tmp_path / WEIGHTS).write_bytes(safetensors(values))
    Validator(None, 16, AdapterLimits(max_change=1536.1)).check(tmp_path)
    with pytest.raises(InvalidAdapter, match=r"1\.54e\+03"):
        Validator(None, 16, AdapterLimits(max_change=1535.9)).check(tmp_path)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("scale", [0.0, 1e-7, 1.0, 1e3])
def test_the_largest_magnitude_is_found_by_its_bits(
    tmp_path: Path, dtype: str, scale: float
) -> None:
    rng = np.random.default_rng(5)
    tensors = {
        "mixed": stored(rng.normal(0, scale, 999), dtype),
        "below zero": stored(-rng.random(999) * scale, dtype),
        "above zero": stored(rng.random(999) * scale, dtype),
        "none": stored(np.empty(0), dtype),
    }
    (tmp_path / WEIGHTS).write_bytes(safetensors(tensors))
    file = read_header(tmp_path / WEIGHTS, AdapterLimits())
    largest = file.largest()
    for t in file.tensors:
        values = [abs(value) for piece in file.pieces(t, PIECE_BYTES) for value in piece]
        assert largest[t.name] == max(values, default=0.0), t.name


def test_an_adapter_for_modules_that_the_server_leaves_out_is_refused_with_their_names(
    good: Path,
) -> None:
    assert Validator(BASE, 16, targets=["qkv_proj", "down_proj"]).check(good).modules == (
        "down_proj",
        "q_proj",
        "v_proj",
    )
    assert Validator(BASE, 16, targets=["k_proj", "down_proj"]).check(good).rank == RANK, (
        "packed into one layer, adapted as one"
    )
    with pytest.raises(InvalidAdapter, match="changes q_proj, v_proj, which") as refused:
        Validator(BASE, 16, targets=["o_proj", "down_proj"]).check(good)
    assert refused.value.code == "invalid_adapter_target_modules"


def test_a_rank_pattern_raises_the_rank_that_a_slot_must_hold(tmp_path: Path, good: Path) -> None:
    raw = json.loads((make_good(tmp_path / "a") / CONFIG).read_text())
    (tmp_path / "a" / CONFIG).write_text(json.dumps(raw | {"rank_pattern": {"k_proj": 12}}))
    assert Validator(BASE, 16).check(tmp_path / "a").rank == 12


def test_a_link_inside_the_folder_is_followed(tmp_path: Path) -> None:
    folder = make_good(tmp_path / "a")
    (folder / "blobs").mkdir()
    (folder / WEIGHTS).rename(folder / "blobs" / "1")
    (folder / WEIGHTS).symlink_to("blobs/1")
    assert Validator(BASE, 16).check(folder).rank == RANK


def test_a_folder_that_is_itself_reached_by_a_link_passes(tmp_path: Path) -> None:
    make_good(tmp_path / "a")
    (tmp_path / "b").symlink_to("a")
    assert Validator(BASE, 16).check(tmp_path / "b").rank == RANK


def test_what_trainers_leave_beside_an_adapter_is_not_looked_at(tmp_path: Path) -> None:
    folder = make_good(tmp_path / "a")
    size = sum(path.stat().st_size for path in folder.iterdir())
    for i in range(300):
        (folder / f"sample-{i}.json").touch()
    for name in ("training_args.bin", "optimizer.pt", "adapter_model.bin"):
        (folder / name).write_bytes(b"PK")
    (folder / os.path.join(*["d"] * 300)).mkdir(parents=True)
    os.mkfifo(folder / "pipe")
    assert Validator(BASE, 16).check(folder).size_bytes == size


def test_weights_in_several_files_are_read_as_one(tmp_path: Path) -> None:
    folder = make_good(tmp_path / "a")
    where = {}
    for i, half in enumerate(("lora_A", "lora_B"), 1):
        part = {
            f"base_model.model.{module}.{half}.weight": filled(
                "F32", [RANK, inputs] if half == "lora_A" else [outputs, RANK], 0.02
            )
            for module, (outputs, inputs) in BASE.modules.items()
            if module.endswith("q_proj")
        }
        name = f"adapter_model-0000{i}-of-00002.safetensors"
        (folder / name).write_bytes(safetensors(part))
        where |= dict.fromkeys(part, name)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / WEIGHTS).unlink()
    assert Validator(BASE, 16).check(folder).modules == ("q_proj",)
    # left from an earlier upload, which had another number of files
    (folder / "adapter_model-00001-of-00003.safetensors").write_bytes(safetensors(part))
    assert Validator(BASE, 16).check(folder).modules == ("q_proj",)
    assert {path.name for path in weight_files(folder)} == set(where.values())
    (folder / "adapter_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InvalidAdapter, match="not complete") as refused:
        Validator(BASE, 16).check(folder)
    assert refused.value.code == "invalid_adapter_incomplete"


def test_the_headers_of_all_files_are_bounded_together(tmp_path: Path, good: Path) -> None:
    """250 headers of 16 MiB each would take 20 GiB of memory."""
    header = read_header(good / WEIGHTS, AdapterLimits()).header
    (tmp_path / CONFIG).write_bytes((good / CONFIG).read_bytes())
    shards = [f"adapter_model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
    for name in shards:
        (tmp_path / name).write_bytes((good / WEIGHTS).read_bytes())
    index = {"weight_map": {name: name for name in shards}}
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    for room, why in ((3 * len(header), "incomplete"), (3 * len(header) - 1, "header")):
        with pytest.raises(InvalidAdapter) as refused:
            Validator(BASE, 16, AdapterLimits(max_header_bytes=room)).check(tmp_path)
        assert refused.value.code == f"invalid_adapter_{why}"


def test_without_weights_only_the_config_is_read(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(
        json.dumps({"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]})
    )
    (tmp_path / WEIGHTS).write_bytes(b"nothing of the kind")
    validator = Validator(None, 16, weights=False)
    assert validator.check(tmp_path).rank == 8
    (tmp_path / CONFIG).write_text(
        json.dumps({"r": 32, "lora_alpha": 16, "target_modules": ["q_proj"]})
    )
    with pytest.raises(InvalidAdapter, match="max_lora_rank 16"):
        validator.check(tmp_path)


def test_neither_torch_nor_the_safetensors_library_is_needed() -> None:
    code = (
        "import sys, worker.validation.validator, worker.validation.base_model, numpy; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'safetensors', 'transformers')))"
    )
    assert os.spawnl(os.P_WAIT, sys.executable, sys.executable, "-c", code) == 0


# ---- the base model ------------------------------------------------------------------------------


def model_in(folder: Path) -> LLMConfig:
    return LLMConfig(model_loading_config={"model_id": "m", "model_source": str(folder)})


def test_shapes_are_read_from_a_model_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    assert read_base_shapes(model_in(tmp_path)).modules == BASE.modules


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_folder_without_a_model_is_a_config_error(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError):
        read_base_shapes(model_in(tmp_path))


def test_a_large_adapter_is_scanned_without_being_held(tmp_path: Path) -> None:
    """64 MiB are read. The pieces and their float32 form stay below 2 MiB."""
    import tracemalloc

    inputs = 1 << 20
    validator = Validator(BaseShapes({"m.q_proj": (16, inputs)}), 32)
    a = type(filled("BF16", [1]))("BF16", [32, inputs], np.zeros(32 * inputs, "<u2").tobytes())
    (tmp_path / CONFIG).write_text(
        json.dumps({"r": 32, "lora_alpha": 16, "target_modules": ["q_proj"]})
    )
    (tmp_path / WEIGHTS).write_bytes(
        safetensors(
            {
                "base_model.model.m.q_proj.lora_A.weight": a,
                "base_model.model.m.q_proj.lora_B.weight": filled("BF16", [16, 32]),
            }
        )
    )
    del a
    tracemalloc.start()
    validator.check(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 << 20


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("module", ["model.embed_tokens", "lm_head"])
@pytest.mark.parametrize("end", [".base_layer", ""])
def test_a_copy_of_the_bases_embedding_must_be_the_bases(
    tmp_path: Path, dtype: str, module: str, end: str
) -> None:
    """The base and the copy are of two types, and their rows are read in several pieces."""
    rows, columns = 9, PIECE_BYTES // 16
    layer = next(name for name in BASE.modules if name.endswith("q_proj"))
    outputs, inputs = BASE.modules[layer]
    shapes = BaseShapes({layer: (outputs, inputs), module: (rows, columns)})
    values = np.linspace(-0.7, 0.9, rows * columns, dtype=np.float32).reshape(rows, columns)
    changed = values.copy()
    changed[-1, -1] += 0.1
    base, copies = tmp_path / "base", {"same": values, "changed": changed}
    base.mkdir()
    own = {"model.embed_tokens.weight": stored(values, "BF16")}
    (base / "model.safetensors").write_bytes(safetensors(own))
    for name, copy in copies.items():
        folder = make_good(tmp_path / name)
        tensors = {
            f"base_model.model.{layer}.lora_A.weight": filled("F32", [RANK, inputs]),
            f"base_model.model.{layer}.lora_B.weight": filled("F32", [outputs, RANK], 0.02),
            f"base_model.model.{module}{end}.weight": stored(copy, dtype),
        }
        (folder / WEIGHTS).write_bytes(safetensors(tensors))
    assert Validator(shapes, 16, base=base).check(tmp_path / "same").rank == RANK
    with pytest.raises(InvalidAdapter, match=f"1 of its {rows} rows") as caught:
        Validator(shapes, 16, base=base).check(tmp_path / "changed")
    assert caught.value.code == "invalid_adapter_embedding"


def with_copy(folder: Path, layer: str, copy: np.ndarray[Any, Any]) -> Path:
    outputs, inputs = BASE.modules[layer]
    tensors = {
        f"base_model.model.{layer}.lora_A.weight": filled("F32", [RANK, inputs]),
        f"base_model.model.{layer}.lora_B.weight": filled("F32", [outputs, RANK], 0.02),
        "base_model.model.model.embed_tokens.weight": stored(copy, "F32"),
    }
    (make_good(folder) / WEIGHTS).write_bytes(safetensors(tensors))
    return folder


def test_a_copy_is_compared_with_the_weights_whose_name_is_nearest(tmp_path: Path) -> None:
    layer = next(name for name in BASE.modules if name.endswith("q_proj"))
    values = np.linspace(-0.7, 0.9, 32, dtype=np.float32).reshape(8, 4)
    base = tmp_path / "base"
    base.mkdir()
    own = {
        "language.model.embed_tokens.weight": stored(values, "F32"),
        "audio.embed_tokens.weight": stored(-values, "F32"),
    }
    (base / "model.safetensors").write_bytes(safetensors(own))
    (base / "dangling.safetensors").symlink_to("nowhere")
    validator = Validator(BaseShapes({layer: BASE.modules[layer]}), 16, base=base)
    assert validator.check(with_copy(tmp_path / "same", layer, values)).rank == RANK
    for name, copy, reason in [("others", -values, "embedding"), ("more", values[:7], "shape")]:
        with pytest.raises(InvalidAdapter) as caught:
            validator.check(with_copy(tmp_path / name, layer, copy))
        assert caught.value.reason == reason


def test_a_copy_that_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    layer = next(name for name in BASE.modules if name.endswith("q_proj"))
    folder = with_copy(tmp_path / "a", layer, np.ones((8, 4), np.float32))
    for base in (None, tmp_path):
        with pytest.raises(InvalidAdapter, match="save_embedding_layers"):
            Validator(BaseShapes({layer: BASE.modules[layer]}), 16, base=base).check(folder)


# ---- values that are looked at while the file comes ----------------------------------------------


class Coming:
    """A file of weights that comes part by part into the folder of a check that has begun."""

    def __init__(self, folder: Path, whole: Path) -> None:
        self.folder, self.raw = folder, (whole / WEIGHTS).read_bytes()
        folder.mkdir()
        (folder / CONFIG).write_bytes((whole / CONFIG).read_bytes())
        (folder / WEIGHTS).touch()
        self.check = Validator(BASE, 16).begin(folder)
        self.parts = parts_of(StoredFile(WEIGHTS, len(self.raw), ""))

    def come(self, part: FilePart) -> None:
        with (self.folder / WEIGHTS).open("r+b") as f:
            f.seek(part.offset)
            f.write(self.raw[part.offset : part.offset + part.size_bytes])
        self.check.look(part)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PART_BYTES", 4096)
    monkeypatch.setattr(values, "PIECE_BYTES", 512)


ORDERS: list[Callable[[list[FilePart]], list[FilePart]]] = [
    lambda parts: parts,
    lambda parts: parts[::-1],
    lambda parts: parts[1::2],  # the others are of an earlier try
]


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("order", ORDERS)
def test_a_good_file_passes_in_whatever_order_its_parts_come(
    tmp_path: Path, good: Path, order: Callable[[list[FilePart]], list[FilePart]]
) -> None:
    coming = Coming(tmp_path / "coming", good)
    for part in order(coming.parts):
        coming.come(part)
    (coming.folder / WEIGHTS).write_bytes(coming.raw)
    assert coming.check.facts() == Validator(BASE, 16).check(good)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", [*KINDS, *ON_DISK_ONLY])
def test_a_bad_file_is_refused_in_the_same_words_whether_it_was_looked_at_before_or_not(
    tmp_path: Path, good: Path, name: str, order: Callable[[list[FilePart]], list[FilePart]]
) -> None:
    bad = (KINDS | ON_DISK_ONLY)[name].make(good, tmp_path / "store" / "bad")
    with pytest.raises(InvalidAdapter) as afterwards:
        Validator(BASE, 16).check(bad)
    if not all((bad / name).is_file() for name in (CONFIG, WEIGHTS)):
        return
    coming = Coming(tmp_path / "coming", bad)
    for part in order(coming.parts):
        coming.come(part)
    shutil.rmtree(coming.folder)
    shutil.copytree(bad, coming.folder, symlinks=True)
    with pytest.raises(InvalidAdapter) as caught:
        coming.check.facts()
    assert (caught.value.code, caught.value.message) == (
        afterwards.value.code,
        afterwards.value.message,
    )


@pytest.mark.usefixtures("small_parts")
def test_values_that_were_looked_at_are_not_read_again(
    tmp_path: Path, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nearly all: those of blocks that lie in two parts are left for the end."""
    coming = Coming(tmp_path / "coming", good)
    looked = list[int]()
    largest = values._largest
    monkeypatch.setattr(
        values,
        "_largest",
        lambda raw, *more: looked.append(len(raw)) or largest(raw, *more),
    )
    for part in coming.parts:
        coming.come(part)
    early = sum(looked)
    coming.check.facts()
    assert early > len(coming.raw) * 0.6
    assert sum(looked) == sum(
        t.end - t.begin for t in read_header(good / WEIGHTS, AdapterLimits()).tensors
    )


def test_what_one_adapter_of_a_recipe_was_found_to_be_is_said_of_no_other(
    tmp_path: Path, good: Path
) -> None:
    """The header and the config are known from the first. Each of the others differs in one file,
    and the last not at all.
    """
    validator = Validator(BASE, 16)
    facts = validator.check(good)
    raw, config = (good / WEIGHTS).read_bytes(), json.loads((good / CONFIG).read_text())

    def checked(name: str, weights: bytes, **more: object) -> tuple[int, tuple[str, ...]]:
        folder = tmp_path / name
        folder.mkdir()
        (folder / WEIGHTS).write_bytes(weights)
        (folder / CONFIG).write_text(json.dumps(config | more))
        found = validator.check(folder)
        return found.rank, found.modules

    for name, weights, more, code in (
        ("value", raw[:-2] + b"\x80\x7f", {}, "nonfinite"),
        ("rank", raw, {"r": RANK - 1}, "shape"),
        ("targets", raw, {"target_modules": ["q_proj", "v_proj"]}, "module"),
        ("scaling", raw, {"lora_alpha": 1e6}, "magnitude"),
        ("short", raw[:-2], {}, "header"),
    ):
        with pytest.raises(InvalidAdapter) as caught:
            checked(name, weights, **more)
        assert caught.value.reason == code, name
    assert checked("same", raw) == (facts.rank, facts.modules)


def test_what_a_recipe_says_is_worked_out_once(
    tmp_path: Path, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worked_out, check = list[int](), validator_module.check_tensors
    monkeypatch.setattr(
        validator_module,
        "check_tensors",
        lambda tensors, *more: worked_out.append(len(tensors)) or check(tensors, *more),
    )
    other = shutil.copytree(good, tmp_path / "other")
    (other / WEIGHTS).write_bytes((good / WEIGHTS).read_bytes()[:-2] + b"\0\0")
    validator = Validator(BASE, 16)
    assert validator.check(good) == validator.check(other)
    assert len(worked_out) == 1


@pytest.mark.usefixtures("small_parts")
def test_what_was_looked_at_by_another_header_does_not_count(tmp_path: Path, good: Path) -> None:
    """The first part came twice: first with a header that calls all values float16."""
    raw = (good / WEIGHTS).read_bytes()
    spoiled = bytearray(raw)
    spoiled[-2:] = b"\x80\x7f"  # infinite as bfloat16, a NaN as float16
    spoiled[-4:-2] = b"\xff\x7b"  # the largest float16
    (good / WEIGHTS).write_bytes(spoiled)
    coming = Coming(tmp_path / "coming", good)
    coming.raw = bytes(spoiled[:-2]) + b"\0\0"
    coming.raw = coming.raw.replace(b'"BF16"', b'"F16" ')
    for part in coming.parts:
        coming.come(part)
    (coming.folder / WEIGHTS).write_bytes(spoiled)
    with pytest.raises(InvalidAdapter, match="NaN or infinite"):
        coming.check.facts()


@pytest.mark.parametrize(
    "other",
    [
        Validator(BASE, 8),
        Validator(None, 16),
        Validator(BASE, 16, AdapterLimits(max_change=1.0)),
        Validator(BASE, 16, weights=False),
        Validator(BASE, 16, targets=["q_proj"]),
        Validator(BaseShapes({**BASE.modules, "more": (1, 1)}), 16),
    ],
)
def test_validators_that_may_say_otherwise_have_other_rules(other: Validator) -> None:
    assert Validator(BASE, 16).rules == Validator(BASE, 16).rules != other.rules


def test_the_rules_are_others_once_the_base_has_other_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = Validator(BASE, 16, base=tmp_path).rules
    (tmp_path / "model.safetensors").write_bytes(b"22")
    assert before != Validator(BASE, 16, base=tmp_path).rules


@pytest.mark.parametrize("between", [("I8", 3, 3), ("BOOL", 1, 1), ("I16", 1, 2)])
def test_a_type_that_is_no_float_between_floats_is_refused_and_ends_no_look(
    tmp_path: Path, between: tuple[str, int, int]
) -> None:
    """Its bytes are a multiple of no float's."""
    dtype, count, size = between
    header = {
        "base_model.model.q_proj.lora_A.weight": ["F16", [1, 1], 0, 2],
        "between": [dtype, [count], 2, 2 + size],
        "base_model.model.q_proj.lora_B.weight": ["F16", [1, 1], 2 + size, 4 + size],
    }
    text = json.dumps(
        {n: {"dtype": d, "shape": s, "data_offsets": [b, e]} for n, (d, s, b, e) in header.items()}
    ).encode()
    raw = len(text).to_bytes(8, "little") + text + bytes(4 + size)
    (tmp_path / WEIGHTS_FILE).write_bytes(raw)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    begun = Validator(None, 8).begin(tmp_path)
    begun.look(FilePart(StoredFile(WEIGHTS_FILE, len(raw), "v"), 0, 0, len(raw)))
    with pytest.raises(InvalidAdapter):
        begun.facts()
    values.read_header(tmp_path / WEIGHTS_FILE, AdapterLimits()).look(0, len(raw))


def test_a_file_of_many_small_tensors_takes_time_in_proportion() -> None:
    def took(count: int) -> float:
        tensors = [Tensor(f"t{n}", "F16", (1,), 2 * n, 2 * n + 2) for n in range(count)]
        best = math.inf
        for _ in range(3):
            began = time.process_time()
            values._blocks_of(tensors, PIECE_BYTES)
            best = min(best, time.process_time() - began)
        return best

    few, many = took(8_000), took(64_000)  # all in one block
    assert many < 24 * few, (few, many)
