"""Which topics both ends of a channel know, found out without telling anything about the others. Without IO.

The initiator shows a tag per topic, under numbers of its own choosing, and again whenever it joins another topic. The
responder answers only the tags it can match, with a tag of its own role; a tag shown back is worthless. It keeps the
others, bounded, and tries them again when it joins a topic itself. Only then do the two tell their author ids, each with a
signature over this very channel.
"""

import hmac
from collections.abc import Callable
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from solyd_swarm.core.envelope import verify_ed25519
from solyd_swarm.core.keys import topic_tag
from solyd_swarm.core.wire import MAX_ADDRESSES, Host, Port
from solyd_swarm.errors import RemoteProtocolError

OFFER, ACCEPT, AUTHOR, WITHDRAW, TOPIC = 0x01, 0x02, 0x03, 0x04, 0x10
"""Frame types of a channel; TOPIC leads a two-byte topic number (big-endian) and a frame of that topic."""
MAX_OFFERS = 256
"""Tags that one initiator may show: bounds what a stranger can make us keep. Beyond that its channel is closed."""
AUTHOR_DOMAIN = b"solyd_swarm author v1\0"

Number = Annotated[int, Meta(ge=1, le=65535)]
Tag = Annotated[bytes, Meta(min_length=32, max_length=32)]
Change = tuple[Literal["up", "down"], bytes]
"""What became of a topic, by topic key."""


class _Offer(msgspec.Struct, frozen=True, array_like=True):
    tags: Annotated[list[tuple[Number, Tag]], Meta(max_length=MAX_OFFERS)]


class _Accept(msgspec.Struct, frozen=True, array_like=True):
    number: Number
    tag: Tag


class _Author(msgspec.Struct, frozen=True, array_like=True):
    author: Annotated[bytes, Meta(min_length=32, max_length=32)]
    signature: Annotated[bytes, Meta(min_length=64, max_length=64)]
    addresses: Annotated[tuple[tuple[Host, Port], ...], Meta(max_length=MAX_ADDRESSES)]


class _Withdraw(msgspec.Struct, frozen=True, array_like=True):
    number: Number


_encode = msgspec.msgpack.Encoder().encode
_offer = msgspec.msgpack.Decoder(_Offer).decode
_accept = msgspec.msgpack.Decoder(_Accept).decode
_author = msgspec.msgpack.Decoder(_Author).decode
_withdraw = msgspec.msgpack.Decoder(_Withdraw).decode


class Matcher:
    """The topics of one channel.

    Args:
        initiator: whether this side dialled.
        handshake_hash: of the channel.
        send: queues a frame on the channel.
        author, sign: our Ed25519 public key, and what signs with it.
        addresses: tells where we listen, for members of a common topic.
    """

    def __init__(
        self,
        initiator: bool,
        handshake_hash: bytes,
        send: Callable[[bytes], None],
        author: bytes,
        sign: Callable[[bytes], bytes],
        addresses: Callable[[], tuple[tuple[str, int], ...]],
    ) -> None:
        self.remote_author: bytes | None = None
        self.remote_addresses: tuple[tuple[str, int], ...] = ()
        self.numbers: dict[bytes, int] = {}  # topics that both ends know: topic key -> number
        self.topics: dict[int, bytes] = {}
        self._initiator = initiator
        self._hash = handshake_hash
        self._send = send
        self._own_author = author
        self._sign = sign
        self._addresses = addresses
        self._joined: dict[bytes, None] = {}
        self._next_number = 1
        self._offers: dict[int, bytes] = {}  # initiator: topic keys offered; responder: tags shown to us and not matched
        self._introduced = False

    def join(self, *topic_keys: bytes) -> list[Change]:
        """We have joined these topics."""
        self._joined.update(dict.fromkeys(topic_keys))
        if not self._initiator:
            return self._match(topic_keys)
        tags = []
        for key in topic_keys:
            # A number never comes back: a late frame of an earlier membership must not be taken for one of this.
            self._offers[self._next_number] = key
            tags.append((self._next_number, topic_tag(key, self._hash, b"initiator")))
            self._next_number += 1
        if tags:
            self._send(bytes([OFFER]) + _encode(_Offer(tags)))
        return []

    def leave(self, topic_key: bytes) -> None:
        """We have left a topic; the other side hears of it where it knows the topic too."""
        self._joined.pop(topic_key, None)
        number = self.numbers.pop(topic_key, None)
        if number is not None:
            del self.topics[number]
            self._send(bytes([WITHDRAW]) + _encode(_Withdraw(number)))
        if self._initiator:
            self._offers = {number: key for number, key in self._offers.items() if key != topic_key}

    def handle(self, frame: bytes) -> list[Change]:
        """A frame of the peer that is none of a topic; unknown types are skipped. Raises `RemoteProtocolError`."""
        kind, body = frame[0], memoryview(frame)[1:]
        try:
            if kind == OFFER:
                return self._offered(_offer(body))
            if kind == ACCEPT:
                return self._accepted(_accept(body))
            if kind == AUTHOR:
                return self._introduced_by(_author(body))
            if kind == WITHDRAW:
                return self._withdrawn(_withdraw(body))
        except (msgspec.DecodeError, RecursionError) as error:
            raise RemoteProtocolError(f"a malformed frame of type {kind:#04x}: {error}") from None
        return []

    def _offered(self, frame: _Offer) -> list[Change]:
        if self._initiator:
            raise RemoteProtocolError("tags from the responder")
        if len(self._offers) + len(self.topics) + len(frame.tags) > MAX_OFFERS:
            raise RemoteProtocolError("too many tags")
        for number, tag in frame.tags:
            if number in self._offers or number in self.topics:
                raise RemoteProtocolError("a topic number used twice")
            self._offers[number] = tag
        return self._match(tuple(self._joined))

    def _match(self, topic_keys: tuple[bytes, ...]) -> list[Change]:
        """Responder: tries the tags that were shown against these topics."""
        changes: list[Change] = []
        for key in topic_keys:
            expected = topic_tag(key, self._hash, b"initiator")
            # The newest offer counts: an older one of the same topic was withdrawn by leaving it.
            for number in reversed(self._offers):
                if key not in self.numbers and hmac.compare_digest(self._offers[number], expected):
                    self._send(bytes([ACCEPT]) + _encode(_Accept(number, topic_tag(key, self._hash, b"responder"))))
                    changes += self._link(number, key)
        for number in self.topics:
            self._offers.pop(number, None)
        return changes

    def _accepted(self, frame: _Accept) -> list[Change]:
        if not self._initiator:
            raise RemoteProtocolError("an answer to tags that were never shown")
        key = self._offers.get(frame.number)
        if key is None or key in self.numbers:
            return []  # we have left it meanwhile
        if not hmac.compare_digest(frame.tag, topic_tag(key, self._hash, b"responder")):
            raise RemoteProtocolError("a wrong tag")
        return self._link(frame.number, key)

    def _link(self, number: int, key: bytes) -> list[Change]:
        self.numbers[key] = number
        self.topics[number] = key
        if not self._introduced:
            self._introduced = True
            role = b"initiator" if self._initiator else b"responder"
            signature = self._sign(AUTHOR_DOMAIN + self._hash + role)
            self._send(bytes([AUTHOR]) + _encode(_Author(self._own_author, signature, self._addresses()[:MAX_ADDRESSES])))
        return [("up", key)] if self.remote_author is not None else []

    def _introduced_by(self, frame: _Author) -> list[Change]:
        if self.remote_author is not None:
            raise RemoteProtocolError("an author id told twice")
        role = b"responder" if self._initiator else b"initiator"
        if not verify_ed25519(frame.author, frame.signature, AUTHOR_DOMAIN + self._hash + role):
            raise RemoteProtocolError("an author id with a wrong signature")
        self.remote_author, self.remote_addresses = frame.author, frame.addresses
        return [("up", key) for key in self.numbers]

    def _withdrawn(self, frame: _Withdraw) -> list[Change]:
        key = self.topics.pop(frame.number, None)
        if key is None:
            return []
        del self.numbers[key]
        if self._initiator:
            # The responder has left and may come back: it still has our tag if we show it once more.
            self._offers.pop(frame.number, None)
            self.join(key)
        return [("down", key)] if self.remote_author is not None else []
