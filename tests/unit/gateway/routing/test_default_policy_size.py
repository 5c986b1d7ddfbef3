"""Pure. The default policy stays one that is read in ten minutes."""

from __future__ import annotations

import ast
from pathlib import Path

import gateway.routing.expected_ttft as default_policy

MOST_LINES, MOST_CONSTANTS = 400, 10


def test_it_has_400_lines_and_10_constants_at_most() -> None:
    modules = [p.read_text() for p in Path(default_policy.__file__).parent.glob("*.py")]
    constants = [
        target.id
        for text in modules
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name) and isinstance(node.value.value, int | float)
    ]
    assert sum(len(text.splitlines()) for text in modules) <= MOST_LINES
    assert 0 < len(constants) <= MOST_CONSTANTS, constants
