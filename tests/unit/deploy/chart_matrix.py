"""Sets of values for the chart: each alone, and each beside four others."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from tests.unit.deploy.chart import CONFIG, EXAMPLES, Object, example, merged, render

SCALES = {
    "config": {
        "llm_configs": [
            merged(
                CONFIG["llm_configs"][0],
                {"deployment_config": {"num_replicas": "auto"}},
            )
        ]
    }
}
OVERLAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deployment": {"workers": {"kind": "Deployment"}},
    "volumes": {
        "workers": {
            "adapterCache": {"persistent": True, "storageClass": "fast"},
            "modelCache": {"persistent": True},
        }
    },
    "shared models": {"workers": {"kind": "Deployment", "modelCache": {"existingClaim": "models"}}},
    "keys": {
        "apiKeys": {"values": ["a-key", "another"]},
        "adminKeys": {"existingSecret": "mine"},
        "keysFile": {"existingSecret": "keys"},
    },
    "secrets of mine": {
        "link": {"existingSecret": "mine", "key": "link"},
        "store": {"existingSecret": "bucket", "googleKey": {"existingSecret": "google"}},
    },
    "bucket": {"store": {"credentials": {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "s"}}},
    "keda": {**SCALES, "scaling": {"by": "keda"}},
    "keda by prometheus": {
        **SCALES,
        "scaling": {
            "by": "keda",
            "keda": {
                "source": "prometheus",
                "prometheus": {"serverAddress": "http://p:9090", "authenticationRef": "auth"},
            },
        },
    },
    "hpa": {**SCALES, "scaling": {"by": "hpa"}},
    "ingress": {
        "ingress": {
            "enabled": True,
            "className": "nginx",
            "host": "h.example.com",
            "tlsSecret": "t",
            "annotations": {"a/b": "c"},
        }
    },
    "ingress of any host": {"ingress": {"enabled": True}},
    "route": {
        "httpRoute": {
            "enabled": True,
            "parentRefs": [{"name": "public", "namespace": "gateways"}],
            "hostnames": ["h.example.com"],
        }
    },
    "nothing optional": {
        "gateway": {"autoscaling": {"enabled": False}, "topologySpread": False},
        "workers": {"topologySpread": False, "tolerations": []},
        "networkPolicy": {"enabled": False},
        "podDisruptionBudget": {"enabled": False},
        "serviceAccount": {"create": False},
    },
    "everything placed": {
        "podLabels": {"azure.workload.identity/use": "true"},
        "serviceAccount": {"name": "sa", "annotations": {"eks.amazonaws.com/role-arn": "arn"}},
        "image": {"registry": "r.example.com/x/", "tag": "9", "pullSecrets": [{"name": "pull"}]},
        "gateway": {
            "nodeSelector": {"a": "b"},
            "tolerations": [{"operator": "Exists"}],
            "affinity": {"podAntiAffinity": {}},
            "priorityClassName": "high",
            "podAnnotations": {"prometheus.io/scrape": "true"},
            "extraEnv": [{"name": "A", "value": "b"}],
            "extraEnvFrom": [{"secretRef": {"name": "proxy"}}],
            "extraVolumes": [{"name": "tls", "secret": {"secretName": "tls"}}],
            "extraVolumeMounts": [{"name": "tls", "mountPath": "/tls", "readOnly": True}],
            "service": {"type": "LoadBalancer", "annotations": {"x": "y"}},
        },
        "workers": {
            "nodeSelector": {"a": "b"},
            "affinity": {"podAntiAffinity": {}},
            "runtimeClassName": "nvidia",
            "priorityClassName": "high",
            "podAnnotations": {"x": "y"},
            "extraEnv": [{"name": "A", "value": "b"}],
            "extraEnvFrom": [{"secretRef": {"name": "hugging-face"}}],
            "extraVolumes": [{"name": "m", "persistentVolumeClaim": {"claimName": "m"}}],
            "extraVolumeMounts": [{"name": "m", "mountPath": "/models"}],
        },
        "networkPolicy": {
            "clients": [{"namespaceSelector": {}}],
            "probes": [{"ipBlock": {"cidr": "10.0.0.0/8"}}],
        },
    },
    "monitoring": {
        "monitoring": {
            "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
            "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
            "dashboard": {"enabled": True},
        }
    },
    "tls": {"config": {**CONFIG, "gateway": {"tls": {"certificate": "/c", "key": "/k"}}}},
}
APART = (1, 5)
"""Each set of values with the ones so many places after it: every one meets four others."""


def pairs() -> Iterator[tuple[str, str]]:
    names = list(OVERLAYS)
    for n, apart in itertools.product(range(len(names)), APART):
        pair = (names[n], names[(n + apart) % len(names)])
        if set(pair) not in ({"deployment", "volumes"}, {"volumes", "shared models"}):
            yield pair


MATRIX: dict[str, dict[str, Any]] = {
    **OVERLAYS,
    **{f"{a} + {b}": merged(OVERLAYS[a], OVERLAYS[b]) for a, b in pairs()},
    **{path.stem: example(path) for path in EXAMPLES},
}
RENDERED: dict[str, list[Object]] = {}


def rendered(name: str) -> list[Object]:
    if name not in RENDERED:
        RENDERED[name] = render(MATRIX[name])
    return RENDERED[name]


every = pytest.mark.parametrize("name", MATRIX)
several = pytest.mark.parametrize("name", [*OVERLAYS, *(path.stem for path in EXAMPLES)])
