"""Pure. `${NAME}` in a configuration's texts, filled in from the environment; and the Serve
configuration inside a Kubernetes manifest of KubeRay.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from shared.config.document import Document, read_document
from shared.config.section import Finding, Path

_NAME = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^${}]*))?\}")
MANIFEST_KEY = ("spec", "serveConfigV2")


def filled_in(value: Any, env: Mapping[str, str], path: Path = ()) -> tuple[Any, list[Finding]]:
    """The value with every placeholder replaced, and a finding for each that has no value.
    `${NAME:-default}` has one of its own.
    """
    findings: list[Finding] = []
    return _filled(value, env, path, findings), findings


def _filled(value: Any, env: Mapping[str, str], path: Path, findings: list[Finding]) -> Any:
    match value:
        case dict():
            return {k: _filled(v, env, (*path, k), findings) for k, v in value.items()}
        case list():
            return [_filled(v, env, (*path, n), findings) for n, v in enumerate(value)]
        case str() if "${" in value:
            findings += _missing(value, env, path)
            return _NAME.sub(lambda found: env.get(found[1], found[2] or ""), value)
        case _:
            return value


def _missing(text: str, env: Mapping[str, str], path: Path) -> Iterator[Finding]:
    for found in _NAME.finditer(text):
        if found[1] not in env and found[2] is None:
            yield Finding(
                path, f"the environment variable {found[1]} is not set; export it before starting"
            )


def out_of_manifest(document: Document) -> Document:
    """What `spec.serveConfigV2` of a RayService says, with its lines in the file; any other
    document as it is.
    """
    value = document.value
    spec = value.get("spec") if isinstance(value, dict) and "kind" in value else None
    text = spec.get("serveConfigV2") if isinstance(spec, dict) else None
    if not isinstance(text, str):
        return document
    inner = read_document(text, document.source)
    above = document.lines.get(MANIFEST_KEY, 0)
    inner.lines = {path: line + above for path, line in inner.lines.items()}
    return inner
