"""Pure. Model names of requests: `base`, `base:adapter` and `base:adapter@digest`."""

from __future__ import annotations

from collections.abc import Iterable

from shared import errors
from shared.adapters.identity import check_name


def split_model(model: str, bases: Iterable[str]) -> tuple[str, str | None]:
    """(base, adapter name or None) of a model name `base` or `base:adapter`. A base id may hold `/`
    but never `:`.

    Raises:
        ModelNotFound: there is no such base model.
        AdapterNotFound: the adapter's name breaks the grammar.
    """
    base, colon, adapter = model.partition(":")
    known = list(bases)
    if base not in known:
        shown = ", ".join(f"`{b}`" for b in known[:5])
        raise errors.ModelNotFound(
            f"The model `{base[:200]}` does not exist. Base models here: {shown}.", param="model"
        )
    if not colon:
        return base, None
    check_name(adapter)
    return base, adapter


def split_version(model: str, bases: Iterable[str]) -> tuple[str, str | None, str]:
    """As `split_model`, with the text after the `@` of `base:adapter@digest` as third part ("":
    none).
    """
    base, colon, adapter = model.partition(":")
    name, at, digest = adapter.partition("@")
    if at and not digest:
        raise errors.AdapterNotFound(
            "Behind the @ of an adapter's name goes a digest, or at least its first 8 characters.",
            param="model",
        )
    return *split_model(f"{base}{colon}{name}", bases), digest
