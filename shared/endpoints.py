"""Pure. The one table of what the API offers: path -> what a model must be able to do, how the
model is read, and in which shape its errors are.

A path that is not in it is not served, whatever the engine's own server would answer there.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum


class ErrorFamily(Enum):
    """Whose error object a client of the path expects."""

    OPENAI = "openai"
    RESPONSES = "responses"  # OpenAI's, but its streams have named events and no [DONE]
    ANTHROPIC = "anthropic"


class ModelIn(Enum):
    """Where a request names its model."""

    JSON = "json"
    FORM = "form"  # a field of multipart/form-data


GENERATE = frozenset({"generate"})
EMBED = frozenset({"embed"})
CLASSIFY = frozenset({"classify"})
SCORE = frozenset({"embed", "token_embed", "classify"})
POOL = frozenset(
    {"embed", "classify", "token_embed", "token_classify", "plugin", "embed&token_classify"}
)
TRANSCRIBE = frozenset({"transcription"})
ANY_TASK: frozenset[str] = frozenset()

DONE_ENDS = (b"data: [DONE]",)
RESPONSE_ENDS = (b"response.completed", b"response.incomplete", b"response.failed")
MESSAGE_ENDS = (b"message_stop",)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One POST path. A model serves it if it can do any of `tasks` (empty: every model does).

    `what` names it to people. `stream_ends`: what the last event of a whole stream holds one of;
    empty where nothing streams. `limit_field` bounds the answer's tokens, "" where nothing does.
    """

    what: str
    tasks: frozenset[str]
    stream_ends: tuple[bytes, ...] = ()
    limit_field: str = ""
    errors: ErrorFamily = ErrorFamily.OPENAI
    model_in: ModelIn = ModelIn.JSON

    @property
    def streams(self) -> bool:
        return bool(self.stream_ends)


CHAT = Endpoint("chat completions", GENERATE, DONE_ENDS, "max_tokens")
_EMBEDDINGS = Endpoint("embeddings", EMBED)
_SCORES = Endpoint("scores", SCORE)
_RERANK = Endpoint("reranking", SCORE)
_FORM = ModelIn.FORM

RESPONSES_PATH = "/v1/responses"
ENDPOINTS: dict[str, Endpoint] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": Endpoint("completions", GENERATE, DONE_ENDS, "max_tokens"),
    RESPONSES_PATH: Endpoint(
        "responses", GENERATE, RESPONSE_ENDS, "max_output_tokens", ErrorFamily.RESPONSES
    ),
    "/v1/messages": Endpoint(
        "messages", GENERATE, MESSAGE_ENDS, "max_tokens", ErrorFamily.ANTHROPIC
    ),
    "/v1/messages/count_tokens": Endpoint("token counts", GENERATE, errors=ErrorFamily.ANTHROPIC),
    "/tokenize": Endpoint("tokens", ANY_TASK),
    "/detokenize": Endpoint("text of tokens", ANY_TASK),
    "/v1/embeddings": _EMBEDDINGS,
    "/v2/embed": _EMBEDDINGS,
    "/score": _SCORES,
    "/v1/score": _SCORES,
    "/rerank": _RERANK,
    "/v1/rerank": _RERANK,
    "/v2/rerank": _RERANK,
    "/classify": Endpoint("classification", CLASSIFY),
    "/pooling": Endpoint("pooling", POOL),
    "/v1/audio/transcriptions": Endpoint("transcription", TRANSCRIBE, DONE_ENDS, model_in=_FORM),
    "/v1/audio/translations": Endpoint("translation", TRANSCRIBE, DONE_ENDS, model_in=_FORM),
}


def endpoint_of(path: str) -> Endpoint | None:
    """Of a path as it was asked for; those below /v1/responses belong to it."""
    path = path.partition("?")[0]
    found = ENDPOINTS.get(path)
    if found is None and path.startswith(RESPONSES_PATH + "/"):
        return ENDPOINTS[RESPONSES_PATH]
    return found


def errors_of(path: str) -> ErrorFamily:
    found = endpoint_of(path)
    if found is None:
        return ErrorFamily.ANTHROPIC if path.startswith("/v1/messages/") else ErrorFamily.OPENAI
    return found.errors


def can_do(endpoint: Endpoint, tasks: Collection[str]) -> bool:
    return not endpoint.tasks or not endpoint.tasks.isdisjoint(tasks)


def cannot_do(model: str, endpoint: Endpoint, tasks: Collection[str]) -> str:
    """What a client is told whose model has only `tasks`."""
    paths = [path for path, other in ENDPOINTS.items() if other.tasks and can_do(other, tasks)]
    able = ", ".join(sorted(tasks)) or "none"
    return f"The model `{model}` does not do {endpoint.what}. It can do: {able}" + (
        f" ({', '.join(paths)})." if paths else "."
    )
