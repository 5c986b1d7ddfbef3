"""Clients have a worker fetch nothing that they could not fetch themselves."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web


class Server:
    """Serves on this machine, as what a worker reaches and clients do not."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.port = 0

    async def answer(self, request: web.Request) -> web.Response:
        self.asked.append(request.path)
        return web.Response(body=b"secret")

    def url(self, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}/keys"


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Server]:
    found = Server()
    app = web.Application()
    app.router.add_get("/keys", found.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    found.port = runner.addresses[0][1]
    yield found
    await runner.cleanup()


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test replaces is put back at its end."""
    from vllm.connections import HTTPConnection
    from vllm.multimodal.media import MediaConnector

    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(HTTPConnection, "get_async_client", HTTPConnection.get_async_client)
    monkeypatch.setattr(MediaConnector, "load_from_url", MediaConnector.load_from_url)


def connector() -> Any:
    from vllm.connections import HTTPConnection
    from vllm.multimodal.media import MediaConnector

    return MediaConnector(connection=HTTPConnection())


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("kind", ["fetch_image_async", "fetch_audio_async", "fetch_video_async"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]"])
async def test_what_is_inside_is_not_asked(server: Server, kind: str, host: str) -> None:
    from vllm.exceptions import VLLMValidationError

    from worker.engine.vllm.tenants.media_addresses import fetch_from_public_addresses

    fetch_from_public_addresses(None)
    asking = connector()
    with pytest.raises(VLLMValidationError, match="public addresses only"):
        await getattr(asking, kind)(server.url(host))
    assert not server.asked
    await asking.connection._async_client.close()


@pytest.mark.usefixtures("restored")
async def test_domains_that_an_operator_names_are_asked(server: Server) -> None:
    from worker.engine.vllm.tenants.media_addresses import fetch_from_public_addresses

    fetch_from_public_addresses(["127.0.0.1"])
    asking = connector()
    with pytest.raises(ValueError, match="image"):
        await asking.fetch_image_async(server.url())
    assert server.asked == ["/keys"]
    await asking.connection._async_client.close()


@pytest.mark.usefixtures("restored")
async def test_the_environments_proxy_is_asked(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from worker.engine.vllm.tenants.media_addresses import fetch_from_public_addresses

    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.port}")
    fetch_from_public_addresses(None)
    asking = connector()
    with pytest.raises(ValueError, match="image"):
        await asking.fetch_image_async("http://media.example/keys")
    assert server.asked == ["/keys"]
    await asking.connection._async_client.close()


@pytest.mark.usefixtures("restored")
def test_a_picture_to_score_is_not_fetched_on_the_loop() -> None:
    from vllm.exceptions import VLLMValidationError

    from worker.engine.vllm.tenants.media_addresses import fetch_from_public_addresses

    fetch_from_public_addresses(None)
    with pytest.raises(VLLMValidationError, match="not fetched"):
        connector().fetch_image("https://media.example/a.png")


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.100.100.200",
        "0.0.0.0", "168.63.129.16", "224.0.0.1", "::1", "::", "fe80::1%eth0", "fd00:ec2::254",
        "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::169.254.169.254", "ff0e::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    from worker.engine.vllm.tenants.media_addresses import is_public

    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "64:ff9b::8.8.8.8"])
def test_addresses_that_are_public(address: str) -> None:
    from worker.engine.vllm.tenants.media_addresses import is_public

    assert is_public(address)
