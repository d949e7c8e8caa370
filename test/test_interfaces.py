"""Which local addresses discovery may use."""

import asyncio
import struct
from collections.abc import Callable
from ipaddress import ip_address, ip_network

import ifaddr
import pytest

from solyd_swarm.discovery import interfaces
from solyd_swarm.discovery.interfaces import InterfaceWatch, LocalAddress, local_addresses, usable_interfaces
from solyd_swarm.errors import DiscoveryError, InterfaceError


def adapter(name: str, index: int | None, *ips: tuple[str, int]) -> ifaddr.Adapter:
    entries = [ifaddr.IP((ip, 0, index or 0) if ":" in ip else ip, prefix, name) for ip, prefix in ips]
    return ifaddr.Adapter(name, name, entries, index=index)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def pretend(*adapters: ifaddr.Adapter) -> None:
        monkeypatch.setattr(ifaddr, "get_adapters", lambda: list(adapters))

    return pretend


@pytest.fixture
def laptop(machine: Callable[..., None]) -> None:
    machine(
        adapter("lo", 1, ("127.0.0.1", 8), ("::1", 128)),
        adapter("eth0", 2, ("192.0.2.7", 24), ("fe80::7", 64)),
        adapter("wlan0", 3, ("198.51.100.7", 24), ("fe80::7", 64), ("2001:db8::7", 64)),
    )


def hosts(*wanted: str) -> list[str]:
    return [address.host for address in usable_interfaces(wanted)]


def test_this_machine_has_loopback() -> None:
    (loopback,) = usable_interfaces(["127.0.0.1"])
    assert loopback.ip == ip_address("127.0.0.1")
    assert loopback.network == ip_network("127.0.0.0/8")
    assert loopback.index > 0
    assert loopback in local_addresses()
    assert loopback in usable_interfaces([loopback.interface])


@pytest.mark.usefixtures("laptop")
def test_nothing_wanted_means_all() -> None:
    assert hosts() == ["127.0.0.1", "::1", "192.0.2.7", "fe80::7%eth0", "198.51.100.7", "fe80::7%wlan0", "2001:db8::7"]


@pytest.mark.usefixtures("laptop")
@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (["127.0.0.1"], ["127.0.0.1"]),
        (["eth0"], ["192.0.2.7", "fe80::7%eth0"]),
        (["2001:0db8::0007", "lo"], ["2001:db8::7", "127.0.0.1", "::1"]),
        (["fe80::7"], ["fe80::7%eth0", "fe80::7%wlan0"]),
        (["fe80::7%wlan0"], ["fe80::7%wlan0"]),
        (["fe80::7%3"], ["fe80::7%wlan0"]),
        (["eth0", "192.0.2.7", "eth0"], ["192.0.2.7", "fe80::7%eth0"]),
    ],
)
def test_literals_and_names(wanted: list[str], expected: list[str]) -> None:
    assert hosts(*wanted) == expected


@pytest.mark.usefixtures("laptop")
@pytest.mark.parametrize("name", ["eth1", "192.0.2.8", "fe80::7%lo", "", "%", "0.0.0.0", "300.1.1.1", "lo "])
def test_what_does_not_exist_is_named_with_what_does(name: str) -> None:
    with pytest.raises(InterfaceError) as caught:
        usable_interfaces(["lo", name])
    assert repr(name) in str(caught.value)
    assert "lo (127.0.0.1, ::1), eth0 (192.0.2.7, fe80::7)" in str(caught.value)
    assert isinstance(caught.value, DiscoveryError)
    assert isinstance(caught.value, OSError)


def test_no_address_at_all(machine: Callable[..., None]) -> None:
    machine(adapter("lo", 1))
    with pytest.raises(InterfaceError, match="bring an interface up"):
        usable_interfaces([])


def test_multicast_and_unspecified_are_no_addresses(machine: Callable[..., None]) -> None:
    machine(adapter("odd", None, ("0.0.0.0", 0), ("224.0.0.1", 4), ("::", 0), ("192.0.2.1", 24)))
    assert usable_interfaces([]) == [LocalAddress("odd", 0, ip_address("192.0.2.1"), 24)]


def test_the_system_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError(1, "not permitted")

    monkeypatch.setattr(ifaddr, "get_adapters", refuse)
    with pytest.raises(InterfaceError, match="not permitted"):
        usable_interfaces([])


async def test_changes_are_looked_for_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch, machine: Callable[..., None]) -> None:
    def no_netlink() -> None:
        raise OSError("no such thing here")

    monkeypatch.setattr(interfaces, "_open_netlink", no_netlink)
    monkeypatch.setattr(interfaces, "LOOK_INTERVAL", 0.01)
    told: asyncio.Queue[bool] = asyncio.Queue()
    machine(adapter("lo", 1, ("127.0.0.1", 8)))
    watch = InterfaceWatch(told.put_nowait)
    watch.start()
    try:
        machine(adapter("lo", 1, ("127.0.0.1", 8)), adapter("eth0", 2, ("fe80::7", 64)))
        async with asyncio.timeout(5):
            assert [await told.get(), await told.get()] == [False, False]  # the second for what may be used only by now
    finally:
        watch.close()
        watch.close()


def test_links_are_read_from_the_kernels_messages() -> None:
    def message(kind: int, index: int, flags: int, attributes: bytes = b"") -> bytes:
        return struct.pack("=IHHIIBxHiII", 32 + len(attributes), kind, 0, 0, 0, 0, 1, index, flags, 0) + attributes

    data = message(16, 2, 0x1 | 0x40, b"1234") + message(20, 9, 0x40) + message(16, 3, 0x1) + message(17, 4, 0x40)
    assert list(interfaces._read_links(data)) == [(2, True), (3, False), (4, False)]
    assert list(interfaces._read_links(bytes(100))) == list(interfaces._read_links(data[:20])) == []
