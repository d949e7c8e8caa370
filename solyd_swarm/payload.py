"""Application payloads as MessagePack (the msgpack specification, with its timestamp extension).

The rule: what is published arrives equal, ``decode(encode(x)) == x``, or `encode` refuses it.

- Accepted: ``None``, ``bool``, ``int`` (-2**63 to 2**64 - 1), ``float``, ``str``, ``bytes``, ``list``, ``dict`` and aware
  ``datetime``, nested at most `MAX_DEPTH` containers deep; dict keys are any of the scalars.
- Instances of a subclass arrive as the plain type where they compare equal to it (``OrderedDict``, ``IntEnum``, ``StrEnum``, a
  ``str`` subclass); otherwise they are refused.
- The exceptions to the rule: a tuple (also a named one) arrives as a list; NaN arrives as NaN, which equals nothing; a datetime
  arrives in UTC, as the same instant to the microsecond, which Python calls unequal to a local time that a clock change makes
  ambiguous or skips (PEP 495).
- Refused: all else, also what a codec could turn into something similar: sets, ``bytearray``, ``Decimal``, ``UUID``, dates, naive
  datetimes, dataclasses, enums, and NaN or a tuple as a dict key.

Both functions may be called from any thread.
"""

import json
from collections.abc import Iterable
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import NoReturn
from uuid import UUID

import msgspec

from .errors import PayloadError, UnpublishableType, UnpublishableValue

MAX_DEPTH = 64
"""Containers inside one another, the outermost included."""

MAX_COMPARISONS = 2**24
"""What comparing hostile dict keys may cost at most, in elements, before a payload is scanned first."""

_Place = tuple["_Place", object] | None
"""The way to an object: (place of its container, key or index); None is the message itself."""

_SCALARS = frozenset({type(None), bool, int, float, str, bytes})
_KEYS = _SCALARS - {float}  # a float may be NaN: looked at one by one
_CONTAINERS = frozenset({dict, list})
_HEADERS = frozenset({*range(0x80, 0xA0), *range(0xDC, 0xE0)})  # fixmap, fixarray; array 16, 32, map 16, 32
_NO_HEADERS = bytes(byte for byte in range(256) if byte not in _HEADERS)

_HINTS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    ((set, frozenset), "publish a list"),
    ((bytearray, memoryview), "convert it with bytes()"),
    (Enum, "publish its value or its name"),
    ((date, time, timedelta, Decimal, UUID), "publish its text, or a number"),
)


def encode(obj: object) -> bytes:
    """The MessagePack of ``obj``.

    Raises:
        UnpublishableType: an object inside would not decode equal; the text names its place, like ``message["a"][3]``.
        UnpublishableValue: an int or a datetime is out of range, a str holds a lone surrogate, a dict key is NaN, or containers
            are nested deeper than `MAX_DEPTH`, as an object that contains itself is.
    """
    # Types are checked first, since msgspec would turn sets, enums, dataclasses and more into something else without a word.
    if not _is_plain(obj, MAX_DEPTH):
        obj = _make_plain(obj, None, MAX_DEPTH)
    try:
        return _encode(obj)
    except (OverflowError, ValueError) as error:
        _make_plain(obj, None, MAX_DEPTH)  # names the place
        raise UnpublishableValue(f"the message cannot be encoded: {error}") from error


def decode(data: bytes) -> object:
    """The object that ``data`` is the MessagePack of.

    Raises:
        PayloadError: for whatever else the bytes are; never anything else. Also for what `encode` never makes: unknown
            extensions, nesting deeper than `MAX_DEPTH`, arrays as dict keys.
    """
    headers = len(data.translate(None, _NO_HEADERS))  # at least as many as there are containers
    if headers * len(data) > MAX_COMPARISONS:
        _scan(data)
    try:
        obj = _decode(data)
    except (ValueError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        raise PayloadError(f"a payload cannot be decoded: {error}") from error
    if headers > 1:  # one container alone is neither deep nor holds an array key
        _check_decoded(obj, MAX_DEPTH)
    return obj


def _is_plain(obj: object, depth: int) -> bool:
    """Whether only exact basic types are inside, at most ``depth`` containers deep: the common case, found out quickly."""
    kind = type(obj)
    if kind in _SCALARS:
        return True
    items: Iterable[object]
    if kind is dict:
        if not _KEYS.issuperset(map(type, obj)):  # type: ignore[call-overload]
            return False
        items = obj.values()  # type: ignore[attr-defined]
    elif kind is list or kind is tuple:
        items = obj  # type: ignore[assignment]
    else:
        return False
    if not depth:
        return False
    if _SCALARS.issuperset(map(type, items)):
        return True
    for item in items:  # noqa: SIM110 - all() takes half as long again
        if type(item) not in _SCALARS and not _is_plain(item, depth - 1):
            return False
    return True


def _make_plain(obj: object, place: _Place, depth: int) -> object:
    """A copy of exact basic types, equal to ``obj`` but for tuples; raises where there is none, naming the place."""
    if isinstance(obj, (dict, list, tuple)):
        if not depth:
            raise UnpublishableValue(f"{_name(place)} is nested deeper than {MAX_DEPTH} containers, or contains itself")
        if isinstance(obj, dict):
            return _make_plain_dict(obj, place, depth)
        # An overridden __iter__ must not decide what is read; equality is compared on the very same items, so it is shallow.
        items = list(list.__iter__(obj)) if isinstance(obj, list) else tuple(tuple.__iter__(obj))
        if type(items) is not type(obj) and not _are_equal(items, obj):
            _refuse(obj, _name(place))
        return [_make_plain(item, (place, index), depth - 1) for index, item in enumerate(items)]
    return _make_plain_scalar(obj, place)


def _make_plain_dict(obj: dict[object, object], place: _Place, depth: int) -> dict[object, object]:
    items = dict(dict.items(obj))
    if type(obj) is not dict and not _are_equal(items, obj):
        _refuse(obj, _name(place))
    copy = {}
    for key, value in items.items():
        plain_key = _make_plain_scalar(key, place, is_key=True)
        copy[plain_key] = _make_plain(value, (place, key), depth - 1)
    if len(copy) != len(items):  # keys with an __eq__ or __hash__ of their own
        _refuse(obj, _name(place))
    return copy


def _make_plain_scalar(obj: object, place: _Place, *, is_key: bool = False) -> object:
    if obj is None or isinstance(obj, bool):
        return obj
    plain: object
    if isinstance(obj, int):
        plain = int.__int__(obj)
        if not -(2**63) <= plain < 2**64:
            raise UnpublishableValue(f"{_where(obj, place, is_key)} is an int out of range -2**63 to 2**64 - 1: publish its text")
    elif isinstance(obj, float):
        plain = float.__float__(obj)
        if plain != plain:
            if is_key:
                raise UnpublishableValue(f"{_where(obj, place, is_key)} is NaN, which nobody could look up: use another key")
            return plain
    elif isinstance(obj, str):
        plain = str.__str__(obj)
        try:
            plain.encode()
        except UnicodeEncodeError as error:
            text = f"{_where(obj, place, is_key)} holds a lone surrogate at index {error.start}, which UTF-8 cannot express"
            raise UnpublishableValue(f"{text}: publish bytes") from error
    elif isinstance(obj, bytes):
        plain = bytes(memoryview(obj))
    elif isinstance(obj, datetime):
        return _make_plain_datetime(obj, place, is_key)
    else:
        _refuse(obj, _where(obj, place, is_key))
    if type(obj) is not type(plain) and not _are_equal(plain, obj):
        _refuse(obj, _where(obj, place, is_key))
    return plain


def _make_plain_datetime(obj: datetime, place: _Place, is_key: bool) -> datetime:
    """The same instant in UTC."""
    if type(obj) is not datetime:
        plain = datetime(obj.year, obj.month, obj.day, obj.hour, obj.minute, obj.second, obj.microsecond, obj.tzinfo, fold=obj.fold)
        if not _are_equal(plain, obj):  # a subclass that counts in nanoseconds, say
            _refuse(obj, _where(obj, place, is_key))
        obj = plain
    if obj.utcoffset() is None:
        text = f"{_where(obj, place, is_key)} is a datetime without a timezone"
        raise UnpublishableType(f"{text}: give it one, as datetime.now(timezone.utc) has")
    try:
        return obj.astimezone(UTC)
    except OverflowError as error:
        text = f"{_where(obj, place, is_key)} is a datetime that in UTC lies outside the years 1 to 9999"
        raise UnpublishableValue(f"{text}: publish its text") from error


def _are_equal(plain: object, obj: object) -> bool:
    return bool(plain == obj)  # not !=: a subclass with an __eq__ of its own inherits the __ne__ of str, list, ...


def _refuse(obj: object, where: str) -> NoReturn:
    hint = next((hint for kinds, hint in _HINTS if isinstance(obj, kinds)), None)
    if hint is None:
        hint = "publish None, a bool, number, str, bytes, list, dict or aware datetime"
    raise UnpublishableType(f"{where} is of type {type(obj).__qualname__}, which would not arrive equal: {hint}")


def _where(obj: object, place: _Place, is_key: bool) -> str:
    return f"the key {_shorten(obj)} of {_name(place)}" if is_key else _name(place)


def _name(place: _Place) -> str:
    """``message["a"][3]``; of a long way the beginning and the end."""
    steps = []
    while place is not None:
        place, step = place
        steps.append(f"[{_shorten(step)}]")
    steps.append("message")
    steps.reverse()
    return "".join(steps) if len(steps) <= 12 else "".join([*steps[:6], "...", *steps[-5:]])


def _shorten(key: object) -> str:
    if isinstance(key, str):
        text = str.__str__(key)
        text = text if len(text) <= 40 else text[:37] + "..."
        return json.dumps(text, ensure_ascii=not text.isprintable())
    text = repr(key)
    return text if len(text) <= 40 else text[:37] + "..."


def _check_decoded(obj: object, depth: int) -> None:
    """Raises `PayloadError` where ``obj`` holds array keys, or is deeper than any Python version's decoder would let us rely on.

    How deep is too deep for the decoder, or for a handler's ``repr`` or ``json.dumps``, differs from one version to the next.
    """
    items: Iterable[object]
    if isinstance(obj, dict):
        if tuple in map(type, obj):
            raise PayloadError("a payload cannot be decoded: an array is a dict key")
        items = obj.values()
    elif isinstance(obj, list):
        items = obj
    else:
        return
    if not depth:
        raise PayloadError(f"a payload cannot be decoded: it is nested deeper than {MAX_DEPTH} containers")
    if not _CONTAINERS.isdisjoint(map(type, items)):
        for item in items:
            if type(item) in _CONTAINERS:
                _check_decoded(item, depth - 1)


_FIXED = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
_FIXED |= {0xD4: 2, 0xD5: 3, 0xD6: 5, 0xD7: 9, 0xD8: 17}  # type byte -> bytes that follow
_SIZED = {0xC4: (1, 0), 0xC5: (2, 0), 0xC6: (4, 0), 0xC7: (1, 1), 0xC8: (2, 1), 0xC9: (4, 1), 0xD9: (1, 0), 0xDA: (2, 0), 0xDB: (4, 0)}
# type byte -> (bytes of the size field, bytes that follow besides those it counts)


def _scan(data: bytes) -> None:
    """Raises `PayloadError` where a dict key is an array, without decoding; what is malformed otherwise is left to the decoder.

    Attack: hashes of tuples are not randomised, so that a payload full of colliding array keys would hold the decoder for
    minutes. Strings and bytes have randomised hashes; among numbers only a few dozen can be made to collide.
    """
    position, left, is_map = 0, 1, False  # left: objects still to come in this container, keys and values counted each
    outer: list[tuple[int, bool]] = []
    end = len(data)
    while position < end:
        while not left:
            if not outer:
                return
            left, is_map = outer.pop()
        is_key = is_map and not left % 2
        left -= 1
        head = data[position]
        position += 1
        if head < 0x80 or head >= 0xE0:
            continue
        if head in _HEADERS:
            if is_key:
                raise PayloadError("a payload cannot be decoded: an array or a map is a dict key")
            if len(outer) >= MAX_DEPTH:
                raise PayloadError(f"a payload cannot be decoded: it is nested deeper than {MAX_DEPTH} containers")
            outer.append((left, is_map))
            width = 0 if head < 0xA0 else 4 if head & 1 else 2
            size = int.from_bytes(data[position : position + width], "big") if width else head & 0x0F
            is_map = head < 0x90 or head in (0xDE, 0xDF)
            left = size * 2 if is_map else size
            position += width
        elif head < 0xC0:
            position += head & 0x1F
        elif head in _SIZED:
            width, more = _SIZED[head]
            position += int.from_bytes(data[position : position + width], "big") + width + more
        elif head in _FIXED:
            position += _FIXED[head]
        else:
            return


def _refuse_extension(code: int, data: memoryview) -> NoReturn:
    raise ValueError(f"extension type {code} is not known")


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(ext_hook=_refuse_extension).decode
