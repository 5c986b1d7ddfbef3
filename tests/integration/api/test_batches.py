"""Shell. `/v1/files` and `/v1/batches`: a file of requests is answered whole, behind everything
else, by its owner's key, and also if the gateway is killed while it is at it.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import json
import resource
import signal
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import openai
import pytest
import pytest_asyncio

from gateway.batches.turns import BATCHES_AT_ONCE
from tests.harness import Cluster, chat_body, cluster, make_adapter, sim_config
from tests.integration.admin.test_accounts import bearer, keys_file

CHAT = "/v1/chat/completions"
ENDED = ("completed", "failed", "expired", "cancelled")
WAIT_S = 60.0
pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest_asyncio.fixture(loop_scope="session")
async def teams(tmp_path: Path) -> AsyncIterator[Cluster]:
    (tmp_path / "adapters").mkdir()
    for name in ("pirate", "haiku"):
        make_adapter(tmp_path / "adapters", name)
    keys = keys_file(tmp_path / "keys.yaml", red={}, blue={"adapters": '["none"]'})
    config = sim_config(tmp_path / "adapters", keys_file=str(keys), sim={"itl_ms": 4})
    shares = [{"adapter": "pirate", "weight": 50}, {"adapter": "haiku", "weight": 50}]
    config["llm_configs"][0]["lora_config"]["aliases"] = {"prod": {"shares": shares}}
    async with cluster(config, tmp_path) as c:
        await c.start_worker("w0")
        yield c


def line(number: int, model: str = "sim:pirate", url: str = CHAT, **more: Any) -> dict[str, Any]:
    body = chat_body(model, f"question {number}", max_tokens=8) | more
    return {"custom_id": f"r{number}", "method": "POST", "url": url, "body": body}


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def jsonl(lines: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in lines)


async def ask(
    c: Cluster, method: str, path: str, key: str = "red", body: Any = None, data: Any = None
) -> tuple[int, Any]:
    async with c.http.request(
        method, c.url + path, json=body, data=data, headers=bearer(key)
    ) as answer:
        raw = await answer.read()
        return answer.status, json.loads(raw) if answer.content_type.endswith("/json") else raw


async def upload(c: Cluster, data: bytes, key: str = "red", **fields: str) -> tuple[int, Any]:
    form = aiohttp.FormData()
    for name, value in ({"purpose": "batch"} | fields).items():
        form.add_field(name, value)
    form.add_field("file", data, filename="in.jsonl", content_type="application/jsonl")
    return await ask(c, "POST", "/v1/files", key, data=form)


async def batch_of(c: Cluster, data: bytes, key: str = "red", endpoint: str = CHAT) -> Any:
    status, file = await upload(c, data, key)
    assert status == 200 and file["bytes"] == len(data), file
    asked = {"input_file_id": file["id"], "endpoint": endpoint, "completion_window": "24h"}
    status, batch = await ask(c, "POST", "/v1/batches", key, asked | {"metadata": {"a": "b"}})
    assert status == 200 and batch["status"] == "validating", batch
    return batch


async def ended(c: Cluster, batch: Any, key: str = "red") -> Any:
    async with asyncio.timeout(WAIT_S):
        while True:
            status, found = await ask(c, "GET", f"/v1/batches/{batch['id']}", key)
            assert status == 200, found
            if found["status"] in ENDED:
                return found
            await asyncio.sleep(0.1)


async def results(c: Cluster, file_id: str) -> list[Any]:
    status, raw = await ask(c, "GET", f"/v1/files/{file_id}/content")
    assert status == 200
    return [json.loads(one) for one in raw.splitlines()]


async def test_every_line_is_answered_as_if_it_had_been_asked_alone(teams: Cluster) -> None:
    wrong = [line(100, "sim:nobody"), line(101, temperature="x", max_tokens="many")]
    batch = await ended(teams, await batch_of(teams, jsonl([*map(line, range(40)), *wrong])))
    assert batch["status"] == "completed" and batch["metadata"] == {"a": "b"}
    assert batch["request_counts"] == {"total": 42, "completed": 40, "failed": 2}
    assert batch["completed_at"] >= batch["in_progress_at"] >= batch["created_at"]
    good = await results(teams, batch["output_file_id"])
    assert sorted(r["custom_id"] for r in good) == sorted(f"r{n}" for n in range(40))
    one = next(r for r in good if r["custom_id"] == "r7")
    _, alone = await ask(teams, "POST", CHAT, body=line(7)["body"])
    assert one["error"] is None and one["response"]["status_code"] == 200
    assert one["response"]["body"]["choices"] == alone["choices"]
    bad = {r["custom_id"]: r["response"] for r in await results(teams, batch["error_file_id"])}
    assert bad["r100"]["status_code"] == 404
    assert bad["r100"]["body"]["error"]["code"] == "adapter_not_found"
    assert bad["r101"]["status_code"] == 400


async def test_a_user_has_the_same_share_of_an_alias_in_a_batch_as_beside_it(
    teams: Cluster,
) -> None:
    users = [{"user": f"u{n}"} for n in range(20)] + [{}]  # the last one is known by its key
    asked = [line(n, "sim:prod", **user) for n, user in enumerate(users)]
    batch = await ended(teams, await batch_of(teams, jsonl(asked)))
    found = {
        r["custom_id"]: r["response"]["body"]["choices"]
        for r in await results(teams, batch["output_file_id"])
    }
    for one in asked:
        _, alone = await ask(teams, "POST", CHAT, body=one["body"])
        assert found[one["custom_id"]] == alone["choices"]


async def test_openais_client_makes_waits_for_and_reads_a_batch(teams: Cluster) -> None:
    client = openai.AsyncOpenAI(base_url=teams.url + "/v1", api_key="red", max_retries=0)
    file = await client.files.create(file=("in.jsonl", jsonl([line(1)])), purpose="batch")
    batch = await client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    await ended(teams, {"id": batch.id})
    batch = await client.batches.retrieve(batch.id)
    assert batch.status == "completed" and batch.output_file_id is not None
    text = (await client.files.content(batch.output_file_id)).text
    assert json.loads(text)["custom_id"] == "r1"
    assert [b.id async for b in client.batches.list(limit=1)] == [batch.id]
    assert file.id in [f.id async for f in client.files.list()]
    assert (await client.files.delete(file.id)).deleted
    await client.close()


async def test_a_killed_gateway_goes_on_and_asks_no_line_again_that_it_has_the_answer_of(
    teams: Cluster,
) -> None:
    batch = await batch_of(teams, jsonl(line(n, max_tokens=60) for n in range(200)))
    async with asyncio.timeout(WAIT_S):
        while True:
            found = (await ask(teams, "GET", f"/v1/batches/{batch['id']}"))[1]
            if found["request_counts"]["completed"]:
                break
            await asyncio.sleep(0.05)
    assert teams.gateway is not None and found["status"] == "in_progress"
    teams.gateway.signal(signal.SIGKILL)
    await teams.gateway.wait()
    (out,) = (teams.folder / "state" / "batches").glob(f"*/{batch['id']}.out")
    before = [json.loads(one) for one in out.read_bytes().splitlines()]
    assert 0 < len(before) < 200
    with out.open("ab") as file:
        file.write(b'{"id":"batch_req_x","custom_')  # as if it had been killed while it wrote
    await teams.stop()
    await teams.start_gateway()
    await teams.start_worker("w1")
    batch = await ended(teams, batch)
    assert batch["request_counts"] == {"total": 200, "completed": 200, "failed": 0}
    after = await results(teams, batch["output_file_id"])
    assert sorted(r["custom_id"] for r in after) == sorted(f"r{n}" for n in range(200))
    assert after[: len(before)] == before


async def test_what_a_key_has_made_no_other_key_sees(teams: Cluster) -> None:
    batch = await batch_of(teams, jsonl([line(1)]))
    file = batch["input_file_id"]
    gone_file, gone_batch = "file-" + "0" * 24, "batch_" + "0" * 24
    for method, path, missing in (
        ("GET", f"/v1/files/{file}", gone_file),
        ("GET", f"/v1/files/{file}/content", gone_file),
        ("DELETE", f"/v1/files/{file}", gone_file),
        ("GET", f"/v1/batches/{batch['id']}", gone_batch),
        ("POST", f"/v1/batches/{batch['id']}/cancel", gone_batch),
    ):
        mine = file if missing == gone_file else batch["id"]
        status, other = await ask(teams, method, path, "blue")
        _, never = await ask(teams, method, path.replace(mine, missing), "blue")
        assert status == 404
        assert other["error"]["message"].replace(mine, missing) == never["error"]["message"]
    asked = {"input_file_id": file, "endpoint": CHAT}
    assert (await ask(teams, "POST", "/v1/batches", "blue", asked))[0] == 404
    for path in ("/v1/files", "/v1/batches"):
        assert (await ask(teams, "GET", path, "blue"))[1]["data"] == []
    assert (await ended(teams, batch))["status"] == "completed"


async def test_a_line_may_use_what_its_key_may_use(teams: Cluster) -> None:
    batch = await ended(
        teams, await batch_of(teams, jsonl([line(1), line(2, "sim")]), "blue"), "blue"
    )
    assert batch["request_counts"] == {"total": 2, "completed": 1, "failed": 1}


async def test_a_line_that_takes_longer_than_any_request_may_is_not_asked_again(
    tmp_path: Path,
) -> None:
    """Its key would be charged for it again and again, for a day."""
    (tmp_path / "adapters").mkdir()
    keys = keys_file(tmp_path / "keys.yaml", red={})
    config = sim_config(
        tmp_path / "adapters", keys_file=str(keys), sim={"itl_ms": 20}, request_timeout_s=0.5
    )
    async with cluster(config, tmp_path) as c:
        await c.start_worker("w0")
        batch = await ended(c, await batch_of(c, jsonl([line(1, "sim", max_tokens=1000)])))
        assert batch["request_counts"] == {"total": 1, "completed": 0, "failed": 1}
        (answer,) = await results(c, batch["error_file_id"])
        assert answer["response"]["status_code"] == 504
        assert answer["response"]["body"]["error"]["code"] == "deadline_exceeded"
        assert await c.metric("loraplex_engine_requests_total") == 1


async def test_a_cancelled_batch_keeps_what_is_answered(teams: Cluster) -> None:
    batch = await batch_of(teams, jsonl(line(n, max_tokens=400) for n in range(300)))
    status, found = await ask(teams, "POST", f"/v1/batches/{batch['id']}/cancel")
    assert status == 200 and found["status"] == "cancelling"
    batch = await ended(teams, batch)
    assert batch["status"] == "cancelled" and batch["cancelled_at"]
    assert batch["request_counts"]["completed"] < 300
    assert (await ask(teams, "DELETE", f"/v1/files/{batch['input_file_id']}"))[0] == 200


async def test_the_counts_of_a_cancelled_batch_are_those_of_its_results(teams: Cluster) -> None:
    """What is refused at once is mostly being written."""
    for _ in range(3):
        batch = await batch_of(teams, jsonl(line(n, "sim:nobody") for n in range(30_000)))
        async with asyncio.timeout(WAIT_S):
            while not (await ask(teams, "GET", f"/v1/batches/{batch['id']}"))[1]["request_counts"][
                "failed"
            ]:
                await asyncio.sleep(0.05)
        await ask(teams, "POST", f"/v1/batches/{batch['id']}/cancel")
        found = await ended(teams, batch)
        told = await results(teams, found["error_file_id"])
        assert found["status"] == "cancelled"
        assert len(told) == found["request_counts"]["failed"]


async def test_a_batch_that_is_cancelled_while_others_have_all_places_ends_at_once(
    teams: Cluster,
) -> None:
    lines = jsonl(line(n, max_tokens=400) for n in range(300))
    made = [await batch_of(teams, lines) for _ in range(BATCHES_AT_ONCE + 1)]
    async with asyncio.timeout(WAIT_S):
        while True:
            found = [(await ask(teams, "GET", f"/v1/batches/{b['id']}"))[1] for b in made]
            waiting = [b for b in found if b["status"] == "validating"]
            if len(waiting) == 1:
                break
            await asyncio.sleep(0.05)
    await ask(teams, "POST", f"/v1/batches/{waiting[0]['id']}/cancel")
    assert (await ended(teams, waiting[0]))["status"] == "cancelled"
    assert (await ask(teams, "DELETE", f"/v1/files/{waiting[0]['input_file_id']}"))[0] == 200
    listed = (await ask(teams, "GET", "/v1/batches"))[1]["data"]
    assert [b["status"] for b in listed].count("in_progress") == BATCHES_AT_ONCE


async def test_what_a_key_was_answered_before_it_was_revoked_is_there_when_it_is_valid_again(
    teams: Cluster, tmp_path: Path
) -> None:
    """The gateway starts anew meanwhile."""
    batch = await batch_of(teams, jsonl(line(n, max_tokens=60) for n in range(200)))
    async with asyncio.timeout(WAIT_S):
        while not (await ask(teams, "GET", f"/v1/batches/{batch['id']}"))[1]["request_counts"][
            "completed"
        ]:
            await asyncio.sleep(0.05)
    await teams.stop()
    keys_file(tmp_path / "keys.yaml", blue={})
    await teams.start_gateway()
    (state,) = (tmp_path / "state" / "batches").glob(f"*/{batch['id']}.json")
    async with asyncio.timeout(WAIT_S):
        while json.loads(state.read_bytes())["batch"]["status"] not in ENDED:
            await asyncio.sleep(0.05)
    await teams.stop()
    keys_file(tmp_path / "keys.yaml", red={}, blue={})
    await teams.start_gateway()
    _, found = await ask(teams, "GET", f"/v1/batches/{batch['id']}")
    assert found["status"] == "failed" and found["errors"]["data"][0]["code"] == "invalid_api_key"
    kept = await results(teams, found["output_file_id"])
    assert len(kept) == found["request_counts"]["completed"] > 0
    assert not state.with_suffix(".out").exists()


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        ([], "empty_file"),
        ([line(1), line(1)], "duplicate_custom_id"),
        ([line(1, url="/v1/completions")], "mismatched_url"),
        ([line(1, stream=True)], "invalid_request"),
        ([line(1) | {"method": "GET"}], "invalid_method"),
        ([line(1), {"custom_id": "r2"}], "invalid_json_line"),
    ],
)
async def test_a_file_that_cannot_be_a_batch_fails_and_says_where(
    teams: Cluster, lines: list[dict[str, Any]], code: str
) -> None:
    batch = await ended(teams, await batch_of(teams, jsonl(lines)))
    assert batch["status"] == "failed" and batch["output_file_id"] is None
    (error,) = batch["errors"]["data"]
    assert error["code"] == code and error["message"]
    assert error["line"] == (len(lines) or None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"endpoint": "/v1/nothing"},
        {"endpoint": "/v1/audio/transcriptions"},
        {"completion_window": "1h"},
        {"input_file_id": 3},
        {"metadata": {str(n): "x" for n in range(17)}},
    ],
)
async def test_a_batch_that_cannot_be_is_a_400(teams: Cluster, wrong: dict[str, Any]) -> None:
    asked = {"input_file_id": "file-" + "0" * 24, "endpoint": CHAT} | wrong
    status, refused = await ask(teams, "POST", "/v1/batches", body=asked)
    assert status == 400 and refused["error"]["code"] == "invalid_request"


async def test_a_request_for_a_batch_is_bounded_before_it_is_read(teams: Cluster) -> None:
    """It is read on the loop, and a million keys would take half a second."""
    body = {"input_file_id": "f", "endpoint": CHAT, "metadata": {"a": "x" * (128 << 10)}}
    status, answer = await ask(teams, "POST", "/v1/batches", body=body)
    assert (status, answer["error"]["code"]) == (413, "body_too_large")
    largest = {"\U0001f600" * 60 + str(n): "\U0001f600" * 512 for n in range(16)}
    status, answer = await ask(teams, "POST", "/v1/batches", body=body | {"metadata": largest})
    assert (status, answer["error"]["code"]) == (404, "file_not_found")


async def test_a_batch_whose_record_cannot_be_read_harms_nothing_else(teams: Cluster) -> None:
    broken = await batch_of(teams, jsonl(line(n, max_tokens=400) for n in range(300)))
    other = await batch_of(teams, jsonl([line(1)]))
    (record,) = (teams.folder / "state" / "batches").glob(f"*/{broken['id']}.json")
    async with asyncio.timeout(WAIT_S):
        while json.loads(record.read_bytes())["batch"]["status"] != "in_progress":
            await asyncio.sleep(0.05)
    record.write_bytes(b"")
    assert teams.gateway is not None
    async with asyncio.timeout(WAIT_S):
        while "batch paused" not in teams.gateway.output():
            await asyncio.sleep(0.05)
    assert (await ended(teams, other))["status"] == "completed"
    listed = (await ask(teams, "GET", "/v1/batches"))[1]["data"]
    assert [b["id"] for b in listed] == [other["id"]]
    status, told = await ask(teams, "GET", f"/v1/batches/{broken['id']}")
    assert status == 503 and str(teams.folder) not in told["error"]["message"]


async def test_a_file_that_cannot_be_read_now_is_not_said_to_be_missing(teams: Cluster) -> None:
    _, file = await upload(teams, jsonl([line(1)]))
    (record,) = (teams.folder / "state" / "batches").glob(f"*/{file['id']}.json")
    record.unlink()
    record.mkdir()  # the superuser may read all else
    asked = {"input_file_id": file["id"], "endpoint": CHAT}
    for method, path, body in (
        ("GET", f"/v1/files/{file['id']}", None),
        ("GET", "/v1/files", None),
        ("POST", "/v1/batches", asked),
    ):
        assert (await ask(teams, method, path, body=body))[0] == 503


async def test_an_upload_that_is_none_is_a_400(teams: Cluster) -> None:
    assert (await upload(teams, b"{}", purpose="fine-tune"))[0] == 400
    assert (await ask(teams, "POST", "/v1/files", body={"purpose": "batch"}))[0] == 400
    for path in ("/v1/files/..%2f..%2fx", "/v1/files/x/content", "/v1/batches/..", "/v1/batches/x"):
        assert (await ask(teams, "GET", path))[0] == 404
    for query in ("limit=0", "limit=x", "limit=-1", "order=new"):
        assert (await ask(teams, "GET", f"/v1/batches?{query}"))[0] == 400
    async with teams.http.put(teams.url + "/v1/batches", headers=bearer("red")) as answer:
        assert answer.status == 405 and "POST" in answer.headers["Allow"]


async def test_clients_that_do_not_read_a_file_hold_none_of_it_in_the_gateway(
    teams: Cluster,
) -> None:
    data = b"x" * (24 << 20)
    _, file = await upload(teams, data)
    address = urlsplit(teams.url)
    request = (
        f"GET /v1/files/{file['id']}/content HTTP/1.1\r\nHost: h\r\n"
        f"Authorization: {bearer('red')['Authorization']}\r\n\r\n"
    )
    assert teams.gateway is not None
    before = resident_bytes(teams.gateway.pid)
    async with contextlib.AsyncExitStack() as clients:
        for _ in range(8):
            reader, writer = await asyncio.open_connection(
                address.hostname, address.port, limit=1 << 10
            )
            clients.callback(writer.close)
            writer.write(request.encode())
            await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), WAIT_S)  # and nothing more
        assert resident_bytes(teams.gateway.pid) - before < 2 * len(data)
        assert (await ask(teams, "GET", f"/v1/files/{file['id']}/content"))[1] == data


@pytest.mark.parametrize("path", ["/v1/files", "/v1/batches"])
@pytest.mark.parametrize(
    "limit", ["000000001" + "0" * 5000, "0000000019999", "-1", "1e3", ""], ids=lambda v: v[:14]
)
async def test_a_limit_of_a_list_that_is_no_short_number_is_a_400(
    teams: Cluster, path: str, limit: str
) -> None:
    assert (await ask(teams, "GET", f"{path}?limit={limit}"))[0] == 400


async def test_a_file_and_the_results_of_a_batch_are_kept_for_as_long_as_asked(
    teams: Cluster,
) -> None:
    client = openai.AsyncOpenAI(base_url=teams.url + "/v1", api_key="red", max_retries=0)
    file = await client.files.create(
        file=("in.jsonl", jsonl([line(1)])),
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert file.expires_at == file.created_at + 3600
    batch = await client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        output_expires_after={"anchor": "created_at", "seconds": 7200},
    )
    ended_batch = await ended(teams, {"id": batch.id})
    output = await client.files.retrieve(ended_batch["output_file_id"])
    assert output.expires_at == output.created_at + 7200
    await client.close()
    # A gateway looks for files whose time is over when it starts.
    (kept,) = (teams.folder / "state" / "batches").glob(f"*/{file.id}.json")
    record = json.loads(kept.read_bytes()) | {"created_at": file.created_at - 3601}
    kept.write_bytes(json.dumps(record).encode())
    await teams.stop()
    await teams.start_gateway()
    async with asyncio.timeout(WAIT_S):
        while (await ask(teams, "GET", f"/v1/files/{file.id}"))[0] == 200:
            await asyncio.sleep(0.05)
    assert (await ask(teams, "GET", f"/v1/files/{output.id}/content"))[0] == 200


async def test_a_line_that_goes_on_from_a_stored_response_is_asked_where_that_lies(
    teams: Cluster,
) -> None:
    """Nobody has this one, which the gateway finds out. A worker would be asked in vain."""
    path = "/v1/responses"
    body = {"model": "sim", "input": "and?", "previous_response_id": "resp_" + "0" * 32}
    one = {"custom_id": "r", "method": "POST", "url": path, "body": body}
    batch = await ended(teams, await batch_of(teams, jsonl([one]), endpoint=path))
    (answer,) = await results(teams, batch["error_file_id"])
    assert answer["response"]["body"]["error"]["code"] == "response_not_found"


@pytest.mark.parametrize("seconds", ["7200", 7200.0, "7200.0"])
async def test_numbers_and_a_byte_order_mark_are_taken_as_on_other_paths(
    teams: Cluster, seconds: object
) -> None:
    _, file = await upload(teams, b"{}", **{"expires_after[seconds]": str(seconds)})
    assert file["expires_at"] == file["created_at"] + 7200
    asked = {"input_file_id": file["id"], "endpoint": CHAT}
    asked["output_expires_after"] = {"anchor": "created_at", "seconds": seconds}
    body = codecs.BOM_UTF8 + json.dumps(asked).encode()
    assert (await ask(teams, "POST", "/v1/batches", data=body))[0] == 200
    assert (await ask(teams, "GET", "/v1/batches?limit=1.0"))[0] == 200


@pytest.mark.parametrize("wrong", ["3599", "2592001", "x", "1e4", ""])
async def test_a_time_that_is_too_short_or_too_long_or_none_is_a_400(
    teams: Cluster, wrong: str
) -> None:
    status, said = await upload(teams, b"{}", **{"expires_after[seconds]": wrong})
    assert status == 400 and said["error"]["param"] == "expires_after"
    asked = {"input_file_id": "file-" + "0" * 24, "endpoint": CHAT}
    asked["output_expires_after"] = {"anchor": "created_at", "seconds": wrong}
    assert (await ask(teams, "POST", "/v1/batches", body=asked))[0] == 400


@pytest.mark.long
async def test_a_key_with_many_batches_gives_a_place_to_another_one_and_loses_no_line(
    teams: Cluster,
) -> None:
    lines = [line(n, "sim", max_tokens=120) for n in range(150)]
    red = [await batch_of(teams, jsonl(lines)) for _ in range(2 * BATCHES_AT_ONCE)]
    blue = await batch_of(teams, jsonl([line(0, "sim")]), "blue")
    assert (await ended(teams, blue, "blue"))["status"] == "completed"
    _, newest = await ask(teams, "GET", f"/v1/batches/{red[-1]['id']}")
    assert newest["status"] not in ENDED
    for batch in red:
        found = await ended(teams, batch)
        assert found["request_counts"] == {"total": 150, "completed": 150, "failed": 0}
    asked = len(red) * len(lines) + 1
    assert await teams.metric("loraplex_engine_requests_total") == asked, "none twice"


@pytest.mark.long
async def test_a_batch_whose_key_is_revoked_asks_nothing_more(
    teams: Cluster, tmp_path: Path
) -> None:
    await batch_of(teams, jsonl([line(n, "sim", max_tokens=100) for n in range(600)]))
    async with asyncio.timeout(WAIT_S):
        while await teams.metric("loraplex_engine_requests_total") < 40:
            await asyncio.sleep(0.05)
    keys_file(tmp_path / "keys.yaml", blue={})
    (state,) = (tmp_path / "state" / "batches").glob("*/batch_*.json")
    async with asyncio.timeout(WAIT_S):
        while (found := json.loads(state.read_bytes())["batch"])["status"] not in ENDED:
            await asyncio.sleep(0.05)
    assert found["completed"] + found["failed"] == 600 and 0 < found["completed"] < 600
