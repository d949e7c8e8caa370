"""The frames of one topic, as bytes: a bounded codec.

A frame is one type byte and one MessagePack array, decoded straight into a frozen struct (msgspec, array-like). Trailing
elements that a later version adds are ignored, and frames of an unknown type are skipped, so that versions can roll.
Whatever else is wrong with peer bytes raises `RemoteProtocolError` and nothing else.

Ages are milliseconds since publication, counted by the monotonic clocks of whoever held the envelope; instants (`timestamp`)
are the author's microseconds since 1970 and serve as an ordering key only.
"""

from itertools import accumulate
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta

from solyd_swarm.errors import RemoteProtocolError

MAX_BATCH = 4096
"""Ids in one frame: a peer that sends longer lists is cut off before it makes us allocate for them."""
MAX_RUNS = 1024
MAX_ROWS = 256
MAX_ROW = 128
"""Ids in one row of a Seek."""
MAX_MESSAGE = 16 * 1024 * 1024
"""No message is larger, whatever `max_message_size` says: relays must agree on what they pass on."""
MAX_ENVELOPE = MAX_MESSAGE + 1024
MAX_PAYLOADS = 256
MAX_PEERS = 32
MAX_ADDRESSES = 16
MAX_HOST = 64
MAX_AGE = 2**40
MAX_TIMESTAMP = 2**63 - 1
MAX_HOPS = 65_535

Id = Annotated[bytes, Meta(min_length=32, max_length=32)]
Instance = Annotated[bytes, Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]
Age = Annotated[int, Meta(ge=0, le=MAX_AGE)]
Count = Annotated[int, Meta(ge=0, lt=2**53)]
Timestamp = Annotated[int, Meta(ge=0, le=MAX_TIMESTAMP)]
AgeStep = Annotated[int, Meta(ge=-MAX_AGE, le=MAX_AGE)]
TimestampStep = Annotated[int, Meta(ge=-MAX_TIMESTAMP, le=MAX_TIMESTAMP)]
Hops = Annotated[int, Meta(ge=0, le=MAX_HOPS)]
Ttl = Annotated[int, Meta(ge=0, le=16)]
Item = tuple[Timestamp, Id]
Fingerprint = Annotated[bytes, Meta(min_length=16, max_length=16)]
Ids = Annotated[list[Id], Meta(max_length=MAX_BATCH)]
Body = Annotated[bytes, Meta(max_length=MAX_ENVELOPE)]
Host = Annotated[str, Meta(max_length=MAX_HOST)]
Port = Annotated[int, Meta(ge=1, le=65535)]


class PeerInfo(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A peer as members tell one another about it: its instance key and where it listens (IP literal, TCP port)."""

    instance: Instance
    addresses: Annotated[tuple[tuple[Host, Port], ...], Meta(max_length=MAX_ADDRESSES)] = ()


def make_peer_info(instance: bytes, addresses: tuple[tuple[str, int], ...]) -> PeerInfo:
    """An entry that every member accepts: what is too long for the wire is left out, for the encoder does not look."""
    usable = [(host, port) for host, port in addresses if len(host) <= MAX_HOST and 1 <= port <= 65535]
    return PeerInfo(instance, tuple(usable[:MAX_ADDRESSES]))


Peers = Annotated[list[PeerInfo], Meta(max_length=MAX_PEERS)]


class Frame(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base of all frames; `TYPE` is the byte that leads it."""

    TYPE: ClassVar[int] = -1


# -- membership (HyParView, DSN 2007, section 4) --------------------------------------------------------------


class Join(Frame, frozen=True, array_like=True):
    """A peer without any neighbour wants one: always accepted, at the cost of another neighbour if need be."""

    TYPE: ClassVar[int] = 0x20


class ForwardJoin(Frame, frozen=True, array_like=True):
    """A random walk that carries a newcomer to its further neighbours."""

    TYPE: ClassVar[int] = 0x21
    peer: PeerInfo
    ttl: Ttl


class Neighbor(Frame, frozen=True, array_like=True):
    """Asks to be in the other's active view; with `high` priority it may not be refused.

    `instead` names a neighbour of both (an instance key) that has stopped reading: the sender adopts those behind it.
    """

    TYPE: ClassVar[int] = 0x22
    high: bool
    instead: Annotated[bytes, Meta(max_length=32)] = b""


class NeighborReply(Frame, frozen=True, array_like=True):
    """Answers Join and Neighbor, and names others to try."""

    TYPE: ClassVar[int] = 0x23
    accepted: bool
    peers: Peers = []


class Shuffle(Frame, frozen=True, array_like=True):
    """A random walk that exchanges samples of two passive views."""

    TYPE: ClassVar[int] = 0x24
    origin: PeerInfo
    ttl: Ttl
    peers: Peers


class ShuffleReply(Frame, frozen=True, array_like=True):
    """The answer to a Shuffle; it goes back the way the walk came, so that nobody is dialled for it."""

    TYPE: ClassVar[int] = 0x25
    origin: Instance
    peers: Peers


class Disconnect(Frame, frozen=True, array_like=True):
    """The sender took the receiver out of its active view; `peers` are others to turn to, so that nobody is left alone."""

    TYPE: ClassVar[int] = 0x26
    peers: Peers = []


class Leave(Frame, frozen=True, array_like=True):
    """The sender leaves the topic for good."""

    TYPE: ClassVar[int] = 0x27


class View(Frame, frozen=True, array_like=True):
    """The sender's neighbours but the receiver, which may adopt them should the sender stop reading; replaces the one before."""

    TYPE: ClassVar[int] = 0x28
    peers: Peers


# -- broadcast (Plumtree, SRDS 2007, section 3) ---------------------------------------------------------------


class Gossip(Frame, frozen=True, array_like=True):
    """Eager push of an envelope."""

    TYPE: ClassVar[int] = 0x30
    age: Age
    hops: Hops
    body: Body
    signature: Signature


class Ihave(Frame, frozen=True, array_like=True):
    """Lazy push: envelopes the sender holds, and how many hops they had come."""

    TYPE: ClassVar[int] = 0x31
    ids: Ids
    hops: Annotated[list[Hops], Meta(max_length=MAX_BATCH)]


class Graft(Frame, frozen=True, array_like=True):
    """Makes the link eager again and asks for the envelopes that were missed on the tree."""

    TYPE: ClassVar[int] = 0x32
    ids: Ids


class Prune(Frame, frozen=True, array_like=True):
    """Makes the link lazy: it brought what was there already."""

    TYPE: ClassVar[int] = 0x33


class Ack(Frame, frozen=True, array_like=True):
    """Of the ids received on this link by Gossip, Ihave, Have and Transfer, the first `count` are now held."""

    TYPE: ClassVar[int] = 0x34
    count: Count


# -- anti-entropy ---------------------------------------------------------------------------------------------


class Summary(Frame, frozen=True, array_like=True):
    """Opens a digest round: size and fingerprint of the sender's whole set."""

    TYPE: ClassVar[int] = 0x40
    round: Count
    count: Count
    fingerprint: Fingerprint


class InSync(Frame, frozen=True, array_like=True):
    """Ends a round at once: the sets are equal."""

    TYPE: ClassVar[int] = 0x41
    round: Count


class Reconcile(Frame, frozen=True, array_like=True):
    """A Negentropy message. `query` tells the side that leads the round from the one that answers, which repeats the `step`."""

    TYPE: ClassVar[int] = 0x42
    round: Count
    query: bool
    message: Annotated[bytes, Meta(max_length=1024 * 1024)]
    step: Count = 0


class Have(Frame, frozen=True, array_like=True):
    """A result of reconciliation: the sender holds these and the receiver did not."""

    TYPE: ClassVar[int] = 0x43
    ids: Ids


class Done(Frame, frozen=True, array_like=True):
    """Ends a round: the sender has told all it holds more, and has asked for all it lacked and been answered."""

    TYPE: ClassVar[int] = 0x44
    round: Count


class Pull(Frame, frozen=True, array_like=True):
    """Asks for bodies; of those older than `max_age` the sender wants to know only that they are gone.

    A run asks for all that the receiver holds from one id to another, both included, in the order of the digest.
    """

    TYPE: ClassVar[int] = 0x45
    ids: Ids
    max_age: Age
    runs: Annotated[list[tuple[Id, Id]], Meta(max_length=MAX_RUNS)] = []


class Transfer(Frame, frozen=True, array_like=True):
    """An envelope that was pulled."""

    TYPE: ClassVar[int] = 0x46
    age: Age
    hops: Hops
    body: Body
    signature: Signature


class Gone(Frame, frozen=True, array_like=True):
    """What was pulled is held without a body. `known` is False where the sender does not know the id at all (any more)."""

    TYPE: ClassVar[int] = 0x47
    id: Id
    known: bool
    timestamp: Timestamp
    age: Age


class GoneRun(Frame, frozen=True, array_like=True):
    """As Gone with `known`, for ids that one Pull asks for one after another: from `first` to `last`, both included.

    Of the first its timestamp and age, of each further one by how much they differ from those of the one before. `fingerprint`: of
    all these ids, for what lies between the two may not be the same on both sides.
    """

    TYPE: ClassVar[int] = 0x49
    first: Id
    last: Id
    fingerprint: Fingerprint
    timestamps: Annotated[list[TimestampStep], Meta(max_length=MAX_BATCH)]
    ages: Annotated[list[AgeStep], Meta(max_length=MAX_BATCH)]

    def entries(self) -> list[tuple[int, int]]:
        """Timestamp and age of each. Raises `RemoteProtocolError` where a Gone could not hold them."""
        if len(self.timestamps) != len(self.ages):
            raise RemoteProtocolError(f"{len(self.timestamps)} timestamps and {len(self.ages)} ages in a GoneRun")
        entries = list(zip(accumulate(self.timestamps), accumulate(self.ages), strict=True))
        if not all(0 <= timestamp <= MAX_TIMESTAMP and 0 <= age <= MAX_AGE for timestamp, age in entries):
            raise RemoteProtocolError("a timestamp or an age in a GoneRun is out of bounds")
        return entries


class Seek(Frame, frozen=True, array_like=True):
    """Asks for all bodies no older than `max_age` of what others say is gone: rows of the digest, each by its first and last item, both
    included, and the fingerprint of its ids. There is no answer about the rest.
    """

    TYPE: ClassVar[int] = 0x4A
    max_age: Age
    rows: Annotated[list[tuple[Item, Item, Fingerprint]], Meta(max_length=MAX_ROWS)]


class Unmatched(Frame, frozen=True, array_like=True):
    """The first ids of rows of a Seek in which the sender has other ids: there it has to be asked by id."""

    TYPE: ClassVar[int] = 0x4B
    ids: Ids


class Proof(Frame, frozen=True, array_like=True):
    """Two envelopes of one author and epoch whose sequence ranges overlap: an equivocation."""

    TYPE: ClassVar[int] = 0x48
    age: Age
    first: Body
    first_signature: Signature
    second: Body
    second_signature: Signature


ALL_FRAMES: tuple[type[Frame], ...] = (
    Join, ForwardJoin, Neighbor, NeighborReply, Shuffle, ShuffleReply, Disconnect, Leave, View,
    Gossip, Ihave, Graft, Prune, Ack,
    Summary, InSync, Reconcile, Have, Done, Pull, Transfer, Gone, Proof, GoneRun, Seek, Unmatched,
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
_decoders: dict[int, Any] = {frame.TYPE: msgspec.msgpack.Decoder(frame).decode for frame in ALL_FRAMES}
_leads: dict[type[Frame], bytes] = {frame: bytes([frame.TYPE]) for frame in ALL_FRAMES}


def encode(frame: Frame) -> bytes:
    """The bytes of a frame: its type byte, then its fields."""
    return _leads[type(frame)] + _encoder.encode(frame)


def decode(data: bytes | memoryview) -> Frame | None:
    """The frame in `data`, or None where its type is unknown here. Raises `RemoteProtocolError`."""
    if not data:
        raise RemoteProtocolError("an empty frame")
    decoder = _decoders.get(data[0])
    if decoder is None:
        return None
    try:
        frame: Frame = decoder(memoryview(data)[1:])
    # RecursionError: nesting that msgspec skips over as unknown trailing elements.
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise RemoteProtocolError(f"a malformed frame of type {data[0]:#04x}: {error}") from None
    return frame
