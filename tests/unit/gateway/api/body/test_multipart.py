"""Forms as clients write them: what is read of an audio request, and of an uploaded file."""

from __future__ import annotations

import pytest

from gateway.api.body.multipart import form_file, form_values
from gateway.api.body.schema import read_fields
from shared.api_endpoints import ENDPOINTS
from shared.errors import InvalidRequest

HEAD = b"Content-Disposition: form-data; "


def form(boundary: bytes, *parts: bytes) -> bytes:
    return (
        b"".join(b"--%b\r\n%b\r\n" % (boundary, part) for part in parts) + b"--%b--\r\n" % boundary
    )


@pytest.mark.parametrize(
    ("kind", "boundary"),
    [
        ("multipart/form-data; boundary=b", b"b"),
        ('multipart/form-data; boundary="a b"', b"a b"),
        ("multipart/form-data; charset=utf-8; Boundary=--b; x=y", b"--b"),
    ],
)
def test_a_form_is_read_whatever_its_boundary_and_the_order_of_its_parts(
    kind: str, boundary: bytes
) -> None:
    file = HEAD + b'name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\nRIFF'
    model = HEAD + b"name=model\r\n\r\nears"
    for parts in ((file, model), (model, file)):
        assert form_values(kind, form(boundary, *parts)) == {"model": "ears"}
        assert form_file(kind, form(boundary, *parts)).data == b"RIFF"


def test_a_files_name_is_no_field() -> None:
    part = HEAD + b'filename="a; name=model"; name="file"\r\n\r\n1'
    found = form_file("multipart/form-data; boundary=b", form(b"b", part))
    assert (found.filename, found.data) == ("a; name=model", b"1")


@pytest.mark.parametrize(("word", "streams"), [("t", True), ("Y", True), ("0", False), ("", False)])
def test_a_form_streams_where_the_engine_reads_true(word: str, streams: bool) -> None:
    body = form(b"b", HEAD + b'name="stream"\r\n\r\n' + word.encode())
    kind = "multipart/form-data; boundary=b"
    assert read_fields(ENDPOINTS["/v1/audio/transcriptions"], kind, body).stream is streams


@pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/form-data; boundary="])
def test_a_form_without_a_boundary_is_refused(kind: str) -> None:
    with pytest.raises(InvalidRequest, match="no boundary"):
        form_values(kind, b"--b\r\n")


MODEL = HEAD + b'name="model"\r\n\r\n'
OTHER = HEAD + b'name="x"\r\n\r\n1'


@pytest.mark.parametrize(
    "parts",
    [
        [MODEL + b"m" * 1025],
        [MODEL.replace(b"\r\n\r\n", b"\r\nX: " + b"y" * 2048 + b"\r\n\r\n") + b"ears"],
        [*[OTHER] * 64, MODEL + b"ears"],
    ],
    ids=["long name", "long head", "many parts"],
)
def test_a_form_whose_model_cannot_be_read_is_refused_and_not_answered_by_the_base(
    parts: list[bytes],
) -> None:
    with pytest.raises(InvalidRequest):
        form_values("multipart/form-data; boundary=b", form(b"b", *parts))


def test_a_form_of_64_parts_is_read() -> None:
    parts = [*[OTHER] * 63, MODEL + b"ears"]
    assert form_values("multipart/form-data; boundary=b", form(b"b", *parts)) == {"model": "ears"}
