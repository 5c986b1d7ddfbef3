"""The Helm chart as its users see it: values in, objects out, by Helm's own engine."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import helm_python.chart as helm
import jsonschema
import yaml
from kubernetes_validate.utils import schema_contents
from referencing import Registry, Resource

ROOT = Path(__file__).resolve().parents[3]
CHART = ROOT / "deploy/chart"
EXAMPLES = sorted((ROOT / "deploy/k8s").glob("*.yaml"))
KUBERNETES = "1.37"
RELEASE, NAMESPACE = "rel", "space"
CONFIG: dict[str, Any] = {
    "llm_configs": [
        {
            "model_loading_config": {"model_id": "demo", "model_source": "/models/demo"},
            "engine_kwargs": {"enable_lora": True, "max_loras": 4},
            "lora_config": {"dynamic_lora_loading_path": "s3://adapters/demo"},
            "deployment_config": {"num_replicas": 2},
        }
    ]
}
Object = dict[str, Any]


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """As Helm lays one file of values over another."""
    found = dict(base)
    for key, value in over.items():
        below = found.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        found[key] = merged(below, value) if both else value  # type: ignore[arg-type]
    return found


def example(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
    return values


def render(values: Mapping[str, Any] | None = None, release: str = RELEASE) -> list[Object]:
    """Every object, of `CONFIG` where the values have no config of their own."""
    chart = helm.Chart.load(CHART)
    full = {"config": CONFIG, **(values or {})}
    chart.validate_schema(full)
    files = chart.render(full, name=release, namespace=NAMESPACE)
    manifests = (text for name, text in sorted(files.items()) if name.endswith(".yaml"))
    return [found for text in manifests for found in yaml.safe_load_all(text) if found]


def validate(thing: Object) -> None:
    """Against the schema of its kind, unknown fields refused. Raises jsonschema.ValidationError."""
    _validator(thing["kind"], thing["apiVersion"]).validate(thing)


@functools.cache
def _validator(kind: str, api_version: str) -> jsonschema.protocols.Validator:
    own = ROOT / f"tests/schemas/{kind}.json"
    if own.exists():
        return jsonschema.Draft202012Validator(json.loads(own.read_text()))
    group, _, version = api_version.rpartition("/")
    group = group.partition(".")[0] + "-" if group else ""
    schema = _builtin(f"{kind.lower()}-{group}{version}")
    return jsonschema.Draft202012Validator(schema, registry=_definitions())


@functools.cache
def _definitions() -> Registry[Any]:
    definitions: Resource[Any] = Resource.from_contents(_builtin("_definitions"))
    return definitions @ Registry()


def _builtin(name: str) -> Any:
    """A schema of Kubernetes' own objects."""
    file = f"kubernetes-json-schema/v{KUBERNETES}.0-local-strict/{name}.json"
    return schema_contents(file, KUBERNETES)


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [thing for thing in objects if thing["kind"] in kinds]


def workloads(objects: list[Object]) -> list[Object]:
    return of_kind(objects, "Deployment", "StatefulSet")


def workers_of(objects: list[Object]) -> list[Object]:
    return [w for w in workloads(objects) if pod_of(w)["containers"][0]["name"] == "worker"]


def gateway_of(objects: list[Object]) -> Object:
    return next(w for w in workloads(objects) if pod_of(w)["containers"][0]["name"] == "gateway")


def pod_of(workload: Object) -> Object:
    pod: Object = workload["spec"]["template"]["spec"]
    return pod


def labels_of(workload: Object) -> dict[str, str]:
    labels: dict[str, str] = workload["spec"]["template"]["metadata"]["labels"]
    return labels


def container_of(workload: Object) -> Object:
    (container,) = pod_of(workload)["containers"]
    found: Object = container
    return found


def config_text(objects: list[Object]) -> str:
    (config,) = (c for c in of_kind(objects, "ConfigMap") if "loraplex.yaml" in c["data"])
    text: str = config["data"]["loraplex.yaml"]
    return text


def selected(selector: Mapping[str, str], objects: list[Object]) -> list[str]:
    """Names of the workloads whose pods it selects."""
    return [
        w["metadata"]["name"]
        for w in workloads(objects)
        if selector.items() <= labels_of(w).items()
    ]


def env_names(workload: Object) -> Iterator[str]:
    yield from (entry["name"] for entry in container_of(workload)["env"])
