"""Shell. Requests made from the gateway's own `/openapi.json`, right and wrong ones: none is
answered with a fault of ours, and every refusal has the shape that the document promises.
LORAPLEX_FUZZ multiplies the numbers.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any
from urllib.parse import quote

from gateway.api.body.schema import BodyFields
from tests.harness import Cluster, cluster, make_adapter, sim_config

TIMES = int(os.environ.get("LORAPLEX_FUZZ", "1"))
REQUESTS_PER_PATH = 60 * TIMES
WORDS = [
    "",
    "sim",
    "sim:pirate",
    "resp_1",
    "/",
    "..",
    "%",
    "\u0000",
    "\U0001f600",
    "a" * 2000,
    "?x=1",
    "\u2028",
]
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    5.0,
    0.5,
    10**12,
    -(10**30),
    1e300,
    "5",
    "true",
    [],
    {},
]


def value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(5 if depth < 3 else 2)
    if kind == 0:
        return rng.choice(VALUES)
    if kind == 1:
        return rng.choice(WORDS)
    if kind == 2:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 3:
        return {rng.choice(WORDS): value(rng, depth + 1) for _ in range(rng.randrange(4))}
    return {"role": "user", "content": value(rng, depth + 1)}


def made_from(schema: dict[str, Any], rng: random.Random) -> Any:
    """A value that the schema allows."""
    if "anyOf" in schema:
        return made_from(rng.choice(schema["anyOf"]), rng)
    kind = schema.get("type", "string")
    match rng.choice(kind) if isinstance(kind, list) else kind:
        case "object":
            return {"role": "user", "content": "hi"}
        case "array":
            return [made_from(schema["items"], rng)]
        case "integer":
            return rng.randrange(20)
        case "boolean":
            return rng.random() < 0.5
        case "null":
            return None
        case _:
            return rng.choice(["sim", "sim:pirate", "hi"])


def body_for(operation: dict[str, Any], rng: random.Random) -> tuple[bytes, str]:
    """A body and its type: right in the mean, with some fields wrong, or no object at all."""
    if "requestBody" not in operation:
        return b"", ""
    kind, content = next(iter(operation["requestBody"]["content"].items()))
    schema = content["schema"]
    if rng.random() < 0.1:
        return rng.randbytes(rng.randrange(40)), kind
    if rng.random() < 0.1:
        return json.dumps(value(rng)).encode(), kind
    fields = {name: made_from(part, rng) for name, part in schema["properties"].items()}
    for name in rng.sample(BodyFields.__struct_fields__, rng.randrange(3)):
        fields[name] = value(rng)
    for name in [n for n in fields if rng.random() < 0.1]:
        del fields[name]
    if kind != "multipart/form-data":
        return json.dumps(fields).encode(), kind
    parts = "".join(
        f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{part}\r\n'
        for name, part in fields.items()
    )
    return (parts + "--b--\r\n").encode("utf-8", "replace"), f"{kind}; boundary=b"


def check(document: dict[str, Any], operation: dict[str, Any], status: int, body: bytes) -> None:
    promised = operation["responses"]
    assert str(status) in promised or status == 405, (status, body[:300])
    if status < 400:
        return
    reference = promised[str(status)]["content"]["application/json"]["schema"]["$ref"]
    schema = document["components"]["schemas"][reference.rpartition("/")[2]]
    found = json.loads(body)
    assert {*schema["required"]} <= {*found}, found
    error = found["error"]
    assert {*error} == {*schema["properties"]["error"]["required"]}, found
    assert all(isinstance(error[name], str) and error[name] for name in ("message", "type", "code"))


async def send(c: Cluster, method: str, path: str, body: bytes, kind: str) -> tuple[int, bytes]:
    headers = {"Content-Type": kind} if kind else {}
    async with c.http.request(method, c.url + path, data=body or None, headers=headers) as answer:
        return answer.status, await answer.read()


async def test_no_request_of_the_document_meets_a_fault_of_ours(tmp_path: Path) -> None:
    rng = random.Random(18)
    (tmp_path / "adapters").mkdir()
    make_adapter(tmp_path / "adapters", "pirate")
    async with cluster(sim_config(tmp_path / "adapters"), tmp_path) as c:
        await c.start_worker("w0")
        document = (await c.get("/openapi.json"))[1]
        served = 0
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                for _ in range(REQUESTS_PER_PATH):
                    where = path
                    for parameter in operation["parameters"]:
                        word = quote(rng.choice(WORDS) or "x", safe="")
                        where = where.replace(f"{{{parameter['name']}}}", word)
                    body, kind = body_for(operation, rng)
                    status, answered = await send(c, method, where, body, kind)
                    assert status < 500, (method, where, body[:300], status, answered[:300])
                    if path == where:
                        check(document, operation, status, answered)
                    served += status == 200
        assert served > REQUESTS_PER_PATH
        assert (await c.chat("sim", max_tokens=2))[0] == 200
