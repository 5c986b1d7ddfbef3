"""Shell. The disk caches of two hosts over a real link. The peer is wrong in one way each, and
speaks the protocol from here.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.chaos.link_proxy import DATA, DOWN, UP, LinkProxy, link_proxy
from shared.adapters.checks import AdapterFacts
from shared.adapters.identity import AdapterRef, StoredAdapter
from shared.errors import InvalidAdapter, LinkError
from shared.link import messages
from shared.link.peer_messages import (
    PeerAnswer,
    Piece,
    PieceNotHere,
    PieceNotYet,
    PieceRequest,
    decode_peer_question,
)
from shared.link.sockets import RouterSocket, open_context
from shared.stores import transfer as transfer_module
from shared.stores.transfer import TransferRetries
from tests.store_servers import LocalPlace
from tests.unit.worker.disk.test_cache import WatchedStore
from tests.unit.worker.disk.whole_check import WholeCheck
from worker.disk.cache import Cached, DiskCache
from worker.peers import peer_rules
from worker.peers.client import Peers
from worker.peers.server import open_peer_server

PART = 1 << 20
WEIGHTS = "adapter_model.safetensors"
SECRET = "the secret of these tests"
Answers = Callable[[PieceRequest], PeerAnswer | bytes | None]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small parts, and time limits that a test can wait for."""
    monkeypatch.setattr(transfer_module, "PART_BYTES", PART)
    monkeypatch.setattr(peer_rules, "SILENCE_S", 1.0)
    monkeypatch.setattr(peer_rules, "HOLD_S", 0.2)


def _check(folder: Path) -> AdapterFacts:
    if (folder / WEIGHTS).read_bytes().startswith(b"bad"):
        raise InvalidAdapter("It is bad.", "nonfinite")
    return AdapterFacts(8, 0, ())


check = WholeCheck(_check)


@dataclass
class Site:
    """A store, a host that gives files (`giver`), and a host that asks for them (`asker`)."""

    folder: Path
    place: LocalPlace

    def cache(self, host: str, stall_s: float = 5.0) -> DiskCache:
        return DiskCache(self.folder / host, 0, TransferRetries(stall_s, 1))

    def store(self) -> WatchedStore:
        return WatchedStore(str(self.place.folder))

    async def put(self, name: str, weights: bytes) -> tuple[AdapterRef, StoredAdapter]:
        self.place.put(f"{name}/adapter_config.json", b'{"r": 8}')
        self.place.put(f"{name}/{WEIGHTS}", weights)
        stored = await self.store().find(name)
        assert stored is not None
        return AdapterRef("base", name, stored.digest), stored


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path, LocalPlace(tmp_path / "store"))


@asynccontextmanager
async def serving(cache: DiskCache, secret: str | None = SECRET) -> AsyncIterator[str]:
    context = open_context()
    try:
        async with open_peer_server(
            context,
            "tcp://127.0.0.1:0",
            cache,
            secret=secret,
            insecure=False,
            named=None,
            gateway="ipc://x",
        ) as endpoint:
            yield endpoint
    finally:
        context.destroy(linger=0)


@asynccontextmanager
async def asking(secret: str | None = SECRET, stall_s: float = 5.0) -> AsyncIterator[Peers]:
    context = open_context()
    peers = Peers(context, "asker", 1, secret, TransferRetries(stall_s, 1))
    try:
        yield peers
    finally:
        peers.close()
        context.destroy(linger=0)


@asynccontextmanager
async def false_peer(answers: Answers) -> AsyncIterator[str]:
    """A process of the cluster, with its secret, that answers what the test wants."""
    context = open_context()

    def on_message(peer: bytes, data: bytes) -> None:
        answer = answers(decode_peer_question(data))
        if answer is not None:
            server.send(peer, answer if isinstance(answer, bytes) else messages.encode(answer))

    server = RouterSocket(context, "tcp://127.0.0.1:0", on_message, secret=SECRET)
    try:
        yield server.endpoint
    finally:
        server.close()
        context.destroy(linger=0)


async def fetched(
    site: Site,
    ref: AdapterRef,
    stored: StoredAdapter,
    store: WatchedStore,
    peers: Peers,
    *endpoints: str,
) -> Cached:
    async with asyncio.timeout(30):
        return await site.cache("asker").fetch(
            ref, stored, store, check, peers.sources(ref, endpoints)
        )


async def test_what_a_peer_has_is_not_asked_of_the_store(site: Site) -> None:
    weights = os.urandom(5 * PART + 77)
    ref, stored = await site.put("a", weights)
    giver, store = site.cache("giver"), site.store()
    had = await giver.fetch(ref, stored, site.store(), check)
    async with serving(giver) as endpoint, asking() as peers:
        got = await fetched(site, ref, stored, store, peers, endpoint)
    assert store.asked == [] and got.peer_bytes == stored.size_bytes and got.content == had.content
    assert (got.folder / WEIGHTS).read_bytes() == weights


async def test_parts_are_given_while_the_giver_still_fetches_the_others(site: Site) -> None:
    ref, stored = await site.put("a", os.urandom(8 * PART))
    giver, slow, store = site.cache("giver", stall_s=30.0), site.store(), site.store()
    slow.limit = 5
    async with serving(giver) as endpoint, asking() as peers, asyncio.TaskGroup() as group:
        first = group.create_task(giver.fetch(ref, stored, slow, check))
        await slow.at_limit.wait()
        second = group.create_task(fetched(site, ref, stored, store, peers, endpoint))
        async with asyncio.timeout(60):
            while (
                not (journal := next((site.folder / "asker" / "partial").glob("*/journal"), None))
                or journal.read_bytes().count(b"\n") < 3
            ):
                await asyncio.sleep(0.001)
        assert not first.done() and not second.done()
        slow.limit = 10**9
        slow.go.set()
        await second
    assert store.asked == [] and second.result().content == first.result().content


async def test_an_asker_that_comes_a_moment_before_the_giver_has_begun_waits_for_it(
    site: Site,
) -> None:
    ref, stored = await site.put("a", os.urandom(2 * PART))
    giver, store = site.cache("giver"), site.store()
    async with serving(giver) as endpoint, asking() as peers, asyncio.TaskGroup() as group:
        second = group.create_task(fetched(site, ref, stored, store, peers, endpoint))
        await asyncio.sleep(0.05)  # within GRACE_S
        group.create_task(giver.fetch(ref, stored, site.store(), check))
        await second
    assert store.asked == []


async def test_a_giver_whose_download_stands_still_is_not_waited_for(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_rules, "IDLE_S", 1.0)
    ref, stored = await site.put("a", os.urandom(4 * PART))
    giver, stuck, store = site.cache("giver", stall_s=60.0), site.store(), site.store()
    stuck.limit = 0
    first = asyncio.create_task(giver.fetch(ref, stored, stuck, check))
    await stuck.at_limit.wait()
    async with serving(giver) as endpoint, asking() as peers:
        got = await fetched(site, ref, stored, store, peers, endpoint)
    assert got.peer_bytes == 0 and len(store.asked) == 5 and not first.done()
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)


async def test_two_that_wait_for_each_other_do_not_wait_for_ever(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_rules, "IDLE_S", 1.0)
    ref, stored = await site.put("a", os.urandom(3 * PART))
    one, other = site.cache("one"), site.cache("other")
    async with (
        serving(one) as at_one,
        serving(other) as at_other,
        asking(stall_s=60.0) as peers,
        asyncio.timeout(20),
    ):
        await asyncio.gather(
            one.fetch(ref, stored, site.store(), check, peers.sources(ref, [at_other])),
            other.fetch(ref, stored, site.store(), check, peers.sources(ref, [at_one])),
        )


async def test_bytes_that_a_peer_has_on_a_broken_disk_are_found_out_and_the_next_peer_goes_on(
    site: Site,
) -> None:
    weights = os.urandom(6 * PART)
    ref, stored = await site.put("a", weights)
    broken, sound, store = site.cache("broken"), site.cache("sound"), site.store()
    path = (await broken.fetch(ref, stored, site.store(), check)).folder / WEIGHTS
    await sound.fetch(ref, stored, site.store(), check)
    with path.open("r+b") as handle:
        handle.seek(5 * PART + 9)
        handle.write(bytes([weights[5 * PART + 9] ^ 1]))
    async with serving(broken) as first, serving(sound) as second, asking() as peers:
        got = await fetched(site, ref, stored, store, peers, first, second)
    assert (got.folder / WEIGHTS).read_bytes() == weights and store.asked == []


ZEROS = hashlib.sha256(bytes(PART)).hexdigest()
LIES: dict[str, Answers] = {
    "bytes that are not those of its hash": lambda w: Piece(
        w.number, "0" * 64, bytes(w.size_bytes)
    ),
    "more bytes than asked for": lambda w: Piece(w.number, ZEROS, bytes(w.size_bytes + 1)),
    "fewer bytes than asked for": lambda w: Piece(w.number, ZEROS, b""),
    "a message beyond the bound": lambda w: bytes(4 << 20),
    "what does not decode": lambda w: b"\xc1",
    "the answer to another question": lambda w: PieceNotHere(w.number + 1000),
    "nothing": lambda w: None,
    "that it has nothing": lambda w: PieceNotHere(w.number),
    "that it waits for one that stands still": lambda w: PieceNotYet(w.number, 1e9),
    "times that are none": lambda w: PieceNotYet(w.number, float("nan")),
}
HONEST = {"that it has nothing", "that it waits for one that stands still", "times that are none"}


@pytest.mark.parametrize("lie", LIES)
async def test_a_false_peer_costs_seconds_and_nothing_of_it_is_kept(site: Site, lie: str) -> None:
    weights = os.urandom(3 * PART)
    ref, stored = await site.put("a", weights)
    store, start = site.store(), time.monotonic()
    async with false_peer(LIES[lie]) as endpoint, asking() as peers:
        got = await fetched(site, ref, stored, store, peers, endpoint)
        again = peers.sources(ref, [endpoint])
    assert (
        (got.folder / WEIGHTS).read_bytes() == weights
        and got.peer_bytes == 0
        and len(store.asked) == 4
    )
    assert time.monotonic() - start < 10
    assert bool(again) == (lie in HONEST), (
        "who fails is left alone, who says that it has nothing is not"
    )


Harm = Callable[[LinkProxy], object]
LINK_FAULTS: dict[str, Harm] = {
    "stalls up": lambda proxy: proxy.stall([DATA], [UP]),
    "stalls down": lambda proxy: proxy.stall([DATA], [DOWN]),
    "stalls": lambda proxy: proxy.stall([DATA]),
    "is reset": lambda proxy: proxy.reset(DATA),
    "is cut in a request": lambda proxy: proxy.cut_after_bytes.update({(DATA, UP): 33}),
    "is cut in a piece": lambda proxy: proxy.cut_after_bytes.update({(DATA, DOWN): 70_001}),
}


async def test_a_link_between_hosts_that_stalls_or_is_cut_costs_a_second_and_no_byte(
    site: Site,
) -> None:
    giver, kept = site.cache("giver"), list[int]()

    async def one(name: str, harm: Harm, port: int) -> None:
        """The link fails once a part has come. What came by it is kept."""
        weights = os.urandom(6 * PART)
        ref, stored = await site.put(name.replace(" ", "-"), weights)
        await giver.fetch(ref, stored, site.store(), check)
        store, asker = site.store(), site.cache(f"asker that {name}")
        journals = site.folder / f"asker that {name}" / "partial"
        async with link_proxy(port, port) as proxy, asking() as peers:
            proxy.delay_s[DATA, DOWN] = 0.02
            sources = peers.sources(ref, [f"tcp://127.0.0.1:{proxy.mine[DATA]}"])
            fetching = asyncio.create_task(asker.fetch(ref, stored, store, check, sources))
            while not any(j.read_bytes().count(b"\n") > 1 for j in journals.glob("*/journal")):
                await asyncio.sleep(0.001)
            harm(proxy)
            got = await fetching
        assert (got.folder / WEIGHTS).read_bytes() == weights, name
        assert got.peer_bytes < stored.size_bytes, name
        kept.append(got.peer_bytes)

    async with serving(giver) as endpoint, asyncio.timeout(30), asyncio.TaskGroup() as all_faults:
        port = int(endpoint.rpartition(":")[2])
        for name, harm in LINK_FAULTS.items():
            all_faults.create_task(one(name, harm, port))
    assert any(kept)


async def test_a_peer_is_given_up_in_the_turn_in_which_its_answers_are(site: Site) -> None:
    ref, _ = await site.put("a", b"x")
    async with asking() as peers:
        answer = peers.connection("tcp://127.0.0.1:9").ask(ref, WEIGHTS, 0, 1)
        answer.cancel()
        peers.give_up("tcp://127.0.0.1:9")
        assert not peers.sources(ref, ["tcp://127.0.0.1:9"])


async def test_a_peer_that_always_says_soon_is_waited_for_as_long_as_a_store_would_be(
    site: Site,
) -> None:
    ref, stored = await site.put("a", os.urandom(PART))
    store = site.store()

    async def soon() -> None:
        async with (
            false_peer(lambda w: PieceNotYet(w.number)) as endpoint,
            asking(stall_s=0.5) as peers,
        ):
            await fetched(site, ref, stored, store, peers, endpoint)

    await soon()
    assert len(store.asked) == 2


async def test_a_whole_lie_that_is_no_valid_adapter_is_fetched_from_the_store_instead(
    site: Site,
) -> None:
    weights = os.urandom(PART)
    ref, stored = await site.put("a", weights)
    lie = b"bad" + bytes(PART - 3)

    def answer(want: PieceRequest) -> PeerAnswer:
        data = b'{"r": 8}' if want.path != WEIGHTS else lie
        return Piece(
            want.number, hashlib.sha256(data).hexdigest(), data[want.offset :][: want.size_bytes]
        )

    store = site.store()
    async with false_peer(answer) as endpoint, asking() as peers:
        got = await fetched(site, ref, stored, store, peers, endpoint)
    assert (
        (got.folder / WEIGHTS).read_bytes() == weights
        and got.peer_bytes == 0
        and len(store.asked) == 2
    )


@pytest.mark.parametrize("secret", ["another secret than theirs", None])
async def test_without_the_secret_nobody_gets_a_byte(site: Site, secret: str | None) -> None:
    ref, stored = await site.put("a", os.urandom(PART))
    giver, store = site.cache("giver"), site.store()
    await giver.fetch(ref, stored, site.store(), check)
    async with serving(giver) as endpoint, asking(secret) as peers:
        got = await fetched(site, ref, stored, store, peers, endpoint)
        assert got.peer_bytes == 0 and len(store.asked) == 2
        assert peers.sources(ref, [endpoint]) == []


async def test_beyond_this_machine_nothing_is_given_without_a_secret(site: Site) -> None:
    context = open_context()
    with pytest.raises(LinkError, match="secret"):
        async with open_peer_server(
            context,
            "tcp://0.0.0.0:0",
            site.cache("giver"),
            secret=None,
            insecure=False,
            named=None,
            gateway="ipc://x",
        ):
            raise AssertionError("it serves everybody")
    context.destroy(linger=0)


@pytest.mark.parametrize(
    "path", ["../manifest", "/etc/passwd", "adapter_config.json/../../manifest", "", "link"]
)
async def test_a_want_for_anything_but_a_listed_file_gets_nothing(site: Site, path: str) -> None:
    ref, stored = await site.put("a", os.urandom(100))
    giver = site.cache("giver")
    folder = (await giver.fetch(ref, stored, site.store(), check)).folder
    (folder / "link").symlink_to("/etc/passwd")
    async with serving(giver) as endpoint, asking() as peers, asyncio.timeout(60):
        connection = peers.connection(endpoint)
        assert isinstance(await connection.ask(ref, path, 0, 10), PieceNotHere)
        assert isinstance(await connection.ask(ref, WEIGHTS, 0, 100), Piece)
        for offset, size_bytes in (
            (-1, 10),
            (0, 0),
            (0, -5),
            (90, 11),
            (1 << 40, 10),
            (0, peer_rules.PIECE_BYTES + 1),
        ):
            assert isinstance(await connection.ask(ref, WEIGHTS, offset, size_bytes), PieceNotHere)


async def test_the_next_free_port_is_taken_where_the_first_one_is_in_use(site: Site) -> None:
    async with serving(site.cache("giver")) as first:
        port = int(first.rpartition(":")[2])
        context = open_context()
        async with open_peer_server(
            context,
            first,
            site.cache("giver"),
            secret=SECRET,
            insecure=False,
            named="worker.internal",
            gateway="ipc://x",
        ) as second:
            host, _, other = second.rpartition(":")
            assert host == "tcp://worker.internal" and port < int(other) < port + 64
        context.destroy(linger=0)
