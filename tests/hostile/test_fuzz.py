"""Shell. Mutated requests and messages. Whatever the bytes are, they are accepted, refused with an
error of ours, or dropped. LORAPLEX_FUZZ multiplies the numbers.
"""

from __future__ import annotations

import os
import random

from gateway.api.body.scan import check_large_body
from gateway.api.body.schema import parse_body_fields
from gateway.http.parser import SimpleRequest, parse
from shared.errors import InvalidRequest
from shared.link import messages
from tests.hostile.attacks import HI, head, post
from tests.hostile.mutation import mutated

TIMES = int(os.environ.get("LORAPLEX_FUZZ", "1"))
HTTP_REQUESTS, WIRE_MESSAGES = 50_000 * TIMES, 500_000 * TIMES


def test_mutated_requests_are_parsed_refused_or_left_to_others() -> None:
    rng = random.Random(16)
    seeds = [
        post(HI + b',"max_tokens":5,"stream":true'),
        post(b'"prompt":["a","b"],"n":2,"logit_bias":{"5":1}'),
        head("Transfer-Encoding: chunked") + b"2\r\n{}\r\n0\r\n\r\n",
    ]
    bodies = 0
    for _ in range(HTTP_REQUESTS):
        found = parse(mutated(rng.choice(seeds), rng), 1 << 18)
        if type(found) is SimpleRequest:
            bodies += 1
            try:
                check_large_body(found.body, 1 << 20)
                parse_body_fields(found.body)
            except InvalidRequest as exc:
                assert len(exc.message) < 500
    assert bodies > HTTP_REQUESTS // 100


def test_mutated_messages_decode_or_raise_what_their_readers_catch() -> None:
    rng = random.Random(17)
    heartbeat = messages.Heartbeat("w0", 1, 1, "sim", messages.WorkerState.SERVING, capacity=8)
    seeds = [
        messages.encode(messages.Step([(1, 0, b"a"), (2, messages.END, b"b")], [])),
        messages.encode(messages.Attach("w0", 1)),
        messages.encode(heartbeat),
    ]
    decoded = 0
    for _ in range(WIRE_MESSAGES):
        data = mutated(rng.choice(seeds), rng)
        for decode in (messages.decode_worker_data, messages.decode_worker_control):
            try:
                decode(data)
                decoded += 1
            except messages.DecodeError:
                pass
    assert decoded > WIRE_MESSAGES // 100
