"""Shell. The cost of a request. What it will likely take counts against its tenant's turn from the
moment it is sent. At its end the cost is settled with the policy, the limits, the ledger and the
metrics.
"""

from __future__ import annotations

import msgspec

from gateway.dispatch.lifecycle import RequestPhase
from gateway.dispatch.queue import fairness
from gateway.dispatch.queue.admission import Admission
from gateway.dispatch.queue.overload import DrainRates
from gateway.dispatch.request import NOTHING_USED, InFlightRequest, UsedTokens
from gateway.dispatch.request_summary import ended_request, outcome_of
from gateway.routing.policy import Choice, ChoiceReason, Policy
from gateway.telemetry.prometheus import Metrics
from shared.link import messages, token_ids

MAX_UNSETTLED = 10_000
LAST_WORD_S = 2.0
"""How long a worker may take to report what a request has used that it was told to stop. After that
it is estimated.
"""


LOADS = frozenset({ChoiceReason.COLD, ChoiceReason.SPILL})
"""Reasons of a choice for which its worker loads the adapter."""


class Settlement:
    """Every answer updates `drains`."""

    def __init__(
        self,
        policy: Policy,
        admission: Admission[InFlightRequest],
        metrics: Metrics,
        drains: DrainRates,
    ) -> None:
        self._policy, self._admission, self._metrics = policy, admission, metrics
        self._drains = drains
        # stopped, until their workers say how far they had come
        self._unsettled: dict[messages.StreamId, InFlightRequest] = {}

    def charge(self, request: InFlightRequest, choice: Choice) -> None:
        """The request was sent. The policy is told, and the tokens that the request will likely
        take count against its tenant's turn. If an adapter is loaded for it, the tenant is charged
        the tokens that the engine could have made meanwhile. It is not for a request of which
        workers died: one that had the adapter is gone, and this one may refuse it for a trial.
        """
        routing_request, base = request.routing_request, request.model.base
        self._policy.sent(routing_request, choice, request.t_sent)
        if base not in self._admission.queues:
            return  # nobody waits for a turn
        cost = choice.cost
        expected = fairness.service(routing_request.prompt_tokens, routing_request.output_tokens)
        request.expected_service += expected
        self._admission.expect(base, request.flow, expected)
        # whoever joins a load that is under way waits for it, and has not caused it
        if choice.reason in LOADS and cost is not None and not request.suspicion:
            load_s = cost.load_s + cost.stall_s
            lost_tokens = load_s * self._drains.of(base).stream_tokens_per_s()
            self._admission.charge(base, request.flow, fairness.service(0, lost_tokens))

    def take_back(self, request: InFlightRequest) -> None:
        """The request was sent in vain, and takes no tokens yet."""
        base = request.model.base
        if base in self._admission.queues:
            self._admission.expect(base, request.flow, -request.expected_service)
        request.expected_service = 0.0

    def settle(self, request: InFlightRequest) -> None:
        """The request has ended: its phase and its times are final."""
        base = request.model.base
        self._tell_policy(request)
        used = request.used = self._used(request)
        if request.t_sent and base in self._admission.queues:
            # what the engine refuses has been looked at, as far as its prompt
            prompt_tokens = used.prompt_tokens or request.routing_request.prompt_tokens
            self._admission.expect(base, request.flow, -request.expected_service)
            self._admission.charge(
                base, request.flow, fairness.service(prompt_tokens, used.output_tokens)
            )
        if request.stopped and request.done is None and len(self._unsettled) < MAX_UNSETTLED:
            # it may be large
            request.client_request = msgspec.structs.replace(request.client_request, body=b"")
            self._unsettled[request.sid] = request
        else:
            self._charge_for(request)
        ended = ended_request(request, outcome_of(request))
        self._metrics.finished(ended)
        if request.lost:
            self._metrics.lost(request.lost)
        if request.trace is not None:
            request.trace.ended(ended)

    def take_report(self, peer: bytes, done: messages.Done) -> bool:
        """A worker reports what a request has used that it was told to stop. False: that request is
        not waited for.
        """
        request = self._unsettled.get(done.sid)
        if request is None or request.peer != peer:
            return False
        del self._unsettled[done.sid]
        request.done = done
        self._settle_late(request)
        return True

    def expire(self, now: float) -> None:
        """Estimates what workers have not reported in time."""
        for request in [r for r in self._unsettled.values() if now > r.t_end + LAST_WORD_S]:
            del self._unsettled[request.sid]
            self._settle_late(request)

    def _tell_policy(self, request: InFlightRequest) -> None:
        routing_request, done, now = request.routing_request, request.done, request.t_end
        if request.lifecycle.phase is not RequestPhase.FINISHED or request.choice is None:
            self._policy.left(routing_request, now)
            return
        tokens = done.output_tokens if done is not None else 0
        tenant = request.requester.tenant
        served_s = now - request.t_sent
        seen = request.client_request.streams and request.t_head > request.t_sent
        first_token_s = request.t_head - request.t_sent if seen else 0.0
        self._policy.finished(routing_request, request.choice, served_s, first_token_s, now)
        if tokens:
            each = tokens // request.client_request.choices
            self._drains.served(request.model.base, tenant, served_s, each)
        self._admission.abandonment.ended(tenant, in_vain=False)

    def _settle_late(self, request: InFlightRequest) -> None:
        request.used = self._used(request)
        self._charge_for(request)

    def _charge_for(self, request: InFlightRequest) -> None:
        """`used` is final."""
        used = request.used
        if used != NOTHING_USED:
            self._metrics.tokens(request.model.base, used.prompt_tokens, used.output_tokens)
        if request.usage_sink is not None:
            request.usage_sink.settle(request)

    def _used(self, request: InFlightRequest) -> UsedTokens:
        """What the worker counted. Without its word it is what the client has got of a stream, or
        else is estimated from the time that the worker spent on it. A worker that is lost before
        the client has seen anything costs the client nothing.
        """
        done, journal, client_request = request.done, request.journal, request.client_request
        if done is not None:
            return UsedTokens(done.prompt_tokens, done.output_tokens)
        if not request.t_sent or not (request.stopped or journal.begun):
            return NOTHING_USED
        if journal.tokens:
            return UsedTokens(client_request.prompt_tokens, token_ids.count(bytes(journal.tokens)))
        rate = self._drains.of(request.model.base).stream_tokens_per_s()
        tokens = int((request.t_end - request.t_sent) * rate)
        most = client_request.output_tokens or tokens
        return UsedTokens(client_request.prompt_tokens, min(tokens, most) * client_request.choices)
