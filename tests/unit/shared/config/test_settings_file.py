"""Whole files: Ray's forms, real line numbers, all problems at once, warnings for what only Ray
understands.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.cli.check import KEPT
from shared.config.llm import LLMConfig, Settings, engine_kwargs_problems
from shared.config.settings_file import (
    SERVE_SETTINGS,
    app_from_args,
    load_settings,
    parse_settings,
    read_settings,
)
from shared.config.vllm_engine_arguments import Argument, read_known_arguments, wrong_arguments
from shared.errors import ConfigError
from tests.harness import ROOT

EXAMPLES = ROOT / "examples"
SMALL = "llm_configs:\n- model_loading_config: {model_id: m}\n"


def nothing(path: str) -> str:
    raise FileNotFoundError(2, os.strerror(2), path)


def parse(text: str, read_file: Callable[[str], str] = nothing) -> Settings:
    return parse_settings(text, "conf/c.yaml", read_file)


def refusal(text: str, read_file: Callable[[str], str] = nothing) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text, read_file)
    return caught.value.message.splitlines()


def test_the_shortest_file_is_one_model() -> None:
    loaded = parse(SMALL)
    assert [model.model_id for model in loaded.models] == ["m"]
    assert (loaded.source, loaded.warnings, loaded.gateway.port) == ("conf/c.yaml", (), 8000)


@pytest.mark.parametrize(("name", "workers"), [("qwen.yaml", 1), ("ray.yaml", 1), ("sim.yaml", 2)])
def test_the_examples_are_valid(name: str, workers: int) -> None:
    loaded = load_settings(EXAMPLES / name)
    assert [model.workers for model in loaded.models] == [workers]


def test_rays_own_file_needs_no_change_and_names_what_has_no_effect() -> None:
    loaded = load_settings(EXAMPLES / "ray.yaml")
    placement, scaling = loaded.warnings
    assert ": proxy_location: has no effect here: " in placement
    assert "target_ongoing_requests: is not given, and Ray LLM's default (1e9)" in scaling
    assert loaded.models[0].adapters_path == "s3://my_dynamic_lora_path"


def test_too_many_pins_are_refused_at_their_line_and_too_many_preloads_are_a_warning() -> None:
    text = (
        SMALL + "  llm_engine: sim\n  lora_config:\n    dynamic_lora_loading_path: /a\n    "
        "max_num_adapters_per_replica: 2\n"
    )
    (line,) = refusal(text + "    pin: [a, b]\n")
    assert (
        line.startswith("conf/c.yaml:7: llm_configs[0].lora_config.pin: 2 adapters for 2 slots")
        and "conf/c.yaml:6" in line
    )
    (warning,) = parse(text + "    pin: [a]\n    preload: [a, b, c]\n").warnings
    assert warning.startswith(
        "conf/c.yaml:8: llm_configs[0].lora_config.preload: with the pinned ones 3 "
        "adapters for 2 slots"
    )


def test_all_problems_of_a_file_come_at_once_in_order_with_their_lines() -> None:
    lines = refusal(
        "gateway:\n"  # 1
        "  prot: 80\n"
        "llm_configs:\n"
        "- model_loading_config: {model_id: 'a:b'}\n"  # 4
        "  engine_kwargs:\n"
        "    max_loras: 4\n"  # 6
        "    max_lora_rank: 0\n"
        "  lora_config:\n"
        "    max_num_adapters_per_replica: 8\n"  # 9
        "- model_loading_config: {model_id: m}\n"
        "- model_loading_config: {model_id: m}\n"  # 11
    )
    assert [line.split(": ")[0] for line in lines] == [f"conf/c.yaml:{n}" for n in (2, 4, 6, 7, 11)]
    assert lines[0] == "conf/c.yaml:2: gateway.prot: unknown key; did you mean 'port'?"
    assert "max_num_adapters_per_replica" in lines[2] and "conf/c.yaml:9)" in lines[2]
    assert lines[4].endswith("(see llm_configs[1].model_loading_config.model_id, conf/c.yaml:10)")


def test_a_missing_key_is_placed_at_its_section() -> None:
    assert refusal("llm_configs:\n- accelerator_type: L4\n") == [
        "conf/c.yaml:2: llm_configs[0].model_loading_config: is missing; it is required"
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing",
        "llm_configs:",
        "llm_configs: []",
        "gateway: {}",
        "- a",
        "text",
        "llm_configs: {a: 1}",
    ],
)
def test_a_file_without_a_model_is_refused(text: str) -> None:
    (line,) = refusal(text)
    assert line.startswith("conf/c.yaml")


def test_a_model_at_the_top_level_is_told_where_it_belongs() -> None:
    assert any(
        "list the model under llm_configs" in line
        for line in refusal("model_loading_config: {model_id: m}")
    )


def test_models_may_stand_in_files_of_their_own() -> None:
    files = {"conf/models/a.yaml": "model_loading_config: {model_id: a, model_source: ./weights}"}
    loaded = parse(
        "llm_configs: [models/a.yaml, {model_loading_config: {model_id: b}}]", files.__getitem__
    )
    assert [model.model_id for model in loaded.models] == ["a", "b"]
    assert loaded.models[0].model_source == "conf/models/weights"


def test_a_problem_in_a_file_of_its_own_is_placed_there() -> None:
    (line,) = refusal(
        "llm_configs:\n- m.yaml\n",
        lambda _: "\nmodel_loading_config: {model_id: a}\nengine_kwarg: {}\n",
    )
    assert (
        line
        == "conf/m.yaml:3: llm_configs[0].engine_kwarg: unknown key; did you mean 'engine_kwargs'?"
    )


@pytest.mark.parametrize("content", ["[", "", "- a", "a: 1\na: 2"])
def test_a_broken_model_file_is_refused(content: str) -> None:
    assert refusal("llm_configs:\n- m.yaml\n", lambda _: content)


def test_a_model_file_that_cannot_be_read_is_named() -> None:
    (line,) = refusal("llm_configs:\n- gone.yaml\n")
    assert line.startswith(
        "conf/c.yaml:2: llm_configs[0]: cannot read the text 'gone.yaml': No such file"
    )


APP = "applications:\n- args:\n    llm_configs:\n    - model_loading_config: {model_id: m}\n"


def test_a_prefix_cache_for_each_account_is_warned_about_where_all_are_one() -> None:
    for keys, warnings in (("", 1), (", api_keys_env: KEYS", 0), (", keys_file: keys.yaml", 0)):
        gateway = f"gateway: {{private_prefix_cache: true{keys}}}\n"
        assert len(parse(APP + gateway).warnings) == warnings, keys


def test_the_applications_form_takes_the_gateway_section_from_the_top_level() -> None:
    loaded = parse(APP + "gateway: {port: 9000}\n")
    assert (loaded.models[0].model_id, loaded.gateway.port) == ("m", 9000)


@pytest.mark.parametrize(
    ("extra", "warnings"),
    [
        ("  name: llms\n  route_prefix: /\n", 0),
        ("  route_prefix: /llm\n", 1),
        ("  runtime_env: {env_vars: {A: b}}\n", 1),
        ("  deployments: [{name: x}]\n", 1),
        ("  import_path: ray.serve.llm:build_openai_app\n", 0),
        ("  import_path: gateway:build_openai_app\n", 0),
        ("  import_path: ray.serve.llm.builders:build_openai_app\n", 0),
    ],
)
def test_an_applications_own_keys_are_accepted_and_warned_about_where_they_do_nothing(
    extra: str, warnings: int
) -> None:
    assert len(parse(APP + extra).warnings) == warnings


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (
            APP + "  import_path: ray.serve.llm:build_pd_openai_app\n",
            "conf/c.yaml:5: applications[0].import_path: ",
        ),
        (APP + "- args: {}\n", "merge their llm_configs"),
        (APP + "llm_configs: []\n", "stands both here and at the top level"),
        ("applications: []", "an empty one"),
        ("applications: [{name: a}]", "applications[0].args: is missing"),
        ("applications: [a]", "applications[0]: expected a mapping"),
        ("applications: 3", "expected a list with one application, got 3"),
        ("applications: [{args: {llm_configs: 3}}]", "expected a list of models, got 3"),
        (SMALL + "http_options: {ssl_keyfile: k}\n", "in gateway.tls"),
        (SMALL + "http_options: {port: 99999}\n", "conf/c.yaml:3: http_options.port: expected"),
        (SMALL + "proxy_loc: x\n", "did you mean 'proxy_location'?"),
        (
            "applications: [{args: {prefill_config: {}}}]",
            "prefill_config: prefill and decoding are not split",
        ),
        (SMALL + "  deployment_config: {max_concurrent_queries: 9}\n", "max_ongoing_requests"),
        (
            SMALL.replace("m}", "m, model_source: {bucket_uri: 's3://b', extra_files: [1]}}"),
            "model_source.extra_files: is not supported",
        ),
        ("- model_loading_config: {model_id: m}\n", "expected keys such as llm_configs:"),
        ("apiVersion: v1\nkind: RayService\nspec: {}\n", "spec.serveConfigV2 is missing"),
    ],
)
def test_what_a_file_cannot_mean_here_is_refused(text: str, part: str) -> None:
    assert any(part in line for line in refusal(text))


def test_keys_of_anyscales_services_are_told_as_such() -> None:
    keys = "name: s\ncompute_config: c\nworking_dir: .\nquery_auth_token_enabled: false\n"
    for line in refusal(SMALL + keys):
        assert "is a key of Anyscale's services" in line and "did you mean" not in line


def test_http_options_say_where_to_listen_unless_the_gateway_section_does() -> None:
    loaded = parse(SMALL + "http_options: {host: 127.0.0.2, port: 8123}\n")
    assert (loaded.gateway.host, loaded.gateway.port, loaded.warnings) == ("127.0.0.2", 8123, ())
    assert parse(SMALL + "http_options: {port: 8123}\ngateway: {port: null}\n").gateway.port == 8123
    loaded = parse(SMALL + "http_options: {port: 8123}\ngateway: {port: 9000}\n")
    assert loaded.gateway.port == 9000
    assert loaded.warnings == (
        "conf/c.yaml:3: http_options.port: has no effect here: gateway.port is set "
        "(see gateway.port, conf/c.yaml:4)",
    )


@pytest.mark.parametrize(
    "key",
    ["proxy_location", "grpc_options", "logging_config", "controller_options", "target_capacity"],
)
def test_rays_cluster_options_are_accepted_with_a_warning(key: str) -> None:
    (warning,) = parse(SMALL + f"{key}: {{x: 1}}\n").warnings
    assert warning.startswith(f"conf/c.yaml:3: {key}: has no effect here: ")


@pytest.mark.parametrize(
    "key",
    [
        "runtime_env: {a: 1}",
        "placement_group_config: {bundles: []}",
        "resources_per_bundle: {GPU: 1}",
        "log_engine_metrics: false",
        "server_cls: 'a:B'",
        "callback_config: {callback_class: a}",
    ],
)
def test_rays_model_options_are_accepted_with_a_warning(key: str) -> None:
    (warning,) = parse(SMALL + f"  {key}\n").warnings
    assert (
        warning.startswith("conf/c.yaml:3: llm_configs[0].") and "has no effect here: " in warning
    )


@pytest.mark.parametrize(
    "key",
    [
        "graceful_shutdown_timeout_s: 60",
        "health_check_period_s: 10",
        "request_router_config: {x: 1}",
        "ray_actor_options: {num_cpus: 1}",
        "name: x",
    ],
)
def test_rays_deployment_options_are_accepted_with_a_warning(key: str) -> None:
    (warning,) = parse(SMALL + f"  deployment_config: {{{key}}}\n").warnings
    assert "llm_configs[0].deployment_config." in warning


@pytest.mark.parametrize("key", ["ingress_cls_config", "ingress_deployment_config"])
def test_rays_ingress_options_are_accepted_with_a_warning(key: str) -> None:
    assert len(parse(SMALL + f"{key}: {{x: 1}}\n").warnings) == 1


def test_empty_sections_are_as_good_as_none() -> None:
    loaded = parse(
        SMALL + "  deployment_config:\n  engine_kwargs:\n  lora_config:\n  runtime_env:\ngateway:\n"
    )
    assert loaded.models == parse(SMALL).models and loaded.warnings == ()


def test_an_open_gateway_without_keys_is_warned_about_by_the_key_that_opens_it() -> None:
    assert "no API keys" in parse(SMALL + "gateway: {host: 0.0.0.0}").warnings[0]
    (rays,) = parse(SMALL + "http_options: {host: 0.0.0.0}").warnings
    assert rays.startswith("conf/c.yaml:3: http_options.host: ") and "no API keys" in rays
    assert not parse(SMALL + "gateway: {host: 0.0.0.0, api_keys_env: KEYS}").warnings


def test_variables_are_filled_in_and_one_that_is_not_set_is_named() -> None:
    text = "llm_configs: [{model_loading_config: {model_id: '${NAME}', model_source: '${X:-m}'}}]"
    filled = parse_settings(text, "c.yaml", no_files, env={"NAME": "given"})
    assert (filled.models[0].model_id, filled.models[0].model_source) == ("given", "m")
    with pytest.raises(ConfigError, match=r"c.yaml:1: .*model_id: .*variable NAME is not set"):
        parse_settings(text, "c.yaml", no_files)


@pytest.mark.parametrize(
    ("written", "given", "read"),
    [
        ("${N}", "2", 2),
        ("${N}", "0.5", 0.5),
        ("${N}", "true", True),
        ("${N}", "v2", "v2"),
        ("${N}", "null", "null"),
        ("${N}", "[1]", "[1]"),
        ("${N:-3}", None, 3),
        ("'${N}'", "2", "2"),
        ('"${N}"', "true", "true"),
        ("v${N}", "2", "v2"),
        ("$${N}", "2", "${N}"),
        ("a $${N} ${N}", "2", "a ${N} 2"),
        ("'$${1} $${N'", "2", "${1} ${N"),
    ],
)
def test_a_variable_becomes_what_yaml_would_read_in_its_place(
    written: str, given: str | None, read: object
) -> None:
    env = {} if given is None else {"N": given}
    for text in (
        SMALL + f"  engine_kwargs:\n    seed: {written}\n",
        "applications:\n- import_path: ray.serve.llm:build_openai_app\n  args:\n"
        + "".join(f"    {line}\n" for line in SMALL.splitlines())
        + f"      engine_kwargs:\n        seed: {written}\n",
    ):
        loaded = parse_settings(text, "c.yaml", no_files, env=env)
        seed = loaded.models[0].engine_kwargs["seed"]
        assert seed == read and type(seed) is type(read)


@pytest.mark.parametrize(
    "form", ["${N:?none}", "${N-x}", "${N", "${}", "${1}", "${ N }", "a ${N.b} ${N}", "${N:-${N}}"]
)
def test_another_form_of_a_variable_is_refused_and_not_taken_for_text(form: str) -> None:
    text = SMALL + f"  engine_kwargs:\n    seed: '{form}'\n"
    with pytest.raises(ConfigError, match=r"^c.yaml:4: .*seed: .* is neither \$\{NAME\} nor"):
        parse_settings(text, "c.yaml", no_files, env={"N": "2"})


def test_a_variable_in_a_file_of_its_own_for_a_model_is_a_number_too() -> None:
    part = "model_loading_config: {model_id: a}\nengine_kwargs:\n  seed: ${N}\n  dtype: '${N}'\n"
    text = "llm_configs: [part.yaml]\n"
    loaded = parse_settings(text, "c.yaml", lambda path: part, env={"N": "2"})
    assert loaded.models[0].engine_kwargs == {"seed": 2, "dtype": "2"}


def no_files(path: str) -> str:
    raise OSError(path)


@pytest.mark.parametrize("written", ["no", "3.5", "7"])
def test_a_name_that_yaml_reads_as_something_else_is_to_be_put_in_quotes(written: str) -> None:
    (line,) = refusal(SMALL.replace("m}", f"{written}}}"))
    assert "model_id: expected some text, got" in line and line.endswith("; put it in quotes")
    (line,) = refusal(SMALL + f"  lora_config: {{dynamic_lora_loading_path: /a, pin: {written}}}\n")
    assert "quotes" not in line


@pytest.mark.parametrize("key", ["pin", "preload"])
def test_an_adapter_that_is_named_with_its_model_is_warned_about(key: str) -> None:
    lora = f"  lora_config: {{dynamic_lora_loading_path: /a, {key}: ['m:a', b]}}\n"
    lora += "  engine_kwargs: {enable_lora: true}\n"
    (warning,) = parse(SMALL + lora).warnings
    assert f"lora_config.{key}[0]: the text 'm:a' names the model, too" in warning
    assert "'a'" in warning


def test_a_quote_that_is_never_closed_is_told_with_the_line_where_it_begins() -> None:
    (line,) = refusal(SMALL.replace("m}", '"m}') + "# more\n" * 9)
    assert "found unexpected end of stream" in line and line.endswith("that begins in line 2")


@pytest.mark.parametrize("form", ["first", "last", "empty ones"])
def test_a_manifest_may_stand_among_others(form: str) -> None:
    inside = "".join(f"    {line}\n" for line in SMALL.splitlines())
    ours = f"kind: RayService\nspec:\n  serveConfigV2: |\n{inside}"
    other = "kind: ConfigMap\ndata: {a: b}\n"
    text = {
        "first": f"{ours}---\n{other}",
        "last": f"{other}---\n{ours}",
        "empty ones": f"---\n{ours}---\n---\n# no more\n",
    }[form]
    assert parse_settings(text, "k.yaml", no_files).models == parse(SMALL).models
    with pytest.raises(ConfigError, match=r"k.yaml:\d+: a second document begins here"):
        parse_settings(f"{ours}---\n{ours}", "k.yaml", no_files)


def test_a_manifest_may_be_an_item_of_a_list_as_kubectl_writes_it() -> None:
    def item(kind: str) -> str:
        inside = "".join(f"      {line}\n" for line in SMALL.splitlines())
        return f"- kind: {kind}\n  spec:\n    serveConfigV2: |\n{inside}"

    head, other = "apiVersion: v1\nitems:\n", "- kind: ConfigMap\n  data: {a: b}\n"
    text = head + other + item("RayService")
    tail = "kind: List\nmetadata: {resourceVersion: ''}\n"
    assert parse_settings(text + tail, "k.yaml", no_files).models == parse(SMALL).models
    with pytest.raises(ConfigError, match=r"k.yaml:(8|9|10): .*nonsense"):
        parse_settings(text + "        nonsense: 1\n" + tail, "k.yaml", no_files)
    with pytest.raises(ConfigError, match=r"k.yaml:\d+: items\[2\]: a second RayService"):
        parse_settings(text + item("RayService") + tail, "k.yaml", no_files)
    with pytest.raises(ConfigError, match=r"spec.serveConfigV2 is missing"):
        parse_settings(head + other + tail, "k.yaml", no_files)


def test_what_a_manifest_holds_may_be_yaml_and_not_text() -> None:
    inside = "".join(f"    {line}\n" for line in SMALL.splitlines())
    text = f"kind: RayService\nspec:\n  serveConfigV2:\n{inside}"
    assert parse_settings(text, "k.yaml", no_files).models == parse(SMALL).models
    with pytest.raises(ConfigError, match=r"k.yaml:6: .*nonsense"):
        parse_settings(text + "      nonsense: 1\n", "k.yaml", no_files)


def test_a_manifest_of_kuberay_is_read_by_what_is_inside_and_lines_are_those_of_the_file() -> None:
    inside = "".join(f"    {line}\n" for line in SMALL.splitlines())
    text = f"kind: RayService\nspec:\n  serveConfigV2: |\n{inside}"
    read = parse_settings(text, "k.yaml", no_files)
    assert read.models[0].model_id == parse(SMALL).models[0].model_id
    with pytest.raises(ConfigError, match=r"k.yaml:[5-9]: "):
        parse_settings(text + "      nonsense: 1\n", "k.yaml", no_files)


@pytest.mark.parametrize(
    ("inside", "line", "words"),
    [
        ("llm_configs: []\nllm_configs: []\n", 5, "stands twice (first in line 4)"),
        ("llm_configs:\n\t- x\n", 5, "not valid YAML"),
        ("", 3, "spec.serveConfigV2: is empty"),
    ],
)
def test_a_mistake_in_the_text_of_a_manifest_is_told_with_its_line_in_the_file(
    inside: str, line: int, words: str
) -> None:
    text = "kind: RayService\nspec:\n  serveConfigV2: |\n" + textwrap.indent(inside, "    ")
    with pytest.raises(ConfigError) as caught:
        parse_settings(text, "k.yaml", no_files)
    assert caught.value.message.startswith(f"k.yaml:{line}: ") and words in caught.value.message


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", "x"), ("seed", True), ("dtype", "banana"), ("dtype", True), ("dtype", ["half"])],
)
def test_a_value_that_vllm_would_not_take_is_named(key: str, value: object) -> None:
    known = {"seed": Argument("int"), "dtype": Argument("any", ("auto", "half"))}
    assert [k for k, _ in wrong_arguments({key: value}, known)] == [key]
    assert not [*wrong_arguments({"seed": 1, "dtype": "half"}, known)]


@pytest.mark.parametrize(
    ("kwargs", "wrong"),
    [
        ({"max_model_len": "8k"}, "max_model_len"),
        ({"revision": 1.0}, "revision"),
        ({"lora_target_modules": "q_proj"}, "lora_target_modules"),
        ({"lora_target_modules": ["q_proj"]}, None),
        ({"limit_mm_per_prompt": "image=2"}, "limit_mm_per_prompt"),
        ({"compilation_config": 3}, "compilation_config"),
        ({"compilation_config": {"level": 3}}, "compilation_config.level"),
        ({"compilation_config": {"mode": 3}}, None),
        ({"speculative_config": {"metod": "ngram"}}, "speculative_config.metod"),
        ({"kv_transfer_config": {"kv_roll": "kv_both"}}, "kv_transfer_config.kv_roll"),
        ({"hf_overrides": {"anything": 1}}, None),
        ({"hf_token": "from-a-variable"}, None),
        ({"max_lora_rank": 16}, None),
        ({"compilation_config": {"mode": "banana"}}, "compilation_config.mode"),
        ({"compilation_config": {"mode": "vllm_compile", "cudagraph_mode": "piecewise"}}, None),
        ({"structured_outputs_config": {"backend": "banana"}}, "structured_outputs_config.backend"),
        ({"structured_outputs_config": {"backend": "xgrammar"}}, None),
        ({"speculative_config": {"method": "nosuch"}}, "speculative_config.method"),
        *(
            ({"speculative_config": {"num_speculative_tokens": n}}, wrong)
            for n, wrong in (
                ("many", "speculative_config.num_speculative_tokens"),
                (0, "speculative_config.num_speculative_tokens"),
                ("3", None),
                (3, None),
                (None, None),
            )
        ),
        ({"kv_transfer_config": {"kv_role": "both"}}, "kv_transfer_config.kv_role"),
        ({"attention_config": {"backend": "flash_attn"}}, None),
        ({"eplb_config": {"window_size": [1]}}, "eplb_config.window_size"),
        ({"max_model_len": -5}, "max_model_len"),
        ({"max_model_len": -1}, None),
        ({"max_logprobs": -7}, "max_logprobs"),
        ({"cpu_offload_gb": -1}, "cpu_offload_gb"),
        ({"cpu_offload_gb": 0}, None),
        ({"stream_interval": 0}, "stream_interval"),
        ({"watermark": 1.0}, "watermark"),
        ({"watermark": 0.5}, None),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization"),
        ({"gpu_memory_utilization": 1}, None),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_num_seqs": 1}, None),
    ],
)
def test_a_value_of_another_form_and_a_key_inside_that_vllm_does_not_have_are_named(
    kwargs: dict[str, Any], wrong: str | None
) -> None:
    known = read_known_arguments(KEPT.read_bytes()).arguments
    assert [key for key, _ in wrong_arguments(kwargs, known)] == ([wrong] if wrong else [])


@pytest.mark.parametrize(
    "key",
    [
        *("api_key", "lora_modules", "ssl_keyfile", "allowed_origins", "config", "model_tag"),
        *("grpc", "worker_extension_cls"),
    ],
)
def test_what_belongs_to_vllms_own_server_is_refused_by_its_name(key: str) -> None:
    (line,) = refusal(SMALL + f"  engine_kwargs: {{{key}: x}}\n")
    assert line.startswith(f"conf/c.yaml:3: llm_configs[0].engine_kwargs.{key}: ")


@pytest.mark.parametrize(
    ("more", "env", "named"),
    [
        ("", {"VLLM_API_KEY": "k"}, ["gateway.api_keys_env: VLLM_API_KEY"]),
        ("", {"VLLM_API_KEY": "k", "VLLM_SERVER_DEV_MODE": "1"}, ["VLLM_API_KEY", "DEV_MODE"]),
        ("gateway: {api_keys_env: VLLM_API_KEY}\n", {"VLLM_API_KEY": "k"}, []),
        ("  llm_engine: sim\n", {"VLLM_API_KEY": "k"}, []),
        ("", {"VLLM_CPU_KVCACHE_SPACE": "4"}, []),
    ],
)
def test_a_variable_for_vllms_own_server_is_named_where_nothing_else_does_what_it_does(
    more: str, env: dict[str, str], named: list[str]
) -> None:
    warnings = parse_settings(SMALL + more, "c.yaml", no_files, env=env).warnings
    assert len(warnings) == len(named)
    assert all(name in line for name, line in zip(named, warnings, strict=True))


def test_one_key_of_engine_kwargs_that_is_refused_hides_nothing_else_of_the_file() -> None:
    text = SMALL + "  llm_engine: sim\n  engine_kwargs: {sim: {ttft: 1}}\ngateway: {prot: 1}\n"
    kwargs, gateway = refusal(text)
    assert kwargs.startswith("conf/c.yaml:4: llm_configs[0].engine_kwargs.sim.ttft: unknown key")
    assert gateway.startswith("conf/c.yaml:5: gateway.prot: unknown key")


@pytest.mark.parametrize(
    "given",
    [
        *("host: h", "device: auto", "distributed_executor_backend: ray", "grpc_port: 1"),
        *("enable_scale_out: true", "sse_keep_alive_interval: 5", "node_rank: 1"),
        *("data_parallel_rank: 1", "dp_supervisor_probe_timeout_s: 1"),
    ],
)
def test_what_has_no_effect_is_a_warning(given: str) -> None:
    warnings = parse(SMALL + f"  engine_kwargs: {{{given}}}\n").warnings
    assert [given.partition(":")[0] in line for line in warnings] == [True]


@pytest.mark.parametrize(
    ("key", "instead"),
    [
        ("task", "runner: pooling"),
        ("rope_scaling", "hf_overrides"),
        ("guided_decoding_backend", "structured_outputs_config"),
    ],
)
def test_an_argument_that_vllm_replaced_is_refused_with_what_took_its_place(
    key: str, instead: str
) -> None:
    ((found, text),) = wrong_arguments({key: "x"}, {"kda_decode_backend": Argument()})
    assert found == key and f"engine_kwargs.{instead}" in text and "did you mean" not in text


def test_a_key_that_holds_what_others_refer_to_may_stand_at_the_top() -> None:
    text = "x-both: &both {llm_engine: sim}\n" + SMALL + "  <<: *both\n"
    assert parse(text).models[0].llm_engine == "sim"


def test_a_later_check_can_name_the_line() -> None:
    loaded = parse(SMALL + "  engine_kwargs:\n    seeed: 1\n")
    assert engine_kwargs_problems(loaded, {"seed": Argument("int")}) == [
        "conf/c.yaml:4: llm_configs[0].engine_kwargs.seeed: vLLM has no such engine "
        "argument; did you mean 'seed'?"
    ]


def test_a_flood_of_problems_is_cut() -> None:
    lines = refusal(SMALL + "".join(f"key{n}: 1\n" for n in range(200)))
    assert len(lines) == 51 and lines[-1] == "... and 150 more"


def test_files_are_read_from_disk_with_paths_from_their_folder(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(
        "model_loading_config: {model_id: m}\nengine_kwargs: {enable_lora: "
        "true}\nlora_config: {dynamic_lora_loading_path: ./adapters}\n"
    )
    (tmp_path / "c.yaml").write_text(
        "llm_configs: [m.yaml]\ngateway: {state_dir: state, api_keys_file: ~/keys}\n"
    )
    loaded = load_settings(tmp_path / "c.yaml")
    assert loaded.models[0].adapters_path == str(tmp_path / "adapters")
    assert loaded.gateway.state_dir == str(tmp_path / "state")
    assert loaded.gateway.api_keys_file == os.path.expanduser("~/keys")


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"llm_configs: [other.yaml]"])
def test_unreadable_files_are_config_errors(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "c.yaml").write_bytes(content)
    (tmp_path / "other.yaml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        load_settings(tmp_path / "c.yaml")


def test_the_default_state_folder_is_in_the_home_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(SMALL)
    assert load_settings(tmp_path / "c.yaml").gateway.state_dir == os.path.expanduser(
        "~/.cache/loraplex"
    )


def test_a_model_file_of_an_app_takes_variables_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.yaml").write_text('model_loading_config: {model_id: "${MODEL_OF_TEST}"}\n')
    monkeypatch.setenv("MODEL_OF_TEST", "m")
    assert LLMConfig.from_file(tmp_path / "m.yaml").model_id == "m"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "c.yaml").write_text(SMALL.replace("\n", "\r\n"), encoding)
    assert load_settings(tmp_path / "c.yaml").models == parse(SMALL).models


def test_an_app_is_built_from_configs_dicts_and_paths(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("model_loading_config: {model_id: c}")
    one = LLMConfig(model_loading_config={"model_id": "a"}, runtime_env={"x": 1})
    loaded = app_from_args(
        {
            "llm_configs": [
                one,
                {"model_loading_config": {"model_id": "b"}},
                str(tmp_path / "m.yaml"),
            ],
            "gateway": {"port": 1},
        }
    )
    assert [model.model_id for model in loaded.models] == ["a", "b", "c"]
    assert loaded.gateway.port == 1
    assert [w.split(":")[1].strip() for w in loaded.warnings] == ["llm_configs[0].runtime_env"]


@pytest.mark.parametrize(
    "args",
    [
        None,
        [],
        {},
        {"llm_configs": []},
        {"llm_configs": [3]},
        {"llm_configs": ["/nowhere.yaml"]},
        {"llm_configs": [""]},
        {"llm_config": []},
        {"llm_configs": [{"model_loading_config": {"model_id": "m"}}] * 2},
    ],
)
def test_an_app_without_valid_models_is_refused(args: Any) -> None:
    with pytest.raises(ConfigError, match="build_openai_app: "):
        app_from_args(args)


def loads_or_refuses(text: str) -> None:
    try:
        loaded = parse(text)
    except ConfigError as exc:
        assert exc.message
        exc.message.encode()  # printable everywhere
    else:
        assert loaded.models


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=100))
def test_no_text_raises_anything_but_a_config_error(text: str) -> None:
    loads_or_refuses(text)


_KEYS = st.sampled_from(
    [
        "llm_configs",
        "applications",
        "args",
        "gateway",
        "http_options",
        "port",
        "host",
        "link",
        "control",
        "model_loading_config",
        "model_id",
        "model_source",
        "engine_kwargs",
        "max_loras",
        "max_lora_rank",
        "sim",
        "lora_config",
        "store",
        "dynamic_lora_loading_path",
        "deployment_config",
        "autoscaling_config",
        "num_replicas",
        "min_replicas",
        "llm_engine",
        "accelerator_config",
        "kind",
        "log_level",
        "state_dir",
        "x",
    ]
)
_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["sim", "auto", "s3://b", "m"]),
)
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(_KEYS | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)
_MODELS = st.fixed_dictionaries(
    {"model_loading_config": st.just({"model_id": "m"})},
    optional={"engine_kwargs": _VALUES, "lora_config": _VALUES},
)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        _VALUES,
        st.dictionaries(_KEYS, _VALUES, max_size=5),
        st.fixed_dictionaries({"llm_configs": st.lists(_MODELS)}),
    )
)
def test_no_structure_raises_anything_but_a_config_error(value: Any) -> None:
    loads_or_refuses(yaml.safe_dump(value))


def test_settings_of_serve_that_cannot_be_read_are_a_mistake_and_no_crash(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_settings(str(tmp_path / f"loraplex{SERVE_SETTINGS}"))
