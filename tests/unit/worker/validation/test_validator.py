"""The validator on real folders: good adapters, every kind of bad one, and bad values at every
place of a file.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.adapters.base_layers import BaseShapes, shapes_from_config
from shared.adapters.checks import AdapterLimits
from shared.adapters.safetensors import VALUE_BYTES
from shared.config.llm import LLMConfig
from shared.errors import ConfigError, InvalidAdapter
from tests.bad_adapters import CONFIG, KINDS, ON_DISK_ONLY, WEIGHTS, filled, safetensors, stored
from worker.engine.vllm.lora.files import weight_files
from worker.validation.base_model import read_base_shapes
from worker.validation.validator import PIECE_BYTES, Validator

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
