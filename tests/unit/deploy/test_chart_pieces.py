"""Every piece that the chart promises is there: take one out, and a test here fails."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from tests.unit.deploy.chart import (
    CONFIG,
    ROOT,
    container_of,
    gateway_of,
    labels_of,
    merged,
    of_kind,
    pod_of,
    render,
    selected,
    workers_of,
    workloads,
)
from tests.unit.deploy.chart_matrix import MATRIX, OVERLAYS, rendered, several


@several
def test_only_those_that_must_can_connect_to_a_pod(name: str) -> None:
    """The API is for everyone, or for the clients that the values name. Gateways are linked by
    workers alone, and workers are asked for adapters by workers alone.
    """
    objects = rendered(name)
    values = MATRIX[name].get("networkPolicy", {})
    everyone = {w["metadata"]["name"] for w in workers_of(objects)}
    allowed: dict[str, Any] = {}
    for policy in of_kind(objects, "NetworkPolicy"):
        assert policy["spec"]["policyTypes"] == ["Ingress"]
        for rule in policy["spec"]["ingress"]:
            allowed |= {port["port"]: rule.get("from") for port in rule["ports"]}
    if not allowed:
        assert values == {"enabled": False} or name == "nothing optional"
        return
    assert allowed["http"] == (values.get("clients") or None)
    assert allowed.get("probes") == (values.get("probes") or None)
    for port in ("link-control", "link-data", "peer"):
        (source,) = allowed[port]
        assert set(source) == {"podSelector"}
        assert set(selected(source["podSelector"]["matchLabels"], objects)) == everyone


@several
def test_every_workload_has_what_keeps_it_up_and_a_way_to_be_found(name: str) -> None:
    objects, values = rendered(name), MATRIX[name]
    budgets = {
        target
        for budget in of_kind(objects, "PodDisruptionBudget")
        for target in selected(budget["spec"]["selector"]["matchLabels"], objects)
    }
    every = {w["metadata"]["name"] for w in workloads(objects)}
    assert budgets == (set() if name == "nothing optional" else every)
    gateway = gateway_of(objects)
    scalers = [
        s
        for s in of_kind(objects, "HorizontalPodAutoscaler")
        if s["spec"]["scaleTargetRef"]["name"] == gateway["metadata"]["name"]
    ]
    scales = values.get("gateway", {}).get("autoscaling", {}).get("enabled", True)
    assert len(scalers) == scales == ("replicas" not in gateway["spec"])
    for scaler in scalers:
        assert scaler["spec"]["metrics"][0]["resource"]["name"] == "cpu"
    assert gateway["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    services = {s["metadata"]["name"] for s in of_kind(objects, "Service")}
    for workload in workloads(objects):
        pod = pod_of(workload)
        spread = {c["topologyKey"] for c in pod.get("topologySpreadConstraints", [])}
        zones = {"kubernetes.io/hostname", "topology.kubernetes.io/zone"}
        assert spread == (set() if name == "nothing optional" else zones)
        annotations = workload["spec"]["template"]["metadata"]["annotations"]
        assert re.fullmatch("[0-9a-f]{64}", annotations["loraplex/config"])
        if workload["kind"] == "StatefulSet":
            assert workload["spec"]["serviceName"] in services
            assert workload["spec"]["podManagementPolicy"] == "Parallel"
    leaves_s = container_of(gateway)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert leaves_s == values.get("gateway", {}).get("leaveServiceSeconds", 5)


def test_another_config_replaces_the_pods_one_by_one() -> None:
    before, after = (
        {
            w["metadata"]["name"]: w["spec"]["template"]["metadata"]["annotations"]
            for w in workloads(render({"config": {**CONFIG, "gateway": {"drain_s": drain_s}}}))
        }
        for drain_s in (20, 30)
    )
    assert all(before[name] != after[name] for name in before)


def test_keda_adds_up_over_all_gateways_and_waits_before_it_goes_to_zero() -> None:
    for name, asked in (
        ("keda", {"aggregateFromKubeServiceEndpoints": "true", "aggregationType": "sum"}),
        ("keda by prometheus", {}),
    ):
        (scaled,) = of_kind(rendered(name), "ScaledObject")
        (trigger,) = scaled["spec"]["triggers"]
        assert trigger["metricType"] == "AverageValue"
        assert asked.items() <= trigger["metadata"].items()
        assert scaled["spec"]["cooldownPeriod"] == 600
        if not asked:
            query = trigger["metadata"]["query"]
            assert query.startswith("sum(") and query.endswith(" or vector(0)")
            assert trigger["authenticationRef"] == {"name": "auth"}


def test_a_route_and_an_ingress_lead_from_their_host_to_the_service() -> None:
    (route,) = of_kind(rendered("route"), "HTTPRoute")
    assert route["spec"]["hostnames"] == ["h.example.com"]
    assert route["spec"]["parentRefs"] == [{"name": "public", "namespace": "gateways"}]
    (ingress,) = of_kind(rendered("ingress"), "Ingress")
    assert ingress["spec"]["tls"] == [{"secretName": "t", "hosts": ["h.example.com"]}]
    assert ingress["spec"]["ingressClassName"] == "nginx"
    assert ingress["metadata"]["annotations"] == {"a/b": "c"}
    backends = (
        route["spec"]["rules"][0]["backendRefs"][0]["name"],
        ingress["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]["name"],
    )
    services = of_kind(rendered("route"), "Service")
    for backend in backends:
        (service,) = (s for s in services if s["metadata"]["name"] == backend)
        found = selected(service["spec"]["selector"], rendered("route"))
        assert found == [gateway_of(rendered("route"))["metadata"]["name"]]


def test_what_a_cluster_asks_for_reaches_the_pods() -> None:
    """Placement, identity, secrets of registries and more of everything."""
    objects, values = rendered("everything placed"), OVERLAYS["everything placed"]
    (account,) = of_kind(objects, "ServiceAccount")
    assert account["metadata"]["annotations"] == values["serviceAccount"]["annotations"]
    for workload in workloads(objects):
        is_gateway = workload is gateway_of(objects)
        asked = values["gateway" if is_gateway else "workers"]
        pod, container = pod_of(workload), container_of(workload)
        assert pod["serviceAccountName"] == account["metadata"]["name"] == "sa"
        assert values["podLabels"].items() <= labels_of(workload).items()
        assert pod["imagePullSecrets"] == [{"name": "pull"}]
        assert pod["priorityClassName"] == "high" and pod["nodeSelector"] == {"a": "b"}
        assert pod["affinity"] == asked["affinity"] and pod["tolerations"]
        annotations = workload["spec"]["template"]["metadata"]["annotations"]
        assert asked["podAnnotations"].items() <= annotations.items()
        assert {"name": "A", "value": "b"} in container["env"]
        assert asked["extraEnvFrom"][0] in container["envFrom"]
        assert asked["extraVolumes"][0] in pod["volumes"]
        assert asked["extraVolumeMounts"][0] in container["volumeMounts"]
        assert container["resources"]["requests"]
        assert is_gateway or pod["runtimeClassName"] == "nvidia"


def test_a_start_may_take_as_long_as_the_values_say() -> None:
    for workload in workloads(render({"workers": {"startupSeconds": 900}})):
        probe = container_of(workload)["startupProbe"]
        assert probe["periodSeconds"] * probe["failureThreshold"] == 900


@several
def test_workers_have_shared_memory_and_their_caches(name: str) -> None:
    for workload in workers_of(rendered(name)):
        mounts = {m["mountPath"] for m in container_of(workload)["volumeMounts"]}
        assert {"/dev/shm", "/tmp", "/var/lib/loraplex", "/var/cache/loraplex"} <= mounts
        shared = next(v for v in pod_of(workload)["volumes"] if v["name"] == "shared-memory")
        assert shared["emptyDir"]["medium"] == "Memory"


# ---- monitoring ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tls", [False, True])
def test_prometheus_finds_every_gateway_under_the_job_that_the_alerts_know(tls: bool) -> None:
    objects = render(merged(OVERLAYS["monitoring"], OVERLAYS["tls"] if tls else {}))
    (monitor,) = of_kind(objects, "PodMonitor")
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    gateway = gateway_of(objects)
    found = selected(monitor["spec"]["selector"]["matchLabels"], objects)
    assert found == [gateway["metadata"]["name"]]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in {p["name"] for p in container_of(gateway)["ports"]}
    assert endpoint.get("scheme", "http") == ("https" if tls else "http")
    job = next(r["replacement"] for r in endpoint["relabelings"] if r["targetLabel"] == "job")
    assert f'job="{job}"' in (ROOT / "deploy/prometheus/alerts.yml").read_text()


def test_the_alerts_and_the_dashboard_are_those_of_deploy() -> None:
    objects = render(OVERLAYS["monitoring"])
    (rule,) = of_kind(objects, "PrometheusRule")
    alerts = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())
    assert rule["spec"] == alerts and rule["metadata"]["labels"]["release"] == "prometheus"
    shown = next(c for c in of_kind(objects, "ConfigMap") if "loraplex.json" in c["data"])
    dashboard = ROOT / "deploy/grafana/dashboards/loraplex.json"
    assert json.loads(shown["data"]["loraplex.json"]) == json.loads(dashboard.read_text())
    assert shown["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_what_needs_kinds_of_others_is_made_only_when_asked_for() -> None:
    kinds = {thing["kind"] for thing in render()}
    assert not kinds & {"PodMonitor", "PrometheusRule", "ScaledObject", "HTTPRoute", "Ingress"}
