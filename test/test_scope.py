"""Scopes of addresses, and which may be dialled on whose word."""

import pytest

from solyd_swarm.discovery.scope import may_dial, scope_of

SCOPES = {
    "127.0.0.1": "loopback",
    "127.255.0.9": "loopback",
    "::1": "loopback",
    "::ffff:127.0.0.1": "loopback",
    "64:ff9b::7f00:1": "loopback",
    "169.254.3.4": "link",
    "fe80::1": "link",
    "fe80::1%eth0": "link",
    "10.1.2.3": "private",
    "172.16.0.1": "private",
    "192.168.1.255": "private",
    "100.64.0.1": "private",
    "fd00::1": "private",
    "2002:c0a8:101::1": "private",
    "8.8.8.8": "global",
    "2a00:1450:4001::1": "global",
    "::ffff:8.8.8.8": "global",
    "0.0.0.0": "invalid",
    "0.1.2.3": "invalid",
    "::": "invalid",
    "224.0.0.251": "invalid",
    "ff02::fb": "invalid",
    "ff02::fb%eth0": "invalid",
    "255.255.255.255": "invalid",
    "240.0.0.1": "invalid",
    "::ffff:255.255.255.255": "invalid",
    "localhost": "invalid",
    "1.2.3": "invalid",
    "": "invalid",
}


@pytest.mark.parametrize(("ip", "scope"), SCOPES.items())
def test_scope_of(ip, scope):
    assert scope_of(ip) == scope


@pytest.mark.parametrize(
    ("address", "learned_from", "allowed"),
    [
        ("8.8.8.8", "9.9.9.9", True),
        ("8.8.8.8", "127.0.0.1", True),
        ("192.168.1.2", "9.9.9.9", False),
        ("192.168.1.2", "10.0.0.1", True),
        ("192.168.1.2", "fe80::1%eth0", True),
        ("192.168.1.2", "127.0.0.1", True),
        ("127.0.0.1", "192.168.1.2", False),
        ("127.0.0.1", "9.9.9.9", False),
        ("127.0.0.1", "::1", True),
        ("fe80::1", "192.168.1.2", False),
        ("fe80::1", "fe80::2", True),
        ("127.0.0.1", None, True),
        ("192.168.1.2", None, True),
        ("224.0.0.1", None, False),
        ("0.0.0.0", "127.0.0.1", False),
        ("255.255.255.255", None, False),
        ("8.8.8.8", "224.0.0.1", False),
        ("8.8.8.8", "not an address", False),
    ],
)
def test_may_dial(address, learned_from, allowed):
    assert may_dial(address, learned_from) is allowed
