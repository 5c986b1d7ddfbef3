"""What an adapter must be: config, header, tensors and values. All of it is checked from values,
without a file.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
import threading
import time
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.adapters import strict_json
from shared.adapters.base_layers import BaseShapes, shapes_from_config
from shared.adapters.checks import (
    AdapterLimits,
    FileKind,
    FolderFile,
    LoraPair,
    check_change,
    check_files,
    check_index,
    check_norm,
    check_tensors,
)
from shared.adapters.identity import choose_weights, has_all_weights
from shared.adapters.peft_config import check_config
from shared.adapters.safetensors import Tensor, header_length, parse_header
from shared.adapters.strict_json import parse_object, shown
from shared.errors import InvalidAdapter

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BASE = shapes_from_config(LLAMA)
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
        ({"target_modules": []}, "target"),
        ({"target_parameters": "experts.down_proj"}, "target"),
        ({"r": 8.5}, "rank"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_config_that_cannot_be_served_is_refused_with_its_reason(
    changes: dict[str, Any], why: str
) -> None:
    assert reason(check_config, config_of(**changes), 16) == why


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
        {"base_model_name_or_path": "/home/mistral/LLaMA-Factory/qwen"},
        {"target_modules": ["q_proj", "a_module_that_the_base_lacks"]},
        {"target_modules": None, "target_parameters": ["mlp.experts.down_proj"]},
        {"r": 8.0, "rank_pattern": {"q_proj": 4.0}},
        {
            "rank_pattern": {r".*layers\.[01]\.self_attn\..*": 4},
            "alpha_pattern": {"(q|k)_proj": 32},
        },
        {"rank_pattern": {r"^model.layers.\d+.self_attn.q_proj": 4}},
        {"some_future_key": {"x": 1}},
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_config_as_peft_writes_it_passes(changes: dict[str, Any]) -> None:
    check_config(config_of(**changes), 16)


@pytest.mark.parametrize("name", ["all-linear", "All-Linear", "ALL-LINEAR"])
def test_all_linear_covers_layers_in_any_case_of_letters(name: str) -> None:
    assert check_config(config_of(target_modules=name), 16).covers(Q0)


def test_ranks_and_scalings_follow_the_patterns_as_peft_reads_them() -> None:
    patterns = {
        "rank_pattern": {"0.self_attn.q_proj": 2, "q_proj": 4, "roj": 16},
        "alpha_pattern": {"^model.layers.1.self_attn.q_proj": 40},
    }
    config = check_config(config_of(**patterns), 16)
    assert (
        config.rank_of(Q0),
        config.rank_of(Q1),
        config.rank_of("model.layers.0.mlp.up_proj"),
    ) == (2, 4, 8)
    assert (config.scaling_of(Q0), config.scaling_of(Q1)) == (16 / 2, 40 / 4)
    assert check_config(config_of(use_rslora=True), 16).scaling_of(Q0) == 16 / math.sqrt(8)


@pytest.mark.parametrize(
    "pattern",
    [
        r"\d+" * 5 + "x",
        "(x+x+)+y",
        ".*.*.*x",
        "(?:ab|abc)*x",
        "(x?)(y?)(z?)z?a?",
        "(.|[^~]|[^!])" * 20 + "!",
        "(?:.|[^~])" * 6 + "!",
        "(?:a|aa)" * 6 + "!",
        "(?:a|(?:b|.)|.)" * 4,
        "(a||aa)(b||bb)(c||cc)(d||dd)",
        ".{0,3}.{0,3}.{0,3}.*.*!",
        "[[a]_proj",
        "[^[a]_proj",
        "[a--b]_proj",
        "[a-z&&b]_proj",
        r"(x)\1",
        "(?=x)x",
        "(?i)x",
        "[",
        "",
        "x" * 301,
    ],
)
def test_a_pattern_whose_time_could_explode_is_refused(pattern: str) -> None:
    assert reason(check_config, config_of(rank_pattern={pattern: 8}), 16) == "pattern"


@pytest.mark.parametrize(
    "pattern",
    [
        "(self_attn|mlp).(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
        r"model\.layers\.(" + "|".join(map(str, range(80))) + r")\.(self_attn|mlp)\.(q|k|up)_proj",
        r"(layers\.(0|1)\.self_attn\.(q|k)_proj|layers\.2\.mlp\.(up|down)_proj)",
        ".*(language_model|text_model).*(q_proj|v_proj)",
    ],
)
def test_alternatives_of_names_are_quick_and_pass(pattern: str) -> None:
    check_config(config_of(rank_pattern={pattern: 8}), 16)
    assert check_config(config_of(target_modules=pattern), 16).covered.targets is not None


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
def test_an_expression_whose_time_could_explode_is_not_evaluated(key: str) -> None:
    config = check_config(config_of(**{key: "(.|[^~]|[^!])" * 20 + "!"}), 16)
    began = time.thread_time()
    config.covers(Q0)
    assert time.thread_time() - began < 0.1


def test_checks_in_threads_change_nothing_for_the_warnings_of_others() -> None:
    raw = config_of(
        target_modules=r".*\.(q|v)_proj", rank_pattern={f"{n}.q_proj": 8 for n in range(300)}
    )
    before = [*warnings.filters]
    threads = [threading.Thread(target=check_config, args=(raw, 16)) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert warnings.filters == before
        time.sleep(0.001)
    assert warnings.filters == before


def test_many_patterns_that_search_are_refused() -> None:
    patterns = {f".*{i}.*x": 8 for i in range(9)}
    assert reason(check_config, config_of(rank_pattern=patterns), 16) == "pattern"


def test_many_patterns_with_many_ways_are_refused() -> None:
    for count, refused in ((125, False), (126, True)):
        patterns = {"(.|[^~])" * 5 + f"{i}!": 8 for i in range(count)}
        if refused:
            assert reason(check_config, config_of(rank_pattern=patterns), 16) == "pattern"
        else:
            check_config(config_of(rank_pattern=patterns), 16)
    names = {rf"layers\.\d+\.self_attn\.q_proj{i}": 8 for i in range(1000)}
    check_config(config_of(rank_pattern=names), 16)


def test_many_patterns_of_layers_are_refused() -> None:
    """200,000 of them fit into a config, and each is compiled and tried with each layer's name."""
    patterns = {"layers_to_transform": [0], "layers_pattern": [f".*{i}" for i in range(17)]}
    assert reason(check_config, config_of(**patterns), 16) == "pattern"


@pytest.mark.parametrize("pattern", ["(layers)", "lay(e)rs", "(?P<n>layers)"])
def test_a_pattern_of_layers_with_a_group_is_refused(pattern: str) -> None:
    config = config_of(layers_to_transform=[0], layers_pattern=pattern)
    assert reason(check_config, config, 16) == "pattern"


@pytest.mark.parametrize("pattern", [r"\d+\d+\d?" + "." * 150 + "x", ".*.*.?x", "[a-z.]+.*x"])
def test_the_worst_pattern_that_passes_is_quick(pattern: str) -> None:
    config = check_config(config_of(rank_pattern={pattern: 8}), 16)
    begin = time.process_time()
    config.rank_of("model.layers.100.mlp.experts.100.gate_proj." + "1" * 20)
    assert time.process_time() - begin < 0.5


def test_a_byte_order_mark_before_the_config_says_nothing() -> None:
    assert check_config(b"\xef\xbb\xbf" + config_of(), 16).rank == 8


@given(st.binary(max_size=200) | JSON.map(as_json))
def test_any_bytes_are_a_config_or_refused(raw: bytes) -> None:
    try:
        check_config(raw, 16)
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
        config = check_config(config_of(**{key: value}), 16)
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
        b"\xff{}",
        b'{"a":' * 5000,
        b'{"a": ' + b"1" * 5000 + b"}",
    ],
)
def test_what_is_not_one_object_is_refused(raw: bytes) -> None:
    assert reason(parse_object, raw, "it", "config") == "config"


def long_text(**members: Any) -> str:
    """Longer than what is parsed in one call."""
    plain = {f"p{n}": {"dtype": "F32", "shape": [n, 1]} for n in range(3000)}
    return json.dumps({**plain, **members}, indent=1)


@given(st.dictionaries(st.text(max_size=9), JSON, max_size=4), st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_a_long_text_is_read_as_a_short_one(members: dict[str, Any], indent: int) -> None:
    large = {f"{n:0300}": "file" for n in range(2000)}
    text = long_text(weight_map=large, **members)
    assert parse_object(text.encode(), "it", "config") == json.loads(text)
    names = [f"model.layers.{n}.self_attn.q_proj" for n in range(5000)]
    lists = {"a": large, "target_modules": names, "b": 1}
    text = json.dumps(lists, ensure_ascii=False, indent=indent or None)
    assert parse_object(text.encode(), "it", "config") == json.loads(text)


@pytest.mark.parametrize("at", [10, 70_000, 100_000, -2, -1])
@pytest.mark.parametrize("wrong", ["", "x", '"', "{", "}", "]", ",", ":", "\\", '"p1":1,'])
def test_a_long_text_with_a_fault_is_judged_as_a_short_one(
    at: int, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = long_text(a={f"{n:0300}": 1 for n in range(300)})
    raw = (text[:at] + wrong + text[at + 1 :]).encode()

    def verdict() -> object:
        try:
            return parse_object(raw, "it", "config")
        except InvalidAdapter as refused:
            return refused.code

    in_pieces = verdict()
    monkeypatch.setattr(strict_json, "PIECE_CHARACTERS", len(raw))
    assert in_pieces == verdict()


@pytest.mark.parametrize("where", ["top", "below"])
def test_a_key_that_is_twice_in_a_long_text_is_refused(where: str) -> None:
    twice = {"top": '"p7": 1, ', "below": f'"w": {{"x": 1, "y": "{"." * 70_000}", "x": 1}}, '}
    text = "{" + twice[where] + long_text()[1:]
    assert reason(parse_object, text.encode(), "it", "config") in ("duplicate_key", "config")
    text = text.replace("." * 70_000, "." * 50_000)
    assert reason(parse_object, text.encode(), "it", "config") == "duplicate_key"


@pytest.mark.parametrize(
    "member",
    [
        '"a":[' + "[]," * 5_000_000 + "[]]",
        '"a":[' + "[]," * 200_000 + "[]]",
        '"a":[' + "1e9," * 200_000 + "1]",
        '"a":' + " " * 3_000_000 + "1",
        '"a":{"b":{' + ",".join(f'"{n}":1' for n in range(100_000)) + "}}",
        ",".join(f'"{n}":""' for n in range(1_300_000)),
    ],
    ids=["lists", "fewer lists", "numbers", "spaces", "deep", "members"],
)
def test_a_text_that_would_hold_the_interpreter_is_refused_at_once(member: str) -> None:
    """A worker that gives its event loop no turn for 0.9 s is lost to its gateways."""
    raw = ("{" + member + "}").encode()
    began = time.thread_time()
    assert reason(parse_object, raw, "it", "header") == "header"
    assert time.thread_time() - began < 0.5


def test_a_config_that_is_cut_anywhere_is_an_unfinished_upload() -> None:
    whole = config_of(base_model_name_or_path="ü\\", rank_pattern={"a.b": 8}, use_rslora=None)
    for size in range(len(whole)):
        assert reason(check_config, whole[:size], 16) == "incomplete", whole[:size]
    for broken in (whole[:40] + whole[42:], whole + b"x", b"[]", whole.replace(b":", b"", 1)):
        assert reason(check_config, broken, 16) != "incomplete", broken


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


def test_a_header_with_much_metadata_is_refused() -> None:
    for count, refused in ((10_000, False), (10_001, True)):
        raw = header(a=entry(0, 12), __metadata__={f"{n}": "" for n in range(count)})
        if refused:
            assert reason(parse_header, raw, 12) == "header"
        else:
            parse_header(raw, 12)


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
    pairs = check_tensors(tensors(WHOLE), check_config(config_of(), 16), BASE)
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
        ({f"{Q0}.lora_embedding_A": (8, 64), f"{Q0}.lora_A": None}, "tensor"),
        ({"model.embed_tokens.lora_A": (8, 100), "model.embed_tokens.lora_B": (64, 8)}, "pair"),
        ({"model.embed_tokens.base_layer": (101, 64)}, "shape"),
        ({f"{Q0}.base_layer": (64, 64)}, "tensor"),
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
    assert reason(check_tensors, tensors(merged), check_config(config_of(), 16), BASE) == why


@pytest.mark.parametrize("dtype", ["I8", "U8", "F8_E4M3", "BOOL"])
def test_other_types_than_floats_are_refused(dtype: str) -> None:
    config = check_config(config_of(), 16)
    assert reason(check_tensors, tensors(WHOLE, dtype), config, BASE) == "dtype"


def test_layers_that_were_not_trained_may_be_left_out() -> None:
    some = {k: v for k, v in WHOLE.items() if Q0 in k}
    config = check_config(config_of(), 16)
    assert [p.module for p in check_tensors(tensors(some), config, BASE)] == [Q0]


def test_without_shapes_pairs_and_ranks_are_still_checked() -> None:
    config = check_config(config_of(), 16)
    some = tensors({f"{Q0}.lora_A": (8, 5), f"{Q0}.lora_B": (6, 8)})
    assert len(check_tensors(some, config, None)) == 1
    other = tensors({f"{Q0}.lora_A": (4, 5), f"{Q0}.lora_B": (6, 4)})
    assert reason(check_tensors, other, config, None) == "shape"


def test_names_are_compared_as_the_engine_renames_them() -> None:
    base = BaseShapes({Q0: (64, 64)}, rename=lambda name: name.replace("old.", "model."))
    config = check_config(config_of(), 16)
    old = Q0.replace("model.", "old.")
    (pair,) = check_tensors(
        tensors({f"{old}.lora_A": (8, 64), f"{old}.lora_B": (64, 8)}), config, base
    )
    assert (pair.module, pair.layer) == (old, Q0)
    both = {f"{q}.lora_{h}": ((8, 64) if h == "A" else (64, 8)) for q in (old, Q0) for h in "AB"}
    assert reason(check_tensors, tensors(both), config, base) == "module"


def test_of_layers_that_the_engine_would_leave_out_some_are_named() -> None:
    base = BaseShapes({"other": (1, 1)})
    with pytest.raises(InvalidAdapter, match=rf"{Q0}.*{Q1}.*2 of its 2 layers"):
        check_tensors(tensors(WHOLE), check_config(config_of(), 16), base)


def test_a_layer_that_is_not_served_right_is_refused_with_the_engine_s_reason() -> None:
    base = BaseShapes({Q0: (64, 64), Q1: (64, 64)}, refused={Q1: "It has a copy."})
    with pytest.raises(InvalidAdapter, match="It has a copy"):
        check_tensors(tensors(WHOLE), check_config(config_of(), 16), base)


def test_what_the_model_ignores_is_no_part_of_the_adapter() -> None:
    base = BaseShapes({Q0: (64, 64), Q1: (64, 64)}, ignored=("mtp.",))
    more = WHOLE | {"mtp.layers.0.q_proj.lora_A": (8, 64)}
    assert len(check_tensors(tensors(more), check_config(config_of(), 16), base)) == 2


def test_embeddings_and_heads_are_checked_where_the_engine_has_layers_for_them() -> None:
    config = check_config(config_of(target_modules=["lm_head", "embed_tokens"]), 16)
    found = [
        *tensors({"lm_head.lora_A": (8, 64), "lm_head.lora_B": (100, 8)}),
        *tensors({"model.embed_tokens.base_layer": (100, 64)}),
        Tensor("base_model.model.model.embed_tokens.lora_embedding_A", "F32", (8, 100), 0, 0),
        Tensor("base_model.model.model.embed_tokens.lora_embedding_B", "F32", (64, 8), 0, 0),
    ]
    assert [p.layer for p in check_tensors(found, config, BASE)] == [
        "lm_head",
        "model.embed_tokens",
    ]


EXPERTS = "model.layers.0.mlp.experts"


def test_experts_in_one_tensor_have_the_ranks_of_all() -> None:
    base = BaseShapes(
        {EXPERTS: (64, 32), f"{EXPERTS}.base_layer": (64, 64)},
        experts={EXPERTS: 4, f"{EXPERTS}.base_layer": 4},
    )
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    patterns = {"rank_pattern": {"experts.down_proj": 4}}
    config = check_config(
        config_of(target_modules=None, target_parameters=parameters, **patterns), 16
    )
    outer = {f"{EXPERTS}.lora_A": (16, 32), f"{EXPERTS}.lora_B": (64, 16)}
    inner = {f"{EXPERTS}.base_layer.lora_A": (32, 64), f"{EXPERTS}.base_layer.lora_B": (64, 32)}
    assert len(check_tensors(tensors(outer | inner), config, base)) == 2
    assert reason(check_tensors, tensors(outer), config, base) == "experts"
    wrong = outer | inner | {f"{EXPERTS}.lora_A": (20, 32)}
    assert reason(check_tensors, tensors(wrong), config, base) == "shape"


def test_parameters_that_are_named_by_their_last_part_are_of_experts_alone() -> None:
    # what PEFT writes with transformers 5 where the layers of experts are `target_modules`
    made = {
        "target_parameters": ["gate_up_proj", "down_proj", "gate.weight"],
        "rank_pattern": {r".*\.gate_up_proj": 16},
        "alpha_pattern": {r".*\.gate_up_proj": 32},
    }
    config = check_config(config_of(**made), 16)
    inner, gate = f"{EXPERTS}.base_layer", "model.layers.0.mlp.gate"
    assert (config.rank_of(inner), config.rank_of(EXPERTS)) == (16, 8)
    assert all(map(config.covers, (inner, EXPERTS, gate, Q0)))
    assert not config.covers("model.layers.0.mlp.down_proj")
    assert not config.covers("model.layers.0.self_attn.k_proj")


@pytest.mark.parametrize("name", ["mlp.gate", r"gate\.weight"])
@pytest.mark.parametrize("kind", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_peft_and_the_engine_read_in_two_ways_is_refused(
    kind: str, name: str
) -> None:
    gate = "model.layers.0.mlp.gate"
    base = BaseShapes({gate: (4, 64)})
    found = tensors({f"{gate}.lora_A": (8, 64), f"{gate}.lora_B": (4, 8)})
    parameters = {"target_modules": None, "target_parameters": ["mlp.gate.weight"]}
    split = check_config(config_of(**parameters, **{kind: {name: 4}}), 16)
    assert reason(check_tensors, found, split, base) == "pattern"
    for alike in ({kind: {"mlp.gate.*": 8}}, {kind: {"q_proj": 4}}):
        check_tensors(found, check_config(config_of(**parameters, **alike), 16), base)
    module = check_config(config_of(target_modules=["gate"], alpha_pattern={"mlp.gate": 4}), 16)
    check_tensors(found, module, base)


def test_a_head_that_is_tied_to_the_embedding_has_its_adapter_and_not_without_it() -> None:
    tied = {"target_modules": ["q_proj", "model.embed_tokens"], "ensure_weight_tying": True}
    head = tensors({"lm_head.lora_A": (8, 64), "lm_head.lora_B": (100, 8)})
    embedding = [
        Tensor("base_model.model.model.embed_tokens.lora_embedding_A", "F32", (8, 100), 0, 0),
        Tensor("base_model.model.model.embed_tokens.lora_embedding_B", "F32", (64, 8), 0, 0),
    ]
    config = check_config(config_of(**tied), 16)
    assert len(check_tensors([*head, *embedding], config, BASE)) == 2
    for half in (head, embedding):
        assert reason(check_tensors, half, config, BASE) == "pair"
    untied = check_config(config_of(**tied | {"ensure_weight_tying": False}), 16)
    assert reason(check_tensors, [*head, *embedding], untied, BASE) == "module"


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
    assert (
        reason(check_change, LoraPair(Q0, Q0, A, B, scaling), a, b, AdapterLimits()) == "magnitude"
    )


def test_a_change_of_a_trained_size_passes() -> None:
    check_norm(A, 12.0, True)
    check_change(LoraPair(Q0, Q0, A, B, 4.0), 12.0, 30.0, AdapterLimits())


# ---- files ---------------------------------------------------------------------------------------

GOOD = {"adapter_config.json": 500, "adapter_model.safetensors": 1000}
SHARDS = {
    "adapter_model.safetensors.index.json": 100,
    "adapter_model-00001-of-00002.safetensors": 600,
    "adapter_model-00002-of-00002.safetensors": 400,
}


def files(
    more: dict[str, int] | None = None, kind: FileKind = FileKind.PLAIN, without: str = ""
) -> list[FolderFile]:
    plain = [FolderFile(n, s, FileKind.PLAIN) for n, s in GOOD.items() if n != without]
    return [*plain, *(FolderFile(n, s, kind) for n, s in (more or {}).items())]


def test_only_the_config_and_the_weights_count_whatever_lies_beside_them() -> None:
    beside = {"training_args.bin": 10**12, "adapter_model.bin": 7, "x/y.pt": 1}
    assert check_files(files(beside, FileKind.SPECIAL), AdapterLimits()) == 1500
    alone = files(SHARDS, without="adapter_model.safetensors")
    assert check_files(alone, AdapterLimits()) == 1600


def test_the_weights_are_one_file_or_an_index_and_its_shards() -> None:
    assert choose_weights([*GOOD, *SHARDS]) == ("adapter_model.safetensors",)
    assert choose_weights(list(SHARDS)) == tuple(SHARDS)
    assert choose_weights([n for n in SHARDS if "index" not in n]) == ()


def test_shards_of_another_number_do_not_make_an_upload_incomplete() -> None:
    stale = "adapter_model-00001-of-00003.safetensors"
    assert has_all_weights([*SHARDS, stale])
    assert not has_all_weights([*list(SHARDS)[:2], stale])


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ({"a": "1", "b": "2"}, ""),
        ({"a": "1"}, "incomplete"),
        ({"a": "1", "b": "2", "c": "2"}, "incomplete"),
        ({"a": "1", "b": "1"}, "incomplete"),
        ({"a": "1", "b": ["2"]}, "incomplete"),
        ([], "config"),
    ],
    ids=str,
)
def test_an_index_must_name_what_its_files_hold(where: Any, why: str) -> None:
    found = {"1": ["a"], "2": ["b"]}
    index = as_json({"weight_map": where})
    if why:
        assert reason(check_index, index, found) == why
    else:
        check_index(index, found)


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (files(without="adapter_config.json"), "missing_file"),
        (
            files({"sub/adapter_model.safetensors": 1}, without="adapter_model.safetensors"),
            "missing_file",
        ),
        (files({"adapter_model.bin": 1}, without="adapter_model.safetensors"), "pickle"),
        (files(dict([*SHARDS.items()][:1]), without="adapter_model.safetensors"), "incomplete"),
        (files(dict([*SHARDS.items()][:2]), without="adapter_model.safetensors"), "incomplete"),
        (
            files(
                {"adapter_model.safetensors": 1},
                FileKind.LINK_OUTSIDE,
                without="adapter_model.safetensors",
            ),
            "link",
        ),
        (
            files({"adapter_config.json": 1}, FileKind.SPECIAL, without="adapter_config.json"),
            "link",
        ),
        (
            files({"adapter_model.safetensors": 10_000}, without="adapter_model.safetensors"),
            "too_large",
        ),
        (files({"adapter_config.json": 2000}, without="adapter_config.json"), "too_large"),
    ],
    ids=lambda v: str(v)[-60:],
)
def test_a_folder_that_may_not_be_read_is_refused_with_its_reason(
    found: list[FolderFile], why: str
) -> None:
    assert reason(check_files, found, AdapterLimits(max_bytes=9000, max_config_bytes=1000)) == why


# ---- base shapes ---------------------------------------------------------------------------------


def test_the_shapes_of_a_known_architecture() -> None:
    assert BASE is not None and len(BASE.modules) == 16
    assert BASE.modules[Q1] == (64, 64) and BASE.modules["model.layers.0.self_attn.v_proj"] == (
        32,
        64,
    )
    assert BASE.modules["model.layers.0.mlp.down_proj"] == (64, 96)
    assert BASE.modules["lm_head"] == (100, 64) and BASE.embeddings == {"model.embed_tokens"}


def test_fused_layers_have_the_sum_of_their_parts() -> None:
    base = shapes_from_config(LLAMA | {"architectures": ["Phi3ForCausalLM"]})
    assert base is not None and base.modules["model.layers.0.self_attn.qkv_proj"] == (128, 64)
    assert base.modules["model.layers.0.mlp.gate_up_proj"] == (192, 64)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["SomethingNew"]},
        {"architectures": None},
        {"architectures": ["LlamaForCausalLM", "Other"]},
        {"hidden_size": None},
        {"vocab_size": None},
        {"hidden_size": "64"},
        {"num_attention_heads": 0},
        # its head size is a constant of the class where the config has none
        {"architectures": ["Qwen3ForCausalLM"]},
        {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": None},
    ],
    ids=str,
)
def test_what_the_config_does_not_say_is_not_guessed(changes: dict[str, Any]) -> None:
    assert shapes_from_config(LLAMA | changes) is None


@pytest.mark.parametrize(("copies", "why"), [(4, None), (5, "embedding")])
def test_an_adapter_brings_few_copies_of_the_bases_embedding(copies: int, why: str | None) -> None:
    """Under a name of its own each would pass, and be compared with the base's, for seconds."""
    named = {f"m{n}.embed_tokens": (100, 64) for n in range(copies)}
    found, config = tensors({**WHOLE, **named}), check_config(config_of(), 16)
    if why is None:
        assert len(check_tensors(found, config, None)) == 2
    else:
        assert reason(check_tensors, found, config, None) == why
