"""Where an S3 request names its bucket: in the host or in the path."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp.resolver
import pytest
from aiohttp import web

from shared.stores import open_store
from tests.store_servers import http_server

pytestmark = pytest.mark.usefixtures("store_credentials")
EMPTY = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"
ARN = "arn:aws:s3:us-east-1:123456789012:accesspoint/ours"


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A resolver that maps `anything.s3.localhost` to this host."""
    real = socket.getaddrinfo

    def local(host: Any, *args: Any, **more: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        return real("127.0.0.1" if str(name).endswith(".localhost") else host, *args, **more)

    monkeypatch.setattr(socket, "getaddrinfo", local)
    monkeypatch.setattr(aiohttp.connector, "DefaultResolver", aiohttp.resolver.ThreadedResolver)
    yield


async def asked(url: str, **options: object) -> tuple[str, str]:
    """(host without its port, path) of a listing."""
    seen: list[tuple[str, str]] = []

    async def respond(request: web.Request) -> web.Response:
        seen.append((request.host.partition(":")[0], request.path))
        return web.Response(body=EMPTY, content_type="application/xml")

    async with http_server(respond) as server:
        endpoint = f"http://s3.localhost:{server.rpartition(':')[2]}"
        options = {"endpoint_url": endpoint, "region": "us-east-1", **options}
        async with open_store(url, options) as store:
            assert [a async for a in store.list()] == []
    return seen[0]


@pytest.mark.parametrize(
    ("style", "wanted"),
    [
        (None, ("s3.localhost", "/loras")),
        ("path", ("s3.localhost", "/loras")),
        ("virtual", ("loras.s3.localhost", "/")),
    ],
)
@pytest.mark.parametrize("scheme", ["s3", "s3a"])
async def test_the_bucket_is_named_where_the_config_says(
    scheme: str, style: str | None, wanted: tuple[str, str], names: None
) -> None:
    assert await asked(f"{scheme}://loras/all", addressing_style=style) == wanted


async def test_the_aws_configuration_says_it_where_ours_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: None
) -> None:
    (tmp_path / "config").write_text("[default]\ns3 =\n  addressing_style = virtual\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    assert await asked("s3://loras/all") == ("loras.s3.localhost", "/")
    assert await asked("s3://loras/all", addressing_style="path") == ("s3.localhost", "/loras")


async def test_an_access_point_is_asked_by_its_own_host(names: None) -> None:
    host, path = await asked(f"s3://{ARN}/all")
    assert (host, path) == ("ours-123456789012.s3.localhost", "/")
