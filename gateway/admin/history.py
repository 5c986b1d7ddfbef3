"""Shell. `GET /admin/requests`: the last requests, the timeline of one of them, and the last hour.

Each gateway process remembers its own requests. The one that is asked asks the others on its
machine, so an answer has those of all.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, TypeAlias, TypeVar, assert_never
from urllib.parse import unquote

import msgspec
from aiohttp import web

from gateway.adapters.usage import AdapterUsage, UsageRecord
from gateway.admin.parameters import Handler, json_answer, number
from gateway.admin.requests import timeline
from gateway.dispatch.dispatcher import Dispatcher
from gateway.http.headers import is_request_id
from gateway.http.json_responses import to_json
from gateway.telemetry.recorder import (
    MAX_REQUESTS,
    STEP_S,
    Interval,
    Recorder,
    decode_steps,
    encode_steps,
    newest,
)
from gateway.telemetry.wall_clock import wall_offset
from shared.errors import RequestNotFound
from shared.runtime.log import recent_lines

PREFIX = "/admin/requests/"
PAGE = 100

T = TypeVar("T")
RequestRow: TypeAlias = dict[str, Any]
AskOthers: TypeAlias = Callable[[bytes], Awaitable[Mapping[str, bytes]]]
"""See ProcessAggregator.ask_others."""


class StoryQuestion(msgspec.Struct, frozen=True, tag="story"):
    """What another process knows of a request, as JSON."""

    id: str


class ListQuestion(msgspec.Struct, frozen=True, tag="list"):
    """The rows of its requests that match all filters, as a list of JSON objects. `whole`: with all
    that is known of each.
    """

    most: int
    tenant: str = ""
    adapter: str = ""
    worker: str = ""
    status: str = ""
    whole: bool = False


class NewsQuestion(msgspec.Struct, frozen=True, tag="news"):
    """What has come since the last question, for the live page: a ProcessNews. `seen` has, by
    process, the `until` of its last answer.
    """

    seen: dict[str, float]


class HourQuestion(msgspec.Struct, frozen=True, tag="hour"):
    """The steps of its last hour."""


class UsageQuestion(msgspec.Struct, frozen=True, tag="usage"):
    """What it has seen of the adapter, or of all where `name` is empty: UsageElsewhere."""

    base: str = ""
    name: str = ""


class LogQuestion(msgspec.Struct, frozen=True, tag="log"):
    """Its last log lines."""


HistoryQuestion: TypeAlias = (
    StoryQuestion | ListQuestion | NewsQuestion | HourQuestion | UsageQuestion | LogQuestion
)


class UsageElsewhere(msgspec.Struct, frozen=True):
    """`recent` are the requests for the one adapter that was asked for, in the time that the
    advisor looks back on.
    """

    records: list[tuple[str, str, UsageRecord]]
    recent: int


class ProcessNews(msgspec.Struct, frozen=True):
    """`rows` are the requests that have ended between the last question and `until`, the newest
    first. `queued` is by base model, `moved` by worker.
    """

    until: float
    rows: list[RequestRow]
    open_requests: int
    queued: dict[str, int]
    moved: dict[str, int]


_read_question = msgspec.json.Decoder(HistoryQuestion).decode
_read_story = msgspec.json.Decoder(RequestRow).decode
_read_rows = msgspec.json.Decoder(list[RequestRow]).decode
_read_usage = msgspec.json.Decoder(UsageElsewhere).decode
_read_news = msgspec.json.Decoder(ProcessNews).decode


class HistoryAdmin:
    """`process` is the name of this gateway process."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        recorder: Recorder,
        process: str,
        ask_others: AskOthers,
        bases: list[str],
        usage: AdapterUsage,
    ) -> None:
        self._usage = usage
        self._dispatcher, self._recorder, self._process = dispatcher, recorder, process
        self._ask_others, self._bases = ask_others, bases

    def routes(self) -> Mapping[tuple[str, str], Handler]:
        return {
            ("GET", "/admin/requests"): self.requests,
            ("GET", "/admin/series"): self.series,
            ("GET", "/admin/logs"): self.logs,
        }

    def below(self, method: str, path: str) -> Handler | None:
        return self.request if method in ("GET", "HEAD") and path.startswith(PREFIX) else None

    async def requests(self, request: web.BaseRequest) -> web.Response:
        """The newest requests first. `?key=`, `?adapter=`, `?worker=` and `?status=` filter
        them. With `?whole=1` each has its decision and its story, and there are PAGE at most.
        """
        asked = request.query
        whole = asked.get("whole") == "1"
        question = ListQuestion(
            int(number(request, "limit", PAGE, PAGE if whole else MAX_REQUESTS)),
            asked.get("key", ""),
            asked.get("adapter", ""),
            asked.get("worker", ""),
            asked.get("status", ""),
            whole,
        )
        told = _read(await self._ask_others(to_json(question)), _read_rows)
        rows = [*self._rows(question), *(row for theirs in told.values() for row in theirs or ())]
        rows.sort(key=lambda row: str(row["at"]), reverse=True)
        return json_answer({**self._who(told), "requests": rows[: question.most]})

    async def logs(self, request: web.BaseRequest) -> web.Response:
        """The last log lines of each gateway process, one JSON object a line."""
        told = await self._ask_others(to_json(LogQuestion()))
        lines = b"".join((_log_lines(), *told.values()))
        return web.Response(body=lines, content_type="text/plain", charset="utf-8")

    async def request(self, request: web.BaseRequest) -> web.Response:
        """`/admin/requests/{id}`: the newest with this id, whichever process had it. Raises
        RequestNotFound.
        """
        request_id = unquote(request.path.removeprefix(PREFIX))
        stories = [self._story(request_id)]
        if is_request_id(request_id):
            told = await self._ask_others(to_json(StoryQuestion(request_id)))
            stories += _read(told, _read_story).values()
        found = max((s for s in stories if s), key=lambda story: str(story["at"]), default=None)
        if found is None:
            raise RequestNotFound(
                f"The request `{request_id[:128]}` is not open, and not among the last "
                f"{MAX_REQUESTS} that ended in a gateway process of this machine."
            )
        return json_answer(found)

    async def series(self, request: web.BaseRequest) -> web.Response:
        """The last hour in steps of ten seconds, the newest step last."""
        told = _read(await self._ask_others(to_json(HourQuestion())), decode_steps)
        others: list[Interval] = [step for steps in told.values() for step in steps or ()]
        now = time.monotonic()
        return json_answer(
            {
                **self._who(told),
                "step_s": STEP_S,
                "until": round(now + wall_offset(), 3),
                "series": self._recorder.series(now, others=others),
                "errors": self._recorder.errors(now, others),
            }
        )

    def answer(self, question: bytes) -> bytes:
        """What this process tells another one. Empty: nothing."""
        asked: HistoryQuestion = _read_question(question)
        match asked:
            case StoryQuestion(request_id):
                story = self._story(request_id)
                return b"" if story is None else to_json(story)
            case ListQuestion() as filters:
                return to_json(self._rows(filters))
            case NewsQuestion(seen):
                return to_json(self._news(seen.get(self._process, 0.0)))
            case HourQuestion():
                return encode_steps(self._recorder.steps)
            case UsageQuestion(base, name):
                return to_json(self._usage_of(base, name))
            case LogQuestion():
                return _log_lines()
        assert_never(asked)

    async def news(self, seen: dict[str, float]) -> dict[str, ProcessNews]:
        """The news of the other processes, by process. `seen`: see NewsQuestion."""
        told = _read(await self._ask_others(to_json(NewsQuestion(seen))), _read_news)
        return {process: news for process, news in told.items() if news is not None}

    async def usage_elsewhere(self, base: str = "", name: str = "") -> UsageElsewhere:
        """What the other processes have seen of the adapter, or of all where `name` is empty."""
        told = _read(await self._ask_others(to_json(UsageQuestion(base, name))), _read_usage)
        found = [usage for usage in told.values() if usage is not None]
        records = [record for usage in found for record in usage.records]
        return UsageElsewhere(records, sum(usage.recent for usage in found))

    async def queued_elsewhere(self) -> Mapping[str, int]:
        """By base model, the requests that wait in other processes."""
        return queued_in((await self.news({})).values())

    # ---- inside ----------------------------------------------------------------------------------

    def _who(self, told: Mapping[str, object]) -> dict[str, object]:
        """The process that answers, and whether each process is in its answer."""
        answered = {process: answer is not None for process, answer in told.items()}
        return {
            "process": self._process,
            "processes": dict(sorted(({self._process: True} | answered).items())),
        }

    def _rows(self, asked: ListQuestion) -> list[RequestRow]:
        wall, shown = wall_offset(), timeline.timeline if asked.whole else timeline.row
        found = self._recorder.requests(
            tenant=asked.tenant, adapter=asked.adapter, worker=asked.worker, status=asked.status
        )
        return [shown(e, wall, self._process) for e in newest(found, asked.most)]

    def _usage_of(self, base: str, name: str) -> UsageElsewhere:
        traffic = self._recorder.traffic.traffic(base, self._dispatcher.clock())
        return UsageElsewhere(self._usage.rows(base, name), traffic.counts.get(name, 0))

    def _news(self, seen: float) -> ProcessNews:
        wall = wall_offset()
        return ProcessNews(
            self._dispatcher.clock(),
            [timeline.row(e, wall, self._process) for e in self._recorder.since(seen)],
            self._dispatcher.open_requests,
            {base: self._dispatcher.queued(base) for base in self._bases},
            self._recorder.moved_from,
        )

    def _story(self, request_id: str) -> RequestRow | None:
        found = self._dispatcher.open_request(request_id) or self._recorder.find(request_id)
        if found is None:
            return None
        return timeline.timeline(found, wall_offset(), self._process)


def queued_in(others: Iterable[ProcessNews]) -> Mapping[str, int]:
    total: Counter[str] = Counter()
    for news in others:
        total.update(news.queued)
    return total


def _read(told: Mapping[str, bytes], decode: Callable[[bytes], T]) -> dict[str, T | None]:
    """None: the process has not answered, or has ended in the middle of its answer."""
    found: dict[str, T | None] = {}
    for process, answer in told.items():
        try:
            found[process] = decode(answer)
        except msgspec.MsgspecError:
            found[process] = None
    return found


def _log_lines() -> bytes:
    return "".join(f"{line}\n" for line in recent_lines()).encode()
