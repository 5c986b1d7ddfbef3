"""Shell. For `loraplex check`: whether the stores of a config are there, and hold adapters."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

import msgspec

from shared.config.llm import LLMConfig, Settings
from shared.errors import LoraplexError
from shared.stores import open_store
from shared.stores.listing import SkippedFolder
from shared.stores.objects import StoreFailure, Trouble

LOOK_S = 10.0
ABSENT = (Trouble.NO_BUCKET, Trouble.NO_FOLDER, Trouble.NO_PREFIX)


def look_at_stores(settings: Settings) -> tuple[list[str], list[str]]:
    """(errors, notes). A store that cannot be reached from this host is a note: `check` often runs
    where the credentials are not.
    """
    errors: list[str] = []
    notes: list[str] = []
    for model in settings.models:
        for trouble, text in asyncio.run(_look_at(model)):
            (errors if trouble in ABSENT else notes).append(f"{model.model_id}: {text}")
    return errors, notes


async def _look_at(model: LLMConfig) -> list[tuple[Trouble | None, str]]:
    if model.adapters_path is None or model.lora_config is None:
        return []
    options = msgspec.structs.asdict(model.lora_config.store)
    try:
        async with asyncio.timeout(LOOK_S), open_store(model.adapters_path, options) as store:
            if not await store.exists():
                return [(Trouble.NO_PREFIX, f"nothing lies below {store.url}; is the path right?")]
            count = 0
            async for _ in store.list():
                count += 1
            return [(None, text) for text in _said(store.url, count, store.skipped.shown)]
    except TimeoutError:
        return [(None, f"{model.adapters_path} was not looked through within {LOOK_S:g} s")]
    except LoraplexError as exc:
        trouble = exc.trouble if isinstance(exc, StoreFailure) else None
        return [(trouble, f"{model.adapters_path}: {exc.message}")]


def _said(url: str, count: int, skipped: Sequence[SkippedFolder]) -> Iterator[str]:
    if not count:
        yield f"no adapters in {url} yet"
    for one in skipped:
        yield f"the folder {one.key} of the store is skipped: {one.why}"
