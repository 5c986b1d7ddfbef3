"""Shell. The body of `GET /v1/models`. It is made once per state of the catalogs and of the slots,
in a thread, because a hundred thousand names take a tenth of a second.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

from gateway.accounts.account import ANONYMOUS, Account
from gateway.adapters.catalog import Catalog
from gateway.fleet.fleet import WorkerView
from gateway.http.json_responses import _encode
from shared.adapters.identity import AdapterKey, AdapterRef
from shared.link.messages import AdapterState, Tier

MAX_BODIES = 64
"""The most bodies that are kept. Accounts with the same scope share one."""
PLACES_AGE_S = 1.0
"""How old the states and tiers of the list may be. Those of a single model are of now."""
Scope: TypeAlias = tuple[tuple[str, ...], tuple[str, ...]]
Tiers: TypeAlias = Mapping[AdapterKey, Tier]
"""Where adapters are that some worker is nearer to than their store."""


class ModelList:
    """`catalogs` maps every base model to its catalog (None: it has no adapter store). `aliases`
    returns a base model's aliases, which are listed beside its adapters. `context` returns its
    context length in tokens (0: not known yet), and `workers` those that serve it (None: states and
    tiers are left out).
    """

    def __init__(
        self,
        catalogs: Mapping[str, Catalog | None],
        aliases: Callable[[str], Iterable[str]],
        created: int,
        context: Callable[[str], int] = lambda _: 0,
        workers: Callable[[str], Sequence[WorkerView]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._catalogs, self._aliases, self._context = catalogs, aliases, context
        self._created = created
        self._workers, self._clock = workers, clock
        self._places: dict[str, Tiers | None] = {}
        self._places_until = 0.0
        self._making = asyncio.Lock()
        self._state: tuple[object, ...] | None = None
        self._bodies: OrderedDict[Scope, bytes] = OrderedDict()  # of that state

    async def body(self, account: Account = ANONYMOUS) -> bytes:
        """The list of what this account may use, as it is now or was at a moment during this
        call.
        """
        scope = (account.models, account.adapters)
        fresh = self._workers is None or self._clock() < self._places_until
        if fresh and self._state == self._versions() and scope in self._bodies:
            return self._bodies[scope]
        async with self._making:  # many who ask at once wait for one
            await self._look_at_places()
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
                    scoped_list, digests, self._created, contexts, account, self._places
                )
                self._bodies[scope] = made
                if len(self._bodies) > MAX_BODIES:
                    self._bodies.popitem(last=False)
            return self._bodies[scope]

    async def _look_at_places(self) -> None:
        if self._workers is None or self._clock() < self._places_until:
            return
        held = {
            base: [(w.heartbeat.host, {**w.held}) for w in workers]
            for base in self._catalogs
            if (workers := self._workers(base))
        }
        disks = next((w[0].disk_index.marks() for b in held if (w := self._workers(b))), [])
        found = await asyncio.to_thread(nearest, held, disks)
        places: dict[str, Tiers | None] = {base: found.get(base) for base in self._catalogs}
        if places != self._places:
            self._bodies.clear()
            self._places = places
        self._places_until = self._clock() + PLACES_AGE_S

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
    places: Mapping[str, Tiers | None],
) -> bytes:
    """Like `model_list`, but only with what the account may use."""
    if account.scoped:
        adapters = {
            base: {name: digest for name, digest in names.items() if account.may_use(base, name)}
            for base, names in adapters.items()
            if account.may_use(base)
        }
    return model_list(adapters, created, contexts, places)


def nearest(
    held: Mapping[str, Sequence[tuple[str, Mapping[AdapterKey, AdapterState]]]],
    disks: Iterable[tuple[str, str, AdapterKey]],
) -> dict[str, dict[AdapterKey, Tier]]:
    """For each base the nearest tier of its adapters, without those that are in their store alone.
    `held` are the host of each worker and what it holds, and `disks` what lies on a host's disk.
    """
    hosts = {base: {host for host, _ in workers} for base, workers in held.items()}
    found: dict[str, dict[AdapterKey, Tier]] = {base: {} for base in held}
    for host, base, key in disks:
        if host in hosts.get(base, ()):
            found[base][key] = Tier.DISK
    for base, workers in held.items():
        of_base = found[base]
        for _, states in workers:
            for key, state in states.items():
                if state.tier < of_base.get(key, Tier.REMOTE):
                    of_base[key] = state.tier
    return found


OWNER = "loraplex"


SORTED_AT_ONCE = 4096


NO_CONTEXTS: Mapping[str, int] = {}
NO_PLACES: Mapping[str, Tiers | None] = {}


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
        return _NO_WORKER
    if adapter is None:
        return _READY
    return _at(min(worker.tier(adapter) for worker in workers))


_NO_WORKER: dict[str, object] = {"loraplex_state": "no_worker"}
_READY: dict[str, object] = {"loraplex_state": "ready"}


def _at(tier: Tier) -> dict[str, object]:
    state = "ready" if tier is Tier.GPU else "cold"
    return {"loraplex_state": state, "loraplex_tier": tier.name.lower()}


def model_list(
    adapters: Mapping[str, Mapping[str, str]],
    created: int,
    contexts: Mapping[str, int] = NO_CONTEXTS,
    places: Mapping[str, Tiers | None] = NO_PLACES,
) -> bytes:
    """Every base model and its adapters. `adapters` maps names to the digest that answers ("" for
    an alias). `places` maps bases to the tiers of adapters that are not in their store alone (None:
    no worker serves the base).

    The parts that repeat in each adapter's card are encoded once. JSON escapes only quotes in
    names, and nothing in digests.
    """
    cards = []
    for base, digests in adapters.items():
        tiers, context = places.get(base), contexts.get(base, 0)
        state = {} if base not in places else _NO_WORKER if tiers is None else _READY
        cards.append(_encode(model_card(base, created, context=context) | state).decode())
        hole = _encode(
            model_card(f"{base}:{_HOLE}", created, parent=base, root=_HOLE, context=context)
        ).decode()
        before, between, after = hole.split(_HOLE)
        ends = {tier: _ending(state if tiers is None else _at(tier)) for tier in Tier}
        tiers = tiers or {}
        for name in _sorted([*digests]):
            digest = digests[name]
            end = ends[tiers.get((name, digest), Tier.REMOTE)]
            ending = f'{after[:-1]},"loraplex_digest":"{digest}"{end}' if digest else after
            shown = name if '"' not in name else name.replace('"', '\\"')
            cards.append(f"{before}{shown}{between}{shown}{ending}")
    return ('{"object":"list","data":[' + ",".join(cards) + "]}").encode()


def _ending(fields: Mapping[str, object]) -> str:
    """These fields as the end of an object that has others."""
    return f",{_encode(fields).decode()[1:]}" if fields else "}"


def _sorted(names: Sequence[str]) -> Iterable[str]:
    """Sorts in runs. One call for a hundred thousand names would hold the interpreter for 50 ms."""
    return heapq.merge(
        *(sorted(names[at : at + SORTED_AT_ONCE]) for at in range(0, len(names), SORTED_AT_ONCE))
    )
