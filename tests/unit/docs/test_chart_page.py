"""docs/CHART.md says what the chart's schema and values say."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[3]


def generated() -> str:
    spec = importlib.util.spec_from_file_location("chart_page", ROOT / "deploy/chart_page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.page())


def test_the_page_of_the_charts_values_is_the_one_that_its_schema_makes() -> None:
    assert (ROOT / "docs/CHART.md").read_text("utf-8") == generated(), "run `make chart-page`"


def paths(schema: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for key, below in schema.get("properties", {}).items():
        yield f"{prefix}{key}", below
        yield from paths(below, f"{prefix}{key}.")


def test_every_value_has_a_description_and_every_default_stands_in_the_schema() -> None:
    schema = json.loads((ROOT / "deploy/chart/values.schema.json").read_text("utf-8"))
    values = yaml.safe_load((ROOT / "deploy/chart/values.yaml").read_text("utf-8"))
    found = dict(paths(schema))
    assert [p for p, s in found.items() if "description" not in s] == [
        f"{room}.resources.{kind}"
        for room in ("gateway", "workers")
        for kind in ("requests", "limits")
    ]
    assert set(schema["properties"]) - {"global"} == set(values)
    assert schema["properties"]["models"]["additionalProperties"]["properties"].keys() == (
        values["workers"].keys()
    )
