"""Pure. YAML text -> plain values, with the line of every key. The only `import yaml`.

Stricter than YAML: duplicate keys are refused, only text, numbers, booleans and null exist, aliases
may not grow a file beyond measure.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.constructor import SafeConstructor
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from shared.config.section import Path, dotted, shown

MAX_CHARS = 1 << 20  # a configuration file of a megabyte is a mistake
MAX_NODES = 50_000  # aliases can expand a small file to an enormous one
MAX_DEPTH = 50  # ours is about 8 deep

_TAG = "tag:yaml.org,2002:"
_TEXT_TAGS = {_TAG + name for name in ("str", "timestamp", "value")}  # dates and `=` are text to us


@dataclass(slots=True)
class Document:
    """What a file says. `problems` are finished lines; with any, `value` is incomplete."""

    source: str
    value: Any = None
    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_document(text: str, source: str) -> Document:
    """Never raises: what is wrong with the file is in `problems`."""
    document = Document(source)
    if len(text) > MAX_CHARS:
        document.problems.append(
            f"{source}: is larger than {MAX_CHARS} characters; is this the right file?"
        )
        return document
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        place = source if mark is None else f"{source}:{mark.line + 1}"
        document.problems.append(f"{place}: not valid YAML: {exc.problem or exc.context}")
    except yaml.YAMLError as exc:
        document.problems.append(f"{source}: not valid YAML: {' '.join(str(exc).split())}")
    except RecursionError:
        document.problems.append(f"{source}: is nested too deeply")
    except (ValueError, OverflowError):
        # PyYAML lets int() and chr() fail on malformed directives and escapes
        document.problems.append(
            f"{source}: not valid YAML: a malformed number, escape or directive"
        )
    else:
        if node is not None:
            document.value = _Builder(document).build(node, ())
    return document


class _Builder:
    """Walks the nodes of one document; fills in its values, lines and problems."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._nodes = 0

    def build(self, node: Node, path: Path) -> Any:
        self._nodes += 1
        if self._nodes > MAX_NODES or len(path) > MAX_DEPTH:
            if self._nodes <= MAX_NODES + 1:
                self._nodes = MAX_NODES + 1  # say it once, then skip the rest
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
        """The entries of a mapping, its own ones over those merged in with `<<`."""
        own: dict[str, tuple[Node, Node]] = {}
        merged: dict[str, tuple[Node, Node]] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                merged = self._merged(value_node, path, depth) | merged
                continue
            if not isinstance(key_node, ScalarNode) or key_node.tag not in _TEXT_TAGS:
                self._problem(key_node, path, "expected a key that is text; put it in quotes")
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
            # the first of several wins, as YAML has it
            pairs = self._pairs(source, path, depth + 1) | pairs
        return pairs

    def _scalar(self, node: ScalarNode, path: Path) -> Any:
        text = node.value
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
