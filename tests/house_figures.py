"""Shell. `python -m tests.house_figures [CHECKOUT]`: the figures of the tree, as the table in
docs/notes/2026-11-28-house.md has them. Only files that git tracks are counted.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.harness import ROOT
from tests.unit.docs.prose import prose

PRODUCT = ("gateway", "worker", "shared")
COLUMNS = 100
LONG_MODULE = 400
BINARY = {".png", ".safetensors"}


class Tree:
    """The tracked files of a checkout, read once."""

    def __init__(self, root: Path) -> None:
        listed = subprocess.run(
            ["git", "-C", str(root), "ls-files", "-z"], capture_output=True, text=True, check=True
        )
        self.paths = [Path(p) for p in listed.stdout.split("\0") if p and (root / p).is_file()]
        self.text = {
            p: (root / p).read_text("utf-8", "replace")
            for p in self.paths
            if p.suffix not in BINARY
        }
        self.python = {p: ast.parse(t) for p, t in self.text.items() if p.suffix == ".py"}

    def below(self, *packages: str) -> dict[Path, ast.Module]:
        return {p: t for p, t in self.python.items() if p.parts[0] in packages}

    def lines(self, *packages: str) -> int:
        return sum(self.text[p].count("\n") for p in self.below(*packages))


def folders(tree: Tree, package: str) -> str:
    count = Counter(p.parent for p in tree.below(package))
    fullest, most = count.most_common(1)[0]
    return f"{sum(count.values())}, {most} (`{fullest}`), {len(count)}"


def floors(tree: Tree, package: str) -> str:
    """Rooms are the sub-packages and modules directly below the package. Imports that only type
    checkers see do not count.
    """
    arrows: dict[str, set[str]] = {}
    for path, module in tree.below(package).items():
        mine = _room(path)
        if not mine:
            continue
        others = {name.split(".")[1] for name in imports(module) if name.startswith(f"{package}.")}
        arrows.setdefault(mine, set()).update(others - {mine})

    @functools.cache
    def height(room: str) -> int:
        return 1 + max((height(below) for below in arrows.get(room, ())), default=0)

    return f"{len(arrows)}, {max(map(height, arrows))}, {sum(map(len, arrows.values()))}"


def imports(module: ast.Module) -> Iterator[str]:
    typing = {
        id(below)
        for node in ast.walk(module)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for below in ast.walk(node)
    }
    for node in ast.walk(module):
        if id(node) in typing:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            packages = "." not in node.module
            yield from (
                f"{node.module}.{alias.name}" if packages else node.module for alias in node.names
            )


def _room(path: Path) -> str:
    return path.parts[1].removesuffix(".py") if path.name != "__init__.py" or path.parts[2:] else ""


def functions(modules: dict[Path, ast.Module]) -> Iterator[tuple[int, Path, ast.AST]]:
    for path, module in modules.items():
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield (node.end_lineno or node.lineno) - node.lineno + 1, path, node


def longest(modules: dict[Path, ast.Module]) -> str:
    lines, path, node = max(functions(modules), key=lambda found: found[0])
    return f"{lines} lines (`{path}`, `{getattr(node, 'name', '')}`)"


def constructors(modules: dict[Path, ast.Module]) -> str:
    """The arguments of `__init__`, without `self`."""
    found = [
        (len(node.args.args) + len(node.args.kwonlyargs) - 1, path.name)
        for _, path, node in functions(modules)
        if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    ]
    return ", ".join(f"{count} (`{name}`)" for count, name in sorted(found, reverse=True)[:3])


def classes_twice(modules: dict[Path, ast.Module]) -> int:
    names = Counter(
        node.name
        for m in modules.values()
        for node in ast.walk(m)
        if isinstance(node, ast.ClassDef)
    )
    return sum(count > 1 for count in names.values())


def wide(text: str) -> int:
    return sum(len(line) > COLUMNS for line in text.split("\n"))


def wide_outside_tables(text: str) -> int:
    return wide("\n".join(x for x in text.split("\n") if not x.lstrip().startswith("|")))


def rows(tree: Tree) -> Iterator[tuple[str, str]]:
    for package in (*PRODUCT, "tests", "bench"):
        yield f"{package}: modules, in the fullest folder, folders", folders(tree, package)
    for package in PRODUCT:
        yield f"{package}: rooms, floors of imports, arrows", floors(tree, package)
    product = tree.below(*PRODUCT)
    yield "longest function of the product", longest(product)
    yield "longest function of the tree", longest(tree.python)
    yield "constructors of the product with most arguments", constructors(product)
    yield "class names used twice in the product", str(classes_twice(product))
    size = {p: tree.text[p].count("\n") for p in product}
    last = max(size, key=lambda p: size[p])
    yield "longest module of the product", f"{size[last]} lines (`{last}`)"
    yield (
        f"modules of the product over {LONG_MODULE} lines",
        str(sum(lines > LONG_MODULE for lines in size.values())),
    )
    python = "\n".join(tree.text[p] for p in tree.python)
    yield "Python lines over 100 columns", f"{wide(python)} of {python.count(chr(10)):,}"
    pages = [p for p in tree.text if p.name == "README.md" or p.parent == Path("docs")]
    yield (
        "lines of README and manuals over 100 columns, tables aside",
        str(sum(wide_outside_tables(tree.text[p]) for p in pages if p.suffix == ".md")),
    )
    yield "lines of product code (Python)", f"{tree.lines('loraplex', *PRODUCT):,}"
    yield "lines of tests (Python)", f"{tree.lines('tests'):,}"
    yield "lines of the tree (text)", f"{sum(t.count(chr(10)) for t in tree.text.values()):,}"
    yield "files of the tree", f"{len(tree.paths):,}"
    for page in sorted(pages):
        if page.suffix == ".md" and page.parts[0] in ("README.md", "docs"):
            found = prose(tree.text[page])
            yield (
                f"`{page}`: lines, words a sentence, over 25, over 35",
                f"{tree.text[page].count(chr(10))}, {found.words_per_sentence:.1f}, "
                f"{found.share_over(25):.0%}, {found.share_over(35):.0%}",
            )


if __name__ == "__main__":
    for what, value in rows(Tree(Path(sys.argv[1]) if sys.argv[1:] else ROOT)):
        print(f"| {what} | {value} |")
