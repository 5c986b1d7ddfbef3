"""No client chooses the id under which its response is stored."""

from __future__ import annotations

import json

import pytest

from worker.engine.vllm.app.responses import with_id

FIELDS = (b'"x":1', b'"\xed\xa0\x80":1', b'"\\ud800":1', b'"x":NaN', b'"request\\u005fid":"theirs"')


@pytest.mark.parametrize("field", FIELDS)
def test_an_id_that_a_client_wrote_is_replaced_however_its_body_is_read(field: bytes) -> None:
    body = b'{"model":"m",%b,"request_id":"theirs"}' % field
    assert json.loads(body)["request_id"] == "theirs"
    made = json.loads(with_id(body, "ours"))
    assert made["request_id"] == "ours" and "theirs" not in made.values()


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"[NaN]", b'{"\xff":1}'])
def test_what_is_no_object_is_left_for_vllm_to_refuse(body: bytes) -> None:
    assert with_id(body, "ours") == body
