"""Shell. Hook of mkdocs.yml: README becomes the home page, and the files outside docs/ that
a page links to (pictures, tables of results, CONTRIBUTING) come along, at their place in the tree.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
HOME = {"README.md": "index.md"}
_LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Adds README and every file outside docs/ that is linked, those that they link to included."""
    open_paths = ["README.md", *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    seen = set(open_paths)
    files.append(_outside(config, "README.md"))
    while open_paths:
        page = open_paths.pop()
        for target in _targets(page):
            if target in seen or target.startswith("docs/") or not (ROOT / target).is_file():
                continue
            seen.add(target)
            files.append(_outside(config, target))
            if target.endswith(".md"):
                open_paths.append(target)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links are written for the tree; on the site each page and file has its own place."""
    source = _in_tree(page.file.src_uri)
    here = posixpath.dirname(page.file.src_uri)

    def on_site(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        return match[1] + posixpath.relpath(_on_site(target), here or ".")

    return _LINK.sub(on_site, markdown)


def _targets(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    folder = posixpath.dirname(page)
    return [posixpath.normpath(posixpath.join(folder, m[2])) for m in _LINK.finditer(text)]


def _outside(config: Any, path: str) -> File:
    return File.generated(config, _on_site(path), abs_src_path=str(ROOT / path))


def _on_site(path: str) -> str:
    return HOME.get(path, path.removeprefix("docs/"))


def _in_tree(src_uri: str) -> str:
    if src_uri in HOME.values():
        return next(path for path, place in HOME.items() if place == src_uri)
    return src_uri if not (ROOT / "docs" / src_uri).is_file() else f"docs/{src_uri}"
