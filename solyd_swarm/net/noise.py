"""The encrypted session of a channel, without any IO: Noise XX, and frames packed into its transport messages.

On the wire every Noise message, of the handshake and after it, follows its length in two bytes, big-endian. The plaintexts
of the transport messages, joined, are one stream of frames, each after its length in four bytes, big-endian; where the
messages are cut says nothing. A frame of length zero is a keepalive and carries nothing.

Source: The Noise Protocol Framework, revision 34 (sections 5.1, 5.3, 7.5, 12.3 and 13).
"""

import functools
from collections import deque
from struct import Struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from noise.connection import Keypair, NoiseConnection
from noise.exceptions import NoiseValueError

from solyd_swarm.errors import RemoteProtocolError

PROTOCOL_NAME = b"Noise_XX_25519_ChaChaPoly_BLAKE2b"
PROLOGUE = b"solyd_swarm/1"
"""Both sides must agree on it, else the handshake fails: it holds the version of everything above Noise."""

MAX_MESSAGE = 65_535
"""Longest Noise message, in bytes (section 3)."""
TAG_SIZE = 16
MAX_PLAINTEXT = MAX_MESSAGE - TAG_SIZE
MAX_PAYLOAD = 1_024
"""Longest handshake payload, in bytes."""
MAX_HANDSHAKE_MESSAGE = 32 + (32 + TAG_SIZE) + (MAX_PAYLOAD + TAG_SIZE)
"""Longest handshake message, the second: ephemeral key, static key, payload. A stranger can make us hold one of these, no more."""
MAX_FRAME = 17 * 1024 * 1024
"""Longest frame, in bytes."""
MAX_NONCE = 2**64 - 1
"""Reserved (section 5.1): a cipher state that has arrived here is used up."""

_MESSAGE_LENGTH = Struct(">H")
_FRAME_LENGTH = Struct(">I")
_NONCE = Struct("<4xQ")  # ChaChaPoly (section 12.3): 32 zero bits, then the counter, little-endian
_KEY_SIZE = 32
_JOIN_BELOW = 4_096

KEEPALIVE = _FRAME_LENGTH.pack(0)
"""The plaintext of a keepalive: a frame of length zero."""


def public_key(private: bytes) -> bytes:
    """The 32-byte X25519 public key (RFC 7748) of a 32-byte private key. Raises ``ValueError`` for another length."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


class NoiseSession:
    """One side of one ``Noise_XX_25519_ChaChaPoly_BLAKE2b`` session.

    Send what `start` returns; hand each handshake message received to `read_handshake` and send what that returns, until
    `complete`. Then `seal` and `open`, each in the order of the wire. After any `RemoteProtocolError` the session is dead.

    Args:
        initiator: whether this side dialled.
        static_private: the 32-byte X25519 private key of this instance.
        prologue: must be equal on both sides.
        payload: at most `MAX_PAYLOAD` bytes for the other side, encrypted. The responder's (message 2) can be read by whoever
            dials, the initiator's (message 3) only by the responder: nothing secret belongs in either.
        ephemeral_private: for published test vectors only; fresh and random when not given.
        opening: payload of message 1, which travels in clear and which the other side ignores; for test vectors only.
        may_cross: the other side may have dialled as well, to one and the same connection.

    Attributes:
        initiator: as given, until the other side turns out to have dialled as well.
        crossed: it has.

    Raises:
        ValueError: the key is not 32 bytes long, or a payload is too long.
    """

    def __init__(
        self,
        initiator: bool,
        static_private: bytes,
        *,
        prologue: bytes = PROLOGUE,
        payload: bytes = b"",
        ephemeral_private: bytes | None = None,
        opening: bytes = b"",
        may_cross: bool = False,
    ) -> None:
        if len(static_private) != 32 or (ephemeral_private is not None and len(ephemeral_private) != 32):
            raise ValueError("an X25519 private key has 32 bytes")
        if max(len(payload), len(opening)) > MAX_PAYLOAD:
            raise ValueError(f"a handshake payload has at most {MAX_PAYLOAD} bytes")
        self.initiator = initiator
        self.crossed = False
        self._may_cross = may_cross
        self.complete = False
        self._payload = payload
        self._opening = opening
        self._begun = False
        self._failed = False
        self._handshake_hash = b""
        self._remote_static = b""
        self._remote_payload = b""
        self._send_nonce = 0
        self._receive_nonce = 0
        self._cipher_out: ChaCha20Poly1305
        self._cipher_in: ChaCha20Poly1305
        self._make = functools.partial(self._prepare, static_private, prologue)
        self._connection: NoiseConnection | None
        self._make(initiator, ephemeral_private)

    def _prepare(self, static_private: bytes, prologue: bytes, initiator: bool, ephemeral_private: bytes | None = None) -> None:
        connection = NoiseConnection.from_name(PROTOCOL_NAME)
        connection.set_prologue(prologue)
        if initiator:
            connection.set_as_initiator()
        else:
            connection.set_as_responder()
        connection.set_keypair_from_private_bytes(Keypair.STATIC, static_private)
        connection.start_handshake()
        self._connection = connection
        # The library lets go of this object when the handshake completes, and with it of the remote static key.
        self._state = connection.noise_protocol.handshake_state
        if ephemeral_private is not None:  # past the library's setter, which warns
            self._state.e = connection.noise_protocol.keypair_class.from_private_bytes(ephemeral_private)

    @property
    def handshake_hash(self) -> bytes:
        """64 bytes that are equal on both sides and differ between any two sessions. Raises ``RuntimeError`` before `complete`."""
        self._require_complete()
        return self._handshake_hash

    @property
    def remote_static(self) -> bytes:
        """The other side's 32-byte static public key, proven. Raises ``RuntimeError`` before `complete`."""
        self._require_complete()
        return self._remote_static

    @property
    def remote_payload(self) -> bytes:
        """What the other side gave as ``payload``: opaque, at most `MAX_PAYLOAD` bytes. Raises ``RuntimeError`` before `complete`."""
        self._require_complete()
        return self._remote_payload

    def start(self) -> bytes:
        """What to send first: message 1 with its length for the initiator, nothing for the responder."""
        if self._begun:
            raise RuntimeError("the handshake has already begun")
        self._begun = True
        return self._write_handshake(self._opening) if self.initiator else b""

    def read_handshake(self, message: bytes) -> bytes:
        """Take one handshake message (without its length); returns what to send back, with its length, or nothing.

        Raises:
            RemoteProtocolError: the message is too long, damaged, forged, holds a key of low order, or was made under
                another prologue.
            RuntimeError: called before `start` or after `complete`.
        """
        if not self._begun or self.complete:
            raise RuntimeError("no handshake message is due")
        if self._failed:
            raise RemoteProtocolError("the handshake has failed")
        self._failed = True  # until proven otherwise: the library's state is of no use after a failure
        if len(message) > MAX_HANDSHAKE_MESSAGE:
            raise RemoteProtocolError("handshake message too long")
        if self.initiator and self._may_cross and len(message) == _KEY_SIZE and not self._yields_to(message):
            self._failed = False
            return b""
        assert self._connection is not None
        try:
            payload = bytes(self._connection.read_message(message))
            if len(payload) > MAX_PAYLOAD:
                raise RemoteProtocolError("handshake payload too long")
            reply = b"" if self._connection.handshake_finished else self._write_handshake(self._payload)
        except (InvalidTag, NoiseValueError, ValueError) as error:
            # A tag that does not fit, a public key cut short, and an exchange that came out all zero. The latter may
            # show only when we write: a low-order ephemeral key in message 1 meets its first exchange in message 2.
            raise RemoteProtocolError("handshake failed") from error
        self._failed = False
        self._remote_payload = payload  # the last one read: of message 2 for the initiator, of message 3 for the responder
        if self._connection.handshake_finished:
            self._split()
        return reply

    def _yields_to(self, message: bytes) -> bool:
        """Message 1 where message 2 was due: both ends have dialled (TCP simultaneous open, RFC 9293, section 3.5).

        The smaller ephemeral key stays the initiator's, and the other's message 1 is ignored, once. Neither chooses its key knowing
        the other's, and either role proves the same. The shortest message 2 is three times as long.
        """
        mine = bytes(self._state.e.public_bytes)
        if self.crossed or mine == message:  # ours, sent back to us
            raise RemoteProtocolError("handshake failed")
        self.crossed = True
        if mine < message:
            return False
        self.initiator = False
        self._make(False)
        return True

    def seal(self, plaintext: bytes) -> bytes:
        """Encrypt a stretch of the stream, of any length, into as few Noise messages as it takes, each with its length.

        Raises:
            OverflowError: 2**64 - 1 messages were sent; the session cannot go on.
            RuntimeError: before `complete`.
        """
        self._require_complete()
        encrypt = self._cipher_out.encrypt
        parts: list[bytes] = []
        with memoryview(plaintext) as view:
            for start in range(0, len(plaintext), MAX_PLAINTEXT):
                if self._send_nonce >= MAX_NONCE:
                    raise OverflowError("the nonces of this session are used up")
                message = encrypt(_NONCE.pack(self._send_nonce), view[start : start + MAX_PLAINTEXT], None)
                self._send_nonce += 1
                parts += (_MESSAGE_LENGTH.pack(len(message)), message)
        return b"".join(parts)

    def open(self, message: bytes | memoryview) -> bytes:
        """Decrypt one Noise message (without its length): the next stretch of the stream, perhaps empty.

        Raises:
            RemoteProtocolError: damaged, forged, repeated, left out, or the nonces are used up.
            RuntimeError: before `complete`.
        """
        self._require_complete()
        if self._failed:
            raise RemoteProtocolError("the session has failed")
        if self._receive_nonce >= MAX_NONCE:
            raise RemoteProtocolError("the nonces of this session are used up")
        try:
            plaintext = self._cipher_in.decrypt(_NONCE.pack(self._receive_nonce), message, None)
        except InvalidTag as error:  # also what a message shorter than its tag raises
            self._failed = True
            raise RemoteProtocolError("message not authentic") from error
        self._receive_nonce += 1
        return plaintext

    def _write_handshake(self, payload: bytes) -> bytes:
        assert self._connection is not None
        message = bytes(self._connection.write_message(payload))
        return _MESSAGE_LENGTH.pack(len(message)) + message

    def _split(self) -> None:
        """Take over the two cipher keys, and let go of all that made them.

        The library's own transport wraps each message in five calls; one is enough.
        """
        assert self._connection is not None
        protocol = self._connection.noise_protocol
        self._cipher_out = ChaCha20Poly1305(protocol.cipher_state_encrypt.k)
        self._cipher_in = ChaCha20Poly1305(protocol.cipher_state_decrypt.k)
        self._handshake_hash = bytes(self._connection.get_handshake_hash())
        self._remote_static = bytes(self._state.rs.public_bytes)
        self._connection = self._state = None
        del self._make  # and the private key with it
        self.complete = True

    def _require_complete(self) -> None:
        if not self.complete:
            raise RuntimeError("the handshake is not complete")


class FrameWriter:
    """Frames that wait to be sealed; `take` cuts the stream wherever the room ends. Large frames are held, not copied.

    Attributes:
        size: bytes of the stream that wait, lengths included.
    """

    def __init__(self) -> None:
        self.size = 0
        self._parts: deque[bytes | memoryview] = deque()

    def push(self, frame: bytes) -> None:
        """Append one frame. Raises ``ValueError`` if it is empty or longer than `MAX_FRAME`."""
        size = len(frame)
        if not 0 < size <= MAX_FRAME:
            raise ValueError(f"a frame has 1 to {MAX_FRAME} bytes, not {size}")
        if size < _JOIN_BELOW:
            self._parts.append(_FRAME_LENGTH.pack(size) + frame)
        else:
            self._parts.append(_FRAME_LENGTH.pack(size))
            self._parts.append(frame)
        self.size += 4 + size

    def take(self, limit: int) -> bytes:
        """The next ``limit`` bytes of the stream, or all of it if that is less."""
        if self.size <= limit:
            stretch = b"".join(self._parts)
            self.clear()
            return stretch
        self.size -= limit
        taken: list[bytes | memoryview] = []
        while limit:
            part = self._parts.popleft()
            if len(part) > limit:
                view = memoryview(part)
                self._parts.appendleft(view[limit:])
                part = view[:limit]
            taken.append(part)
            limit -= len(part)
        return b"".join(taken)

    def clear(self) -> None:
        """Throw everything away."""
        self._parts.clear()
        self.size = 0


class FrameReader:
    """Puts the frames of a stream together again.

    A peer that announces a large frame is given memory only as its bytes arrive, and for one frame at a time: `limit` and
    four bytes at most. Keepalives are dropped here.

    Attributes:
        limit: longest frame accepted, in bytes; may be changed at any time.
    """

    def __init__(self, limit: int = MAX_FRAME) -> None:
        self.limit = limit
        self._partial = bytearray()

    @property
    def partial(self) -> bool:
        """Whether a frame has begun and not ended."""
        return bool(self._partial)

    def feed(self, stretch: bytes, frames: list[bytes]) -> None:
        """Take the next bytes of the stream and append each frame that is now whole to ``frames``.

        Raises `RemoteProtocolError` for a frame longer than `limit`; the frames before it have been appended.
        """
        position = self._finish_partial(stretch, frames) if self._partial else 0
        end = len(stretch)
        limit, length_at = self.limit, _FRAME_LENGTH.unpack_from
        while end - position >= 4:
            (size,) = length_at(stretch, position)
            if size > limit:
                raise RemoteProtocolError("frame too long")
            stop = position + 4 + size
            if stop > end:
                break
            if size:
                frames.append(stretch[position + 4 : stop])
            position = stop
        if position < end:
            self._partial += stretch[position:]

    def _finish_partial(self, stretch: bytes, frames: list[bytes]) -> int:
        """Add to the frame that has begun what it lacks; returns how much of ``stretch`` that took."""
        partial = self._partial
        position = max(0, 4 - len(partial))
        partial += stretch[:position]
        if len(partial) < 4:
            return len(stretch)
        size: int = _FRAME_LENGTH.unpack_from(partial)[0]
        if size > self.limit:
            raise RemoteProtocolError("frame too long")
        stop = position + 4 + size - len(partial)
        with memoryview(stretch) as view:
            partial += view[position:stop]
        if len(partial) == 4 + size:
            if size:
                with memoryview(partial) as view:
                    frames.append(bytes(view[4:]))
            self._partial = bytearray()
        return min(stop, len(stretch))
