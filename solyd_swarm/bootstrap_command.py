"""``solyd-swarm bootstrap``: a node of the DHT at a fixed place, which peers begin at. It joins no topic, and learns of none.

Peers dial its TCP port, are told where its DHT node is, and meet through that; their channels end after seconds. Whatever they can fill
here is bounded, and so is the time they can hold it: `solyd_swarm.net.bounds` and `solyd_swarm.discovery.dht_storage` say by how much.

Its status: 0; 1: the address is in use, or the DHT does not work here.
"""

import contextlib
import errno
import os

from solyd_swarm import ListenError, Node
from solyd_swarm.discovery.source import Address
from solyd_swarm.pipe import STDOUT, Waiting, complain

POLL = 0.02
"""Seconds between looks at whether the DHT is up, at the start."""

LEAVE = 3.0
"""Seconds that closing may take at most; it takes less than one."""


def run(
    waiting: Waiting, *, listen: tuple[str, int], bootstrap: list[str], identity: str | None, mdns: bool, interfaces: str | None
) -> int:
    """Listens, says where on standard output, and stays until a signal comes. Returns the exit status.

    Args:
        waiting: catches the signals.
        listen: (host, port) for TCP, and for the DHT's UDP; an empty host: all addresses.
        bootstrap: other nodes of the same DHT.
        identity: a file that keeps who we are.
        mdns: whether to look on the local network, too.
        interfaces: addresses or names of the network interfaces that may be used.
    """
    try:
        node = Node(
            listen=listen,
            bootstrap=bootstrap,
            identity=identity,
            mdns=mdns,
            dht=True,
            mainline=False,
            portmap=False,
            interfaces=interfaces,
        )
    except ListenError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        complain(str(error))
        return 1
    try:
        if not _await_dht(node, waiting, listen[1]):
            return 1
        if waiting.signal is None:
            _say(f"listening on {_place(listen[0], node.port)}, ticket {node.ticket}")
        while waiting.signal is None:
            waiting.wait([])
        return 0
    finally:
        with contextlib.suppress(TimeoutError):
            node.close().result(LEAVE)


def _await_dht(node: Node, waiting: Waiting, wanted: int) -> bool:
    """Whether the DHT is up, at the port wanted where there is one; True also if a signal came first."""
    base = node._base
    while not base.endpoint.dht_port and waiting.signal is None:
        if "dht" in base.problems:
            return False  # of which the node has warned
        waiting.wait([], POLL)
    # Peers would be told of another port, but firewalls know this one.
    if waiting.signal is None and wanted not in (0, base.endpoint.dht_port):
        complain(f"UDP port {wanted} is in use by another program: choose another port")
        return False
    return True


def _place(host: str, port: int) -> str:
    return str(Address(host, port)) if host else f"*:{port}"


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody wants to know
        os.write(STDOUT, f"{line}\n".encode())
