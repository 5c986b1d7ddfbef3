"""What vLLM refuses of engine_kwargs, before anything is started, and what `loraplex check` makes
of it.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from loraplex.start import command
from shared.config.llm import LLMConfig
from shared.config.vllm.refusals import Devices, RefusalScope, VllmVerdict
from tests.harness import DEMO, demo_config
from tests.processes import family_of, still_alive

pytestmark = pytest.mark.usefixtures("offline")
MODEL = str(DEMO / "model")
CPU = {"kind": "cpu"}
BAD_TEMPLATE = "{% for m in messages %}{{ m.content }"


@pytest.fixture(scope="module")
def offline(vllm_environment: None) -> None:
    """As in the process of its own, in which nothing is downloaded."""
    import huggingface_hub.constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield


def verdict(kwargs: dict[str, Any], source: str = MODEL, **more: Any) -> VllmVerdict:
    from worker.engine.vllm.boot import refusals

    return refusals.verdict(
        LLMConfig(
            model_loading_config={"model_id": "demo", "model_source": source},
            engine_kwargs={"dtype": "float32", "kv_cache_memory_bytes": 64 << 20, **kwargs},
            **{"accelerator_config": CPU, **more},
        )
    )


def refused(found: VllmVerdict) -> list[tuple[str, ...]]:
    return [one.keys for one in found.refusals if one.scope is RefusalScope.EVERYWHERE]


REFUSED: list[dict[str, Any]] = [
    {"block_size": 7},
    {"max_model_len": 0},
    {"max_model_len": -5},
    {"max_model_len": 1 << 30},
    {"chat_template": BAD_TEMPLATE},
    {"chat_template": "{{ messages | no_such_filter }}"},
    {"max_num_batched_tokens": 100, "enable_chunked_prefill": False},
    {"max_num_batched_tokens": 8, "max_num_seqs": 16},
    {"attention_backend": "no_such"},
    {"attention_config": {"flash_attn_version": 9}},
    {"structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": "x"}},
    {"speculative_config": {"method": "ngram"}},
    {"hf_overrides": {"num_attention_heads": "x"}},
    {"kv_transfer_config": {"kv_connector": "X"}},
    {"optimization_level": "x"},
    {"numa_bind_nodes": []},
    {"quantization": "awq"},
    {"logits_processors": [1]},
    {"config_format": "no_such"},
    {"enable_log_outputs": True},
]


@pytest.mark.parametrize("kwargs", REFUSED, ids=str)
def test_what_vllm_refuses_at_the_start_is_found_before_and_at_its_keys(
    kwargs: dict[str, Any],
) -> None:
    found = verdict(kwargs)
    assert refused(found) and {*refused(found)[0]} & kwargs.keys(), found
    assert all(one.words for one in found.refusals)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"max_model_len": 1024, "max_num_seqs": 8},
        {"max_model_len": -1},
        {"max_num_batched_tokens": 100, "enable_chunked_prefill": True},
        {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"},
        {"chat_template": "{% generation %}{{ x }}{% endgeneration %}"},
        {"hf_overrides": {"max_position_embeddings": 2048}},
        {"enable_lora": True, "max_loras": 2, "max_lora_rank": 16},
        {
            "speculative_config": {
                "method": "ngram",
                "num_speculative_tokens": 2,
                "prompt_lookup_max": 2,
            }
        },
        {"compilation_config": {"cudagraph_capture_sizes": [1, 2]}},
        {"pipeline_parallel_size": 2},
        {"block_size": 128},
    ],
    ids=str,
)
def test_what_vllm_takes_is_not_refused(kwargs: dict[str, Any]) -> None:
    assert verdict(kwargs) == VllmVerdict()


def test_a_model_without_a_cache_takes_blocks_of_any_size(tmp_path: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((DEMO / "model" / file).read_bytes())
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 128, "vocab_size": 4096, "max_position_embeddings": 512}
    bert = {"architectures": ["BertModel"], "model_type": "bert", "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(bert | sizes))
    assert verdict({"block_size": 20}, str(tmp_path)) == VllmVerdict()


@pytest.mark.parametrize("for_its_size", [True, False])
def test_blocks_are_refused_only_if_the_kernels_are_refused_for_their_size(
    monkeypatch: pytest.MonkeyPatch, for_its_size: bool
) -> None:
    """On GPUs vLLM says so while it chooses a kernel, and has many other reasons to."""
    from vllm.platforms import current_platform
    from vllm.v1.attention import selector

    choose = type(current_platform).get_attn_backend_cls

    def choose_or_refuse(cls: Any, *asked: Any, attn_selector_config: Any, **more: Any) -> Any:
        if attn_selector_config.block_size is not None or not for_its_size:
            raise ValueError("No valid attention backend found")
        return choose(*asked, attn_selector_config=attn_selector_config, **more)

    monkeypatch.setattr(
        type(current_platform), "get_attn_backend_cls", classmethod(choose_or_refuse)
    )
    selector._cached_get_attn_backend.cache_clear()
    try:
        found = verdict({"block_size": 128})
    finally:
        selector._cached_get_attn_backend.cache_clear()
    assert refused(found) == ([("block_size",)] if for_its_size else []), found


def test_all_that_vllm_refuses_is_told_at_once() -> None:
    found = verdict({"max_model_len": 0, "chat_template": BAD_TEMPLATE, "optimization_level": "x"})
    assert {*refused(found)} == {("max_model_len",), ("chat_template",), ("optimization_level",)}


@pytest.mark.parametrize("source", ["org/none", "s3://bucket/none", "/nonexistent/none"])
def test_without_the_model_only_what_holds_for_any_is_refused(source: str) -> None:
    good = {"max_model_len": 1 << 20, "quantization": "awq", "use_replayssm": True}
    assert verdict(good, source) == VllmVerdict((), model_is_here=False)
    found = verdict({**good, "optimization_level": "x", "numa_bind_nodes": []}, source)
    assert {*refused(found)} == {("optimization_level",), ("numa_bind_nodes",)}


HERE, ALL = RefusalScope.HOST, RefusalScope.EVERYWHERE


@pytest.mark.parametrize(
    ("kwargs", "scope"),
    [
        ({"enable_eplb": True}, HERE),
        ({"kda_prefill_backend": "flashkda"}, HERE),
        ({"max_model_len": 1 << 30}, HERE),
        ({"max_num_seqs": 1_000_000}, HERE),  # a GPU has another default of batched tokens
        ({"max_num_seqs": 1000, "max_num_batched_tokens": 100}, ALL),
        ({"max_model_len": 0}, ALL),
        ({"kv_transfer_config": {"kv_connector": "Nope"}}, ALL),
        ({"chat_template": BAD_TEMPLATE}, ALL),
        ({"optimization_level": "x"}, ALL),
    ],
    ids=str,
)
def test_on_a_host_without_the_gpus_of_a_worker_only_what_holds_with_them_is_refused(
    kwargs: dict[str, Any], scope: RefusalScope
) -> None:
    found = verdict(kwargs, accelerator_config=None)
    assert found.devices is Devices.CPU
    assert [({*one.keys}, one.scope) for one in found.refusals] == [({*kwargs}, scope)]


def test_a_vllm_for_gpus_answers_on_a_host_without_any(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.platforms
    from vllm.platforms.interface import UnspecifiedPlatform

    from worker.engine.vllm.boot import refusals

    monkeypatch.setattr(vllm.platforms, "current_platform", UnspecifiedPlatform())
    refusals._choose_platform()
    assert vllm.platforms.current_platform.device_type == "cpu"
    monkeypatch.setattr(vllm.platforms, "cpu_platform_plugin", lambda: None)
    assert verdict({}, accelerator_config=None).devices is Devices.OTHER


def test_a_model_whose_config_is_broken_is_refused_everywhere_and_one_unknown_here(
    tmp_path: Path,
) -> None:
    for text, scope in (('{"architectures": [', ALL), ('{"model_type": "none"}', HERE)):
        (tmp_path / "config.json").write_text(text)
        found = verdict({"max_num_seqs": 8}, str(tmp_path), accelerator_config=None)
        assert found.model_is_here
        assert [(one.keys, one.scope) for one in found.refusals] == [((), scope)]


def test_a_key_is_no_cause_because_other_sections_need_it() -> None:
    found = verdict(
        {"max_model_len": 0, "enable_lora": True, "max_loras": 20},
        lora_config={
            "dynamic_lora_loading_path": "/adapters",
            "pin": [f"a{n}" for n in range(18)],
        },
    )
    assert refused(found) == [("max_model_len",)] and len(found.refusals) == 1


def test_a_file_that_would_have_to_be_downloaded_is_no_mistake() -> None:
    (one,) = verdict({"tokenizer": "org/none"}).refusals
    assert one.keys == ("tokenizer",) and one.scope is RefusalScope.ABSENT


def check(tmp_path: Path, kwargs: dict[str, Any]) -> tuple[int, str]:
    config = demo_config(engine=kwargs)
    config["llm_configs"][0]["accelerator_config"] = CPU
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    found = subprocess.run(
        [sys.executable, "-m", "loraplex", "check", str(tmp_path / "c.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )
    return found.returncode, found.stdout + found.stderr


def test_check_names_the_line_of_what_vllm_refuses(tmp_path: Path) -> None:
    (tmp_path / "bad.jinja").write_text("\n" + BAD_TEMPLATE)
    status, said = check(tmp_path, {"max_model_len": 0, "chat_template": "bad.jinja"})
    lines = (tmp_path / "c.yaml").read_text().splitlines()
    assert status == 2 and "Traceback" not in said
    for key, words in (("max_model_len", "vLLM refuses 0"), ("chat_template", "(line 2 of the")):
        line = next(n for n, text in enumerate(lines, 1) if text.strip().startswith(f"{key}:"))
        assert f"c.yaml:{line}: llm_configs[0].engine_kwargs.{key}: " in said, said
        assert words in said, said


def test_check_is_content_with_the_demo_and_says_nothing_of_vllms_own(tmp_path: Path) -> None:
    status, said = check(tmp_path, {})
    assert status == 0 and "\nok\n" in said and "warning" not in said.lower(), said


def test_the_process_that_asks_vllm_reaches_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        port = server.getsockname()[1]
        code = (
            "import sys, socket; from worker.engine.vllm.boot import refusals\n"
            "sys.addaudithook(refusals._refuse_connections)\n"
            f"socket.create_connection(('127.0.0.1', {port}))"
        )
        found = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(Path(command("x")[2]).parents[1])},
        )
        with pytest.raises(BlockingIOError):
            server.accept()
    assert "without a network" in found.stderr


def test_a_wrong_variable_of_vllm_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "much")
    status, said = check(tmp_path, {})
    assert status == 0 and "could not be asked" in said
    assert "the environment's VLLM_CPU_KVCACHE_SPACE: " in said and "'much'" in said


async def test_the_process_that_asks_vllm_ends_with_check(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(demo_config()))
    checking = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "loraplex", "check", str(tmp_path / "c.yaml")),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    async with asyncio.timeout(30):
        while not (family := family_of(checking.pid)):
            await asyncio.sleep(0.05)
    checking.kill()
    await checking.wait()
    assert not await still_alive(family, within_s=3)  # an answer takes it longer
