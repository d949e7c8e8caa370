"""Looking a key up in the DHT, among nodes that may be dead, and may lie.

Kademlia's iterative look-up (Maymounkov and Mazieres, IPTPS 2002), which asks all of the k closest nodes and goes on until they are all
heard. What they give is verified here. Against nodes that lie: whoever tells of nodes that do not answer is believed last; of one
network, two nodes count among the closest before others do; and where a key is crowded, `wide_look_up` asks all around it.
"""

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Any

from kademlia.node import Node

from solyd_swarm.discovery import dht_wire as wire
from solyd_swarm.discovery.dht_protocol import DhtProtocol, Host
from solyd_swarm.discovery.dht_storage import network_of
from solyd_swarm.discovery.records import SignedRecord, verify
from solyd_swarm.discovery.scope import may_dial
from solyd_swarm.errors import RemoteProtocolError

log = logging.getLogger("solyd_swarm.discovery.dht")

ALPHA = 4
"""Requests of one look-up that are under way at once, those left out that are slow: one dead node holds up only its own place."""
SLOW = 0.3
"""Seconds after which a request is slow, and another one is made beside it: many dead nodes cost this for four, not a second each."""
LOOKUP_SECONDS = 6.0
"""Longest that a look-up takes, whatever it is told."""
SURVEY_SECONDS = 3.0
"""Longest that a look-up takes that is only to see who is there: what answers later than that is of no use either."""
MAX_ASKED = 96
MAX_KNOWN = 128
SEEDS = 64
"""Nodes of the routing table that a look-up begins with: the k closest of them may all be dead."""
MAX_REPEATS = 12
MAX_REPEATED = 48
FAILURES = 2
PER_NETWORK = 2
"""Nodes of one network that count among the k closest while there are others."""
CROWDED = 4
"""The closest nodes are this many times closer than they should be: by chance (8 where 2 are expected) one key in a thousand."""
SIBLINGS = 5
MAX_WIDE = 32
"""Nodes asked, and given records, beyond the closest ones where a key is crowded."""
Report = Callable[[SignedRecord, str], None]
"""Called with a verified record and the IP literal of the node that gave it."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A node close to a key that answered, and the token it wants to see in a store."""

    node: Any
    token: bytes


class LookUp:
    """One look-up of a key.

    Args:
        public: the key that signs the records; None: look for nodes only.
        report: called at once with each record that is new to this look-up or newer than what it gave before.
        among: ask these nodes, and no others that they tell of; None: begin with what the routing table has.
        earlier: a look-up whose records are not to be given again.
        crowded: a distance within which k nodes that answer are too many to be there by chance: it ends when there are, since whoever
            put them there may have made up any number of others.
        shun: nodes closer to this key than that are not asked, nor heard of.
        seconds: longest that it takes.
    """

    def __init__(
        self,
        protocol: DhtProtocol,
        key: bytes,
        public: bytes | None = None,
        report: Report | None = None,
        *,
        among: Iterable[Any] | None = None,
        earlier: "LookUp | None" = None,
        crowded: int = 0,
        shun: tuple[bytes, int] = (bytes(20), 0),
        seconds: float = LOOKUP_SECONDS,
    ) -> None:
        self._protocol = protocol
        self._target = Node(key)
        self._public, self._report = public, report
        self._known: dict[bytes, Any] = {}
        self._hosts: set[Host] = set()
        self._asked: set[bytes] = set()
        self._holders: dict[bytes, Holder] = {}
        self._best: dict[bytes, int] = {} if earlier is None else earlier._best
        self._tellers: dict[bytes, bytes] = {}
        self._failures: Counter[bytes] = Counter()
        self._repeats: Counter[bytes] = Counter()
        self._requests = 0
        self._late = False
        self._crowded = crowded
        self._shunned, self._berth = int.from_bytes(shun[0], "big"), shun[1]
        self._seconds = seconds
        self._curious = among is None
        self._homes: dict[Host, bytes] = {(node.ip, node.port): node.id for node in protocol.router.contacts()}
        for node in protocol.router.find_neighbors(self._target, SEEDS) if among is None else among:
            self._learn(node, b"")

    async def run(self) -> list[Holder]:
        """Ask until the closest nodes have all answered or failed. Returns those that answered, closest first, at most k."""
        loop = asyncio.get_running_loop()
        pending: dict[asyncio.Future[bytes | None], tuple[Any, float]] = {}
        deadline = loop.time() + self._seconds
        try:
            while (now := loop.time()) < deadline and not self.is_crowded:
                prompt = [asked for _, asked in pending.values() if asked > now - SLOW]
                slow = {node.id for node, asked in pending.values() if asked <= now - SLOW}
                for node in self._next(ALPHA - len(prompt), slow):
                    pending[self._ask(node)] = node, now
                    prompt.append(now)
                if not pending:
                    break
                patience = min(deadline, min(prompt) + SLOW if prompt else deadline) - now
                done, _ = await asyncio.wait(pending, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                for future in done:
                    node, _ = pending.pop(future)
                    if self._take(node, future.result()):
                        pending[self._ask(node)] = node, loop.time()
            else:
                self._late = not self.is_crowded
        finally:
            for future in pending:
                future.cancel()
        near = self._closest([holder.node for holder in self._holders.values()])
        return [self._holders[node.id] for node in near]

    @property
    def is_crowded(self) -> bool:
        """Whether k nodes have answered that are within the distance `crowded`."""
        if not self._crowded or len(self._holders) < wire.REPLICAS:
            return False
        return self._distance(self._closest([holder.node for holder in self._holders.values()])[-1]) < self._crowded

    def asked(self, within: int = 1 << 160) -> int:
        """How many nodes were asked that are, or are said to be, within a distance, whether they answered or not."""
        return sum(int.from_bytes(node_id, "big") ^ int.from_bytes(self._target.id, "big") < within for node_id in self._asked)

    @property
    def cut_short(self) -> bool:
        """Whether it ended with nodes left to ask: there were too many, or too many that are dead."""
        return self._requests >= MAX_ASKED or self._late

    @property
    def answered(self) -> list[Any]:
        """Every node that answered, closest first."""
        return sorted((holder.node for holder in self._holders.values()), key=self._distance)

    def has_asked(self, node: Any) -> bool:
        """Whether a node, or whoever is at its address, was asked."""
        return node.id in self._asked or (node.ip, node.port) in self._hosts

    def _next(self, room: int, slow: Container[bytes]) -> list[Any]:
        """Up to ``room`` of the closest nodes that were not asked; they count as asked now. Those that are slow count as failed."""
        chosen: list[Any] = []
        # Attack: made-up nodes, each closer than the last, keep a look-up going for ever. It ends after this many requests.
        room = min(room, MAX_ASKED - self._requests)
        known = [node for node in self._known.values() if node.id not in slow]
        near = self._closest(known) if self._curious else sorted(known, key=self._rank)
        for node in near:
            if len(chosen) >= room:
                break
            if node.id in self._asked:
                continue
            # Attack: made-up ids at addresses of honest nodes. Each address is asked once, and then counts under its own id.
            if (node.ip, node.port) in self._hosts:
                del self._known[node.id]
                continue
            self._asked.add(node.id)
            self._hosts.add((node.ip, node.port))
            chosen.append(node)
        return chosen

    def _closest(self, nodes: Iterable[Any]) -> list[Any]:
        """The k closest nodes, closest first."""
        # Attack: one network surrounds a key with nodes of its own. Two of them count; the others only where places are left over.
        crowd: Counter[str] = Counter()
        first: list[Any] = []
        later: list[Any] = []
        for node in sorted(nodes, key=self._rank):
            network = network_of(node.ip)
            crowd[network] += 1
            (first if crowd[network] <= PER_NETWORK else later).append(node)
        return sorted([*first[: wire.REPLICAS], *later[: max(0, wire.REPLICAS - len(first))]], key=self._rank)

    def _ask(self, node: Any) -> asyncio.Future[bytes | None]:
        self._requests += 1
        name, find = "find_node", wire.Find(self._protocol.source_node.id, self._target.id)
        if self._public is not None:
            skip = wire.make_skip(self._best.items(), secrets.token_bytes(wire.SKIP_SALT))
            name, find = "find_value", wire.Find(find.sender, find.key, skip)
        return self._protocol.call((node.ip, node.port), name, find)

    def _take(self, node: Any, body: bytes | None) -> bool:
        """Use a reply. Returns True if the node should be asked again: it holds more, and the last answer told something new."""
        found = self._protocol.read(node, body, wire.Found)
        if found is None or found.id == self._protocol.source_node.id:
            self._fail(node)
            return False
        # Attack: a node says that its id is whatever we look for. It counts under the id that it was known by, to us or to others; if
        # that is not what it says now (it may have started anew), what it holds is used, and it is neither believed nor given anything.
        home = self._homes.setdefault((node.ip, node.port), node.id)
        believed = found.id in (home, node.id)
        if found.id != node.id:
            self._known.pop(node.id, None)
            node = Node(found.id, node.ip, node.port)
            self._asked.add(found.id)
            if believed:
                self._known[found.id] = node
        try:
            fresh = sum([self._merge(raw, node.ip) for raw in found.records])
        except RemoteProtocolError as error:
            log.debug("%s gave %s", node, error)
            self._protocol.strike(node)
            self._fail(node)
            return False
        if believed and node.id not in self._holders:
            for neighbour in found.nodes if self._curious else ():
                if may_dial(neighbour.host, node.ip) and self._protocol.reaches(neighbour.host):
                    self._learn(Node(neighbour.id, neighbour.host, neighbour.port), node.id)
        if believed:
            self._holders[node.id] = Holder(node, found.token)
        # Attack: a member fills a key with records, and nodes that hold them are asked on and on. Each so often, and all together.
        if not found.total > len(found.records) > 0 or not fresh:
            return False
        self._repeats[node.id] += 1
        return self._repeats[node.id] <= MAX_REPEATS and self._repeats.total() <= MAX_REPEATED and self._requests < MAX_ASKED

    def _fail(self, node: Any) -> None:
        self._known.pop(node.id, None)
        self._holders.pop(node.id, None)
        self._failures[self._tellers.get(node.id, b"")] += 1

    def _merge(self, raw: bytes, learned_from: str) -> bool:
        if self._public is None:
            return False
        record = verify(self._public, raw)
        if self._best.get(record.slot, -1) >= record.sequence:
            return False
        self._best[record.slot] = record.sequence
        if self._report is not None:
            self._report(record, learned_from)
        return True

    def _learn(self, node: Any, teller: bytes) -> None:
        if int.from_bytes(node.id, "big") ^ self._shunned < self._berth:
            return
        if self.has_asked(node) or node.id in self._known or node.id == self._protocol.source_node.id:
            return
        if self._homes.get((node.ip, node.port), node.id) != node.id:
            node = Node(self._homes[node.ip, node.port], node.ip, node.port)  # we know better
        self._known[node.id] = node
        self._tellers[node.id] = teller
        # Attack: replies full of made-up nodes fill the memory of a look-up. The ones believed least, then the furthest, are forgotten.
        if len(self._known) > MAX_KNOWN:
            worst = max(self._known.values(), key=self._rank)
            del self._known[worst.id], self._tellers[worst.id]

    def _rank(self, node: Any) -> tuple[bool, int]:
        # Attack: made-up nodes closer than any honest one use up the requests. Of whoever told of two that failed, the others come last.
        teller = self._tellers.get(node.id, b"")
        doubtful = bool(teller) and node.id not in self._holders and self._failures[teller] >= FAILURES
        return doubtful, self._distance(node)

    def _distance(self, node: Any) -> int:
        return int(node.distance_to(self._target))


async def wide_look_up(protocol: DhtProtocol, first: LookUp, key: bytes, public: bytes, report: Report | None, radius: int) -> list[Holder]:
    """Ask around a key whose closest nodes are too close to be there by chance: they may be there to hide it.

    Records are put at, and looked for at, all nodes found within the distance where the k closest honest ones have to be, however many
    others there are. The region's nodes are found through look-ups of ids next to the key that leave the crowd out: what is asked for
    the key itself leads there.

    Args:
        first: the look-up of the key, which has run.
        radius: distance within which k nodes are expected.

    Returns:
        Nodes that answered beside those of the first look-up, closest first, at most `MAX_WIDE`.
    """
    top = max(radius.bit_length(), SIBLINGS)
    targets = [(int.from_bytes(key, "big") ^ 1 << min(top - number, 159)).to_bytes(20, "big") for number in range(SIBLINGS)]
    crowd = key, radius // CROWDED
    around = [LookUp(protocol, target, shun=crowd, seconds=SURVEY_SECONDS) for target in dict.fromkeys(targets)]
    await asyncio.gather(*[each.run() for each in around])
    target = Node(key)
    nodes = {node.id: node for each in around for node in each.answered if not first.has_asked(node)}
    nearest = sorted(nodes.values(), key=target.distance_to)[:MAX_WIDE]
    log.debug("a key of the DHT is crowded: %d more nodes are asked", len(nearest))
    wide = LookUp(protocol, key, public, report, among=nearest, earlier=first)
    await wide.run()
    return [wide._holders[node.id] for node in wide.answered]
