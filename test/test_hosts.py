"""The networks that other tests run on: hosts that reach each other, routers that hide them, cables that can be pulled."""

from collections.abc import Iterator

import pytest
from hosts import Lab, require


@pytest.fixture
def lab() -> Iterator[Lab]:
    require()
    with Lab() as lab:
        yield lab


def ping(host, target: str) -> bool:
    program = f"""
        import socket
        try:
            socket.create_connection(({target!r}, 7), timeout=1).close()
        except ConnectionRefusedError:
            print("there")
        except OSError:
            print("away")
        """
    with host.script(program) as process:
        return process.expect("there|away")[0] == "there"


def test_hosts_of_a_lan_reach_each_other_and_nobody_else(lab: Lab) -> None:
    one, two = lab.lan(2)
    (stranger,) = lab.lan(1)
    assert ping(one, "10.0.0.2")
    assert ping(two, "10.0.0.1")
    assert not ping(stranger, "10.0.0.2")
    assert not ping(one, "192.0.2.1")


def test_both_families_and_link_local_addresses(lab: Lab) -> None:
    bridge, one, two = lab.bridge(), lab.host(), lab.host()
    one.plug(bridge, "fd00::1/64")
    two.plug(bridge, "fd00::2/64", "10.1.0.2/24")
    assert ping(one, "fd00::2")
    assert "fe80::" in one.run("ip", "-6", "address")


def test_a_cable_can_be_pulled_and_put_back(lab: Lab) -> None:
    one, _ = lab.lan(2)
    one.interfaces[0].pull()
    assert not ping(one, "10.0.0.2")
    one.interfaces[0].put_back()
    assert ping(one, "10.0.0.2")


@pytest.mark.parametrize("random", [False, True])
def test_a_home_router_lets_out_and_not_in(random: bool) -> None:
    require("nft")
    with Lab() as lab:
        home, net = lab.bridge(), lab.bridge()
        inner, router, outer = lab.host(), lab.host(), lab.host()
        inner.plug(home, "192.168.1.2/24", gateway="192.168.1.1")
        router.masquerade(router.plug(home, "192.168.1.1/24"), router.plug(net, "198.51.100.1/24"), random=random)
        outer.plug(net, "198.51.100.2/24")
        outer.route("192.168.1.0/24", "198.51.100.1")
        assert ping(inner, "198.51.100.2")
        assert not ping(outer, "192.168.1.2")
        assert not ping(outer, "198.51.100.1")


def test_a_capture_has_every_frame(lab: Lab) -> None:
    one, two = lab.lan(2)
    with two.capture() as frames:
        assert ping(one, "10.0.0.2")
    assert [frame for _, frame in frames if frame[12:14] == b"\x08\x00"]


def test_nothing_is_left_of_a_lab() -> None:
    require()
    from hosts import NETNS

    with Lab() as lab:
        host = lab.host()
        assert host.namespace.exists()
    assert not [path for path in NETNS.iterdir() if path.name.startswith(host.name.rpartition("-")[0] + "-")]
