"""The envelope: what an author signs, what is deduplicated, and what the digest holds.

Everything published in one turn of the loop shares an envelope, so that one signature and one verification serve many
messages. Its id is BLAKE2b-256 of the signed bytes without the signature; Ed25519 (RFC 8032) signs that id under a prefix
of its own, so that no signature made here can pass for one made for another purpose.
"""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Annotated

import msgspec
from msgspec import Meta
from nacl.bindings import crypto_sign_open
from nacl.exceptions import BadSignatureError

from solyd_swarm.core.wire import MAX_ENVELOPE, MAX_MESSAGE, MAX_PAYLOADS
from solyd_swarm.errors import RemoteProtocolError

SIGNATURE_PREFIX = b"solyd_swarm envelope v1\0"
ENVELOPE_BYTES = 48 * 1024
"""An envelope closes here, so that it fits one Noise message; a larger message travels alone, in fragments."""
MAX_SEQUENCE = 2**53

Signer = Callable[[bytes], bytes]
"""Makes the 64-byte Ed25519 signature of some bytes."""
Verifier = Callable[[bytes, bytes, bytes], bool]
"""(public key, signature, data) -> whether the signature is good."""


class _Signed(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The signed bytes, as a MessagePack array."""

    topic: Annotated[bytes, Meta(min_length=16, max_length=16)]
    author: Annotated[bytes, Meta(min_length=32, max_length=32)]
    epoch: Annotated[int, Meta(ge=1, le=2**63 - 1)]
    first: Annotated[int, Meta(ge=1, lt=MAX_SEQUENCE)]
    time: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    payloads: Annotated[tuple[bytes, ...], Meta(min_length=1, max_length=MAX_PAYLOADS)]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Signed)


@dataclass(frozen=True, slots=True, eq=False)
class Envelope:
    """A decoded envelope. `time` is the author's clock, in microseconds since 1970; sequences run from `first` to `last`.

    `payloads` is empty once they are `shed`; `count` then tells how many there were.
    """

    id: bytes
    author: bytes
    epoch: int
    first: int
    time: int
    payloads: tuple[bytes, ...]
    body: bytes
    signature: bytes
    count: int = 0

    @property
    def last(self) -> int:
        return self.first + (self.count or len(self.payloads)) - 1

    def shed(self) -> "Envelope":
        """The same without its payloads: whoever only passes it on has them in `body` already, and need not keep them twice."""
        return Envelope(self.id, self.author, self.epoch, self.first, self.time, (), self.body, self.signature, len(self.payloads))

    @property
    def size(self) -> int:
        return len(self.body)


def envelope_id(body: bytes) -> bytes:
    """BLAKE2b-256 of the signed bytes."""
    return blake2b(body, digest_size=32).digest()


def seal(topic_id: bytes, author: bytes, epoch: int, first: int, time: int, payloads: tuple[bytes, ...], sign: Signer) -> Envelope:
    """Makes and signs an envelope of our own; the caller keeps to `MAX_PAYLOADS` and `MAX_MESSAGE`."""
    body = _encoder.encode(_Signed(topic_id, author, epoch, first, time, payloads))
    id = envelope_id(body)
    return Envelope(id, author, epoch, first, time, payloads, body, sign(SIGNATURE_PREFIX + id))


def verify_ed25519(public_key: bytes, signature: bytes, data: bytes) -> bool:
    """Whether `signature` is the Ed25519 signature of `data` under `public_key` (libsodium's strict rules)."""
    try:
        crypto_sign_open(signature + data, public_key)
    except (BadSignatureError, ValueError):
        return False
    return True


def open_envelope(topic_id: bytes, body: bytes, signature: bytes, verify: Verifier = verify_ed25519, *, id: bytes = b"") -> Envelope:
    """Checks all that every relay checks alike: framing, topic, bounds, signature. Payloads stay opaque.

    Args:
        id: the envelope id of `body`, where the caller has computed it already.

    Raises:
        RemoteProtocolError: whoever sent it forged it, or did not check what it relayed.
    """
    if len(body) > MAX_ENVELOPE:
        raise RemoteProtocolError(f"an envelope of {len(body)} bytes; at most {MAX_ENVELOPE} are allowed")
    try:
        signed = _decoder.decode(body)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise RemoteProtocolError(f"a malformed envelope: {error}") from None
    if signed.topic != topic_id:
        raise RemoteProtocolError("an envelope of another topic")
    if len(signed.payloads) > 1 and len(body) > 2 * ENVELOPE_BYTES:
        raise RemoteProtocolError("an envelope of many messages that should have closed earlier")
    if max(map(len, signed.payloads)) > MAX_MESSAGE or signed.first + len(signed.payloads) > MAX_SEQUENCE:
        raise RemoteProtocolError("an envelope out of bounds")
    id = id or envelope_id(body)
    if not verify(signed.author, signature, SIGNATURE_PREFIX + id):
        raise RemoteProtocolError("an envelope with a wrong signature")
    return Envelope(id, signed.author, signed.epoch, signed.first, signed.time, signed.payloads, body, signature)


def split_batch(payloads: list[bytes]) -> list[tuple[bytes, ...]]:
    """Cuts what was published in one turn into envelopes: at 256 messages or 48 KiB; a larger message goes alone."""
    batches: list[tuple[bytes, ...]] = []
    start = size = 0
    for index, payload in enumerate(payloads):
        length = len(payload) + 5  # 5: the longest MessagePack header of a byte string
        if index > start and (size + length > ENVELOPE_BYTES or index - start == MAX_PAYLOADS):
            batches.append(tuple(payloads[start:index]))
            start, size = index, 0
        size += length
    if start < len(payloads):
        batches.append(tuple(payloads[start:]))
    return batches


def equivocate(one: Envelope, other: Envelope) -> bool:
    """Whether two verified envelopes convict their author: one epoch, overlapping sequences, different content."""
    return (
        one.author == other.author
        and one.epoch == other.epoch
        and one.id != other.id
        and one.first <= other.last
        and other.first <= one.last
    )


def equivocation_id(author: bytes, epoch: int) -> bytes:
    """The one digest item that stands for everything of an author and epoch that equivocated."""
    return blake2b(author + epoch.to_bytes(8, "big"), digest_size=32, person=b"solyd equivocat").digest()
