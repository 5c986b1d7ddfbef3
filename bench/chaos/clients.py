"""Shell. Clients that ask one question after the other, read each answer to its end, and count what
became of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from urllib.parse import urlsplit

import aiohttp

from bench.chaos.judge import (
    Due,
    Judgement,
    Verdict,
    goes_on_from,
    judge_stream,
    judge_whole,
    read_due,
)

CLIENT_TIMEOUT_S = 60.0
"""For one answer. What takes longer has failed."""
AGAIN_S = 0.05
"""Before a client connects again that got no answer at all."""
MAX_EXAMPLES = 5
IN_USE = 409
"""The first request with the same key has not come to a worker."""
WHOLE_EVERY = 8
"""For so many streams there is one client more that asks for its answers whole."""


@dataclass(frozen=True, slots=True)
class AskedQuestion:
    model: str
    prompt: str


@dataclass(slots=True)
class Tally:
    """What became of all answers. `reconnected`: how often a client found nobody to answer and
    asked again. Times are in seconds. A gap is the time between two tokens of one stream.
    """

    verdicts: dict[Verdict, int] = field(default_factory=lambda: dict.fromkeys(Verdict, 0))
    moved: int = 0
    reconnected: int = 0
    longest_gap_s: float = 0.0
    longest_first_s: float = 0.0
    examples: list[str] = field(default_factory=list)

    @property
    def answers(self) -> int:
        return sum(self.verdicts.values())

    def add(self, question: AskedQuestion, judgement: Judgement) -> None:
        self.verdicts[judgement.verdict] += 1
        self.moved += bool(judgement.moves)
        if judgement.verdict is not Verdict.WHOLE and len(self.examples) < MAX_EXAMPLES:
            said = f"{question.model}: {judgement.verdict.value}: {judgement.detail}"
            self.examples.append(f"{time.strftime('%H:%M:%S')} {said}")


class KeyStillWaits(Exception):
    """The same question waits for a worker. It is asked again a moment later."""


class AnswerCut(Exception):
    """The connection ended in the middle of an answer, of which `begun` had come."""

    def __init__(self, begun: bytes) -> None:
        super().__init__(f"cut after {len(begun)} bytes")
        self.begun = begun


class Clients:
    """An async context manager. Its exit closes every stream that still runs. `tokens` of each
    answer. With `repeats` each question has an `Idempotency-Key`, and is asked again with it when
    its answer is cut off.
    """

    def __init__(
        self,
        url: str,
        questions: Sequence[AskedQuestion],
        tokens: int,
        rng: Random,
        *,
        repeats: bool = False,
    ) -> None:
        self.tally = Tally()
        self._url = url + "/v1/chat/completions"
        self.questions, self._tokens, self._rng = questions, tokens, rng
        self._repeats = repeats
        self._due: dict[AskedQuestion, Due] = {}
        self._lanes: list[asyncio.Task[None]] = []
        self._ending = False

    async def __aenter__(self) -> Clients:
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        for lane in self._lanes:
            lane.cancel()
        await asyncio.gather(*self._lanes, return_exceptions=True)
        await self._http.close()

    async def learn(self) -> None:
        """Asks each question once while nothing disturbs: what is due later. Raises ValueError."""

        async def ask(question: AskedQuestion) -> None:
            async with self._http.post(self._url, json=self.body(question, True)) as reply:
                self._due[question] = read_due(await reply.read())

        await asyncio.gather(*map(ask, self.questions))

    def body(self, question: AskedQuestion, stream: bool) -> Mapping[str, object]:
        body: dict[str, object] = {
            "model": question.model,
            "messages": [{"role": "user", "content": question.prompt}],
            "max_tokens": self._tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": stream,
        }
        return body | ({"stream_options": {"include_usage": True}} if stream else {})

    def start(self, streams: int) -> None:
        """So many streams at a time, and some answers that are sent whole beside them."""
        for number in range(streams + streams // WHOLE_EVERY):
            lane = self._lane(stream=number < streams)
            self._lanes.append(asyncio.create_task(lane, name=f"client {number}"))

    async def finish(self) -> None:
        """Sends no new questions. Waits for the answers that are under way."""
        self._ending = True
        await asyncio.gather(*self._lanes)

    async def ask_once(self, question: AskedQuestion, stream: bool = True) -> None:
        self.tally.add(question, await self._ask(question, stream))

    async def leave(self, question: AskedQuestion, after_s: float, abort: bool) -> None:
        """A client of its own that leaves `after_s` after it has asked. With `abort` it resets its
        connection.
        """
        body = json.dumps(self.body(question, True)).encode()
        at = urlsplit(self._url)
        reader, writer = await asyncio.open_connection(at.hostname, at.port)
        try:
            writer.write(
                f"POST {at.path} HTTP/1.1\r\nHost: {at.netloc}\r\nContent-Type: application/json"
                f"\r\nContent-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(after_s):
                    while await reader.read(1 << 16):
                        pass
        finally:
            if abort:
                writer.transport.abort()
            writer.close()

    def clean(self, raw: bytes) -> bytes:
        """What is compared with what is due."""
        return raw

    def due(self, question: AskedQuestion) -> Due:
        return self._due[question]

    async def _lane(self, stream: bool) -> None:
        while not self._ending:
            await self.ask_once(self._rng.choice(self.questions), stream)

    async def _ask(self, question: AskedQuestion, stream: bool) -> Judgement:
        """Asks again for as long as nobody answers at all, as clients and balancers do."""
        key = {"Idempotency-Key": f"{self._rng.getrandbits(64):x}"} if self._repeats else {}
        begun = b""
        try:
            async with asyncio.timeout(CLIENT_TIMEOUT_S):
                while True:
                    try:
                        return await self._answer(question, stream, key, begun)
                    except AnswerCut as cut:
                        begun = max(begun, cut.begun, key=len)
                    except (aiohttp.ClientConnectionError, KeyStillWaits):
                        pass
                    self.tally.reconnected += 1
                    await asyncio.sleep(AGAIN_S)
        except TimeoutError:
            return Judgement(Verdict.FAILED, f"no end within {CLIENT_TIMEOUT_S:g} s")

    async def _answer(
        self, question: AskedQuestion, stream: bool, headers: Mapping[str, str], begun: bytes
    ) -> Judgement:
        """Raises ClientConnectionError if there was no answer at all. A client that repeats its
        questions raises AnswerCut or KeyStillWaits where it asks again. `begun` is what it has got
        of the answer before.
        """
        body, due = self.body(question, stream), self.due(question)
        asked = time.monotonic()
        async with self._http.post(self._url, json=body, headers=headers) as reply:
            if reply.status == IN_USE and self._repeats:
                raise KeyStillWaits
            if reply.status != 200:
                return Judgement(Verdict.FAILED, f"{reply.status} {(await reply.text())[:160]}")
            if stream:
                raw, cut = await self._read(reply, asked)
                if cut and self._repeats:
                    raise AnswerCut(raw)
                if not goes_on_from(begun, raw):
                    return Judgement(Verdict.WRONG, "asked again it is another answer")
                return judge_stream(self.clean(raw), due)
            try:
                return judge_whole(await reply.read(), due)
            except aiohttp.ClientError as exc:
                if self._repeats:
                    raise AnswerCut(b"") from exc
                return Judgement(Verdict.FAILED, f"cut: {exc!r}")

    async def _read(self, reply: aiohttp.ClientResponse, asked: float) -> tuple[bytes, bool]:
        """What came of a stream, and whether it was cut."""
        pieces: list[bytes] = []
        last: float | None = None
        tally = self.tally
        try:
            async for piece in reply.content.iter_any():
                pieces.append(piece)
                if b"data: " not in piece:
                    continue  # a comment that keeps the connection alive
                now = time.monotonic()
                if last is None:
                    tally.longest_first_s = max(tally.longest_first_s, now - asked)
                else:
                    tally.longest_gap_s = max(tally.longest_gap_s, now - last)
                last = now
        except aiohttp.ClientError:
            return b"".join(pieces), True
        return b"".join(pieces), False


def questions(models: Sequence[str], prompts: Sequence[str]) -> list[AskedQuestion]:
    return [AskedQuestion(model, prompt) for model, prompt in itertools.product(models, prompts)]
