"""The two views of HyParView (DSN 2007, section 4), and what others are told of them."""

import random
from collections.abc import Callable, Iterable

from solyd_swarm.core.link import Link
from solyd_swarm.core.wire import MAX_PEERS, PeerInfo


class Views:
    """Who our neighbours are, and whom we know besides.

    Args:
        me: our own entry, as others shall hear it.
        links: the links of this topic, by peer; owned by the overlay.
        passive_size: how many the passive view holds at most.
    """

    def __init__(self, me: PeerInfo, links: dict[bytes, Link], rng: random.Random, passive_size: int) -> None:
        self.me = me
        self.tells: Callable[[PeerInfo, bytes], PeerInfo] | None = None
        """What of a peer's addresses another one (by instance key) is told; None: all."""
        self.active: dict[bytes, Link] = {}
        self.passive: dict[bytes, tuple[PeerInfo, bytes]] = {}  # with who told us (empty: a source, or the peer itself)
        self._links = links
        self._rng = rng
        self._passive_size = passive_size

    @property
    def lazy(self) -> list[Link]:
        """The neighbours whose links are no branches of the broadcast tree."""
        return [link for link in self.active.values() if not link.eager]

    # -- what we are told -------------------------------------------------------------------------------------

    def learn(self, peers: Iterable[PeerInfo], via: bytes) -> None:
        """A peer tells of others."""
        for info in peers:
            self.remember(info, via)

    def remember(self, info: PeerInfo, via: bytes) -> None:
        """Adds to the passive view. `via`: who told us (empty: a source, or the peer itself)."""
        if info.instance in self.active or info.instance == self.me.instance:
            return
        if not info.addresses and info.instance not in self._links:
            return
        known = self.passive.get(info.instance)
        if known is not None and via and known[1] != via:
            return  # nobody's hearsay replaces the addresses that another, or the peer itself, told us
        self.passive[info.instance] = (info, via)
        # Bounds a peer that floods us with made-up entries: one of its own goes once it has half of the view, else a random one.
        told = [instance for instance, (_, teller) in self.passive.items() if via and teller == via]
        if 2 * len(told) > self._passive_size:
            del self.passive[self._rng.choice(told)]
        while len(self.passive) > self._passive_size:
            del self.passive[self._rng.choice(list(self.passive))]

    # -- what we tell -----------------------------------------------------------------------------------------

    def sample(self, size: int, without: bytes) -> list[PeerInfo]:
        """So many of both views, at random, but not this peer."""
        known = [link.info for link in self.active.values()] + [info for info, _ in self.passive.values()]
        usable = [info for info in known if info.instance != without and info.addresses]
        return self._rng.sample(usable, min(size, len(usable)))

    def known(self, info: PeerInfo, peer: bytes) -> PeerInfo:
        """An entry as this peer is told it: perhaps without addresses."""
        return info if self.tells is None else self.tells(info, peer)

    def told(self, infos: list[PeerInfo], peer: bytes) -> list[PeerInfo]:
        """What of these a neighbour is told."""
        if self.tells is None:
            return infos
        told = [self.tells(info, peer) for info in infos]
        return [info for info in told if info.addresses]

    def others(self, peer: bytes) -> list[PeerInfo]:
        """Our neighbours but this one, as it is told of them."""
        return [self.known(link.info, peer) for link in self.active.values() if link.peer != peer][:MAX_PEERS]
