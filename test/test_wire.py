"""The codec: what is encoded comes back, and whatever else arrives raises `RemoteProtocolError` and nothing else."""

import tracemalloc
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solyd_swarm.core import wire
from solyd_swarm.core.wire import ALL_FRAMES, Frame, PeerInfo, decode, encode, make_peer_info
from solyd_swarm.errors import RemoteProtocolError


def values(kind: Any) -> st.SearchStrategy[Any]:
    """All that a field of this type may hold, from the bounds it declares; long lists are kept short."""
    match kind:
        case msgspec.inspect.BoolType():
            return st.booleans()
        case msgspec.inspect.IntType():
            return st.integers(kind.ge, kind.le if kind.le is not None else kind.lt - 1)
        case msgspec.inspect.BytesType():
            return st.binary(min_size=kind.min_length or 0, max_size=min(kind.max_length, 64))
        case msgspec.inspect.StrType():
            return st.text(st.characters(exclude_categories=["Cs"]), max_size=kind.max_length)
        case msgspec.inspect.ListType():
            return st.lists(values(kind.item_type), max_size=4)
        case msgspec.inspect.VarTupleType():
            return st.lists(values(kind.item_type), max_size=4).map(tuple)
        case msgspec.inspect.TupleType():
            return st.tuples(*map(values, kind.item_types))
        case msgspec.inspect.StructType():
            return st.builds(kind.cls, *[values(each.type) for each in kind.fields])
    raise AssertionError(f"no strategy for {kind}")


frames: st.SearchStrategy[Frame] = st.one_of(*[values(msgspec.inspect.type_info(each)) for each in ALL_FRAMES])


@given(frames)
@settings(max_examples=600)
def test_every_frame_comes_back_as_it_was(frame: Frame) -> None:
    assert decode(encode(frame)) == frame
    assert decode(memoryview(encode(frame))) == frame


def test_each_frame_has_a_type_of_its_own() -> None:
    assert len({each.TYPE for each in ALL_FRAMES}) == len(ALL_FRAMES)
    assert all(0 <= each.TYPE <= 255 for each in ALL_FRAMES)


def try_decode(data: bytes) -> None:
    try:
        frame = decode(data)
    except RemoteProtocolError:
        return
    assert frame is None or isinstance(frame, Frame)


@given(st.binary(max_size=200))
@settings(max_examples=500)
def test_arbitrary_bytes_raise_only_what_they_may(data: bytes) -> None:
    try_decode(data)


@given(st.sampled_from(ALL_FRAMES), st.binary(max_size=200))
@settings(max_examples=1000)
def test_arbitrary_fields_raise_only_what_they_may(kind: type[Frame], data: bytes) -> None:
    try_decode(bytes([kind.TYPE]) + data)


@given(frames, st.data())
@settings(max_examples=600)
def test_altered_frames_raise_only_what_they_may(frame: Frame, data: st.DataObject) -> None:
    raw = bytearray(encode(frame))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try_decode(bytes(raw))
    try_decode(bytes(raw[: data.draw(st.integers(0, len(raw)))]))


numbers = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False)
anything = st.recursive(
    st.none() | st.booleans() | numbers | st.binary(max_size=40) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=20,
)


@given(st.sampled_from(ALL_FRAMES), anything)
@settings(max_examples=600)
def test_fields_of_any_other_type_raise_only_what_they_may(kind: type[Frame], fields: object) -> None:
    try_decode(bytes([kind.TYPE]) + msgspec.msgpack.encode(fields))


@given(frames, st.lists(anything, min_size=1, max_size=3))
@settings(max_examples=300)
def test_fields_that_a_later_version_adds_are_ignored(frame: Frame, added: list[object]) -> None:
    raw = encode(frame)
    fields = msgspec.msgpack.decode(raw[1:])
    assert decode(raw[:1] + msgspec.msgpack.encode([*fields, *added])) == frame


def test_frames_of_an_unknown_type_are_skipped() -> None:
    known = {each.TYPE for each in ALL_FRAMES}
    for kind in set(range(256)) - known:
        assert decode(bytes([kind]) + b"\xff" * 20) is None


def test_an_empty_frame_is_refused() -> None:
    with pytest.raises(RemoteProtocolError):
        decode(b"")


def test_bytes_after_the_frame_are_refused() -> None:
    with pytest.raises(RemoteProtocolError):
        decode(encode(wire.Leave()) + b"\0")


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa0", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff\x91"])
@pytest.mark.parametrize("kind", ALL_FRAMES)
def test_deep_nesting_is_refused_not_fatal(kind: type[Frame], opening: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(bytes([kind.TYPE]) + opening * 100_000)


@pytest.mark.parametrize("header", [opening + b"\xff" * 4 for opening in (b"\xdd", b"\xc6", b"\xdb", b"\xdf")] + [b"\xdc\xff\xff"])
@pytest.mark.parametrize("kind", ALL_FRAMES)
def test_a_length_that_is_only_claimed_costs_nothing(kind: type[Frame], header: bytes) -> None:
    tracemalloc.start()
    try:
        for valid in range(4):  # the claim stands at any place in the frame
            with pytest.raises(RemoteProtocolError):
                decode(bytes([kind.TYPE]) + b"\x96" + b"\xc4\x20" + bytes(32) + b"\x00" * valid + header)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


ID = bytes(32)
SIGNATURE = bytes(64)
PEER = PeerInfo(ID, (("192.0.2.1", 1),))


@pytest.mark.parametrize(
    "frame",
    [
        wire.Ihave([ID] * (wire.MAX_BATCH + 1), []),
        wire.Ihave([], [0] * (wire.MAX_BATCH + 1)),
        wire.Ihave([ID], [wire.MAX_HOPS + 1]),
        wire.Ihave([bytes(31)], [0]),
        wire.Graft([ID] * (wire.MAX_BATCH + 1)),
        wire.Have([ID] * (wire.MAX_BATCH + 1)),
        wire.Pull([ID] * (wire.MAX_BATCH + 1), 0),
        wire.Pull([], wire.MAX_AGE + 1),
        wire.Pull([], -1),
        wire.NeighborReply(True, [PEER] * (wire.MAX_PEERS + 1)),
        wire.Disconnect([PEER] * (wire.MAX_PEERS + 1)),
        wire.Shuffle(PEER, 6, [PEER] * (wire.MAX_PEERS + 1)),
        wire.Shuffle(PEER, 17, []),
        wire.ForwardJoin(PeerInfo(bytes(33)), 1),
        wire.ForwardJoin(PeerInfo(ID, (("x" * 65, 1),)), 1),
        wire.ForwardJoin(PeerInfo(ID, (("192.0.2.1", 0),)), 1),
        wire.ForwardJoin(PeerInfo(ID, (("192.0.2.1", 1),) * 17), 1),
        wire.Gossip(-1, 0, b"", SIGNATURE),
        wire.Gossip(0, 0, bytes(wire.MAX_ENVELOPE + 1), SIGNATURE),
        wire.Gossip(0, 0, b"", bytes(65)),
        wire.Reconcile(0, True, bytes(1024 * 1024 + 1)),
        wire.Summary(2**53, 0, bytes(16)),
        wire.Summary(0, 0, bytes(17)),
        wire.Gone(ID, True, 2**63, 0),
        wire.GoneRun(ID, ID, bytes(15), [1], [1]),
        wire.GoneRun(ID, ID, bytes(16), [1] * (wire.MAX_BATCH + 1), [1]),
        wire.GoneRun(ID, ID, bytes(16), [2**63], [1]),
        wire.GoneRun(ID, ID, bytes(16), [1], [-wire.MAX_AGE - 1]),
        wire.Seek(-1, []),
        wire.Seek(0, [((0, ID), (0, ID), bytes(16))] * (wire.MAX_ROWS + 1)),
        wire.Seek(0, [((-1, ID), (0, ID), bytes(16))]),
        wire.Seek(0, [((0, ID), (0, bytes(31)), bytes(16))]),
        wire.Seek(0, [((0, ID), (0, ID), bytes(15))]),
        wire.Unmatched([ID] * (wire.MAX_BATCH + 1)),
        wire.Ack(-1),
    ],
)
def test_what_is_out_of_bounds_is_refused(frame: Frame) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(encode(frame))


def test_what_is_just_within_bounds_is_taken() -> None:
    for frame in (
        wire.Ihave([ID] * wire.MAX_BATCH, [wire.MAX_HOPS] * wire.MAX_BATCH),
        wire.Gossip(wire.MAX_AGE, wire.MAX_HOPS, bytes(wire.MAX_ENVELOPE), SIGNATURE),
        wire.Disconnect([PeerInfo(ID, (("x" * 64, 65535),) * wire.MAX_ADDRESSES)] * wire.MAX_PEERS),
    ):
        assert decode(encode(frame)) == frame


def test_a_run_of_what_is_gone_tells_differences() -> None:
    assert wire.GoneRun(ID, ID, bytes(16), [5, 2, -3], [9, -2, 1]).entries() == [(5, 9), (7, 7), (4, 8)]
    assert wire.GoneRun(ID, ID, bytes(16), [], []).entries() == []


@pytest.mark.parametrize(
    ("timestamps", "ages"),
    [
        ([1, 2], [1]),
        ([1, -2], [0, 0]),
        ([wire.MAX_TIMESTAMP, 1], [0, 0]),
        ([0, 0], [1, -2]),
        ([0, 0], [wire.MAX_AGE, 1]),
    ],
)
def test_a_run_of_what_cannot_be_is_refused(timestamps: list[int], ages: list[int]) -> None:
    with pytest.raises(RemoteProtocolError):
        wire.GoneRun(ID, ID, bytes(16), timestamps, ages).entries()


def test_an_entry_made_of_what_a_source_says_is_taken_by_every_member() -> None:
    odd = tuple([("x" * 100, 1), ("192.0.2.1", 0), ("192.0.2.1", 70_000)] + [("192.0.2.1", port) for port in range(1, 100)])
    info = make_peer_info(ID, odd)
    assert info.addresses == odd[3 : 3 + wire.MAX_ADDRESSES]
    assert decode(encode(wire.ForwardJoin(info, 1))) == wire.ForwardJoin(info, 1)
