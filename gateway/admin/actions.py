"""Shell. What operators make workers do over HTTP: pin, unpin, prefetch and evict adapters, and
vLLM's own load and unload.
"""

from __future__ import annotations

import asyncio
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
from aiohttp import web

from gateway.adapters.model_names import split_model
from gateway.adapters.reconciler import Reconciler
from gateway.adapters.usage import AdapterUsage
from gateway.admin.context import AdminContext
from gateway.admin.parameters import body_of, choice, listed, number, text_answer
from gateway.fleet.worker_view import WorkerView
from gateway.http.json_responses import error_body, to_json
from shared.adapters.identity import AdapterRef, StoredAdapter, check_name
from shared.errors import (
    AdapterNotFound,
    InvalidAdapter,
    InvalidRequest,
    LoraplexError,
    NotDoneInTime,
)
from shared.link.messages import AdapterAction, WorkerId

PREFIX = "/admin/adapters/"
# Prompt length that is assumed when a worker is chosen for an adapter without a request.
TYPICAL_TOKENS = 128
TIMEOUT_S, MAX_TIMEOUT_S = 60.0, 600.0
MULTI_STATUS = 207


class LoadRequest(msgspec.Struct, frozen=True):
    """vLLM's request body (vllm/entrypoints/serve/lora/protocol.py, 0.32)."""

    lora_name: str
    lora_path: str | None = None
    load_inplace: bool = False


class UnloadRequest(msgspec.Struct, frozen=True):
    lora_name: str
    lora_int_id: int | None = None


@dataclass(slots=True)
class ActionOutcome:
    """The result of one action: per worker None or the error."""

    action: str
    base: str
    name: str
    digest: str | None
    results: dict[WorkerId, LoraplexError | None] = field(default_factory=dict)

    @property
    def errors(self) -> list[LoraplexError]:
        return [e for e in self.results.values() if e is not None]

    def answer(self, **more: object) -> web.Response:
        """Status 200 if all workers succeeded, the error's status if none did, 207 in between."""
        errors = self.errors
        status = (
            200
            if not errors
            else MULTI_STATUS
            if len(errors) < len(self.results)
            else errors[0].status
        )
        body: dict[str, object] = {
            "adapter": self.name,
            "base": self.base,
            "digest": self.digest,
            "action": self.action,
            **more,
        }
        if errors:
            body |= msgspec.json.decode(error_body(errors[0]))
        body["results"] = [_result(worker, error) for worker, error in self.results.items()]
        return web.Response(status=status, body=to_json(body), content_type="application/json")


class AdminActions:
    """`stores` maps each base model to the URL of its adapter store."""

    def __init__(
        self,
        context: AdminContext,
        stores: Mapping[str, str],
        reconciler: Reconciler,
        usage: AdapterUsage,
    ) -> None:
        self._context = context
        self._stores = stores
        self._reconciler = reconciler
        self._usage = usage

    async def pin(self, request: web.BaseRequest) -> web.Response:
        base, name, workers = self._target(request)
        stored = await self._context.stored(base, name, needed=True)
        assert stored is not None
        one = request.query.get("worker")
        pins = self._reconciler.pins(base)
        await self._reconciler.change(lambda state: pins.pin(state, name, one))
        outcome = await self._send_all(
            request,
            "pin",
            base,
            name,
            stored,
            {w: [(AdapterAction.PIN, stored.digest)] for w in workers},
        )
        errors = outcome.errors
        hopeless = (
            bool(errors)
            and len(errors) == len(outcome.results)
            and all(isinstance(e, InvalidAdapter) for e in errors)
        )
        if hopeless:
            await self._reconciler.change(lambda state: pins.unpin(state, name, one))
        return outcome.answer(remembered=not hopeless)

    async def unpin(self, request: web.BaseRequest) -> web.Response:
        base, name, workers = self._target(request)
        stored = await self._context.stored(
            base, name, needed=not self._context.is_known(base, name)
        )
        await self._forget_pin(base, name, request.query.get("worker"))
        todo = {
            w: [
                (AdapterAction.UNPIN, s.digest)
                for s in w.heartbeat.adapters
                if s.name == name and s.pinned
            ]
            for w in workers
        }
        if stored is not None:  # it may have been pinned after the last heartbeat
            for actions in todo.values():
                actions += (
                    []
                    if (AdapterAction.UNPIN, stored.digest) in actions
                    else [(AdapterAction.UNPIN, stored.digest)]
                )
        return (await self._send_all(request, "unpin", base, name, stored, todo)).answer()

    async def prefetch(self, request: web.BaseRequest) -> web.Response:
        base, name, workers = self._target(request)
        stored = await self._context.stored(base, name, needed=True)
        assert stored is not None
        tier = choice("tier", request.query.get("tier", "disk"), ("disk", "gpu"))
        action = AdapterAction.LOAD if tier == "gpu" else AdapterAction.CACHE
        return (
            await self._send_all(
                request, "prefetch", base, name, stored, _on_each(workers, action, stored.digest)
            )
        ).answer(tier=tier)

    async def evict(self, request: web.BaseRequest) -> web.Response:
        base, name, workers = self._target(request)
        return (
            await self._evict(request, base, name, workers, request.query.get("worker"))
        ).answer()

    async def load(self, request: web.BaseRequest) -> web.Response:
        """vLLM's path for loading; the files come from the store. It answers when the worker that
        requests would go to has the adapter in a slot.
        """
        load = await body_of(request, LoadRequest)
        base, name = self._adapter_of(load.lora_name)
        self._check_path(base, name, load.lora_path)
        stored = await self._context.catalog(base).look_again(name, whole=True)
        found = self._context.dispatcher.explain(
            self._context.routing_request(
                base, AdapterRef(base, name, stored.digest), stored, TYPICAL_TOKENS, ""
            )
        )
        workers = [c.worker for c in sorted(found, key=lambda c: not c.eligible)]
        chosen = workers if request.query.get("all") == "1" else workers[:1]
        self._context.need(workers)
        outcome = await self._send_all(
            request, "load", base, name, stored, _on_each(chosen, AdapterAction.LOAD, stored.digest)
        )
        return (
            outcome.answer()
            if outcome.errors
            else text_answer(f"Success: LoRA adapter '{load.lora_name}' added successfully.")
        )

    async def unload(self, request: web.BaseRequest) -> web.Response:
        unload = await body_of(request, UnloadRequest)
        base, name = self._adapter_of(unload.lora_name)
        if not self._context.is_known(base, name):
            raise AdapterNotFound(
                f"The lora adapter '{unload.lora_name[:300]}' cannot be found.", param="lora_name"
            )
        _timeout_s(request)
        outcome = await self._evict(request, base, name, self._context.workers(base), None)
        return (
            outcome.answer()
            if outcome.errors
            else text_answer(f"Success: LoRA adapter '{unload.lora_name}' removed successfully.")
        )

    # ---- inside ----------------------------------------------------------------------------------

    async def _evict(
        self,
        request: web.BaseRequest,
        base: str,
        name: str,
        workers: Sequence[WorkerView],
        one: WorkerId | None,
    ) -> ActionOutcome:
        """Evicts every version on each of the workers. The pins of the name end."""
        stored = await self._context.stored(
            base, name, needed=not self._context.is_known(base, name)
        )
        await self._forget_pin(base, name, one)
        # The version may be on its way to a worker, unknown to the last heartbeat.
        newest = [stored.digest] if stored is not None else []
        todo = {
            w: [
                (AdapterAction.EVICT, d)
                for d in dict.fromkeys(
                    [*newest, *(s.digest for s in w.heartbeat.adapters if s.name == name)]
                )
            ]
            for w in workers
        }
        return await self._send_all(request, "evict", base, name, stored, todo)

    async def _forget_pin(self, base: str, name: str, one: WorkerId | None) -> None:
        pins, state = self._reconciler.pins(base), self._reconciler.state
        if name in pins.names(state) or name in state.unpinned.get(base, ()):
            await self._reconciler.change(lambda state: pins.unpin(state, name, one))

    async def _send_all(
        self,
        request: web.BaseRequest,
        what: str,
        base: str,
        name: str,
        stored: StoredAdapter | None,
        todo: Mapping[WorkerView, Sequence[tuple[AdapterAction, str]]],
    ) -> ActionOutcome:
        """Sends all commands at once and waits for the answers, at most `?timeout_s=` seconds."""
        timeout_s = _timeout_s(request)
        outcome = ActionOutcome(
            what, base, name, stored.digest if stored else None, {w.id: None for w in todo}
        )
        sent: dict[asyncio.Future[None], tuple[WorkerView, AdapterRef, AdapterAction]] = {}
        for worker, actions in todo.items():
            for action, digest in actions:
                ref = AdapterRef(base, name, digest)
                files = stored if stored is not None and stored.digest == digest else None
                sent[self._context.dispatcher.send_command(worker, action, ref, files)] = (
                    worker,
                    ref,
                    action,
                )
        if sent:
            await asyncio.wait(sent, timeout=timeout_s)
        for future, (worker, ref, action) in sent.items():
            if not future.done():
                future.cancel()
                late = NotDoneInTime(
                    f"The worker has not answered within {timeout_s:g} s; what was asked goes on."
                )
                outcome.results[worker.id] = late
            elif isinstance(error := future.exception(), LoraplexError):
                self._usage.failed(ref, error)
                outcome.results[worker.id] = error
            elif action in (AdapterAction.CACHE, AdapterAction.LOAD, AdapterAction.PIN):
                self._usage.worked(ref)
        return outcome

    def _target(self, request: web.BaseRequest) -> tuple[str, str, list[WorkerView]]:
        """(base, adapter, workers) of POST /admin/adapters/{name}/{action}. A bad request is
        refused before anything is done.
        """
        _timeout_s(request)
        name = request.path.removeprefix(PREFIX).rpartition("/")[0]
        check_name(name)
        base = self._context.base(request)
        workers, one = self._context.workers(base), request.query.get("worker")
        if one is not None:
            workers = [w for w in workers if w.id == one]
            if not workers:
                raise InvalidRequest(
                    f"No worker `{one[:200]}` serves `{base}` now.", param="worker"
                )
        elif request.path.rpartition("/")[2] not in ("pin", "unpin"):
            # Pins are stored for workers that come later.
            self._context.need(workers)
        return base, name, workers

    def _adapter_of(self, lora_name: str) -> tuple[str, str]:
        """(base, adapter) of vLLM's lora_name: `base:adapter`, or the adapter's name alone if there
        is one base model.
        """
        with_adapters = self._context.with_adapters()
        if lora_name in self._context.catalogs:
            raise InvalidRequest(
                f"The lora adapter '{lora_name}' conflicts with a served base model.",
                param="lora_name",
            )
        if not lora_name:
            raise InvalidRequest("'lora_name' must be provided.", param="lora_name")
        if ":" in lora_name:
            base, adapter = split_model(lora_name, with_adapters)
            if adapter is not None:
                return base, adapter
        if len(with_adapters) != 1:
            raise InvalidRequest(
                f"Write lora_name as `base:adapter`, with a base of {listed(with_adapters)}.",
                param="lora_name",
            )
        check_name(lora_name)
        return with_adapters[0], lora_name

    def _check_path(self, base: str, name: str, path: str | None) -> None:
        """Files come only from the store. A path from outside would load any file that the workers
        can read.
        """
        if not path:
            return
        expected = _plain_path(f"{self._stores[base]}/{name}")
        if _plain_path(path) != expected:
            raise InvalidRequest(
                f"Files come from the configured store: the adapter `{name}` is at "
                f"{expected}. Leave lora_path out, or put the files there.",
                param="lora_path",
            )


def _timeout_s(request: web.BaseRequest) -> float:
    return number(request, "timeout_s", TIMEOUT_S, MAX_TIMEOUT_S)


def _on_each(
    workers: Sequence[WorkerView], action: AdapterAction, digest: str
) -> dict[WorkerView, list[tuple[AdapterAction, str]]]:
    return {w: [(action, digest)] for w in workers}


def _result(worker: WorkerId, error: LoraplexError | None) -> dict[str, object]:
    if error is None:
        return {"worker": worker, "ok": True}
    return {
        "worker": worker,
        "ok": False,
        "code": error.code,
        "message": error.message,
        "retryable": error.retryable,
    }


def _plain_path(path: str) -> str:
    """One spelling of file:///a/b/ and /a//b, and a bucket's URL without Ray's `anonymous@`."""
    scheme, separator, rest = path.removeprefix("file://").partition("://")
    if not separator:
        return posixpath.normpath(scheme)
    return f"{scheme}://{posixpath.normpath(rest.removeprefix('anonymous@'))}"
