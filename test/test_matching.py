"""Topic matching without IO: two matchers whose frames are carried by hand."""

import contextlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl.signing import SigningKey

from solyd_swarm.core.keys import derive_topic_key, topic_tag
from solyd_swarm.errors import RemoteProtocolError
from solyd_swarm.net import matching
from solyd_swarm.net.matching import ACCEPT, AUTHOR, AUTHOR_DOMAIN, MAX_NUMBER, MAX_OFFERS, OFFER, WITHDRAW, Identity, Matcher

HASH = b"h" * 64
FRAMES = st.binary(min_size=1, max_size=200) | st.builds(
    lambda kind, rest: bytes([kind]) + rest, st.sampled_from([1, 2, 3, 4]), st.binary()
)
ROOM, HALL, CELLAR = (derive_topic_key(name) for name in ("room", "hall", "cellar"))
KEYS = {True: SigningKey(b"a" * 32), False: SigningKey(b"b" * 32)}


class Side:
    """A matcher, what it has sent that was not carried yet, and all it ever sent."""

    def __init__(self, initiator: bool, hash: bytes = HASH):
        key = KEYS[initiator]
        self.author = bytes(key.verify_key)
        self.waiting: list[bytes] = []
        self.sent: list[bytes] = []
        self.ups: list[bytes] = []
        identity = Identity(self.author, lambda data: key.sign(data).signature)
        self.matcher = Matcher(initiator, hash, self.send, identity, lambda: (("192.0.2.1", 7000 + initiator),))

    def send(self, frame: bytes) -> None:
        self.waiting.append(frame)
        self.sent.append(frame)

    def note(self, changes: list[matching.Change]) -> None:
        for change, key in changes:
            assert (key in self.ups) == (change == "down")
            if change == "up":
                self.ups.append(key)
            else:
                self.ups.remove(key)

    def join(self, *keys: bytes) -> None:
        self.note(self.matcher.join(*keys))

    def leave(self, key: bytes) -> None:
        if key in self.ups:
            self.ups.remove(key)
        self.matcher.leave(key)

    def take(self, *frames: bytes) -> None:
        for frame in frames:
            self.note(self.matcher.handle(frame))

    def kinds(self) -> list[int]:
        return [frame[0] for frame in self.sent]


class Pair:
    def __init__(self) -> None:
        self.initiator, self.responder = Side(True), Side(False)

    def step(self, sender: Side) -> None:
        """Carries the oldest frame that this side has sent."""
        receiver = self.responder if sender is self.initiator else self.initiator
        receiver.take(sender.waiting.pop(0))

    def carry(self) -> None:
        while self.initiator.waiting or self.responder.waiting:
            self.step(self.initiator if self.initiator.waiting else self.responder)

    def agree(self, *keys: bytes) -> None:
        self.carry()
        assert sorted(self.initiator.ups) == sorted(self.responder.ups) == sorted(keys)
        assert self.initiator.matcher.numbers == self.responder.matcher.numbers
        assert set(self.initiator.matcher.numbers) == set(keys)


@pytest.fixture
def pair() -> Pair:
    return Pair()


def encode(kind: int, *fields: object) -> bytes:
    return bytes([kind]) + msgspec.msgpack.encode(fields)


def offer(*tags: tuple[int, bytes]) -> bytes:
    return encode(OFFER, tags)


def tag(key: bytes, role: bytes = b"initiator", hash: bytes = HASH) -> bytes:
    return topic_tag(key, hash, role)


def test_what_both_know_is_agreed_and_nothing_else(pair):
    pair.initiator.join(ROOM, HALL)
    pair.responder.join(CELLAR, HALL)
    pair.agree(HALL)
    assert pair.initiator.matcher.remote_author == pair.responder.author
    assert pair.responder.matcher.remote_author == pair.initiator.author
    assert pair.initiator.matcher.remote_addresses == (("192.0.2.1", 7000),)


def test_a_responder_that_joins_later_tries_what_was_shown_before(pair):
    pair.initiator.join(ROOM, HALL)
    pair.agree()
    pair.responder.join(ROOM)
    pair.agree(ROOM)
    pair.responder.join(HALL)
    pair.agree(ROOM, HALL)
    assert pair.initiator.kinds().count(OFFER) == 1


def test_an_initiator_shows_what_it_joins_later(pair):
    pair.responder.join(ROOM, HALL)
    pair.initiator.join(ROOM)
    pair.agree(ROOM)
    pair.initiator.join(HALL)
    pair.agree(ROOM, HALL)


def test_the_author_is_told_once_and_only_after_a_match(pair):
    for index in range(3):
        pair.initiator.join(derive_topic_key(f"mine {index}"))
        pair.responder.join(derive_topic_key(f"yours {index}"))
        pair.carry()
    assert AUTHOR not in pair.initiator.kinds() + pair.responder.kinds()
    for key in (ROOM, HALL, CELLAR):
        pair.initiator.join(key)
        pair.responder.join(key)
        pair.carry()
    assert pair.initiator.kinds().count(AUTHOR) == pair.responder.kinds().count(AUTHOR) == 1
    for side in (pair.initiator, pair.responder):
        with pytest.raises(RemoteProtocolError, match="twice"):
            side.take(next(frame for frame in (pair.initiator, pair.responder)[side is pair.initiator].sent if frame[0] == AUTHOR))


@pytest.mark.parametrize("leaver", ["initiator", "responder"])
def test_leaving_and_coming_back(pair, leaver):
    pair.initiator.join(ROOM, HALL)
    pair.responder.join(ROOM, HALL)
    pair.agree(ROOM, HALL)
    side = getattr(pair, leaver)
    used = set(pair.initiator.matcher.topics)
    for _ in range(5):
        side.leave(ROOM)
        pair.agree(HALL)
        side.join(ROOM)
        pair.agree(ROOM, HALL)
        assert pair.initiator.matcher.numbers[ROOM] not in used
        used.add(pair.initiator.matcher.numbers[ROOM])


@pytest.mark.parametrize("leaver", ["initiator", "responder"])
def test_coming_back_at_once_with_every_order_of_frames(leaver):
    """Leave and join before the other side hears of either, frames crossing at any place."""
    for cut in range(6):
        pair = Pair()
        pair.initiator.join(ROOM)
        pair.responder.join(ROOM)
        for _ in range(cut):
            for side in (pair.initiator, pair.responder):
                if side.waiting:
                    pair.step(side)
                    break
        side = getattr(pair, leaver)
        side.leave(ROOM)
        side.join(ROOM)
        pair.agree(ROOM)


def test_what_was_left_before_it_matched_never_matches(pair):
    pair.initiator.join(ROOM, HALL)
    pair.responder.join(HALL)
    pair.agree(HALL)
    pair.initiator.leave(ROOM)
    pair.carry()
    pair.responder.join(ROOM)
    pair.agree(HALL)


def test_leaving_while_the_answer_is_on_its_way(pair):
    pair.initiator.join(ROOM, HALL)
    pair.responder.join(ROOM, HALL)
    pair.step(pair.initiator)
    pair.initiator.leave(ROOM)
    pair.agree(HALL)


def test_both_leave_at_once(pair):
    pair.initiator.join(ROOM)
    pair.responder.join(ROOM)
    pair.agree(ROOM)
    pair.initiator.leave(ROOM)
    pair.responder.leave(ROOM)
    pair.agree()
    pair.responder.join(ROOM)
    pair.agree()
    pair.initiator.join(ROOM)
    pair.agree(ROOM)


def test_leaving_what_was_never_joined_says_nothing(pair):
    for side in (pair.initiator, pair.responder):
        side.leave(ROOM)
        assert not side.sent


@given(st.lists(st.tuples(st.sampled_from(["initiator", "responder"]), st.sampled_from(["join", "leave", "step"]), st.integers(0, 2))))
@settings(max_examples=200, deadline=None)
def test_whatever_they_do_they_agree_in_the_end(moves):
    pair, joined = Pair(), {"initiator": set(), "responder": set()}
    for name, what, index in moves:
        side, key = getattr(pair, name), (ROOM, HALL, CELLAR)[index]
        if what == "step":
            if side.waiting:
                pair.step(side)
        elif (key in joined[name]) == (what == "leave"):
            getattr(side, what)(key)
            joined[name] ^= {key}
    pair.agree(*joined["initiator"] & joined["responder"])
    assert len(pair.responder.matcher._offers) == len(joined["initiator"] - joined["responder"])


# Strangers, and worse.


@pytest.mark.parametrize("stranger_joins", [(), (HALL,), (derive_topic_key("room", b"wrong secret"),)])
@pytest.mark.parametrize("role", ["initiator", "responder"])
def test_a_stranger_sees_nothing_but_opaque_tags(pair, stranger_joins, role):
    key = derive_topic_key("room", b"secret")
    member, stranger = (pair.initiator, pair.responder) if role == "initiator" else (pair.responder, pair.initiator)
    member.join(key)
    stranger.join(*stranger_joins)
    pair.agree()
    assert set(member.kinds()) <= {OFFER}
    for frame in member.sent:
        for secret in (key, member.author, b"room", derive_topic_key("room")):
            assert secret not in frame
    assert stranger.matcher.remote_author is None


def test_a_tag_is_worthless_on_another_channel_and_in_the_other_role(pair):
    pair.responder.join(ROOM)
    other = Side(True, b"x" * 64)
    other.join(ROOM)
    pair.responder.take(*other.sent, offer((2, tag(ROOM, b"responder"))), offer((3, ROOM)))
    assert not pair.responder.sent
    assert not pair.responder.matcher.topics


def test_a_reflected_tag_closes_the_channel(pair):
    pair.initiator.join(ROOM)
    with pytest.raises(RemoteProtocolError, match="wrong tag"):
        pair.initiator.take(encode(ACCEPT, 1, tag(ROOM)))
    with pytest.raises(RemoteProtocolError, match="responder"):
        pair.initiator.take(pair.initiator.sent[0])
    assert AUTHOR not in pair.initiator.kinds()


def test_an_answer_needs_a_question(pair):
    pair.initiator.join(ROOM)
    for side, number in ((pair.initiator, 2), (pair.responder, 1)):
        with pytest.raises(RemoteProtocolError, match="never shown"):
            side.take(encode(ACCEPT, number, tag(ROOM, b"responder")))


@pytest.mark.parametrize(
    ("author", "signed"),
    [
        (True, AUTHOR_DOMAIN + HASH + b"responder"),  # the other role
        (True, AUTHOR_DOMAIN + b"x" * 64 + b"initiator"),  # another channel
        (True, HASH + b"initiator"),  # not for this purpose
        (False, AUTHOR_DOMAIN + HASH + b"initiator"),  # our own, shown back by somebody else
    ],
)
def test_a_wrong_signature_closes_the_channel(pair, author, signed):
    pair.responder.join(ROOM)
    pair.responder.take(offer((1, tag(ROOM))))
    signature = KEYS[True].sign(signed).signature
    claimed = bytes(KEYS[author].verify_key)
    with pytest.raises(RemoteProtocolError, match="signature"):
        pair.responder.take(encode(AUTHOR, claimed, signature, ()))
    assert pair.responder.ups == []
    assert pair.responder.matcher.remote_author is None


def test_numbers_are_never_used_twice(pair):
    pair.responder.join(ROOM)
    pair.responder.take(offer((5, tag(HALL)), (9, tag(ROOM))), encode(WITHDRAW, 9), encode(WITHDRAW, 5))
    for number in (5, 7, 9):
        with pytest.raises(RemoteProtocolError, match="twice"):
            pair.responder.take(offer((number, tag(ROOM))))


def test_unmatched_tags_are_bounded(pair):
    for number in range(1, MAX_OFFERS + 1):
        pair.responder.take(offer((number, number.to_bytes(32, "big"))))
    with pytest.raises(RemoteProtocolError, match="too many"):
        pair.responder.take(offer((MAX_OFFERS + 1, bytes(32))))
    assert len(pair.responder.matcher._offers) == MAX_OFFERS


def test_an_initiator_with_more_topics_than_that_shows_them_as_there_is_room(pair):
    keys = [derive_topic_key(f"topic {index}") for index in range(MAX_OFFERS + 3)]
    pair.initiator.join(*keys)
    pair.responder.join(keys[-1])
    pair.agree()
    for key in keys[:3]:
        pair.initiator.leave(key)
    pair.agree(keys[-1])
    assert max(map(len, pair.initiator.sent)) < 64 * 1024  # what a stranger may send


def test_numbers_end_and_the_channel_goes_on(pair):
    pair.initiator.join(HALL)
    pair.responder.join(HALL)
    pair.agree(HALL)
    pair.initiator.matcher._last_number = MAX_NUMBER - 1
    for _ in range(3):
        pair.initiator.join(ROOM)
        pair.carry()
        pair.initiator.leave(ROOM)
    pair.agree(HALL)
    assert pair.initiator.kinds().count(OFFER) == 2


def test_one_tag_under_two_numbers_is_one_topic(pair):
    pair.responder.join(ROOM)
    pair.responder.take(offer((1, tag(ROOM)), (2, tag(ROOM))))
    assert pair.responder.kinds() == [ACCEPT, AUTHOR]
    assert pair.responder.matcher.topics == {1: ROOM}


@pytest.mark.parametrize("initiator", [True, False])
@given(frame=FRAMES)
@settings(max_examples=300, deadline=None)
def test_malformed_frames_raise_nothing_but_a_protocol_error(initiator, frame):
    side = Side(initiator)
    side.join(ROOM)
    with contextlib.suppress(RemoteProtocolError):
        side.take(frame)
    assert side.ups == []


@pytest.mark.parametrize("kind", [OFFER, ACCEPT, AUTHOR, WITHDRAW])
def test_deep_nesting_and_wrong_shapes_are_protocol_errors(pair, kind):
    for body in (b"", b"\x91" * 100_000, b"\xc0", b"\x90", msgspec.msgpack.encode([0]), msgspec.msgpack.encode([65536, bytes(32)])):
        for side in (pair.initiator, pair.responder):
            with pytest.raises(RemoteProtocolError, match=r"malformed|responder|too many"):
                side.take(bytes([kind]) + body)


def test_unknown_frames_and_appended_fields_are_skipped(pair):
    pair.responder.join(ROOM)
    for kind in (0x00, 0x10, 0x7F, 0xFF):
        pair.responder.take(bytes([kind]), bytes([kind]) + b"from a later version")
    pair.responder.take(encode(OFFER, [(1, tag(ROOM))], "new", {"in": 2}))
    assert pair.responder.matcher.numbers == {ROOM: 1}
