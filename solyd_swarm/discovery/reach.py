"""Where a node can be reached, and where it may go: its listening sockets and the interfaces it is allowed to use."""

import contextlib
import socket
from collections.abc import Sequence
from ipaddress import ip_address

from solyd_swarm.discovery.interfaces import LocalAddress, usable_interfaces
from solyd_swarm.discovery.scope import scope_of
from solyd_swarm.errors import InterfaceError

_ORDER = {"global": 0, "private": 1, "link": 2, "loopback": 3}
_ALL = ("::", "0.0.0.0")
_ANY_PORT = 9  # of the discard protocol (RFC 863); nothing is sent there


class Reach:
    """Reads the interfaces anew at each call, for networks come and go.

    Args:
        interfaces: names or IP literals of the interfaces allowed; empty: all.
        bound: IP literals that the listening sockets are bound to; ``"::"`` and ``"0.0.0.0"`` stand for all.
        port: TCP port listened on.
    """

    def __init__(self, interfaces: Sequence[str], bound: Sequence[str], port: int) -> None:
        self._interfaces = tuple(interfaces)
        self._bound = tuple(bound)
        self._port = port

    def addresses(self) -> tuple[tuple[str, int], ...]:
        """Where others can dial us, furthest reach first; loopback only where there is nothing else.

        Link-local IPv6 addresses are not among them, since their zone means nothing on another machine: mDNS tells those.
        """
        hosts = [host for host in self._hosts() if scope_of(host) in _ORDER and not (":" in host and scope_of(host) == "link")]
        ranked = sorted(dict.fromkeys(hosts), key=lambda host: _ORDER[scope_of(host)])
        outside = [host for host in ranked if scope_of(host) != "loopback"]
        return tuple((host, self._port) for host in outside or ranked)

    def ticket_addresses(self, most: int, told: tuple[tuple[str, int], ...] | None = None) -> tuple[tuple[str, int], ...]:
        """Those (or those of them that are `told`), with loopback for others on this machine as far as we listen there; at least one."""
        found = (self.addresses() if told is None else told)[: most - 1]
        if self._is_everywhere and not self._interfaces:
            found += (("127.0.0.1", self._port),)
        return tuple(dict.fromkeys(found or (("127.0.0.1" if self._is_everywhere else self._bound[0], self._port),)))

    @property
    def _is_everywhere(self) -> bool:
        return self._bound[0] in _ALL

    def _hosts(self) -> list[str]:
        if self._is_everywhere:
            return [str(address.ip) for address in self._usable(self._interfaces) if self._bound[0] == "::" or address.ip.version == 4]
        present = [address.ip for address in self._usable(())]
        return [host for host in self._bound if ip_address(host.partition("%")[0]) in present]

    def _usable(self, wanted: Sequence[str]) -> list[LocalAddress]:
        try:
            return usable_interfaces(wanted)
        except InterfaceError:
            return []

    def may_go_to(self, host: str) -> bool:
        """Whether packets for this IP literal leave by an interface that is allowed: the system's routes are asked."""
        if not self._interfaces:
            return True
        source = source_address(host)
        return source is not None and any(ip_address(source) == address.ip for address in self._usable(self._interfaces))


def source_address(host: str) -> str | None:
    """The local IP literal from which packets for this one would be sent, without zone; None where there is no way.

    Connecting a UDP socket sends nothing.
    """
    literal, _, zone = host.partition("%")
    with contextlib.suppress(OSError, ValueError, OverflowError):
        version = ip_address(literal).version
        with socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            if version == 4:
                probe.connect((literal, _ANY_PORT))
            else:
                scope = 0 if not zone else int(zone) if zone.isdigit() else socket.if_nametoindex(zone)
                probe.connect((literal, _ANY_PORT, 0, scope))
            return str(probe.getsockname()[0]).partition("%")[0]
    return None
