"""Messages decode to what was encoded, and anything else is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.adapters.identity import AdapterRef, StoredAdapter, StoredFile
from shared.link import messages as wire

REF = AdapterRef("tiny", "team/pirate", "0123456789abcdef")
STORED = StoredAdapter(
    "team/pirate",
    "0123456789abcdef",
    (StoredFile("adapter_config.json", 7, "v1"), StoredFile("w.safetensors", 2**40, "v2")),
)
HEARTBEAT = wire.Heartbeat(
    "w0",
    3,
    2**40,
    "tiny",
    wire.WorkerState.SERVING,
    capacity=8,
    adapters=(wire.AdapterState("pirate", "d", wire.Tier.DISK, True, 0.5, 3, 16, 10**12, True),),
    kv_usage=0.25,
)
STEP = wire.Step(
    [
        (1, 200 << wire.STATUS_SHIFT | wire.SSE, b"data: 1\n\n", b"\x01"),
        (2**60, wire.END, b"", b""),
    ],
    [wire.Done(1, 5, 6)],
    [wire.Refused(9, "c", "m", True)],
)

DIRECTIONS: dict[str, tuple[Callable[[bytes], Any], list[Any]]] = {
    "worker control": (wire.decode_worker_control, [HEARTBEAT]),
    "gateway control": (
        wire.decode_gateway_control,
        [
            wire.Welcome("g0", "ipc:///d", 3.0, 0.5),
            wire.Alive("g0"),
            wire.Farewell("g0"),
        ],
    ),
    "worker data": (wire.decode_worker_data, [wire.Attach("w0", 3), STEP, wire.Step([])]),
    "gateway data": (
        wire.decode_gateway_data,
        [
            wire.Generate(1, "/v1/completions", "r", b"{}"),
            wire.Generate(2**63, "/p", "r", b"\xff\x00", REF, STORED),
            wire.Cancel(7),
        ],
    ),
}
EVERY = [
    (name, decode, message)
    for name, (decode, messages) in DIRECTIONS.items()
    for message in messages
]
decoders = pytest.mark.parametrize(
    "decode", [d for d, _ in DIRECTIONS.values()], ids=list(DIRECTIONS)
)


@pytest.mark.parametrize(("decode", "message"), [(d, m) for _, d, m in EVERY])
def test_what_was_encoded_is_what_is_decoded(decode: Callable[[bytes], Any], message: Any) -> None:
    assert decode(wire.encode(message)) == message
    assert type(decode(wire.encode(message))) is type(message)


@pytest.mark.parametrize(("name", "message"), [(n, m) for n, _, m in EVERY])
def test_a_message_is_understood_in_its_own_direction_only(name: str, message: Any) -> None:
    for other, (decode, _) in DIRECTIONS.items():
        if other != name:
            with pytest.raises(wire.DecodeError):
                decode(wire.encode(message))


@pytest.mark.parametrize("message", [m for _, _, m in EVERY])
def test_messages_cannot_be_changed(message: Any) -> None:
    field = next(iter(message.__struct_fields__), None)
    if field is not None:
        with pytest.raises(AttributeError):
            setattr(message, field, None)


def test_fields_that_a_newer_peer_appends_are_ignored() -> None:
    array = [*msgspec.msgpack.decode(wire.encode(wire.Cancel(7))), "news", {"more": [1]}]
    assert wire.decode_gateway_data(msgspec.msgpack.encode(array)) == wire.Cancel(7)
    mapping = {**msgspec.msgpack.decode(wire.encode(HEARTBEAT)), "news": [1, {"a": None}]}
    assert wire.decode_worker_control(msgspec.msgpack.encode(mapping)) == HEARTBEAT


def test_fields_that_an_older_peer_lacks_have_their_defaults() -> None:
    old = msgspec.msgpack.encode(["generate", 1, "/p", "r", b"{}"])
    assert wire.decode_gateway_data(old) == wire.Generate(1, "/p", "r", b"{}", None, None)


@pytest.mark.parametrize(
    "value",
    [
        [],
        ["step"],
        ["nope", []],
        ["step", [[1, 2]]],
        ["step", [[1, 2, b"", 4]]],
        ["step", [["1", 2, b""]]],
        ["attach", 1, 1],
        {},
        7,
        None,
    ],
)
def test_a_message_of_another_shape_does_not_decode(value: object) -> None:
    with pytest.raises(wire.DecodeError):
        wire.decode_worker_data(msgspec.msgpack.encode(value))


@pytest.mark.parametrize("state", [-1, 4, 99, "SERVING"])
def test_a_state_that_this_version_does_not_know_does_not_decode(state: object) -> None:
    mapping = {**msgspec.msgpack.decode(wire.encode(HEARTBEAT)), "state": state}
    with pytest.raises(wire.DecodeError):
        wire.decode_worker_control(msgspec.msgpack.encode(mapping))


@decoders
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x00",
        b"\xff" * 50,
        b"\xdf\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"{}",
    ],
)
def test_bytes_that_are_no_message_do_not_decode(
    decode: Callable[[bytes], Any], data: bytes
) -> None:
    with pytest.raises(wire.DecodeError):
        decode(data)


@pytest.mark.parametrize(("decode", "message"), [(d, m) for _, d, m in EVERY])
def test_a_message_that_is_cut_short_does_not_decode(
    decode: Callable[[bytes], Any], message: Any
) -> None:
    whole = wire.encode(message)
    for length in range(len(whole)):
        with pytest.raises(wire.DecodeError):
            decode(whole[:length])


def test_text_that_is_no_utf8_does_not_decode() -> None:
    """Invariant 9: whatever arrives, the link's callbacks have to expect only DecodeError."""
    for decode, message, text in (
        (wire.decode_worker_control, HEARTBEAT, b"tiny"),
        (wire.decode_worker_data, wire.Attach("tiny", 1), b"tiny"),
        (wire.decode_gateway_data, wire.Generate(1, "tiny", "r", b""), b"tiny"),
        (wire.decode_gateway_control, wire.Alive("tiny"), b"tiny"),
    ):
        with pytest.raises(wire.DecodeError):
            decode(wire.encode(message).replace(text, b"\xff\xfe\xfd\xfc", 1))


@pytest.mark.parametrize(
    ("decode", "head"),
    [
        (wire.decode_worker_control, b"\x82\xa4type\xa4heartbeat\xa1x"),
        (wire.decode_worker_data, b"\x95\xa4step\x90\x90\x90"),
        (wire.decode_gateway_data, b"\x93\xa6cancel\x01"),
    ],
)
def test_a_bottomless_message_does_not_decode(decode: Callable[[bytes], Any], head: bytes) -> None:
    with pytest.raises(wire.DecodeError):
        decode(head + b"\x91" * 100_000 + b"\x01")


@decoders
@given(data=st.binary(max_size=100))
def test_arbitrary_bytes_decode_or_raise_the_decode_error(
    decode: Callable[[bytes], Any], data: bytes
) -> None:
    with contextlib.suppress(wire.DecodeError):
        decode(data)


@given(data=st.data())
def test_a_message_with_broken_bytes_decodes_or_raises_the_decode_error(
    data: st.DataObject,
) -> None:
    _, decode, message = data.draw(st.sampled_from(EVERY))
    raw = bytearray(wire.encode(message))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(wire.DecodeError):
        decode(bytes(raw))


def test_every_life_of_a_worker_has_a_routing_id_of_its_own() -> None:
    assert wire.identity("w0", 1) == b"w0#1"
    assert len({wire.identity(w, e) for w in ("w0", "w1") for e in (1, 2, 11)}) == 6


def test_a_status_and_the_flags_do_not_touch_each_other() -> None:
    for status in (200, 400, 599):
        flags = status << wire.STATUS_SHIFT | wire.SSE | wire.END
        assert flags >> wire.STATUS_SHIFT == status and flags & wire.SSE and flags & wire.END
    assert not (200 << wire.STATUS_SHIFT) & (wire.END | wire.SSE)
