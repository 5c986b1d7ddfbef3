"""Pure. Finds the Serve configuration inside a Kubernetes manifest of KubeRay."""

from __future__ import annotations

from typing import Any

from shared.config.document.yaml_document import Document, read_document
from shared.config.section import Path

MANIFEST_KEY = ("spec", "serveConfigV2")


def out_of_manifest(document: Document) -> Document:
    """The contents of `spec.serveConfigV2` of a RayService, with their lines in the file. It may be
    an item of a List, as `kubectl get rayservice -o yaml` writes it. Any other document is returned
    as it is.
    """
    document = _out_of_list(document)
    value = document.value
    spec = value.get("spec") if isinstance(value, dict) and "kind" in value else None
    inside = spec.get("serveConfigV2") if isinstance(spec, dict) else None
    if isinstance(inside, dict):
        return _part(document, MANIFEST_KEY, inside)
    if inside is None and isinstance(value, dict) and {"apiVersion", "kind"} <= {*value}:
        name = ".".join(MANIFEST_KEY)
        problem = f"{document.source}: {name} is missing; expected a RayService of KubeRay"
        return Document(document.source, problems=[*document.problems, problem])
    if not isinstance(inside, str):
        return document
    above = document.lines.get(MANIFEST_KEY, 0)
    inner = read_document("\n" * above + inside, document.source)
    if inner.value is None and not inner.problems:
        name = ".".join(MANIFEST_KEY)
        inner.problems.append(
            f"{document.source}:{above}: {name}: is empty; expected applications: with one entry"
        )
    return inner


def _out_of_list(document: Document) -> Document:
    """The one item with a Serve configuration, if the document is a List of Kubernetes."""
    value = document.value
    items = value.get("items") if isinstance(value, dict) and value.get("kind") == "List" else None
    if not isinstance(items, list):
        return document
    found = [(n, item) for n, item in enumerate(items) if _holds_serve_config(item)]
    if len(found) > 1:
        path: Path = ("items", found[1][0])
        problem = (
            f"{document.source}:{document.lines.get(path, 0)}: items[{found[1][0]}]: a second "
            "RayService; a file may hold one configuration"
        )
        return Document(document.source, problems=[*document.problems, problem])
    return _part(document, ("items", found[0][0]), found[0][1]) if found else document


def _holds_serve_config(item: object) -> bool:
    spec = item.get("spec") if isinstance(item, dict) else None
    return isinstance(spec, dict) and "serveConfigV2" in spec


def _part(document: Document, path: Path, value: Any) -> Document:
    """What stands at `path`, as a document of its own, with its lines in the file."""
    depth = len(path)
    lines = {p[depth:]: n for p, n in document.lines.items() if p[:depth] == path}
    quoted = {p[depth:] for p in document.quoted if p[:depth] == path}
    return Document(document.source, value, lines, document.problems, quoted)
