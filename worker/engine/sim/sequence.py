"""Shell. One answer on its way through the simulated engine, and the frames that it sends."""

from __future__ import annotations

import asyncio

from shared.errors import EngineFailure
from shared.link.token_ids import pack
from worker.engine.base import Reply
from worker.engine.sim.answers import FINISH_REASON, Answer


class SimSequence:
    """The answer begins with the token after those that were
    `seen`. `done` resolves with its last token. Instead of its token `dies_at` the engine dies.
    """

    __slots__ = (
        "answer",
        "arrived",
        "begun",
        "dies_at",
        "done",
        "prefill_began",
        "prefill_tokens",
        "ready",
        "reply",
        "sent",
    )

    def __init__(
        self,
        answer: Answer,
        reply: Reply,
        arrived: float,
        done: asyncio.Future[None],
        seen: int,
        dies_at: int | None,
    ) -> None:
        self.answer, self.reply, self.arrived, self.done = answer, reply, arrived, done
        self.sent, self.dies_at = seen, dies_at
        self.begun = False
        self.prefill_tokens = answer.prompt_tokens + seen
        self.prefill_began = self.ready = 0.0

    def advance(self) -> bool:
        """Emits one more token. True if it was the last. Raises EngineFailure if it is deadly."""
        answer, reply, number = self.answer, self.reply, self.sent
        if number == self.dies_at:
            raise EngineFailure("a prompt had the deadly word")
        self.sent = reply.output_tokens = number + 1
        last = self.sent == answer.max_tokens
        if last:
            reply.finish_reasons = FINISH_REASON
        if not answer.stream:
            if last:
                reply.head(200, False, answer.body(), True)
            else:
                reply.progress(pack((number,)))
        elif self.begun:
            reply.more(answer.event(number), last, pack((number,)))
        else:
            self.begun = True
            reply.head(200, True, answer.event(number), last, pack((number,)))
        return last
