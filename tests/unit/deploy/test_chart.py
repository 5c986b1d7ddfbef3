"""The Helm chart: what it renders is valid, hangs together, and is what our code reads."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import helm_python.chart as helm
import jsonschema
import pytest
import yaml
from helm_python import errors as helm_errors

from shared.config.llm import LLMConfig
from shared.config.settings_file import load_settings
from tests.unit.deploy.chart import (
    CHART,
    CONFIG,
    NAMESPACE,
    ROOT,
    Object,
    config_text,
    container_of,
    env_names,
    example,
    gateway_of,
    labels_of,
    merged,
    of_kind,
    pod_of,
    render,
    selected,
    validate,
    workers_of,
    workloads,
)
from tests.unit.deploy.chart_matrix import MATRIX, OVERLAYS, SCALES, every, rendered, several


def of_model(changed: Mapping[str, Any]) -> dict[str, Any]:
    """The values for `CONFIG` with another model."""
    return {"config": {"llm_configs": [{**CONFIG["llm_configs"][0], **changed}]}}


def scaled(**bounds: int) -> dict[str, Any]:
    return of_model({"deployment_config": {"autoscaling_config": bounds}})


# ---- Helm and Kubernetes take it -----------------------------------------------------------------


@several
def test_helm_finds_nothing_to_complain_about(name: str) -> None:
    report = helm.lint(CHART, {"config": CONFIG, **MATRIX[name]}, strict=True)
    told = [m for m in report["messages"] if m["severity"] > 1]
    assert not told and not report["errors"]


@every
def test_every_object_is_valid_for_the_newest_kubernetes_and_keda(name: str) -> None:
    objects = rendered(name)
    for thing in objects:
        validate(thing)
    names = [(thing["kind"], thing["metadata"]["name"]) for thing in objects]
    assert len(set(names)) == len(names)


def test_a_wrong_field_would_be_noticed() -> None:
    objects = render(merged(OVERLAYS["keda"], OVERLAYS["route"]))
    for thing in objects:
        if thing["kind"] in ("Deployment", "ScaledObject", "HTTPRoute", "NetworkPolicy"):
            wrong = {**thing, "spec": {**thing["spec"], "replica": 1}}
            with pytest.raises(jsonschema.ValidationError):
                validate(wrong)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"gateway": {"replica": 3}}, "replica"),
        ({"workers": {"kind": "DaemonSet"}}, "kind"),
        ({"scaling": {"by": "magic"}}, "by"),
        ({"config": {"llm_configs": []}}, "no llm_configs"),
        ({"config": "a: ["}, "no YAML"),
        ({"config": {"llm_configs": ["model.yaml"]}}, "model.yaml is a file of its own"),
        ({"models": {"other": {}}}, "no model of this id"),
        ({"config": {**CONFIG, "gateway": {"api_keys_env": "KEYS"}}}, "apiKeys.existingSecret"),
        ({"workers": {"kind": "Deployment", "adapterCache": {"persistent": True}}}, "StatefulSet"),
        (
            {**SCALES, "scaling": {"by": "keda", "keda": {"source": "prometheus"}}},
            "serverAddress",
        ),
        (of_model({"model_loading_config": {"model_id": 7}}), "model_id, as text"),
        (scaled(min_replicas=3, max_replicas=2), "min_replicas (3) is more than max_replicas (2)"),
        (scaled(min_replicas=0, max_replicas=2), "would never have a worker"),
        (
            {
                **of_model(
                    {
                        "model_loading_config": {"model_id": "meta/llama"},
                        "deployment_config": {"num_replicas": "auto"},
                    }
                ),
                "scaling": {"by": "hpa"},
            },
            "meta/llama: an HPA selects",
        ),
        ({"gateway": {"autoscaling": {"minReplicas": 9}}}, "minReplicas is more than maxReplicas"),
        ({"gateway": {"podAnnotations": {"a": True}}}, "got boolean, want string"),
        ({"workers": {"nodeSelector": {"gpu": 1}}}, "got number, want string"),
        ({"models": {"demo": {"extraEnv": [{"name": "A", "value": 1}]}}}, "want string"),
        (of_model({"model_loading_config": {"model_id": "${NAME}"}}), "must know the model_id"),
        (of_model({"engine_kwargs": {"tensor_parallel_size": "${TP}"}}), 'is the text "${TP}"'),
        (of_model({"engine_kwargs": {"max_num_seqs": "${N:-8}"}}), "must know the number"),
        (of_model({"deployment_config": {"num_replicas": "${N}"}}), "num_replicas is the text"),
        (scaled(min_replicas="${N}", max_replicas=2), "min_replicas is the text"),
        ({"config": {**CONFIG, "gateway": {"drain_s": "${N}"}}}, "gateway.drain_s is the text"),
    ],
)
def test_what_cannot_work_is_refused_with_a_word_on_why(
    values: Mapping[str, Any], said: str
) -> None:
    with pytest.raises(helm_errors.HelmError, match=re.escape(said)):
        render(values)


def test_names_that_yaml_takes_for_numbers_stay_names() -> None:
    """A model `123` of the release `1e5`: Kubernetes refuses labels that are no text."""
    numbers = of_model({"model_loading_config": {"model_id": "123"}})
    objects = render({**numbers, "nameOverride": "42"}, release="1e5")
    for thing in objects:
        validate(thing)
    (worker,) = workers_of(objects)
    assert labels_of(worker)["loraplex/model"] == "123"
    assert labels_of(worker)["app.kubernetes.io/instance"] == "1e5"


# ---- it hangs together ---------------------------------------------------------------------------


@every
def test_every_selector_selects_the_pods_that_it_is_for(name: str) -> None:
    objects = rendered(name)
    gateway, workers = gateway_of(objects), workers_of(objects)
    for workload in workloads(objects):
        own = workload["spec"]["selector"]["matchLabels"]
        assert selected(own, objects) == [workload["metadata"]["name"]]
    for thing in of_kind(objects, "Service", "PodDisruptionBudget"):
        selector = thing["spec"]["selector"]
        found = selected(selector.get("matchLabels", selector), objects)
        wanted = thing["metadata"]["labels"]["app.kubernetes.io/component"]
        assert len(found) == 1
        assert (found == [gateway["metadata"]["name"]]) == (wanted == "gateway")
    everyone = {w["metadata"]["name"] for w in workers}
    for policy in of_kind(objects, "NetworkPolicy"):
        found = set(selected(policy["spec"]["podSelector"]["matchLabels"], objects))
        assert found in ({gateway["metadata"]["name"]}, everyone)


@every
def test_every_port_that_is_named_is_one_of_the_container(name: str) -> None:
    objects = rendered(name)
    ports = {
        w["metadata"]["name"]: {p["name"] for p in container_of(w)["ports"]}
        for w in workloads(objects)
    }
    for service in of_kind(objects, "Service"):
        (target,) = selected(service["spec"]["selector"], objects)
        assert {p["targetPort"] for p in service["spec"]["ports"]} <= ports[target]
    for policy in of_kind(objects, "NetworkPolicy"):
        for target in selected(policy["spec"]["podSelector"]["matchLabels"], objects):
            rules = policy["spec"]["ingress"]
            assert {p["port"] for rule in rules for p in rule["ports"]} <= ports[target]
    for workload in workloads(objects):
        container = container_of(workload)
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"]["port"] in ports[workload["metadata"]["name"]]


@several
def test_every_mount_has_a_volume_and_every_volume_a_mount(name: str) -> None:
    for workload in workloads(rendered(name)):
        claims = workload["spec"].get("volumeClaimTemplates", [])
        volumes = {v["name"] for v in pod_of(workload)["volumes"]}
        volumes |= {c["metadata"]["name"] for c in claims}
        assert {m["name"] for m in container_of(workload)["volumeMounts"]} == volumes


@several
def test_every_secret_that_a_pod_names_is_made_here_or_named_in_the_values(name: str) -> None:
    objects = rendered(name)
    made = {(s["metadata"]["name"], key) for s in of_kind(objects, "Secret") for key in s["data"]}
    given = json.dumps(MATRIX[name])
    for workload in workloads(objects):
        container = container_of(workload)
        for entry in container["env"]:
            ref = entry.get("valueFrom", {}).get("secretKeyRef")
            if ref and (ref["name"], ref["key"]) not in made:
                assert f'"{ref["name"]}"' in given
        for source in container.get("envFrom", []):
            secret = source["secretRef"]["name"]
            assert f'"{secret}"' in given or secret in {n for n, _ in made}


@several
def test_pods_are_locked_down_and_carry_no_token(name: str) -> None:
    for workload in workloads(rendered(name)):
        pod, container = pod_of(workload), container_of(workload)
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        user = next(line for line in dockerfile() if line.startswith("RUN useradd"))
        assert f"--uid {pod['securityContext']['runAsUser']} " in user
        assert f"--home-dir {dict(plain_env(workload))['HOME']} " in user


def dockerfile() -> list[str]:
    return (ROOT / "deploy/Dockerfile").read_text().splitlines()


def plain_env(workload: Object) -> list[tuple[str, str]]:
    return [(e["name"], e["value"]) for e in container_of(workload)["env"] if "value" in e]


@several
def test_a_pod_may_take_as_long_as_its_process_to_end(name: str, tmp_path: Path) -> None:
    objects = rendered(name)
    g = settings_of(objects, tmp_path).gateway
    for workload in workloads(objects):
        hook = container_of(workload)["lifecycle"]["preStop"]
        leaving_s = hook.get("sleep", {}).get("seconds", 0)
        assert pod_of(workload)["terminationGracePeriodSeconds"] >= g.drain_s + g.kill_s + leaving_s


# ---- our code reads it ---------------------------------------------------------------------------


def settings_of(objects: list[Object], folder: Path) -> Any:
    file = folder / "loraplex.yaml"
    file.write_text(config_text(objects))
    return load_settings(str(file))


@several
def test_the_config_of_the_pods_is_one_that_loraplex_takes(name: str, tmp_path: Path) -> None:
    objects = rendered(name)
    settings = settings_of(objects, tmp_path)
    g = settings.gateway
    ports = {p["name"]: p["containerPort"] for p in container_of(gateway_of(objects))["ports"]}
    assert (g.host, g.port, g.processes) == ("0.0.0.0", ports["http"], 1)
    assert g.link.control == f"tcp://0.0.0.0:{ports['link-control']}"
    assert g.link.data == f"tcp://0.0.0.0:{ports['link-data']}"
    for workload in workers_of(objects):
        peer = next(p for p in container_of(workload)["ports"] if p["name"] == "peer")
        assert g.link.peer_endpoint == f"tcp://0.0.0.0:{peer['containerPort']}"


@several
def test_every_variable_that_a_pod_is_given_is_read_by_somebody(name: str, tmp_path: Path) -> None:
    objects = rendered(name)
    g = settings_of(objects, tmp_path).gateway
    ours = {g.link.secret_env, g.api_keys_env, g.admin_keys_env}
    extra = {"A"}
    for workload in workloads(objects):
        names = list(env_names(workload))
        assert len(set(names)) == len(names)
        command = " ".join(container_of(workload)["command"])
        for variable in set(names) - ours - extra:
            assert f"$({variable})" in command or is_read(variable), variable
    assert set(env_names(gateway_of(objects))) >= {n for n in ours if n}


READERS = {
    "HF_HOME": "huggingface_hub",
    "VLLM_CACHE_ROOT": "vllm",
    "TORCHINDUCTOR_CACHE_DIR": "torch",
    "TRITON_CACHE_DIR": "vllm",
    "GOOGLE_APPLICATION_CREDENTIALS": "gcloud.aio.auth",
}
"""Variables of others, and whose."""


@functools.cache
def is_read(variable: str) -> bool:
    if variable == "HOME":
        return True  # ~ in paths, and the caches of libraries
    spec = importlib.util.find_spec(READERS[variable])
    assert spec is not None and spec.submodule_search_locations is not None
    (folder, *_) = spec.submodule_search_locations
    return any(variable in f.read_text(errors="ignore") for f in Path(folder).rglob("*.py"))


@several
def test_workers_look_for_gateways_where_every_gateway_pod_has_an_address(name: str) -> None:
    objects = rendered(name)
    headless = next(
        s for s in of_kind(objects, "Service") if s["spec"].get("publishNotReadyAddresses")
    )
    assert headless["spec"]["clusterIP"] == "None"
    assert selected(headless["spec"]["selector"], objects) == [
        gateway_of(objects)["metadata"]["name"]
    ]
    port = next(p for p in headless["spec"]["ports"] if p["name"] == "link-control")["port"]
    for workload in workers_of(objects):
        command = container_of(workload)["command"]
        assert command[command.index("--gateway") + 1] == (
            f"dns://{headless['metadata']['name']}.{NAMESPACE}.svc:{port}"
        )


@several
def test_every_model_has_its_workers_with_their_gpus(name: str, tmp_path: Path) -> None:
    objects = rendered(name)
    settings = settings_of(objects, tmp_path)
    by_model = {
        (c := container_of(w)["command"])[c.index("--model") + 1]: w for w in workers_of(objects)
    }
    assert list(by_model) == [m.model_id for m in settings.models]
    for model in settings.models:
        limits = container_of(by_model[model.model_id])["resources"]["limits"]
        assert limits.get("nvidia.com/gpu", 0) == model.gpus_per_worker
        if "replicas" in by_model[model.model_id]["spec"]:
            assert by_model[model.model_id]["spec"]["replicas"] == model.workers


SCALINGS: list[dict[str, Any]] = [
    {"num_replicas": "auto"},
    {"num_replicas": "auto", "autoscaling_config": {"max_replicas": 7}},
    {"autoscaling_config": {"min_replicas": 0, "max_replicas": 4}},
    {"autoscaling_config": {"max_replicas": 4, "target_ongoing_requests": 12.5}},
    {"autoscaling_config": {"max_replicas": 4}, "max_ongoing_requests": 33},
    {"autoscaling_config": {"max_replicas": 4, "initial_replicas": 2, "downscale_delay_s": 0}},
    {"autoscaling_config": {"max_replicas": 4, "downscale_to_zero_delay_s": 45}},
    {"autoscaling_config": {"max_replicas": 10**9, "downscale_to_zero_delay_s": 2 * 10**6}},
]


@pytest.mark.parametrize("deployment", SCALINGS, ids=json.dumps)
@pytest.mark.parametrize("by", ["keda", "hpa"])
@pytest.mark.parametrize("engine", [{}, {"sim": {"max_num_seqs": 9}}])
def test_bounds_target_and_delays_are_those_that_serve_would_take(
    deployment: dict[str, Any], by: str, engine: dict[str, Any]
) -> None:
    model = {
        "model_loading_config": {"model_id": "demo"},
        "llm_engine": "sim",
        "engine_kwargs": engine,
        "deployment_config": deployment,
    }
    ours = LLMConfig(**model)
    scaling = ours.deployment_config.autoscaling_config
    assert scaling is not None
    objects = render({"config": {"llm_configs": [model]}, "scaling": {"by": by}})
    (worker,) = workers_of(objects)
    assert "replicas" not in worker["spec"]  # the scaler owns the number
    (found,) = [
        s
        for s in of_kind(objects, "ScaledObject", "HorizontalPodAutoscaler")
        if s["spec"]["scaleTargetRef"]["name"] == worker["metadata"]["name"]
    ]
    spec = found["spec"]
    assert spec["scaleTargetRef"]["kind"] == worker["kind"]
    if by == "keda":
        assert spec["minReplicaCount"] == scaling.min_replicas
        assert spec["maxReplicaCount"] == scaling.max_replicas
        to_zero_s = scaling.downscale_to_zero_delay_s
        down_s = scaling.downscale_delay_s
        assert spec["cooldownPeriod"] == (down_s if to_zero_s is None else to_zero_s)
        target = spec["triggers"][0]["metadata"]["targetValue"]
        behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    else:
        assert spec["minReplicas"] == max(1, scaling.min_replicas)
        assert spec["maxReplicas"] == scaling.max_replicas
        target = spec["metrics"][0]["external"]["target"]["averageValue"]
        behavior = spec["behavior"]
    assert float(target) == pytest.approx(ours.target_ongoing_requests)
    assert behavior["scaleUp"]["stabilizationWindowSeconds"] == scaling.upscale_delay_s
    assert behavior["scaleDown"]["stabilizationWindowSeconds"] == scaling.downscale_delay_s


@pytest.mark.parametrize(
    "model_id",
    ["Qwen/Qwen2.5-0.5B", 'a "quoted" \\ name', "ä", "x" * 80, "UPPER", "-", "demo", "a.b", "a-b"],
)
def test_a_model_of_any_name_gets_names_that_kubernetes_takes(
    model_id: str, tmp_path: Path
) -> None:
    model = merged(
        CONFIG["llm_configs"][0],
        {
            "model_loading_config": {"model_id": model_id},
            "deployment_config": {"num_replicas": "auto"},
        },
    )
    for release in ("r", "a-release-with-a-very-long-name-of-fifty-characters-ab"):
        values = {"config": {"llm_configs": [model]}, "scaling": {"by": "keda"}}
        objects = render(values, release)
        for thing in objects:
            validate(thing)
            assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", thing["metadata"]["name"])
        (worker,) = workers_of(objects)
        assert len(worker["metadata"]["name"]) <= 52  # with a revision's hash it is a label
        for value in labels_of(worker).values():
            assert re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", value)
        command = container_of(worker)["command"]
        assert command[command.index("--model") + 1] == model_id
        assert settings_of(objects, tmp_path).models[0].model_id == model_id
        (scaled,) = of_kind(objects, "ScaledObject")
        series = scaled["spec"]["triggers"][0]["metadata"]["valueLocation"]
        matcher = re.fullmatch(r"loraplex_ongoing_requests\{base=(.*)\}", series)
        assert matcher is not None and json.loads(matcher[1]) == model_id


def test_two_models_whose_names_look_alike_keep_apart() -> None:
    models = [
        merged(CONFIG["llm_configs"][0], {"model_loading_config": {"model_id": name}})
        for name in ("a.b", "a-b", "A-B", "a b")
    ]
    names = [w["metadata"]["name"] for w in workers_of(render({"config": {"llm_configs": models}}))]
    assert len(set(names)) == 4


def test_the_values_of_one_model_change_that_one_alone() -> None:
    two = example(ROOT / "deploy/k8s/two-models.yaml")
    by_kind = {w["kind"]: w for w in workers_of(render(two))}
    assert pod_of(by_kind["Deployment"])["nodeSelector"] == {"gpu": "l4"}
    assert pod_of(by_kind["StatefulSet"])["nodeSelector"] == {"gpu": "h100"}


# ---- one file for all ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file", ["examples/ray.yaml", "examples/qwen.yaml", "deploy/cluster/loraplex.yaml"]
)
def test_the_file_of_serve_and_of_compose_is_the_charts_too(file: str, tmp_path: Path) -> None:
    text = (ROOT / file).read_text()
    as_text, as_map = render({"config": text}), render({"config": yaml.safe_load(text)})
    assert config_text(as_text) == config_text(as_map)
    given, taken = load_settings(str(ROOT / file)), settings_of(as_text, tmp_path)
    assert [m.engine_kwargs for m in taken.models] == [m.engine_kwargs for m in given.models]
    assert [m.deployment_config for m in taken.models] == [
        m.deployment_config for m in given.models
    ]


def in_rays_forms() -> dict[str, str]:
    """CONFIG and a section `gateway`, written in each way that `serve` takes."""
    gateway = {"drain_s": 77, "bounds": {"max_sequences": 5}}
    application = {"name": "llm", "import_path": "ray.serve.llm:build_openai_app", "args": CONFIG}
    below = {"applications": [application], "gateway": gateway}
    inside = {"applications": [{**application, "args": {**CONFIG, "gateway": gateway}}]}
    service = {"apiVersion": "ray.io/v1", "kind": "RayService", "metadata": {"name": "a"}}
    as_text = {**service, "spec": {"serveConfigV2": yaml.safe_dump(below)}}
    other = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "b"}}
    documents = {
        "models": [{**CONFIG, "gateway": gateway}],
        "application": [inside],
        "gateway beside it": [below],
        "manifest": [as_text],
        "manifest as a map": [{**service, "spec": {"serveConfigV2": inside}}],
        "manifest among others": [other, as_text, other],
        "list": [{"apiVersion": "v1", "kind": "List", "items": [other, as_text]}],
    }
    found = {name: yaml.safe_dump_all(items) for name, items in documents.items()}
    begun = f"--- # ours\n{found['models']}...\n"
    return {**found, "marked": f"---\n{found['models']}", "marked and ended": begun}


@pytest.mark.parametrize("form", in_rays_forms())
def test_every_form_of_rays_file_that_serve_takes_is_the_charts_too(
    form: str, tmp_path: Path
) -> None:
    text = in_rays_forms()[form]
    (tmp_path / "given.yaml").write_text(text)
    given = load_settings(str(tmp_path / "given.yaml"))
    objects = render({"config": text})
    taken = settings_of(objects, tmp_path)
    assert taken.models == given.models
    assert (taken.gateway.drain_s, taken.gateway.bounds) == (77, given.gateway.bounds)
    (worker,) = workers_of(objects)
    assert pod_of(worker)["terminationGracePeriodSeconds"] == 77 + given.gateway.kill_s


def test_a_rehearsal_on_gpus_gets_them() -> None:
    (worker,) = workers_of(
        render(of_model({"llm_engine": "sim", "accelerator_config": {"kind": "gpu"}}))
    )
    assert container_of(worker)["resources"]["limits"] == {"nvidia.com/gpu": 1}


def test_a_large_whole_number_stays_one(tmp_path: Path) -> None:
    model = merged(CONFIG["llm_configs"][0], {"engine_kwargs": {"kv_cache_memory_bytes": 2**34}})
    objects = render({"config": yaml.safe_dump({"llm_configs": [model]})})
    assert settings_of(objects, tmp_path).models[0].engine_kwargs["kv_cache_memory_bytes"] == 2**34


def test_a_link_secret_of_ones_own_is_used_and_none_is_made() -> None:
    objects = render(OVERLAYS["secrets of mine"])
    assert not of_kind(objects, "Secret")
    made = of_kind(render(), "Secret")
    assert [s["metadata"]["name"] for s in made] == ["rel-loraplex-link"]
