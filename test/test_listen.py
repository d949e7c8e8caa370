"""Binding: what works, and what each refusal tells the user to do."""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from solyd_swarm.errors import ListenError, OptionError, OptionTypeError
from solyd_swarm.net import listen as listening
from solyd_swarm.net.listen import bind, check_listen

PRIVILEGED = """
import os
from solyd_swarm.net.listen import bind
bind(("127.0.0.1", 0), [])[0].close()  # loads what another user may not read
os.setuid(65534)
try:
    bind(("127.0.0.1", 81), [])
except OSError as error:
    print(error)
"""


@pytest.fixture
def bound():
    """Binds, and closes at the end."""
    made: list[socket.socket] = []

    def bind_more(listen, hosts=()):
        found = bind(listen, hosts)
        made.extend(found)
        return [each.getsockname()[:2] for each in found]

    yield bind_more
    for each in made:
        each.close()


def test_one_address_all_addresses_names_and_several(bound):
    (host, port), *rest = bound(("127.0.0.1", 0))
    assert (host, rest) == ("127.0.0.1", [])
    assert port
    assert bound(None)[0][0] in ("::", "0.0.0.0")
    assert bound(("", 0))[0][0] in ("::", "0.0.0.0")
    assert ("127.0.0.1", "::1")[0] in [host for host, _ in bound(("localhost", 0))]
    both = bound(None, ["127.0.0.1", "127.0.0.2"])
    assert [host for host, _ in both] == ["127.0.0.1", "127.0.0.2"]
    assert len({port for _, port in both}) == 1


def test_addresses_that_have_vanished_are_left_out_if_one_is_there(bound):
    assert [host for host, _ in bound(None, ["192.0.2.1", "127.0.0.1"])] == ["127.0.0.1"]
    with pytest.raises(ListenError, match="interfaces="):
        bound(None, ["192.0.2.1"])


def test_a_free_port_is_sought_anew_where_it_is_taken_at_the_next_address(bound, monkeypatch):
    real, taken = listening._bind_one, []

    def bind_one(family, address, **options):
        if address[0] == "127.0.0.2" and len(taken) < 3:
            taken.append(address[1])
            raise OSError(errno.EADDRINUSE, "in use")
        return real(family, address, **options)

    monkeypatch.setattr(listening, "_bind_one", bind_one)
    assert len(bound(None, ["127.0.0.1", "127.0.0.2"])) == 2
    assert len(taken) == 3


@pytest.mark.parametrize("second", ["127.0.0.1", ""])
def test_a_port_in_use(bound, second):
    ((_, port),) = bound(("127.0.0.1", 0))
    with pytest.raises(ListenError, match=f"port {port}.*in use.*choose another port") as caught:
        bound((second, port))
    assert caught.value.errno == errno.EADDRINUSE
    assert isinstance(caught.value, OSError)


@pytest.mark.parametrize(
    ("host", "advice"),
    [
        ("192.0.2.1", "no address of this machine"),
        ("no such host", "cannot be looked up.*listen on an IP address"),
        ("x" * 300, "cannot be looked up"),
        ("x\0y", "cannot be looked up"),
        ("fe80::1%no-such-interface", "cannot be looked up"),
    ],
)
def test_hosts_that_cannot_be_listened_on(bound, host, advice):
    with pytest.raises(ListenError, match=advice):
        bound((host, 0))


@pytest.mark.skipif(os.getuid() != 0, reason="root gives up its privileges here")
def test_a_privileged_port():
    with open("/proc/sys/net/ipv4/ip_unprivileged_port_start") as setting:
        if int(setting.read()) <= 81:
            pytest.skip("any user may bind any port here")
    environment = os.environ | {"PYTHONPATH": str(Path(listening.__file__).parents[2])}
    run = subprocess.run([sys.executable, "-c", PRIVILEGED], capture_output=True, text=True, env=environment)
    assert "port 81 of 127.0.0.1 may not be bound by this user: choose a port above 1023" in run.stdout, run.stderr


def test_without_ipv6_all_addresses_are_those_of_ipv4(bound, monkeypatch):
    real = listening._bind_one

    def bind_one(family, address, **options):
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "no IPv6")
        return real(family, address, **options)

    monkeypatch.setattr(listening, "_bind_one", bind_one)
    assert bound(None)[0][0] == "0.0.0.0"


@pytest.mark.parametrize("wrong", ["127.0.0.1", 7000, ("127.0.0.1",), (7000, "127.0.0.1"), ("127.0.0.1", True), {"host": 1}, ("h", 1, 2)])
def test_what_is_no_place(wrong):
    with pytest.raises(OptionTypeError, match="host, port"):
        check_listen(wrong)


@pytest.mark.parametrize("port", [-1, 65536])
def test_ports_out_of_range(port):
    with pytest.raises(OptionError, match="out of range"):
        check_listen(("127.0.0.1", port))


def test_places():
    assert check_listen(None) is None
    assert check_listen(["127.0.0.1", 0]) == ("127.0.0.1", 0)
