"""Shell. `loraplex adapters ...` as an operator types it, against a gateway and simulated workers
as real processes.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import yaml

from tests import forks
from tests.bad_adapters import KINDS
from tests.harness import (
    DEMO,
    STOP_S,
    Cluster,
    cluster,
    demo_config,
    make_adapter,
    sim_config,
)
from tests.store_servers import GCSPlace, S3Place

KEY = "boss"


async def loraplex(*argv: str, key: str = KEY, verb: str = "adapters") -> tuple[int, str, str]:
    env = {**os.environ, "LORAPLEX_ADMIN_KEY": key}
    async with asyncio.timeout(STOP_S):
        status, out, err = await forks.loraplex(verb, *argv, env=env)
    assert "Traceback" not in err, err
    return status, out, err


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    folder = tmp_path_factory.mktemp("cli")
    adapters = folder / "adapters"
    for name in ("a", "b", "team/d"):
        make_adapter(adapters, name)
    make_adapter(adapters, "wide", rank=999)
    (folder / "keys").write_text(KEY + "\n")
    async with cluster(
        sim_config(adapters, max_loras=2, admin_keys_file=str(folder / "keys")), folder
    ) as c:
        await c.start_worker("w0")
        await c.start_worker("w1")
        yield c


async def test_an_adapter_that_never_was_is_not_said_to_be_gone(served: Cluster) -> None:
    status, _, err = await loraplex("load", "nope", "--url", served.url)
    assert status == 1 and "`nope`" in err and "does not exist" in err and "any more" not in err


async def test_an_adapter_goes_its_whole_way_by_command(served: Cluster) -> None:
    url = ("--url", served.url)
    assert await loraplex("prefetch", "team/d", *url) == (0, "w0: prefetched\nw1: prefetched\n", "")
    status, out, _ = await loraplex("ls", *url)
    lines = [line.split() for line in out.splitlines()]
    assert status == 0 and lines[0][:3] == ["NAME", "STATE", "RANK"]
    assert [(line[0], line[1]) for line in lines[1:4]] == [
        ("sim:a", "listed"),
        ("sim:b", "listed"),
        ("sim:team/d", "cached"),
    ]
    assert (await loraplex("load", "team/d", *url))[:2] == (
        0,
        "Success: LoRA adapter 'team/d' added successfully.\n",
    )
    assert (await loraplex("pin", "sim:team/d", *url))[:2] == (0, "w0: pinned\nw1: pinned\n")
    _, out, _ = await loraplex("show", "team/d", *url)
    assert "to be pinned: everywhere" in out and "team/d" in out and out.count("gpu") == 2
    assert (await loraplex("unpin", "team/d", *url, "--base", "sim"))[:2] == (
        0,
        "w0: unpinned\nw1: unpinned\n",
    )
    assert (await loraplex("evict", "team/d", *url, "--worker", "w0"))[:2] == (0, "w0: evicted\n")
    assert (await loraplex("unload", "team/d", *url))[:2] == (
        0,
        "Success: LoRA adapter 'team/d' removed successfully.\n",
    )
    status, out, _ = await loraplex("ls", *url, "--json", "--state", "loaded")
    assert (status, json.loads(out)) == (0, [])


async def test_a_refusal_is_told_worker_by_worker_with_exit_status_1(served: Cluster) -> None:
    status, out, _ = await loraplex("pin", "wide", "--url", served.url)
    assert status == 1 and out.count("invalid_adapter_rank: ") == 2
    status, _, err = await loraplex("pin", "nobody", "--url", served.url)
    assert status == 1 and "`nobody`" in err and "does not exist" in err


async def test_a_wrong_key_and_a_missing_gateway_are_told_apart(
    served: Cluster, tmp_path: Path
) -> None:
    status, _, err = await loraplex("ls", "--url", served.url, key="wrong")
    assert status == 1 and "an admin key is wrong" in err
    status, _, err = await loraplex("ls", "--url", served.url, key="")
    assert status == 1 and "an admin key is needed" in err and "LORAPLEX_ADMIN_KEY" in err
    (tmp_path / "key").write_text(KEY + "\n")
    assert (await loraplex("ls", "--url", served.url, "--key-file", str(tmp_path / "key"), key=""))[
        0
    ] == 0
    status, _, err = await loraplex("ls", "--url", "http://127.0.0.1:9")
    assert status == 1 and "no gateway answers at http://127.0.0.1:9" in err


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("pin",),
        ("dance", "a"),
        ("ls", "--url", "nowhere"),
        ("ls", "--key-file", "/no/such/file"),
    ],
)
async def test_wrong_usage_has_exit_status_2(argv: tuple[str, ...]) -> None:
    assert (await loraplex(*argv))[0] == 2


async def test_an_alias_goes_its_whole_way_by_command(served: Cluster) -> None:
    url = ("--url", served.url)
    status, out, _ = await loraplex("set", "prod", "a=90", "b=10", *url, verb="aliases")
    assert status == 0
    rows = [line.split() for line in out.splitlines()]
    assert rows[1:] == [["sim:prod", "a", "90", "0", "0", "runtime"], ["b", "10", "0", "0"]]
    assert await served.text("sim:prod", "hello")
    (entry,) = json.loads(
        (await loraplex("ls", *url, "--base", "sim", "--json", verb="aliases"))[1]
    )
    assert sum(share["requests"] for share in entry["shares"]) == 1
    bounds = {
        "shares": [{"adapter": "a", "weight": 1}, {"adapter": "b", "weight": 1}],
        "rollback": {"min_requests": 7},
    }
    as_admin = {"Authorization": f"Bearer {KEY}"}
    async with served.http.put(
        served.url + "/admin/aliases/prod", json=bounds, headers=as_admin
    ) as answer:
        assert answer.status == 200
    assert (await loraplex("set", "sim:prod", "team/d", *url, "--now", verb="aliases"))[0] == 0
    (entry,) = json.loads((await loraplex("ls", *url, "--json", verb="aliases"))[1])
    assert [share["adapter"] for share in entry["shares"]] == ["team/d"] and entry["rollback"][
        "min_requests"
    ] == 7
    status, out, _ = await loraplex("set", "b", "a", *url, "--now", verb="aliases")
    assert status == 0 and out.rstrip().endswith("runtime  hides the adapter of this name")
    assert (await loraplex("rm", "b", *url, verb="aliases"))[0] == 0
    assert await loraplex("rm", "prod", *url, verb="aliases") == (0, "sim:prod: deleted\n", "")
    assert json.loads((await loraplex("ls", *url, "--json", verb="aliases"))[1]) == []


async def test_an_alias_that_cannot_be_is_refused_in_words(served: Cluster) -> None:
    url = ("--url", served.url)
    status, _, err = await loraplex("set", "prod", "nobody", *url, verb="aliases")
    assert status == 1 and "`nobody`" in err and "does not exist" in err
    status, _, err = await loraplex("rm", "prod", *url, verb="aliases")
    assert status == 1 and "no alias `prod`" in err
    status, _, err = await loraplex("set", "prod", "a=much", *url, verb="aliases")
    assert status == 2 and "expected ADAPTER=WEIGHT" in err
    assert (await loraplex("set", "prod", *url, verb="aliases"))[0] == 2


# ---- validate ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("validate") / "config.yaml"
    path.write_text(yaml.safe_dump(demo_config()))
    return str(path)


async def test_a_good_adapter_is_valid_and_its_facts_are_printed(config: str) -> None:
    status, out, _ = await loraplex(
        "validate", str(DEMO / "adapters" / "pirate"), "--config", config
    )
    assert status == 0 and out.startswith("valid: rank ")
    status, out, _ = await loraplex(
        "validate", str(DEMO / "adapters" / "pirate") + "/", "--config", config, "--json"
    )
    assert status == 0 and json.loads(out)["valid"] is True


@pytest.mark.parametrize(
    "name",
    ["rank-over-max", "pickle-only", "weights-cut-in-values", "dora", "int8"],
)
async def test_a_bad_adapter_is_not_valid_for_the_reason_that_a_worker_would_give(
    tmp_path: Path, config: str, name: str
) -> None:
    KINDS[name].make(DEMO / "adapters" / "pirate", tmp_path / "bad")
    status, out, _ = await loraplex("validate", str(tmp_path / "bad"), "--config", config)
    assert status == 1 and out.startswith(f"not valid: {KINDS[name].code}: "), out


async def test_what_is_no_adapter_or_cannot_be_checked_is_told_apart(
    tmp_path: Path, config: str
) -> None:
    (tmp_path / "empty").mkdir()
    status, out, _ = await loraplex("validate", str(tmp_path / "empty"), "--config", config)
    assert status == 1 and "There is no adapter_config.json" in out
    status, out, _ = await loraplex("validate", str(tmp_path / "nowhere"), "--config", config)
    assert status == 2 and "is no folder" in out
    status, out, _ = await loraplex(
        "validate", str(tmp_path / "empty"), "--config", str(tmp_path / "none.yaml")
    )
    assert status == 2
    status, out, _ = await loraplex(
        "validate", str(DEMO / "adapters" / "pirate"), "--config", config, "--model", "other"
    )
    assert status == 2 and "has no model `other`" in out


@pytest.mark.parametrize("kind", ["s3", "gs"])
async def test_an_adapter_in_a_bucket_is_downloaded_and_checked(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest, store_credentials: None
) -> None:
    place: S3Place | GCSPlace
    if kind == "s3":
        place = S3Place(request.getfixturevalue("moto_url"), "cli-validate", "team/")
    else:
        place = GCSPlace(request.getfixturevalue("gcs_url"), "cli-validate", "team/")
    for file in (DEMO / "adapters" / "pirate").iterdir():
        place.put(f"pirate/{file.name}", file.read_bytes())
    made = demo_config(adapters=f"{kind}://elsewhere/adapters")
    made["llm_configs"][0]["lora_config"]["store"] = place.options
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(made))
    status, out, err = await loraplex(
        "validate", f"{kind}://cli-validate/team/pirate", "--config", str(path)
    )
    assert status == 0 and out.startswith("valid: rank "), (out, err)
    status, out, _ = await loraplex(
        "validate", f"{kind}://cli-validate/team/nobody", "--config", str(path)
    )
    assert status == 1 and "There is no adapter_config.json" in out
