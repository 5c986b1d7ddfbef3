"""What an adapter must be: config, header, tensors, values; all of it from values, without a
file.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
import time
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.adapters.base_layers import BaseShapes, families_in, shapes_from_config
from shared.adapters.checks import (
    AdapterLimits,
    FileKind,
    FolderFile,
    Pair,
    check_change,
    check_files,
    check_norm,
    check_tensors,
)
from shared.adapters.peft_config import check_config
from shared.adapters.safetensors import Tensor, header_length, parse_header
from shared.adapters.strict_json import parse_object, shown
from shared.errors import InvalidAdapter

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BASE = shapes_from_config(LLAMA, "some/base")
assert BASE is not None
PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
Q0, Q1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"


def config_of(**changes: Any) -> bytes:
    return json.dumps({k: v for k, v in (PLAIN | changes).items() if v != "absent"}).encode()


def reason(call: Any, *args: Any) -> str:
    with pytest.raises(InvalidAdapter) as caught:
        call(*args)
    assert (
        caught.value.code == f"invalid_adapter_{caught.value.reason}"
        and caught.value.message.endswith(".")
    )
    return caught.value.reason


def tensors(shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> list[Tensor]:
    return [
        Tensor(f"base_model.model.{name}.weight", dtype, shape, 0, 0)
        for name, shape in shapes.items()
    ]


WHOLE = {
    f"{q}.lora_{half}": ((8, 64) if half == "A" else (64, 8)) for q in (Q0, Q1) for half in "AB"
}


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
HEADER_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "x"]),
        "shape": st.lists(st.integers(-1, 4), max_size=3),
        "data_offsets": st.lists(st.integers(-1, 20), max_size=3),
    }
)


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


# ---- config --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"peft_type": "IA3"}, "type"),
        ({"peft_type": None}, "type"),
        ({"r": 0}, "rank"),
        ({"r": "8"}, "rank"),
        ({"r": True}, "rank"),
        ({"r": 17}, "rank"),
        ({"r": 10**30}, "rank"),
        ({"rank_pattern": {"q_proj": 17}}, "rank"),
        ({"lora_alpha": "16"}, "alpha"),
        ({"lora_alpha": -1}, "alpha"),
        ({"lora_alpha": True}, "alpha"),
        ({"lora_alpha": 10**400}, "alpha"),
        ({"lora_alpha": math.nan}, "alpha"),
        ({"alpha_pattern": {"q_proj": math.inf}}, "alpha"),
        ({"use_dora": True}, "unsupported"),
        ({"bias": "lora_only"}, "unsupported"),
        ({"modules_to_save": ["lm_head"]}, "unsupported"),
        ({"init_lora_weights": "OLoRA"}, "unsupported"),
        ({"use_rslora": "false"}, "config"),
        ({"rank_pattern": [1]}, "pattern"),
        ({"rank_pattern": {"q": 8, **{f"m{i}": 8 for i in range(1000)}}}, "pattern"),
        ({"alpha_pattern": {"(.*)*q": 8}}, "pattern"),
        ({"target_modules": "absent"}, "target"),
        ({"target_modules": ["q_proj", 7]}, "target"),
        ({"target_modules": ["z_proj"]}, "target"),
        ({"target_modules": ["proj"]}, "target"),
        ({"base_model_name_or_path": "org/Qwen2.5-7B"}, "base"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_config_that_cannot_be_served_is_refused_with_its_reason(
    changes: dict[str, Any], why: str
) -> None:
    assert reason(check_config, config_of(**changes), 16, BASE) == why


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"peft_type": "absent"},
        {"r": 16},
        {"lora_alpha": 0.5},
        {
            "use_dora": False,
            "modules_to_save": None,
            "rank_pattern": None,
            "alpha_pattern": {},
            "layer_replication": [],
        },
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": ["self_attn.q_proj", Q1]},
        {"base_model_name_or_path": "/home/anna/models/my-base"},
        {"base_model_name_or_path": "/data/qwen/users/checkpoints/step-100"},
        {"base_model_name_or_path": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"},
        {"rank_pattern": {r"^model.layers.\d+.self_attn.q_proj": 4}},
        {"some_future_key": {"x": 1}},
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_config_as_peft_writes_it_passes(changes: dict[str, Any]) -> None:
    check_config(config_of(**changes), 16, BASE)


def test_ranks_and_scalings_follow_the_patterns_as_peft_reads_them() -> None:
    patterns = {
        "rank_pattern": {"0.self_attn.q_proj": 2, "q_proj": 4, "roj": 16},
        "alpha_pattern": {"^model.layers.1.self_attn.q_proj": 40},
    }
    config = check_config(config_of(**patterns), 16, BASE)
    assert (
        config.rank_of(Q0),
        config.rank_of(Q1),
        config.rank_of("model.layers.0.mlp.up_proj"),
    ) == (2, 4, 8)
    assert (config.scaling_of(Q0), config.scaling_of(Q1)) == (16 / 2, 40 / 4)
    assert check_config(config_of(use_rslora=True), 16, BASE).scaling_of(Q0) == 16 / math.sqrt(8)


@pytest.mark.parametrize(
    "pattern",
    [
        r"\d+" * 60 + "x",
        "(x+x+)+y",
        ".*.*.*x",
        "[a-z]+x",
        "a|b",
        "",
        "q_proj\n",
        "x" * 201,
        "q{1,9}",
    ],
)
def test_a_pattern_whose_time_could_explode_is_refused(pattern: str) -> None:
    assert reason(check_config, config_of(rank_pattern={pattern: 8}), 16, BASE) == "pattern"


def test_the_worst_pattern_that_passes_is_quick() -> None:
    config = check_config(config_of(rank_pattern={r"\d+\d+" + "." * 150 + "x": 8}), 16, None)
    begin = time.process_time()
    config.rank_of("1." + "1" * 298)
    assert time.process_time() - begin < 0.5


@given(st.binary(max_size=200) | JSON.map(as_json))
def test_any_bytes_are_a_config_or_refused(raw: bytes) -> None:
    try:
        check_config(raw, 16, BASE)
    except InvalidAdapter as exc:
        assert exc.reason and exc.message.isascii() and len(exc.message) < 600


@given(
    st.sampled_from(
        [*PLAIN, "use_rslora", "bias", "rank_pattern", "modules_to_save", "base_model_name_or_path"]
    ),
    JSON,
)
def test_any_value_of_a_key_is_taken_or_refused(key: str, value: Any) -> None:
    try:
        config = check_config(config_of(**{key: value}), 16, BASE)
    except InvalidAdapter:
        return
    assert (
        1 <= config.rank <= 16
        and math.isfinite(config.scaling_of(Q0))
        and config.scaling_of(Q0) > 0
    )


# ---- JSON ----------------------------------------------------------------------------------------


def test_a_key_given_twice_is_refused_at_any_depth() -> None:
    assert reason(parse_object, b'{"a": {"b": 1, "b": 1}}', "it", "config") == "duplicate_key"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b'{"a": 1} x',
        b"\xef\xbb\xbf{}",
        b"\xff{}",
        b'{"a":' * 5000,
        b'{"a": ' + b"1" * 5000 + b"}",
    ],
)
def test_what_is_not_one_object_is_refused(raw: bytes) -> None:
    assert reason(parse_object, raw, "it", "config") == "config"


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda c: st.lists(c) | st.dictionaries(st.text(), c),
    )
)
def test_what_is_shown_is_short_and_printable(value: object) -> None:
    assert len(shown(value)) < 140 and shown(value).isascii() and shown(value).isprintable()


# ---- header --------------------------------------------------------------------------------------


def entry(begin: int, end: int, dtype: str = "F32", shape: Any = None) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [(end - begin) // 4] if shape is None else shape,
        "data_offsets": [begin, end],
    }


def header(**entries: Any) -> bytes:
    return json.dumps(entries).encode()


def test_tensors_come_in_the_order_of_their_values() -> None:
    found = parse_header(
        header(b=entry(0, 8), a=entry(8, 12), __metadata__={"format": "pt"}) + b"   ", 12
    )
    assert [(t.name, t.begin, t.end) for t in found] == [("b", 0, 8), ("a", 8, 12)]


@pytest.mark.parametrize(
    "entries",
    [
        {"a": entry(4, 8)},
        {"a": entry(0, 8), "b": entry(4, 12)},
        {"a": entry(0, 4), "b": entry(8, 12)},
        {"a": entry(0, 8)},
        {"a": entry(0, 16)},
        {"a": entry(0, 12, shape=[2])},
        {"a": entry(0, 12, shape=[-3])},
        {"a": entry(0, 12, shape=[3.0])},
        {"a": entry(0, 12, shape=[True, 3])},
        {"a": entry(0, 12, shape="3")},
        {"a": entry(0, 12, shape=[1] * 8 + [3])},
        {"a": entry(-12, 0, shape=[3])},
        {"a": entry(12, 0, shape=[3])},
        {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12, 12]}},
        {"a": {"dtype": "F32", "shape": [3]}},
        {"a": {"dtype": 4, "shape": [3], "data_offsets": [0, 12]}},
        {"a": entry(0, 12) | {"more": 1}},
        {"a": 1},
        {"a": entry(0, 12), "__metadata__": {"x": 1}},
        {"a": entry(0, 12), "__metadata__": None},
    ],
    ids=lambda v: str(v)[:60],
)
def test_a_header_that_does_not_account_for_every_byte_is_refused(entries: dict[str, Any]) -> None:
    assert reason(parse_header, header(**entries), 12) == "header"


@pytest.mark.parametrize(
    ("prefix", "size"),
    [
        (b"", 0),
        (b"\1\0\0", 3),
        (struct.pack("<Q", 101), 1000),
        (struct.pack("<Q", 50), 57),
        (b"\xff" * 8, 1 << 40),
    ],
)
def test_a_length_that_cannot_be_is_refused(prefix: bytes, size: int) -> None:
    assert reason(header_length, prefix, size, 100) == "header"


def test_a_length_up_to_the_bound_passes() -> None:
    assert header_length(struct.pack("<Q", 100), 108, 100) == 100


@given(
    st.binary(max_size=60) | st.dictionaries(st.text(max_size=3), HEADER_ENTRY).map(as_json),
    st.integers(0, 20),
)
def test_a_header_that_passes_covers_the_values_exactly(raw: bytes, data_bytes: int) -> None:
    try:
        found = parse_header(raw, data_bytes)
    except InvalidAdapter:
        return
    assert sum(t.end - t.begin for t in found) == data_bytes
    assert all(a.end == b.begin for a, b in itertools.pairwise(found))


# ---- tensors -------------------------------------------------------------------------------------


def test_a_whole_adapter_yields_its_pairs() -> None:
    pairs = check_tensors(tensors(WHOLE), check_config(config_of(), 16, BASE), BASE)
    assert [(p.module, p.a.shape, p.b.shape, p.scaling) for p in pairs] == [
        (Q0, (8, 64), (64, 8), 2.0),
        (Q1, (8, 64), (64, 8), 2.0),
    ]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({f"{Q0}.lora_A": (8, 63)}, "shape"),
        ({f"{Q0}.lora_A": (7, 64)}, "shape"),
        ({f"{Q0}.lora_B": (65, 8)}, "shape"),
        ({f"{Q0}.lora_B": (64, 9)}, "shape"),
        ({f"{Q0}.lora_A": (8, 64, 1)}, "shape"),
        ({f"{Q0}.lora_A": ()}, "shape"),
        ({f"{Q0}.lora_A": None}, "pair"),
        ({f"{Q0}.lora_B": None}, "pair"),
        ({f"{Q0}.lora_A": None, f"{Q0}.lora_B": None}, "incomplete"),
        (
            {
                "model.layers.2.self_attn.q_proj.lora_A": (8, 64),
                "model.layers.2.self_attn.q_proj.lora_B": (64, 8),
            },
            "module",
        ),
        (
            {
                "model.layers.0.self_attn.k_proj.lora_A": (8, 64),
                "model.layers.0.self_attn.k_proj.lora_B": (32, 8),
            },
            "module",
        ),
        ({"lm_head.lora_A": (8, 64), "lm_head.lora_B": (64, 8)}, "module"),
        ({f"{Q0}.lora_C": (8, 64)}, "tensor"),
        ({f"{Q0}.lora_A.default": (8, 64)}, "tensor"),
        ({"model.layers.0.q-proj.lora_A": (8, 64)}, "tensor"),
    ],
    ids=lambda v: str(v)[:70],
)
def test_tensors_that_do_not_fit_are_refused_with_their_reason(
    changes: dict[str, Any], why: str
) -> None:
    merged = {k: v for k, v in (WHOLE | changes).items() if v is not None}
    assert reason(check_tensors, tensors(merged), check_config(config_of(), 16, BASE), BASE) == why


@pytest.mark.parametrize("dtype", ["F64", "I8", "U8", "F8_E4M3", "BOOL"])
def test_other_types_than_the_three_floats_are_refused(dtype: str) -> None:
    assert (
        reason(check_tensors, tensors(WHOLE, dtype), check_config(config_of(), 16, BASE), BASE)
        == "dtype"
    )


def test_some_layers_suffice_where_the_config_says_which() -> None:
    some = {k: v for k, v in WHOLE.items() if Q0 in k}
    config = check_config(config_of(layers_to_transform=[0]), 16, BASE)
    assert [p.module for p in check_tensors(tensors(some), config, BASE)] == [Q0]


def test_without_shapes_pairs_and_ranks_are_still_checked() -> None:
    config = check_config(config_of(), 16, None)
    assert (
        len(check_tensors(tensors({f"{Q0}.lora_A": (8, 5), f"{Q0}.lora_B": (6, 8)}), config, None))
        == 1
    )
    assert (
        reason(
            check_tensors, tensors({f"{Q0}.lora_A": (4, 5), f"{Q0}.lora_B": (6, 4)}), config, None
        )
        == "shape"
    )


def test_names_that_moved_are_still_understood() -> None:
    now = "model.language_model.layers.0.self_attn.q_proj"
    base = BaseShapes(
        {now: (64, 64)}, renamed=(("language_model.model.", "model.language_model."),)
    )
    for prefix in ("model.language_model.", "language_model.model."):
        name = f"{prefix}layers.0.self_attn.q_proj"
        for target in ("q_proj", name):
            config = check_config(config_of(target_modules=[target]), 16, base)
            assert (
                len(
                    check_tensors(
                        tensors({f"{name}.lora_A": (8, 64), f"{name}.lora_B": (64, 8)}),
                        config,
                        base,
                    )
                )
                == 1
            )


# ---- values --------------------------------------------------------------------------------------

A, B = tensors({f"{Q0}.lora_A": (8, 64), f"{Q0}.lora_B": (64, 8)})


@pytest.mark.parametrize(
    ("norm", "finite", "why"),
    [
        (math.nan, False, "nonfinite"),
        (math.inf, False, "nonfinite"),
        (math.inf, True, "magnitude"),
        (7e4, True, "magnitude"),
    ],
)
def test_values_that_are_no_weights_are_refused(norm: float, finite: bool, why: str) -> None:
    assert reason(check_norm, A, norm, finite) == why


@pytest.mark.parametrize(
    ("scaling", "a", "b"),
    [(2.0, 1e3, 1e3), (1e30, 1.0, 1.0), (1e6, 1e-3, 1.0), (2.0, math.nan, 1.0)],
)
def test_a_change_that_would_overflow_is_refused(scaling: float, a: float, b: float) -> None:
    assert reason(check_change, Pair(Q0, A, B, scaling), a, b, AdapterLimits()) == "magnitude"


def test_a_change_of_a_trained_size_passes() -> None:
    check_norm(A, 12.0, True)
    check_change(Pair(Q0, A, B, 4.0), 12.0, 30.0, AdapterLimits())


# ---- files ---------------------------------------------------------------------------------------

GOOD = {"adapter_config.json": 500, "adapter_model.safetensors": 1000, "README.md": 10}


def files(
    more: dict[str, int] | None = None, kind: FileKind = FileKind.PLAIN, without: str = ""
) -> list[FolderFile]:
    plain = [FolderFile(n, s, FileKind.PLAIN) for n, s in GOOD.items() if n != without]
    return [*plain, *(FolderFile(n, s, kind) for n, s in (more or {}).items())]


def test_an_adapter_with_its_usual_company_passes() -> None:
    assert (
        check_files(
            files({"tokenizer.json": 90, "sub/notes.txt": 1})
            + files({"link": 5}, FileKind.LINK_INSIDE)[3:],
            AdapterLimits(),
        )
        == 1606
    )


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (files(without="adapter_config.json"), "missing_file"),
        (
            files({"sub/adapter_model.safetensors": 1}, without="adapter_model.safetensors"),
            "missing_file",
        ),
        (files({"adapter_model.BIN": 1}), "pickle"),
        (files({"deep/er/rng_state.pth": 1}), "pickle"),
        (files({"training_args.bin": 1}), "pickle"),
        (files({"x": 1}, FileKind.LINK_OUTSIDE), "link"),
        (files({"x": 1}, FileKind.SPECIAL), "link"),
        (files({"x": 10_000}), "too_large"),
        (files({str(i): 0 for i in range(8)}), "too_large"),
        (files({"adapter_config.json": 2000}, without="adapter_config.json"), "too_large"),
    ],
    ids=lambda v: str(v)[-60:],
)
def test_a_folder_that_may_not_be_read_is_refused_with_its_reason(
    found: list[FolderFile], why: str
) -> None:
    assert (
        reason(
            check_files, found, AdapterLimits(max_files=10, max_bytes=9000, max_config_bytes=1000)
        )
        == why
    )


# ---- base shapes ---------------------------------------------------------------------------------


def test_the_shapes_of_a_known_architecture() -> None:
    assert BASE is not None and len(BASE.modules) == 14
    assert BASE.modules[Q1] == (64, 64) and BASE.modules["model.layers.0.self_attn.v_proj"] == (
        32,
        64,
    )
    assert BASE.modules["model.layers.0.mlp.down_proj"] == (64, 96) and BASE.families == {"llama"}


def test_fused_layers_have_the_sum_of_their_parts() -> None:
    base = shapes_from_config(LLAMA | {"architectures": ["Phi3ForCausalLM"]}, "x")
    assert base is not None and base.modules["model.layers.0.self_attn.qkv_proj"] == (128, 64)
    assert base.modules["model.layers.0.mlp.gate_up_proj"] == (192, 64)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["SomethingNew"]},
        {"architectures": None},
        {"architectures": ["LlamaForCausalLM", "Other"]},
        {"hidden_size": None},
        {"hidden_size": "64"},
        {"num_attention_heads": 0},
        # its head size is a constant of the class where the config has none
        {"architectures": ["Qwen3ForCausalLM"]},
        {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": None},
    ],
    ids=str,
)
def test_what_the_config_does_not_say_is_not_guessed(changes: dict[str, Any]) -> None:
    assert shapes_from_config(LLAMA | changes, "x") is None


@pytest.mark.parametrize(
    ("name", "families"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", {"llama"}),
        ("Qwen/Qwen2.5-0.5B", {"qwen"}),
        ("/mnt/qwen/shared/models/base", set()),
        ("C:\\models\\Mistral-7B", {"mistral"}),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B/", {"qwen"}),
        ("unsloth/phi-4", set()),
        ("", set()),
    ],
)
def test_a_name_tells_its_family_only_by_its_end(name: str, families: set[str]) -> None:
    assert families_in(name) == families
