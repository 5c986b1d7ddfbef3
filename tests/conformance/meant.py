"""Pure. Where Loraplex answers other than vLLM's own server on purpose, and why that is better. The
same lines are the table in docs/API.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from tests.conformance.answers import Difference
from tests.conformance.cases import Case


@dataclass(frozen=True, slots=True)
class Meant:
    """`here`, `there` and `why` are the cells of a line in docs/API.md."""

    here: str
    there: str
    why: str
    holds: Callable[[Case, Difference], bool]

    @property
    def line(self) -> str:
        return f"| {self.here} | {self.there} | {self.why} |"


_OWN_WORDS = re.compile(
    r"`\w+` must be |The request body is (not|nested)|The Content-Type of this request|"
    r"\w+ is not allowed for |There is no /|The (model|adapter) `|Response with id|"
    r"The request asks for"
)


def _status(ours: str, theirs: str) -> Callable[[Case, Difference], bool]:
    def holds(_: Case, d: Difference) -> bool:
        return (
            d.kind == "status"
            and re.match(ours, d.ours) is not None
            and re.match(theirs, d.theirs) is not None
        )

    return holds


def _own_words(_: Case, d: Difference) -> bool:
    return d.kind in ("message", "param") and _OWN_WORDS.match(d.ours) is not None


MEANT: tuple[Meant, ...] = (
    Meant(
        "a streamed request that the engine refuses: 400",
        "200, and an error as the first event, or a stream that breaks off",
        "clients look at the status",
        _status(r"400 ", r"200 (data: |event: error|\(broken off)"),
    ),
    Meant(
        "a refusal by the gateway has its own words, with the same status",
        "words of pydantic or Starlette",
        "it is refused before a worker is asked",
        _own_words,
    ),
    Meant(
        "a model that cannot do a task: 400 that names its tasks",
        '404 `{"detail": "Not Found"}`',
        "the path exists; it is the model that is wrong",
        _status(r"400 .*does not do", r'404 {"detail":"Not Found"}'),
    ),
    Meant(
        "counts above 2147483647 are refused",
        "some are taken (`top_k`)",
        "the gateway adds them up",
        _status(r"400 .*must be a whole number from -?\d+ to 2147483647", "200 "),
    ),
    Meant(
        "a JSON body without `Content-Type` is taken",
        "400",
        "it can be nothing else",
        lambda case, d: case.name.endswith("body: no type"),
    ),
    Meant(
        "a path with a slash at its end is answered",
        "307",
        "many clients do not send a body again",
        lambda case, d: case.path.endswith("/") and d.theirs.startswith("307"),
    ),
    Meant(
        "`GET /v1/models/{id}` and `HEAD` are answered",
        "404 and 405",
        "OpenAI's clients ask for them",
        lambda case, d: "/v1/models" in case.path and d.kind == "status" and d.ours[:3] == "200",
    ),
    Meant(
        "`owned_by` is `loraplex`; models have fields for the version, state and tier of their "
        "weights, which begin with `loraplex`; `permission` stands at base models only",
        "`owned_by` is `vllm`; `permission` at every model",
        "a list of 10,000 adapters is read by people and clients",
        lambda case, d: case.path == "/v1/models" and d.kind == "body",
    ),
    Meant(
        "the id of an answer holds `x-request-id`",
        "it holds `request_id` of the body where there is one",
        "logs of both sides name one id",
        lambda case, d: (
            case.name.endswith(("request_id", "request_id streamed")) and d.where.endswith(".id")
        ),
    ),
)


def meant(case: Case, difference: Difference) -> Meant | None:
    return next((m for m in MEANT if m.holds(case, difference)), None)
