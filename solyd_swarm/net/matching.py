"""Which topics both ends of a channel know, found out without telling anything about the others. Without IO.

The initiator shows a tag per topic, under numbers of its own choosing, and again whenever it joins another topic. The
responder answers only the tags it can match, with a tag of its own role; a tag shown back is worthless. It keeps the
others, bounded, and tries them again when it joins a topic itself. Only then do the two tell their author ids, each with a
signature over this very channel.
"""

import hmac
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from solyd_swarm.core.envelope import verify_ed25519
from solyd_swarm.core.keys import topic_tag
from solyd_swarm.core.wire import MAX_ADDRESSES, Host, Port
from solyd_swarm.errors import RemoteProtocolError

OFFER, ACCEPT, AUTHOR, WITHDRAW, TOPIC = 0x01, 0x02, 0x03, 0x04, 0x10
"""Frame types of a channel; TOPIC leads a two-byte topic number (big-endian) and a frame of that topic."""
MAX_OFFERS = 1024
"""Tags that one initiator may have shown and not withdrawn: bounds what a stranger can make us keep. Beyond that its channel is
closed. An honest initiator with more topics shows the others as it leaves some."""
MAX_NUMBER = 65535
"""Topic numbers of one channel; nothing more is offered after that, which bounds a responder that joins and leaves without end."""
AUTHOR_DOMAIN = b"solyd_swarm author v1\0"

Number = Annotated[int, Meta(ge=1, le=MAX_NUMBER)]
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


@dataclass(frozen=True, slots=True)
class Identity:
    """Our Ed25519 public key, and what signs with it."""

    author: bytes
    sign: Callable[[bytes], bytes]


class Matcher:
    """The topics of one channel.

    Args:
        initiator: whether this side dialled.
        handshake_hash: of the channel.
        send: queues a frame on the channel.
        identity: whose author id is told.
        addresses: tells where we listen, for members of a common topic.
    """

    def __init__(
        self,
        initiator: bool,
        handshake_hash: bytes,
        send: Callable[[bytes], None],
        identity: Identity,
        addresses: Callable[[], tuple[tuple[str, int], ...]],
    ) -> None:
        self.remote_author: bytes | None = None
        self.remote_addresses: tuple[tuple[str, int], ...] = ()
        self.numbers: dict[bytes, int] = {}  # topics that both ends know: topic key -> number
        self.topics: dict[int, bytes] = {}
        self._initiator = initiator
        self._hash = handshake_hash
        self._send = send
        self._identity = identity
        self._addresses = addresses
        self._joined: dict[bytes, bytes] = {}  # topic key -> the initiator's tag of it
        self._shown: dict[bytes, int] = {}  # initiator: topics shown and not withdrawn since, matched or not, with their numbers
        self._offers: dict[int, bytes] = {}  # responder: tags shown to us and not matched
        self._last_number = 0
        self._introduced = False

    def join(self, *topic_keys: bytes) -> list[Change]:
        """We have joined these topics."""
        self._joined |= {key: topic_tag(key, self._hash, b"initiator") for key in topic_keys}
        if self._initiator:
            self._show()
            return []
        changes: list[Change] = []
        for key in topic_keys:
            # The newest offer counts, should a peer show one tag under several numbers.
            number = next((number for number in reversed(self._offers) if self._offers[number] == self._joined[key]), None)
            if number is not None:
                changes += self._answer(number, key)
        return changes

    def leave(self, topic_key: bytes) -> None:
        """We have left a topic; the other side hears of it if it can know the topic, or may come to know it later."""
        if self._joined.pop(topic_key, None) is None:
            return
        number = self.numbers.pop(topic_key, None)
        if number is not None:
            del self.topics[number]
        # Also of what was not matched: the responder would keep the tag, and one day match it.
        number = self._shown.pop(topic_key, None) or number
        if number is not None:
            self._send(bytes([WITHDRAW]) + _encode(_Withdraw(number)))
        if self._initiator:
            self._show()

    def _show(self) -> None:
        """Initiator: shows the tags that were not shown yet, as many as the responder keeps."""
        room = min(MAX_OFFERS - len(self._shown), MAX_NUMBER - self._last_number)
        tags: list[tuple[int, bytes]] = []
        for key in [key for key in self._joined if key not in self._shown][: max(room, 0)]:
            # A number never comes back: a late frame of an earlier membership must not be taken for one of this.
            self._last_number += 1
            self._shown[key] = self._last_number
            tags.append((self._last_number, self._joined[key]))
        if tags:
            self._send(bytes([OFFER]) + _encode(_Offer(tags)))

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
        keys = {tag: key for key, tag in self._joined.items()}
        changes: list[Change] = []
        for number, tag in frame.tags:
            if number <= self._last_number:
                raise RemoteProtocolError("a topic number used twice")
            self._last_number = number
            self._offers[number] = tag
            key = keys.get(tag)
            if key is not None:
                changes += self._answer(number, key)
        return changes

    def _answer(self, number: int, key: bytes) -> list[Change]:
        """Responder: the tag under this number is that of a topic of ours."""
        if key in self.numbers:
            return []
        del self._offers[number]
        self._send(bytes([ACCEPT]) + _encode(_Accept(number, topic_tag(key, self._hash, b"responder"))))
        return self._link(number, key)

    def _accepted(self, frame: _Accept) -> list[Change]:
        if not self._initiator or frame.number > self._last_number:
            raise RemoteProtocolError("an answer to tags that were never shown")
        key = next((key for key, number in self._shown.items() if number == frame.number), None)
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
            signature = self._identity.sign(AUTHOR_DOMAIN + self._hash + role)
            self._send(bytes([AUTHOR]) + _encode(_Author(self._identity.author, signature, self._addresses()[:MAX_ADDRESSES])))
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
        self._offers.pop(frame.number, None)
        key = self.topics.pop(frame.number, None)
        if key is None:
            return []
        del self.numbers[key]
        if self._initiator:
            # The responder has left and may come back: it is shown a tag once more, to keep.
            del self._shown[key]
            self._show()
        return [("down", key)] if self.remote_author is not None else []
