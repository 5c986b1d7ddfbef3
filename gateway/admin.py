"""Shell. What operators ask over HTTP: which adapters are where, and to pin, prefetch, load or evict them. docs/OPERATIONS.md is the manual."""

from __future__ import annotations

import asyncio
import posixpath
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
from aiohttp import web

from gateway import adapter_table, openai
from gateway.catalog import Catalog
from gateway.dispatcher import Dispatcher
from gateway.keeper import Keeper
from gateway.routing import Ask
from gateway.usage import Usage
from gateway.worker import Worker
from shared.adapters import AdapterRef, StoredAdapter, check_name
from shared.errors import AdapterNotFound, InvalidAdapter, InvalidRequest, LoraplexError, NotDoneInTime, WorkerUnavailable
from shared.wire import Action, WorkerId

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
T = TypeVar("T")

EXPLAINED_TOKENS, MAX_EXPLAINED_TOKENS = 128, 10**7  # of the prompt that /admin/explain assumes, and at most takes
MAX_SESSION = 128  # characters of an x-session-id that count
PREFIX = "/admin/adapters/"
PAGE = 1000
LOOKED_AT_ONCE = 1000  # adapters between two turns of the loop
TIMEOUT_S, MAX_TIMEOUT_S = 60.0, 600.0
MULTI_STATUS = 207


class LoadRequest(msgspec.Struct, frozen=True):
    """vLLM's (vllm/entrypoints/serve/lora/protocol.py, 0.32)."""

    lora_name: str
    lora_path: str | None = None
    load_inplace: bool = False


class UnloadRequest(msgspec.Struct, frozen=True):
    lora_name: str
    lora_int_id: int | None = None


@dataclass(slots=True)
class Outcome:
    """What became of one action: per worker, None or the error."""

    action: str
    base: str
    name: str
    digest: str | None
    results: dict[WorkerId, LoraplexError | None] = field(default_factory=dict)

    @property
    def errors(self) -> list[LoraplexError]:
        return [e for e in self.results.values() if e is not None]

    def answer(self, **more: object) -> web.Response:
        """200 where all is well, the error's status where nothing is, 207 in between."""
        errors = self.errors
        status = 200 if not errors else MULTI_STATUS if len(errors) < len(self.results) else openai.status_of(errors[0])
        body: dict[str, object] = {"adapter": self.name, "base": self.base, "digest": self.digest, "action": self.action, **more}
        if errors:
            body |= msgspec.json.decode(openai.error_body(errors[0]))
        body["results"] = [_result(worker, error) for worker, error in self.results.items()]
        return web.Response(status=status, body=openai.to_json(body), content_type="application/json")


class Admin:
    """`stores`: base -> the URL of its adapter store."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        catalogs: Mapping[str, Catalog | None],
        stores: Mapping[str, str],
        keeper: Keeper,
        usage: Usage,
    ) -> None:
        self._dispatcher = dispatcher
        self._catalogs = catalogs
        self._stores = stores
        self._keeper = keeper
        self._usage = usage
        self._sorted: dict[str, tuple[Mapping[str, StoredAdapter], list[str]]] = {}

    def routes(self) -> dict[tuple[str, str], Handler]:
        return {
            ("GET", "/admin/explain"): self.explain,
            ("GET", "/admin/adapters"): self.adapters,
            ("POST", "/v1/load_lora_adapter"): self.load,
            ("POST", "/v1/unload_lora_adapter"): self.unload,
        }

    def below(self, method: str, path: str) -> Handler | None:
        """For paths that hold an adapter's name: GET /admin/adapters/{name}, POST /admin/adapters/{name}/{action}."""
        if not path.startswith(PREFIX):
            return None
        if method in ("GET", "HEAD"):
            return self.adapter
        actions = {"pin": self.pin, "unpin": self.unpin, "prefetch": self.prefetch, "evict": self.evict}
        return actions.get(path.rpartition("/")[2]) if method == "POST" else None

    # ---- looking ----------------------------------------------------------------------------------------------------------------------

    async def adapters(self, request: web.BaseRequest) -> web.Response:
        """A page of the table, by base and name; `next` is what to send as `after` for the following one."""
        bases = [_choice("base", request.query["base"], self._catalogs)] if "base" in request.query else sorted(self._catalogs)
        wanted = _choice("state", request.query["state"], adapter_table.STATES) if "state" in request.query else None
        limit = int(_number(request, "limit", PAGE, PAGE))
        last_base, _, last_name = request.query.get("after", "").partition(":")
        rows: list[adapter_table.Row] = []
        follows = None
        for base in bases:
            if base < last_base or follows is not None:
                continue
            held = adapter_table.holders(w for w in self._dispatcher.fleet if w.beat.base == base)
            known = self._known(base)
            names = adapter_table.names_of(known, held, self._in_order(base))
            for n in range(adapter_table.after(names, last_name if base == last_base else ""), len(names)):
                if n % LOOKED_AT_ONCE == LOOKED_AT_ONCE - 1:
                    await asyncio.sleep(0)
                name = names[n]
                stored, on, record = known.get(name), held.get(name, ()), self._usage.get(base, name)
                if wanted is not None and adapter_table.state_of(stored, on, record) != wanted:
                    continue
                if len(rows) == limit:
                    follows = f"{rows[-1]['base']}:{rows[-1]['name']}"
                    break
                rows.append(adapter_table.row(base, name, stored, on, record))
        return _json({"adapters": rows, "next": follows})

    async def adapter(self, request: web.BaseRequest) -> web.Response:
        name = request.path.removeprefix(PREFIX)
        check_name(name)
        base = self._base(request)
        held = adapter_table.holders(w for w in self._dispatcher.fleet if w.beat.base == base).get(name, [])
        stored = await self._stored(base, name, needed=not held)
        row = adapter_table.row(base, name, stored, held, self._usage.get(base, name))
        pins = self._keeper.pins(base)
        pinned_on = self._keeper.state.pinned.get(base, {}).get(name, ())
        everywhere = name in pins.wanted(self._keeper.state)
        return _json({**row, "to_be_pinned": "everywhere" if everywhere else list(pinned_on), "preload": name in pins.preload})

    async def explain(self, request: web.BaseRequest) -> web.Response:
        """What each worker would cost a request for `?model=` now, best first: every term in milliseconds."""
        base, adapter = openai.split_model(request.query.get("model", ""), self._catalogs)
        stored = await self._stored(base, adapter, needed=True) if adapter is not None else None
        tokens = request.query.get("prompt_tokens", "")
        prompt_tokens = min(int(tokens), MAX_EXPLAINED_TOKENS) if tokens.isdecimal() else EXPLAINED_TOKENS
        found = self._dispatcher.explain(self._ask(base, stored, prompt_tokens, request.headers.get("x-session-id", "")))
        return _json(
            {
                "model": request.query["model"],
                "policy": self._dispatcher.policy,
                "queued": self._dispatcher.queued(base),
                "workers": [openai.candidate(c) for c in found],
            }
        )

    # ---- doing ------------------------------------------------------------------------------------------------------------------------

    async def pin(self, request: web.BaseRequest) -> web.Response:
        base, name, workers = self._target(request)
        stored = await self._stored(base, name, needed=True)
        assert stored is not None
        one = request.query.get("worker")
        pins = self._keeper.pins(base)
        await self._keeper.change(lambda state: pins.pin(state, name, one))
        outcome = await self._tend(request, "pin", base, name, stored, {w: [(Action.PIN, stored.digest)] for w in workers})
        errors = outcome.errors
        hopeless = bool(errors) and len(errors) == len(outcome.results) and all(isinstance(e, InvalidAdapter) for e in errors)
        if hopeless:
            await self._keeper.change(lambda state: pins.unpin(state, name, one))
        return outcome.answer(remembered=not hopeless)

    async def unpin(self, request: web.BaseRequest) -> web.Response:
        base, name, workers = self._target(request)
        stored = await self._stored(base, name, needed=not self._is_known(base, name))
        await self._forget_pin(base, name, request.query.get("worker"))
        todo = {w: [(Action.UNPIN, s.digest) for s in w.beat.adapters if s.name == name and s.pinned] for w in workers}
        if stored is not None:  # its pin may be younger than the last beat
            for asked in todo.values():
                asked += [] if (Action.UNPIN, stored.digest) in asked else [(Action.UNPIN, stored.digest)]
        return (await self._tend(request, "unpin", base, name, stored, todo)).answer()

    async def prefetch(self, request: web.BaseRequest) -> web.Response:
        base, name, workers = self._target(request)
        stored = await self._stored(base, name, needed=True)
        assert stored is not None
        tier = _choice("tier", request.query.get("tier", "disk"), ("disk", "gpu"))
        action = Action.LOAD if tier == "gpu" else Action.CACHE
        return (await self._tend(request, "prefetch", base, name, stored, _on_each(workers, action, stored.digest))).answer(tier=tier)

    async def evict(self, request: web.BaseRequest) -> web.Response:
        base, name, workers = self._target(request)
        return (await self._evict(request, base, name, workers, request.query.get("worker"))).answer()

    async def load(self, request: web.BaseRequest) -> web.Response:
        """vLLM's path; the files are the store's. Done once the worker that requests would go to has it in a slot."""
        asked = await _body(request, LoadRequest)
        base, name = self._adapter_of(asked.lora_name)
        self._check_path(base, name, asked.lora_path)
        stored = await self._catalog(base).look_again(name)
        found = self._dispatcher.explain(self._ask(base, stored, EXPLAINED_TOKENS, ""))
        workers = [c.worker for c in sorted(found, key=lambda c: not c.eligible)]
        chosen = workers if request.query.get("all") == "1" else workers[:1]
        self._need(workers)
        outcome = await self._tend(request, "load", base, name, stored, _on_each(chosen, Action.LOAD, stored.digest))
        return outcome.answer() if outcome.errors else _text(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    async def unload(self, request: web.BaseRequest) -> web.Response:
        asked = await _body(request, UnloadRequest)
        base, name = self._adapter_of(asked.lora_name)
        if not self._is_known(base, name):
            raise AdapterNotFound(f"The lora adapter '{asked.lora_name[:300]}' cannot be found.", param="lora_name")
        outcome = await self._evict(request, base, name, self._workers(base), None)
        return outcome.answer() if outcome.errors else _text(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")

    # ---- inside -----------------------------------------------------------------------------------------------------------------------

    async def _evict(self, request: web.BaseRequest, base: str, name: str, workers: Sequence[Worker], one: WorkerId | None) -> Outcome:
        """Every version, on each of the workers; what was pinned is pinned no longer."""
        stored = await self._stored(base, name, needed=not self._is_known(base, name))
        await self._forget_pin(base, name, one)
        newest = [stored.digest] if stored is not None else []  # it may be on its way already, unknown to the last beat
        todo = {
            w: [(Action.EVICT, d) for d in dict.fromkeys([*newest, *(s.digest for s in w.beat.adapters if s.name == name)])]
            for w in workers
        }
        return await self._tend(request, "evict", base, name, stored, todo)

    async def _forget_pin(self, base: str, name: str, one: WorkerId | None) -> None:
        pins, state = self._keeper.pins(base), self._keeper.state
        if name in pins.names(state) or name in state.unpinned.get(base, ()):
            await self._keeper.change(lambda state: pins.unpin(state, name, one))

    async def _tend(
        self,
        request: web.BaseRequest,
        what: str,
        base: str,
        name: str,
        stored: StoredAdapter | None,
        todo: Mapping[Worker, Sequence[tuple[Action, str]]],
    ) -> Outcome:
        """Asks all at once and waits for the answers, at most `?timeout_s=`."""
        timeout_s = _number(request, "timeout_s", TIMEOUT_S, MAX_TIMEOUT_S)
        outcome = Outcome(what, base, name, stored.digest if stored else None, {w.id: None for w in todo})
        asked: dict[asyncio.Future[None], tuple[Worker, AdapterRef, Action]] = {}
        for worker, actions in todo.items():
            for action, digest in actions:
                ref = AdapterRef(base, name, digest)
                files = stored if stored is not None and stored.digest == digest else None
                asked[self._dispatcher.tend(worker, action, ref, files)] = worker, ref, action
        if asked:
            await asyncio.wait(asked, timeout=timeout_s)
        for future, (worker, ref, action) in asked.items():
            if not future.done():
                future.cancel()
                late = NotDoneInTime(f"The worker has not answered within {timeout_s:g} s; what was asked goes on.")
                outcome.results[worker.id] = late
            elif isinstance(error := future.exception(), LoraplexError):
                self._usage.failed(ref, error)
                outcome.results[worker.id] = error
            elif action in (Action.CACHE, Action.LOAD, Action.PIN):
                self._usage.worked(ref)
        return outcome

    def _target(self, request: web.BaseRequest) -> tuple[str, str, list[Worker]]:
        """(base, adapter, workers) of POST /admin/adapters/{name}/{action}."""
        name = request.path.removeprefix(PREFIX).rpartition("/")[0]
        check_name(name)
        base = self._base(request)
        workers, one = self._workers(base), request.query.get("worker")
        if one is not None:
            workers = [w for w in workers if w.id == one]
            if not workers:
                raise InvalidRequest(f"No worker `{one[:200]}` serves `{base}` now.", param="worker")
        elif request.path.rpartition("/")[2] not in ("pin", "unpin"):  # pins are remembered for workers to come
            self._need(workers)
        return base, name, workers

    def _need(self, workers: Sequence[Worker]) -> None:
        if not workers:
            raise WorkerUnavailable("No worker of this model serves now.", retry_after_s=1.0)

    def _workers(self, base: str) -> list[Worker]:
        return sorted(self._dispatcher.fleet.routable(base), key=lambda w: w.id)

    def _base(self, request: web.BaseRequest) -> str:
        with_adapters = [b for b, catalog in self._catalogs.items() if catalog is not None]
        if "base" in request.query:
            return _choice("base", request.query["base"], with_adapters)
        if len(with_adapters) != 1:
            raise InvalidRequest(f"Say which base model: ?base= one of {_listed(with_adapters)}.", param="base")
        return with_adapters[0]

    def _adapter_of(self, lora_name: str) -> tuple[str, str]:
        """(base, adapter) of vLLM's lora_name: `base:adapter`, or an adapter alone where there is one base model."""
        with_adapters = [b for b, catalog in self._catalogs.items() if catalog is not None]
        if lora_name in self._catalogs:
            raise InvalidRequest(f"The lora adapter '{lora_name}' conflicts with a served base model.", param="lora_name")
        if not lora_name:
            raise InvalidRequest("'lora_name' must be provided.", param="lora_name")
        if ":" in lora_name:
            base, adapter = openai.split_model(lora_name, with_adapters)
            if adapter is not None:
                return base, adapter
        if len(with_adapters) != 1:
            raise InvalidRequest(f"Write lora_name as `base:adapter`, with a base of {_listed(with_adapters)}.", param="lora_name")
        check_name(lora_name)
        return with_adapters[0], lora_name

    def _check_path(self, base: str, name: str, path: str | None) -> None:
        """Files come from the store alone: a path from outside would load anything that the workers can read."""
        if not path:
            return
        expected = _plain_path(f"{self._stores[base]}/{name}")
        if _plain_path(path) != expected:
            raise InvalidRequest(
                f"Files come from the configured store: the adapter `{name}` is at {expected}. Leave lora_path out, or put the files there.",
                param="lora_path",
            )

    def _catalog(self, base: str) -> Catalog:
        catalog = self._catalogs[base]
        if catalog is None:
            raise AdapterNotFound(f"The model `{base}` is served without adapters.", param="model")
        return catalog

    async def _stored(self, base: str, name: str, *, needed: bool) -> StoredAdapter | None:
        """The store's newest version; None where it has none and none is needed."""
        try:
            return await self._catalog(base).find(name)
        except LoraplexError:
            if needed:
                raise
            return None

    def _is_known(self, base: str, name: str) -> bool:
        """In the catalog or on a worker."""
        return name in self._known(base) or any(s.name == name for w in self._workers(base) for s in w.beat.adapters)

    def _known(self, base: str) -> Mapping[str, StoredAdapter]:
        catalog = self._catalogs[base]
        return {} if catalog is None else catalog.known

    def _in_order(self, base: str) -> list[str]:
        known = self._known(base)
        kept = self._sorted.get(base)
        if kept is None or kept[0] is not known:
            kept = self._sorted[base] = known, sorted(known)
        return kept[1]

    def _ask(self, base: str, stored: StoredAdapter | None, prompt_tokens: int, session: str) -> Ask:
        ref = AdapterRef(base, stored.name, stored.digest) if stored is not None else None
        size_bytes = stored.size_bytes if stored is not None else 0
        return Ask(base, ref, size_bytes, prompt_tokens, session=session[:MAX_SESSION], arrived=self._dispatcher.clock())


def _on_each(workers: Sequence[Worker], action: Action, digest: str) -> dict[Worker, list[tuple[Action, str]]]:
    return {w: [(action, digest)] for w in workers}


def _result(worker: WorkerId, error: LoraplexError | None) -> dict[str, object]:
    if error is None:
        return {"worker": worker, "ok": True}
    return {"worker": worker, "ok": False, "code": error.code, "message": error.message, "retryable": error.retryable}


async def _body(request: web.BaseRequest, kind: type[T]) -> T:
    raw = await request.read()
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise InvalidRequest(f"The request body is not what this path takes: {exc}") from exc


def _choice(key: str, value: str, allowed: Sequence[str] | Mapping[str, object]) -> str:
    if value not in allowed:
        raise InvalidRequest(f"`{key}` must be one of {_listed(list(allowed))}, not `{value[:200]}`.", param=key)
    return value


def _number(request: web.BaseRequest, key: str, otherwise: float, most: float) -> float:
    given = request.query.get(key)
    if given is None:
        return otherwise
    try:
        number = float(given) if isinstance(most, float) else int(given)
    except ValueError:
        number = 0
    if not 0 < number <= most:  # false for NaN too
        raise InvalidRequest(f"`{key}` must be a number above 0 and at most {most:g}.", param=key)
    return number


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{n}`" for n in names[:10]) or "(none)"


def _plain_path(path: str) -> str:
    """file:///a/b/ and /a//b alike; a bucket's URL without Ray's `anonymous@`."""
    scheme, separator, rest = path.removeprefix("file://").partition("://")
    if not separator:
        return posixpath.normpath(scheme)
    return f"{scheme}://{posixpath.normpath(rest.removeprefix('anonymous@'))}"


def _json(value: object) -> web.Response:
    return web.Response(body=openai.to_json(value), content_type="application/json")


def _text(text: str) -> web.Response:
    return web.Response(text=text)
