"""What a capture of traffic says: its datagrams, its TCP streams put together again, and what to look for in them."""

import re
import struct
from base64 import b32encode, b64encode, urlsafe_b64encode
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b, blake2s, md5, sha1, sha256, sha512

WINDOW = 8
"""Bytes that must not be alike: half of the shortest thing that is derived from a topic."""
FIXED = 4
"""Bytes by which the fixed parts of a protocol are recognised."""


@dataclass
class Traffic:
    """Payloads without headers.

    Attributes:
        frames: the raw frames, headers and all.
        mdns: datagrams from or to port 5353.
        other: all other datagrams.
        streams: each direction of each TCP connection, in the order of its sequence numbers; from the next whole segment on where
            something is missing.
    """

    frames: list[bytes] = field(default_factory=list)
    mdns: list[bytes] = field(default_factory=list)
    other: list[bytes] = field(default_factory=list)
    streams: list[bytes] = field(default_factory=list)

    @property
    def all(self) -> list[bytes]:
        return [*self.frames, *self.mdns, *self.other, *self.streams]

    @property
    def payloads(self) -> list[bytes]:
        return [*self.mdns, *self.other, *self.streams]


def read(frames: Iterable[bytes]) -> Traffic:
    """Ethernet frames with IPv4 or IPv6, seen once or several times."""
    traffic = Traffic(list(dict.fromkeys(frames)))
    segments: dict[bytes, dict[int, bytes]] = {}
    for frame in traffic.frames:
        kind, packet = frame[12:14], frame[14:]
        if kind == b"\x08\x00":
            protocol, ends, rest = packet[9], packet[12:20], packet[4 * (packet[0] & 15) : int.from_bytes(packet[2:4], "big")]
        elif kind == b"\x86\xdd":
            protocol, ends, rest = packet[6], packet[8:40], packet[40 : 40 + int.from_bytes(packet[4:6], "big")]
        else:
            continue
        if protocol == 17:
            ports = struct.unpack_from(">HH", rest)
            (traffic.mdns if 5353 in ports else traffic.other).append(rest[8:])
        elif protocol == 6:
            data = rest[4 * (rest[12] >> 4) :]
            (sequence,) = struct.unpack_from(">I", rest, 4)
            flow = segments.setdefault(ends + rest[:4], {})
            if rest[13] & 2:  # SYN: counts one
                sequence += 1
            if data and len(data) > len(flow.get(sequence, b"")):
                flow[sequence] = data
    traffic.streams = [_join(flow) for flow in segments.values() if flow]
    return traffic


def _join(flow: dict[int, bytes]) -> bytes:
    first = min(flow)
    if max(flow) - first > 1 << 31:  # the numbers wrapped around
        first = min(sequence for sequence in flow if sequence > 1 << 31)
    stream, end = bytearray(), 0
    for at, data in sorted(((sequence - first) % (1 << 32), data) for sequence, data in flow.items()):
        stream += data[max(0, end - at) :]
        end = max(end, at + len(data))
    return bytes(stream)


def runs(data: Iterable[bytes], size: int = WINDOW) -> set[bytes]:
    """Each run of so many bytes, wherever it begins."""
    return {each[at : at + size] for each in data for at in range(len(each) - size + 1)}


def peculiar(data: Iterable[bytes], usual: set[bytes]) -> set[bytes]:
    """Runs that look random: no part of them is usual, as lengths, types and words of a protocol are.

    Those with a zero byte are left out, for the head of a DNS record always has some, and its pointers differ with the order of records.
    Something random of twice the size keeps a run without one, but for one time in hundreds.

    Args:
        usual: runs of `FIXED` bytes.
    """
    starts = range(WINDOW - FIXED + 1)
    return {run for run in runs(data) if 0 not in run and not any(run[at : at + FIXED] in usual for at in starts)}


def without_transactions(data: Iterable[bytes]) -> list[bytes]:
    """Messages of the BitTorrent DHT without their transaction ids: of two random bytes, some are the same in any two captures, and they
    stand between fixed ones."""
    return [re.sub(rb"1:t2:..1:", b"1:t2:\0\0" b"1:", each, flags=re.DOTALL) for each in data]


def spellings(name: str, value: bytes) -> dict[str, bytes]:
    """A value as it may be written: raw, in hexadecimal, base32, and base64 wherever in a longer text it begins."""
    found = {f"{name}": value, f"{name}, hex": value.hex().encode(), f"{name}, HEX": value.hex().upper().encode()}
    found[f"{name}, base32"] = b32encode(value)[: len(value) * 8 // 5]
    for shift in range(3):
        for encode in (b64encode, urlsafe_b64encode):
            # Only the characters that the value alone decides.
            begin, end = -(-shift * 8 // 6), (shift + len(value)) * 8 // 6
            found[f"{name}, {encode.__name__} {shift}"] = encode(bytes(shift) + value)[begin:end]
    return found


def of_text(name: str, text: str) -> dict[str, bytes]:
    """A text in the usual encodings, in either case, and its plain hashes."""
    needles: dict[str, bytes] = {}
    for encoding in ("utf-8", "utf-16-le", "utf-16-be"):
        needles |= spellings(f"{name}, {encoding}", text.encode(encoding))
        for change in (str.upper, str.lower):
            needles[f"{name}, {encoding}, {change.__name__}"] = change(text).encode(encoding)
    for size in (16, 20, 32, 64):
        needles |= spellings(f"BLAKE2b-{8 * size} of {name}", blake2b(text.encode(), digest_size=size).digest())
    for algorithm in (md5, sha1, sha256, sha512, blake2s):
        needles |= spellings(f"{algorithm.__name__} of {name}", algorithm(text.encode()).digest())
    return needles


def found(needles: dict[str, bytes], traffic: Traffic) -> set[str]:
    """Names of the needles that are there."""
    hay = traffic.all
    return {name for name, needle in needles.items() if any(needle in each for each in hay)}
