"""Tickets say where a node is, survive a chat, and are told from garbage."""

from base64 import urlsafe_b64encode
from collections.abc import Iterator
from hashlib import blake2b

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from script_kit import ALONE, PATIENCE, Make, meet, party

from solyd_swarm import Node, OptionTypeError, TicketError, pubsub
from solyd_swarm.discovery.scope import scope_of
from solyd_swarm.ticket import PREFIX, Contact, make_ticket, parse_bootstrap, parse_contact

INSTANCE = bytes(range(32))


@pytest.fixture
def make() -> Iterator[Make]:
    with party() as made:
        yield made


@given(
    st.binary(min_size=32, max_size=32),
    st.lists(st.tuples(st.ip_addresses().map(str), st.integers(1, 65535)), min_size=1, max_size=16, unique=True),
)
def test_round_trip(instance: bytes, addresses: list[tuple[str, int]]) -> None:
    assume(all(scope_of(host) != "invalid" for host, _ in addresses))
    ticket = make_ticket(instance, tuple(addresses))
    assert parse_contact(ticket) == Contact(tuple(addresses), instance)
    assert ticket.startswith(PREFIX)
    assert ticket.isascii()
    assert not set(ticket) & set(" :/+=\n")


def test_a_ticket_of_many_addresses_names_the_first() -> None:
    addresses = tuple((f"10.0.0.{number}", 7000) for number in range(100))
    assert parse_contact(make_ticket(INSTANCE, addresses)).addresses == addresses[:16]


def test_a_ticket_that_a_chat_has_mangled() -> None:
    ticket = make_ticket(INSTANCE, (("127.0.0.1", 7000), ("::1", 7000)))
    assert parse_contact(f"  {ticket}\n") == parse_contact(ticket)
    for place in range(len(PREFIX), len(ticket)):
        other = "A" if ticket[place] != "A" else "B"
        for mangled in (ticket[:place], ticket[:place] + other + ticket[place + 1 :], ticket[:place] + ticket[place + 1 :]):
            try:
                contact = parse_contact(mangled)
            except TicketError:
                continue
            assert contact == parse_contact(ticket)  # the last character holds bits that mean nothing
    with pytest.raises(TicketError, match="copy it again, whole"):
        parse_contact(ticket[:-5])


@given(st.one_of(st.text(), st.text().map(PREFIX.__add__), st.binary().map(lambda raw: PREFIX + raw.hex())))
def test_garbage(text: str) -> None:
    try:
        contact = parse_contact(text)
    except TicketError:
        return
    assert contact.instance == b""
    ((host, port),) = contact.addresses
    assert 1 <= port <= 65535
    assert host
    assert host.strip() == host


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:7000", ("127.0.0.1", 7000)),
        ("example.org:1", ("example.org", 1)),
        ("[::1]:65535", ("::1", 65535)),
        ("[fe80::1%eth0]:7000", ("fe80::1%eth0", 7000)),
        ("  localhost:7000 ", ("localhost", 7000)),
        ("solyd1.example.org:7000", ("solyd1.example.org", 7000)),
    ],
)
def test_an_address(text: str, address: tuple[str, int]) -> None:
    assert parse_contact(text) == Contact((address,))


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", ":", "host", "host:", ":7000", "host:0", "host:65536", "host:-1", "host:x", "a b:7000"),
        *("http://host:7000", "host:٣", "host:" + "9" * 5000, "a\nb:7000", "a\0b:7000", "[]:7000", "x" * 254 + ":7000"),
    ],
)
def test_no_address(text: str) -> None:
    with pytest.raises(TicketError, match="neither a ticket"):
        parse_contact(text)


NOWHERE = [
    *("0.0.0.0", "0.1.2.3", "224.0.0.251", "239.1.2.3", "240.0.0.1", "255.255.255.255"),
    *("::", "ff02::fb", "ff02::1%eth0", "::ffff:224.0.0.1"),
]
"""Where no machine is: unspecified, multicast, broadcast, reserved."""


def forged(*body: object) -> str:
    """A ticket that says anything, with the right checksum."""
    raw = msgspec.msgpack.encode(body)
    checksum = blake2b(raw, digest_size=4, person=b"solyd ticket").digest()
    return PREFIX + urlsafe_b64encode(raw + checksum).decode().rstrip("=")


def test_the_forger_forges_well() -> None:
    assert forged(INSTANCE, [("127.0.0.1", 7000)]) == make_ticket(INSTANCE, (("127.0.0.1", 7000),))


@pytest.mark.parametrize("host", NOWHERE)
def test_where_nobody_can_be_reached(host: str) -> None:
    """Alone, or hidden behind an address that is good: the ticket is not to be trusted."""
    for addresses in ([(host, 7000)], [("127.0.0.1", 7000), (host, 7000)]):
        with pytest.raises(TicketError, match="where nobody can be reached"):
            parse_contact(forged(INSTANCE, addresses))
    with pytest.raises(TicketError, match="nobody can be reached at"):
        parse_contact(f"[{host}]:7000" if ":" in host else f"{host}:7000")


@pytest.mark.parametrize(
    "body",
    [
        (INSTANCE, [("127.0.0.1", 0)]),
        (INSTANCE, [("127.0.0.1", 65536)]),
        (INSTANCE, [("127.0.0.1", -1)]),
        (INSTANCE, [("127.0.0.1", True)]),
        (INSTANCE, [("127.0.0.1", "7000")]),
        (INSTANCE, [("127.0.0.1",)]),
        (INSTANCE, [("example.org", 7000)]),
        (INSTANCE, [("", 7000)]),
        (INSTANCE, [("127.0.0.1%lo", 7000)]),
        (INSTANCE, [("1" * 65, 7000)]),
        (INSTANCE, [("127.0.0.1", 7000)] * 17),
        (INSTANCE, []),
        (INSTANCE,),
        (INSTANCE[:31], [("127.0.0.1", 7000)]),
        (INSTANCE + b"x", [("127.0.0.1", 7000)]),
        (INSTANCE.hex(), [("127.0.0.1", 7000)]),
        (None, None),
        (),
    ],
)
def test_a_ticket_that_was_made_up(body: tuple[object, ...]) -> None:
    """Its checksum is right: whoever made it can count, and nothing else."""
    with pytest.raises(TicketError, match="copy it again, whole"):
        parse_contact(forged(*body))
    with pytest.raises(TicketError):
        pubsub("room", **ALONE, bootstrap=[forged(*body)])


def test_a_ticket_of_a_later_version_may_say_more() -> None:
    assert parse_contact(forged(INSTANCE, [("127.0.0.1", 7000)], "more")) == Contact((("127.0.0.1", 7000),), INSTANCE)


def test_several() -> None:
    ticket = make_ticket(INSTANCE, (("127.0.0.1", 7000),))
    assert parse_bootstrap(None) == parse_bootstrap([]) == ()
    assert parse_bootstrap(ticket) == (parse_contact(ticket),)
    assert parse_bootstrap((ticket, "host:1")) == (parse_contact(ticket), Contact((("host", 1),)))
    with pytest.raises(TicketError):
        parse_bootstrap([ticket, ""])
    for wrong in (1, [1], [None], b"host:1", {"host:1": 2}.values()):
        with pytest.raises(OptionTypeError, match="bootstrap takes"):
            parse_bootstrap(wrong)  # type: ignore[arg-type]


def test_whom_a_ticket_leads_to(make: Make) -> None:
    one = make()
    contact = parse_contact(one.ticket)
    assert contact.instance == one._node.endpoint.instance
    assert contact.addresses == (("127.0.0.1", one._node.port),)
    assert one.ticket == one.ticket
    by_ticket = make(bootstrap=one.ticket)
    by_address = make(bootstrap=[f"127.0.0.1:{one._node.port}"])
    by_name = make(bootstrap=f"localhost:{one._node.port}")
    meet(by_ticket, by_address, by_name)


def test_ones_own_ticket_and_one_of_nobody(make: Make) -> None:
    """Neither does harm."""
    nobody = make("nobody")
    ticket = nobody.ticket
    nobody.leave().result(PATIENCE)
    one = make()
    with Node(**ALONE, bootstrap=[ticket, one.ticket], listen=("127.0.0.1", 0)) as node:
        again = node.pubsub("room")
        with pubsub("room", **ALONE, bootstrap=again.ticket) as third:
            meet(one, again, third)


def test_a_ticket_holds_no_author(make: Make) -> None:
    """Who has it can find the node; who we are is shown to members only."""
    one = make("a topic")
    other = make("a topic", bootstrap=None)
    assert one.id[:43] not in one.ticket
    assert len(one.ticket) == len(other.ticket)
