"""Pure. What a tenant, or somebody without a key, may send to hurt others: name -> the bytes of one
connection. `KEY` stands where a key belongs.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator

from backports import zstd

from gateway.api.body.bounds import MAX_PARTS

KEY = "tenant-a-key-000000"
CHAT = "/v1/chat/completions"
HI = b'"messages":[{"role":"user","content":"hi"}]'
NUMBERS = (
    b"1" + b"0" * 400,
    b"1" + b"0" * 308,
    b"1e400",
    b"-1" + b"0" * 400,
    b"NaN",
    b"Infinity",
    b"9223372036854775808",
    b'"1' + b"0" * 400 + b'"',
)
FIELDS = ("max_tokens", "max_completion_tokens", "n", "priority", "min_tokens")
BATCH = b'{"input_file_id":"f","endpoint":"%b","metadata":{%b}}' % (
    CHAT.encode(),
    b",".join(b'"%d":""' % n for n in range(1_000_000)),
)


def head(*lines: str, method: str = "POST", path: str = CHAT, key: str | None = KEY) -> bytes:
    auth = [f"Authorization: Bearer {key}"] if key else []
    kind = ["Content-Type: application/json"]
    return "\r\n".join(
        [f"{method} {path} HTTP/1.1", "Host: x", *auth, *kind, *lines, "", ""]
    ).encode("latin-1")


def post(fields: bytes, *lines: str, key: str | None = KEY) -> bytes:
    body = b'{"model":"sim",%b}' % fields
    return head(*lines, f"Content-Length: {len(body)}", key=key) + body


def to(path: str, **fields: object) -> bytes:
    body = json.dumps({"model": "sim", **fields}).encode()
    return head(f"Content-Length: {len(body)}", path=path) + body


def corpus() -> Iterator[tuple[str, bytes]]:
    for field in FIELDS:
        for n, number in enumerate(NUMBERS):
            yield f"{field} {n}", post(HI + b',"%b":%b' % (field.encode(), number))
    yield from _shapes()
    yield from largest_allowed()
    yield from _other_paths()
    yield from _framing()
    yield from _encodings()


def _shapes() -> Iterator[tuple[str, bytes]]:
    def many(item: bytes, count: int) -> bytes:
        return b"[" + b",".join([item] * count) + b"]"

    yield (
        "300,000 messages",
        post(b'"messages":' + many(b'{"role":"user","content":"hi"}', 300_000)),
    )
    parts = many(b'{"type":"text","text":"hi"}', 20_000)
    yield "20,000 parts", post(b'"messages":[{"role":"user","content":%b}]' % parts)
    yield "8 million objects", post(HI + b',"x":' + many(b"{}", 8_000_000))
    yield (
        "30 MB of text",
        post(b'"messages":[{"role":"user","content":"%b"}]' % (b"a " * 15_000_000)),
    )
    yield "line ends", post(b'"messages":[{"role":"user","content":"%b"}]' % (b"\\n" * 8_000_000))
    yield "quotes", post(HI + b',"x":"%b"' % (b'\\"' * 2_000_000))
    yield "nesting", post(HI + b',"x":' + b"[" * 200_000)
    yield "n 1000", post(HI + b',"n":1000,"max_tokens":300')
    yield "prompts", post(b'"prompt":' + many(b'"a"', 100_000))
    yield (
        "choices",
        post(
            HI
            + b',"structured_outputs":'
            + json.dumps({"choice": [f"c{n}" for n in range(50_000)]}).encode()
        ),
    )
    yield "regex", post(HI + b',"structured_outputs":{"regex":"((a{1,999}){1,999}){1,999}"}')
    yield "long model", head("Content-Length: 1000012") + b'{"model":"%b"}' % (b"m" * 1_000_000)
    yield "no model text", post(b'"model":"\\ud800"')
    yield "priority header", post(HI, "x-loraplex-priority: -" + "9" * 300)
    yield "timeout header", post(HI, "x-loraplex-timeout-ms: 1" + "0" * 300)


def largest_allowed() -> Iterator[tuple[str, bytes]]:
    """Requests just within each bound, so workers get them."""

    def of(**fields: object) -> bytes:
        return post(HI + b"," + json.dumps(fields).encode()[1:-1])

    def said(text: str, times: int = 1) -> bytes:
        one = {"role": "user", "content": text}
        return post(b'"messages":' + json.dumps([one] * times).encode())

    yield "8 MB of words", said("a " * 4_100_000)
    yield "8 MB of one word", said("a" * 8_300_000)
    yield "8 MB of spaces", said(" " * 8_300_000)
    yield "8 MB of other letters", said("\u4e2d" * 1_300_000)
    yield "text of token ids", post(b'"prompt":"%b"' % (b"1 " * 4_000_000))
    yield "2048 messages", said("hi", 2048)
    yield "2048 long messages", said("hi " * 1000, 2048)
    yield (
        "parts",
        post(
            b'"messages":'
            + json.dumps(
                [{"role": "user", "content": [{"type": "text", "text": "hi"}] * MAX_PARTS}]
            ).encode()
        ),
    )
    yield "64 sequences", of(n=64, max_tokens=32, logprobs=True, top_logprobs=20)
    yield "1000 choices", of(structured_outputs={"choice": [f"c{n}" * 10 for n in range(1000)]})
    yield "many repetitions", of(structured_outputs={"regex": "(a{1,99}){1,99}"})
    yield (
        "large schema",
        of(
            response_format={
                "type": "json_schema",
                "json_schema": {
                    "name": "s",
                    "schema": {
                        "type": "object",
                        "properties": {f"p{n}": {"type": "string"} for n in range(500)},
                    },
                },
            }
        ),
    )
    yield "1024 biases", of(logit_bias={str(n): 1 for n in range(1024)})
    yield "1024 bad words", of(bad_words=[f"w{n}" for n in range(1024)])
    yield "1024 stops", of(stop=[f"s{n}" * 50 for n in range(1024)], stop_token_ids=[1] * 1024)
    yield (
        "1024 tools",
        of(
            tools=[
                {
                    "type": "function",
                    "function": {"name": f"f{n}", "parameters": {"type": "object"}},
                }
                for n in range(1024)
            ],
            tool_choice="none",
        ),
    )
    yield "many values", of(x=[{}] * 200_000, y=[0] * 499_000)
    yield "deep nesting", post(HI + b',"x":' + b"[" * 900 + b"]" * 900)
    yield (
        "20 MB picture",
        post(
            b'"messages":[{"role":"user","content":[{"type":"image_url","image_url":'
            b'{"url":"data:image/png;base64,%b"}}]}]' % (b"A" * 20_000_000)
        ),
    )


def _other_paths() -> Iterator[tuple[str, bytes]]:
    """Just within and just beyond the bounds of what is read item by item, path by path."""
    user = {"role": "user", "content": "hi"}
    part = {"type": "input_text", "text": "hi"}
    schema = {
        "type": "json_schema",
        "name": "s",
        "schema": {"type": "object", "properties": {f"p{n}": {} for n in range(50_000)}},
    }
    yield "409 items of a response", to("/v1/responses", input=[user] * 409)
    yield "513 items of a response", to("/v1/responses", input=[user] * 513)
    yield (
        "parts of a response",
        to("/v1/responses", input=[{**user, "content": [part] * MAX_PARTS}]),
    )
    yield "schema of a response", to("/v1/responses", input="hi", text={"format": schema})
    yield (
        "log probabilities of a response",
        to(
            "/v1/responses",
            input="hi",
            max_output_tokens=200,
            include=["message.output_text.logprobs"],
            top_logprobs=20,
        ),
    )
    yield (
        "40,000 parts of a system prompt",
        to("/v1/messages", messages=[user], max_tokens=1, system=[part] * 40_000),
    )
    yield "text for token ids", to("/tokenize", prompt="hello " * 21_000, return_token_strs=True)
    yield "token ids for text", to("/detokenize", tokens=[*range(10, 1000)] * 100)
    yield "much text for token ids", to("/tokenize", prompt="hello " * 1_000_000)
    yield "300,000 texts to score", to("/score", text_1="a", text_2=["b"] * 300_000)
    yield (
        "metadata of a batch",
        head(f"Content-Length: {len(BATCH)}", path="/v1/batches") + BATCH,
    )
    yield "numbers as items of a response", to("/v1/responses", input=[1] * 60_000)
    yield "unknown items of a response", to("/v1/responses", input=[{"a": 1}] * 409)
    yield "texts among token ids", to("/v1/completions", prompt=[1] + ["a"] * 250_000)
    prompt = [10 + n % 1000 for n in range(900)]
    yield (
        "echo of a prompt",
        to("/v1/completions", prompt=prompt, echo=True, logprobs=20, max_tokens=1),
    )
    yield (
        "streamed echo of a prompt",
        to("/v1/completions", prompt=prompt, echo=True, logprobs=20, max_tokens=1, stream=True),
    )
    yield (
        "prompts with log probabilities",
        to("/v1/completions", prompt=[prompt[:100]] * 64, prompt_logprobs=20, max_tokens=1),
    )
    yield (
        "64 choices with 20 log probabilities",
        to("/v1/completions", prompt="a", n=64, logprobs=20, max_tokens=16),
    )


def _framing() -> Iterator[tuple[str, bytes]]:
    yield "odd key", head("Content-Length: 2", key="\xff\xfe") + b"{}"
    yield "two lengths", head("Content-Length: 2", "Content-Length: 3") + b"{}"
    yield (
        "length and chunks",
        head("Content-Length: 2", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
    )
    yield "bad chunk", head("Transfer-Encoding: chunked") + b"zz\r\nhello"
    yield "endless chunks", head("Transfer-Encoding: chunked") + b"5\r\nhello\r\n" * 100_000
    yield "unfinished body", head("Content-Length: 31000000") + b"{" * 5_000_000
    yield "unfinished, no key", head("Content-Length: 1040000", key=None) + b"{" * 1_000_000
    yield "unfinished head", head()[:-4]
    yield (
        "endless head",
        head()[:-2] + b"".join(b"X-%d: %b\r\n" % (n, b"a" * 8000) for n in range(100)),
    )
    yield "zeros", bytes(100_000)
    yield "tls hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200)
    yield "http/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    yield "pipelined junk", post(HI + b',"stream":true') + b"\0junk\r\n\r\n"
    yield "pipelined requests", post(HI + b',"max_tokens":1') * 50
    yield "upgrade", head("Upgrade: websocket", "Connection: Upgrade", method="GET")
    yield "close", post(HI + b',"stream":true,"max_tokens":400', "Connection: close")
    yield "expect", post(HI + b',"stream":true', "Expect: 100-continue") + b"\0garbage\r\n\r\n"
    yield "control character", head("X: \x01", "Content-Length: 2") + b"{}"


def _encodings() -> Iterator[tuple[str, bytes]]:
    bomb = zlib.compress(bytes(200 << 20), 9)
    for what, data in (
        ("deflate", bomb),
        ("gzip", gzip.compress(bytes(100 << 20), 9)),
        ("gzip members", gzip.compress(b"") * 50_000),
        ("zstd frames", zstd.compress(b"") * 80_000),
        ("br", b"x"),
    ):
        name, _, _ = what.partition(" ")
        for who, key in (("", KEY), (", no key", None)):
            lines = (f"Content-Encoding: {name}", f"Content-Length: {len(data)}")
            yield f"{what} bomb{who}", head(*lines, key=key) + data
