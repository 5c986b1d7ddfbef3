"""Lines fit on a screen beside another file: 100 columns, in whatever language."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.harness import ROOT

COLUMNS = 100
FOLDERS = ("loraplex", "gateway", "worker", "shared", "bench", "tests", "deploy", "docs")
FOLDERS += ("examples", ".ci", ".github")
AT_THE_TOP = ("*.md", "*.yml", "*.toml", "Makefile", ".editorconfig", ".pre-commit-config.yaml")
DATA = {".json", ".lock", ".png", ".safetensors", ".svg", ".pyc"}
"""Kinds of files whose lines nobody can break, or which a tool writes."""
NOT_OURS = ("bench/results/", "gateway/dashboard/static/vendor/")
"""Results as their commands printed them, and what others have written."""
ONE_LINE_EACH = "examples/demo/corpus.py"
"""Texts of which each is one example to train on."""


def sources() -> list[Path]:
    found = [p for pattern in AT_THE_TOP for p in ROOT.glob(pattern)]
    found += [p for folder in FOLDERS for p in (ROOT / folder).rglob("*")]
    paths = (p.relative_to(ROOT) for p in found if p.is_file() and p.suffix not in DATA)
    return [p for p in paths if not p.as_posix().startswith((*NOT_OURS, ONE_LINE_EACH))]


def test_lines_have_at_most_a_hundred_columns() -> None:
    """A row of a Markdown table is exempt, because it cannot be broken."""
    files = sources()
    assert {".py", ".md", ".yaml", ".yml", ".js", ".tpl", ".sh"} <= {p.suffix for p in files}
    long = [
        f"{path}:{number}: {len(line)} columns"
        for path in files
        for number, line in enumerate((ROOT / path).read_text("utf-8").split("\n"), 1)
        if len(line) > COLUMNS and not (path.suffix == ".md" and line.lstrip().startswith("|"))
    ]
    assert long == []


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_commits_that_blame_passes_over_are_in_the_history() -> None:
    if git("rev-parse", "--is-shallow-repository").stdout.strip() != "false":
        pytest.skip("the history is not here")
    lines = (ROOT / ".git-blame-ignore-revs").read_text("utf-8").splitlines()
    revisions = [line for line in lines if not line.startswith("#")]
    lost = [r for r in revisions if git("merge-base", "--is-ancestor", r, "HEAD").returncode]
    assert revisions and lost == []
