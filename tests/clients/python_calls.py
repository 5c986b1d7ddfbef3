"""Shell. What Python's clients are asked to do. Runs where they are installed, and prints a line of
JSON for each call.

    python python_calls.py URL MODEL PROMPT
"""

import asyncio
import json
import sys
import traceback
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import anthropic
import instructor
import litellm
import openai
from langchain_openai import ChatOpenAI
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

URL, MODEL, PROMPT = sys.argv[1:4]
V1, KEY, MOST, ANY = f"{URL}/v1", "none", 200, "as any model"
ASKED: Any = [{"role": "user", "content": PROMPT}]
CHAT: Any = {"model": MODEL, "messages": ASKED, "temperature": 0, "max_tokens": MOST}
# Anthropic's newest client does not name a temperature
MESSAGE: Any = {"model": MODEL, "messages": ASKED, "max_tokens": MOST}
MESSAGE["extra_body"] = {"temperature": 0}
RESPONSE: Any = {"model": MODEL, "input": PROMPT, "temperature": 0, "max_output_tokens": MOST}
openai_client = openai.OpenAI(base_url=V1, api_key=KEY)
anthropic_client = anthropic.Anthropic(base_url=URL, api_key=KEY)


class Mood(BaseModel):
    mood: Literal["happy", "sad"]


def joined(events: Any, text: Callable[[Any], str | None]) -> str:
    return "".join(text(event) or "" for event in events)


def chat_delta(event: Any) -> str | None:
    return event.choices[0].delta.content if event.choices else None


def response_delta(event: Any) -> str | None:
    return event.delta if event.type == "response.output_text.delta" else None


async def in_async() -> str:
    client = openai.AsyncOpenAI(base_url=V1, api_key=KEY)
    stream = await client.chat.completions.create(**CHAT, stream=True)
    return "".join([chat_delta(event) or "" async for event in stream])


def chat_stream_helper() -> str:
    with openai_client.chat.completions.stream(**CHAT) as stream:
        for _ in stream:
            pass
        return stream.get_final_completion().choices[0].message.content or ""


def messages_stream() -> str:
    with anthropic_client.messages.stream(**MESSAGE) as stream:
        return "".join(stream.text_stream)


def counted() -> str:
    found = anthropic_client.messages.count_tokens(model=MODEL, messages=ASKED)
    return ANY if found.input_tokens > 0 else "none"


def parsed(mood: Mood | None, completion: Any) -> str:
    assert mood is not None and completion.model == MODEL
    return ANY


def openai_parse() -> str:
    found = openai_client.chat.completions.parse(**STRUCTURED, response_format=Mood)
    return parsed(found.choices[0].message.parsed, found)


def instructor_schema() -> str:
    client = instructor.from_openai(openai_client, mode=instructor.Mode.JSON_SCHEMA)
    create = client.chat.completions.create_with_completion
    return parsed(*create(**STRUCTURED, response_model=Mood, max_retries=0))


def langchain(**more: Any) -> Any:
    return ChatOpenAI(base_url=V1, api_key=KEY, model=MODEL, temperature=0, max_tokens=MOST, **more)


def llama_index() -> Any:
    return OpenAILike(
        api_base=V1, api_key=KEY, model=MODEL, temperature=0, max_tokens=MOST, is_chat_model=True
    )


def lite(model: str, **more: Any) -> Any:
    found = {**CHAT, "model": model, "api_key": KEY, **more}
    return litellm.completion(**found)


def lite_text(answer: Any) -> str:
    return answer.choices[0].message.content


STRUCTURED: Any = {"model": MODEL, "temperature": 0, "max_tokens": 64, "messages": ASKED}
CALLS: dict[str, Callable[[], str | Awaitable[str]]] = {
    "openai: chat": lambda: (
        openai_client.chat.completions.create(**CHAT).choices[0].message.content or ""
    ),
    "openai: chat, streamed": lambda: joined(
        openai_client.chat.completions.create(**CHAT, stream=True), chat_delta
    ),
    "openai: chat, async": in_async,
    "openai: chat.completions.stream": chat_stream_helper,
    "openai: chat.completions.parse": openai_parse,
    "openai: responses": lambda: openai_client.responses.create(**RESPONSE).output_text,
    "openai: responses, streamed": lambda: joined(
        openai_client.responses.create(**RESPONSE, stream=True), response_delta
    ),
    "anthropic: messages": lambda: anthropic_client.messages.create(**MESSAGE).content[0].text,
    "anthropic: messages, streamed": messages_stream,
    "anthropic: count_tokens": counted,
    "langchain-openai: chat": lambda: langchain().invoke(PROMPT).content,
    "langchain-openai: chat, streamed": lambda: joined(
        langchain().stream(PROMPT), lambda part: part.content
    ),
    "langchain-openai: use_responses_api": lambda: (
        langchain(use_responses_api=True).invoke(PROMPT).text
    ),
    "litellm: openai/": lambda: lite_text(lite(f"openai/{MODEL}", api_base=V1)),
    "litellm: openai/, streamed": lambda: joined(
        lite(f"openai/{MODEL}", api_base=V1, stream=True), chat_delta
    ),
    "litellm: anthropic/": lambda: lite_text(lite(f"anthropic/{MODEL}", api_base=URL)),
    "llama-index: chat": lambda: (
        llama_index().chat([ChatMessage(role="user", content=PROMPT)]).message.content
    ),
    "llama-index: chat, streamed": lambda: joined(
        llama_index().stream_chat([ChatMessage(role="user", content=PROMPT)]),
        lambda part: part.delta,
    ),
    "instructor: JSON_SCHEMA": instructor_schema,
}


def main() -> None:
    for name, call in CALLS.items():
        try:
            found = call()
            text = found if isinstance(found, str) else asyncio.run(found)  # type: ignore[arg-type]
            said = {"call": name, "text": text}
        except Exception:
            said = {"call": name, "error": traceback.format_exc(limit=-1)}
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
