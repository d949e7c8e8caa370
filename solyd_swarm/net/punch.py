"""Two that cannot dial each other dial at once, told when by a neighbour of both: each one's first packet opens its own translator
(NAT) or firewall for the other's, and the two meet in one connection (TCP simultaneous open: RFC 9293, section 3.5; RFC 5382, REQ-2).

As in libp2p's DCUtR the asker measures the round trip by the neighbour, and dials half of one after it has said GO.

    asker -> neighbour -> other: ASK     (ports to dial)
    other -> neighbour -> asker: ANSWER  (ports to dial), or DECLINE
    asker -> neighbour -> other: GO

The neighbour passes on only between members of one topic that it shares with both, a few bytes at a time, and it fills in the IP
address at which it sees the sender: it is no open relay, and nobody can have another dialled at an address of its own choosing.
"""

import asyncio
import contextlib
import logging
import random
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from solyd_swarm.core.events import Addresses
from solyd_swarm.net import reach_frames as frames
from solyd_swarm.net.connection import Connection
from solyd_swarm.net.dialler import Attempt, connect
from solyd_swarm.net.goals import Goal
from solyd_swarm.net.listening_port import ListeningPort
from solyd_swarm.net.rates import Rates

log = logging.getLogger("solyd_swarm.net.punch")

EARLY = 1.0
"""Seconds that a dial may take before we ask for help as well: firewalls say nothing, so that it would fail much later."""
ANSWER_TIMEOUT = 3.0
MEET_TIMEOUT = 4.0
"""Seconds for the two to meet."""
ROUNDS, ROUND = 5, 0.75
"""How often a dial that was refused is repeated, and how many seconds apart: both ends keep the same time."""
REST = 30.0
"""Seconds before the same instance is tried so again."""
MAX_RELAYS = 3
MAX_PUNCHES = 16
"""At once, and of those that others began: bounds the sockets that neighbours can have us open. Beyond it we decline."""
MAX_REMEMBERED = 256
"""Instances that we dialled so of late, or do not try again at once; the oldest go."""


@dataclass(slots=True)
class _Wanted:
    """Somebody we asked neighbours about."""

    until: float
    asked_at: float
    relays: set[bytes]
    goals: list[Goal] = field(default_factory=list)
    answered: bool = False


@dataclass(slots=True)
class _Expected:
    """Somebody who asked for us; we have answered."""

    until: float
    relay: bytes
    addresses: Addresses


class Puncher:
    """Asks, passes on, and dials; ends with `close`.

    Args:
        connections: those in use, by instance; the endpoint's own.
        make: makes a channel that dials, and a future of whether its handshake completes.
        failed: told of a goal that could not be reached so either.
        ports: where others may dial us, as far as the neighbour given knows us; empty: nowhere.
        may_dial: whether an address may be dialled that a peer told: (IP literal, IP literal of the peer).
    """

    def __init__(
        self,
        connections: Mapping[bytes, Connection],
        make: Callable[[], Attempt],
        failed: Callable[[Goal], None],
        listening: ListeningPort,
        *,
        ports: Callable[[Connection], tuple[int, ...]],
        may_dial: Callable[[str, str], bool],
    ) -> None:
        self._connections = connections
        self._make = make
        self._failed = failed
        self._listening = listening
        self._ports = ports
        self._may_dial = may_dial
        self._wanted: dict[bytes, _Wanted] = {}
        self._expected: dict[bytes, _Expected] = {}
        self._slow: dict[Goal, float] = {}  # being dialled, and since when it takes long; our own, as many as there are dials
        self._lately: OrderedDict[bytes, float] = OrderedDict()  # asked about, or dialled so, until when that counts
        self._tasks: dict[bytes, asyncio.Task[bool]] = {}
        # Bounds what one host can have us pass on (three frames for each pair that meets), and what it can have us dial.
        self._passed = Rates(24, 1.0, 128, 0.05)
        self._served = Rates(6, 5.0, 24, 1.0)
        self._closed = False

    # -- what we want -----------------------------------------------------------------------------------------

    def dialling(self, goal: Goal, now: float) -> None:
        """A dial has begun; if it takes long, neighbours are asked meanwhile."""
        if goal.instance:
            self._slow[goal] = now + EARLY

    def take(self, goal: Goal, now: float) -> bool:
        """A dial has failed. Whether there is still hope: then the goal is ours, and fails or is claimed later."""
        self._slow.pop(goal, None)
        self._ask(goal, now)
        wanted = self._wanted.get(goal.instance)
        if wanted is None:
            return False
        if goal not in wanted.goals:
            wanted.goals.append(goal)
        return True

    def _ask(self, goal: Goal, now: float) -> None:
        instance = goal.instance
        if self._closed or not instance or instance in self._wanted or instance in self._connections or instance in self._tasks:
            return
        if len(self._wanted) >= MAX_PUNCHES or self._lately.get(instance, now) > now:
            return
        relays = self._relays(goal)
        if not relays:
            return
        self._remember(instance, now + REST)
        self._wanted[instance] = _Wanted(now + ANSWER_TIMEOUT, now, {relay.instance for relay in relays})
        log.debug("asking %d neighbours to help with a peer that cannot be dialled", len(relays))
        for relay in relays:
            self._tell(relay, goal.topic_key, instance, frames.ASK)

    def _relays(self, goal: Goal) -> list[Connection]:
        """Neighbours that may know it: first of all who told us of it."""
        usable = [
            connection
            for connection in self._connections.values()
            if goal.topic_key in connection.links and connection.instance != goal.instance and self._ports(connection)
        ]
        random.shuffle(usable)
        return sorted(usable, key=lambda connection: connection.instance != goal.via)[:MAX_RELAYS]

    def _remember(self, instance: bytes, until: float) -> None:
        self._lately[instance] = until
        self._lately.move_to_end(instance)
        while len(self._lately) > MAX_REMEMBERED:
            self._lately.popitem(last=False)

    def _tell(self, relay: Connection, topic_key: bytes, instance: bytes, step: int) -> None:
        number = relay.matcher.numbers.get(topic_key) if relay.matcher is not None else None
        if number is not None:
            ports = self._ports(relay) if step in (frames.ASK, frames.ANSWER) else ()
            relay.channel.send(frames.encode(frames.Punch(number, instance, step, ports)))

    def claim(self, connection: Connection, now: float) -> tuple[bool | None, list[Goal]]:
        """A channel is in use. Whether it came about so, and then whether it was we who wanted it (else None); and what for."""
        wanted = self._wanted.pop(connection.instance, None)
        if wanted is not None and (wanted.answered or wanted.goals):
            return True, wanted.goals
        expected = self._expected.pop(connection.instance, None)
        return (False if expected is not None else None), []

    def is_recent(self, instance: bytes, now: float) -> bool:
        """Whether we have dialled it so lately: that it reaches us says nothing about whether others can."""
        return instance in self._wanted or instance in self._expected or instance in self._tasks or self._lately.get(instance, 0.0) > now

    def tick(self, now: float) -> None:
        """What has taken too long is given up; what is about to gets help. To be called about once a second."""
        for goal in [goal for goal, due in self._slow.items() if due <= now]:
            del self._slow[goal]
            self._ask(goal, now)
        for instance in [instance for instance, wanted in self._wanted.items() if wanted.until <= now and instance not in self._tasks]:
            self._give_up(instance)
        self._expected = {instance: each for instance, each in self._expected.items() if each.until > now or instance in self._tasks}

    def _give_up(self, instance: bytes) -> None:
        wanted = self._wanted.pop(instance, None)
        for goal in wanted.goals if wanted is not None else ():
            self._failed(goal)

    # -- what neighbours say ----------------------------------------------------------------------------------

    def pass_on(self, sender: Connection, frame: frames.Punch, now: float) -> None:
        """Something for another member of a topic that we share with both."""
        topic_key = sender.matcher.topics.get(frame.number, b"") if sender.matcher is not None else b""
        target = self._connections.get(frame.instance)
        known = target is not None and target is not sender and topic_key in sender.links and topic_key in target.links
        if known and (":" in sender.host) == (":" in target.host) and self._passed.take(sender.host, now):  # type: ignore[union-attr]
            assert target is not None
            assert target.matcher is not None
            number = target.matcher.numbers[topic_key]
            passed = frames.Punched(number, sender.instance, frame.step, frame.ports, frames.pack_host(sender.host))
            target.channel.send(frames.encode(passed))
        elif frame.step == frames.ASK:
            sender.channel.send(frames.encode(frames.Punched(frame.number, frame.instance, frames.DECLINE)))

    def hear(self, relay: Connection, frame: frames.Punched, now: float) -> None:
        """Something from another member, passed on by a neighbour."""
        topic_key = relay.matcher.topics.get(frame.number, b"") if relay.matcher is not None else b""
        if self._closed or topic_key not in relay.links or frame.instance == relay.instance:
            return
        host = frames.unpack_host(frame.ip)
        addresses = tuple((host, port) for port in dict.fromkeys(frame.ports) if port and host and self._may_dial(host, relay.host))
        if frame.step == frames.ASK:
            self._asked(relay, topic_key, frame.instance, addresses, now)
        elif frame.step == frames.ANSWER:
            self._answered(relay, topic_key, frame.instance, addresses, now)
        elif frame.step == frames.GO:
            expected = self._expected.get(frame.instance)
            if expected is not None and expected.relay == relay.instance:
                self._begin(frame.instance, expected.addresses, 0.0, now)
        elif frame.step == frames.DECLINE:
            wanted = self._wanted.get(frame.instance)
            if wanted is not None and not wanted.answered:
                wanted.relays.discard(relay.instance)
                if not wanted.relays:
                    self._give_up(frame.instance)

    def _asked(self, relay: Connection, topic_key: bytes, instance: bytes, addresses: Addresses, now: float) -> None:
        busy = len(self._tasks) + len(self._expected) >= MAX_PUNCHES and instance not in self._expected
        if busy or not addresses or not self._ports(relay) or not self._served.take(relay.host, now):
            self._tell(relay, topic_key, instance, frames.DECLINE)
        else:
            self._expected[instance] = _Expected(now + ANSWER_TIMEOUT + MEET_TIMEOUT, relay.instance, addresses)
            self._tell(relay, topic_key, instance, frames.ANSWER)

    def _answered(self, relay: Connection, topic_key: bytes, instance: bytes, addresses: Addresses, now: float) -> None:
        wanted = self._wanted.get(instance)
        if wanted is None or wanted.answered or relay.instance not in wanted.relays or not addresses:
            return
        wanted.answered = True
        wanted.until = now + MEET_TIMEOUT + ANSWER_TIMEOUT  # the latter for the channel to be taken into use
        self._tell(relay, topic_key, instance, frames.GO)
        self._begin(instance, addresses, min(now - wanted.asked_at, 1.0) / 2, now)

    # -- dialling at once -------------------------------------------------------------------------------------

    def _begin(self, instance: bytes, addresses: Addresses, delay: float, now: float) -> None:
        if instance in self._tasks or len(self._tasks) >= 2 * MAX_PUNCHES:
            return
        self._remember(instance, now + REST)
        task = asyncio.get_running_loop().create_task(self._meet(instance, addresses, delay), name="solyd_swarm punch")
        self._tasks[instance] = task
        task.add_done_callback(lambda _: self._ended(task, instance))

    def _ended(self, task: "asyncio.Task[bool]", instance: bytes) -> None:
        self._tasks.pop(instance, None)
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            log.error("a dial at the same time as a peer's failed unexpectedly", exc_info=error)
        elif not task.result():
            log.debug("a peer that dialled us at the same time was not met")
            self._give_up(instance)

    async def _meet(self, instance: bytes, addresses: Addresses, delay: float) -> bool:
        before = self._connections.get(instance)
        await asyncio.sleep(delay)
        log.debug("dialling %s at the same time as it dials us", ", ".join(f"{host} port {port}" for host, port in addresses))
        attempts = [asyncio.ensure_future(self._attempt(instance, before, host, port)) for host, port in addresses]
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(MEET_TIMEOUT):
                    for attempt in asyncio.as_completed(attempts):
                        if await attempt:
                            return True
        finally:
            for attempt in attempts:
                attempt.cancel()
            await asyncio.gather(*attempts, return_exceptions=True)
        return False

    async def _attempt(self, instance: bytes, before: Connection | None, host: str, port: int) -> bool:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        for number in range(ROUNDS):
            await asyncio.sleep(max(0.0, begun + number * ROUND - loop.time()))
            if self._connections.get(instance) not in (None, before):
                return True  # it has come in by our listener
            # Refused: its packet was too early, or too late. Or the two ports are connected already: it has come in.
            with contextlib.suppress(OSError, ValueError, OverflowError):
                if await self._dial(host, port):
                    return True
        return False

    async def _dial(self, host: str, port: int) -> bool:
        endpoint = await connect(self._listening, host, port, always=True)
        channel, ready = self._make()
        handed_over = False
        try:
            await asyncio.get_running_loop().create_connection(lambda: channel, sock=endpoint)
            handed_over = await ready
        except BaseException:
            with contextlib.suppress(OSError):
                endpoint.close()
            raise
        finally:
            if not handed_over:
                channel.abort("another address answered first")
        return handed_over

    async def close(self) -> None:
        """Gives up everything; nothing is told any more."""
        self._closed = True
        self._wanted.clear()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
