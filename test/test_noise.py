"""The Noise session and the stream of frames, without any IO."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solyd_swarm.errors import RemoteProtocolError
from solyd_swarm.net import noise
from solyd_swarm.net.noise import (
    KEEPALIVE,
    MAX_FRAME,
    MAX_HANDSHAKE_MESSAGE,
    MAX_NONCE,
    MAX_PAYLOAD,
    MAX_PLAINTEXT,
    FrameReader,
    FrameWriter,
    NoiseSession,
    public_key,
)

VECTOR = json.loads((Path(__file__).parent / "vectors" / "noise_xx_25519_chachapoly_blake2b.json").read_text())
ALICE, BOB = bytes(range(32)), bytes(range(32, 64))

# The points of low order on Curve25519 and its twist, in every encoding below 2**255: all of them agree on zero.
LOW_ORDER = [
    bytes(32),
    (1).to_bytes(32, "little"),
    (2**255 - 20).to_bytes(32, "little"),
    (2**255 - 19).to_bytes(32, "little"),
    (2**255 - 18).to_bytes(32, "little"),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
]


def body(framed: bytes) -> bytes:
    """The one message in ``framed``, without its length."""
    assert int.from_bytes(framed[:2], "big") == len(framed) - 2
    return framed[2:]


def split(framed: bytes) -> list[bytes]:
    messages = []
    while framed:
        stop = 2 + int.from_bytes(framed[:2], "big")
        messages.append(framed[2:stop])
        framed = framed[stop:]
    return messages


def sessions(**options: bytes) -> tuple[NoiseSession, NoiseSession]:
    return NoiseSession(True, ALICE, **options), NoiseSession(False, BOB, **options)


def connect(initiator: NoiseSession, responder: NoiseSession) -> None:
    first = initiator.start()
    assert responder.start() == b""
    assert responder.read_handshake(body(initiator.read_handshake(body(responder.read_handshake(body(first)))))) == b""


def connected() -> tuple[NoiseSession, NoiseSession]:
    pair = sessions()
    connect(*pair)
    return pair


def test_published_vector() -> None:
    payloads = [bytes.fromhex(message["payload"]) for message in VECTOR["messages"]]
    expected = [bytes.fromhex(message["ciphertext"]) for message in VECTOR["messages"]]
    initiator = NoiseSession(
        True,
        bytes.fromhex(VECTOR["init_static"]),
        prologue=bytes.fromhex(VECTOR["init_prologue"]),
        payload=payloads[2],
        ephemeral_private=bytes.fromhex(VECTOR["init_ephemeral"]),
        opening=payloads[0],
    )
    responder = NoiseSession(
        False,
        bytes.fromhex(VECTOR["resp_static"]),
        prologue=bytes.fromhex(VECTOR["resp_prologue"]),
        payload=payloads[1],
        ephemeral_private=bytes.fromhex(VECTOR["resp_ephemeral"]),
    )
    assert VECTOR["protocol_name"].encode() == noise.PROTOCOL_NAME
    first, none = initiator.start(), responder.start()
    second = responder.read_handshake(body(first))
    third = initiator.read_handshake(body(second))
    assert none == responder.read_handshake(body(third)) == b""
    assert [body(message) for message in (first, second, third)] == expected[:3]
    assert initiator.handshake_hash == responder.handshake_hash == bytes.fromhex(VECTOR["handshake_hash"])
    assert initiator.remote_payload == payloads[1]
    assert responder.remote_payload == payloads[2]
    # The message after the handshake is the responder's: they alternate from message 1 on.
    for index, (sender, receiver) in enumerate([(responder, initiator), (initiator, responder)] * 2):
        if index + 3 < len(expected):
            sealed = body(sender.seal(payloads[index + 3]))
            assert sealed == expected[index + 3]
            assert receiver.open(sealed) == payloads[index + 3]


def test_handshake_tells_who_and_what() -> None:
    initiator = NoiseSession(True, ALICE, payload=b"from the initiator")
    responder = NoiseSession(False, BOB, payload=b"r" * MAX_PAYLOAD)
    connect(initiator, responder)
    assert initiator.complete
    assert responder.complete
    assert initiator.remote_static == public_key(BOB)
    assert responder.remote_static == public_key(ALICE)
    assert initiator.remote_payload == b"r" * MAX_PAYLOAD
    assert responder.remote_payload == b"from the initiator"
    assert len(initiator.handshake_hash) == 64
    assert connected()[0].handshake_hash != connected()[0].handshake_hash


def test_payloads_travel_encrypted() -> None:
    initiator, responder = NoiseSession(True, ALICE, payload=b"capability A"), NoiseSession(False, BOB, payload=b"capability B")
    first = initiator.start()
    responder.start()
    second = responder.read_handshake(body(first))
    third = initiator.read_handshake(body(second))
    assert b"capability" not in first + second + third
    assert public_key(ALICE) not in first + second + third


def test_properties_and_transport_wait_for_the_handshake() -> None:
    session, _ = sessions()
    for use in (
        lambda: session.handshake_hash,
        lambda: session.remote_static,
        lambda: session.remote_payload,
        lambda: session.seal(b"x"),
        lambda: session.open(b"x" * 17),
        lambda: session.read_handshake(b"x"),
    ):
        with pytest.raises(RuntimeError):
            use()
    session.start()
    with pytest.raises(RuntimeError):
        session.start()
    with pytest.raises(RuntimeError):
        connected()[0].read_handshake(b"x")


def test_arguments_are_checked() -> None:
    for key in (b"", bytes(31), bytes(33)):
        with pytest.raises(ValueError):
            NoiseSession(True, key)
        with pytest.raises(ValueError):
            NoiseSession(True, ALICE, ephemeral_private=key)
        with pytest.raises(ValueError):
            public_key(key)
    with pytest.raises(ValueError):
        NoiseSession(True, ALICE, payload=bytes(MAX_PAYLOAD + 1))


def handshake_with(change: int, alter) -> None:
    """A handshake whose message number ``change`` (from 0) goes through ``alter``."""
    initiator, responder = sessions(payload=b"0123456789")
    message = initiator.start()
    responder.start()
    for number, reader in enumerate((responder, initiator, responder)):
        message = body(message)
        message = reader.read_handshake(alter(message) if number == change else message)
    assert initiator.complete
    assert responder.complete


@pytest.mark.parametrize(("number", "length"), [(0, 32), (1, 106), (2, 74)])
def test_every_corrupted_byte_of_the_handshake_is_noticed(number: int, length: int) -> None:
    lengths = []
    handshake_with(number, lambda message: lengths.append(len(message)) or message)
    assert lengths == [length]
    for position in range(length):
        with pytest.raises(RemoteProtocolError):
            handshake_with(number, lambda message, at=position: message[:at] + bytes([message[at] ^ 0x80]) + message[at + 1 :])
        with pytest.raises(RemoteProtocolError):
            handshake_with(number, lambda message, at=position: message[:at])


@pytest.mark.parametrize("number", [1, 2])
def test_longer_handshake_message_is_refused(number: int) -> None:
    with pytest.raises(RemoteProtocolError):
        handshake_with(number, lambda message: message + b"\0")


def test_handshake_messages_are_bounded() -> None:
    with pytest.raises(RemoteProtocolError, match="too long"):
        handshake_with(0, lambda message: message + bytes(MAX_HANDSHAKE_MESSAGE - 31))
    with pytest.raises(RemoteProtocolError, match="payload too long"):
        handshake_with(0, lambda message: message + bytes(MAX_PAYLOAD + 1))


@pytest.mark.parametrize("point", LOW_ORDER)
def test_keys_of_low_order_are_refused(point: bytes) -> None:
    for high_bit in (0, 0x80):
        forged = point[:31] + bytes([point[31] | high_bit])
        initiator, responder = sessions()
        initiator.start()
        responder.start()
        with pytest.raises(RemoteProtocolError):
            responder.read_handshake(forged)
        with pytest.raises(RemoteProtocolError):
            initiator.read_handshake(forged + bytes(64))


@pytest.mark.parametrize("role", [True, False])
def test_static_key_of_low_order_is_refused(role: bool) -> None:
    initiator, responder = sessions()
    (initiator if role else responder)._state.s.public_bytes = bytes(32)  # a peer that follows the protocol but for this
    with pytest.raises(RemoteProtocolError):
        connect(initiator, responder)
    assert not (responder if role else initiator).complete


def test_other_prologue_fails() -> None:
    initiator, responder = NoiseSession(True, ALICE), NoiseSession(False, BOB, prologue=b"solyd_swarm/2")
    with pytest.raises(RemoteProtocolError):
        connect(initiator, responder)
    assert not initiator.complete
    assert not responder.complete


def test_after_a_failure_the_session_is_dead() -> None:
    initiator, responder = sessions()
    first = body(initiator.start())
    responder.start()
    with pytest.raises(RemoteProtocolError):
        responder.read_handshake(b"short")
    with pytest.raises(RemoteProtocolError):
        responder.read_handshake(first)
    initiator, responder = connected()
    good = body(initiator.seal(b"good"))
    with pytest.raises(RemoteProtocolError):
        responder.open(b"x" * 40)
    with pytest.raises(RemoteProtocolError):
        responder.open(good)


@given(st.lists(st.binary(max_size=200), max_size=3), st.booleans())
def test_garbage_only_raises_remote_protocol_error(messages: list[bytes], role: bool) -> None:
    session = NoiseSession(role, ALICE)
    session.start()
    for message in messages:
        try:
            session.read_handshake(message)
        except RemoteProtocolError:
            continue
        assert not session.complete


def test_every_corrupted_byte_of_a_transport_message_is_noticed() -> None:
    for position in range(16 + 20):
        initiator, responder = connected()
        message = bytearray(body(initiator.seal(b"twenty bytes of text")))
        message[position] ^= 1
        with pytest.raises(RemoteProtocolError):
            responder.open(bytes(message))


@pytest.mark.parametrize("message", [b"", b"x", bytes(15), bytes(16), bytes(65_535)])
def test_garbage_in_transport(message: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        connected()[0].open(message)


def test_repeated_and_reordered_and_reflected_messages_are_refused() -> None:
    def three() -> tuple[NoiseSession, NoiseSession, list[bytes]]:
        initiator, responder = connected()
        return initiator, responder, [body(initiator.seal(b"same")) for _ in range(3)]

    _, responder, messages = three()
    assert len(set(messages)) == 3
    assert responder.open(messages[0]) == b"same"
    with pytest.raises(RemoteProtocolError):
        responder.open(messages[0])
    _, responder, messages = three()
    with pytest.raises(RemoteProtocolError):
        responder.open(messages[1])
    initiator, _, messages = three()
    with pytest.raises(RemoteProtocolError):
        initiator.open(messages[0])


def test_seal_cuts_at_the_longest_message() -> None:
    initiator, responder = connected()
    assert initiator.seal(b"") == b""
    for size in (1, MAX_PLAINTEXT, MAX_PLAINTEXT + 1, 3 * MAX_PLAINTEXT):
        text = bytes(size)
        messages = split(initiator.seal(text))
        assert len(messages) == -(-size // MAX_PLAINTEXT)
        assert max(map(len, messages)) <= 65_535
        assert b"".join(map(responder.open, messages)) == text


def test_nonces_end() -> None:
    initiator, responder = connected()
    initiator._send_nonce = responder._receive_nonce = MAX_NONCE - 1
    assert responder.open(body(initiator.seal(b"last"))) == b"last"
    with pytest.raises(OverflowError):
        initiator.seal(b"one more")
    with pytest.raises(RemoteProtocolError):
        responder.open(b"x" * 17)


# Frames. Sizes around the borders of a Noise message and of the length itself matter most.
SIZES = st.one_of(
    st.integers(1, 12),
    st.integers(4_090, 4_100),
    st.integers(MAX_PLAINTEXT - 9, MAX_PLAINTEXT + 9),
    st.integers(1, 200 * 1024),
)


def make_frames(sizes: list[int]) -> list[bytes]:
    return [bytes([index % 251]) * (size - 1) + b"\xff" for index, size in enumerate(sizes)]


@settings(deadline=None)
@given(st.lists(SIZES, max_size=12), st.lists(st.integers(1, 300_000), max_size=8))
def test_frames_arrive_however_the_stream_is_cut(sizes: list[int], cuts: list[int]) -> None:
    cuts = [*cuts, 65_536]  # to get on
    frames, arrived = make_frames(sizes), []
    writer, reader = FrameWriter(), FrameReader()
    stream = b""
    for number, frame in enumerate(frames):
        writer.push(frame)
        if number % 3 == 2:  # pushed and taken in turns
            stream += writer.take(cuts[number % len(cuts)])
    total = sum(map(len, frames)) + 4 * len(frames)
    assert writer.size == total - len(stream)
    turn = 0
    while writer.size:
        stretch = writer.take(cuts[turn % len(cuts)])
        turn += 1
        assert 0 < len(stretch) <= max(cuts)
        stream += stretch
    assert len(stream) == total
    position = turn = 0
    while position < total:
        stop = position + cuts[turn % len(cuts)]
        turn += 1
        reader.feed(stream[position:stop], arrived)
        position = stop
    assert arrived == frames
    assert not reader.partial


@given(st.lists(st.one_of(st.just(b""), st.binary(max_size=9)), max_size=20), st.lists(st.integers(0, 60), max_size=20))
def test_small_frames_and_keepalives_cut_anywhere(frames: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(len(frame).to_bytes(4, "big") + frame for frame in frames)
    borders = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    reader, arrived = FrameReader(), []
    for start, stop in pairwise(borders):
        reader.feed(stream[start:stop], arrived)
    assert arrived == [frame for frame in frames if frame]
    assert not reader.partial


def test_one_byte_at_a_time() -> None:
    reader, arrived = FrameReader(), []
    for byte in KEEPALIVE + b"\0\0\0\3abc" + KEEPALIVE + b"\0\0\0\1d":
        reader.feed(bytes([byte]), arrived)
    assert arrived == [b"abc", b"d"]
    assert not reader.partial


def test_frame_sizes_are_bounded() -> None:
    writer = FrameWriter()
    for frame in (b"", bytes(MAX_FRAME + 1)):
        with pytest.raises(ValueError):
            writer.push(frame)
    assert writer.size == 0
    writer.push(bytes(MAX_FRAME))
    arrived: list[bytes] = []
    FrameReader().feed(writer.take(MAX_FRAME + 4), arrived)
    assert list(map(len, arrived)) == [MAX_FRAME]


@pytest.mark.parametrize("cut", [0, 1, 3])
def test_too_long_a_frame_is_refused_at_its_length(cut: int) -> None:
    reader, arrived = FrameReader(), []
    stream = b"\0\0\0\1a" + (MAX_FRAME + 1).to_bytes(4, "big") + b"xyz"
    reader.feed(stream[: 5 + cut], arrived)
    with pytest.raises(RemoteProtocolError, match="frame too long"):
        reader.feed(stream[5 + cut : 9], arrived)  # none of its bytes has come
    assert arrived == [b"a"]


def test_limit_can_be_lowered() -> None:
    reader, arrived = FrameReader(limit=10), []
    reader.feed((10).to_bytes(4, "big") + bytes(10), arrived)
    reader.limit = 9
    with pytest.raises(RemoteProtocolError):
        reader.feed((10).to_bytes(4, "big") + bytes(10), arrived)
    assert arrived == [bytes(10)]
