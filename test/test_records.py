"""DHT records: who can write, read and replace them; and how a storing node bounds them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.signing import SigningKey

from solyd_swarm.core.keys import derive_topic_key
from solyd_swarm.discovery.dht_storage import SWEEP_SECONDS, Caps, Entry, RateLimit, RecordStorage, network_of
from solyd_swarm.discovery.records import (
    MAX_ADDRESSES,
    MAX_LIFE,
    MAX_RECORD,
    Announcement,
    DayKeys,
    day_of,
    dht_key,
    open_record,
    seal,
    verify,
    withdraw,
)
from solyd_swarm.discovery.source import Address
from solyd_swarm.errors import RemoteProtocolError

TOPIC = derive_topic_key("a topic")
KEYS = DayKeys(TOPIC, 20_000)
ADDRESSES = (Address("192.168.1.2", 4000), Address("2a00::1", 4000), Address("127.0.0.1", 1))


def instance(number):
    return number.to_bytes(32, "big")


def record(number=1, sequence=1, life=600, keys=KEYS):
    return seal(keys, instance(number), ADDRESSES, sequence, life)


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def test_a_member_reads_what_another_wrote():
    reader = DayKeys(TOPIC, 20_000)
    verified = verify(reader.public, record().raw)
    assert (verified.slot, verified.sequence, verified.life) == (KEYS.slot(instance(1)), 1, 600)
    assert open_record(reader, verified) == Announcement(instance(1), ADDRESSES)


def test_nothing_is_shared_between_topics_days_and_instances():
    others = [DayKeys(TOPIC, 20_001), DayKeys(derive_topic_key("another"), 20_000), DayKeys(derive_topic_key("a topic", b"secret"), 20_000)]
    for other in others:
        assert other.key != KEYS.key
        assert other.slot(instance(1)) != KEYS.slot(instance(1))
        with pytest.raises(RemoteProtocolError):
            open_record(other, record())
        with pytest.raises(RemoteProtocolError):
            verify(other.public, record().raw)
    assert KEYS.slot(instance(1)) != KEYS.slot(instance(2))
    assert len(KEYS.key) == 20
    assert dht_key(KEYS.public) == KEYS.key


def test_the_largest_record():
    addresses = [Address(f"2a00::{number}", 65_535) for number in range(1, MAX_ADDRESSES + 3)]
    largest = seal(KEYS, instance(1), addresses, 2**64 - 1, MAX_LIFE)
    assert len(largest.raw) == MAX_RECORD
    opened = open_record(KEYS, verify(KEYS.public, largest.raw))
    assert opened.addresses == tuple(addresses[:MAX_ADDRESSES])


def test_a_withdrawal_has_no_body():
    verified = verify(KEYS.public, withdraw(KEYS, instance(1), 2, 600).raw)
    assert open_record(KEYS, verified) is None
    assert verified.slot == record().slot


def test_useless_addresses_are_left_out():
    useless = [Address("224.0.0.1", 5), Address("0.0.0.0", 5), Address("10.0.0.1", 0)]
    sealed = seal(KEYS, instance(1), [*useless, Address("10.0.0.1", 5)], 1, 60)
    assert open_record(KEYS, sealed).addresses == (Address("10.0.0.1", 5),)


def test_an_instance_has_one_slot_only():
    forged = seal(KEYS, instance(1), ADDRESSES, 1, 60)
    other = withdraw(KEYS, instance(2), 1, 60)
    signed = other.raw[64:90] + forged.box
    raw = KEYS.signer.sign(b"solyd dht record 1" + signed).signature + signed
    with pytest.raises(RemoteProtocolError, match="slot"):
        open_record(KEYS, verify(KEYS.public, raw))


@pytest.mark.parametrize("life", [0, MAX_LIFE + 1])
def test_a_life_out_of_bounds(life):
    with pytest.raises(ValueError):
        record(life=life)
    signed = record().raw[64:88] + life.to_bytes(2, "big") + record().box
    with pytest.raises(RemoteProtocolError, match="long"):
        verify(KEYS.public, KEYS.signer.sign(b"solyd dht record 1" + signed).signature + signed)


def test_an_outsider_cannot_sign():
    outsider = SigningKey.generate()
    signed = record().raw[64:]
    raw = outsider.sign(b"solyd dht record 1" + signed).signature + signed
    with pytest.raises(RemoteProtocolError, match="signature"):
        verify(KEYS.public, raw)
    assert dht_key(bytes(outsider.verify_key)) != KEYS.key


@given(st.integers(0, len(record().raw) - 1), st.integers(1, 255))
def test_every_bit_is_covered(position, change):
    raw = bytearray(record().raw)
    raw[position] ^= change
    with pytest.raises(RemoteProtocolError):
        verify(KEYS.public, bytes(raw))


@given(st.binary(max_size=2 * MAX_RECORD), st.binary(max_size=40))
def test_noise_raises_one_error_only(raw, public):
    with pytest.raises(RemoteProtocolError):
        verify(public, raw)


@given(st.binary(max_size=200))
def test_a_members_malformed_body_raises_one_error_only(body):
    signed = record().raw[64:90] + bytes(KEYS.box.encrypt(body))
    verified = verify(KEYS.public, KEYS.signer.sign(b"solyd dht record 1" + signed).signature + signed)
    with pytest.raises(RemoteProtocolError):
        open_record(KEYS, verified)


def test_day_of():
    assert day_of(86_399.9) == 0
    assert day_of(86_400) == 1


# What a storing node keeps.


def test_slots_are_merged_and_the_highest_sequence_stays():
    storage = RecordStorage()
    storage[KEYS.key] = Entry(record(1, sequence=5), "10.0.0.1")
    storage[KEYS.key] = Entry(record(2, sequence=1), "10.0.0.2")
    assert not storage.put(KEYS.key, Entry(record(1, sequence=4), "10.0.0.1"))
    assert storage.put(KEYS.key, Entry(record(1, sequence=6), "10.0.0.3"))
    assert sorted(entry.record.sequence for entry in storage[KEYS.key]) == [1, 6]
    assert storage.get(bytes(20)) is None
    assert list(storage.iter_older_than(0)) == []
    assert [key for key, _ in storage] == [KEYS.key]
    with pytest.raises(KeyError):
        storage[bytes(20)]


def test_own_records_are_not_replaced_by_others():
    storage = RecordStorage(Caps(per_key=1))
    assert storage.put(KEYS.key, Entry(record(1, sequence=5), ""))
    assert not storage.put(KEYS.key, Entry(record(1, sequence=9), "10.0.0.1"))
    assert storage.put(KEYS.key, Entry(record(2), "10.0.0.1"))
    assert storage.put(KEYS.key, Entry(record(3), "10.0.0.1"))
    assert [entry.sender for entry in storage.entries(KEYS.key)] == ["", "10.0.0.1"]


def test_records_expire_and_a_replay_does_not_prolong_them():
    clock = Clock()
    storage = RecordStorage(monotonic=clock)
    replayed = record(1, life=600)
    storage.put(KEYS.key, Entry(replayed, "10.0.0.1"))
    clock.now += 599
    assert not storage.put(KEYS.key, Entry(replayed, "10.0.0.1"))
    assert storage.holds(KEYS.key, replayed)
    clock.now += 1
    assert not storage.holds(KEYS.key, replayed)
    assert storage.sample(KEYS.key, 1000) == ([], 0)
    clock.now += SWEEP_SECONDS
    storage.put(bytes(20), Entry(record(2), "10.0.0.1"))
    assert storage.total == Entry(record(2), "").size
    assert storage.get(KEYS.key) is None


def test_a_full_key_evicts_from_the_network_that_holds_most():
    storage = RecordStorage(Caps(per_key=10))
    storage.put(KEYS.key, Entry(record(1), "10.0.0.1"))
    for number in range(100, 130):
        storage.put(KEYS.key, Entry(record(number), "10.0.0.2"))
    slots = {entry.record.slot for entry in storage.entries(KEYS.key)}
    assert len(slots) == 10
    assert KEYS.slot(instance(1)) in slots
    assert KEYS.slot(instance(129)) in slots
    assert KEYS.slot(instance(100)) not in slots


def test_a_source_evicts_its_own_oldest():
    size = Entry(record(), "").size
    storage = RecordStorage(Caps(per_source=3 * size))
    storage.put(bytes(20), Entry(record(1), "10.0.0.1"))
    for number in range(10):
        storage.put(number.to_bytes(20, "big"), Entry(record(2), f"2a00::{number + 1}"))
    assert storage.total == 4 * size
    assert [len(storage.entries(number.to_bytes(20, "big"))) for number in range(10)] == [1, 0, 0, 0, 0, 0, 0, 1, 1, 1]


def test_a_full_storage_evicts_from_the_largest_source():
    size = Entry(record(), "").size
    storage = RecordStorage(Caps(total=10 * size))
    storage.put(b"a" * 20, Entry(record(1), "10.0.0.1"))
    for number in range(20):
        storage.put(number.to_bytes(20, "big"), Entry(record(2), "10.0.0.2"))
    for number in range(5):
        storage.put(b"b" * 20, Entry(record(number), f"10.0.1.{number}"))
    assert storage.total == 10 * size
    assert len(storage.entries(b"a" * 20)) == 1
    assert len(storage.entries(b"b" * 20)) == 5


def test_samples_fit_and_show_everything_in_the_end():
    storage = RecordStorage()
    for number in range(40):
        storage.put(KEYS.key, Entry(record(number), "10.0.0.1"))
    seen = set()
    for _ in range(200):
        chosen, total = storage.sample(KEYS.key, 900)
        assert total == 40
        assert 0 < sum(map(len, chosen)) <= 900
        seen.update(chosen)
    assert len(seen) == 40


def test_networks():
    assert network_of("10.0.0.1") != network_of("10.0.0.2")
    assert network_of("2a00:1:2:3::1") == network_of("2a00:1:2:3:ffff::1")
    assert network_of("2a00:1:2:3::1") != network_of("2a00:1:2:4::1")


def test_rate_limit():
    clock = Clock()
    limit = RateLimit(rate=10, burst=20, total=100, monotonic=clock)
    assert [limit.allow("a") for _ in range(25)] == [True] * 20 + [False] * 5
    assert limit.allow("b")
    clock.now += 0.5
    assert [limit.allow("a") for _ in range(6)] == [True] * 5 + [False]
    clock.now += 10
    assert sum(limit.allow(str(number)) for number in range(200)) == 100
    clock.now += 10
    assert sum(limit.allow(None) for _ in range(200)) == 100
    for number in range(2 * RateLimit.SOURCES):
        limit.allow(str(number))
    assert len(limit._buckets) == RateLimit.SOURCES
