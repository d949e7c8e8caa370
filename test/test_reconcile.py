"""Negentropy Protocol V1: transcripts of reference peers, properties, a model of the set, hostile messages."""

import json
import random
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from solyd_swarm.core.ordered import INFINITY, ItemSet, encode_varint, fingerprint, make_key, split_key
from solyd_swarm.core.reconcile import MAX_MESSAGE_SIZE, MAX_RANGES, Negentropy, Reconciliation
from solyd_swarm.errors import RemoteProtocolError

Item = tuple[int, bytes]

CASES = json.loads((Path(__file__).parent / "vectors" / "negentropy_v1.json").read_text())["cases"]

NOTHING = fingerprint(0, 0)
SKIP, FINGERPRINT, ID_LIST = b"\x00", b"\x01", b"\x02"
INFINITE = b"\x00\x00"


class SmallBlocks(ItemSet):
    """Splits and merges blocks all the time."""

    _BLOCK = 4


def item_id(n: int) -> bytes:
    return sha256(b"%d" % n).digest()


def naive_fingerprint(ids: Iterable[bytes]) -> bytes:
    ids = list(ids)
    total = sum(int.from_bytes(id, "little") for id in ids) % 2**256
    return sha256(total.to_bytes(32, "little") + encode_varint(len(ids))).digest()[:16]


def items_of(listed: list[list[Any]]) -> list[Item]:
    return [(timestamp, bytes.fromhex(id)) for timestamp, id in listed]


def negentropy(items: Iterable[Item], frame_size_limit: int = 0, rng: random.Random | None = None) -> Negentropy:
    return Negentropy(frame_size_limit, ItemSet(items), rng)


def converse(
    initiator: Negentropy,
    responder: Negentropy,
    between: Callable[[], None] = lambda: None,
    limits: tuple[int, int] = (0, 0),
) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """(have, need, all messages) of a whole conversation."""
    have: list[bytes] = []
    need: list[bytes] = []
    messages = [initiator.initiate()]
    while True:
        between()
        answer = responder.reconcile(messages[-1])
        assert answer.reply is not None
        assert not answer.have
        assert not answer.need
        messages.append(answer.reply)
        between()
        learned = initiator.reconcile(answer.reply)
        have += learned.have
        need += learned.need
        if learned.reply is None:
            break
        messages.append(learned.reply)
        assert len(messages) < 2_000, "the conversation does not end"
    for i, message in enumerate(messages):
        assert len(message) <= (limits[i % 2] or MAX_MESSAGE_SIZE)
    return have, need, messages


def assert_difference(ours: Iterable[Item], theirs: Iterable[Item], have: list[bytes], need: list[bytes]) -> None:
    """Exactly the symmetric difference, each id once."""
    assert sorted(have) == sorted(id for _, id in set(ours) - set(theirs))
    assert sorted(need) == sorted(id for _, id in set(theirs) - set(ours))


# Transcripts of reference peers


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_initiator_says_what_the_reference_says(case: dict[str, Any]) -> None:
    messages = [bytes.fromhex(message) for message in case["messages"]]
    client = negentropy(items_of(case["client"]), case["frame_size_limit"])
    have: list[bytes] = []
    need: list[bytes] = []
    assert client.initiate() == messages[0]
    for received, expected in zip(messages[1::2], [*messages[2::2], None], strict=True):
        learned = client.reconcile(received)
        assert learned.reply == expected
        have += learned.have
        need += learned.need
    assert sorted(id.hex() for id in have) == sorted(case["have"])
    assert sorted(id.hex() for id in need) == sorted(case["need"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_responder_says_what_the_reference_says(case: dict[str, Any]) -> None:
    messages = [bytes.fromhex(message) for message in case["messages"]]
    items = ItemSet(items_of(case["server"]))
    for received, expected in zip(messages[::2], messages[1::2], strict=True):
        server = Negentropy(case["frame_size_limit"], items)  # a new one each time: responders keep no state
        assert server.reconcile(received) == Reconciliation(expected, [], [])


# Properties

TIMESTAMPS = st.one_of(st.integers(0, 3), st.integers(0, 2**40), st.integers(INFINITY - 3, INFINITY - 1))
IDS = st.one_of(
    st.binary(min_size=32, max_size=32),
    st.builds(lambda n: bytes(31) + bytes([n]), st.integers(0, 255)),
    st.builds(lambda n: b"\xff" * 31 + bytes([n]), st.integers(0, 255)),
)
LIMITS = st.one_of(st.just(0), st.integers(4096, 6000))


class Sides:
    """Two sets, shown by their sizes only: the whole would be too long to report."""

    def __init__(self, ours: list[Item], theirs: list[Item]) -> None:
        self.ours = ours
        self.theirs = theirs

    def __repr__(self) -> str:
        return f"Sides({len(self.ours)} items, {len(self.theirs)} items)"


@st.composite
def two_sets(draw: st.DrawFn) -> Sides:
    """A few arbitrary items on each side, and many from a pool of which each side misses some, often a whole stretch."""
    size = draw(st.sampled_from([0, 10, 40, 400, 1500]))
    spread = draw(st.sampled_from([1, 7, 10_000]))
    seeded = random.Random(draw(st.integers(0, 2**32)))
    pool = [(seeded.randrange(spread), seeded.randbytes(32)) for _ in range(size)]
    sides = []
    for _ in range(2):
        missing = draw(st.sampled_from([0.0, 0.01, 0.3]))
        kept = [item for item in pool if seeded.random() >= missing]
        start = draw(st.integers(0, size))
        del kept[start : start + draw(st.sampled_from([0, 0, 50, size]))]
        by_id = {id: (timestamp, id) for timestamp, id in draw(st.lists(st.tuples(TIMESTAMPS, IDS), max_size=20))}
        sides.append(sorted({*kept, *by_id.values()}))
    own = {id for _, id in sides[0]}
    theirs = [(timestamp, id) for timestamp, id in sides[1] if id not in own or (timestamp, id) in set(sides[0])]
    return Sides(sides[0], theirs)


@settings(deadline=None, max_examples=150)
@given(two_sets(), LIMITS, LIMITS, st.one_of(st.none(), st.randoms(use_true_random=False)))
def test_any_two_sets_converge(sides: Sides, our_limit: int, their_limit: int, rng: random.Random | None) -> None:
    ours, theirs = sides.ours, sides.theirs
    have, need, _ = converse(negentropy(ours, our_limit, rng), negentropy(theirs, their_limit), limits=(our_limit, their_limit))
    assert_difference(ours, theirs, have, need)


@settings(deadline=None, max_examples=60)
@given(two_sets(), LIMITS, LIMITS, st.integers(0, 2**32))
def test_sets_that_change_meanwhile(sides: Sides, our_limit: int, their_limit: int, seed: int) -> None:
    """A conversation about moving sets ends, and the next one, about sets at rest, finds all that is left."""
    ours, theirs = ItemSet(sides.ours), ItemSet(sides.theirs)
    seeded = random.Random(f"changes {seed}")  # never the ids of the sets again, under other timestamps

    def change() -> None:
        for items in (ours, theirs):
            for _ in range(seeded.choice([0, 5, 60])):
                items.add(seeded.randrange(10_000), seeded.randbytes(32))
            for timestamp, id in seeded.sample(list(items), min(len(items), seeded.choice([0, 5, 60]))):
                items.remove(timestamp, id)
            if seeded.random() < 0.02:
                for timestamp, id in list(items):
                    items.remove(timestamp, id)

    rounds = 0

    def change_a_while() -> None:
        nonlocal rounds
        rounds += 1
        if rounds < 40:
            change()

    converse(Negentropy(our_limit, ours), Negentropy(their_limit, theirs), change_a_while)
    have, need, _ = converse(Negentropy(our_limit, ours), Negentropy(their_limit, theirs))
    assert_difference(ours, theirs, have, need)


def test_one_set_in_many_conversations() -> None:
    """A member talks to several neighbours over one set, and stores what it learned while the others go on."""
    shared = ItemSet((n, item_id(n)) for n in range(500))
    neighbours = [ItemSet((n, item_id(n)) for n in range(k * 40, 600 + k)) for k in range(3)]
    talks = [(Negentropy(4096, shared), Negentropy(0, items)) for items in neighbours]
    timestamps = {item_id(n): n for n in range(700)}
    queries: list[bytes | None] = [talk[0].initiate() for talk in talks]
    while any(queries):
        for i, (ours, theirs) in enumerate(talks):
            query = queries[i]
            if query is None:
                continue
            reply = theirs.reconcile(query).reply
            assert reply is not None
            learned = ours.reconcile(reply)
            queries[i] = learned.reply
            for id in learned.need:
                shared.add(timestamps[id], id)
            for id in learned.have:
                theirs.add(timestamps[id], id)
    for items in neighbours:
        assert set(items) <= set(shared)
        have, need, _ = converse(Negentropy(0, shared), Negentropy(0, items))
        assert_difference(shared, items, have, need)


def test_many_items_few_differences() -> None:
    common = [(n // 3, item_id(n)) for n in range(20_000)]
    ours = [item for i, item in enumerate(common) if i % 4001]
    theirs = [item for i, item in enumerate(common) if i % 4003]
    have, need, messages = converse(negentropy(ours), negentropy(theirs))
    assert_difference(ours, theirs, have, need)
    assert sum(map(len, messages)) < 32 * len(common) / 20


def test_unlimited_replies_still_end_at_the_message_size() -> None:
    theirs = [(n, item_id(n)) for n in range(40_000)]
    have, need, messages = converse(negentropy([]), negentropy(theirs))
    assert_difference([], theirs, have, need)
    assert len(messages) > 2


def test_random_cuts_in_about_one_of_eight_conversations() -> None:
    items = ItemSet((n, item_id(n)) for n in range(5_000))
    usual = Negentropy(0, items).initiate()
    talk = Negentropy(0, items, random.Random(5))
    first = [talk.initiate() for _ in range(400)]
    jittered = [message for message in first if message != usual]
    assert 25 <= len(jittered) <= 80
    assert len(set(jittered)) == len(jittered)
    for message in jittered:
        assert Negentropy(0, items).reconcile(message).reply == b"\x61"


@pytest.mark.parametrize("count", [32, 33, 47, 48, 100])
def test_random_cuts_leave_no_bucket_empty(count: int) -> None:
    items = ItemSet((n, item_id(n)) for n in range(count))
    for seed in range(40):
        assert NOTHING not in Negentropy(0, items, random.Random(seed)).initiate()


def test_what_does_not_fit_is_not_taken_for_equal_by_a_peer_without_it() -> None:
    """The reference's last fingerprint leaves out a range that did not fit; a peer with nothing there would believe it."""
    theirs = [(n, item_id(n)) for n in range(118)] + [(10_000 + n, item_id(10_000 + n)) for n in range(1_000)]
    query = b"\x61" + encode_varint(10_001) + b"\x00" + ID_LIST + b"\x00" + INFINITE + FINGERPRINT + NOTHING
    reply = negentropy(theirs, 4096).reconcile(query).reply
    assert reply is not None
    assert reply.endswith(INFINITE + FINGERPRINT + naive_fingerprint(id for _, id in theirs[118:]))


def test_no_id_is_reported_twice() -> None:
    """Limited replies make both go over settled ranges again (the reference reports the ids there again)."""
    for seed in range(12):
        seeded = random.Random(seed)
        pool = [(seeded.randrange(10_000), seeded.randbytes(32)) for _ in range(1_500)]
        ours = [item for item in pool if seeded.random() < 0.7]
        theirs = [item for item in pool if seeded.random() < 0.7]
        talk = negentropy(ours)
        for _ in range(2):  # in a new conversation all of it comes again
            have, need, _ = converse(talk, negentropy(theirs, 4096))
            assert_difference(ours, theirs, have, need)


# The set


class ItemSetModel(RuleBasedStateMachine):
    """`ItemSet` against a Python set."""

    def __init__(self) -> None:
        super().__init__()
        self.items = SmallBlocks()
        self.model: set[Item] = set()

    @rule(timestamp=TIMESTAMPS, id=IDS)
    def add(self, timestamp: int, id: bytes) -> None:
        assert self.items.add(timestamp, id) == ((timestamp, id) not in self.model)
        self.model.add((timestamp, id))

    @rule(start=st.integers(0, 50), count=st.integers(1, 30))
    def add_ascending(self, start: int, count: int) -> None:
        for n in range(start, start + count):
            self.add(n, item_id(n))

    @rule(timestamp=TIMESTAMPS, id=IDS)
    def remove(self, timestamp: int, id: bytes) -> None:
        assert self.items.remove(timestamp, id) == ((timestamp, id) in self.model)
        self.model.discard((timestamp, id))

    @precondition(lambda self: self.model)
    @rule(data=st.data(), count=st.integers(1, 20))
    def remove_present(self, data: st.DataObject, count: int) -> None:
        order = sorted(self.model)
        start = data.draw(st.integers(0, len(order) - 1))
        for item in order[start : start + count]:
            self.remove(*item)

    @rule(data=st.data())
    def compare_a_range(self, data: st.DataObject) -> None:
        order = sorted(self.model)
        lower = data.draw(st.integers(0, len(order)))
        upper = data.draw(st.integers(lower, len(order)))
        ids = [id for _, id in order[lower:upper]]
        assert self.items.ids(lower, upper) == ids
        assert self.items.fingerprint(lower, upper) == naive_fingerprint(ids)

    @rule(timestamp=TIMESTAMPS, prefix=st.one_of(IDS, st.binary(max_size=32)))
    def find_a_bound(self, timestamp: int, prefix: bytes) -> None:
        below = sum(1 for item in self.model if item < (timestamp, prefix.ljust(32, b"\0")))
        assert self.items.index(timestamp.to_bytes(8, "big") + prefix) == below

    @invariant()
    def equal(self) -> None:
        order = sorted(self.model)
        assert list(self.items) == order
        assert len(self.items) == len(order)
        assert self.items.summary() == (len(order), naive_fingerprint(id for _, id in order))
        assert all(item in self.items for item in order)
        assert [split_key(self.items.key_at(i)) for i in range(len(order))] == order


TestItemSetModel = ItemSetModel.TestCase
TestItemSetModel.settings = settings(deadline=None, max_examples=60, stateful_step_count=30)


def test_blocks_stay_few() -> None:
    """Removing at random leaves no trail of nearly empty blocks."""
    items = ItemSet()
    order = list(range(20_000))
    random.Random(1).shuffle(order)
    for n in order:
        items.add(n, item_id(n))
    for n in order[:19_000]:
        items.remove(n, item_id(n))
    assert len(items._blocks) < 30
    assert items.summary() == ItemSet((n, item_id(n)) for n in order[19_000:]).summary()


def test_add_and_remove_say_whether_anything_changed() -> None:
    talk = Negentropy()
    assert talk.add(1, item_id(1))
    assert not talk.add(1, item_id(1))
    assert talk.add(2, item_id(1)), "the same id under another timestamp is another item"
    assert len(talk) == 2
    assert (1, item_id(1)) in talk
    assert talk.remove(1, item_id(1))
    assert not talk.remove(1, item_id(1))
    assert (1, item_id(1)) not in talk
    assert talk.items.summary() == (1, naive_fingerprint([item_id(1)]))


@pytest.mark.parametrize("item", [(-1, bytes(32)), (INFINITY, bytes(32)), (2**70, bytes(32)), (0, bytes(31)), (0, bytes(33))])
def test_local_misuse(item: Item) -> None:
    talk = Negentropy()
    with pytest.raises(ValueError):
        talk.add(*item)
    with pytest.raises(ValueError):
        talk.remove(*item)
    assert item not in talk
    assert len(talk) == 0


def test_other_objects_are_not_in_the_set() -> None:
    assert not [thing for thing in (None, 1, bytes(40), (1,), ("1", bytes(32))) if thing in ItemSet([(1, bytes(32))])]


@pytest.mark.parametrize("limit", [-1, 1, 4095])
def test_frame_size_limit_too_small(limit: int) -> None:
    with pytest.raises(ValueError):
        Negentropy(limit)


def test_an_empty_set_that_is_passed_is_shared() -> None:
    items = ItemSet()
    Negentropy(items=items).add(1, bytes(32))
    assert len(items) == 1


def test_key_order_is_item_order() -> None:
    items = [(0, b"\xff" * 32), (1, bytes(32)), (255, bytes(32)), (256, bytes(32)), (INFINITY - 1, b"\xff" * 32)]
    keys = [make_key(*item) for item in items]
    assert keys == sorted(keys)
    assert [split_key(key) for key in keys] == items


@given(st.integers(0, 2**64 - 1))
def test_varint(value: int) -> None:
    encoded = encode_varint(value)
    assert len(encoded) == max(1, -(-value.bit_length() // 7))
    assert sum((digit & 0x7F) << 7 * i for i, digit in enumerate(reversed(encoded))) == value
    assert all(digit & 0x80 for digit in encoded[:-1])
    assert not encoded[-1] & 0x80


# What a peer may send

RICH = ItemSet((n // 2, item_id(n)) for n in range(300))


def feed(query: bytes) -> None:
    """Either role answers or refuses; nothing else may come out."""
    for initiate in (False, True):
        for items in (RICH, ItemSet()):
            talk = Negentropy(4096, items)
            if initiate:
                talk.initiate()
            try:
                result = talk.reconcile(query)
            except RemoteProtocolError:
                continue
            assert result.reply is None or len(result.reply) <= 4096
            if not initiate:
                # Whatever it answered is well-formed.
                Negentropy(0, RICH).reconcile(result.reply or b"")


@settings(deadline=None, max_examples=400)
@given(st.one_of(st.binary(max_size=200), st.binary(max_size=200).map(lambda tail: b"\x61" + tail)))
def test_arbitrary_bytes(query: bytes) -> None:
    feed(query)


BOUNDS = st.builds(
    lambda encoded, prefix: encode_varint(encoded) + encode_varint(len(prefix)) + prefix,
    st.one_of(st.integers(0, 300), st.integers(0, 2**70)),
    st.one_of(st.just(b""), st.binary(max_size=33)),
)
PAYLOADS = st.one_of(
    st.just(SKIP),
    st.binary(min_size=16, max_size=16).map(lambda digest: FINGERPRINT + digest),
    st.just(FINGERPRINT + NOTHING),
    st.lists(IDS, max_size=4).map(lambda ids: ID_LIST + encode_varint(len(ids)) + b"".join(ids)),
    st.integers(0, 2**70).map(lambda n: ID_LIST + encode_varint(n)),
    st.integers(3, 2**70).map(encode_varint),
)


@settings(deadline=None, max_examples=400)
@given(st.lists(st.tuples(BOUNDS, PAYLOADS), max_size=12), st.integers(0, 20))
def test_messages_that_are_nearly_right(ranges: list[tuple[bytes, bytes]], cut: int) -> None:
    query = b"\x61" + b"".join(bound + payload for bound, payload in ranges)
    feed(query)
    feed(query[: len(query) - cut])


@settings(deadline=None, max_examples=200)
@given(st.integers(0, len(CASES) - 1), st.data())
def test_damaged_transcripts(case: int, data: st.DataObject) -> None:
    messages = CASES[case]["messages"]
    message = bytearray.fromhex(messages[data.draw(st.integers(0, len(messages) - 1))])
    for _ in range(data.draw(st.integers(1, 3))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    feed(bytes(message))


@pytest.mark.parametrize(
    "query",
    {
        "empty": b"",
        "no version": b"\x5f",
        "no version either": b"\x70",
        "bound cut off": b"\x61\x01",
        "prefix cut off": b"\x61\x01\x05ab",
        "prefix too long": b"\x61\x01\x21" + bytes(33) + SKIP,
        "no mode": b"\x61" + INFINITE,
        "unknown mode": b"\x61" + INFINITE + b"\x03",
        "fingerprint cut off": b"\x61" + INFINITE + FINGERPRINT + bytes(15),
        "ids cut off": b"\x61" + INFINITE + ID_LIST + b"\x02" + bytes(63),
        "very many ids": b"\x61" + INFINITE + ID_LIST + b"\xff" * 9 + b"\x7f",
        "number without end": b"\x61" + b"\xff" * 40,
        "leading zeros": b"\x61\x80\x01\x00" + SKIP,
        "timestamp is infinity": b"\x61" + encode_varint(2**64) + b"\x00" + SKIP,
        "timestamps overflow": b"\x61" + (encode_varint(2**63 + 1) + b"\x00" + SKIP) * 2,
        "after infinity": b"\x61" + INFINITE + SKIP + b"\x02\x00" + SKIP,
        "bounds descend": b"\x61\x01\x01\x05" + SKIP + b"\x01\x01\x04" + SKIP,
        "bounds descend by omission": b"\x61\x01\x01\x05" + SKIP + b"\x01\x00" + SKIP,
        "too large": b"\x61" + INFINITE + FINGERPRINT + bytes(MAX_MESSAGE_SIZE),
        "too many ranges": b"\x61" + (b"\x01\x00" + SKIP) * (MAX_RANGES + 1),
    }.items(),
    ids=lambda item: item[0],
)
def test_malformed(query: tuple[str, bytes]) -> None:
    responder, initiator = negentropy(RICH), negentropy(RICH)
    initiator.initiate()
    for talk in (responder, initiator):
        with pytest.raises(RemoteProtocolError):
            talk.reconcile(query[1])
    assert converse(initiator, responder)[:2] == ([], []), "both go on as if nothing had been"


def test_equal_bounds_and_a_second_range_at_infinity_are_allowed() -> None:
    """Frame size limits make the reference send both."""
    query = b"\x61" + (b"\x01\x01\x05" + SKIP) + (b"\x01\x02\x05\x00" + SKIP) + (INFINITE + SKIP) + INFINITE + FINGERPRINT + NOTHING
    assert negentropy(RICH).reconcile(query).reply == b"\x61"


@pytest.mark.parametrize("version", [0x60, 0x62, 0x6F])
def test_other_versions(version: int) -> None:
    query = bytes([version]) + b"whatever that version means"
    assert negentropy(RICH).reconcile(query) == Reconciliation(b"\x61", [], [])
    initiator = negentropy(RICH)
    initiator.initiate()
    with pytest.raises(RemoteProtocolError):
        initiator.reconcile(query)


@pytest.mark.parametrize("limit", [0, 4096])
def test_as_many_ranges_as_allowed(limit: int) -> None:
    """The worst within the limits: an answer that is itself acceptable."""
    query = b"\x61" + (b"\x02\x00" + FINGERPRINT + bytes(16)) * MAX_RANGES
    items = ItemSet((n // 20, item_id(n)) for n in range(20_000))
    reply = Negentropy(limit, items).reconcile(query).reply
    assert reply is not None
    assert len(reply) <= (limit or MAX_MESSAGE_SIZE)
    Negentropy(0, items).reconcile(reply)
    flood = b"\x61" + (b"\x02\x00" + FINGERPRINT + bytes(16) + b"\x02\x00" + ID_LIST + b"\x00") * (MAX_RANGES // 2)
    reply = Negentropy(limit).reconcile(flood).reply
    assert reply is not None
    Negentropy().reconcile(reply)
