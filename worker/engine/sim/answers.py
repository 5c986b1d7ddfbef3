"""Pure. What the simulated engine reads from a request, and its answer in vLLM's OpenAI shape."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

import msgspec

from shared.errors import CannotContinue, InvalidRequest
from shared.lenient_values import boolean, integer
from shared.link.token_ids import unpack
from worker.engine.base import EngineRequest

TASKS = ("generate",)
DEFAULT_OUTPUT_TOKENS = 16  # OpenAI's default for completions
SLICE_CHARACTERS = 256 << 10
FINISH_REASON = "length"
_COUNTS = frozenset(("n", "max_tokens", "max_completion_tokens"))
_FLAGS = frozenset(("stream",))
_HOLE = "\0"  # marks a token's place in an event; escaped JSON never contains it
_encode = msgspec.json.Encoder().encode


class Answer:
    """The bytes of one answer in vLLM's OpenAI shape. The parts that repeat in every event are
    encoded once, because under load this engine does nothing but make events.
    """

    def __init__(
        self,
        request: _Request,
        head: dict[str, Any],
        label: str,
        prompt_tokens: int,
        max_tokens: int,
    ) -> None:
        self.stream = bool(request.stream)
        self.prompt_tokens, self.max_tokens = prompt_tokens, max_tokens
        self._chat = isinstance(request, _ChatRequest)
        self._head, self._label = head, label
        self._usage = {
            "prompt_tokens": prompt_tokens,
            "total_tokens": prompt_tokens + max_tokens,
            "completion_tokens": max_tokens,
        }
        if not self.stream:
            return
        head = {**head, "object": "chat.completion.chunk"} if self._chat else head
        self._before, self._after = self._split(head, None)
        self._last_after = self._split(head, FINISH_REASON)[1]
        role = {"delta": {"role": "assistant", "content": ""}}
        self._opening = _event({**head, "choices": [_choice(role, None)]}) if self._chat else b""
        with_usage = request.stream_options is not None and request.stream_options.include_usage
        self._closing = (
            _event({**head, "choices": [], "usage": self._usage}) if with_usage else b""
        ) + b"data: [DONE]\n\n"

    def event(self, number: int) -> bytes:
        """The bytes of a stream that leave with token `number` (from 0)."""
        first, last = number == 0, number == self.max_tokens - 1
        if not (first or last):
            return b"%b w%d%b" % (self._before, number - 1, self._after)
        token = _encode(self._label)[1:-1] if first else b" w%d" % (number - 1)
        after = self._last_after + self._closing if last else self._after
        return (self._opening if first else b"") + self._before + token + after

    def body(self) -> bytes:
        """The whole answer to a request without `stream`."""
        text = " ".join([self._label, *(f"w{i}" for i in range(self.max_tokens - 1))])
        choice: dict[str, Any] = (
            {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        )
        return _encode(
            {**self._head, "choices": [_choice(choice, FINISH_REASON)], "usage": self._usage}
        )

    def _split(self, head: dict[str, Any], finish_reason: str | None) -> tuple[bytes, bytes]:
        """The bytes of an event before and after its token."""
        choice: dict[str, Any] = {"delta": {"content": _HOLE}} if self._chat else {"text": _HOLE}
        before, _, after = _event({**head, "choices": [_choice(choice, finish_reason)]}).rpartition(
            _encode(_HOLE)[1:-1]
        )
        return before, after


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None


class _Request(msgspec.Struct, frozen=True, kw_only=True):
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None

    @property
    def limit_field(self) -> str:
        """The field that bounds the answer's tokens."""
        return "max_tokens"


class _Part(msgspec.Struct, frozen=True):
    type: str
    text: str = ""


class _Message(msgspec.Struct, frozen=True):
    role: str
    content: str | list[_Part] | None = None


class _ChatRequest(_Request, frozen=True, kw_only=True):
    messages: Annotated[list[_Message], msgspec.Meta(min_length=1)]
    max_completion_tokens: int | None = None

    @property
    def limit_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def prompt_tokens(self) -> int:
        return sum(
            words(m.content)
            if isinstance(m.content, str)
            else sum(words(p.text) for p in m.content or ())
            for m in self.messages
        )


class _CompletionRequest(_Request, frozen=True, kw_only=True):
    """`prompt` is text, token ids, or a list of texts or of lists of token ids."""

    prompt: str | Annotated[list[str | int | list[int]], msgspec.Meta(min_length=1)]

    def prompt_tokens(self) -> int:
        if isinstance(self.prompt, str):
            return words(self.prompt)
        if all(isinstance(p, int) for p in self.prompt):
            return len(self.prompt)
        if len(self.prompt) > 1:
            raise InvalidRequest(
                "The simulated engine takes one prompt per request.", param="prompt"
            )
        only = self.prompt[0]
        return words(only) if isinstance(only, str) else len(only) if isinstance(only, list) else 1


_Decoder: TypeAlias = msgspec.json.Decoder[_ChatRequest] | msgspec.json.Decoder[_CompletionRequest]
_KINDS: dict[str, tuple[_Decoder, str, str]] = {
    "/v1/chat/completions": (
        msgspec.json.Decoder(_ChatRequest, strict=False),
        "chatcmpl",
        "chat.completion",
    ),
    "/v1/completions": (
        msgspec.json.Decoder(_CompletionRequest, strict=False),
        "cmpl",
        "text_completion",
    ),
}


def read_request(call: EngineRequest, base: str, max_model_len: int, created: int) -> Answer:
    """The answer to the call. `created` is the time that it carries, in seconds since 1970.

    Raises:
        InvalidRequest: the request is malformed, is longer than the model's context, or asks for
            what this engine does not do; `param` names the field.
    """
    if call.path not in _KINDS:
        raise InvalidRequest(
            f"The simulated engine does not do {call.path[:200]}; it can do: {', '.join(_KINDS)}."
        )
    decoder, prefix, kind = _KINDS[call.path]
    request = _decode(decoder, call.body)
    if request.n is not None and request.n != 1:
        raise InvalidRequest(
            "The simulated engine gives one choice per request: n must be 1.", param="n"
        )
    # No real prompt is empty, because chat templates and tokenizers add tokens of their own.
    prompt_tokens = max(1, request.prompt_tokens())
    max_tokens = _output_tokens(request, prompt_tokens, max_model_len)
    adapter = call.adapter
    name, digest = (adapter.ref.name, adapter.ref.digest) if adapter is not None else ("-", "-")
    model = call.model or request.model or (f"{base}:{name}" if adapter is not None else base)
    head = {"id": f"{prefix}-{call.request_id}", "object": kind, "created": created, "model": model}
    return Answer(
        request, head, f"[base={base} adapter={name} digest={digest}]", prompt_tokens, max_tokens
    )


def words(text: str) -> int:
    """Counted piece by piece, so that other threads get their turn."""
    if len(text) <= SLICE_CHARACTERS:
        return len(text.split())
    count, apart = 0, True  # whether the next piece begins after a space
    for start in range(0, len(text), SLICE_CHARACTERS):
        piece = text[start : start + SLICE_CHARACTERS]
        joined = not (apart or piece[0].isspace())
        count += len(piece.split()) - joined
        apart = piece[-1].isspace()
    return count


def seen_tokens(call: EngineRequest, answer: Answer) -> int:
    """How many tokens of the answer the client has seen.

    Raises CannotContinue if they are not the first tokens of this answer, or if none follow them.
    """
    if not call.seen:
        return 0
    seen = unpack(call.seen).get(0, [])
    if seen != list(range(len(seen))) or len(seen) >= answer.max_tokens:
        raise CannotContinue("The tokens that the client has seen do not begin this answer.")
    return len(seen)


def _decode(decoder: _Decoder, body: bytes) -> _ChatRequest | _CompletionRequest:
    try:
        try:
            return decoder.decode(body)
        except msgspec.ValidationError:  # in another form, perhaps
            read: _ChatRequest | _CompletionRequest = msgspec.convert(
                _in_jsons_forms(body), decoder.type, strict=False
            )
            return read
    except msgspec.ValidationError as exc:
        text = str(exc)
        missing = text.partition("missing required field `")[2].partition("`")[0]
        inside = text.partition("`$.")[2].rstrip("`")
        raise InvalidRequest(text, param=".".join(filter(None, (inside, missing))) or None) from exc
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise InvalidRequest(f"The request body is not valid JSON: {exc}") from exc


def _in_jsons_forms(body: bytes) -> Any:
    """The body with numbers and booleans in JSON's own form, where pydantic would read them."""
    given = msgspec.json.decode(body)
    for fields, reader in ((_COUNTS, integer), (_FLAGS, boolean)):
        for name in fields & given.keys() if isinstance(given, dict) else ():
            read = reader(given[name])
            given[name] = given[name] if read is None else read
    return given


def _output_tokens(request: _Request, prompt_tokens: int, max_model_len: int) -> int:
    """How many tokens the answer has: what the request asks for, else the default, within the
    context.
    """
    field = request.limit_field
    limit: int | None = getattr(request, field)
    if limit is not None and limit < 1:
        raise InvalidRequest(f"{field} must be at least 1, got {limit}.", param=field)
    left = max_model_len - prompt_tokens
    if left < (limit or 1):
        raise InvalidRequest(
            f"This model's maximum context length is {max_model_len} tokens. You asked "
            f"for {limit or 1} output tokens and your prompt "
            f"contains {prompt_tokens}.",
            param=field
            if left > 0
            else "messages"
            if isinstance(request, _ChatRequest)
            else "prompt",
        )
    return min(DEFAULT_OUTPUT_TOKENS, left) if limit is None else limit


def _choice(choice: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
    return {"index": 0, **choice, "logprobs": None, "finish_reason": finish_reason}


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + _encode(chunk) + b"\n\n"
