"""Shell. The body of `GET /v1/models`. It is made once per state of the catalogs, in a thread,
because a hundred thousand names take a tenth of a second.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

from gateway.accounts.account import ANONYMOUS, Account
from gateway.adapters.catalog import Catalog
from gateway.fleet.fleet import WorkerView
from gateway.http.json_responses import _encode
from shared.adapters.identity import AdapterRef
from shared.link.messages import Tier

MAX_BODIES = 64
"""The most bodies that are kept. Accounts with the same scope share one."""
Scope: TypeAlias = tuple[tuple[str, ...], tuple[str, ...]]


class ModelList:
    """`catalogs` maps every base model to its catalog (None: it has no adapter store). `aliases`
    returns a base model's aliases, which are listed beside its adapters. `context` returns its
    context length in tokens (0: not known yet).
    """

    def __init__(
        self,
        catalogs: Mapping[str, Catalog | None],
        aliases: Callable[[str], Iterable[str]],
        created: int,
        context: Callable[[str], int] = lambda _: 0,
    ) -> None:
        self._catalogs, self._aliases, self._context = catalogs, aliases, context
        self._created = created
        self._making = asyncio.Lock()
        self._state: tuple[object, ...] | None = None
        self._bodies: OrderedDict[Scope, bytes] = OrderedDict()  # of that state

    async def body(self, account: Account = ANONYMOUS) -> bytes:
        """The list of what this account may use, as it is now or was at a moment during this
        call.
        """
        scope = (account.models, account.adapters)
        if self._state == self._versions() and scope in self._bodies:
            return self._bodies[scope]
        async with self._making:  # many who ask at once wait for one
            state = self._versions()
            if self._state != state:
                self._bodies.clear()
                self._state = state
            if scope not in self._bodies:
                digests = {
                    base: self._digests(base, catalog) for base, catalog in self._catalogs.items()
                }
                contexts = {base: self._context(base) for base in digests}
                made = await asyncio.to_thread(
                    scoped_list, digests, self._created, contexts, account
                )
                self._bodies[scope] = made
                if len(self._bodies) > MAX_BODIES:
                    self._bodies.popitem(last=False)
            return self._bodies[scope]

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
                self._context(base),
                tuple(self._aliases(base)),
                *(
                    (c.version, *((x.new.name, x.old.digest) for x in c.versions.changes()))
                    if c is not None
                    else ()
                ),
            )
            for base, c in self._catalogs.items()
        )


def scoped_list(
    adapters: Mapping[str, Mapping[str, str]],
    created: int,
    contexts: Mapping[str, int],
    account: Account,
) -> bytes:
    """Like `model_list`, but only with what the account may use."""
    if account.scoped:
        adapters = {
            base: {name: digest for name, digest in names.items() if account.may_use(base, name)}
            for base, names in adapters.items()
            if account.may_use(base)
        }
    return model_list(adapters, created, contexts)


OWNER = "loraplex"


SORTED_AT_ONCE = 4096


NO_CONTEXTS: Mapping[str, int] = {}


_HOLE = "*name*"  # neither a base id after its colon nor an adapter's name may hold it


def model_card(
    model_id: str,
    created: int,
    parent: str | None = None,
    root: str | None = None,
    digest: str = "",
    context: int = 0,
) -> dict[str, object]:
    """OpenAI's model object, with vLLM's `root`, `parent` and `max_model_len`. `loraplex_digest` is
    the version that answers. `context` is in tokens (0: not known yet).
    """
    card: dict[str, object] = {
        "id": model_id,
        "object": "model",
        "created": created,
        "owned_by": OWNER,
        "root": root or model_id,
        "parent": parent,
        "max_model_len": context or None,
    }
    if parent is None:
        card["permission"] = [_permission(created)]
    return card | {"loraplex_digest": digest} if digest else card


def _permission(created: int) -> dict[str, object]:
    """vLLM's permission object. Only base models have it in the list, since it is the same for
    every adapter.
    """
    return {
        "id": f"modelperm-{created:x}",
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }


def where(workers: Sequence[WorkerView], adapter: AdapterRef | None) -> dict[str, object]:
    """How fast a model can answer: `ready` if a worker could begin at once, else `cold` or
    `no_worker`. For an adapter it also names the nearest place of its weights.
    """
    if not workers:
        return {"loraplex_state": "no_worker"}
    if adapter is None:
        return {"loraplex_state": "ready"}
    tier = min(worker.tier(adapter) for worker in workers)
    state = "ready" if tier is Tier.GPU else "cold"
    return {"loraplex_state": state, "loraplex_tier": tier.name.lower()}


def model_list(
    adapters: Mapping[str, Mapping[str, str]],
    created: int,
    contexts: Mapping[str, int] = NO_CONTEXTS,
) -> bytes:
    """Every base model and its adapters. `adapters` maps names to the digest that answers ("" for
    an alias).

    The parts that repeat in each adapter's card are encoded once. JSON escapes only quotes in
    names, and nothing in digests.
    """
    cards = []
    for base, digests in adapters.items():
        cards.append(_encode(model_card(base, created, context=contexts.get(base, 0))).decode())
        hole = _encode(
            model_card(
                f"{base}:{_HOLE}",
                created,
                parent=base,
                root=_HOLE,
                context=contexts.get(base, 0),
            )
        ).decode()
        before, between, after = hole.split(_HOLE)
        for name in _sorted([*digests]):
            digest = digests[name]
            ending = f'{after[:-1]},"loraplex_digest":"{digest}"}}' if digest else after
            shown = name if '"' not in name else name.replace('"', '\\"')
            cards.append(f"{before}{shown}{between}{shown}{ending}")
    return ('{"object":"list","data":[' + ",".join(cards) + "]}").encode()


def _sorted(names: Sequence[str]) -> Iterable[str]:
    """Sorts in runs. One call for a hundred thousand names would hold the interpreter for 50 ms."""
    return heapq.merge(
        *(sorted(names[at : at + SORTED_AT_ONCE]) for at in range(0, len(names), SORTED_AT_ONCE))
    )
