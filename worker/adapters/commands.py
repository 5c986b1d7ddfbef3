"""Shell. The operators' commands that this worker has not answered yet, each with its number and
the gateway that waits for the answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias, assert_never

from shared.adapters.identity import AdapterRef
from shared.errors import LoraplexError, Overloaded, TooManyPins, WorkerUnavailable
from shared.link import messages
from worker.adapters.residency import CommandDone, Instruction, Reject, Residency, Start
from worker.session import GatewaySession

MAX_OPEN = 4096
"""Open commands of all gateways together; each gateway sends at most 1,000 to one worker."""
CommandAnswer: TypeAlias = Start | Reject | CommandDone


@dataclass(slots=True)
class _OpenCommand:
    session: GatewaySession
    sid: messages.StreamId
    action: messages.AdapterAction
    adapter: AdapterRef


class CommandRunner:
    """The open commands of one worker. Commands have negative numbers and requests positive ones,
    so residency's answers to them can be told apart.
    """

    def __init__(self) -> None:
        self._open: dict[int, _OpenCommand] = {}

    def begin(
        self,
        number: int,
        session: GatewaySession,
        message: messages.AdapterCommand,
        serving: bool,
        residency: Residency,
        now: float,
    ) -> list[Instruction]:
        """Accepts the command, or refuses it at once. Returns what residency wants done for it."""
        command = _OpenCommand(session, message.sid, message.action, message.adapter)
        error = self._objection(message, serving, residency)
        if error is not None:
            _refuse(command, error.code, error.message, error.retryable)
            return []
        self._open[number] = command
        match message.action:
            case messages.AdapterAction.CACHE:
                return residency.cache(number, message.adapter, now)
            case messages.AdapterAction.LOAD | messages.AdapterAction.PIN:
                return residency.want(number, message.adapter, now)
            case messages.AdapterAction.UNPIN:
                self._unpin(message.adapter)
                return [*residency.unpin(message.adapter, now), CommandDone(number)]
            case messages.AdapterAction.EVICT:
                self._unpin(message.adapter)
                return residency.evict(number, message.adapter, now)
            case _:
                assert_never(message.action)

    def settle(self, answer: CommandAnswer, residency: Residency, now: float) -> list[Instruction]:
        """Answers the command with this number and forgets it. If no command has the number, it was
        a prefetch, or its gateway has gone.
        """
        command = self._open.pop(answer.request, None)
        instructions: list[Instruction] = []
        if command is None:
            pass
        elif isinstance(answer, Reject):
            _refuse(command, answer.code, answer.message, answer.retryable)
        elif command.action is messages.AdapterAction.PIN and not residency.slots.may_pin(
            command.adapter
        ):
            # other pins were completed while this adapter was loaded
            error = _too_many(command.adapter, residency)
            _refuse(command, error.code, error.message, error.retryable)
        else:
            if command.action is messages.AdapterAction.PIN:
                instructions += residency.pin(command.adapter, now)
            command.session.outbox.done(messages.Done(command.sid))
        return instructions + residency.finish(answer.request, now)

    def forget(self, session: GatewaySession) -> list[int]:
        """The gateway is gone. Returns the numbers of its commands, which residency then ends."""
        numbers = [number for number, command in self._open.items() if command.session is session]
        for number in numbers:
            del self._open[number]
        return numbers

    def _objection(
        self, message: messages.AdapterCommand, serving: bool, residency: Residency
    ) -> LoraplexError | None:
        if not serving:
            return WorkerUnavailable("The worker is not serving.")
        if len(self._open) >= MAX_OPEN:
            return Overloaded(
                f"The worker has {MAX_OPEN} open adapter commands already; try again later."
            )
        if not residency.slots.size:
            return WorkerUnavailable("This worker has no adapter slots.")
        if message.action is messages.AdapterAction.PIN and not residency.slots.may_pin(
            message.adapter
        ):
            return _too_many(message.adapter, residency)
        return None

    def _unpin(self, adapter: AdapterRef) -> None:
        """A later command overrides a pin that is still being loaded: it becomes a plain load."""
        for command in self._open.values():
            if command.adapter == adapter and command.action is messages.AdapterAction.PIN:
                command.action = messages.AdapterAction.LOAD


def _too_many(adapter: AdapterRef, residency: Residency) -> TooManyPins:
    size = residency.slots.size
    return TooManyPins(
        f"The adapter `{adapter.name}` cannot be pinned: {size - 1} of this worker's "
        f"{size} slots may be, since one must stay for the "
        "others; unpin one, or give the worker more slots (max_num_adapters_per_replica)."
    )


def _refuse(command: _OpenCommand, code: str, message: str, retryable: bool) -> None:
    command.session.outbox.refuse(messages.Refused(command.sid, code, message, retryable))
