"""Adapters whose names have more than letters, from the store to the header of the answer; and what
is left out of the store, with its reason.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote, unquote

import pytest
import pytest_asyncio
import yaml

from tests.harness import Cluster, chat_body, cluster, make_adapter, sim_config
from tests.integration.cli.test_cli_adapters import loraplex

NAMES = ["a b", "lora:1234", "équipe/日本", "a+b", 'say "hi"', "100%", "q?#&=", "plain"]
SKIPPED = {"at@name": "`@`", "leak": "leads out of the store"}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    folder = tmp_path_factory.mktemp("names")
    for name in (*NAMES, "at@name"):
        make_adapter(folder / "adapters", name)
    make_adapter(folder, "outside")
    (folder / "adapters" / "leak").symlink_to(folder / "outside")
    async with cluster(sim_config(folder / "adapters"), folder) as c:
        await c.start_worker("w0")
        yield c


@pytest.mark.parametrize("name", NAMES)
async def test_a_name_of_any_printable_characters_is_served(served: Cluster, name: str) -> None:
    async with served.http.post(
        f"{served.url}/v1/chat/completions", json=chat_body(f"sim:{name}", max_tokens=2)
    ) as answer:
        assert answer.status == 200, await answer.text()
        shown = answer.headers["x-loraplex-adapter"]
    assert shown.isascii() and unquote(shown.partition("@")[0]) == name
    for path in (f"/admin/adapters/{quote(name)}", f"/v1/models/{quote(f'sim:{name}')}"):
        async with served.http.get(f"{served.url}{path}") as answer:
            assert answer.status == 200, await answer.text()
    status, out, _ = await loraplex("prefetch", f"sim:{name}", "--url", served.url)
    assert (status, out) == (0, "w0: prefetched\n")


async def test_the_list_of_models_has_every_name_and_is_json(served: Cluster) -> None:
    async with served.http.get(f"{served.url}/v1/models") as answer:
        listed = {card["id"] for card in json.loads(await answer.text())["data"]}
    assert listed == {"sim", *(f"sim:{name}" for name in NAMES)}


async def test_what_is_skipped_is_told_with_its_reason_wherever_an_operator_looks(
    served: Cluster,
) -> None:
    status, out, _ = await loraplex("ls", "--skipped", "--url", served.url)
    assert status == 0
    lines = out.splitlines()
    async with served.http.get(f"{served.url}/metrics") as answer:
        metrics = await answer.text()
    for folder, reason in SKIPPED.items():
        assert any(folder in line and reason in line for line in lines), out
    assert 'loraplex_adapters_skipped{base="sim",reason="name"} 1.0' in metrics
    assert 'loraplex_adapters_skipped{base="sim",reason="link_out"} 1.0' in metrics
    async with served.http.post(
        f"{served.url}/v1/chat/completions", json=chat_body("sim:leak")
    ) as answer:
        message = (await answer.json())["error"]["message"]
    assert answer.status == 404 and "leads out of the store" in message


async def test_check_says_of_a_store_that_it_is_not_there(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(sim_config(tmp_path / "nowhere")))
    status, _, err = await loraplex(str(config), verb="check")
    assert status == 2 and "does not exist" in err
    (tmp_path / "nowhere").mkdir()
    status, out, _ = await loraplex(str(config), verb="check")
    assert status == 0 and "no adapters in" in out
