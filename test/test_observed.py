"""Where we are seen, what of it is believed, and which addresses are told to others. No sockets, no clock."""

import itertools
import re
from pathlib import Path

import msgspec
import pytest

from solyd_swarm.errors import RemoteProtocolError
from solyd_swarm.net import observed, rates, reach_frames, reachable
from solyd_swarm.net.observed import Observed, is_near, network_of
from solyd_swarm.net.rates import Rates
from solyd_swarm.net.reach_frames import Punch, Punched, Seen, Tried, Try, pack_host, unpack_host
from solyd_swarm.net.reachable import Reachable

HOME = "60.2.0.2"
numbers = itertools.count()


def somebody() -> bytes:
    return next(numbers).to_bytes(32, "big")


def told(*words: tuple[str, str, int], stands: bool = True) -> Observed:
    """By tellers at these hosts: where each of them sees us."""
    found = Observed()
    for teller_host, host, port in words:
        assert found.tell(somebody(), teller_host, host, port, stands=stands)
    return found


# -- what cannot be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "port", "teller", "reason"),
    [
        (HOME, 0, "60.1.0.1", "port"),
        ("2600::1", 0, "2600::9", "port"),
        ("224.0.0.1", 7000, "60.1.0.1", "invalid"),
        ("239.255.255.250", 7000, "127.0.0.1", "invalid"),
        ("ff02::1", 7000, "fe80::1", "invalid"),
        ("0.0.0.0", 7000, "127.0.0.1", "invalid"),
        ("0.1.2.3", 7000, "127.0.0.1", "invalid"),
        ("::", 7000, "::1", "invalid"),
        ("255.255.255.255", 7000, "127.0.0.1", "invalid"),
        ("240.0.0.1", 7000, "60.1.0.1", "invalid"),
        ("", 7000, "60.1.0.1", "invalid"),
        ("127.0.0.1", 7000, "60.1.0.1", "scope"),
        ("127.0.0.1", 7000, "192.168.1.9", "scope"),
        ("::1", 7000, "2600::9", "scope"),
        ("192.168.1.5", 7000, "60.1.0.1", "scope"),
        ("10.0.0.1", 7000, "2600::9", "scope"),
        ("169.254.1.1", 7000, "10.0.0.2", "scope"),
        ("fe80::1", 7000, "60.1.0.1", "scope"),
        ("fd00::1", 7000, "60.1.0.1", "scope"),
        ("100.64.0.1", 7000, "60.1.0.1", "scope"),
        ("::ffff:192.168.1.5", 7000, "60.1.0.1", "scope"),
    ],
)
def test_an_impossible_address_is_refused_and_counted(host: str, port: int, teller: str, reason: str) -> None:
    found = Observed()
    who = somebody()
    assert not found.tell(who, teller, host, port, stands=True)
    assert found.refused == {reason: 1}
    assert found.host_by(who) == found.public_host(4) == found.public_host(6) == ""
    assert found.mapped_ports(host) == []


@pytest.mark.parametrize(("host", "teller"), [("192.168.1.5", "192.168.1.9"), ("10.0.0.1", "127.0.0.1"), ("127.0.0.1", "127.0.0.1")])
def test_inside_a_network_its_own_addresses_are_in_order_but_not_public(host: str, teller: str) -> None:
    found, who = Observed(), somebody()
    assert found.tell(who, teller, host, 7000, stands=True)
    assert (found.host_by(who), found.public_host(4), found.refused) == (host, "", {})


# -- our public address --------------------------------------------------------------------------------------------


def test_a_single_teller_is_believed_until_another_network_disagrees() -> None:
    found = told(("60.1.0.1", HOME, 7000))
    assert (found.public_host(4), found.public_host(6)) == (HOME, "")
    assert found.tell(somebody(), "61.1.0.1", "9.9.9.9", 7000, stands=True)
    assert found.public_host(4) == ""  # one of them lies, and nobody knows which
    assert found.tell(somebody(), "62.1.0.1", HOME, 7000, stands=True)
    assert found.public_host(4) == HOME


def test_a_network_of_liars_has_one_voice() -> None:
    found = told(*(("66.6.0.1", "9.9.9.9", 1) for _ in range(20)), ("60.1.0.1", HOME, 7000), ("61.1.0.1", HOME, 7000))
    assert found.public_host(4) == HOME


def test_both_versions_of_ip_have_an_address() -> None:
    found = told(("60.1.0.1", HOME, 1), ("61.1.0.1", HOME, 1), ("2600:1::1", "2a00::5", 2), ("2601:1::1", "2a00::5", 2))
    assert (found.public_host(4), found.public_host(6)) == (HOME, "2a00::5")


def test_a_peer_has_one_word_the_last_and_none_after_a_move() -> None:
    found, who = Observed(), somebody()
    for host in ("9.9.9.9", HOME):
        assert found.tell(who, "60.1.0.1", host, 7000, stands=True)
    assert (found.public_host(4), found.host_by(who)) == (HOME, HOME)
    found.forget({who})
    assert found.host_by(who) == HOME
    found.forget()
    assert (found.public_host(4), found.host_by(who)) == ("", "")


def test_tellers_are_bounded_and_the_busiest_network_makes_room() -> None:
    found = told(("60.1.0.1", HOME, 7000), ("61.1.0.1", HOME, 7000))
    for number in range(observed.MAX_TELLERS * 2):
        found.tell(somebody(), f"66.6.0.{number % 250}", "9.9.9.9", 1, stands=True)
    assert len(found._words) == observed.MAX_TELLERS
    assert found.public_host(4) == HOME


def test_networks() -> None:
    assert network_of("60.1.2.3") == network_of("60.1.255.255") == network_of("::ffff:60.1.0.0") != network_of("60.2.2.3")
    assert network_of("2600:1:2::1") == network_of("2600:1:3::1%eth0") != network_of("2600:2::1")


def test_neighbours_on_one_link_are_no_outsiders() -> None:
    assert is_near("60.1.2.3", "60.1.2.99")
    assert is_near("2600:1::1", "2600:1::ffff%eth0")
    assert not is_near("60.1.2.3", "60.1.3.3")
    assert not is_near("2600:1::1", "2600:1:0:1::1")
    assert not is_near("60.1.2.3", "2600:1::1")


# -- the translator in between -------------------------------------------------------------------------------------


def test_whether_a_mapping_depends_on_whom_we_speak_to() -> None:
    assert told(("60.1.0.1", HOME, 4000)).is_endpoint_independent(HOME) is None
    same = told(("60.1.0.1", HOME, 4000), ("61.1.0.1", HOME, 4000))
    assert (same.is_endpoint_independent(HOME), same.mapped_ports(HOME)) == (True, [4000])
    different = told(("60.1.0.1", HOME, 4000), ("61.1.0.1", HOME, 4001), ("62.1.0.1", HOME, 4001))
    assert (different.is_endpoint_independent(HOME), different.mapped_ports(HOME)) == (False, [4001, 4000])
    by_chance = told(("60.1.0.1", HOME, 4000), ("61.1.0.1", HOME, 4000), stands=False)
    assert (by_chance.is_endpoint_independent(HOME), by_chance.mapped_ports(HOME)) == (None, [])


# -- what is published ---------------------------------------------------------------------------------------------

OWN, OUTSIDE = ("60.1.0.1", 7000), (HOME, 4000)


def test_an_own_address_is_told_until_two_hosts_could_not_dial_it_and_again_once_one_could() -> None:
    known = Reachable()
    known.update([OWN], [], 0.0)
    assert known.told() == known.due(0.0) == [OWN]
    assert not known.failed(OWN, "62.0.0.1", 1.0)
    assert known.told() == [OWN]
    assert known.due(1.0) == [OWN]  # a second opinion, at once
    assert not known.failed(OWN, "62.0.0.1", 1.0)  # the same host once more is none
    assert known.told() == [OWN]
    assert known.due(1.0) == []
    assert known.failed(OWN, "63.0.0.1", 20.0)
    assert known.told() == []
    assert not known.failed(OWN, "64.0.0.1", 20.0)  # no news
    assert known.due(20.0) == []
    assert known.due(20.0 + reachable.RETRY_MAX) == [OWN]
    assert known.reached(OWN, 100.0)
    assert known.told() == [OWN]
    assert known.due(100.0 + reachable.RETEST - 1) == []
    assert not known.reached(OWN, 101.0)


def test_a_translated_address_is_told_once_somebody_came_in_by_it() -> None:
    known = Reachable()
    known.update([], [OUTSIDE], 0.0)
    assert known.told() == []
    assert known.due(0.0) == [OUTSIDE]
    assert known.reached(OUTSIDE, 1.0)
    assert known.told() == [OUTSIDE]
    assert not known.failed(OUTSIDE, "62.0.0.1", 2.0)
    assert known.failed(OUTSIDE, "63.0.0.1", 3.0)
    assert known.told() == []


def test_what_is_gone_is_forgotten_and_after_a_move_all_is_open() -> None:
    known = Reachable()
    known.update([OWN], [OUTSIDE], 0.0)
    known.reached(OUTSIDE, 1.0)
    for host in ("62.0.0.1", "63.0.0.1"):
        known.failed(OWN, host, 1.0)
    assert known.told() == [OUTSIDE]
    known.start_over(2.0)
    assert known.told() == [OWN]
    assert known.due(2.0) == [OWN, OUTSIDE]
    known.update([], [OUTSIDE], 3.0)
    assert OWN not in known
    assert not known.is_told(OWN)
    assert not known.reached(OWN, 3.0)
    assert not known.failed(OWN, "62.0.0.1", 3.0)
    assert known.doubters(OWN) == ()


def test_candidates_and_doubters_are_bounded() -> None:
    known = Reachable()
    known.update([("60.1.0.1", port) for port in range(1, 100)], [OUTSIDE], 0.0)
    assert len(known.told()) == reachable.MAX_CANDIDATES
    for number in range(100):
        known.failed(("60.1.0.1", 1), f"62.0.0.{number}", 0.0)
    assert len(known.doubters(("60.1.0.1", 1))) == reachable.WITNESSES


# -- what is done for others ---------------------------------------------------------------------------------------


def test_each_asker_has_its_share_and_all_together_no_more_than_theirs() -> None:
    granted = Rates(2, 10.0, 5, 1.0)
    assert [granted.take("a", 0.0) for _ in range(3)] == [True, True, False]
    assert [granted.take("a", at) for at in (9.0, 11.0, 12.0)] == [False, True, False]
    assert sum(granted.take(f"other {number}", 12.0) for number in range(20)) == 5
    assert granted.take("late", 13.1)


def test_askers_remembered_are_bounded() -> None:
    granted = Rates(1, 10.0, 1e9, 1.0)
    for number in range(rates.MAX_ASKERS + 50):
        granted.take(str(number), 0.0)
    assert len(granted._askers) == rates.MAX_ASKERS


# -- frames --------------------------------------------------------------------------------------------------------

IP = bytes([60, 2, 0, 2])
FRAMES = [
    Seen(IP, 7000),
    Try(pack_host("2600::1"), 0),
    Tried(IP, 7000, 2),
    Punch(3, bytes(32), 0, (7000, 4000)),
    Punch(3, bytes(32), 2),
    Punched(3, bytes(32), 1, (7000,), IP),
    Punched(3, bytes(32), 3),
]


@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: type(frame).__name__)
def test_frames_come_back_and_may_grow(frame: reach_frames.ReachFrame) -> None:
    data = reach_frames.encode(frame)
    assert data[0] == frame.TYPE
    assert data[0] in reach_frames.TYPES
    assert reach_frames.decode(data) == frame
    fields = msgspec.msgpack.decode(data[1:])
    if len(fields) == len(frame.__struct_fields__):
        assert reach_frames.decode(data[:1] + msgspec.msgpack.encode([*fields, "of a later version"])) == frame
    for size in range(1, len(data)):
        with pytest.raises(RemoteProtocolError):
            reach_frames.decode(data[:size])


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (Seen, [b"", 1]), (Seen, [b"123", 1]), (Seen, [bytes(15), 1]), (Seen, [bytes(17), 1]), (Seen, ["1234", 1]), (Seen, [IP, -1]),
        (Seen, [IP, 65536]), (Seen, [IP]), (Try, [IP, 1.0]), (Tried, [IP, 1]), (Tried, [IP, 1, 256]), (Punch, [0, bytes(32), 0]),
        (Punch, [1, bytes(31), 0]), (Punch, [1, bytes(32), 0, [1, 2, 3, 4]]), (Punch, [1, bytes(32), 0, [65536]]),
        (Punched, [1, bytes(32), 0, [1], bytes(5)]), (Punched, [1, bytes(32), 0, [1], bytes(17)]),
    ],
)  # fmt: skip
def test_malformed_frames(kind: type[reach_frames.ReachFrame], fields: list[object]) -> None:
    with pytest.raises(RemoteProtocolError):
        reach_frames.decode(bytes([kind.TYPE]) + msgspec.msgpack.encode(fields))


@pytest.mark.parametrize(
    ("host", "back"),
    [("60.2.0.2", "60.2.0.2"), ("::ffff:60.2.0.2", "60.2.0.2"), ("2600::1", "2600::1"), ("fe80::1%eth0", "fe80::1"), ("::", "::")],
)
def test_addresses_are_packed_without_zone_and_ipv4_as_such(host: str, back: str) -> None:
    assert unpack_host(pack_host(host)) == back


def test_mapped_addresses_are_read_as_ipv4() -> None:
    assert unpack_host(bytes(10) + b"\xff\xff" + IP) == "60.2.0.2"
    assert unpack_host(b"") == ""


INITIATOR = bytes.fromhex("8f40c5adb68f25624ae5b214ea767a6ec94d829d3d7b5e1ad1ba6f3e2138285f")
RESPONDER = bytes.fromhex("358072d6365880d1aeea329adf9121383851ed21a28e3b75e965d0d2cd166254")
DOCUMENT = Path(__file__).parent.parent / "docs" / "protocol.rst"
FOUR, SIX = bytes([192, 0, 2, 1]), bytes.fromhex("20010db8000000000000000000000001")
EXAMPLES: dict[str, tuple[reach_frames.ReachFrame, list[object]]] = {
    "seen": (Seen(SIX, 5001), [SIX, 5001]),
    "try": (Try(FOUR, 4001), [FOUR, 4001]),
    "tried": (Tried(FOUR, 4001, reach_frames.REACHED), [FOUR, 4001, 1]),
    "punch.ask": (Punch(2, RESPONDER, reach_frames.ASK, (4001, 40001)), [2, RESPONDER, 0, [4001, 40001]]),
    "punched.ask": (Punched(7, INITIATOR, reach_frames.ASK, (4001, 40001), FOUR), [7, INITIATOR, 0, [4001, 40001], FOUR]),
    "punch.go": (Punch(2, RESPONDER, reach_frames.GO), [2, RESPONDER, 2, []]),
    "punched.decline": (Punched(2, RESPONDER, reach_frames.DECLINE), [2, RESPONDER, 3, [], b""]),
}


def test_the_examples_of_the_document() -> None:
    found = re.findall(r"^ {4}reach\.([\w.]+) = ([0-9a-f]+(?:\n {8}[0-9a-f]+)*)$", DOCUMENT.read_text(), re.MULTILINE)
    assert [name for name, _ in found] == list(EXAMPLES)
    for name, text in found:
        data = bytes.fromhex("".join(text.split()))
        frame, fields = EXAMPLES[name]
        assert data == bytes([frame.TYPE]) + msgspec.msgpack.encode(fields) == reach_frames.encode(frame), name
        assert reach_frames.decode(data) == frame
