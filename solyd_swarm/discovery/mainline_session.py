"""A libtorrent session of which only the DHT is used: no torrents, no port mapping, no local discovery, no payload traffic.

libtorrent runs a network thread of its own. It is woken through its queue, and wakes us by a byte on a socket pair, so that no Python
code runs on that thread and nothing is polled. Host names never reach it: closing it would wait for a resolver that hangs.

Measured with 2.1.1: opening takes about 20 ms of the loop (and the first import of the module about 100 ms), closing 1 to 2 ms.
"""

import asyncio
import importlib
import logging
import random
import socket
import struct
from collections.abc import Iterable, Sequence
from contextlib import suppress
from ipaddress import ip_address
from typing import Any, Protocol

from solyd_swarm.discovery.scope import scope_of
from solyd_swarm.errors import DiscoveryError

log = logging.getLogger("solyd_swarm.discovery.mainline")

LISTEN_SECONDS = 2.0
MAX_SAVED_NODES = 128
"""Nodes in a saved state, chosen at random among those known."""
MAX_QUEUED = 1_000
"""Attack: nodes send so many answers that we cannot keep up. libtorrent drops the newest beyond this many, and goes on."""
MAX_EXTERNAL = 4

_MAGIC = b"solyd mainline 1\n"
_PORT = struct.Struct(">H")
_SIZES = {4: 4, 6: 16}
MAX_STATE = len(_MAGIC) + MAX_SAVED_NODES * (1 + 16 + 2)
"""Bytes of the largest saved state: 2,449."""

Host = tuple[str, int]


class Listener(Protocol):
    """Whom a session reports to. All methods are called on the loop."""

    def on_peers(self, infohash: bytes, peers: Sequence[Host]) -> None:
        """A node that was asked for an infohash names these peers: a few hundred at most, as a datagram holds no more."""

    def on_nodes(self, count: int) -> None:
        """So many nodes are in the routing tables, as asked for by `DhtSession.count_nodes`."""


def load_libtorrent() -> Any:
    """The libtorrent module. Raises `DiscoveryError`, with what to install, where there is none or an old one."""
    try:
        module = importlib.import_module("libtorrent")
    except ImportError as error:
        raise DiscoveryError(
            f"discovery through the BitTorrent DHT needs libtorrent, which cannot be imported ({error}): "
            "pip install solyd-swarm[mainline]. There are wheels for CPython 3.11 to 3.13 on Linux (x86_64, aarch64), "
            "macOS (arm64 from 14; x86_64 13, and from 15) and Windows (AMD64); elsewhere switch this source off"
        ) from error
    if not hasattr(module, "read_session_params") or not hasattr(module.session, "set_alert_fd"):
        version = getattr(module, "__version__", "of unknown version")
        raise DiscoveryError(f"the installed libtorrent ({version}) is too old: pip install 'libtorrent>=2.0.11'")
    return module


class DhtSession:
    """Owns the session, its sockets and its network thread, from `open` to `close`.

    Args:
        hosts: IP literals to bind UDP sockets to; ``0.0.0.0`` and ``::`` stand for all but loopback.
        port: wanted UDP port, the same for all; 0: ephemeral, and if it is taken the next one, or any.
        narrow: the DHT is inside a private network or one machine, where many nodes share an address prefix.
    """

    def __init__(self, listener: Listener, hosts: Sequence[str], port: int, *, narrow: bool) -> None:
        self._listener, self._wanted, self._port, self._narrow = listener, tuple(hosts), port, narrow
        self._module: Any = None
        self._session: Any = None
        self._bells: tuple[socket.socket, socket.socket] | None = None
        self._listening: asyncio.Future[None] | None = None
        self._failures: list[str] = []
        self._routers: set[Host] = set()
        self.bound: dict[str, int] = {}
        """Port by the IP literal that is listened on."""
        self.external: dict[str, None] = {}
        """IP literals that nodes see us at."""

    async def open(self, state: bytes | None) -> None:
        """Bind sockets; the DHT itself waits for `begin`.

        Args:
            state: what `saved_state` gave, once; None for none; a malformed one is ignored.

        Raises:
            DiscoveryError: no libtorrent, or no socket can be bound; nothing is held then.
        """
        module = self._module = load_libtorrent()
        loop = asyncio.get_running_loop()
        self._listening = loop.create_future()
        try:
            params = module.read_session_params(module.bencode({b"dht state": _as_dht_state(unpack_nodes(state))}))
            params.settings = self._settings(module)
            ear, bell = self._bells = socket.socketpair()
            for each in self._bells:
                each.setblocking(False)  # a full pair has woken us already: the network thread must not wait
            self._session = module.session(params)
            self._session.set_alert_fd(bell.fileno())
            loop.add_reader(ear.fileno(), self._on_alerts)
            self._on_alerts()
            async with asyncio.timeout(LISTEN_SECONDS):
                await self._listening
        except (TimeoutError, RuntimeError, OSError) as error:
            self.close()
            why = "; ".join(self._failures) or str(error) or "no interface is up"
            raise DiscoveryError(
                f"the BitTorrent DHT cannot bind a UDP socket at {', '.join(self._wanted)} ({why}): name an address of this machine, "
                "or switch this source off"
            ) from error
        except BaseException:
            self.close()
            raise

    def begin(self, routers: Iterable[Host]) -> None:
        """Start the DHT, or go on with other bootstrap nodes (IP literals): they are asked while few others are known."""
        fresh = set(routers) - self._routers  # libtorrent never forgets one: naming it again would pile it up
        if self._session is None:
            return
        settings: dict[str, Any] = {"enable_dht": True}
        if fresh:
            self._routers |= fresh
            settings["dht_bootstrap_nodes"] = _join(fresh)
        self._session.apply_settings(settings)

    def add_node(self, host: str, port: int) -> None:
        """Ping the node at an IP literal; if it answers it gets into the routing table."""
        if self._session is not None:
            self._session.add_dht_node((host, port))

    def look_up(self, infohash: bytes) -> None:
        """Ask the nodes closest to an infohash for its peers (``get_peers``, BEP 5)."""
        if self._session is not None:
            self._session.dht_get_peers(self._module.sha1_hash(infohash))

    def announce(self, infohash: bytes, port: int) -> None:
        """Look up, and announce a TCP port under our address at the closest nodes (``announce_peer``, no implied port)."""
        if self._session is not None:
            self._session.dht_announce(self._module.sha1_hash(infohash), port, 0)

    def count_nodes(self) -> None:
        """Have `Listener.on_nodes` called soon."""
        if self._session is not None:
            self._session.post_session_stats()

    def saved_state(self) -> bytes:
        """Up to `MAX_SAVED_NODES` nodes from the routing tables, see `pack_nodes`; empty if there are none."""
        if self._session is None:
            return b""
        if hasattr(self._session, "session_state"):
            flag = self._module.save_state_flags_t.save_dht_state
            state = self._module.bdecode(self._module.write_session_params_buf(self._session.session_state(flag), flag))
        else:  # before 2.0.12
            state = self._session.save_state(self._module.save_state_flags_t.save_dht_state)
        table = state.get(b"dht state", {})
        nodes = [(str(ip_address(raw[:-2])), _PORT.unpack(raw[-2:])[0]) for name in (b"nodes", b"nodes6") for raw in table.get(name, ())]
        return pack_nodes(random.sample(nodes, min(len(nodes), MAX_SAVED_NODES)))

    def close(self) -> None:
        """End the network thread and close all sockets. Takes a millisecond or two: no name is being looked up there."""
        if self._bells is not None and self._session is not None:
            asyncio.get_running_loop().remove_reader(self._bells[0].fileno())
        self._session = None  # the last reference: the destructor stops the thread and waits for it
        for each in self._bells or ():  # only now, as that thread writes to one of them
            each.close()
        self._bells = None
        self.bound.clear()

    def _settings(self, module: Any) -> dict[str, Any]:
        category = module.alert.category_t
        off: tuple[str, ...] = ("enable_dht", "enable_lsd", "enable_upnp", "enable_natpmp")
        # libtorrent insists on a TCP listener beside its UDP socket. With these it closes whatever is accepted, and dials nobody.
        off += ("enable_incoming_tcp", "enable_incoming_utp", "enable_outgoing_tcp", "enable_outgoing_utp")
        return dict.fromkeys(off, False) | {
            "listen_interfaces": _join((host, self._port) for host in self._wanted),
            "dht_bootstrap_nodes": "",
            # Attack: one network fakes a large part of the nodes. One address (and prefix) gets into a bucket or a look-up once.
            "dht_restrict_routing_ips": not self._narrow,
            "dht_restrict_search_ips": not self._narrow,
            "dht_prefer_verified_node_ids": True,
            # Attack: strangers store ever more here. Beyond this libtorrent evicts the infohash with the fewest peers, or a random peer.
            "dht_max_torrents": 1_000,
            "dht_max_peers": 200,
            "dht_max_dht_items": 100,
            # Not the category "dht": its alerts tell every query of a stranger, and each would wake us.
            "alert_mask": int(category.status_notification) | int(category.error_notification) | int(category.dht_operation_notification),
            "alert_queue_size": MAX_QUEUED,
            "tick_interval": 1_000,
        }

    def _on_alerts(self) -> None:
        if self._bells is None or self._session is None:
            return
        with suppress(BlockingIOError):
            self._bells[0].recv(4_096)
        # Alerts live until the next call: nothing here may keep one. `close` may be called by what they cause.
        for alert in self._session.pop_alerts():
            if self._session is None:
                return
            self._on_alert(type(alert).__name__, alert)

    def _on_alert(self, name: str, alert: Any) -> None:
        match name:
            case "dht_get_peers_reply_alert":
                self._listener.on_peers(alert.info_hash.to_bytes(), alert.peers())
            case "session_stats_alert":
                self._listener.on_nodes(int(alert.values["dht.dht_nodes"]))
            case "listen_succeeded_alert":
                log.debug("%s", alert.message())
                self.bound[alert.address] = alert.port
                self._settle()
            case "listen_failed_alert":
                log.debug("%s", alert.message())
                self._failures = [*self._failures[-3:], alert.message()]
                if len(self._wanted) == 1:  # else another may succeed
                    self._settle(OSError("no address can be bound"))
            case "external_ip_alert":
                # Attack: nodes claim that we have ever other addresses. The one claimed longest ago is forgotten.
                self.external.pop(alert.external_address, None)
                self.external[alert.external_address] = None
                while len(self.external) > MAX_EXTERNAL:
                    del self.external[next(iter(self.external))]
            case "dht_error_alert" | "alerts_dropped_alert":
                log.debug("%s", alert.message())

    def _settle(self, error: OSError | None = None) -> None:
        if self._listening is None or self._listening.done():
            return
        if error is None:
            self._listening.set_result(None)
        else:
            self._listening.set_exception(error)


def pack_nodes(nodes: Iterable[Host]) -> bytes:
    """``"solyd mainline 1\\n"``, then per node: family u8 (4 or 6), address 4 or 16, port u16, big-endian. Empty if there are none.

    The node id is left out: it is made of our external address (BEP 42), and would tie our runs together.
    """
    packed = []
    for host, port in nodes:
        ip = ip_address(host.partition("%")[0])
        packed.append(bytes([ip.version]) + ip.packed + _PORT.pack(port))
    return _MAGIC + b"".join(packed) if packed else b""


def unpack_nodes(state: bytes | None) -> list[Host]:
    """The nodes of a saved state; none, and a line in the log, if it is malformed."""
    if not state:
        return []
    nodes: list[Host] = []
    try:
        if len(state) > MAX_STATE or not state.startswith(_MAGIC):
            raise ValueError("not a state of this version")
        offset = len(_MAGIC)
        while offset < len(state):
            end = offset + 1 + _SIZES[state[offset]]
            nodes.append((str(ip_address(state[offset + 1 : end])), _PORT.unpack_from(state, end)[0]))
            offset = end + _PORT.size
    except (ValueError, KeyError, struct.error) as error:
        log.warning("the saved state of the BitTorrent DHT is malformed (%s: %s) and ignored", type(error).__name__, error)
        return []
    return [(host, port) for host, port in nodes if port and scope_of(host) != "invalid"]


def _as_dht_state(nodes: Iterable[Host]) -> dict[bytes, list[bytes]]:
    """As libtorrent keeps it: compact node endpoints (BEP 5, BEP 32), by family."""
    by_family: dict[bytes, list[bytes]] = {b"nodes": [], b"nodes6": []}
    for host, port in nodes:
        ip = ip_address(host)
        by_family[b"nodes" if ip.version == 4 else b"nodes6"].append(ip.packed + _PORT.pack(port))
    return {name: packed for name, packed in by_family.items() if packed}


def _join(hosts: Iterable[Host]) -> str:
    return ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in hosts)
