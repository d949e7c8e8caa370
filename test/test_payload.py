"""Payloads arrive equal or are refused with their place, and no bytes raise anything but `PayloadError`."""

import contextlib
import math
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from fractions import Fraction
from pathlib import Path
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solyd_swarm.errors import PayloadError, PublishError, UnpublishableType, UnpublishableValue
from solyd_swarm.payload import MAX_COMPARISONS, MAX_DEPTH, decode, encode

Point = namedtuple("Point", "x y")


class Colour(Enum):
    RED = "red"


class Level(IntEnum):
    LOW = 1


class Name(StrEnum):
    ANNA = "anna"


class Text(str):
    pass


class Shouting(str):
    """A str that does not equal its plain self."""

    def __eq__(self, other: object) -> bool:
        return other == str(self).upper()

    __hash__ = str.__hash__


class Loud(list[Any]):
    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = None


@dataclass
class Record:
    a: int = 1


class Struct(msgspec.Struct):
    a: int = 1


class Timestamp(datetime):
    """Like pandas': counts in nanoseconds."""

    nanosecond = 7

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = datetime.__hash__


class Nowhere(tzinfo):
    def utcoffset(self, when: datetime | None) -> None:
        return None

    dst = tzname = utcoffset


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.binary()
    | st.datetimes(
        min_value=datetime(1, 1, 3),
        max_value=datetime(9999, 12, 29),
        timezones=st.builds(timezone, st.timedeltas(timedelta(hours=-23), timedelta(hours=23))),
    )
)
objects = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(scalars, inner), max_leaves=30)


def same(a: object, b: object) -> bool:
    """Equal, and of equal types all the way down, as ``==`` alone does not tell (True == 1 == 1.0)."""
    if type(a) is not type(b) or a != b:
        return False
    if isinstance(a, list) and isinstance(b, list):
        return all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return all(same(a[key], b[key]) for key in a) and Counter(map(type, a)) == Counter(map(type, b))
    return True


@given(objects)
@settings(deadline=None)
def test_round_trip(obj: object) -> None:
    assert same(decode(encode(obj)), obj)


@given(objects)
@settings(deadline=None)
def test_fast_and_slow_path_agree(obj: object) -> None:
    assert encode([obj, Name.ANNA]) == encode([obj, "anna"])


@pytest.mark.parametrize(
    ("obj", "arrives"),
    [
        ((1, (2,)), [1, [2]]),
        (Point(1, 2), [1, 2]),
        ({"a": (1, datetime(2020, 1, 1, tzinfo=UTC))}, {"a": [1, datetime(2020, 1, 1, tzinfo=UTC)]}),
        (OrderedDict(a=1), {"a": 1}),
        (defaultdict(list, a=[(1,)]), {"a": [[1]]}),
        (Counter("aab"), {"a": 2, "b": 1}),
        (OrderedDict(a=math.inf, b=(1,)), {"a": math.inf, "b": [1]}),
        (Level.LOW, 1),
        ({Level.LOW: Name.ANNA}, {1: "anna"}),
        ([Text("x")], ["x"]),
        (
            {1: "int", "1": "str", b"1": "bytes", None: "none", 1.5: "float"},
            {1: "int", "1": "str", b"1": "bytes", None: "none", 1.5: "float"},
        ),
        (2**64 - 1, 2**64 - 1),
        (-(2**63), -(2**63)),
    ],
)
def test_what_arrives(obj: object, arrives: object) -> None:
    assert same(decode(encode(obj)), arrives)


def test_special_floats() -> None:
    arrived = decode(encode([math.nan, -0.0, -math.inf, 5e-324, {1: math.nan}]))
    assert isinstance(arrived, list)
    assert math.isnan(arrived[0])
    assert math.copysign(1, arrived[1]) == -1
    assert arrived[2:4] == [-math.inf, 5e-324]
    assert math.isnan(arrived[4][1])


@pytest.mark.parametrize("fold", [0, 1])
@pytest.mark.parametrize("when", [datetime(2023, 10, 29, 2, 30, 0, 123457), datetime(2023, 3, 26, 2, 30), datetime(2023, 7, 1)])
def test_the_instant_of_a_datetime_survives_clock_changes(when: datetime, fold: int) -> None:
    local = when.replace(tzinfo=ZoneInfo("Europe/Berlin"), fold=fold)
    arrived = decode(encode(local))
    assert isinstance(arrived, datetime)
    assert arrived.tzinfo is UTC
    assert arrived - local == timedelta(0)


@pytest.mark.parametrize(
    "when", [datetime.min, datetime.max, datetime(1969, 12, 31, 23, 59, 59, 999999), datetime(2554, 7, 21, 23, 34, 33, 709551)]
)
def test_datetimes_are_exact_to_the_microsecond(when: datetime) -> None:
    when = when.replace(tzinfo=UTC)
    assert same(decode(encode([when])), [when])


@pytest.mark.parametrize(
    "bad",
    [
        {1, 2},
        frozenset(),
        bytearray(b"x"),
        memoryview(b"x"),
        Colour.RED,
        Record(),
        Struct(),
        Decimal("1.5"),
        Fraction(1, 2),
        UUID(int=1),
        datetime(2020, 1, 1),
        datetime(2020, 1, 1, tzinfo=Nowhere()),
        Timestamp(2020, 1, 1, tzinfo=UTC),
        date(2020, 1, 1),
        time(1),
        timedelta(1),
        deque([1]),
        range(3),
        1j,
        object(),
        int,
        len,
        Path("x"),
        Shouting("x"),
        Loud([1]),
        iter([1]),
        {}.keys(),
        ...,
    ],
    ids=lambda bad: type(bad).__name__,
)
def test_a_refused_type_is_named_with_its_place(bad: object) -> None:
    with pytest.raises(UnpublishableType, match=r'^message\["a"\]\[3\]\["key"\] ') as caught:
        encode({"x": 1, "a": [0, "", None, {"key": bad}]})
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, PublishError)
    with pytest.raises(UnpublishableType, match=r"^message is "):
        encode(bad)


def test_hints_say_what_to_do() -> None:
    for bad, hint in (
        (datetime.now(), "give it one"),
        ({1}, "publish a list"),
        (bytearray(), r"bytes\(\)"),
        (Colour.RED, "its value"),
        (Decimal(1), "its text"),
    ):
        with pytest.raises(UnpublishableType, match=hint):
            encode(bad)


@pytest.mark.parametrize(
    "key", [(1, 2), frozenset(), Colour.RED, Decimal(1), UUID(int=1), date(2020, 1, 1), datetime(2020, 1, 1)], ids=repr
)
def test_refused_keys_name_key_and_place(key: object) -> None:
    with pytest.raises(UnpublishableType, match=r'^the key .* of message\["a"\]\[0\] is '):
        encode({"a": [{key: 1}]})


@pytest.mark.parametrize(
    "bad",
    [2**64, -(2**63) - 1, 10**100, "\ud800", "fine \udfff", datetime.min.replace(tzinfo=timezone(timedelta(hours=1)))],
    ids=["uint", "int", "googol", "surrogate", "surrogate inside", "year 0"],
)
def test_values_out_of_range_are_named_with_their_place(bad: object) -> None:
    with pytest.raises(UnpublishableValue, match=r'^message\[b\'k\'\]\[1\]\["c"\] ') as caught:
        encode({b"k": [1, {"c": bad}]})
    assert isinstance(caught.value, ValueError)
    with pytest.raises(UnpublishableValue, match=r"^the key .* of message\[7\] "):
        encode({7: {bad: 1}})


def test_nan_is_no_key() -> None:
    with pytest.raises(UnpublishableValue, match="the key nan of message is NaN"):
        encode({math.nan: 1})


def nest(depth: int, *, mapping: bool = False) -> Any:
    obj: Any = 1
    for _ in range(depth):
        obj = {"k": obj} if mapping else [obj]
    return obj


@pytest.mark.parametrize("mapping", [False, True])
def test_depth(mapping: bool) -> None:
    deepest = nest(MAX_DEPTH, mapping=mapping)
    assert decode(encode(deepest)) == deepest
    assert decode(encode(nest(MAX_DEPTH - 1, mapping=mapping) | {"t": Name.ANNA} if mapping else [*nest(MAX_DEPTH), Name.ANNA]))
    for depth in (MAX_DEPTH + 1, 500, 100_000):
        with pytest.raises(UnpublishableValue, match=r"^message\[.{30,100} is nested deeper than 64"):
            encode(nest(depth, mapping=mapping))


def test_an_object_that_contains_itself() -> None:
    obj: list[Any] = [1]
    obj.append({"me": obj})
    with pytest.raises(UnpublishableValue, match="contains itself"):
        encode(obj)


def test_the_place_stays_short_and_printable() -> None:
    with pytest.raises(UnpublishableType) as caught:
        encode({"long" * 100: {"line\nbreak": {1}}})
    assert str(caught.value).startswith('message["longlonglong')
    assert len(str(caught.value)) < 150
    assert "\\n" in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=500)
def test_any_bytes_decode_or_raise_payload_error(data: bytes) -> None:
    with contextlib.suppress(PayloadError):
        decode(data)


@given(objects, st.data())
@settings(deadline=None)
def test_damaged_payloads_raise_payload_error_only(obj: object, data: st.DataObject) -> None:
    encoded = bytearray(encode(obj))
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(PayloadError):
        decode(bytes(encoded[: data.draw(st.integers(0, len(encoded)))]))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x01\x01",
        b"\xa1\xff",
        b"\x81\xa1\xff\x01",
        b"\xd4\x05a",
        b"\x91\xd4\x05a",
        b"\x81\xd4\x05a\x01",
        b"\xd4\xffa",
        b"\xc7\x0c\xff\xff\xff\xff\xff" + b"\x00" * 8,
        b"\xc7\x0c\xff\x00\x00\x00\x00\x7f" + b"\xff" * 7,
        b"\x81\x80\x01",
        b"\x81\x91\x01\x01",
        b"\x81\x92\x01\x80\x01",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff\x01",
        b"\xc6\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff" * 100,
    ],
    ids=bytes.hex,
)
def test_hostile_bytes(data: bytes) -> None:
    with pytest.raises(PayloadError):
        decode(data)


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 1_000, 100_000])
@pytest.mark.parametrize("level", [b"\x91", b"\x81\xa1k", b"\x81", b"\xdd\x00\x00\x00\x01", b"\xde\x00\x01\x01"], ids=bytes.hex)
def test_deep_bytes(level: bytes, depth: int) -> None:
    for end in (b"\xc0", b""):
        with pytest.raises(PayloadError):
            decode(level * depth + end)


def colliding(count: int) -> bytes:
    """A map whose keys are arrays of two, all of one hash: the tuple hash (xxHash without a seed) run backwards."""
    first, second, start, bits = 11400714785074694791, 14029467366897019727, 2870177450012600261, 2**64 - 1
    keys: list[bytes] = []
    x = 0
    while len(keys) < count:
        x += 1
        lane = (start + x * second) & bits
        lane = ((lane << 31 | lane >> 33) * first) & bits
        y = (12345678901234567 - lane) * pow(second, -1, 2**64) & bits
        if y < 2**61 - 1:
            keys.append(msgspec.msgpack.encode([x, y]))
    return b"\xdf" + count.to_bytes(4, "big") + b"".join(key + b"\x01" for key in keys)


def test_colliding_array_keys_are_refused_before_they_cost_anything() -> None:
    assert len({hash(key) for key in msgspec.msgpack.decode(colliding(50))}) == 1
    data = colliding(30_000)  # would take the decoder most of a minute
    begun = datetime.now()
    with pytest.raises(PayloadError, match="dict key"):
        decode(data)
    assert datetime.now() - begun < timedelta(seconds=2)


@given(objects)
@settings(deadline=None, max_examples=20)
def test_large_payloads_pass_the_scan(obj: object) -> None:
    large = {
        "objects": [obj] * 3,
        "pairs": [[i, {i: str(i) * 20}] for i in range(1500)],
        3: b"\x91" * 2000,
        "\x91" * 300: [1.5, 2**40, -1, -300, -(2**40)],
    }
    data = encode(large)
    assert len(data) ** 2 > MAX_COMPARISONS
    assert same(decode(data), large)


def test_threads() -> None:
    obj = {"a": [1, {"b": Level.LOW}], "when": datetime(2020, 1, 1, tzinfo=UTC)}
    expected = encode(obj)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: encode(obj), range(2000))) == {expected}
