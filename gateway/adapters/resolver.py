"""Shell. Resolves a request's `model` to what answers it: base model, adapter and version. Aliases
come first, then names, then versions by digest.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Mapping

import msgspec

from gateway.accounts.account import Account
from gateway.adapters import versions
from gateway.adapters.alias_store import AliasStore
from gateway.adapters.aliases import ActiveAliases
from gateway.adapters.catalog import Catalog, no_such_adapter
from gateway.adapters.model_names import split_version
from gateway.adapters.version_placement import KnownVersion, on_workers, serving_with
from gateway.fleet.fleet import Fleet
from gateway.fleet.worker_view import WorkerView
from shared.adapters.identity import AdapterKey, AdapterRef, StoredAdapter, key_of
from shared.config.aliases import MAX_ALIASES
from shared.errors import (
    AdapterNotFound,
    DeadlineExceeded,
    InvalidAdapter,
    InvalidRequest,
    LoraplexError,
    Overloaded,
    StoreUnavailable,
    WorkersDied,
    WorkerUnavailable,
)
from shared.link.messages import WorkerId

log = logging.getLogger("loraplex.aliases")

SHOWN_BASES = 20
KNOWN_SPLITS = 4096
"""So many model names of requests are not taken apart again."""
SHOWN_VERSIONS = 10  # of one name in an error message
SETTLING_RETRY_S = 2.0
BACK_S = 5.0
"""A worker with the wanted version that is silent for longer counts as lost."""
LOOK_S = 0.05  # between two looks whether it is back
NOT_THE_ADAPTERS = (DeadlineExceeded, Overloaded, WorkersDied)
"""Errors that say nothing about an adapter. A client chooses its own deadline and the length of its
answer, other tenants make the queue, and a refused request was tried on no worker. If a share were
judged by such errors, any tenant could have it rolled back.
"""


class ResolvedModel(msgspec.Struct, frozen=True, gc=False):
    """What answers a request. `alias` and `share` say through which alias it was found. `by_digest`
    means that the client chose the version.

    `elsewhere` means that the store does not have this version any more. A worker without it cannot
    get it, but another worker may have it. `first_on` is one that has it; empty: none is known.
    """

    base: str
    adapter: AdapterRef | None = None
    stored: StoredAdapter | None = None
    alias: str = ""
    share: str = ""
    by_digest: bool = False
    elsewhere: bool = False
    first_on: WorkerId = ""


class Resolver:
    """`catalogs` maps every configured base model to its catalog. None: it has no adapter store."""

    def __init__(
        self,
        catalogs: Mapping[str, Catalog | None],
        alias_store: AliasStore,
        fleet: Fleet,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._catalogs, self._alias_store, self._fleet, self._clock = (
            catalogs,
            alias_store,
            fleet,
            clock,
        )
        self._logged: set[tuple[str, str]] = set()
        self._bases: dict[str, ResolvedModel] = {}
        self._split = functools.lru_cache(KNOWN_SPLITS)(
            functools.partial(split_version, bases=catalogs)
        )

    def check_scope(self, account: Account, model: str) -> None:
        """For an account, models that it may not use do not exist.

        Raises ModelNotFound or AdapterNotFound.
        """
        if not account.scoped:
            return
        allowed = [base for base in self._catalogs if account.may_use(base)]
        base, name, _ = split_version(model, allowed)
        if name is not None and not account.may_use(base, name):
            raise no_such_adapter(base, name)

    def default(self, account: Account) -> str:
        """The model of a request that names none: the only one that the account may use. Raises
        InvalidRequest if there are several, and names no other.
        """
        allowed = [base for base in self._catalogs if account.may_use(base)]
        if len(allowed) != 1:
            raise InvalidRequest(
                "The request must name its `model`; there are: "
                f"{', '.join(allowed[:SHOWN_BASES])}.",
                param="model",
            )
        return allowed[0]

    def at_once(self, model: str) -> ResolvedModel | None:
        """Resolves the common cases without waiting: a base model, or a known adapter in its
        current version.

        None: `resolve` must be asked. Raises ModelNotFound or AdapterNotFound.
        """
        known = self._bases.get(model)
        if known is not None:
            return known
        base, name, spec = self._split(model)
        if name is None:
            return self._bases.setdefault(base, ResolvedModel(base))
        if spec or name in self._alias_store.of(base):
            return None
        catalog = self._catalog(base)
        latest = catalog.known.get(name)
        return None if latest is None else self._current(catalog, latest)

    async def resolve(self, model: str, user: Callable[[], bytes]) -> ResolvedModel:
        """`user` returns the bytes by which a user keeps the same share of an alias.

        Raises ModelNotFound, AdapterNotFound, or StoreUnavailable if the store does not answer.
        """
        base, name, spec = self._split(model)
        if name is None:
            return ResolvedModel(base)
        found = self._alias_store.of(base).get(name) if not spec else None
        if found is None:
            return await self.adapter(base, name, spec)
        self._say_if_hiding(base, name)
        share = self._alias_store.pick(found, user())
        name, _, spec = share.adapter.partition("@")
        try:
            return msgspec.structs.replace(
                await self.adapter(base, name, spec), alias=found.name, share=share.adapter
            )
        except LoraplexError as exc:
            self.ended(ResolvedModel(base, alias=found.name, share=share.adapter), 0, exc)
            raise

    async def adapter(self, base: str, name: str, spec: str = "") -> ResolvedModel:
        """An adapter by its name, in its current version or in the one that `spec` says."""
        catalog = self._catalog(base)
        latest = await catalog.latest(name)
        if spec:
            return await self._by_version(catalog, latest, spec)
        return self._current(catalog, latest)

    def aliases(self, base: str) -> Mapping[str, ActiveAliases]:
        return self._alias_store.of(base)

    def use(self, target: ResolvedModel) -> None:
        """A request is about to be answered from this model, so its version is in use."""
        catalog = self._catalogs[target.base]
        if catalog is None or target.adapter is None:
            return
        if target.by_digest:
            catalog.versions.use_explicitly(key_of(target.adapter), self._clock())
        elif target.stored is not None:
            catalog.versions.use(target.stored, self._clock())

    def ended(self, target: ResolvedModel, status: int, error: LoraplexError | None) -> None:
        """A request has been answered from this model. It is not called if the client left."""
        catalog = self._catalogs[target.base]
        if (
            catalog is not None
            and target.stored is not None
            and not target.by_digest
            and isinstance(error, InvalidAdapter)
        ):
            catalog.refused(target.stored)
        if target.alias and not isinstance(error, NOT_THE_ADAPTERS):
            # A target that is gone is no fault of the client, who asked for the alias.
            failed = (
                status >= 500
                or isinstance(error, InvalidAdapter | AdapterNotFound)
                or (error is not None and error.status >= 500)
            )
            self._alias_store.note(target.base, target.alias, target.share, failed=failed)

    async def again(self, target: ResolvedModel) -> ResolvedModel:
        """No worker could get the version: the store's copy has changed or is gone.

        Raises:
            AdapterNotFound: the adapter, or the version that was asked for. WorkerUnavailable: the
                store has not all of the new version yet, and no worker has the old one.
        """
        assert target.adapter is not None
        catalog, name = self._catalog(target.base), target.adapter.name
        if target.by_digest or target.stored is None:
            catalog.miss(f"{name}@{target.adapter.digest}")
            raise self._no_such_version(catalog, await catalog.latest(name), target.adapter.digest)
        latest = await catalog.look_again(name)
        settling = latest.digest == target.adapter.digest and catalog.is_settling(name)
        if settling or latest.digest != target.adapter.digest:
            holder = await self._holder(target.base, key_of(target.adapter))
            if holder is not None and catalog.versions.current(latest) == target.stored:
                return msgspec.structs.replace(target, elsewhere=True, first_on=holder.id)
            if settling and holder is None:
                raise WorkerUnavailable(
                    "This adapter is being uploaded anew, and no worker has its old version any "
                    "more.",
                    retry_after_s=SETTLING_RETRY_S,
                )
            if holder is None:
                catalog.versions.lost(target.stored, self._clock())
        return msgspec.structs.replace(
            await self.adapter(target.base, name), alias=target.alias, share=target.share
        )

    async def _holder(self, base: str, key: AdapterKey) -> WorkerView | None:
        """A worker whose engine has the version, however busy it is. One that is silent for a
        moment comes back or is lost, so it is waited for.
        """
        end = self._clock() + BACK_S
        while there := serving_with(key, base, self._fleet):
            found = next((w for w in there if w.routable), None)
            if found is not None or self._clock() >= end:
                return found
            await asyncio.sleep(LOOK_S)
        return None

    # ---- inside ----------------------------------------------------------------------------------

    @staticmethod
    def _current(catalog: Catalog, latest: StoredAdapter) -> ResolvedModel:
        current = catalog.versions.current(latest)
        ref = AdapterRef(catalog.base, latest.name, current.digest)
        return ResolvedModel(catalog.base, ref, current, elsewhere=current.digest != latest.digest)

    def _say_if_hiding(self, base: str, alias: str) -> None:
        catalog = self._catalogs[base]
        if (
            catalog is not None
            and alias in catalog.known
            and (base, alias) not in self._logged
            and len(self._logged) < MAX_ALIASES
        ):
            self._logged.add((base, alias))
            log.warning(
                "an alias hides an adapter of the same name", extra={"base": base, "alias": alias}
            )

    def _catalog(self, base: str) -> Catalog:
        catalog = self._catalogs[base]
        if catalog is None:
            raise AdapterNotFound(f"The model `{base}` is served without adapters.", param="model")
        return catalog

    async def _by_version(
        self, catalog: Catalog, latest: StoredAdapter, spec: str
    ) -> ResolvedModel:
        """The version by its digest, the beginning of it, or the name that the store gave it. The
        known versions are searched first, then those that workers have, then the store's older
        ones. With a whole digest, the version may also be on a worker's disk.
        """
        name, is_digest = latest.name, versions.is_spec(spec)
        hits = self._known_versions(catalog, latest, spec) if is_digest else []
        if len(hits) > 1 or (not hits and catalog.is_missing(f"{name}@{spec}")):
            raise self._no_such_version(catalog, latest, spec)
        hit = hits[0] if hits else None
        if hit is None or hit.digest != latest.digest:
            kept = await self._kept(catalog, name, hit.digest if hit else spec, hit is not None)
            if kept is not None:
                ref = AdapterRef(catalog.base, name, kept.digest)
                return ResolvedModel(catalog.base, ref, kept, by_digest=True)
        if hit is None and is_digest and len(spec) == versions.DIGEST_LENGTH:
            hit = KnownVersion(spec, "unknown")
        if hit is None and not is_digest:
            raise AdapterNotFound(
                "Behind the @ of an adapter's name goes a digest, or at least its first 8 "
                "characters, or what the store calls a version (a commit, an object version); "
                f"the store knows no such version of `{name}`.",
                param="model",
            )
        if hit is None:
            raise self._no_such_version(catalog, latest, spec)
        ref = AdapterRef(catalog.base, name, hit.digest)
        return ResolvedModel(
            catalog.base, ref, hit.stored, by_digest=True, elsewhere=hit.digest != latest.digest
        )

    def _known_versions(
        self, catalog: Catalog, latest: StoredAdapter, spec: str
    ) -> list[KnownVersion]:
        hits = [known for known in catalog.versions.of(latest) if known.digest.startswith(spec)]
        on_workers = self._on_workers(catalog.base, latest.name) if not hits else []
        return hits or [known for known in on_workers if known.digest.startswith(spec)]

    @staticmethod
    async def _kept(catalog: Catalog, name: str, version: str, known: bool) -> StoredAdapter | None:
        """What the store keeps of an older version. A version that is known here needs no store
        that answers.
        """
        try:
            return await catalog.kept(name, version)
        except StoreUnavailable:
            if known:
                return None
            raise

    def _on_workers(self, base: str, name: str) -> list[KnownVersion]:
        return list(on_workers(name, self._fleet.pool(base)))

    def _no_such_version(
        self, catalog: Catalog, latest: StoredAdapter, spec: str
    ) -> AdapterNotFound:
        known = {v.digest: v.state for v in self._on_workers(catalog.base, latest.name)} | {
            v.digest: v.state for v in catalog.versions.of(latest)
        }
        shown = ", ".join(
            f"{digest} ({state})" for digest, state in list(known.items())[:SHOWN_VERSIONS]
        )
        what = (
            "has several versions that begin so"
            if sum(d.startswith(spec) for d in known) > 1
            else "has no such version"
        )
        return AdapterNotFound(
            f"The adapter `{latest.name}` of model `{catalog.base}` {what}: "
            f"`{spec[:20]}`. There are: {shown}.",
            param="model",
        )
