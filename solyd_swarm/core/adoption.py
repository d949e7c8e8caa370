"""Adoption: whoever got messages by way of a neighbour that has stopped reading gets a link to whoever is before it instead.

In a random graph of five links each, most of those two hops from an author have one neighbour that is one hop from it. Without that
one every way left is a hop longer, whatever grafts and swaps do: only links that are not there yet help. So neighbours tell one another
their other neighbours, and whoever has a queue that does not drain offers those behind it a place beside the others.
"""

from math import inf

from solyd_swarm.core.events import Action, Send
from solyd_swarm.core.link import Link
from solyd_swarm.core.membership import Membership
from solyd_swarm.core.wire import Neighbor, PeerInfo, View, encode

TELL_PAUSE = 2.0
"""Seconds from a change of the active view to telling it: while a swarm forms views change by the second, and a neighbour counts as
slow after a second at the earliest."""
ASK_PAUSE = 30.0
"""Seconds until those behind one slow neighbour are asked again: bounds one that lags now and then so that we dial whom it makes up.
Not one that leaves and joins in between."""
SHED_PAUSE = 30.0
"""Seconds from a change of the active view until a place more than usual is given up: by then a slow neighbour has been dropped, or
reads again, and the tree has settled which links it uses."""


class Adoption:
    """What neighbours have told of theirs. It appends what is to be done to `out`."""

    def __init__(self, membership: Membership, out: list[Action]) -> None:
        self._membership = membership
        self._out = out
        self._told: dict[bytes, bytes] = {}  # neighbour -> the last View sent to it
        # Neighbour -> its others, no more than it may have: bounds one that makes up many.
        self._heard: dict[bytes, list[PeerInfo]] = {}
        self._asked: dict[bytes, float] = {}  # slow neighbour -> when those behind it were asked
        self._tell_at = inf
        self._shed_at = inf

    def changed(self, now: float) -> None:
        """The active view has changed."""
        self._tell_at = min(self._tell_at, now + TELL_PAUSE)
        self._shed_at = now + SHED_PAUSE

    def neighbor_down(self, peer: bytes) -> None:
        """What it told of its neighbours, and was told of ours, is void."""
        self._told.pop(peer, None)
        self._heard.pop(peer, None)
        self._asked.pop(peer, None)

    def heard(self, link: Link, frame: View) -> None:
        """A neighbour tells its others."""
        if link.up:
            self._heard[link.peer] = frame.peers[: self._membership.config.active_most]

    def asked(self, link: Link, frame: Neighbor) -> bool:
        """A peer offers to be before us, instead of a neighbour of both. Whether we accept: whoever is no neighbour of that one has no
        business here."""
        others = self._heard.get(frame.instead, ())
        return any(info.instance == link.peer for info in others) and self._membership.take_in(link)

    def congested(self, slow: Link, now: float) -> None:
        """This neighbour has stopped reading, as it seems."""
        active, others = self._membership.active, self._heard.get(slow.peer)
        # Where most do not drain our own line is slow, and more links would make it slower.
        line_is_slow = 2 * sum(link.congested for link in active.values()) > len(active)
        if not slow.up or not others or line_is_slow or self._asked.get(slow.peer, -inf) + ASK_PAUSE > now:
            return
        self._asked[slow.peer] = now
        for info in others:
            self._membership.adopt(info, slow.peer, now)

    def tick(self, now: float) -> float:
        """Tells neighbours of a change, and gives up a place too many, when due; returns when to come back."""
        if self._tell_at <= now:
            self._tell_at = inf
            self._tell()
        if self._shed_at <= now:
            self._shed_at = now + SHED_PAUSE if self._membership.shed() else inf
        return min(self._tell_at, self._shed_at)

    def _tell(self) -> None:
        for peer in self._membership.active:
            data = encode(View(self._membership.views.others(peer)))
            if data != self._told.get(peer):
                self._told[peer] = data
                self._out.append(Send(peer, data))
