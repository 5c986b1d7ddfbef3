"""Pure. Finds the Serve configuration inside a Kubernetes manifest of KubeRay."""

from __future__ import annotations

from shared.config.document.yaml_document import Document, read_document

MANIFEST_KEY = ("spec", "serveConfigV2")


def out_of_manifest(document: Document) -> Document:
    """The contents of `spec.serveConfigV2` of a RayService, with their lines in the file. Any other
    document is returned as it is.
    """
    value = document.value
    spec = value.get("spec") if isinstance(value, dict) and "kind" in value else None
    inside = spec.get("serveConfigV2") if isinstance(spec, dict) else None
    if isinstance(inside, dict):
        depth = len(MANIFEST_KEY)
        lines = {p[depth:]: n for p, n in document.lines.items() if p[:depth] == MANIFEST_KEY}
        quoted = {p[depth:] for p in document.quoted if p[:depth] == MANIFEST_KEY}
        return Document(document.source, inside, lines, document.problems, quoted)
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
