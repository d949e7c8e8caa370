"""What is derived from a topic and its secret, and how authors are written.

Everything that identifies a topic on a wire is a keyed BLAKE2b (RFC 7693) under the topic key, so that it means
nothing to whoever does not know the topic. Without a ``secret`` a guessable topic can be guessed.
"""

from base64 import b64decode, b64encode
from hashlib import blake2b

AUTHOR_SUFFIX = ".ed25519"


def derive_topic_key(topic: str, secret: bytes | None = None) -> bytes:
    """The 32-byte key of a topic: ``BLAKE2b(topic, secret)``. A secret of any length is hashed to a key first."""
    key = b"" if secret is None else blake2b(secret, digest_size=64, person=b"solyd secret").digest()
    return blake2b(topic.encode("utf-8", "surrogatepass"), key=key, digest_size=32, person=b"solyd topic").digest()


def derive(topic_key: bytes, purpose: bytes, *parts: bytes, size: int = 32) -> bytes:
    """``size`` bytes for one purpose, bound to ``parts`` (each is length-prefixed, so that no two splits collide)."""
    state = blake2b(key=topic_key, digest_size=size, person=b"solyd derive")
    for part in (purpose, *parts):
        state.update(len(part).to_bytes(4, "big"))
        state.update(part)
    return state.digest()


def derive_topic_id(topic_key: bytes) -> bytes:
    """The 16 bytes that bind an envelope to its topic; they travel inside authenticated channels only."""
    return derive(topic_key, b"topic id", size=16)


def topic_tag(topic_key: bytes, handshake_hash: bytes, role: bytes) -> bytes:
    """A proof of knowing the topic, worth something on one channel and from one role only.

    Args:
        handshake_hash: the Noise handshake hash of the channel.
        role: ``b"initiator"`` or ``b"responder"``: the role of the one who shows the tag.
    """
    return derive(topic_key, b"tag", handshake_hash, role, size=32)


def format_author(public_key: bytes) -> str:
    """``"<base64 of the 32-byte Ed25519 public key>.ed25519"``."""
    return b64encode(public_key).decode("ascii") + AUTHOR_SUFFIX


def parse_author(author: str) -> bytes:
    """The 32-byte public key of an author's id. Raises ``ValueError`` for anything else."""
    if not author.endswith(AUTHOR_SUFFIX):
        raise ValueError(f"not an author id: {author!r}")
    key = b64decode(author[: -len(AUTHOR_SUFFIX)], validate=True)
    if len(key) != 32:
        raise ValueError(f"not an author id: {author!r}")
    return key


def format_message_id(author: bytes, epoch: int, sequence: int) -> str:
    """The id of a message, equal at every peer: author, epoch and sequence, joined by colons."""
    return f"{format_author(author)}:{epoch}:{sequence}"
