"""How an endpoint looks from outside, and what its neighbours do about it: where it is seen, which of its addresses can be dialled,
and meeting peers that cannot be dialled. See `solyd_swarm.net.observed`, `reachable`, `dial_back` and `punch` for each of these.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from solyd_swarm.core.events import Addresses
from solyd_swarm.discovery.scope import scope_of
from solyd_swarm.net import reach_frames as frames
from solyd_swarm.net.channel import Channel, ChannelOwner
from solyd_swarm.net.connection import Connection
from solyd_swarm.net.dial_back import TRY_TIMEOUT, DialBack
from solyd_swarm.net.dialler import Attempt
from solyd_swarm.net.goals import Goal
from solyd_swarm.net.listening_port import ListeningPort
from solyd_swarm.net.observed import Observed, is_near
from solyd_swarm.net.punch import Puncher
from solyd_swarm.net.reachable import Reachable

log = logging.getLogger("solyd_swarm.net.outside")

SETTLE = 2.0
"""Seconds after a change in which we only listen: neighbours tell, and dials come in by themselves."""
MAX_MAPPED = 4


@dataclass(slots=True)
class _Asked:
    """A neighbour tries an address for us. It counts as reached when it says so, and we have had a visit of its instance key."""

    until: float
    visited: bool = False
    answered: bool = False


class Outside:
    """One per endpoint; ends with `close`.

    Args:
        connections: those in use, by instance; the endpoint's own.
        listening: our listening sockets.
        make: makes a channel that dials, and a future of whether its handshake completes.
        make_visit: makes a channel that dials, for another owner.
        failed: told of a goal that cannot be reached.
        may_dial: whether an address may be dialled that a peer told: (IP literal, IP literal of the peer).
        may_go: whether packets may go to an IP literal.
        changed: called when `published` would give something else.
    """

    def __init__(
        self,
        connections: Mapping[bytes, Connection],
        listening: ListeningPort,
        *,
        make: Callable[[], Attempt],
        make_visit: Callable[[ChannelOwner], Channel],
        failed: Callable[[Goal], None],
        may_dial: Callable[[str, str], bool],
        may_go: Callable[[str], bool],
        changed: Callable[[], None],
    ) -> None:
        self.port = 0
        self.observed = Observed()
        self.reachable = Reachable()
        self.puncher = Puncher(
            connections,
            make,
            failed,
            listening,
            ports=self._ports_for,
            may_dial=lambda address, teller: may_dial(address, teller) and may_go(address),
        )
        self._connections = connections
        self._changed = changed
        self._dial_back = DialBack(make_visit, may_go)
        self._own: tuple[tuple[str, int], ...] | None = None
        self._mapped: tuple[tuple[str, int], ...] = ()
        self._quiet_until = 0.0
        self._asked: dict[tuple[bytes, tuple[str, int]], _Asked] = {}
        self._told: Addresses = ()

    # -- our addresses ----------------------------------------------------------------------------------------

    @property
    def refused(self) -> Counter[str]:
        """How many impossible addresses peers have told us that they see us at, by reason."""
        return self.observed.refused

    def set_mapped(self, addresses: Iterable[tuple[str, int]]) -> None:
        """A router passes these of its addresses on to us, or says so: they are published once somebody has come in by them."""
        usable = [(host, port) for host, port in addresses if scope_of(host) == "global" and 0 < port <= 65535]
        before, self._mapped = self._mapped, tuple(dict.fromkeys(usable))[:MAX_MAPPED]
        self._update(set(before) - set(self._mapped))

    def look(self, own: Addresses) -> None:
        """These are the addresses of our interfaces now, with the port listened on."""
        if own == self._own:
            return
        before, self._own = self._own, own
        moved = before is not None and set(own) != set(before)
        if moved:
            log.debug("our addresses have changed: they are tried anew")
            here = {host for host, _ in own}
            lasting = self._connections.values()
            self.observed.forget({connection.instance for connection in lasting if connection.channel.local_address[0] in here})
            self.reachable.start_over(self._now())
        self._update(before or ())

    def published(self, own: Addresses) -> Addresses:
        """What others may hear of, furthest reach first, given the addresses of our interfaces. May be called from any thread."""
        told = self.reachable.told()
        unknown = [address for address in _global(own) if address not in self.reachable]
        return (*told, *unknown, *(address for address in own if scope_of(address[0]) != "global"))

    def _update(self, gone: Collection[tuple[str, int]] = ()) -> None:
        own = _global(self._own or ())
        # Where somebody came in, whatever is said of it now: a lie must not have it dropped.
        proven = [address for address in self.reachable.told() if address not in own and address not in gone]
        outside = [*self._mapped, *proven]
        for version in (4, 6):
            host = self.observed.public_host(version)
            if host and all(host != mine for mine, _ in own):
                ports = self.observed.mapped_ports(host) if self.observed.is_endpoint_independent(host) else []
                outside += [(host, port) for port in (*ports, self.port) if port]
        self.reachable.update(own, outside, self._now())
        self._look()

    def _look(self) -> None:
        told = self.published(self._own or ())
        if told != self._told:
            self._told = told
            self._changed()

    @staticmethod
    def _now() -> float:
        return time.monotonic()

    def _ports_for(self, connection: Connection) -> tuple[int, ...]:
        """Where a peer that this neighbour sends us may try: the port that the neighbour sees, those that others see, our own."""
        host = self.observed.host_by(connection.instance)
        if not host or not self.port:
            return ()
        return tuple(dict.fromkeys((*self.observed.mapped_ports(host), self.port)))[: frames.MAX_PORTS]

    # -- channels ---------------------------------------------------------------------------------------------

    def handshaken(self, connection: Connection) -> None:
        """Somebody has dialled us, and proven its instance key."""
        for (instance, address), asked in list(self._asked.items()):
            if instance == connection.instance and not connection.channel.initiator:
                asked.visited = True
                if asked.answered:
                    self._reached(instance, address)

    def up(self, connection: Connection) -> list[Goal]:
        """A channel is in use. Returns what else it was wanted for."""
        now = self._now()
        connection.incidental = connection.channel.crossed or self.puncher.is_recent(connection.instance, now)
        wanted_by_us, goals = self.puncher.claim(connection, now)
        if wanted_by_us is not None and (wanted_by_us or not connection.goals):
            connection.asked = wanted_by_us
        if self._is_evidence(connection):
            self._came_in(connection, connection.channel.local_address)
        self._quiet_until = max(self._quiet_until, now + SETTLE) if len(self._connections) <= 1 else self._quiet_until
        return goals

    def linked(self, connection: Connection) -> None:
        """A topic is shared with the peer, who is told where we see it. Strangers are told nothing."""
        host, port = connection.channel.remote_address
        if host:
            connection.channel.send(frames.encode(frames.Seen(frames.pack_host(host), port)))

    def _is_evidence(self, connection: Connection) -> bool:
        """Whether that this peer has dialled us says that anybody can: it came unasked, and from a port of its own."""
        channel = connection.channel
        own_port = channel.remote_address[1] != connection.hello.port
        outsider = scope_of(connection.host) == "global" and not any(is_near(connection.host, mine) for mine, _ in _global(self._own or ()))
        return not channel.initiator and not connection.incidental and own_port and outsider

    def _came_in(self, connection: Connection, address: tuple[str, int]) -> None:
        if address in self.reachable and self.reachable.reached(address, self._now()):
            log.info("others can dial %s port %d", *address)
            self._look()

    def handle(self, connection: Connection, data: bytes) -> None:
        """One of these frames, from a channel in use. Raises `RemoteProtocolError`."""
        frame, now = frames.decode(data), self._now()
        if not connection.links:
            return  # nothing is done for strangers, nor believed of them
        if isinstance(frame, frames.Seen):
            self._seen(connection, frame)
        elif isinstance(frame, frames.Try):
            self._dial_back.serve(connection, frame)
        elif isinstance(frame, frames.Tried):
            self._tried(connection, frame)
        elif isinstance(frame, frames.Punch):
            self.puncher.pass_on(connection, frame, now)
        elif isinstance(frame, frames.Punched):
            self.puncher.hear(connection, frame, now)

    def _seen(self, connection: Connection, frame: frames.Seen) -> None:
        host, port = frame.address
        channel = connection.channel
        stands = channel.initiator and channel.local_address[1] == self.port
        if not self.observed.tell(connection.instance, connection.host, host, port, stands=stands):
            log.debug("%s says that it sees us at %s port %d, which cannot be", connection.host, host, port)
            return
        self._update()
        if self._is_evidence(connection):
            self._came_in(connection, (host, port))

    # -- being tried ------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Has addresses tried that are due. To be called about once a second."""
        now = self._now()
        self.puncher.tick(now)
        self._asked = {key: asked for key, asked in self._asked.items() if asked.until > now}
        if now < self._quiet_until:
            return
        for address in self.reachable.due(now):
            if all(about != address for _, about in self._asked):
                self._have_tried(address, now)

    def _have_tried(self, address: tuple[str, int], now: float) -> None:
        """Asks a neighbour that sees us at this host; one that has not failed before, if there is one."""
        doubters = self.reachable.doubters(address)
        able = [
            connection
            for connection in self._connections.values()
            if connection.links
            and connection.refused_until <= now
            and not is_near(connection.host, address[0])
            and self.observed.host_by(connection.instance) == address[0]
        ]
        if not able:
            return
        chosen = min(able, key=lambda connection: (connection.host in doubters, connection.refused_until))
        chosen.refused_until = now  # whoever was asked last comes last
        self._asked[chosen.instance, address] = _Asked(now + TRY_TIMEOUT + 2.0)
        log.debug("asking %s to dial %s port %d", chosen.host, *address)
        chosen.channel.send(frames.encode(frames.Try(frames.pack_host(address[0]), address[1])))

    def _tried(self, connection: Connection, frame: frames.Tried) -> None:
        address = frame.address
        asked = self._asked.get((connection.instance, address))
        if asked is None:
            return
        if frame.outcome == frames.REACHED:
            asked.answered = True
            if asked.visited:
                self._reached(connection.instance, address)
            return
        del self._asked[connection.instance, address]
        if frame.outcome != frames.FAILED:
            connection.refused_until = self._now() + 60.0
        elif self.reachable.failed(address, connection.host, self._now()):
            log.info("nobody can dial %s port %d: a firewall, or address translation; others reach us through neighbours", *address)
            self._look()
        else:
            log.debug("%s cannot dial %s port %d", connection.host, *address)

    def _reached(self, instance: bytes, address: tuple[str, int]) -> None:
        del self._asked[instance, address]
        connection = self._connections.get(instance)
        if connection is not None:
            self._came_in(connection, address)

    async def close(self) -> None:
        """Ends what is under way."""
        await asyncio.gather(self.puncher.close(), self._dial_back.close())


def _global(addresses: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    return [(host, port) for host, port in addresses if scope_of(host) == "global"]
