"""Envelopes: how what is published is cut, what every relay refuses alike, and what convicts an author."""

from collections.abc import Callable
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.bindings import crypto_sign, crypto_sign_seed_keypair

from solyd_swarm.core.envelope import (
    ENVELOPE_BYTES,
    MAX_SEQUENCE,
    Envelope,
    envelope_id,
    equivocate,
    equivocation_id,
    open_envelope,
    seal,
    split_batch,
)
from solyd_swarm.core.wire import MAX_ENVELOPE, MAX_MESSAGE, MAX_PAYLOADS
from solyd_swarm.errors import RemoteProtocolError

TOPIC = b"t" * 16
PUBLIC, SECRET = crypto_sign_seed_keypair(b"a" * 32)
OTHER_PUBLIC, OTHER_SECRET = crypto_sign_seed_keypair(b"b" * 32)


def sign(data: bytes) -> bytes:
    return crypto_sign(data, SECRET)[:64]


def make(first: int = 1, *payloads: bytes, epoch: int = 1, author: bytes = PUBLIC, topic: bytes = TOPIC, time: int = 5) -> Envelope:
    return seal(topic, author, epoch, first, time, payloads or (b"payload",), sign)


@given(st.lists(st.integers(0, 2 * ENVELOPE_BYTES), max_size=20), st.integers(0, 600))
def test_batches_hold_everything_in_order_and_close_where_they_must(large: list[int], small: int) -> None:
    payloads = [bytes(size) for size in large] + [bytes([n % 256]) for n in range(small)]
    batches = split_batch(payloads)
    assert [payload for batch in batches for payload in batch] == payloads
    for batch in batches:
        assert 1 <= len(batch) <= MAX_PAYLOADS
        assert len(batch) == 1 or sum(map(len, batch)) <= ENVELOPE_BYTES
    for batch, following in pairwise(batches):  # nothing is cut without need
        assert len(batch) == MAX_PAYLOADS or sum(map(len, (*batch, following[0]))) + 5 * (len(batch) + 1) > ENVELOPE_BYTES


def test_a_batch_closes_at_256_messages() -> None:
    assert [len(batch) for batch in split_batch([b"x"] * 600)] == [256, 256, 88]


def test_a_large_message_goes_alone() -> None:
    small, large = b"small", bytes(ENVELOPE_BYTES)
    assert split_batch([small, small, large, small]) == [(small, small), (large,), (small,)]


def test_nothing_makes_no_envelope() -> None:
    assert split_batch([]) == []


instants = st.integers(0, 2**63 - 1)


@given(st.lists(st.binary(max_size=100), min_size=1, max_size=10), st.integers(1, 2**53 - 20), st.integers(1, 2**63 - 1), instants)
def test_what_is_sealed_opens_again(payloads: list[bytes], first: int, epoch: int, time: int) -> None:
    sealed = make(first, *payloads, epoch=epoch, time=time)
    opened = open_envelope(TOPIC, sealed.body, sealed.signature)
    assert (opened.author, opened.epoch, opened.first, opened.time, opened.payloads) == (PUBLIC, epoch, first, time, tuple(payloads))
    assert opened.last == first + len(payloads) - 1
    assert opened.id == sealed.id == envelope_id(sealed.body)


def test_every_cut_of_split_batch_opens_again() -> None:
    for batch in split_batch([bytes(100)] * 1000 + [bytes(ENVELOPE_BYTES - 4), bytes(MAX_MESSAGE), b""]):
        sealed = make(1, *batch)
        assert open_envelope(TOPIC, sealed.body, sealed.signature).payloads == batch


def test_the_id_is_the_same_whoever_signs_and_however_often() -> None:
    """It is of the signed bytes alone: a second signature, however made, is no second message."""
    assert make().id == make().id
    assert make().id != make(2).id != make(2, epoch=2).id


def refuse(body: bytes, signature: bytes, topic: bytes = TOPIC) -> None:
    with pytest.raises(RemoteProtocolError):
        open_envelope(topic, body, signature)


def test_a_wrong_signature_is_refused() -> None:
    good = make()
    refuse(good.body, bytes(64))
    refuse(good.body, good.signature[:-1] + bytes([good.signature[-1] ^ 1]))
    refuse(good.body, make(2).signature)
    refuse(good.body, crypto_sign(good.id, SECRET)[:64])  # of the id, but not under the prefix


def test_an_envelope_that_names_another_author_is_refused() -> None:
    forged = make(author=OTHER_PUBLIC)
    refuse(forged.body, forged.signature)


def test_keys_of_small_order_are_refused() -> None:
    """Under these one signature would fit many messages."""
    for weak in (bytes(32), b"\x01" + bytes(31), b"\xec" + b"\xff" * 30 + b"\x7f"):
        forged = make(author=weak)
        refuse(forged.body, bytes(64))
        refuse(forged.body, b"\x01" + bytes(63))


@given(st.data())
def test_an_altered_envelope_is_refused(data: st.DataObject) -> None:
    good = make(1, b"one", b"two")
    body = bytearray(good.body)
    place = data.draw(st.integers(0, len(body) - 1))
    body[place] ^= data.draw(st.integers(1, 255))
    refuse(bytes(body), good.signature)


def test_an_envelope_of_another_topic_is_refused() -> None:
    good = make()
    refuse(good.body, good.signature, topic=b"u" * 16)


def signed(*fields: object) -> tuple[bytes, bytes]:
    """Whatever an author may sign that did not keep to the format."""
    body = msgspec.msgpack.encode(fields)
    return body, crypto_sign(b"solyd_swarm envelope v1\0" + envelope_id(body), SECRET)[:64]


@pytest.mark.parametrize(
    "fields",
    [
        (TOPIC, PUBLIC, 0, 1, 1, [b""]),
        (TOPIC, PUBLIC, 2**63, 1, 1, [b""]),
        (TOPIC, PUBLIC, 1, 0, 1, [b""]),
        (TOPIC, PUBLIC, 1, MAX_SEQUENCE, 1, [b""]),
        (TOPIC, PUBLIC, 1, MAX_SEQUENCE - 1, 1, [b"", b""]),
        (TOPIC, PUBLIC, 1, 1, -1, [b""]),
        (TOPIC, PUBLIC, 1, 1, 1, []),
        (TOPIC, PUBLIC, 1, 1, 1, [b""] * (MAX_PAYLOADS + 1)),
        (TOPIC, PUBLIC, 1, 1, 1, [bytes(ENVELOPE_BYTES)] * 3),
        (TOPIC, PUBLIC, 1, 1, 1, [bytes(MAX_MESSAGE + 1)]),
        (TOPIC, PUBLIC, 1, 1, 1, ["text"]),
        (TOPIC, PUBLIC, 1, 1, 1),
        (TOPIC, PUBLIC[:-1], 1, 1, 1, [b""]),
        (),
    ],
)
def test_envelopes_out_of_bounds_are_refused_though_signed(fields: tuple[object, ...]) -> None:
    refuse(*signed(*fields))


@given(st.binary(max_size=200))
def test_arbitrary_bodies_raise_only_what_they_may(body: bytes) -> None:
    refuse(body, bytes(64))


@pytest.mark.parametrize("body", [b"\x91" * 100_000, b"\x96" + b"\xdd\xff\xff\xff\xff" * 1000, b"", bytes(MAX_ENVELOPE + 1)])
def test_hostile_bodies_raise_only_what_they_may(body: bytes) -> None:
    refuse(body, bytes(64))


def test_a_check_of_the_signature_can_be_replaced() -> None:
    verify: Callable[[bytes, bytes, bytes], bool] = lambda key, signature, data: True  # noqa: E731
    good = make()
    assert open_envelope(TOPIC, good.body, bytes(64), verify).id == good.id


@pytest.mark.parametrize(
    ("one", "other", "convicts"),
    [
        (make(1, b"a"), make(1, b"b"), True),
        (make(1, b"a", b"b", b"c"), make(3, b"c"), True),  # the same message even, but in two envelopes
        (make(3, b"c"), make(1, b"a", b"b", b"c"), True),
        (make(1, b"a", time=1), make(1, b"a", time=2), True),
        (make(1, b"a"), make(1, b"a"), False),
        (make(1, b"a", b"b"), make(3, b"c"), False),
        (make(1, b"a"), make(1, b"b", epoch=2), False),
        (make(1, b"a"), make(1, b"b", author=OTHER_PUBLIC), False),
    ],
)
def test_what_convicts_an_author(one: Envelope, other: Envelope, convicts: bool) -> None:
    assert equivocate(one, other) is convicts
    assert equivocate(other, one) is convicts


def test_one_item_stands_for_an_author_and_epoch() -> None:
    assert equivocation_id(PUBLIC, 1) == equivocation_id(PUBLIC, 1)
    assert len({equivocation_id(PUBLIC, 1), equivocation_id(PUBLIC, 2), equivocation_id(OTHER_PUBLIC, 1)}) == 3
    assert len(equivocation_id(PUBLIC, 2**63 - 1)) == 32
