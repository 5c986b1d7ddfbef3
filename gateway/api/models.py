"""Shell. The bytes of `GET /v1/models`: made once per state of the catalogs, in a thread, because a
hundred thousand names take a tenth of a second.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence

from gateway.adapters.catalog import Catalog
from gateway.http.bodies import _encode


class ModelList:
    """`catalogs`: every base model; None where it has no adapter store. `aliases`: those of a base
    model, listed beside its adapters.
    """

    def __init__(
        self,
        catalogs: Mapping[str, Catalog | None],
        aliases: Callable[[str], Iterable[str]],
        created: int,
    ) -> None:
        self._catalogs, self._aliases = catalogs, aliases
        self._created = created
        self._making = asyncio.Lock()
        self._state: tuple[object, ...] | None = None
        self._body = b""

    async def body(self) -> bytes:
        """As of now, or of a moment in this call."""
        if self._state != self._versions():
            async with self._making:  # many who ask at once wait for one
                state = self._versions()
                if self._state != state:
                    digests = {
                        base: self._digests(base, catalog)
                        for base, catalog in self._catalogs.items()
                    }
                    self._body = await asyncio.to_thread(model_list, digests, self._created)
                    self._state = state
        return self._body

    def _digests(self, base: str, catalog: Catalog | None) -> dict[str, str]:
        found = {}
        if catalog is not None:
            found = {name: adapter.digest for name, adapter in catalog.known.items()}
            # What answers differs from what the store shows only while a new version is made ready,
            # or is refused.
            found |= {
                change.new.name: change.old.digest
                for change in catalog.versions.changes()
                if change.new.name in found
            }
        return found | dict.fromkeys(self._aliases(base), "")

    def _versions(self) -> tuple[object, ...]:
        return tuple(
            (
                tuple(self._aliases(base)),
                *(
                    (c.version, *((x.new.name, x.old.digest) for x in c.versions.changes()))
                    if c is not None
                    else ()
                ),
            )
            for base, c in self._catalogs.items()
        )


OWNER = "loraplex"


SORTED_AT_ONCE = 4096


_HOLE = "*name*"  # neither a base id after its colon nor an adapter's name may hold it


def model_card(
    model_id: str,
    created: int,
    parent: str | None = None,
    root: str | None = None,
    digest: str = "",
) -> dict[str, object]:
    """OpenAI's model object, with vLLM's `root` and `parent`; `loraplex_digest` is the version that
    answers.
    """
    card: dict[str, object] = {
        "id": model_id,
        "object": "model",
        "created": created,
        "owned_by": OWNER,
        "root": root or model_id,
        "parent": parent,
    }
    return card | {"loraplex_digest": digest} if digest else card


def model_list(adapters: Mapping[str, Mapping[str, str]], created: int) -> bytes:
    """Every base model and its adapters, name -> digest of the version that answers ("" for an
    alias).

    What repeats in each adapter's card is encoded once: names and digests have no character that
    JSON escapes.
    """
    cards = []
    for base, digests in adapters.items():
        cards.append(_encode(model_card(base, created)).decode())
        hole = _encode(model_card(f"{base}:{_HOLE}", created, parent=base, root=_HOLE)).decode()
        before, between, after = hole.split(_HOLE)
        for name in _sorted([*digests]):
            digest = digests[name]
            ending = f'{after[:-1]},"loraplex_digest":"{digest}"}}' if digest else after
            cards.append(f"{before}{name}{between}{name}{ending}")
    return ('{"object":"list","data":[' + ",".join(cards) + "]}").encode()


def _sorted(names: Sequence[str]) -> Iterable[str]:
    """In runs: one call that sorts a hundred thousand names would keep the interpreter from every
    other thread for 50 ms.
    """
    return heapq.merge(
        *(sorted(names[at : at + SORTED_AT_ONCE]) for at in range(0, len(names), SORTED_AT_ONCE))
    )
