"""Binding the listening sockets, synchronously, so that errors are raised where the user called."""

import errno
import socket
from collections.abc import Sequence

from solyd_swarm.errors import ListenError, OptionError, OptionTypeError

FREE_PORT_ATTEMPTS = 20
_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.ENOPROTOOPT)
"""An address that is none of this machine's, or a family that it does not speak."""


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
        listen: the user's choice; an empty host means all addresses, a name all of its addresses that are ours.
        hosts: without a choice, the IP literals to bind, as far as they are still there; empty: all addresses.

    Raises:
        ListenError: a port in use, an address that is not ours, a name that is none; an ``OSError``.
    """
    host, wanted = listen or ("", 0)
    attempt = 1
    while True:
        try:
            places = _look_up([host] if host else hosts, wanted)
            return _bind_places(places, wanted) if places else [_bind_all(wanted)]
        except (OSError, ValueError) as error:
            # Any free port: the one found at the first address may be taken at the next.
            if wanted or attempt >= FREE_PORT_ATTEMPTS or not isinstance(error, OSError) or error.errno != errno.EADDRINUSE:
                raise _explain(error, host, wanted) from error
            attempt += 1


def _look_up(hosts: Sequence[str], port: int) -> list[tuple[int, tuple[object, ...]]]:
    found = [
        (family, address)
        for host in hosts
        for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    ]
    return list(dict.fromkeys(found))


def _bind_places(places: Sequence[tuple[int, tuple[object, ...]]], port: int) -> list[socket.socket]:
    """One socket for each address, on one port; those that are not ours (any more) are left out, if one is."""
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    try:
        for family, address in places:
            try:
                sockets.append(_bind_one(family, (address[0], port, *address[2:])))
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                missing = error
                continue
            port = port or sockets[0].getsockname()[1]
        if missing is not None and not sockets:
            raise missing
    except OSError:
        for bound in sockets:
            bound.close()
        raise
    return sockets


def _bind_all(port: int) -> socket.socket:
    """All addresses of both families on one socket, or of IPv4 alone where there is no IPv6."""
    if socket.has_ipv6:
        try:
            return _bind_one(socket.AF_INET6, ("::", port), dual=True)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
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


def _explain(error: OSError | ValueError, host: str, port: int) -> ListenError:
    place = f"port {port} of {host or 'all addresses'}" if port else f"{host or 'this machine'}"
    if isinstance(error, socket.gaierror | ValueError):
        reason = error.strerror if isinstance(error, socket.gaierror) else error
        return ListenError(f"{host!r} cannot be looked up ({reason}): listen on an IP address of this machine, or on '' for all")
    if error.errno == errno.EADDRINUSE:
        text = f"{place} is in use by another program: choose another port, or 0 for any free one"
    elif error.errno in _NOT_HERE:
        text = f"{host or 'what interfaces= names'} is no address of this machine: listen on one that is, or on '' for all"
    elif error.errno in (errno.EACCES, errno.EPERM):
        text = f"{place} may not be bound by this user: choose a port above 1023"
    else:
        text = f"{place} cannot be listened on ({error.strerror or error}): choose another address or port"
    return ListenError(error.errno, text)
