"""Pure. The one table of what the API offers. It maps a path to what a model must be able to do, to
where the request names its model, and to the shape of its errors.

A path that is not in the table is not served, whatever the engine's own server would answer there.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum


class ErrorFamily(Enum):
    """Whose error object a client of the path expects."""

    OPENAI = "openai"
    RESPONSES = "responses"  # OpenAI's errors, but streams have named events and no [DONE]
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

    `what` is its name in messages. The last event of a complete stream contains one of
    `stream_ends` (empty: it does not stream). `limit_fields` are the fields that bound the answer's
    tokens; the engine takes the first that is given, and ignores those of other paths. `most_bytes`
    bounds the body of a request (0: as all others). `fields` are those that the gateway reads of
    the body; they are in vLLM's own class for the path's requests.
    """

    what: str
    tasks: frozenset[str]
    stream_ends: tuple[bytes, ...] = ()
    limit_fields: tuple[str, ...] = ()
    errors: ErrorFamily = ErrorFamily.OPENAI
    model_in: ModelIn = ModelIn.JSON
    most_bytes: int = 0
    fields: frozenset[str] = frozenset()

    @property
    def streams(self) -> bool:
        return bool(self.stream_ends)


# Fields that several paths have. Those of a family are in OpenAI's words or in Anthropic's.
_OPENAI = frozenset({"model", "priority", "user"})
_SAMPLED = _OPENAI | {
    "allowed_token_ids", "bad_words", "ec_transfer_params", "kv_transfer_params", "logit_bias",
    "logprob_token_ids", "max_tokens", "min_tokens", "n", "prompt_logprobs",
    "repetition_detection", "response_format", "stop_token_ids", "stream", "structured_outputs",
    "top_k", "use_beam_search", "vllm_xargs",
}  # fmt: skip
_RENDERED = frozenset(
    {"chat_template_kwargs", "media_io_kwargs", "messages", "mm_processor_kwargs"}
)
_CLAUDE = frozenset(
    {
        "chat_template_kwargs", "messages", "model", "output_config", "system", "tool_choice",
        "tools",
    }
)  # fmt: skip
_POOLED = _OPENAI | _RENDERED | {"input"}
_COMPARED = _OPENAI | {"chat_template_kwargs", "documents", "mm_processor_kwargs"}
_SOUND = frozenset({"max_completion_tokens", "model", "stream"})
_SOUND_LIMIT = ("max_completion_tokens",)

CHAT = Endpoint(
    "chat completions",
    GENERATE,
    DONE_ENDS,
    ("max_completion_tokens", "max_tokens"),
    fields=_SAMPLED
    | _RENDERED
    | {"documents", "max_completion_tokens", "tool_choice", "tools", "top_logprobs"},
)
_SCORES = Endpoint(
    "scores",
    SCORE,
    fields=_COMPARED | {"data_1", "data_2", "items", "queries", "text_1", "text_2"},
)
_RERANK = Endpoint("reranking", SCORE, fields=_COMPARED)
_FORM = ModelIn.FORM

MOST_COUNTED_BYTES = 512 << 10
"""Of a request for token ids or their text. vLLM writes the answer in one turn of its loop."""
RESPONSES_PATH = "/v1/responses"
ENDPOINTS: dict[str, Endpoint] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": Endpoint(
        "completions", GENERATE, DONE_ENDS, ("max_tokens",), fields=_SAMPLED | {"prompt"}
    ),
    RESPONSES_PATH: Endpoint(
        "responses",
        GENERATE,
        RESPONSE_ENDS,
        ("max_output_tokens",),
        ErrorFamily.RESPONSES,
        fields=_OPENAI
        | (_RENDERED - {"messages"})
        | {
            "background",
            "ec_transfer_params",
            "input",
            "kv_transfer_params",
            "logit_bias",
            "max_output_tokens",
            "metadata",
            "previous_input_messages",
            "previous_response_id",
            "prompt",
            "stop_token_ids",
            "stream",
            "structured_outputs",
            "text",
            "tool_choice",
            "tools",
            "top_k",
            "top_logprobs",
            "vllm_xargs",
        },
    ),
    "/v1/messages": Endpoint(
        "messages",
        GENERATE,
        MESSAGE_ENDS,
        ("max_tokens",),
        ErrorFamily.ANTHROPIC,
        fields=_CLAUDE
        | {
            "ec_transfer_params",
            "kv_transfer_params",
            "max_tokens",
            "metadata",
            "stream",
            "top_k",
            "vllm_xargs",
        },
    ),
    "/v1/messages/count_tokens": Endpoint(
        "token counts", GENERATE, errors=ErrorFamily.ANTHROPIC, fields=_CLAUDE
    ),
    "/tokenize": Endpoint(
        "tokens",
        ANY_TASK,
        most_bytes=MOST_COUNTED_BYTES,
        fields=_RENDERED | {"model", "prompt", "return_token_strs", "tools"},
    ),
    "/detokenize": Endpoint(
        "text of tokens", ANY_TASK, most_bytes=MOST_COUNTED_BYTES, fields=frozenset({"model"})
    ),
    "/v1/embeddings": Endpoint("embeddings", EMBED, fields=_POOLED),
    "/v2/embed": Endpoint(
        "embeddings", EMBED, fields=frozenset({"images", "inputs", "model", "priority", "texts"})
    ),
    "/score": _SCORES,
    "/v1/score": _SCORES,
    "/rerank": _RERANK,
    "/v1/rerank": _RERANK,
    "/v2/rerank": _RERANK,
    "/classify": Endpoint("classification", CLASSIFY, fields=_POOLED),
    "/pooling": Endpoint("pooling", POOL, fields=_POOLED),
    "/v1/audio/transcriptions": Endpoint(
        "transcription", TRANSCRIBE, DONE_ENDS, _SOUND_LIMIT, model_in=_FORM, fields=_SOUND
    ),
    "/v1/audio/translations": Endpoint(
        "translation", TRANSCRIBE, DONE_ENDS, _SOUND_LIMIT, model_in=_FORM, fields=_SOUND
    ),
}


def endpoint_of(path: str) -> Endpoint | None:
    """The endpoint of a path, as it was requested. Paths below /v1/responses belong to it. None if
    the path is not served.
    """
    found = ENDPOINTS.get(path)
    if found is not None:
        return found
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
    """The message for a client whose model has only `tasks`."""
    paths = [path for path, other in ENDPOINTS.items() if other.tasks and can_do(other, tasks)]
    able = ", ".join(sorted(tasks)) or "none"
    return f"The model `{model}` does not do {endpoint.what}. It can do: {able}" + (
        f" ({', '.join(paths)})." if paths else "."
    )
