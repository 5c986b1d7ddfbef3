"""Shell. The forms of a large body for `/v1/embeddings`, in place of vLLM 0.32's.

vLLM tries each body against five classes, and keeps an error for every item that does not fit. Some
hundred thousand token ids hold the worker's loop for seconds, because conversations are made of
other things. Here the first item of a large body decides which classes are tried, and a list ends
at its first error. What is accepted is the same. Small bodies, and their errors, are vLLM's.
"""

from __future__ import annotations

from typing import Annotated, Any

COMPLETION, CHAT = "completion", "chat"
MANY_ITEMS = 1000
"""Items that five classes refuse within some milliseconds."""


def form(body: Any) -> str:
    """COMPLETION for texts and token ids, CHAT for conversations."""
    if not isinstance(body, dict) or "messages" in body:
        return CHAT
    item = body.get("input")
    for _ in range(2):  # a conversation, or a list of them
        item = item[0] if isinstance(item, list) and item else None
        if isinstance(item, dict):
            return CHAT
    return COMPLETION


def is_large(body: Any) -> bool:
    """Whether its input or messages have more than MANY_ITEMS items, also inside of lists."""
    lists = [body.get("input"), body.get("messages")] if isinstance(body, dict) else []
    items = [it for given in lists if isinstance(given, list) for it in given]
    return sum(len(it) if isinstance(it, list) else 1 for it in items) > MANY_ITEMS


def install() -> None:
    """Replaces the type, before vLLM makes its routes. A second call does nothing."""
    from pydantic import (
        BeforeValidator,
        Discriminator,
        FailFast,
        Field,
        Tag,
        TypeAdapter,
        ValidatorFunctionWrapHandler,
        WrapValidator,
        create_model,
    )
    from typing_extensions import TypeAliasType
    from vllm.entrypoints.pooling.base.protocol import reject_removed_pooling_parameters
    from vllm.entrypoints.pooling.embed import protocol
    from vllm.renderers.chat_utils import ChatCompletionMessageParam

    if hasattr(protocol, "loraplex"):
        return
    # Named types, because the members of a union must have a hash, and FailFast has none.
    ids = TypeAliasType("ids", Annotated[list[int], FailFast()])
    many_ids = TypeAliasType("many_ids", Annotated[list[ids], FailFast()])
    texts = TypeAliasType("texts", Annotated[list[str], FailFast()])
    conversation = Annotated[list[ChatCompletionMessageParam], FailFast()]
    conversations = Annotated[
        list[Annotated[list[ChatCompletionMessageParam], FailFast(), Field(min_length=1)]],
        FailFast(),
        Field(min_length=1),
    ]

    def narrowed(base: Any, **fields: Any) -> Any:
        definitions: Any = {name: (of, ...) for name, of in fields.items()}
        return create_model(base.__name__, __base__=base, **definitions)

    completion = narrowed(
        protocol.EmbeddingCompletionRequest,
        input=ids | many_ids | str | texts,
    )
    chats = (
        narrowed(protocol.EmbeddingChatRequest, messages=conversation)
        | narrowed(protocol.EmbeddingBatchChatRequest, messages=conversations)
        | narrowed(protocol.EmbeddingChatInputRequest, messages=conversation, input=conversation)
        | narrowed(
            protocol.EmbeddingBatchChatInputRequest, messages=conversations, input=conversations
        )
    )
    either: Any = Annotated[
        Annotated[completion, Tag(COMPLETION)] | Annotated[chats, Tag(CHAT)],
        Discriminator(form),
        BeforeValidator(reject_removed_pooling_parameters),
    ]
    large: TypeAdapter[Any] = TypeAdapter(either)

    def read(body: Any, small: ValidatorFunctionWrapHandler) -> Any:
        return large.validate_python(body) if is_large(body) else small(body)

    protocol.EmbeddingRequest = Annotated[protocol.EmbeddingRequest, WrapValidator(read)]
    protocol.loraplex = True
