"""Pure. Turns YAML text into plain values, with the line of every key. No other module imports
yaml.

It is stricter than YAML. Duplicate keys are refused. Only text, numbers, booleans and null exist.
Aliases may not expand a file beyond MAX_NODES.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.constructor import SafeConstructor
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from shared.config.section import Path, dotted, shown

MAX_CHARS = 1 << 20  # a configuration file of a megabyte is a mistake
MAX_NODES = 50_000  # aliases can expand a small file to an enormous one
MAX_DEPTH = 50  # ours are about 8 deep

_TAG = "tag:yaml.org,2002:"
# dates and `=` are read as text
_START = yaml.Mark("", 0, 0, 0, None, 0)
_TEXT_TAGS = {_TAG + name for name in ("str", "timestamp", "value")}


@dataclass(slots=True)
class Document:
    """The contents of a file. `problems` are complete lines for the user. If there are any, `value`
    is incomplete.
    """

    source: str
    value: Any = None
    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    quoted: set[Path] = field(default_factory=set)
    """Values that stand in quotes."""


def read_scalar(text: str) -> Any:
    """What YAML reads where this text stands without quotes, if that is a number, true or false.
    Everything else is the text itself.
    """
    loader: Any = yaml.SafeLoader("")
    tag = loader.resolve(ScalarNode, text, (True, False))
    if tag not in (_TAG + "int", _TAG + "float", _TAG + "bool"):
        return text
    document = Document("")
    value = _Builder(document).build(ScalarNode(tag, text, _START, _START), ())
    return text if document.problems else value


def read_document(text: str, source: str) -> Document:
    """Reads the text. It never raises: what is wrong with the file is in `problems`. Of several
    documents in one file it is the one with a Serve configuration, as in manifests of Kubernetes.
    """
    document = Document(source)
    if len(text) > MAX_CHARS:
        document.problems.append(
            f"{source}: is larger than {MAX_CHARS} characters; is this the right file?"
        )
        return document
    if _is_json(text):
        text = text.replace("\t", " ")  # in JSON they stand between values only
    try:
        nodes = [node for node in yaml.compose_all(text, Loader=yaml.SafeLoader) if _says(node)]
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        place = source if mark is None else f"{source}:{mark.line + 1}"
        hint = _began(exc, mark) + _hint(text, mark)
        document.problems.append(f"{place}: not valid YAML: {exc.problem or exc.context}{hint}")
    except yaml.YAMLError as exc:
        document.problems.append(f"{source}: not valid YAML: {' '.join(str(exc).split())}")
    except RecursionError:
        document.problems.append(f"{source}: is nested too deeply")
    except (ValueError, OverflowError):
        # PyYAML lets errors of int() and chr() through for malformed directives and escapes.
        document.problems.append(
            f"{source}: not valid YAML: a malformed number, escape or directive"
        )
    else:
        if len(nodes) > 1:
            nodes = [node for node in nodes if _holds_serve_config(node)] or nodes
        if len(nodes) > 1:
            document.problems.append(
                f"{source}:{nodes[1].start_mark.line + 1}: a second document begins here; a file "
                "may hold one configuration"
            )
        elif nodes:
            document.value = _Builder(document).build(nodes[0], ())
    return document


def _is_json(text: str) -> bool:
    """Whether it is JSON, which may be indented with tabs. YAML may not."""
    if not text.lstrip().startswith("{"):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _hint(text: str, mark: yaml.Mark | None) -> str:
    """What to do about a line that is no YAML, where people often write such lines."""
    line = "".join(text.splitlines()[mark.line : mark.line + 1]) if mark is not None else ""
    if "${" in line:
        return "; inside { } put ${...} in quotes"
    if "{{" in line:
        return f"; {TEMPLATE}"
    return "; indent with spaces, not with tabs" if "\t" in line else ""


def _began(exc: yaml.MarkedYAMLError, mark: yaml.Mark | None) -> str:
    """Where the thing began that has no right end. A quote that is never closed is noticed lines
    later.
    """
    began = exc.context_mark
    if began is None or mark is None or exc.problem is None or began.line == mark.line:
        return ""
    return f" {exc.context} that begins in line {began.line + 1}"


TEMPLATE = "is {{ ... }} of a template left to be filled in?"


def _says(node: Node | None) -> bool:
    """Whether there is anything between two lines of `---`."""
    return node is not None and not (isinstance(node, ScalarNode) and not node.value)


def _holds_serve_config(node: Node) -> bool:
    """Whether a manifest has `spec.serveConfigV2`."""
    for key in ("spec", "serveConfigV2"):
        pairs = node.value if isinstance(node, MappingNode) else ()
        found = next((value for name, value in pairs if name.value == key), None)
        if found is None:
            return False
        node = found
    return True


class _Builder:
    """Walks the nodes of one document, and fills in its values, lines and problems."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._nodes = 0

    def build(self, node: Node, path: Path) -> Any:
        self._nodes += 1
        if self._nodes > MAX_NODES or len(path) > MAX_DEPTH:
            if self._nodes <= MAX_NODES + 1:
                self._nodes = MAX_NODES + 1  # reported once; the rest is skipped
                self._problem(
                    node, path, "the file is too large or too deep once its aliases are expanded"
                )
            return None
        self._document.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, MappingNode):
            return self._mapping(node, path)
        if isinstance(node, SequenceNode):
            if node.tag != _TAG + "seq":
                return self._problem(
                    node, path, f"the tag {node.tag.removeprefix(_TAG)} is not supported"
                )
            return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        assert isinstance(node, ScalarNode)
        return self._scalar(node, path)

    def _mapping(self, node: MappingNode, path: Path) -> dict[str, Any]:
        if node.tag != _TAG + "map":
            self._problem(node, path, f"the tag {node.tag.removeprefix(_TAG)} is not supported")
            return {}
        value = {}
        for key, (key_node, value_node) in self._pairs(node, path).items():
            here = (*path, key)
            self._document.lines[here] = key_node.start_mark.line + 1
            value[key] = self.build(value_node, here)
        return value

    def _pairs(self, node: MappingNode, path: Path, depth: int = 0) -> dict[str, tuple[Node, Node]]:
        """The entries of a mapping. Its own entries override those merged in with `<<`."""
        own: dict[str, tuple[Node, Node]] = {}
        merged: dict[str, tuple[Node, Node]] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                merged = self._merged(value_node, path, depth) | merged
                continue
            if not isinstance(key_node, ScalarNode) or key_node.tag not in _TEXT_TAGS:
                what = TEMPLATE if isinstance(key_node, MappingNode) else "put it in quotes"
                self._problem(key_node, path, f"expected a key that is text; {what}")
                continue
            key = self._scalar(key_node, path)
            if not isinstance(key, str):
                continue
            if key in own:
                first = own[key][0].start_mark.line + 1
                self._problem(
                    key_node,
                    (*path, key),
                    f"the key stands twice (first in line {first}); remove one",
                )
            else:
                own[key] = (key_node, value_node)
        return merged | own

    def _merged(self, node: Node, path: Path, depth: int) -> dict[str, tuple[Node, Node]]:
        sources = node.value if isinstance(node, SequenceNode) else [node]
        pairs: dict[str, tuple[Node, Node]] = {}
        for source in sources:
            self._nodes += 1
            if not isinstance(source, MappingNode) or depth > MAX_DEPTH or self._nodes > MAX_NODES:
                self._problem(node, path, "<< takes a mapping or a list of mappings, not itself")
                return pairs
            # the first of several merged mappings wins, as YAML says
            pairs = self._pairs(source, path, depth + 1) | pairs
        return pairs

    def _scalar(self, node: ScalarNode, path: Path) -> Any:
        text = node.value
        if node.style is not None:
            self._document.quoted.add(path)
        if any(0xD800 <= ord(c) <= 0xDFFF for c in text):
            return self._problem(
                node, path, "contains half of a surrogate pair, which is no character"
            )
        if node.tag in _TEXT_TAGS:
            return text
        try:
            match node.tag.removeprefix(_TAG):
                case "null":
                    return None
                case "bool":
                    return SafeConstructor.bool_values[text.lower()]
                case "int":
                    return SafeConstructor().construct_yaml_int(node)
                case "float":
                    return SafeConstructor().construct_yaml_float(node)
        except (ValueError, KeyError, IndexError, OverflowError, yaml.YAMLError):
            return self._problem(
                node,
                path,
                f"{shown(text)} cannot be read as YAML's "
                f"{node.tag.removeprefix(_TAG)}; put it in quotes",
            )
        return self._problem(
            node,
            path,
            f"the tag {shown(node.tag.removeprefix(_TAG))} is not supported; write "
            "text, a number or true/false",
        )

    def _problem(self, node: Node, path: Path, text: str) -> None:
        key = dotted(path)
        self._document.problems.append(
            f"{self._document.source}:{node.start_mark.line + 1}: {key + ': ' if key else ''}{text}"
        )
