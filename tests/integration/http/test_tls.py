"""Shell. The listener's certificate, on a real gateway: served, and replaced while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest

from gateway.http.tls import open_certificate
from shared.config.gateway import TLSConfig
from shared.errors import ConfigError
from tests.harness import cluster, sim_config
from tests.processes import no_descriptors_left


def make_certificate(folder: Path, name: str) -> None:
    what = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run([*what, "-subj", f"/CN={name}", *files], check=True, capture_output=True)


async def certificate_of(port: int) -> bytes:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        found = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        assert isinstance(found, bytes)
        return found
    finally:
        writer.close()


async def test_a_new_certificate_is_served_without_a_restart(tmp_path: Path) -> None:
    make_certificate(tmp_path, "first")
    (tmp_path / "adapters").mkdir()
    tls = {"certificate": str(tmp_path / "cert.pem"), "key": str(tmp_path / "key.pem")}
    async with cluster(sim_config(tmp_path / "adapters", tls=tls), tmp_path) as c:
        port = urlsplit(c.url).port
        assert port is not None
        first = await certificate_of(port)
        make_certificate(tmp_path, "second")
        async with asyncio.timeout(20):
            while await certificate_of(port) == first:
                await asyncio.sleep(0.1)


async def test_connections_that_never_shake_hands_make_room_for_those_that_do(
    tmp_path: Path,
) -> None:
    make_certificate(tmp_path, "first")
    (tmp_path / "adapters").mkdir()
    tls = {"certificate": str(tmp_path / "cert.pem"), "key": str(tmp_path / "key.pem")}
    http = {"max_connections": 4, "max_connections_per_client": 100, "header_timeout_s": 60}
    async with cluster(sim_config(tmp_path / "adapters", tls=tls, http=http), tmp_path) as c:
        port = urlsplit(c.url).port
        assert port is not None
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(6)]
        async with asyncio.timeout(30):
            assert await certificate_of(port)
            for reader, _ in silent[:3]:
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
        connector = aiohttp.TCPConnector(ssl=False)
        async with aiohttp.ClientSession(connector=connector) as http_client:
            for _ in range(3):
                async with http_client.get(f"https://127.0.0.1:{port}/health") as answer:
                    assert answer.status == 200
        for _, writer in silent:
            writer.close()


def test_files_that_are_no_pair_are_an_error_at_the_start_and_change_nothing_later(
    tmp_path: Path,
) -> None:
    make_certificate(tmp_path, "first")
    files = TLSConfig(certificate=str(tmp_path / "cert.pem"), key=str(tmp_path / "key.pem"))
    certificate = open_certificate(files)
    assert certificate is not None
    (tmp_path / "key.pem").write_text("no key")
    certificate.look()
    with pytest.raises(ConfigError):
        open_certificate(files)


def test_a_certificate_that_could_not_be_opened_is_loaded_once_it_can_be(tmp_path: Path) -> None:
    said: list[str] = []
    make_certificate(tmp_path, "first")
    files = TLSConfig(certificate=str(tmp_path / "cert.pem"), key=str(tmp_path / "key.pem"))
    certificate = open_certificate(files)
    assert certificate is not None
    make_certificate(tmp_path, "second")
    log = logging.getLogger("loraplex.http")
    log.addFilter(lambda record: bool(said.append(record.getMessage())))
    before = log.level
    log.setLevel("INFO")
    try:
        with no_descriptors_left():
            certificate.look()
            certificate.look()
        certificate.look()
    finally:
        log.setLevel(before)
        log.filters.pop()
    assert said == ["certificate not read again", "certificate read again"]
