"""Shell. From a request's `model` to what answers: base model, adapter, version. Aliases first,
then names, then versions by digest.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from gateway.accounts.account import Account
from gateway.adapters import versions
from gateway.adapters.alias_store import AliasStore
from gateway.adapters.aliases import ActiveAliases
from gateway.adapters.catalog import Catalog, no_such_adapter
from gateway.adapters.names import split_version
from gateway.adapters.version_queries import KnownVersion, in_engines, on_workers
from gateway.fleet.fleet import Fleet
from shared.adapters.identity import AdapterRef, StoredAdapter, key_of
from shared.config.aliases import MAX_ALIASES
from shared.errors import (
    AdapterNotFound,
    DeadlineExceeded,
    InvalidAdapter,
    InvalidRequest,
    LoraplexError,
    Overloaded,
    WorkerUnavailable,
)

log = logging.getLogger("loraplex.aliases")

SHOWN_BASES = 20
SHOWN_VERSIONS = 10  # of one name in an error message
SETTLING_RETRY_S = 2.0
NOT_THE_ADAPTERS = (DeadlineExceeded, Overloaded)
"""A client chose its deadline, or how long an answer it wanted, and others made the queue: a share
that is judged by them could be rolled back by any tenant.
"""


@dataclass(frozen=True, slots=True)
class Target:
    """What answers a request. `alias` and `share` say by which detour, `by_digest` that the client
    chose the version.

    `elsewhere`: the store does not show this version, so that a worker without it cannot get it,
    but another one may have it.
    """

    base: str
    adapter: AdapterRef | None = None
    stored: StoredAdapter | None = None
    alias: str = ""
    share: str = ""
    by_digest: bool = False
    elsewhere: bool = False


class Resolver:
    """`catalogs`: every configured base model; None where it has no adapter store."""

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
        self._said: set[tuple[str, str]] = set()
        self._bases: dict[str, Target] = {}

    def check_scope(self, account: Account, model: str) -> None:
        """What the account may not use does not exist for it.

        Raises ModelNotFound, AdapterNotFound.
        """
        if not account.scoped:
            return
        allowed = [base for base in self._catalogs if account.may_use(base)]
        base, name, _ = split_version(model, allowed)
        if name is not None and not account.may_use(base, name):
            raise no_such_adapter(base, name)

    def default(self) -> str:
        """The model of a request that names none. Raises InvalidRequest where there is a choice."""
        if len(self._catalogs) != 1:
            raise InvalidRequest(
                "The request must name its `model`; there are: "
                f"{', '.join([*self._catalogs][:SHOWN_BASES])}.",
                param="model",
            )
        return next(iter(self._catalogs))

    def at_once(self, model: str) -> Target | None:
        """What most requests want, without a task's machinery: a base model, or an adapter that the
        store has shown, in its current version.

        None: `resolve` has to say. Raises ModelNotFound, AdapterNotFound.
        """
        known = self._bases.get(model)
        if known is not None:
            return known
        base, name, spec = split_version(model, self._catalogs)
        if name is None:
            return self._bases.setdefault(base, Target(base))
        if spec or name in self._alias_store.of(base):
            return None
        catalog = self._catalog(base)
        latest = catalog.known.get(name)
        return None if latest is None else self._current(catalog, latest)

    async def resolve(self, model: str, user: Callable[[], bytes]) -> Target:
        """`user` is asked for what keeps a user with one share of an alias.

        Raises:
            ModelNotFound, AdapterNotFound: as the message says. StoreUnavailable: the store cannot
                say.
        """
        base, name, spec = split_version(model, self._catalogs)
        if name is None:
            return Target(base)
        found = self._alias_store.of(base).get(name) if not spec else None
        if found is None:
            return await self.adapter(base, name, spec)
        self._say_if_hiding(base, name)
        share = self._alias_store.pick(found, user())
        name, _, spec = share.adapter.partition("@")
        try:
            return replace(
                await self.adapter(base, name, spec), alias=found.name, share=share.adapter
            )
        except LoraplexError as exc:
            self.ended(Target(base, alias=found.name, share=share.adapter), 0, exc)
            raise

    async def adapter(self, base: str, name: str, spec: str = "") -> Target:
        """An adapter by its name, in its current version or in the one that `spec` says."""
        catalog = self._catalog(base)
        latest = await catalog.latest(name)
        if spec:
            return self._by_digest(catalog, latest, spec)
        return self._current(catalog, latest)

    def aliases(self, base: str) -> Mapping[str, ActiveAliases]:
        return self._alias_store.of(base)

    def use(self, target: Target) -> None:
        """A request is about to be answered from it."""
        catalog = self._catalogs[target.base]
        if catalog is None or target.adapter is None:
            return
        if target.by_digest:
            catalog.versions.use_explicitly(key_of(target.adapter), self._clock())
        elif target.stored is not None:
            catalog.versions.use(target.stored, self._clock())

    def ended(self, target: Target, status: int, error: LoraplexError | None) -> None:
        """A request has been answered from it. Clients that left are not heard of here."""
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

    async def again(self, target: Target) -> Target:
        """No worker could get the version: the store's copy has changed or is gone.

        Raises:
            AdapterNotFound: the adapter, or the version that was asked for. WorkerUnavailable: a
                worker has it, but could not take the request.
        """
        assert target.adapter is not None
        catalog, name = self._catalog(target.base), target.adapter.name
        if target.by_digest or target.stored is None:
            catalog.miss(f"{name}@{target.adapter.digest}")
            raise self._no_such_version(catalog, await catalog.latest(name), target.adapter.digest)
        latest = await catalog.look_again(name)
        if latest.digest == target.adapter.digest and catalog.is_settling(name):
            return self._while_settling(target)
        if latest.digest != target.adapter.digest:
            if in_engines((name, target.adapter.digest), self._fleet.pool(target.base)):
                raise WorkerUnavailable(
                    "This adapter is being replaced, and the workers that have it are busy.",
                    retry_after_s=1.0,
                )
            catalog.versions.lost(target.stored, self._clock())
        return replace(
            await self.adapter(target.base, name), alias=target.alias, share=target.share
        )

    def _while_settling(self, target: Target) -> Target:
        """The version before an upload that is under way: whoever still has it answers.

        Raises WorkerUnavailable: nobody has.
        """
        assert target.adapter is not None
        if target.elsewhere or not in_engines(
            key_of(target.adapter), self._fleet.pool(target.base)
        ):
            raise WorkerUnavailable(
                "This adapter is being uploaded anew, and no worker has its old version any more.",
                retry_after_s=SETTLING_RETRY_S,
            )
        return replace(target, elsewhere=True)

    # ---- inside ----------------------------------------------------------------------------------

    @staticmethod
    def _current(catalog: Catalog, latest: StoredAdapter) -> Target:
        current = catalog.versions.current(latest)
        ref = AdapterRef(catalog.base, latest.name, current.digest)
        return Target(catalog.base, ref, current, elsewhere=current.digest != latest.digest)

    def _say_if_hiding(self, base: str, alias: str) -> None:
        catalog = self._catalogs[base]
        if (
            catalog is not None
            and alias in catalog.known
            and (base, alias) not in self._said
            and len(self._said) < MAX_ALIASES
        ):
            self._said.add((base, alias))
            log.warning(
                "an alias hides an adapter of the same name", extra={"base": base, "alias": alias}
            )

    def _catalog(self, base: str) -> Catalog:
        catalog = self._catalogs[base]
        if catalog is None:
            raise AdapterNotFound(f"The model `{base}` is served without adapters.", param="model")
        return catalog

    def _by_digest(self, catalog: Catalog, latest: StoredAdapter, spec: str) -> Target:
        """Among the known versions, then among those that workers have; a whole digest may also lie
        on a worker's disk.
        """
        name = latest.name
        if not versions.is_spec(spec):
            raise AdapterNotFound(
                "Behind the @ of an adapter's name goes a digest, or at least its "
                "first 8 characters.",
                param="model",
            )
        hits = [known for known in catalog.versions.of(latest) if known.digest.startswith(spec)]
        hits = hits or [
            known for known in self._on_workers(catalog.base, name) if known.digest.startswith(spec)
        ]
        whole = len(spec) == versions.DIGEST_LENGTH
        if not hits and whole and not catalog.is_missing(f"{name}@{spec}"):
            hits = [KnownVersion(spec, "unknown")]
        if len(hits) != 1:
            raise self._no_such_version(catalog, latest, spec)
        ref = AdapterRef(catalog.base, name, hits[0].digest)
        return Target(
            catalog.base, ref, hits[0].stored, by_digest=True, elsewhere=ref.digest != latest.digest
        )

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
