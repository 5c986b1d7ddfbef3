"""Pure. The versions of vLLM that Loraplex was tried with, and what is said of any other.
docs/DEPLOY.md has the table.
"""

from __future__ import annotations

TRIED = ("0.32", "0.33")


def is_tried(version: str) -> bool:
    """Of `0.32.1` and `0.33.0+cpu` it is. Every patch release of a version counts."""
    return ".".join(version.split(".")[:2]) in TRIED


def warning(version: str) -> str:
    """What `loraplex check` says, and a worker logs, with any other version."""
    return (
        f"vLLM {version} was never tried with Loraplex ({' and '.join(TRIED)} were); plain streams "
        "go through vLLM's own server"
    )


def refusal(version: str, why: object) -> str:
    """Why a worker cannot start with such a version, which may have moved what Loraplex uses."""
    return (
        f"vLLM {version} was never tried with Loraplex and does not work with it ({why}); install "
        f"vLLM {' or '.join(TRIED)}"
    )


def cannot_import(version: str | None, why: object) -> str:
    """`version` None: vLLM is not installed."""
    if version is not None and not is_tried(version):
        return refusal(version, why)
    return (
        f"vLLM cannot be imported ({why}); install loraplex[gpu] or loraplex[cpu], or use "
        "llm_engine: sim"
    )
