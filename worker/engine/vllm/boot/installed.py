"""Shell. Which vLLM is installed, without the seconds that an import of all of it takes."""

from __future__ import annotations


def vllm_version() -> str | None:
    """None: there is none."""
    try:
        from vllm.version import __version__
    except ImportError:
        return None
    return str(__version__)
