"""Binding the listening sockets, synchronously, so that errors are raised where the user called."""

import contextlib
import errno
import socket
from collections.abc import Sequence

from solyd_swarm.errors import ListenError, OptionError, OptionTypeError


def check_listen(listen: object) -> tuple[str, int] | None:
    """Validates ``listen=``: None or (host, port). Raises `OptionTypeError` or `OptionError`."""
    if listen is None:
        return None
    if not isinstance(listen, tuple | list) or len(listen) != 2:
        raise OptionTypeError(f"listen takes (host, port), for instance ('0.0.0.0', 7000), not {listen!r}")
    host, port = listen
    if not isinstance(host, str) or not isinstance(port, int) or isinstance(port, bool):
        raise OptionTypeError(f"listen takes (host, port), a string and a number, not {listen!r}")
    if not 0 <= port <= 65535:
        raise OptionError(f"listen: port {port} is out of range; take one from 1 to 65535, or 0 for any free one")
    return host, port


def bind(listen: tuple[str, int] | None, hosts: Sequence[str]) -> list[socket.socket]:
    """Bound, listening TCP sockets, all on one port.

    Args:
        listen: the user's choice; an empty host means all addresses.
        hosts: without a choice, the IP literals to bind; empty: all addresses.

    Raises:
        ListenError: a port in use, an address that is not ours, a name that is none; an ``OSError``.
    """
    host, port = listen or ("", 0)
    wanted = [host] if host else list(hosts)
    sockets: list[socket.socket] = []
    try:
        if not wanted:
            sockets.append(_bind_all(port))
        for each in wanted:
            for family, address in _addresses(each, port):
                sockets.append(_bind_one(family, address))
                port = port or sockets[0].getsockname()[1]
                if listen:
                    break
    except OSError as error:
        for bound in sockets:
            bound.close()
        raise _explain(error, host, port) from error
    return sockets


def _addresses(host: str, port: int) -> list[tuple[int, tuple[object, ...]]]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return [(family, address) for family, _, _, _, address in found]


def _bind_all(port: int) -> socket.socket:
    """All addresses of both families on one socket, or of IPv4 alone where there is no IPv6."""
    if socket.has_ipv6:
        with contextlib.suppress(OSError):
            return _bind_one(socket.AF_INET6, ("::", port), dual=True)
    return _bind_one(socket.AF_INET, ("0.0.0.0", port))


def _bind_one(family: int, address: tuple[object, ...], *, dual: bool = False) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if dual else 1)
        bound.setblocking(False)
        bound.bind(address)
        bound.listen(128)
    except OSError:
        bound.close()
        raise
    return bound


def _explain(error: OSError, host: str, port: int) -> ListenError:
    place = f"port {port} of {host or 'all addresses'}"
    if error.errno == errno.EADDRINUSE:
        text = f"{place} is in use by another program: choose another port, or 0 for any free one"
    elif error.errno == errno.EADDRNOTAVAIL:
        text = f"{host} is no address of this machine: listen on one that is, or on '' for all"
    elif error.errno == errno.EACCES:
        text = f"{place} may not be bound by this user: choose a port above 1023"
    elif isinstance(error, socket.gaierror):
        text = f"{host!r} cannot be looked up ({error.strerror}): listen on an IP address"
    else:
        text = f"{place} cannot be listened on: {error.strerror or error}"
    return ListenError(text)
