"""Candidates that sources found, and healing: two halves that formed apart become one swarm.

Each member tries one candidate outside its views now and then (without one, someone of its passive view), compares digests with
it, and keeps it when they differ.
"""

import random
from collections.abc import Callable, Collection

from solyd_swarm.core.doubts import DIVIDED_AGE
from solyd_swarm.core.events import Action, Addresses, Dial, DialFailed, Discovered, LinkUp
from solyd_swarm.core.link import Link
from solyd_swarm.core.membership import Membership

MAX_CANDIDATES = 256
"""Discovered peers outside our views, kept for healing: bounds a poisoned source. A random one goes."""

SEEK_PAUSE = 1.0
"""Seconds until somebody outside the active view is asked for what all neighbours say is gone: members that keep little, or came
without replay, may be all of our neighbours."""
SEEKS = 40
"""So often, as a passive view has entries; then the pause doubles each time, up to the interval of healing: anybody can make ids up."""

ASK_PAUSE = 0.5
"""Seconds between two requests for a place, to a peer of another half."""

Key = bytes | Addresses
"""The instance key, or the addresses where the source does not tell it."""


class Healing:
    """The candidates of one topic. It appends what is to be done to `out`.

    Args:
        interval: seconds between two tries, about.
        patience: seconds that comparing digests may take.
        open_round: starts a digest round.
        lacks: whether bodies are wanted that neighbours say are gone.
        ask: asks a peer for those.
    """

    def __init__(
        self,
        links: dict[bytes, Link],
        membership: Membership,
        out: list[Action],
        rng: random.Random,
        *,
        interval: float,
        patience: float,
        open_round: Callable[[Link, float], None],
        lacks: Callable[[float], bool],
        ask: Callable[[Link, float], None],
    ) -> None:
        self._links = links
        self._membership = membership
        self._out = out
        self._rng = rng
        self._interval = interval
        self._patience = patience
        self._open_round = open_round
        self._lacks = lacks
        self._ask = ask
        self._seeks = 0
        self._sought: set[bytes] = set()  # of the passive view, asked for it
        self._next_seek: float | None = None
        self._candidates: dict[Key, tuple[bytes, Addresses]] = {}
        self._tried: dict[Key, float] = {}  # when those of them that were
        self._dialled: dict[Key, float] = {}  # dials on their way, until when nobody need try again
        self._probes: dict[Key, float] = {}  # those of them that are for healing
        self._comparing: dict[bytes, float] = {}  # links dialled to compare digests only
        self._wanted: dict[bytes, float] = {}  # peers of another half, asked for a place until then
        self._next_ask = 0.0
        self._next: float | None = None

    def uses(self, peer: bytes) -> bool:
        """Whether digests are being compared with this peer, or it is asked for a place."""
        return peer in self._comparing or peer in self._wanted

    # -- candidates -------------------------------------------------------------------------------------------

    def discovered(self, event: Discovered, now: float) -> None:
        """A source found someone: a neighbour at once, while there is room."""
        key = event.instance or event.addresses
        if not event.addresses or event.instance == self._membership.views.me.instance or self._is_linked(event.instance, event.addresses):
            return
        self._candidates[key] = (event.instance, event.addresses)
        while len(self._candidates) > MAX_CANDIDATES:
            del self._candidates[self._rng.choice(list(self._candidates))]
        if event.instance:
            self._membership.discovered(event.instance, event.addresses)
        # Sources repeat themselves: one dial at a time.
        if self._membership.has_room and self._dialled.get(key, now) <= now:
            self._dial(key, event.instance, event.addresses, now)

    def _is_linked(self, instance: bytes, addresses: Addresses) -> bool:
        """Whether the candidate is at the other end of a link; without an instance key the addresses have to tell."""
        if instance:
            return instance in self._links
        linked = (address for link in self._links.values() for address in (*link.info.addresses, *link.dialled))
        return not set(addresses).isdisjoint(linked)

    def _dial(self, key: Key, instance: bytes, addresses: Addresses, now: float, via: bytes = b"") -> None:
        self._dialled = {other: until for other, until in self._dialled.items() if until > now}
        self._dialled[key] = now + self._patience
        self._out.append(Dial(instance, addresses, via))

    def dial_failed(self, event: DialFailed) -> None:
        """Nobody there."""
        for known in (self._candidates, self._probes, self._dialled):
            known.pop(event.instance or event.addresses, None)

    def alone(self, now: float) -> None:
        """The last neighbour has gone: all the members we have a link to, and candidates, that a view has room for are tried at once."""
        linked = [link for link in self._links.values() if not link.up]
        for link in self._rng.sample(linked, min(self._membership.config.active_size, len(linked))):
            self._membership.request(link, now)
        outside = [key for key, candidate in self._candidates.items() if not self._is_linked(*candidate)]
        for key in self._rng.sample(outside, min(self._membership.config.active_size, len(outside))):
            if self._dialled.get(key, now) <= now:
                self._dial(key, *self._candidates[key], now)

    # -- healing ----------------------------------------------------------------------------------------------

    def link_up(self, link: Link, event: LinkUp, now: float) -> bool:
        """A link has come up. True if it is there to compare digests only, which begins now."""
        found = probed = False
        for key in (event.peer, event.dialled):
            found = self._candidates.pop(key, None) is not None or found
            probed = self._probes.pop(key, None) is not None or probed
            self._dialled.pop(key, None)
        if found:
            # Still one, by its own name now: it may refuse us a place, and be of another half all the same.
            self._candidates[event.peer] = (event.peer, link.info.addresses or event.dialled)
        if not probed or not self._membership.active:
            return False
        self._compare(link, now)
        return True

    def _compare(self, link: Link, now: float) -> None:
        self._tried[link.peer] = now
        self._sought.add(link.peer)
        self._comparing[link.peer] = now + self._patience
        self._open_round(link, now)
        self._ask(link, now)

    def link_down(self, peer: bytes) -> None:
        """The link has gone."""
        self._comparing.pop(peer, None)

    def neighbor_up(self, peer: bytes) -> None:
        """The link has become a neighbour's."""
        self._comparing.pop(peer, None)
        self._wanted.pop(peer, None)
        self._candidates.pop(peer, None)

    def settled(self, link: Link, equal: bool, now: float) -> None:
        """A digest round has ended: who knows something else is worth a place, unless that is merely on its way just now."""
        if self._comparing.pop(link.peer, None) is None or equal or link.up:
            return
        if link.divided:
            self._keep(link, now)
        else:
            self._comparing[link.peer] = now + 2 * DIVIDED_AGE  # one of us is in doubt, and may need this link

    def divided(self, peer: bytes, now: float) -> None:
        """What a peer outside the active view gave us, our neighbours never had."""
        link = self._links.get(peer)
        if link is not None and not link.up:
            self._keep(link, now)

    def _keep(self, link: Link, now: float) -> None:
        # Asked for more than once: it may just be about to refuse us an ordinary place. What tells the halves apart may not come again.
        self._wanted[link.peer] = now + self._patience
        self._membership.request(link, now, high=True)

    def _ask_again(self, now: float) -> None:
        if now < self._next_ask:
            return  # a peer that refuses at once must not set the pace
        self._next_ask = now + ASK_PAUSE
        self._wanted = {peer: until for peer, until in self._wanted.items() if until > now and peer in self._links}
        for peer in self._wanted:
            self._membership.request(self._links[peer], now, high=True)

    def tick(self, now: float) -> float:
        """Tries one candidate when due; returns when to come back."""
        if self._next is None:
            self._next = now + self._interval * self._rng.random()
        elif self._next <= now:
            self._next = now + self._interval * (0.75 + self._rng.random() / 2)
            self._comparing = {peer: until for peer, until in self._comparing.items() if until > now}
            self._probes = {key: until for key, until in self._probes.items() if until > now}
            self._try_one(now)
        times = [self._next]
        if self._wanted:
            self._ask_again(now)
            times.append(self._next_ask)
        if self._membership.active and self._lacks(now):
            times.append(self._seek(now))
        else:
            self._next_seek, self._seeks = None, 0
            self._sought.clear()
        return min(times)

    def _seek(self, now: float) -> float:
        if self._next_seek is None:
            self._next_seek = now + SEEK_PAUSE
        elif self._next_seek <= now:
            self._seeks += 1
            if len(self._sought) >= MAX_CANDIDATES:
                self._sought.clear()
            self._next_seek = now + min(SEEK_PAUSE * (1 << min(max(0, self._seeks - SEEKS), 16)), self._interval)
            linked = [link for peer, link in self._links.items() if not link.up and peer not in self._sought]
            if linked:  # somebody who had no place for us
                self._compare(self._rng.choice(linked), now)
            elif any(key not in self._tried for key in self._outside()):
                self._try_one(now)
            else:
                self._try_passive(now, self._sought)
        return self._next_seek

    def _outside(self) -> list[Key]:
        """The candidates that are no neighbours."""
        active = self._membership.active
        return [
            key
            for key, (instance, addresses) in self._candidates.items()
            if instance not in active and (instance or not self._is_linked(instance, addresses))
        ]

    def _try_one(self, now: float) -> None:
        outside = self._outside()
        if not outside:
            self._try_passive(now)
            return
        # Whoever was never tried comes first: it may be of a half that we have not heard of.
        untried = [key for key in outside if key not in self._tried]
        key = self._rng.choice(untried) if untried else min(outside, key=self._tried.__getitem__)
        instance, addresses = self._candidates[key]
        self._tried = {known: at for known, at in self._tried.items() if known in self._candidates}
        self._tried[instance or key] = now
        link = self._links.get(instance)
        if link is not None:
            self._compare(link, now)
        else:
            self._probes[key] = now + self._interval
            self._dial(key, instance, addresses, now)

    def _try_passive(self, now: float, sought: Collection[bytes] = ()) -> None:
        """Nobody discovered is left to try: then someone of the passive view, lest two halves whose views are full part for good."""
        passive = self._membership.passive
        strangers = [peer for peer, (info, _) in passive.items() if peer not in self._links and info.addresses]
        strangers = [peer for peer in strangers if peer not in sought] or strangers
        if strangers:
            info, via = passive[self._rng.choice(strangers)]
            self._probes[info.instance] = now + self._interval
            self._dial(info.instance, info.instance, info.addresses, now, via)
