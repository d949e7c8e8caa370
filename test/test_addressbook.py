"""What is remembered of where members were reached, how little anybody can do to that memory, and the way back that it is."""

import asyncio
import contextlib
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hosts import Lab, require
from test_change import meet, start

from solyd_swarm.core.keys import derive_topic_key
from solyd_swarm.discovery import addressbook
from solyd_swarm.discovery.addressbook import AddressBookSource
from solyd_swarm.discovery.source import Candidate, Endpoint
from solyd_swarm.store.addresses import MAX_ADDRESSES, MAX_NODES, MAX_PER_HOST, MAX_STATE, AddressBook
from solyd_swarm.store.identity import Identity

ROOM, ATTIC = derive_topic_key("room"), derive_topic_key("attic")
PATIENCE = 10.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "identity"


@contextlib.contextmanager
def life(path: Path, now: Callable[[], float] = lambda: 1.8e9) -> Iterator[AddressBook]:
    """One run of a program that uses the file; saves at its end."""
    identity = Identity.open(path, now_us=lambda: 1)
    try:
        book = AddressBook(identity, now=now)
        for topic_key in (ROOM, ATTIC):
            book.load(topic_key)
        yield book
        book.save()
    finally:
        identity.close()


# ---- the book


def test_what_worked_survives_a_restart_and_comes_first(path: Path) -> None:
    with life(path) as book:
        book.heard(ROOM, "192.0.2.1", 1)
        book.succeeded(ROOM, "192.0.2.2", 2)
        book.succeeded(ROOM, "fe80::1%eth0", 3)
        book.succeeded(ATTIC, "192.0.2.4", 4)
    with life(path) as book:
        assert book.best(ROOM) == [("fe80::1%eth0", 3), ("192.0.2.2", 2), ("192.0.2.1", 1)]
        assert book.best(ATTIC) == [("192.0.2.4", 4)]
        book.succeeded(ROOM, "192.0.2.2", 2)
    with life(path) as book:
        assert book.best(ROOM)[0] == ("192.0.2.2", 2)


def test_failures_count_until_it_works_again(path: Path) -> None:
    with life(path) as book:
        book.succeeded(ROOM, "192.0.2.1", 1)
        book.succeeded(ROOM, "192.0.2.2", 2)
        book.failed(ROOM, "192.0.2.2", 2)
    with life(path) as book:
        assert book.best(ROOM) == [("192.0.2.1", 1), ("192.0.2.2", 2)]
        book.succeeded(ROOM, "192.0.2.2", 2)
        assert book.best(ROOM) == [("192.0.2.2", 2), ("192.0.2.1", 1)]


def test_an_outage_of_our_own_costs_no_address(path: Path) -> None:
    with life(path) as book:
        for number in range(MAX_ADDRESSES):
            book.succeeded(ROOM, f"192.0.2.{number}", 1)
        before = book.best(ROOM)
        for _ in range(100):
            for address in before:
                book.failed(ROOM, *address)
    with life(path) as book:
        assert book.best(ROOM) == before


def test_whoever_feeds_addresses_evicts_none_that_worked(path: Path) -> None:
    with life(path) as book:
        for number in range(MAX_ADDRESSES - 1):
            book.succeeded(ROOM, f"192.0.2.{number}", 1)
        good = set(book.best(ROOM))
        for number in range(1000):
            book.heard(ROOM, f"198.51.{number // 250}.{number % 250}", 1)
    with life(path) as book:
        assert good <= set(book.best(ROOM))
        assert len(book.best(ROOM)) == MAX_ADDRESSES


def test_one_host_evicts_its_own_addresses_only(path: Path) -> None:
    with life(path) as book:
        book.succeeded(ROOM, "192.0.2.1", 1)
        for port in range(1, 500):
            book.succeeded(ROOM, "198.51.100.1", port)
            book.succeeded(ROOM, f"2606:4700::{port:x}", 1)
        best = book.best(ROOM)
        assert ("192.0.2.1", 1) in best
        assert len(best) == 1 + 2 * MAX_PER_HOST


def test_addresses_that_worked_in_several_lives_stay(path: Path) -> None:
    for _ in range(3):
        with life(path) as book:
            book.succeeded(ROOM, "192.0.2.1", 1)
            book.succeeded(ROOM, "192.0.2.1", 1)
    with life(path) as book:
        for number in range(2 * MAX_ADDRESSES):
            book.succeeded(ROOM, f"198.51.100.{number}", 1)
        assert book.best(ROOM)[0] == ("192.0.2.1", 1)


@pytest.mark.parametrize("clock", [-1e12, 0.0, 1e30])
def test_a_wrong_clock_changes_no_order(path: Path, clock: float) -> None:
    with life(path, lambda: clock) as book:
        book.succeeded(ROOM, "192.0.2.1", 1)
    with life(path) as book:
        book.succeeded(ROOM, "192.0.2.2", 2)
        assert book.best(ROOM) == [("192.0.2.2", 2), ("192.0.2.1", 1)]


def test_the_bounds_hold_on_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr("solyd_swarm.store.addresses.MAX_TOPICS", 5)
    rng = random.Random(seed)
    topics = [derive_topic_key(str(number)) for number in range(9)]
    for _ in range(3):
        with life(path) as book:
            for topic in topics:
                for _ in range(100):
                    method = rng.choice([book.succeeded, book.heard, book.failed])
                    method(topic, f"192.0.{rng.randrange(9)}.{rng.randrange(99)}", rng.randrange(1, 9))
                book.save()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        counts = [count for (count,) in connection.execute("SELECT count(*) FROM address GROUP BY tag")]
        assert len(counts) == 5
        assert max(counts) <= MAX_ADDRESSES


def test_two_processes_share_a_file(path: Path) -> None:
    with life(path) as one, life(path) as other:
        one.succeeded(ROOM, "192.0.2.1", 1)
        other.succeeded(ROOM, "192.0.2.2", 2)
    with life(path) as book:
        assert set(book.best(ROOM)) == {("192.0.2.1", 1), ("192.0.2.2", 2)}


def test_the_file_says_nothing_of_the_topic(path: Path) -> None:
    with life(path) as book:
        book.succeeded(ROOM, "192.0.2.1", 1)
    data = path.read_bytes()
    assert b"192.0.2.1" in data
    assert b"room" not in data
    assert ROOM not in data


def test_nodes_and_states(path: Path) -> None:
    with life(path) as book:
        assert book.nodes() == []
        assert book.state("mainline") is None
        book.save_nodes([("192.0.2.9", 9), ("no literal", 1), ("192.0.2.8", 8), ("192.0.2.7", 0), ("192.0.2.9", 9)])
        book.save_state("mainline", b"\0state")
        with pytest.raises(ValueError, match="larger"):
            book.save_state("mainline", bytes(MAX_STATE + 1))
    with life(path) as book:
        assert book.nodes() == [("192.0.2.9", 9), ("192.0.2.8", 8)]
        assert book.state("mainline") == b"\0state"
        book.save_nodes(("192.0.2.1", port) for port in range(1, 2 * MAX_NODES))
        assert len(book.nodes()) == MAX_NODES


def test_without_a_file_nothing_outlives_the_book() -> None:
    book = AddressBook(None)
    book.succeeded(ROOM, "192.0.2.1", 1)
    book.load(ROOM)
    book.save()
    book.save_nodes([("192.0.2.1", 1)])
    book.save_state("mainline", b"state")
    assert not book.is_changed
    assert not book.outlives
    assert book.best(ROOM) == [("192.0.2.1", 1)]
    assert book.nodes() == []
    assert book.state("mainline") is None


# ---- a disk that refuses


def test_an_identity_of_an_earlier_version_gets_the_tables(path: Path) -> None:
    Identity.open(path, now_us=lambda: 1).close()
    with life(path) as book:
        book.succeeded(ROOM, "192.0.2.1", 1)
    with life(path) as book:
        assert book.best(ROOM) == [("192.0.2.1", 1)]


@pytest.mark.parametrize("trouble", ["PRAGMA max_page_count = 1", "PRAGMA query_only = ON"])
def test_a_full_or_read_only_disk_is_told_once_and_tried_again(path: Path, caplog: pytest.LogCaptureFixture, trouble: str) -> None:
    with life(path) as book:
        book.succeeded(ROOM, "192.0.2.1", 1)
        book.save()
        identity = book._identity
        assert identity is not None
        with identity.access() as connection:
            connection.execute(trouble)
        for number in range(2, MAX_ADDRESSES):
            book.succeeded(ROOM, f"2001:db8::{number}:0:0:0:{number}", number)
        for number in range(200):  # more than the pages that the file has
            book.succeeded(derive_topic_key(str(number)), "192.0.2.1", 1)
        book.save()
        book.save()
        assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1
        assert book.is_changed
        with identity.access() as connection:
            connection.execute("PRAGMA query_only = OFF")
            connection.execute("PRAGMA max_page_count = 100000")
        book.save()
        assert not book.is_changed
    with life(path) as book:
        assert len(book.best(ROOM)) == MAX_ADDRESSES - 1


def test_a_locked_file_is_waited_for_and_then_done_without(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with life(path) as book:
        book.succeeded(ROOM, "192.0.2.1", 1)
        book.save()
    with life(path) as book, contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        identity = book._identity
        assert identity is not None
        with identity.access() as connection:
            connection.execute("PRAGMA busy_timeout = 50")
        other.execute("BEGIN EXCLUSIVE")
        book.load(ROOM)
        book.succeeded(ROOM, "192.0.2.2", 2)
        book.save()
        assert book.nodes() == []
        other.execute("ROLLBACK")
        assert "cannot be" in caplog.text
    with life(path) as book:
        assert set(book.best(ROOM)) == {("192.0.2.1", 1), ("192.0.2.2", 2)}


def test_rows_of_another_mind_are_skipped(path: Path) -> None:
    with life(path) as book:
        book.succeeded(ROOM, "192.0.2.1", 1)
        book.save_nodes([("192.0.2.1", 1)])
        book.save_state("mainline", b"state")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        (tag,) = connection.execute("SELECT tag FROM address").fetchone()
        for row in [(tag, "name", 1, 1, 0, 1, 0, ""), (tag, "192.0.2.2", 99_999, 1, 0, 1, 0, ""), (tag, "192.0.2.3", 1, "x", 0, -1, 0, "")]:
            connection.execute("INSERT INTO address VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        connection.execute("INSERT INTO node VALUES (7, x'00', 'port')")
        connection.execute("UPDATE state SET data = 5")
    with life(path) as book:
        assert book.best(ROOM) == [("192.0.2.1", 1)]
        assert book.nodes() == [("192.0.2.1", 1)]
        assert book.state("mainline") is None


def test_a_damaged_table_is_done_without(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with life(path) as book:
        book.succeeded(ROOM, "192.0.2.1", 1)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("DROP TABLE address")
        connection.execute("CREATE TABLE address (something INTEGER)")
    with life(path) as book:
        assert book.best(ROOM) == []
        book.succeeded(ROOM, "192.0.2.1", 1)
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1


# ---- the source


class Found:
    def __init__(self) -> None:
        self.addresses: list[tuple[str, int]] = []
        self.event = asyncio.Event()

    def __call__(self, topic_key: bytes, candidate: Candidate) -> None:
        assert topic_key == ROOM
        assert (candidate.source, candidate.instance, candidate.learned_from) == ("addresses", None, None)
        self.addresses += [(address.host, address.port) for address in candidate.addresses]
        self.event.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                self.event.clear()
                await self.event.wait()


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"GAP": 0.05, "CALM": 0.05, "PATIENCE": 0.1, "REPORT_INTERVAL": 30.0, "SAVE_INTERVAL": 0.05}.items():
        monkeypatch.setattr(addressbook, name, seconds)


def fill(book: AddressBook, count: int) -> list[tuple[str, int]]:
    for number in range(count):
        book.succeeded(ROOM, f"192.0.2.{number}", 1)
    return book.best(ROOM)


async def test_the_best_come_first_and_all_while_nobody_is_reached(path: Path, hurry: None) -> None:
    with life(path) as book:
        best = fill(book, 20)
    with life(path) as book:
        found = Found()
        source = AddressBookSource(book)
        source.join(ROOM)
        await source.start(Endpoint(1, bytes(32)), found)
        await found.until(lambda: len(found.addresses) >= 20)
        assert found.addresses[:20] == best
        await source.close()


async def test_once_somebody_is_reached_there_is_no_haste(path: Path, hurry: None) -> None:
    with life(path) as book:
        best = fill(book, 20)
        found = Found()
        source = AddressBookSource(book)
        await source.start(Endpoint(1, bytes(32)), found)
        source.join(ROOM)
        await found.until(lambda: bool(found.addresses))
        source.met(ROOM, "192.0.2.77", 5, True)
        await asyncio.sleep(0.3)
        assert found.addresses == best[: addressbook.BATCH]
        source.refresh(ROOM)  # alone again: from the best on
        await found.until(lambda: len(found.addresses) > addressbook.BATCH)
        assert found.addresses[addressbook.BATCH] == ("192.0.2.77", 5)
        await source.close()


async def test_what_is_reported_and_not_reached_has_failed(path: Path, hurry: None) -> None:
    with life(path) as book:
        fill(book, 3)
        reached = {("192.0.2.0", 1)}
        found = Found()
        source = AddressBookSource(book, lambda host, port: (host, port) in reached)
        await source.start(Endpoint(1, bytes(32)), found)
        source.join(ROOM)
        await found.until(lambda: len(found.addresses) == 2)
        source.met(ROOM, "192.0.2.1", 1, True)
        async with asyncio.timeout(PATIENCE):
            while book.best(ROOM)[-1] != ("192.0.2.2", 1):
                await asyncio.sleep(0.01)
        assert ("192.0.2.0", 1) not in found.addresses
        await source.close()


async def test_it_is_saved_now_and_then_and_at_the_end(path: Path, hurry: None) -> None:
    with life(path) as book:
        source = AddressBookSource(book)
        await source.start(Endpoint(1, bytes(32)), Found())
        source.join(ROOM)
        source.met(ROOM, "192.0.2.1", 1, True)
        source.met(ROOM, "192.0.2.2", 0, False)
        source.met(ATTIC, "192.0.2.3", 3, True)  # not joined
        async with asyncio.timeout(PATIENCE):
            while book.is_changed:
                await asyncio.sleep(0.01)
        source.met(ROOM, "192.0.2.4", 4, False)
        await source.close()
        assert not book.is_changed
    with life(path) as book:
        assert book.best(ROOM) == [("192.0.2.1", 1), ("192.0.2.4", 4)]
        assert book.best(ATTIC) == []


async def test_nodes_and_states_are_kept_now_and_then_and_at_the_end(path: Path, hurry: None) -> None:
    nodes, states = [("192.0.2.1", 1)], {"mainline": b"1", "none": b"", "large": bytes(MAX_STATE + 1)}
    with life(path) as book:
        source = AddressBookSource(book, nodes=lambda: nodes, states=lambda: states)
        await source.start(Endpoint(1, bytes(32)), Found())
        async with asyncio.timeout(PATIENCE):
            while book.nodes() != nodes or book.state("mainline") != b"1":
                await asyncio.sleep(0.01)
        nodes, states = [], {"mainline": b"2"}  # none known is no reason to forget those that were
        await source.close()
    with life(path) as book:
        assert book.nodes() == [("192.0.2.1", 1)]
        assert book.state("mainline") == b"2"
        assert book.state("none") is None
        assert book.state("large") is None


async def test_a_disk_that_hangs_holds_nothing_up(path: Path, hurry: None, caplog: pytest.LogCaptureFixture) -> None:
    with life(path) as book:
        source = AddressBookSource(book)
        await source.start(Endpoint(1, bytes(32)), Found())
        source.join(ROOM)
        released = threading.Event()
        book.save = released.wait  # type: ignore[assignment]
        source.met(ROOM, "192.0.2.1", 1, True)
        begun = time.monotonic()
        await source.close()
        assert time.monotonic() - begun < 1.0
        assert "too slow" in caplog.text
        released.set()
        del book.save


# ---- the way back


def test_a_member_finds_back_when_bootstraps_and_dht_are_gone(tmp_path: Path) -> None:
    require()
    with Lab() as lab, contextlib.ExitStack() as stack:
        first, second, third = lab.lan(3)
        quiet: dict[str, object] = {"mdns": False, "dht": False}
        mine = {**quiet, "bootstrap": "10.0.0.1:7000", "identity": str(tmp_path / "identity")}
        with contextlib.ExitStack() as doomed:
            bootstrap = start(doomed, first, listen=["0.0.0.0", 7000], **quiet)
            other = start(stack, second, bootstrap="10.0.0.1:7000", listen=["0.0.0.0", 0], **quiet)
            me = start(stack, third, **mine)
            meet(bootstrap, other, me)
            me.end()
        begun = time.monotonic()
        again = start(stack, third, **mine)
        assert meet(other, again, word="again") - begun < PATIENCE
        other.end()
        again.end()
