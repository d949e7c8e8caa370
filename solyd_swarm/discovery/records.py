"""What is stored in the DHT: announcements only members of a topic can write or read.

A record lives under the hash of an Ed25519 public key that is derived from the topic key and the day. The derived key signs
it, so a storing node refuses outsiders without knowing the topic; its body is encrypted (XSalsa20-Poly1305, NaCl's secretbox)
under another derived key, so a storing node learns no addresses.

What this does not defend against: a *member* can write records in another member's slot, as all members share the derived key;
and a storing node can give out an old record again for as long as the day's key is looked at. Both cost a failed dial, nothing
more: only the channel authenticates.

Layout, big-endian::

    record = signature 64 | slot 16 | sequence u64 | life u16 | box
    box    = empty (withdrawn) or nonce 24 | secretbox(body)
    body   = instance 32 | count u8 | count * (family u8 (4 or 6) | address 4 or 16 | port u16)
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from ipaddress import ip_address

from nacl.exceptions import BadSignatureError, CryptoError
from nacl.secret import SecretBox
from nacl.signing import SigningKey, VerifyKey

from solyd_swarm.core.keys import derive
from solyd_swarm.discovery.scope import scope_of
from solyd_swarm.discovery.source import Address
from solyd_swarm.errors import RemoteProtocolError

DAY_SECONDS = 86_400
MAX_LIFE = 1_800
"""Seconds that a record may live at a storing node: three announcements of the default interval."""
MAX_ADDRESSES = 8

_SIGNATURE_SIZE = 64
_HEAD = struct.Struct(">16sQH")
_PORT = struct.Struct(">H")
_PREFIX = b"solyd dht record 1"
_MAX_BODY = 32 + 1 + MAX_ADDRESSES * (1 + 16 + 2)
MIN_RECORD = _SIGNATURE_SIZE + _HEAD.size
MAX_RECORD = MIN_RECORD + SecretBox.NONCE_SIZE + SecretBox.MACBYTES + _MAX_BODY
"""Bytes of the largest record."""


@dataclass(frozen=True)
class DayKeys:
    """What a member derives for one topic and one day (count of UTC days since 1970).

    Attributes:
        day: the day.
        public: the 32-byte Ed25519 key that storing nodes check signatures with.
        key: the 20 bytes that records of this day live under.
    """

    topic_key: bytes
    day: int

    @cached_property
    def signer(self) -> SigningKey:
        return SigningKey(derive(self.topic_key, b"dht key", _day_bytes(self.day)))

    @cached_property
    def public(self) -> bytes:
        return bytes(self.signer.verify_key)

    @cached_property
    def key(self) -> bytes:
        return dht_key(self.public)

    @cached_property
    def box(self) -> SecretBox:
        return SecretBox(derive(self.topic_key, b"dht box", _day_bytes(self.day)))

    def slot(self, instance: bytes) -> bytes:
        """The 16 bytes that make an announcer's newer record replace its older one, and say nothing to outsiders."""
        return derive(self.topic_key, b"dht slot", _day_bytes(self.day), instance, size=16)


@dataclass(frozen=True, slots=True)
class SignedRecord:
    """A record whose signature was made or verified here.

    Attributes:
        public: the derived key that signed it.
        raw: the bytes that travel.
        slot: 16 bytes; one record per slot is kept.
        sequence: the announcer's clock in microseconds, forced to grow: of one slot the highest wins.
        life: seconds, at most `MAX_LIFE`, that a storing node keeps it, by its own monotonic clock.
        box: the encrypted body; empty: withdrawn.
    """

    public: bytes
    raw: bytes
    slot: bytes
    sequence: int
    life: int
    box: bytes


@dataclass(frozen=True, slots=True)
class Announcement:
    """The body of a record: where an instance listens."""

    instance: bytes
    addresses: tuple[Address, ...]


def day_of(seconds: float) -> int:
    """The day of a Unix time."""
    return int(seconds // DAY_SECONDS)


def dht_key(public: bytes) -> bytes:
    """The 20 bytes that records signed by ``public`` live under."""
    return blake2b(public, digest_size=20, person=b"solyd dht key").digest()


def seal(keys: DayKeys, instance: bytes, addresses: Iterable[Address], sequence: int, life: int) -> SignedRecord:
    """Encrypt and sign an announcement. At most `MAX_ADDRESSES` addresses are kept, the first ones; zones are dropped."""
    packed = [_pack_address(address) for address in addresses][:MAX_ADDRESSES]
    body = instance + bytes([len(packed)]) + b"".join(packed)
    return _sign(keys, instance, sequence, life, bytes(keys.box.encrypt(body)))


def withdraw(keys: DayKeys, instance: bytes, sequence: int, life: int) -> SignedRecord:
    """Sign a tombstone. It should live as long as the record it replaces, so that no late copy of that one comes back."""
    return _sign(keys, instance, sequence, life, b"")


def verify(public: bytes, raw: bytes) -> SignedRecord:
    """Check sizes, life and signature of bytes that came from a peer. Raises `RemoteProtocolError`."""
    if len(public) != 32 or not MIN_RECORD <= len(raw) <= MAX_RECORD:
        raise RemoteProtocolError("a DHT record of impossible size")
    slot, sequence, life = _HEAD.unpack_from(raw, _SIGNATURE_SIZE)
    if not 0 < life <= MAX_LIFE:
        raise RemoteProtocolError("a DHT record that would live too long, or not at all")
    try:
        VerifyKey(public).verify(_PREFIX + raw[_SIGNATURE_SIZE:], raw[:_SIGNATURE_SIZE])
    except (BadSignatureError, CryptoError) as error:
        raise RemoteProtocolError("a DHT record with a wrong signature") from error
    return SignedRecord(public, raw, slot, sequence, life, raw[MIN_RECORD:])


def open_record(keys: DayKeys, record: SignedRecord) -> Announcement | None:
    """Decrypt a verified record; None if it is a withdrawal. Addresses nobody can be reached at are left out.

    Raises `RemoteProtocolError` when it is not for this key, when the body is malformed, and when the slot is not the instance's
    own: one instance would otherwise fill a key with records.
    """
    if record.public != keys.public:
        raise RemoteProtocolError("a DHT record of another key")
    if not record.box:
        return None
    try:
        body = keys.box.decrypt(record.box)
    except (CryptoError, ValueError) as error:
        raise RemoteProtocolError("a DHT record that does not decrypt") from error
    announcement = _parse_body(body)
    if record.slot != keys.slot(announcement.instance):
        raise RemoteProtocolError("a DHT record in a slot that is not its instance's")
    return announcement


def _sign(keys: DayKeys, instance: bytes, sequence: int, life: int, box: bytes) -> SignedRecord:
    if len(instance) != 32 or not 0 < life <= MAX_LIFE:
        raise ValueError(f"an instance key has 32 bytes and a record lives 1 to {MAX_LIFE} s")
    slot = keys.slot(instance)
    signed = _HEAD.pack(slot, sequence, life) + box
    raw = keys.signer.sign(_PREFIX + signed).signature + signed
    return SignedRecord(keys.public, raw, slot, sequence, life, box)


def _pack_address(address: Address) -> bytes:
    ip = ip_address(address.host.partition("%")[0])
    return bytes([ip.version]) + ip.packed + _PORT.pack(address.port)


def _parse_body(body: bytes) -> Announcement:
    if len(body) < 33 or body[32] > MAX_ADDRESSES:
        raise RemoteProtocolError("a DHT record with a malformed body")
    addresses = []
    offset = 33
    for _ in range(body[32]):
        size = {4: 4, 6: 16}.get(body[offset] if offset < len(body) else 0)
        if size is None or offset + 1 + size + 2 > len(body):
            raise RemoteProtocolError("a DHT record with a malformed address")
        host = str(ip_address(body[offset + 1 : offset + 1 + size]))
        (port,) = _PORT.unpack_from(body, offset + 1 + size)
        if port and scope_of(host) != "invalid":
            addresses.append(Address(host, port))
        offset += 1 + size + 2
    if offset != len(body):
        raise RemoteProtocolError("a DHT record with something after its body")
    return Announcement(body[:32], tuple(dict.fromkeys(addresses)))


def _day_bytes(day: int) -> bytes:
    return day.to_bytes(8, "big", signed=True)
