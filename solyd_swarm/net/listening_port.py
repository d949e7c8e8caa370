"""Dialling from the port that we listen on, so that a translator (NAT) in between gives both one and the same port outside."""

import socket
from collections.abc import Sequence

from solyd_swarm.discovery.reach import source_address
from solyd_swarm.discovery.scope import scope_of
from solyd_swarm.net.sockaddr import read_address, socket_address

_ALL = ("0.0.0.0", "::")


class ListeningPort:
    """Opens sockets for dials.

    The listening sockets are bound without ``SO_REUSEPORT``, so that a second program on the same port is an error, as it should be.
    Linux and the BSDs let a port be shared where all its sockets have that flag *at the moment of the bind*, so they get it for this
    moment only. After that Linux would let in a program of the same user that asks for the flag itself, on purpose; one that does
    could as well attach to this process.
    """

    def __init__(self) -> None:
        self._sockets: Sequence[socket.socket] = ()

    def use(self, sockets: Sequence[socket.socket]) -> None:
        """These listen."""
        self._sockets = sockets

    def open(self, host: str, port: int, *, always: bool = False) -> tuple[socket.socket, bool]:
        """A socket to dial this IP literal with, and whether it has our listening port.

        Only for global addresses, or `always`: between peers of one network nothing translates, and a port of its own for each dial
        spares whoever comes back after a crash the wait for what the other end still holds open. Raises ``OSError`` or ``ValueError``.
        """
        family, _ = socket_address(host, port)
        if always or scope_of(host) == "global":
            bound = self._open_bound(family, host)
            if bound is not None:
                return bound, True
        fresh = socket.socket(family, socket.SOCK_STREAM)
        fresh.setblocking(False)
        return fresh, False

    def _open_bound(self, family: socket.AddressFamily, host: str) -> socket.socket | None:
        local = self._local(family, host)
        if local is None:
            return None
        bound = socket.socket(family, socket.SOCK_STREAM)
        try:
            bound.setblocking(False)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            self._share(True)
            try:
                bound.bind(local)
            finally:
                self._share(False)
        except OSError:
            bound.close()
            return None
        return bound

    def _share(self, shared: bool) -> None:
        for each in self._sockets:
            if each.fileno() >= 0:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(shared))

    def _local(self, family: socket.AddressFamily, host: str) -> tuple[str, int] | None:
        """Where to bind, if we listen where packets for this host leave from."""
        for each in self._sockets:
            if each.fileno() < 0:
                continue
            literal, port = read_address(each.getsockname())
            literal = literal.partition("%")[0]
            dual = literal == "::" and not each.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
            if literal in _ALL and (each.family == family or dual):
                return ("0.0.0.0" if family == socket.AF_INET else "::"), port
            if each.family == family and literal == source_address(host):
                return literal, port
        return None
