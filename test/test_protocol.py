"""docs/protocol.rst tells the truth: its vectors, its table of frames and its bounds.

The vectors are read out of the document. What can be computed without the project is computed anew here, by another library than
the project uses (BLAKE2b of libsodium, Ed25519 of OpenSSL) or from the specification (MessagePack, Noise XX, Negentropy); and the
project must read and write the very same bytes.
"""

import hmac
import json
import random
import re
import struct
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from hashlib import blake2b, sha256
from importlib import import_module
from pathlib import Path
from typing import Any

import docutils.core
import docutils.nodes
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from nacl.encoding import RawEncoder
from nacl.exceptions import CryptoError
from nacl.hash import blake2b as sodium_blake2b
from nacl.secret import SecretBox

from solyd_swarm import payload
from solyd_swarm.core import keys, wire
from solyd_swarm.core.envelope import equivocate, equivocation_id, open_envelope, seal, split_batch, verify_ed25519
from solyd_swarm.core.events import Close, LinkUp, Received
from solyd_swarm.core.overlay import Overlay
from solyd_swarm.core.reconcile import ItemSet, Negentropy
from solyd_swarm.discovery import dht_wire, records
from solyd_swarm.discovery.mainline_rules import infohash_of
from solyd_swarm.discovery.mdns_service import parse_txt
from solyd_swarm.errors import PayloadError, RemoteProtocolError, SwarmError
from solyd_swarm.net import reach_frames
from solyd_swarm.net.connection import decode_hello, encode_hello
from solyd_swarm.net.matching import Identity, Matcher
from solyd_swarm.net.noise import MAX_FRAME, FrameReader, FrameWriter, NoiseSession, public_key
from solyd_swarm.ticket import Contact, make_ticket, parse_contact

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "protocol.rst"
TEXT = DOCUMENT.read_text("utf-8")
Vectors = dict[str, Any]


def raw(value: Any) -> Any:
    """What JSON stands for: strings that begin with 0x are bytes."""
    match value:
        case str() if value.startswith("0x"):
            return bytes.fromhex(value[2:])
        case list():
            return [raw(each) for each in value]
        case dict():
            return {key: raw(each) for key, each in value.items()}
    return value


def read_vectors(text: str) -> Vectors:
    vectors: Vectors = {}
    for name, kind, value in re.findall(r"^ {4}([a-z][\w.]*) ([=:]) ?(.*(?:\n {8}.*)*)$", text, re.MULTILINE):
        assert name not in vectors, name
        joined = "".join(line[8:] if number else line for number, line in enumerate(value.split("\n")))
        vectors[name] = bytes.fromhex(joined) if kind == "=" else raw(json.loads(joined))
    return vectors


VECTORS = read_vectors(TEXT.partition("\n17. Test vectors\n")[2])


def under(vectors: Vectors, prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in vectors.items() if name.startswith(prefix)}


# -- the specifications, once more ---------------------------------------------------------------------------------


def hashed(size: int, person: bytes, key: bytes, data: bytes) -> bytes:
    """H of section 1, by libsodium; it makes no fewer than 16 bytes."""
    if size < 16:
        return blake2b(data, digest_size=size, key=key, person=person).digest()
    return sodium_blake2b(data, digest_size=size, key=key, person=person, encoder=RawEncoder)


def derived(size: int, topic_key: bytes, *parts: bytes) -> bytes:
    return hashed(size, b"solyd derive", topic_key, b"".join(struct.pack(">I", len(part)) + part for part in parts))


def pack(value: Any) -> bytes:
    """The shortest MessagePack."""
    match value:
        case None | False | True:
            return {None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value]
        case int():
            if -32 <= value < 128:
                return struct.pack("b" if value < 0 else "B", value)
            kinds = (
                ((0xD0, "b"), (0xD1, "h"), (0xD2, "i"), (0xD3, "q")) if value < 0 else ((0xCC, "B"), (0xCD, "H"), (0xCE, "I"), (0xCF, "Q"))
            )
            for head, code in kinds:
                with suppress(struct.error):
                    return bytes([head]) + struct.pack(">" + code, value)
        case float():
            return b"\xcb" + struct.pack(">d", value)
        case str():
            text = value.encode()
            return sized(len(text), (0xA0, 31), (0xD9, 0xDA, 0xDB)) + text
        case bytes():
            return sized(len(value), None, (0xC4, 0xC5, 0xC6)) + value
        case list() | tuple():
            return sized(len(value), (0x90, 15), (None, 0xDC, 0xDD)) + b"".join(map(pack, value))
        case dict():
            return sized(len(value), (0x80, 15), (None, 0xDE, 0xDF)) + b"".join(pack(key) + pack(each) for key, each in value.items())
    raise AssertionError(value)


def sized(size: int, fixed: tuple[int, int] | None, heads: tuple[int | None, ...]) -> bytes:
    if fixed is not None and size <= fixed[1]:
        return bytes([fixed[0] | size])
    for head, code, limit in zip(heads, "BHI", (2**8, 2**16, 2**32), strict=True):
        if head is not None and size < limit:
            return bytes([head]) + struct.pack(">" + code, size)
    raise AssertionError(size)


def noise_xx(vectors: Vectors) -> tuple[list[bytes], bytes, dict[str, ChaCha20Poly1305]]:
    """Messages, handshake hash and transport ciphers by the Noise specification, sections 5 and 7.5, with our prologue."""

    def digest(data: bytes) -> bytes:
        return blake2b(data).digest()

    def hkdf(key: bytes, data: bytes) -> tuple[bytes, bytes]:
        temporary = hmac.digest(key, data, "blake2b")
        first = hmac.digest(temporary, b"\1", "blake2b")
        return first, hmac.digest(temporary, first + b"\2", "blake2b")

    own = {
        side: {kind: X25519PrivateKey.from_private_bytes(vectors[f"noise.{side}.{kind}"]) for kind in ("static", "ephemeral")}
        for side in "ir"
    }
    h = chain = b"Noise_XX_25519_ChaChaPoly_BLAKE2b".ljust(64, b"\0")
    h = digest(h + b"solyd_swarm/1")
    cipher, nonce, messages = None, 0, []
    tokens = (("i", ["e"]), ("r", ["e", "ee", "s", "es"]), ("i", ["s", "se"]))
    for (side, pattern), body in zip(tokens, (b"", vectors["noise.r.payload"], vectors["noise.i.payload"]), strict=True):
        message = b""
        for token in [*pattern, "payload"]:
            if len(token) == 2:
                kinds = {"e": "ephemeral", "s": "static"}
                peer: X25519PublicKey = own["r"][kinds[token[1]]].public_key()
                chain, key = hkdf(chain, own["i"][kinds[token[0]]].exchange(peer))
                cipher, nonce = ChaCha20Poly1305(key[:32]), 0
                continue
            plain = body if token == "payload" else own[side][{"e": "ephemeral", "s": "static"}[token]].public_key().public_bytes_raw()
            part = plain if token == "e" or cipher is None else cipher.encrypt(struct.pack("<4xQ", nonce), plain, h)
            nonce += token != "e"
            h = digest(h + part)
            message += part
        messages.append(struct.pack(">H", len(message)) + message)
    keys_out = dict(zip("ir", hkdf(chain, b""), strict=True))
    return messages, h, {side: ChaCha20Poly1305(key[:32]) for side, key in keys_out.items()}


def varint(value: int) -> bytes:
    digits = [value & 127]
    while value := value >> 7:
        digits.insert(0, value & 127 | 128)
    return bytes(digits)


def fingerprint_of(items: list[tuple[int, bytes]]) -> bytes:
    total = sum(int.from_bytes(id, "little") for _, id in items) % 2**256
    return sha256(total.to_bytes(32, "little") + varint(len(items))).digest()[:16]


def first_message(items: list[tuple[int, bytes]]) -> bytes:
    """As the reference implementation of Negentropy begins: a list of fewer than 32 items, else 16 fingerprints."""
    items = sorted(items)
    if len(items) < 32:
        return b"\x61\0\0\2" + varint(len(items)) + b"".join(id for _, id in items)
    message, before, start = b"\x61", 0, 0
    for bucket in range(16):
        end = start + len(items) // 16 + (bucket < len(items) % 16)
        if end == len(items):
            bound = b"\0\0"
        else:
            (timestamp, id), (previous, last) = items[end], items[end - 1]
            common = next(size for size in range(32) if id[size] != last[size])
            prefix = b"" if timestamp != previous else id[: common + 1]
            bound = varint(timestamp - before + 1) + varint(len(prefix)) + prefix
            before = timestamp
        message += bound + b"\1" + fingerprint_of(items[start:end])
        start = end
    return message


def signed(seed: bytes, data: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(seed).sign(data)


def public_of(seed: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()


# -- the vectors ---------------------------------------------------------------------------------------------------


def check_keys(v: Vectors) -> None:
    topic, secret, topic_key = v["keys.topic"], v["keys.secret"], v["keys.topic_key"]
    assert topic_key == hashed(32, b"solyd topic", b"", topic.encode()) == keys.derive_topic_key(topic)
    secret_key = hashed(64, b"solyd secret", b"", secret)
    with_secret = hashed(32, b"solyd topic", secret_key, topic.encode())
    assert v["keys.topic_key_with_secret"] == with_secret == keys.derive_topic_key(topic, secret)
    assert v["keys.topic_id"] == derived(16, topic_key, b"topic id") == keys.derive_topic_id(topic_key)
    assert len(v["keys.handshake_hash"]) == 64
    for role in ("initiator", "responder"):
        tag = derived(32, topic_key, b"tag", v["keys.handshake_hash"], role.encode())
        assert v[f"keys.tag_of_{role}"] == tag == keys.topic_tag(topic_key, v["keys.handshake_hash"], role.encode())
    for name in ("author", "other"):
        public = v[f"keys.{name}"]
        assert public == public_of(v[f"keys.{name}_seed"])
        assert v[f"keys.{name}_id"] == b64encode(public).decode() + ".ed25519" == keys.format_author(public)
    numbers = (v["keys.epoch"], v["keys.sequence"])
    assert v["keys.message_id"] == f"{v['keys.author_id']}:{numbers[0]}:{numbers[1]}" == keys.format_message_id(v["keys.author"], *numbers)


def check_payloads(v: Vectors) -> None:
    for name, value in under(v, "payload.").items():
        if name.endswith(".value"):
            encoded = v["payload." + name.removesuffix(".value")]
            assert encoded == pack(value) == payload.encode(value)
            assert payload.decode(encoded) == value
        elif name.endswith(".microseconds"):
            encoded = v["payload." + name.removesuffix(".microseconds")]
            seconds, rest = divmod(value, 1_000_000)
            assert encoded == (
                b"\xd7\xff" + struct.pack(">Q", rest * 1000 << 34 | seconds) if rest else b"\xd6\xff" + struct.pack(">I", seconds)
            )
            instant = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=value)
            assert payload.decode(encoded) == instant
            assert payload.encode(instant) == encoded
        else:
            assert {f"payload.{name}.value", f"payload.{name}.microseconds"} & v.keys()


def check_envelopes(v: Vectors) -> None:
    opened = []
    for name in ("envelope.first", "envelope.second"):
        fields, body, id, signature = (v[f"{name}.{part}"] for part in ("fields", "body", "id", "signature"))
        topic_id, author, epoch, first, time, payloads = fields
        assert (topic_id, author) == (v["keys.topic_id"], v["keys.author"])
        assert body == pack(fields)
        assert id == hashed(32, b"", b"", body)
        assert signature == signed(v["keys.author_seed"], b"solyd_swarm envelope v1\0" + id)
        made = seal(topic_id, author, epoch, first, time, tuple(payloads), lambda data: signed(v["keys.author_seed"], data))
        assert (made.body, made.id, made.signature) == (body, id, signature)
        opened.append(open_envelope(topic_id, body, signature))
        assert (opened[-1].id, opened[-1].last) == (id, first + len(payloads) - 1)
    assert equivocate(*opened)
    item = hashed(32, b"solyd equivocat", b"", opened[0].author + struct.pack(">Q", opened[0].epoch))
    assert v["envelope.equivocation_id"] == item == equivocation_id(opened[0].author, opened[0].epoch)


def check_signatures(v: Vectors) -> None:
    for name, (public, signature, data) in under(v, "refused.signature.").items():
        assert not verify_ed25519(public, signature, data), name
    public, signature, data = v["taken.signature.key_of_mixed_order"]
    assert verify_ed25519(public, signature, data)
    Ed25519PublicKey.from_public_bytes(public).verify(signature, data)


def check_channel(v: Vectors) -> None:
    messages, h, ciphers = noise_xx(v)
    assert [v[f"noise.message_{number}"] for number in (1, 2, 3)] == messages
    assert v["noise.handshake_hash"] == h
    sides = {
        side: NoiseSession(
            side == "i", v[f"noise.{side}.static"], payload=v[f"noise.{side}.payload"], ephemeral_private=v[f"noise.{side}.ephemeral"]
        )
        for side in "ir"
    }
    assert (sides["i"].start(), sides["r"].start()) == (messages[0], b"")
    assert sides["r"].read_handshake(messages[0][2:]) == messages[1]
    assert sides["i"].read_handshake(messages[1][2:]) == messages[2]
    assert sides["r"].read_handshake(messages[2][2:]) == b""
    for side, other in ("ir", "ri"):
        assert v[f"noise.{side}.instance"] == public_key(v[f"noise.{side}.static"]) == sides[other].remote_static
        assert sides[other].remote_payload == v[f"noise.{side}.payload"]
        stretches = under(v, f"stream.{side}.")
        assert stretches.keys() == under(v, f"sealed.{side}.").keys()
        for number, (name, stretch) in enumerate(sorted(stretches.items())):
            message = ciphers[side].encrypt(struct.pack("<4xQ", number), stretch, None)
            assert v[f"sealed.{side}.{name}"] == struct.pack(">H", len(message)) + message == sides[side].seal(stretch)
            assert sides[other].open(message) == stretch
    assert v["noise.i.payload"] == pack([1, 4001, 4002]) == encode_hello(4001, 4002)
    assert v["noise.r.payload"] == pack([1, 5001, 0]) == encode_hello(5001, 0)
    check_matching(v, h)
    check_streams(v)


def check_matching(v: Vectors, h: bytes) -> None:
    """The frames of section 7, from the text; then two matchers say the same."""
    topic, another = v["keys.topic_key"], hashed(32, b"solyd topic", b"", b"another topic")
    tags = {role: derived(32, topic, b"tag", h, role) for role in (b"initiator", b"responder")}
    offered = [[1, derived(32, another, b"tag", h, b"initiator")], [2, tags[b"initiator"]]]
    addresses = {"i": [["192.0.2.1", 4001]], "r": [["2001:db8::1", 5001]]}
    authors = {"i": ("author", b"initiator"), "r": ("other", b"responder")}
    proofs = {
        side: [v[f"keys.{name}"], signed(v[f"keys.{name}_seed"], b"solyd_swarm author v1\0" + h + role), addresses[side]]
        for side, (name, role) in authors.items()
    }
    expected = {
        "i.use": b"\x05" + pack([1000]),
        "i.offer": b"\x01" + pack([offered]),
        "i.author": b"\x03" + pack(proofs["i"]),
        "i.topic": b"\x10\0\2" + v["frame.join"],
        "r.use": b"\x05" + pack([77]),
        "r.accept": b"\x02" + pack([2, tags[b"responder"]]),
        "r.author": b"\x03" + pack(proofs["r"]),
        "withdraw": b"\x04" + pack([2]),
        "greeting": b"\x06" + pack([1, 4001, 4003]),
    }
    assert under(v, "control.") == expected
    sent: dict[str, list[bytes]] = {"i": [], "r": []}
    both = {side: matcher(v, side, h, sent[side].append) for side in "ir"}
    both["i"].join(another, topic)
    both["r"].join(topic)
    assert both["r"].handle(expected["i.offer"]) == []
    assert both["i"].handle(expected["r.accept"]) == []
    assert both["i"].handle(expected["r.author"]) == [("up", topic)] == both["r"].handle(expected["i.author"])
    for unknown in under(v, "skipped.control.").values():
        assert both["i"].handle(unknown) == []
        assert unknown[0] not in reach_frames.TYPES
    both["i"].leave(topic)
    assert both["r"].handle(expected["withdraw"]) == [("down", topic)]
    assert sent == {
        "i": [expected[f"i.{name}"] for name in ("offer", "author")] + [expected["withdraw"]],
        "r": [expected["r.accept"], expected["r.author"]],
    }
    assert expected["greeting"] == b"\x06" + encode_hello(4001, 4003)


def matcher(v: Vectors, side: str, h: bytes, send: Callable[[bytes], None]) -> Matcher:
    name, address = ("author", ("192.0.2.1", 4001)) if side == "i" else ("other", ("2001:db8::1", 5001))
    return Matcher(side == "i", h, send, Identity(v[f"keys.{name}"], lambda data: signed(v[f"keys.{name}_seed"], data)), lambda: (address,))


def check_streams(v: Vectors) -> None:
    sent = {"i": ["use", "offer", "author", "topic"], "r": ["use", "accept", "author"]}
    for side, names in sent.items():
        expected = [v[f"control.{side}.{name}"] for name in names]
        stretches = [stretch for _, stretch in sorted(under(v, f"stream.{side}.").items())]
        frames: list[bytes] = []
        reader = FrameReader()
        for stretch in stretches:
            reader.feed(stretch, frames)
        assert (frames, reader.partial) == (expected, False)
        writer = FrameWriter()
        for frame in expected:
            writer.push(frame)
        framed = b"".join(struct.pack(">I", len(frame)) + frame for frame in expected)
        assert writer.take(10**6) == framed
        assert b"".join(stretches) in (framed, framed[: len(stretches[0]) - 4] + bytes(4) + framed[len(stretches[0]) - 4 :])
    assert v["stream.i.1"].endswith(bytes(4))
    assert v["stream.i.3"] == v["control.i.topic"][-2:]


def snake(kind: type[wire.Frame]) -> str:
    return re.sub(r"(?<=.)([A-Z])", r"_\1", kind.__name__).lower()


def check_frames(v: Vectors) -> None:
    expected = frame_fields(v)
    for kind in wire.ALL_FRAMES:
        name = snake(kind)
        data = v[f"frame.{name}"]
        assert v[f"frame.{name}.fields"] == expected.pop(name), name
        assert data == bytes([kind.TYPE]) + pack(v[f"frame.{name}.fields"]), name
        frame = wire.decode(data)
        assert type(frame) is kind
        assert wire.encode(frame) == data
    assert not expected
    assert len(under(v, "frame.")) == 2 * len(wire.ALL_FRAMES)


def frame_fields(v: Vectors) -> dict[str, list[Any]]:
    """What the frames of the vectors say."""
    instance = v["noise.i.instance"]
    me = [instance, [["192.0.2.1", 4001], ["2001:db8::1", 4001]]]
    you = [v["noise.r.instance"], [["2001:db8::1", 5001]]]
    one, two = (under(v, f"envelope.{name}.") for name in ("first", "second"))
    items = [(each["fields"][4], each["id"]) for each in (one, two)]
    pull = [[one["id"]], 600_000, [[v["envelope.equivocation_id"], two["id"]]]]
    return {
        "join": [], "forward_join": [me, 6], "neighbor": [False, v["noise.r.instance"]], "neighbor_reply": [True, [you]],
        "shuffle": [me, 5, [you]],
        "shuffle_reply": [instance, [you]], "disconnect": [[you]], "leave": [],
        "view": [[you]],
        "gossip": [250, 0, one["body"], one["signature"]], "ihave": [[one["id"], two["id"]], [0, 300]], "graft": [[one["id"]]],
        "prune": [], "ack": [70_000],
        "summary": [9, 3, v["digest.fingerprint"]], "in_sync": [9], "reconcile": [9, True, v["digest.first_message"], 2],
        "have": [[one["id"]]], "done": [9], "pull": pull, "transfer": [1250, 3, two["body"], two["signature"]],
        "gone": [two["id"], True, two["fields"][4], 700_000],
        "gone_run": [one["id"], two["id"], fingerprint_of(items), [items[0][0], items[1][0] - items[0][0]], [700_000, -1000]],
        "seek": [600_000, [[list(items[0]), list(items[1]), fingerprint_of(items)]]], "unmatched": [[one["id"]]],
        "proof": [1250, one["body"], one["signature"], two["body"], two["signature"]],
    }  # fmt: skip


def check_digests(v: Vectors) -> None:
    one, two = (under(v, f"envelope.{name}.") for name in ("first", "second"))
    items = [(one["fields"][4], one["id"]), (two["fields"][4], two["id"]), (one["fields"][2], v["envelope.equivocation_id"])]
    assert v["digest.items"] == [list(item) for item in items]
    forty = [(1000 + i // 2, sha256(bytes([i])).digest()) for i in range(40)]
    for prefix, those in (("digest.", items), ("digest.forty.", forty)):
        held = ItemSet(those)
        assert v[prefix + "fingerprint"] == fingerprint_of(those) == held.summary()[1]
        assert v[prefix + "first_message"] == first_message(those) == Negentropy(items=held).initiate()
    server = Negentropy(items=ItemSet(item for item in forty if item != forty[7]))
    assert server.reconcile(v["digest.forty.first_message"]).reply == v["digest.forty.reply"]
    client = Negentropy(items=ItemSet(forty))
    client.initiate()
    result = client.reconcile(v["digest.forty.reply"])
    assert (result.reply, result.have, result.need) == (None, [v["digest.forty.missing"]], [])
    assert v["digest.forty.missing"] == forty[7][1]


def check_discovery(v: Vectors) -> None:
    instance, addresses = v["ticket.instance"], v["ticket.addresses"]
    body = pack([instance, addresses])
    text = "solyd1" + urlsafe_b64encode(body + hashed(4, b"solyd ticket", b"", body)).decode().rstrip("=")
    pairs = tuple((host, port) for host, port in addresses)
    assert v["ticket.text"] == text == make_ticket(instance, pairs)
    assert parse_contact(text) == Contact(pairs, instance)
    nonce, tag = v["mdns.nonce"], derived(16, v["keys.topic_key"], b"mdns", v["mdns.nonce"])
    assert v["mdns.tag"] == tag
    assert v["mdns.txt"] == b"\x12n=" + nonce + b"\x12t=" + tag
    assert parse_txt(v["mdns.txt"]) == (nonce, tag)
    check_records(v)
    check_skip(v)
    check_datagrams(v)


def check_records(v: Vectors) -> None:
    topic_key, instance = v["keys.topic_key"], v["noise.i.instance"]
    assert v["dht.day"] == (datetime(2026, 1, 1) - datetime(1970, 1, 1)).days
    day = struct.pack(">q", v["dht.day"])
    assert v["mainline.infohash"] == derived(20, topic_key, b"mainline", day) == infohash_of(topic_key, v["dht.day"])
    seed, box_key = derived(32, topic_key, b"dht key", day), derived(32, topic_key, b"dht box", day)
    assert (v["dht.seed"], v["dht.box_key"], v["dht.public"]) == (seed, box_key, public_of(seed))
    assert v["dht.key"] == hashed(20, b"solyd dht key", b"", v["dht.public"])
    assert v["dht.slot"] == derived(16, topic_key, b"dht slot", day, instance)
    assert v["dht.text"] == instance + b"\1\4\xc0\0\2\1" + struct.pack(">H", 4001)
    box = bytes(SecretBox(box_key).encrypt(v["dht.text"], v["dht.nonce"]))
    days = records.DayKeys(topic_key, v["dht.day"])
    assert (days.public, days.key, days.slot(instance)) == (v["dht.public"], v["dht.key"], v["dht.slot"])
    for name, sequence, content in (("record", v["dht.sequence"], box), ("withdrawal", v["dht.sequence"] + 1, b"")):
        head = v["dht.slot"] + struct.pack(">QH", sequence, v["dht.life"]) + content
        assert v[f"dht.{name}"] == signed(seed, b"solyd dht record 1" + head) + head
        record = records.verify(days.public, v[f"dht.{name}"])
        assert (record.sequence, record.life) == (sequence, v["dht.life"])
        found = records.open_record(days, record)
        assert (found and [(address.host, address.port) for address in found.addresses]) == ([("192.0.2.1", 4001)] if content else None)


def check_skip(v: Vectors) -> None:
    salt, pair = v["dht.skip.salt"], (v["dht.slot"], v["dht.sequence"])
    digest = blake2b(pair[0] + struct.pack(">Q", pair[1]), key=salt, digest_size=12, person=b"solyd dht skip").digest()
    places = [word % (312 * 8) for word in struct.unpack(">3I", digest)]
    assert v["dht.skip.places"] == places
    filled = dht_wire.make_skip([pair], salt)
    bits = int.from_bytes(filled[8:], "little")
    assert filled[:8] == salt
    assert bits == sum({1 << place for place in places})
    assert dht_wire.Find(bytes(20), v["dht.key"], filled).skips(*pair)
    assert not dht_wire.Find(bytes(20), v["dht.key"], filled).skips(pair[0], pair[1] + 1)


def check_datagrams(v: Vectors) -> None:
    sender, other, call, token = bytes(range(20)), bytes(range(20, 40)), bytes(range(100, 120)), bytes(8)
    node = [other, b"\xc0\0\2\7", 4002]
    expected: dict[str, tuple[int, list[Any], type[Any]]] = {
        "ping": (0, ["ping", [sender]], dht_wire.Ping),
        "pong": (1, [other], dht_wire.Pong),
        "find_node": (0, ["find_node", [sender, v["dht.key"], bytes(16)]], dht_wire.Find),
        "nodes": (1, [other, token, [node], 0, []], dht_wire.Found),
        "find_value": (0, ["find_value", [sender, v["dht.key"], bytes(16)]], dht_wire.Find),
        "found": (1, [other, token, [node], 1, [v["dht.record"]]], dht_wire.Found),
        "store": (0, ["store", [sender, v["dht.key"], v["dht.public"], v["dht.record"], token]], dht_wire.Store),
        "stored": (1, [other, True], dht_wire.Stored),
    }
    assert len(under(v, "datagram.")) == 2 * len(expected)
    for name, (kind, fields, struct_type) in expected.items():
        data = v[f"datagram.{name}"]
        assert v[f"datagram.{name}.fields"] == [kind, call, fields]
        assert data == bytes([kind]) + call + pack(fields)
        got_kind, got_call, body = dht_wire.split(data)
        if kind:
            assert dht_wire.frame(got_kind, got_call, dht_wire.decode(body, struct_type)) == data
        else:
            request = dht_wire.decode(body, dht_wire.Request)
            assert dht_wire.request(got_call, request.name, dht_wire.decode(request.arguments, struct_type)) == data


def check_tolerated(v: Vectors) -> None:
    for name, same in under(v, "tolerated.").items():
        if name.endswith(".same"):
            data = v["tolerated." + name.removesuffix(".same")]
            assert data != v[same]
            assert wire.decode(data) == wire.decode(v[same]) is not None
    for name, data in under(v, "skipped.frame.").items():
        assert wire.decode(data) is None, name


def receive(v: Vectors, data: bytes) -> None:
    """One frame on a new link; raises what the channel would be closed for."""
    assert wire.decode(data) is not None
    public, peer = v["keys.other"], v["noise.i.instance"]
    overlay = Overlay(wire.PeerInfo(v["noise.r.instance"]), v["keys.topic_id"], public, 1, lambda data: bytes(64), random.Random(0))
    overlay.handle(LinkUp(peer, v["keys.author"], (), False), 0.0)
    for action in overlay.handle(Received(peer, [data]), 0.0):
        if isinstance(action, Close):
            raise RemoteProtocolError(action.reason)


def check_malformed(v: Vectors) -> None:
    """Each is refused, and by nothing but `RemoteProtocolError`."""

    def open_signed(body: bytes) -> None:
        open_envelope(v["keys.topic_id"], body, signed(v["keys.author_seed"], b"solyd_swarm envelope v1\0" + hashed(32, b"", b"", body)))

    readers: dict[str, Callable[[bytes], object]] = {
        "frame": wire.decode,
        "link": lambda data: receive(v, data),
        "control": lambda data: matcher(v, "r", v["noise.handshake_hash"], lambda frame: None).handle(data),
        "reach": reach_frames.decode,
        "greeting": decode_hello,
        "stream": lambda data: FrameReader().feed(data, []),
        "negentropy": lambda data: Negentropy().reconcile(data),
        "envelope": open_signed,
        "datagram": dht_wire.split,
        "payload": payload.decode,
    }
    seen = set()
    for name, data in under(v, "malformed.").items():
        kind = name.partition(".")[0]
        seen.add(kind)
        with pytest.raises(PayloadError if kind == "payload" else RemoteProtocolError):
            readers[kind](data)
    assert seen == readers.keys()


CHECKS: list[Callable[[Vectors], None]] = [
    check_keys, check_payloads, check_envelopes, check_signatures, check_channel, check_frames, check_digests, check_discovery,
    check_tolerated, check_malformed,
]  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_vectors(check: Callable[[Vectors], None]) -> None:
    check(VECTORS)


def altered(value: Any) -> Iterator[Any]:
    """Values with one thing changed."""
    match value:
        case bool():
            yield not value
        case int():
            yield value + 1
        case str():
            yield value + "x"
        case bytes():
            for place in {0, len(value) // 2, len(value) - 1} if value else ():
                yield value[:place] + bytes([value[place] ^ 0x10]) + value[place + 1 :]
            yield value + b"\0"
        case list():
            for place, each in enumerate(value):
                yield from ([*value[:place], other, *value[place + 1 :]] for other in altered(each))


# These say only that something is refused, skipped or taken, which some other bytes are as well.
FREE = ("malformed.", "refused.", "skipped.", "tolerated.")


def holds(vectors: Vectors) -> bool:
    try:
        for check in CHECKS:
            check(vectors)
    except (AssertionError, LookupError, TypeError, ValueError, SwarmError, InvalidSignature, CryptoError):
        return False
    except pytest.fail.Exception:  # what `pytest.raises` raises
        return False
    return True


@pytest.mark.parametrize("name", [name for name in VECTORS if not name.startswith(FREE)])
def test_an_altered_vector_is_noticed(name: str) -> None:
    for other in altered(VECTORS[name]):
        assert not holds(VECTORS | {name: other}), other


# -- the tables ----------------------------------------------------------------------------------------------------


def tables() -> list[list[list[str]]]:
    settings = {"report_level": 2, "halt_level": 2}
    document = docutils.core.publish_doctree(TEXT, str(DOCUMENT), settings_overrides=settings)
    return [
        [[entry.astext() for entry in row.findall(docutils.nodes.entry)] for row in table.findall(docutils.nodes.row)]
        for table in document.findall(docutils.nodes.table)
    ]


def test_the_table_of_frames_names_all_frames_and_their_fields() -> None:
    (rows,) = [table[1:] for table in tables() if any(row[1] == "Join" for row in table)]
    bare = [(number, name, re.sub(r"\([^)]*\)", "", fields)) for number, name, fields in rows]
    told = {name: (int(number, 16), re.findall(r"(?:^|, )([a-z_]+)", fields)) for number, name, fields in bare}
    assert told == {kind.__name__: (kind.TYPE, list(kind.__struct_fields__)) for kind in wire.ALL_FRAMES}


MODULES = (
    "core.wire", "core.envelope", "core.reconcile", "core.broadcast", "core.link", "core.pulling", "core.log", "core.ledger",
    "net.noise", "net.bounds", "net.matching", "discovery.dht_wire", "discovery.records", "discovery.mdns_service", "payload",
)  # fmt: skip


def test_bounds_are_those_of_the_code() -> None:
    (rows,) = [table[1:] for table in tables() if table[0] == ["name", "value", "against"]]
    assert len(rows) > 30
    for name, value, _ in rows:
        name = name.rstrip(" *")
        homes = [module for module in map(import_module, (f"solyd_swarm.{each}" for each in MODULES)) if hasattr(module, name)]
        assert homes, name
        assert int(value) == getattr(homes[0], name), name


def test_what_is_not_in_a_table_is_as_the_document_says() -> None:
    assert len(split_batch([bytes(48 * 1024 - 5), b""])) == 2
    assert len(split_batch([bytes(48 * 1024 - 10), b""])) == 1
    assert wire.MAX_ENVELOPE + 1024 < MAX_FRAME
