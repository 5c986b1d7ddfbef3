"""Shell. `python deploy/chart_page.py`: writes docs/CHART.md, the page of the chart's values, from
the chart's own values.schema.json and values.yaml. It also copies the alerts and the dashboard into
the chart, since Helm reads no file outside of it.
"""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "deploy/chart"
PAGE = ROOT / "docs/CHART.md"
COPIED = ("prometheus/alerts.yml", "grafana/dashboards/loraplex.json")
"""Below deploy/."""
UNBROKEN: Mapping[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
HEAD = """\
# Values of the Helm chart

For whoever installs `deploy/chart`. [DEPLOY.md](DEPLOY.md#kubernetes) says how, with examples.
This page is made from `deploy/chart/values.schema.json` by `make chart-page`. Helm refuses values
that are not listed here.
"""


def page() -> str:
    schema = json.loads((CHART / "values.schema.json").read_text("utf-8"))
    values = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
    rooms = [_room(k, s, values.get(k)) for k, s in schema["properties"].items() if k != "global"]
    return "\n".join([HEAD, *rooms])


def _room(key: str, schema: Mapping[str, Any], value: Any) -> str:
    rows = list(_rows(f"{key}.", schema, value))
    text = f"## {key}\n\n{textwrap.fill(schema['description'], 100, **UNBROKEN)}\n"
    if not rows:
        return f"{text}\nDefault: {_shown(value)}.\n"
    table = "\n".join(f"| `{name}` | {default} | {what} |" for name, default, what in rows)
    return f"{text}\n| value | default | meaning |\n|---|---|---|\n{table}\n"


def _rows(prefix: str, schema: Mapping[str, Any], value: Any) -> Iterator[tuple[str, str, str]]:
    for key, below in schema.get("properties", {}).items():
        given = value.get(key) if isinstance(value, Mapping) else None
        if "properties" in below and not _is_resources(below):
            yield from _rows(f"{prefix}{key}.", below, given)
        else:
            yield f"{prefix}{key}", _shown(given), below["description"]


def _is_resources(schema: Mapping[str, Any]) -> bool:
    """Requests and limits are one value here, as users know them."""
    return set(schema["properties"]) == {"requests", "limits"}


def _shown(value: Any) -> str:
    if value in ("", None, {}, []):
        return "empty"
    return f"`{json.dumps(value) if isinstance(value, dict | list | bool) else value}`"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
    for copied in COPIED:
        shutil.copyfile(ROOT / "deploy" / copied, CHART / "files" / Path(copied).name)
