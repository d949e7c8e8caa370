"""A simulated source of discovery: it answers late, partially, and knows of the dead for a while, as DHTs do."""

from solyd_swarm.simulation.network import Network
from solyd_swarm.simulation.peer import Peer


class Directory:
    """Who else is interested. Every peer asks again and again; each answer is a random few of those it knows.

    Args:
        period: seconds between two questions of one peer, give or take a half.
        delay: seconds until an answer comes, (least, most).
        sample: peers named in one answer.
        share: share of the peers that the directory knows at all (0 to 1).
        memory: seconds for which it goes on naming one that has died.
    """

    def __init__(
        self,
        net: Network,
        *,
        period: float = 20.0,
        delay: tuple[float, float] = (0.5, 3.0),
        sample: int = 4,
        share: float = 1.0,
        memory: float = 60.0,
    ) -> None:
        self.net = net
        self._period = period
        self._delay = delay
        self._sample = sample
        self._share = share
        self._memory = memory
        self._known: list[Peer] = []
        self._next_clean = 0.0
        self.closed = False
        """Whether it answers nobody any more."""

    def enlist(self, peer: Peer) -> None:
        """The peer announces itself, and asks from now on."""
        if self.net.rng.random() < self._share:
            self._known.append(peer)
        self.net.after(self._period * self.net.rng.random(), self._ask, peer)

    def _ask(self, peer: Peer) -> None:
        net = self.net
        if not peer.alive or self.closed:
            return
        if net.now >= self._next_clean:
            self._next_clean = net.now + self._memory / 6
            self._known = [other for other in self._known if other.died is None or other.died + self._memory > net.now]
        # An answer does not cross a partition: each part of the network has its own part of the directory.
        reachable = [other for other in net.rng.sample(self._known, min(4 * self._sample, len(self._known))) if other is not peer]
        if net.partitioned:
            reachable = [other for other in reachable if other.zone == peer.zone]
        for other in reachable[: self._sample]:
            net.after(net.rng.uniform(*self._delay), net.discover, peer, other)
        net.after(self._period * (0.5 + net.rng.random()), self._ask, peer)
