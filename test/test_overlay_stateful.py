"""A swarm to which anything happens, in any order; once it is quiet, all that was promised must hold."""

import random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from simulated import Puppet, come_back, digests, disordered, repeated
from test_overlay_hostile import Fiend

from solyd_swarm.core.events import Congested, Drained
from solyd_swarm.core.overlay import OverlayConfig
from solyd_swarm.simulation.network import Network
from solyd_swarm.simulation.peer import Peer

MOST = 12
pick = st.integers(0, 2**16)


class SwarmMachine(RuleBasedStateMachine):
    """Joins, leaves, crashes, restarts, cuts, loss, duplication, reordering, publishing, hostile frames, and time."""

    @initialize(seed=st.integers(0, 2**32), count=st.integers(2, 6), may_forget=st.integers(0, 3).map(lambda n: n == 3))
    def start(self, seed: int, count: int, may_forget: bool) -> None:
        self.may_forget = may_forget
        self.net = Network(seed)
        self.published: dict[Peer, list[bytes]] = {}
        self.restarted: set[Peer] = set()
        self.puppet: Puppet | None = None
        self.lossy = False
        self.messages = 0
        for _ in range(count):
            self.join(0, True)

    @property
    def members(self) -> list[Peer]:
        return [peer for peer in self.net.living if not isinstance(peer.overlay, Puppet) and not peer.overlay.closed]

    def member(self, n: int) -> Peer:
        return self.members[n % len(self.members)]

    @precondition(lambda self: len(self.members) < MOST)
    @rule(n=pick, tell_instance=st.booleans())
    def join(self, n: int, tell_instance: bool) -> None:
        known = self.members
        peer = self.net.add_peer()
        if known:
            self.net.discover(peer, known[n % len(known)], tell_instance=tell_instance)

    @precondition(lambda self: self.may_forget and len(self.members) < MOST)
    @rule(n=pick)
    def join_without_replay(self, n: int) -> None:
        known = self.member(n)
        peer = self.net.add_peer(config=OverlayConfig(replay=False))
        self.restarted.add(peer)
        self.net.discover(peer, known)

    @precondition(lambda self: len(self.members) > 2)
    @rule(n=pick, gracefully=st.booleans())
    def go(self, n: int, gracefully: bool) -> None:
        (self.net.leave if gracefully else self.net.crash)(self.member(n))

    @precondition(lambda self: len(self.members) > 2)
    @rule(n=pick, m=pick)
    def restart(self, n: int, m: int) -> None:
        old = self.member(n)
        if old in self.restarted:
            return
        new = come_back(self.net, old, epoch=2)
        self.restarted.add(new)
        self.net.discover(new, self.member(m))

    @rule(n=pick, count=st.integers(1, 4), size=st.sampled_from([5, 5, 5, 20_000]))
    def publish(self, n: int, count: int, size: int) -> None:
        peer = self.member(n)
        self.messages += count
        payloads = [b"%d %d " % (self.messages, k) + bytes(size) for k in range(count)]
        self.net.publish(peer, *payloads)
        self.published.setdefault(peer, []).extend(payloads)

    @rule(n=pick)
    def cut(self, n: int) -> None:
        peer = self.member(n)
        for other in list(peer.overlay.neighbors)[: 1 + n % 3]:
            self.net.cut(peer, self.net.find(other))

    @rule(n=pick, m=pick)
    def discover(self, n: int, m: int) -> None:
        self.net.discover(self.member(n), self.member(m))

    @rule(
        loss=st.sampled_from([0.0, 0.0, 0.1, 0.5]),
        duplication=st.sampled_from([0.0, 0.0, 0.1]),
        reordering=st.sampled_from([False, False, True]),
    )
    def weather(self, loss: float, duplication: float, reordering: bool) -> None:
        self.net.loss, self.net.duplication, self.net.reordering = loss, duplication, reordering
        self.lossy = self.lossy or bool(loss or duplication or reordering)

    @rule(n=pick, frames=st.integers(1, 30))
    def attack(self, n: int, frames: int) -> None:
        if self.puppet is None:
            self.puppet = Puppet(self.net)
        fiend = Fiend(random.Random(n), self.net, self.members, self.puppet)
        victim = self.member(n)
        if victim.overlay.link(self.puppet.peer.id) is None:
            self.net.cut(victim, self.puppet.peer)
            self.puppet.connect(victim)
        for _ in range(frames):
            self.puppet.send(victim, fiend.frame())
            self.net.run(0.001)

    @rule(n=pick, which=pick, congested=st.booleans())
    def lag(self, n: int, which: int, congested: bool) -> None:
        """A neighbour's queue does not drain, or does so again."""
        peer = self.member(n)
        neighbors = list(peer.overlay.neighbors)
        if neighbors:
            other = neighbors[which % len(neighbors)]
            self.net.feed(peer, Congested(other) if congested else Drained(other))

    @rule(seconds=st.sampled_from([0.01, 0.1, 1.0, 5.0]))
    def wait(self, seconds: float) -> None:
        self.net.run(seconds)

    @invariant()
    def nothing_grows_nor_repeats(self) -> None:
        for peer in self.members if hasattr(self, "net") else ():
            membership = peer.overlay.membership
            assert len(membership.active) <= membership.config.active_most
            assert len(membership.passive) <= membership.config.passive_size
            assert not repeated(peer)
            assert not disordered(peer)

    def teardown(self) -> None:
        if hasattr(self, "net"):
            self.come_to_rest()
            self.check()

    def come_to_rest(self) -> None:
        net = self.net
        net.run(1.0)  # who is leaving has left
        net.loss = net.duplication = 0.0
        net.reordering = False
        if self.puppet is not None:
            net.crash(self.puppet.peer)
        if self.lossy:  # what was lost on a link that promises not to lose stays unknown to its ends: new links
            for one in self.members:
                for other in self.members:
                    net.cut(one, other)
        self.publish(0, 1, 5)  # halves that know the same have no reason to become one
        for n, peer in enumerate(self.members):  # sources go on finding
            for other in self.members[:n]:
                net.discover(peer, other)
        net.run(90.0)

    def held(self, authors: set[bytes]) -> set[tuple[bytes, bytes]]:
        """(author, payload) of all bodies that members hold."""
        records = [record for peer in self.members for record in peer.overlay.log.records()]
        envelopes = [record.envelope for record in records if record.envelope is not None and record.envelope.author in authors]
        return {(envelope.author, payload) for envelope in envelopes for payload in envelope.payloads}

    def check(self) -> None:
        net, members = self.net, self.members
        assert net.run_until(lambda: not net.asymmetric(), 5.0)
        assert net.graph_is_connected()
        authors = {peer.overlay.author for peer in net.peers if not isinstance(peer.overlay, Puppet)}
        everything = {payload for payloads in self.published.values() for payload in payloads}
        for peer in net.peers:
            assert len(peer.overlay.neighbors) <= 9
            assert not repeated(peer)
            assert not disordered(peer)
            honest = [each.envelope for each in peer.delivered if each.envelope.author in authors]
            assert {payload for envelope in honest for payload in envelope.payloads} <= everything
            assert peer.overlay.author not in {envelope.author for envelope in honest}
            assert not any(each.author in authors for each in peer.equivocations)
            if not self.lossy:
                assert all(self.puppet is not None and close.peer == self.puppet.peer.id for close in peer.closed)
        for peer in set(members) - self.restarted:
            for author in members:
                if author is not peer and author not in self.restarted:
                    missing = set(self.published.get(author, [])) - set(peer.messages)
                    assert not missing, (author.index, peer.index)
            # Of those that are gone, too, what anybody has.
            missing = {payload for author, payload in self.held(authors) if author != peer.overlay.author} - set(peer.messages)
            assert not missing, peer.index
        if self.puppet is None:
            assert net.run_until(lambda: len(digests(members)) == 1, 60.0)
            for peer in members:
                if peer.overlay.published and not self.lossy:
                    assert peer.progress is not None
                    assert net.run_until(lambda: peer.progress.by_all == peer.overlay.published, 30.0)  # noqa: B023


SwarmMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
TestSwarm = SwarmMachine.TestCase
