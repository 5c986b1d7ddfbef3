"""LLMConfig as Python code makes it: Ray's forms, Ray's defaults, and what is refused before
anything starts.
"""

# ruff: noqa: C408 (Ray writes its examples with dict() calls)

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from shared.config.llm import (
    LORA_RANKS,
    UNLIMITED_REQUESTS,
    AutoscalingConfig,
    DeploymentConfig,
    LLMConfig,
    LoraConfig,
    ModelLoadingConfig,
    Settings,
    SimTiming,
    StoreConfig,
    engine_kwargs_problems,
)
from shared.config.vllm_engine_arguments import Argument
from shared.errors import ConfigError


def made(**fields: Any) -> LLMConfig:
    return LLMConfig(**{"model_loading_config": {"model_id": "m"}, **fields})


def refusal(**fields: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        made(**fields)
    return caught.value.message


def test_rays_own_multi_lora_example_is_accepted_as_it_stands() -> None:
    config = LLMConfig(
        model_loading_config=dict(model_id="qwen-0.5b", model_source="Qwen/Qwen2.5-0.5B-Instruct"),
        lora_config=dict(
            dynamic_lora_loading_path="s3://my_dynamic_lora_path", max_num_adapters_per_replica=16
        ),
        engine_kwargs=dict(enable_lora=True, max_loras=16),
        deployment_config=dict(autoscaling_config=dict(min_replicas=1, max_replicas=2)),
        accelerator_type="A10G",
    )
    assert (config.model_id, config.model_source) == ("qwen-0.5b", "Qwen/Qwen2.5-0.5B-Instruct")
    assert (config.max_loras, config.workers, config.gpus_per_worker, config.uses_lora) == (
        16,
        1,
        1,
        True,
    )
    assert config.adapters_path == "s3://my_dynamic_lora_path"


def test_sections_may_be_objects_or_dicts_with_the_same_result() -> None:
    lora = {"dynamic_lora_loading_path": "/adapters", "store": {"region": "eu-west-1"}}
    scaling = {"min_replicas": 2, "max_replicas": 3}
    from_dicts = made(
        lora_config=lora,
        engine_kwargs={"enable_lora": True},
        deployment_config={"autoscaling_config": scaling},
    )
    from_objects = LLMConfig(
        model_loading_config=ModelLoadingConfig(model_id="m"),
        lora_config=LoraConfig(
            dynamic_lora_loading_path="/adapters", store=StoreConfig(region="eu-west-1")
        ),
        engine_kwargs={"enable_lora": True},
        deployment_config=DeploymentConfig(
            autoscaling_config=AutoscalingConfig(min_replicas=2, max_replicas=3)
        ),
    )
    assert from_dicts == from_objects


def test_a_config_does_not_change_with_the_dict_it_was_made_from() -> None:
    kwargs = {"max_loras": 4}
    config = made(engine_kwargs=kwargs)
    kwargs["max_loras"] = 9
    assert config.max_loras == 4


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        made().llm_engine = "sim"  # type: ignore[misc]


def test_defaults_are_those_of_ray_llm_deployments() -> None:
    deployment, scaling, lora = made().deployment_config, AutoscalingConfig(), LoraConfig()
    assert (deployment.max_ongoing_requests, deployment.max_queued_requests) == (
        UNLIMITED_REQUESTS,
        -1,
    )
    assert deployment.backpressure_config.status_code == 503
    assert (
        scaling.min_replicas,
        scaling.max_replicas,
        scaling.upscale_delay_s,
        scaling.downscale_delay_s,
    ) == (1, 1, 30.0, 600.0)
    assert (
        scaling.metrics_interval_s,
        scaling.look_back_period_s,
        scaling.aggregation_function,
    ) == (10.0, 30.0, "mean")
    assert (lora.download_timeout_s, lora.max_download_tries) == (30.0, 3)


def test_model_id_is_the_source_where_none_is_given() -> None:
    assert made().model_source == made().tokenizer_source == "m"


@pytest.mark.parametrize(
    ("spelling", "engine"), [("vllm", "vLLM"), ("VLLM", "vLLM"), ("vLLM", "vLLM"), ("Sim", "sim")]
)
def test_the_engine_is_spelt_in_any_case(spelling: str, engine: str) -> None:
    assert made(llm_engine=spelling).llm_engine == engine


@pytest.mark.parametrize(
    ("deployment", "workers"),
    [
        ({}, 1),
        ({"num_replicas": 3}, 3),
        ({"autoscaling_config": {}}, 1),
        ({"autoscaling_config": {"min_replicas": 2, "max_replicas": 9}}, 2),
        ({"autoscaling_config": {"min_replicas": 0, "max_replicas": 9}}, 0),
        ({"autoscaling_config": {"min_replicas": 0, "initial_replicas": 4, "max_replicas": 9}}, 4),
        ({"num_replicas": "auto"}, 1),
        ({"num_replicas": "auto", "autoscaling_config": {"min_replicas": 2}}, 2),
    ],
)
def test_workers_to_start_with_follow_rays_order_of_precedence(
    deployment: dict[str, Any], workers: int
) -> None:
    assert made(deployment_config=deployment).workers == workers


def test_auto_replicas_bring_rays_bounds_under_the_given_ones() -> None:
    scaling = made(
        deployment_config={"num_replicas": "auto", "autoscaling_config": {"max_replicas": 5}}
    ).deployment_config.autoscaling_config
    assert scaling is not None and (scaling.max_replicas, scaling.target_ongoing_requests) == (
        5,
        2.0,
    )
    scaling = made(deployment_config={"num_replicas": "auto"}).deployment_config.autoscaling_config
    assert scaling is not None and scaling.max_replicas == 100


def test_gain_takes_the_new_name_before_the_deprecated_ones() -> None:
    scaling = AutoscalingConfig(
        smoothing_factor=2.0, upscale_smoothing_factor=3.0, upscaling_factor=4.0
    )
    assert (scaling.get_upscaling_factor(), scaling.get_downscaling_factor()) == (4.0, 2.0)


@pytest.mark.parametrize(
    ("fields", "gpus"),
    [
        ({}, 1),
        ({"engine_kwargs": {"tensor_parallel_size": 4, "pipeline_parallel_size": 2}}, 8),
        ({"accelerator_config": {"kind": "cpu"}}, 0),
        ({"llm_engine": "sim"}, 0),
    ],
)
def test_a_worker_takes_the_gpus_of_its_parallel_sizes(fields: dict[str, Any], gpus: int) -> None:
    assert made(**fields).gpus_per_worker == gpus


@pytest.mark.parametrize(
    ("lora", "kwargs", "slots"),
    [
        (None, {}, 16),
        ({}, {}, 16),
        ({}, {"max_loras": 4}, 4),
        ({"max_num_adapters_per_replica": 5}, {}, 5),
        ({"max_num_adapters_per_replica": 6}, {"max_loras": 6}, 6),
    ],
)
def test_slots_come_from_whichever_key_is_given(
    lora: dict[str, Any] | None, kwargs: dict[str, Any], slots: int
) -> None:
    assert made(lora_config=lora, engine_kwargs=kwargs).max_loras == slots


def test_slots_that_disagree_are_refused_with_both_keys() -> None:
    message = refusal(
        lora_config={"max_num_adapters_per_replica": 8}, engine_kwargs={"max_loras": 16}
    )
    assert (
        "engine_kwargs.max_loras: 16" in message
        and "lora_config.max_num_adapters_per_replica (8)" in message
    )


def test_one_slot_must_stay_for_what_is_not_pinned() -> None:
    lora = {"dynamic_lora_loading_path": "/a", "max_num_adapters_per_replica": 3}
    assert made(llm_engine="sim", lora_config={**lora, "pin": ["a", "b"]}).lora_config.pin == (
        "a",
        "b",
    )  # type: ignore[union-attr]
    message = refusal(llm_engine="sim", lora_config={**lora, "pin": ["a", "b", "c"]})
    assert "lora_config.pin: 3 adapters for 3 slots" in message and "pin at most 2" in message
    assert "for 16 slots" in refusal(
        llm_engine="sim",
        lora_config={"dynamic_lora_loading_path": "/a", "pin": [f"a{i}" for i in range(16)]},
    )


@pytest.mark.parametrize(
    ("lora", "part"),
    [
        ({"pin": ["a@1"]}, "lora_config.pin[0]: the text 'a@1' is no adapter's name"),
        ({"preload": ["../a"]}, "lora_config.preload[0]: "),
        ({"preload": ["a", "b", "a"]}, "lora_config.preload[2]: the text 'a' stands here twice"),
        ({"pin": "a"}, "lora_config.pin: expected a list"),
        ({"pin": ["a"], "dynamic_lora_loading_path": None}, "does not say where they are"),
    ],
)
def test_names_that_cannot_be_pinned_or_preloaded_are_refused(
    lora: dict[str, Any], part: str
) -> None:
    assert part in refusal(
        llm_engine="sim", lora_config={"dynamic_lora_loading_path": "/a", **lora}
    )


@pytest.mark.parametrize("kwargs", [{}, {"enable_lora": False}, {"enable_lora": None}])
def test_adapters_without_enable_lora_are_refused(kwargs: dict[str, Any]) -> None:
    message = refusal(lora_config={"dynamic_lora_loading_path": "/a"}, engine_kwargs=kwargs)
    assert (
        "lora_config.dynamic_lora_loading_path" in message
        and "engine_kwargs.enable_lora" in message
    )


def test_enable_lora_without_adapters_is_fine() -> None:
    assert made(engine_kwargs={"enable_lora": True}).adapters_path is None


def test_the_simulated_engine_has_slots_unless_told_otherwise() -> None:
    assert made(llm_engine="sim", lora_config={"dynamic_lora_loading_path": "/a"}).uses_lora
    assert not made().uses_lora
    assert "enable_lora" in refusal(
        llm_engine="sim",
        lora_config={"dynamic_lora_loading_path": "/a"},
        engine_kwargs={"enable_lora": False},
    )


@pytest.mark.parametrize("rank", LORA_RANKS)
def test_every_rank_that_vllm_reserves_is_accepted(rank: int) -> None:
    assert made(engine_kwargs={"max_lora_rank": rank}).engine_kwargs["max_lora_rank"] == rank


@pytest.mark.parametrize("rank", [0, -8, 12, 1024])
def test_other_ranks_are_refused_with_the_list(rank: int) -> None:
    assert "1, 8, 16, 32, 64, 128, 256, 320, 512" in refusal(engine_kwargs={"max_lora_rank": rank})


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        (
            {"engine_kwargs": {"model": "x"}},
            "engine_kwargs.model: is set from model_loading_config.model_source",
        ),
        ({"engine_kwargs": {"served_model_name": "x"}}, "model_loading_config.model_id"),
        ({"engine_kwargs": {"data_parallel_size": 2}}, "num_replicas"),
        ({"engine_kwargs": {"nnodes": 2}}, "runs on one machine"),
        ({"engine_kwargs": {"max_loras": 0}}, "expected a whole number (at least 1), got 0"),
        ({"engine_kwargs": {"max_loras": 4, "max_cpu_loras": 2}}, "less than max_loras (4)"),
        ({"engine_kwargs": {"enable_lora": "yes"}}, "expected true or false, got the text 'yes'"),
        (
            {"engine_kwargs": {"tensor_parallel_size": "2"}},
            "write it without quotes or exponent: 2",
        ),
        ({"engine_kwargs": {"dtype": object}}, "engine_kwargs.dtype: expected text, numbers"),
        (
            {"engine_kwargs": {"disable_log_stats": True}, "log_engine_metrics": False},
            "statistics that routing needs",
        ),
        ({"engine_kwargs": []}, "expected a mapping of keys, got a list"),
        ({"llm_engine": "SGLang"}, "'sim' or 'vLLM'"),
        ({"deployment_config": {"num_replicas": 0}}, "(at least 1, at most 1000)"),
        ({"deployment_config": {"num_replicas": 10**12}}, "(at least 1, at most 1000)"),
        ({"deployment_config": {"num_replicas": True}}, "got true"),
        (
            {"deployment_config": {"num_replicas": 2, "autoscaling_config": {}}},
            "exclude each other",
        ),
        (
            {"deployment_config": {"autoscaling_config": {"min_replicas": 3, "max_replicas": 2}}},
            "3 is more than max_replicas (2)",
        ),
        (
            {"deployment_config": {"autoscaling_config": {"initial_replicas": 3}}},
            "3 is more than max_replicas (1)",
        ),
        (
            {"deployment_config": {"autoscaling_config": {"initial_replicas": 0}}},
            "0 is less than min_replicas (1)",
        ),
        (
            {"deployment_config": {"autoscaling_config": {"upscale_delay_s": float("nan")}}},
            "got nan",
        ),
        ({"lora_config": {"download_timeout_s": float("inf")}}, "expected a number, got inf"),
        ({"deployment_config": {"backpressure_config": {"status_code": 500}}}, "429 or 503"),
        (
            {"deployment_config": {"max_replicas": 3}},
            "belongs in deployment_config.autoscaling_config",
        ),
        ({"deployment_config": {"max_ongoing_request": 3}}, "did you mean 'max_ongoing_requests'"),
        ({"lora_config": {"max_loras": 3}}, "belongs in engine_kwargs"),
        ({"lora_config": {"dynamic_lora_path": "/a"}}, "did you mean 'dynamic_lora_loading_path'"),
        (
            {"lora_config": {"dynamic_lora_loading_path": "abfss://x"}},
            "expected abfss://container@account",
        ),
        (
            {"lora_config": {"dynamic_lora_loading_path": "azure://x"}},
            "expected abfss://container@account",
        ),
        (
            {"lora_config": {"dynamic_lora_loading_path": "http://x/y"}},
            "expected s3://bucket/folder",
        ),
        ({"lora_config": {"dynamic_lora_loading_path": "s3://"}}, "names no bucket"),
        ({"lora_config": {"max_num_adapters_per_replica": 0}}, "(at least 1)"),
        ({"lora_config": {"store": {"endpoint_url": "localhost:9000"}}}, "http://host:port"),
        (
            {"lora_config": {"store": {"secret_access_key": "hunter2"}}},
            "credentials do not belong in this file",
        ),
        ({"accelerator_config": {"kind": "tpu"}}, "TPUs are not supported"),
        ({"accelerator_config": {}}, "accelerator_config.kind: is missing"),
        (
            {"model_loading_config": {"model_source": "x"}},
            "model_loading_config.model_id: is missing",
        ),
        ({"model_loading_config": None}, "model_loading_config: is missing"),
        (
            {"model_loading_config": {"model_id": "m", "model_source": {"uri": "s3://b/m"}}},
            "bucket_uri",
        ),
        (
            {"model_loading_config": {"model_id": "m", "model_source": "abfss://b/m"}},
            "download it first",
        ),
        *(
            ({"model_loading_config": {"model_id": "m", "model_source": source}}, said)
            for source, said in (
                ("hf://org/m", "expected one of a Hugging Face id, a local folder, s3://"),
                ("https://host/m", "expected one of a Hugging Face id"),
                ("S3://b/m", "expected one of a Hugging Face id"),
                ({"bucket_uri": "ftp://b/m"}, "expected one of a Hugging Face id"),
                ("s3://", "names no bucket"),
                ("gs:///m", "names no bucket"),
                ("", "is empty"),
            )
        ),
        (
            {"model_loading_config": {"model_id": "m", "tokenizer_source": "s3://b/t"}},
            "tokenizer_source: expected one of a Hugging Face id, a local folder, got",
        ),
        ({"model_loading_config": {"model_id": ""}}, "expected some text"),
        ({"model_loading_config": {"model_id": "a:b"}}, "separates a base model from its adapter"),
        ({"model_loading_config": {"model_id": "a\nb"}}, "'a\\nb' contains control characters"),
        ({"model_loading_config": {"model_id": "a\u202eb"}}, "contains control characters"),
        ({"model_loading_config": {"model_id": " a"}}, "begins or ends with a blank"),
        ({"model_loading_config": {"model_id": "a" * 201}}, "longer than 200"),
    ],
)
def test_what_cannot_work_is_refused_with_the_key_and_the_way_out(
    fields: dict[str, Any], part: str
) -> None:
    assert part in refusal(**fields)


def test_secrets_under_a_wrong_key_are_not_repeated() -> None:
    assert "hunter2" not in refusal(lora_config={"store": {"secret_access_key": "hunter2"}})


def test_all_problems_are_told_at_once() -> None:
    lines = refusal(
        engine_kwargs={"max_lora_rank": 0, "model": "x"},
        lora_config={"typo": 1, "download_timeout_s": "x"},
    ).splitlines()
    assert len(lines) == 4 and all(line.startswith("LLMConfig: ") for line in lines)


def test_a_stray_key_does_not_hide_the_rules_on_its_section() -> None:
    lora = {"max_num_adapters_per_replica": 8, "typo": 1}
    message = refusal(lora_config=lora, engine_kwargs={"max_loras": 4})
    assert "typo" in message and "4 differs from" in message


def test_a_wrong_value_causes_no_second_message_about_the_default_in_its_place() -> None:
    message = refusal(
        lora_config={"max_num_adapters_per_replica": "eight"}, engine_kwargs={"max_loras": 4}
    )
    assert "differs" not in message


def test_the_path_of_adapters_is_normalised() -> None:
    assert (
        LoraConfig(dynamic_lora_loading_path="s3://b/x//").dynamic_lora_loading_path == "s3://b/x"
    )
    assert (
        LoraConfig(dynamic_lora_loading_path="file:///srv/a").dynamic_lora_loading_path == "/srv/a"
    )
    assert LoraConfig(dynamic_lora_loading_path="/").dynamic_lora_loading_path == "/"


def test_rays_anonymous_bucket_means_unsigned_requests() -> None:
    lora = LoraConfig(dynamic_lora_loading_path="s3://anonymous@b/x", store=StoreConfig(region="r"))
    assert (lora.dynamic_lora_loading_path, lora.store) == (
        "s3://b/x",
        StoreConfig(region="r", anonymous=True),
    )


def test_a_download_timeout_of_zero_means_none() -> None:
    assert (
        LoraConfig(download_timeout_s=0).download_timeout_s
        is LoraConfig(download_timeout_s=None).download_timeout_s
        is None
    )


def test_simulated_timing_has_the_documented_defaults() -> None:
    assert made(llm_engine="sim").sim == SimTiming(
        ttft_ms=5,
        itl_ms=20,
        prefill_tokens_per_s=8000,
        load_ms=60,
        load_ms_per_mb=1.2,
        max_num_seqs=256,
    )


def test_simulated_batch_size_may_stand_in_either_place() -> None:
    assert made(llm_engine="sim", engine_kwargs={"max_num_seqs": 7}).sim.max_num_seqs == 7
    assert made(llm_engine="sim", engine_kwargs={"sim": {"max_num_seqs": 8}}).sim.max_num_seqs == 8
    assert "7 here, 8 in sim" in refusal(
        llm_engine="sim", engine_kwargs={"max_num_seqs": 7, "sim": {"max_num_seqs": 8}}
    )


@pytest.mark.parametrize(
    "kwargs",
    [
        {"dtype": "auto"},
        {"sim": {"tpot_ms": 1}},
        {"sim": {"itl_ms": -1}},
        {"sim": {"prefill_tokens_per_s": 0}},
    ],
)
def test_the_simulated_engine_refuses_what_it_does_not_simulate(kwargs: dict[str, Any]) -> None:
    assert "engine_kwargs." in refusal(llm_engine="sim", engine_kwargs=kwargs)


def test_engine_kwargs_are_checked_against_vllms_own_names() -> None:
    model = made(engine_kwargs={"max_model_length": 9, "dtype": "auto", "zzz": 1})
    simulated = made(llm_engine="sim", engine_kwargs={"sim": {}})
    settings = Settings(models=(model, simulated), model_paths=("llm_configs[0]", "llm_configs[1]"))
    known = dict.fromkeys(("max_model_len", "dtype", "seed"), Argument())
    near, far = engine_kwargs_problems(settings, known)
    assert "engine_kwargs.max_model_length" in near and "did you mean 'max_model_len'?" in near
    assert "engine_kwargs.zzz" in far and "did you mean" not in far


def test_settings_survive_the_way_to_a_worker_process() -> None:
    model = made(
        server_cls=object,
        engine_kwargs={"enable_lora": True, "x": (1, {"y": None})},
        lora_config={"dynamic_lora_loading_path": "/a", "download_timeout_s": None},
        deployment_config={"num_replicas": "auto", "health_check_period_s": 1},
    )
    settings = Settings(models=(model, made(llm_engine="sim")), source="s")
    sent = msgspec.json.encode(settings)
    again = msgspec.json.decode(sent, type=Settings)
    assert msgspec.json.encode(again) == sent and again.models[0].workers == 1
    assert again.model("m") is not None and again.model("n") is None


@pytest.mark.parametrize(
    ("given", "read"), [("s3a://b/m", "s3://b/m"), ("file:///srv/m/", "/srv/m"), ("a/b", "a/b")]
)
def test_a_model_source_may_be_written_as_an_adapter_path_may(given: str, read: str) -> None:
    assert made(model_loading_config={"model_id": "m", "model_source": given}).model_source == read
