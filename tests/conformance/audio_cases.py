"""Pure. The forms that Loraplex and vLLM's own server are both asked: sounds, and fields in right
and wrong forms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tests.conformance.cases import HEARING, Case
from tests.tiny_whisper import sound

TRANSCRIPTIONS, TRANSLATIONS = "/v1/audio/transcriptions", "/v1/audio/translations"
BOUNDARY = "a-boundary-of-a-form"
KIND = f"multipart/form-data; boundary={BOUNDARY}"
Fields = Sequence[tuple[str, str]]

FIELDS: dict[str, Fields] = {
    "nothing": (),
    "language": (("language", "en"),),
    "language of three letters": (("language", "eng"),),
    "language unknown": (("language", "xx"),),
    "prompt": (("prompt", "What was said before."),),
    "json": (("response_format", "json"),),
    "text": (("response_format", "text"),),
    "verbose": (("response_format", "verbose_json"),),
    "srt": (("response_format", "srt"),),
    "vtt": (("response_format", "vtt"),),
    "format unknown": (("response_format", "nosuch"),),
    "temperature": (("temperature", "0.7"), ("seed", "3")),
    "temperature wrong": (("temperature", "warm"),),
    "temperature negative": (("temperature", "-1"),),
    "top_p": (("top_p", "0.5"), ("seed", "3"), ("temperature", "1")),
    "top_k": (("top_k", "5"), ("seed", "3"), ("temperature", "1")),
    "seed": (("seed", "7"), ("temperature", "1")),
    "seed wrong": (("seed", "x"),),
    "penalties": (("frequency_penalty", "0.5"), ("presence_penalty", "0.5")),
    "repetition": (("repetition_penalty", "1.3"),),
    "timestamps": (("timestamp_granularities[]", "segment"),),
    "timestamps of words": (("timestamp_granularities[]", "word"),),
    "to_language": (("to_language", "en"),),
    "unknown field": (("nosuch", "1"),),
    "stream": (("stream", "true"),),
    "stream 1": (("stream", "1"),),
    "stream false": (("stream", "false"),),
    "stream wrong": (("stream", "maybe"),),
    "stream with usage": (("stream", "true"), ("stream_include_usage", "true")),
    "stream verbose": (("stream", "true"), ("response_format", "verbose_json")),
    "no tokens": (("max_completion_tokens", "0"),),
    "too many tokens": (("max_completion_tokens", "100000"),),
    "tokens wrong": (("max_completion_tokens", "many"),),
    "user": (("user", "someone"),),
}
SOUNDS = {
    "short": sound(0.3),
    "two seconds": sound(2.0, 440.0),
    "longer than a window": sound(31.0, 110.0),
    "silence": sound(0.5, 0.0),
    "empty": b"",
    "no sound": b"this is no sound",
    "broken off": sound(1.0)[:40],
}


def audio_cases() -> list[Case]:
    """In a fixed order; names are unique."""
    cases = [*_cases(TRANSCRIPTIONS), *_cases(TRANSLATIONS)]
    assert len({c.name for c in cases}) == len(cases)
    return cases


def _cases(path: str) -> Iterator[Case]:
    model, few = ("model", HEARING), ("max_completion_tokens", "6")
    for name, fields in FIELDS.items():
        bound = () if "max_completion_tokens" in dict(fields) else (few,)
        yield _case(path, name, (model, *bound, *fields), sound(0.5))
    for name, data in SOUNDS.items():
        yield _case(path, f"sound: {name}", (model, few, ("language", "en")), data)
    yield _case(path, "no file", (model, few), None)
    yield _case(path, "file as text", (model, few, ("file", "words")), None)
    for name in ("nosuch", f"{HEARING}:nosuch"):
        yield _case(path, f"model {name}", (("model", name), few), sound(0.3))
    yield _case(path, "field after the file", (few,), sound(0.3), after=(model,))
    whole = _form((model, few), sound(0.3))
    no_boundary = {"Content-Type": "multipart/form-data"}
    yield Case(f"{path} no boundary", path, whole, headers=no_boundary, audio=True)
    yield Case(f"{path} body in JSON", path, b'{"model":"ears"}', audio=True)
    yield Case(f"{path} cut off", path, whole[:200], headers={"Content-Type": KIND}, audio=True)
    yield Case(f"{path} GET", path, b"", "GET", audio=True)


def _case(path: str, name: str, fields: Fields, data: bytes | None, after: Fields = ()) -> Case:
    body = _form(fields, data, after)
    return Case(f"{path} {name}", path, body, headers={"Content-Type": KIND}, audio=True)


def _form(fields: Fields, data: bytes | None, after: Fields = ()) -> bytes:
    parts = [_part(f'name="{name}"', value.encode()) for name, value in fields]
    if data is not None:
        kind = "\r\nContent-Type: audio/wav"
        parts.append(_part(f'name="file"; filename="sound.wav"{kind}', data))
    parts += [_part(f'name="{name}"', value.encode()) for name, value in after]
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def _part(head: str, value: bytes) -> bytes:
    return f"--{BOUNDARY}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + (
        value + b"\r\n"
    )
