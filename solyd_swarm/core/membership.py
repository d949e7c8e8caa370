"""HyParView: a small active view of neighbours, a larger passive view to replace them from.

Leitao, Pereira, Rodrigues: HyParView, DSN 2007, section 4; the names are the paper's. Three things differ, because joins
here come in bursts and views are tiny: a peer that already has neighbours asks for a place instead of pushing someone out
(only Join and high priority do that, and who has few and is refused everywhere asks with high priority, too); whoever is pushed
out or refused is told of others to turn to; and free places in the active view are filled from the passive view, not only those
of failed neighbours.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from solyd_swarm.core.events import Action, Addresses, Dial, NeighborDown, NeighborUp, Send
from solyd_swarm.core.link import Link
from solyd_swarm.core.views import Views
from solyd_swarm.core.wire import (
    MAX_PEERS,
    Disconnect,
    ForwardJoin,
    Frame,
    Join,
    Neighbor,
    NeighborReply,
    PeerInfo,
    Shuffle,
    ShuffleReply,
    encode,
    make_peer_info,
)

MAX_SHUFFLE_ROUTES = 256
"""Walks whose way back is remembered: bounds a flood of shuffles; the oldest route is forgotten."""

MAX_RESTS = 256
"""Peers whose links failed lately and that are not dialled again at once: bounds peers that connect and hang up. The oldest go."""


STUCK_PAUSES = 8
"""The pause between two tries to fill the active view has doubled three times: for some seven intervals nobody had room."""


@dataclass(frozen=True, slots=True)
class MembershipConfig:
    """The figures that the paper evaluates with, but for the passive view; for up to some 10,000 peers. Times in seconds."""

    active_size: int = 5
    # The paper's 30 is too few for the deaths of 95 %. Where a share s survives, and who knows or is known counts, a survivor hangs
    # together with c = s (active + 2 passive) others, and the largest part holds the share g = 1 - exp(-c g) (Erdos, Renyi 1960):
    # 0.955 with 30, 0.985 with 40. As senders may be cut off, too, g squared of what is sent arrives: 0.91 and 0.97.
    passive_size: int = 40
    active_random_walk: int = 6
    passive_random_walk: int = 3
    shuffle_active: int = 3
    shuffle_passive: int = 4
    # The paper counts in cycles. In ten seconds seven of forty entries are exchanged, so that a passive view is renewed in about a
    # minute, about as fast as discovery tells of newcomers; it is most of what an idle swarm sends.
    shuffle_interval: float = 10.0
    # Filling a free place costs a dial at most: often while a swarm forms, when views change by the second; where nobody
    # has room for us the pause doubles up to the longest.
    fill_interval: float = 0.5
    fill_interval_max: float = 30.0
    # Whose link failed is dialled again at once, for networks do hiccup; if it fails again soon, after a pause that doubles.
    redial_pause: float = 0.5
    redial_pause_max: float = 30.0
    # Who goes on as our neighbour after this long has not heard that it is none: what was on its way has come by then.
    part_pause: float = 1.0
    # Trades of a neighbour for someone far away: so many, the pause doubling each time. They come early, since they disturb the
    # broadcast tree, and a well-mixed graph stays so.
    mix_interval: float = 3.0
    mixes: int = 3
    # A dial plus a request, on a slow path; after that the next candidate gets its turn.
    request_timeout: float = 5.0

    @property
    def active_most(self) -> int:
        """The most neighbours there ever are: where one is slow, and all its others are adopted beside ours (`adoption`)."""
        return 2 * self.active_size - 1


class Membership:
    """Active and passive view of one topic. It appends what is to be done to `out`.

    Args:
        me: our own entry, as others shall hear it.
        links: the links of this topic, by peer; owned by the overlay.
        on_up, on_down: told of every change of the active view.
    """

    def __init__(
        self,
        me: PeerInfo,
        links: dict[bytes, Link],
        out: list[Action],
        rng: random.Random,
        config: MembershipConfig,
        on_up: Callable[[Link], None],
        on_down: Callable[[Link], None],
    ) -> None:
        self.config = config
        self.views = Views(me, links, rng, config.passive_size)
        self.active = self.views.active
        self.passive = self.views.passive
        self._links = links
        self._out = out
        self._rng = rng
        self._on_up = on_up
        self._on_down = on_down
        self._requests: dict[bytes, float] = {}  # asked or being dialled for a place, until when
        self._adopting: dict[bytes, bytes] = {}  # those of them that come in addition, instead of which slow neighbour
        self._shuffle_routes: dict[bytes, bytes] = {}  # origin of a walk that we passed on -> where it came from
        self._rests: dict[bytes, tuple[float, float]] = {}  # peer whose link failed -> dialled no sooner than, next pause
        self._next_shuffle = 0.0
        self._next_fill = 0.0
        self._mixing = b""  # dialled for a trade
        self._next_mix: float | None = None
        self._mix_pause = config.mix_interval
        self._mixes = 0
        self._fill_pause = config.fill_interval

    @property
    def has_room(self) -> bool:
        """Whether the active view has a free place."""
        return len(self.active) < self.config.active_size

    @property
    def _is_stuck(self) -> bool:
        """Whether we have few neighbours, and nobody has had room for a while: the few may be all of a part that is cut off.

        Who makes room was full, and so is not stuck afterwards: there are ever fewer that are.
        """
        return 2 * len(self.active) < self.config.active_size and self._fill_pause >= STUCK_PAUSES * self.config.fill_interval

    # -- links ------------------------------------------------------------------------------------------------

    def link_up(self, link: Link, now: float) -> None:
        """A link has come up; who dialled it asks for a place."""
        instead = self._forget_request(link.peer)
        self.passive.pop(link.peer, None)
        if link.initiated or instead:
            high, self._mixing = link.peer == self._mixing, b""
            self.request(link, now, high=high, instead=instead)
        elif self.has_room:
            self.views.remember(link.info, b"")

    def _forget_request(self, peer: bytes) -> bytes:
        """Whom the peer was to be a neighbour instead of, if it was asked for that."""
        self._requests.pop(peer, None)
        return self._adopting.pop(peer, b"")

    def request(self, link: Link, now: float, *, high: bool = False, instead: bytes = b"") -> None:
        """Asks for a place in the peer's active view: by Join where we are alone.

        Args:
            instead: a slow neighbour of both; the place is in addition to what we have.
        """
        if link.peer in self.active or link.peer in self._requests:
            return
        high = high or self._is_stuck
        if instead:
            self._adopting[link.peer] = instead
        elif self.active and not high and len(self.active) + len(self._requests) >= self.config.active_size:
            self.views.remember(link.info, b"")
            return
        self._requests[link.peer] = now + self.config.request_timeout
        self._send(link.peer, Neighbor(high, instead) if self.active else Join())

    def link_down(self, link: Link, reason: str, now: float, *, failed: bool) -> None:
        """A link is gone. `failed`: it may be back; False: the peer left the topic."""
        self._forget_request(link.peer)
        self.passive.pop(link.peer, None)
        self._drop(link, reason)
        if failed and link.info.addresses:
            self.views.remember(link.info, b"")
            self._rest(link.peer, now)
        self._fill(now)

    def _rest(self, peer: bytes, now: float) -> None:
        """A peer whose links fail one after the other, for whatever reason, must not keep us busy dialling."""
        until, pause = self._rests.pop(peer, (now, 0.0))
        if now - until > 2 * self.config.redial_pause_max:
            pause = 0.0  # long ago
        following = min(max(2 * pause, self.config.redial_pause), self.config.redial_pause_max)
        self._rests[peer] = (now + pause, following)
        while len(self._rests) > MAX_RESTS:
            del self._rests[next(iter(self._rests))]

    def dial_failed(self, instance: bytes, now: float) -> None:
        """Nobody there: forget it, try the next."""
        self._forget_request(instance)
        self.passive.pop(instance, None)
        self._fill(now)

    # -- frames -----------------------------------------------------------------------------------------------

    def handle(self, link: Link, frame: Frame, now: float) -> None:
        """One membership frame of a peer."""
        match frame:
            case Join():
                # A Join repeated must not set off walks again and again, nor one after each goodbye.
                is_news = link.peer not in self.active and now >= link.joined_at + self.config.part_pause
                self._accept(link)
                if is_news:
                    link.joined_at = now
                    self._forward_join(link)
            case ForwardJoin() | Shuffle() | ShuffleReply() if not link.up:
                pass  # walks go from neighbour to neighbour; it was one until a moment ago
            case ForwardJoin():
                self._walk_join(link, frame, now)
            case Neighbor():
                self._answer(link, frame)
            case NeighborReply():
                self._replied(link, frame, now)
            case Shuffle():
                self._walk_shuffle(link, frame)
            case ShuffleReply():
                self._shuffle_replied(link, frame)
            case Disconnect():
                self.views.learn(frame.peers, link.peer)
                if link.peer in self.active:
                    self._drop(link, "made room for another neighbour")
                    self.views.remember(link.info, b"")
                self._fill(now, avoid=link.peer)

    def stray(self, link: Link, now: float) -> None:
        """What only neighbours send has come from a peer that is none of ours: it has missed that, and is told once more."""
        if now >= link.parted_at + self.config.part_pause:
            link.parted_at = now
            self._send(link.peer, Disconnect())

    def _accept(self, link: Link, *, beyond: bool = False) -> None:
        self._send(link.peer, NeighborReply(True, self._others(link.peer)))
        self._add(link, beyond=beyond)

    def _forward_join(self, newcomer: Link) -> None:
        if newcomer.info.addresses:
            for peer in self.active:
                if peer != newcomer.peer:
                    self._send(peer, ForwardJoin(self.views.known(newcomer.info, peer), self.config.active_random_walk))

    def _walk_join(self, link: Link, frame: ForwardJoin, now: float) -> None:
        peer = frame.peer.instance
        if peer == self.views.me.instance:
            return
        ttl = min(frame.ttl, self.config.active_random_walk)
        if ttl == 0 or len(self.active) <= 1:
            self._approach(frame.peer, link.peer, now)
            return
        if ttl == self.config.passive_random_walk:
            self.views.remember(frame.peer, link.peer)
        onward = [other for other in self.active if other not in (link.peer, peer)]
        if onward:
            peer = self._rng.choice(onward)
            self._send(peer, ForwardJoin(self.views.known(frame.peer, peer), ttl - 1))
        else:
            self._approach(frame.peer, link.peer, now)

    def _answer(self, link: Link, frame: Neighbor) -> None:
        # Requests that cross are both granted: each side has sent a yes that the other takes at its word.
        if frame.high or link.peer in self.active or link.peer in self._requests or self.has_room:
            self._accept(link, beyond=link.peer in self._adopting)
        else:
            self._send(link.peer, NeighborReply(False, self._others(link.peer)))
            self.views.remember(link.info, b"")

    def _replied(self, link: Link, frame: NeighborReply, now: float) -> None:
        expected = self._requests.pop(link.peer, None) is not None
        if expected or link.up:
            self.views.learn(frame.peers, link.peer)
        beyond = bool(self._forget_request(link.peer))
        if frame.accepted and (expected or link.peer in self.active):
            self._add(link, beyond=beyond)
        elif frame.accepted:
            # We gave up waiting, and it holds us for a neighbour: views stay symmetric.
            self._send(link.peer, Disconnect())
        else:
            # The yes to an earlier request may have crossed the goodbye that took it back: it does not hold us.
            self._drop(link, "has no room")
            self.views.remember(link.info, b"")
            if not self.active:
                self._fill(now, avoid=link.peer)

    def _walk_shuffle(self, link: Link, frame: Shuffle) -> None:
        if frame.origin.instance == self.views.me.instance:
            return
        ttl = min(frame.ttl, self.config.active_random_walk) - 1
        onward = [other for other in self.active if other not in (link.peer, frame.origin.instance)]
        if ttl > 0 and len(self.active) > 1 and onward:
            self._shuffle_routes[frame.origin.instance] = link.peer
            while len(self._shuffle_routes) > MAX_SHUFFLE_ROUTES:
                del self._shuffle_routes[next(iter(self._shuffle_routes))]
            self._send_shuffle(self._rng.choice(onward), frame.origin, ttl, frame.peers)
            return
        answer = self.views.sample(min(len(frame.peers) + 1, MAX_PEERS), frame.origin.instance)
        self._send(link.peer, ShuffleReply(frame.origin.instance, self.views.told(answer, link.peer)))
        self.views.learn([frame.origin, *frame.peers], link.peer)

    def _shuffle_replied(self, link: Link, frame: ShuffleReply) -> None:
        back = self._shuffle_routes.pop(frame.origin, None)
        if frame.origin == self.views.me.instance:
            self.views.learn(frame.peers, link.peer)
        elif back in self.active:
            self._send(back, ShuffleReply(frame.origin, self.views.told(frame.peers, back)))

    # -- views ------------------------------------------------------------------------------------------------

    def _add(self, link: Link, *, beyond: bool = False) -> None:
        self._forget_request(link.peer)
        self.passive.pop(link.peer, None)
        if link.peer in self.active:
            return
        if len(self.active) >= (self.config.active_most if beyond else self.config.active_size):
            # At random, as in the paper, but rather one that is no branch of the broadcast tree.
            self._part(self._rng.choice(self.views.lazy or list(self.active.values())), "made room for another neighbour")
        self.active[link.peer] = link
        self._fill_soon()
        link.up = True
        self._out.append(NeighborUp(link.peer, link.author))
        self._on_up(link)

    def _part(self, link: Link, reason: str) -> None:
        self._send(link.peer, Disconnect(self._others(link.peer)))
        self._drop(link, reason)
        self.views.remember(link.info, b"")

    def _drop(self, link: Link, reason: str) -> None:
        if self.active.pop(link.peer, None) is not None:
            link.up = False
            self._fill_soon()
            self._on_down(link)
            self._out.append(NeighborDown(link.peer, link.author, reason))

    def discovered(self, instance: bytes, addresses: Addresses) -> None:
        """A source found a peer whose instance key it tells."""
        self.views.remember(make_peer_info(instance, addresses), b"")

    def _others(self, peer: bytes) -> list[PeerInfo]:
        return self.views.sample(self.config.shuffle_passive, peer)

    def _approach(self, info: PeerInfo, via: bytes, now: float) -> None:
        """Works towards having this peer as a neighbour: over a link that is there, or by a dial."""
        peer = info.instance
        if peer in self.active or peer in self._requests or peer == self.views.me.instance:
            return
        link = self._links.get(peer)
        if link is not None:
            self.request(link, now)
        elif len(self.active) + len(self._requests) >= self.config.active_size:
            self.views.remember(info, via)  # bounds walks made up to have us dial all the world
        elif (rested := self._rests.get(peer, (now, 0.0))[0]) > now:
            self.views.remember(info, via)
            self._next_fill = min(self._next_fill, rested)
        elif info.addresses:
            self._requests[peer] = now + self.config.request_timeout
            self._out.append(Dial(peer, info.addresses, via))

    def _fill(self, now: float, avoid: bytes = b"") -> None:
        """Fills the free places of the active view from the passive view."""
        free = self.config.active_size - len(self.active) - len(self._requests)
        known = [peer for peer in self.passive if peer not in self._requests and (peer != avoid or len(self.passive) == 1)]
        for peer in self._rng.sample(known, min(max(free, 0), len(known))):
            self._approach(*self.passive[peer], now)

    def _fill_soon(self) -> None:
        """The views change: what was refused a while ago may be granted now."""
        self._fill_pause = self.config.fill_interval
        self._next_fill = 0.0

    # -- adoption -------------------------------------------------------------------------------------------

    def adopt(self, info: PeerInfo, slow: bytes, now: float) -> None:
        """Asks a neighbour of a slow one for a place beside those that we have, while there are not too many."""
        peer = info.instance
        if peer in self.active or peer in self._requests or peer == self.views.me.instance:
            return
        if len(self.active) + len(self._requests) >= self.config.active_most:
            return
        link = self._links.get(peer)
        if link is not None:
            self.request(link, now, instead=slow)
        elif info.addresses and self._rests.get(peer, (now, 0.0))[0] <= now:
            self._adopting[peer] = slow
            self._requests[peer] = now + self.config.request_timeout
            self._out.append(Dial(peer, info.addresses, slow))

    def take_in(self, link: Link) -> bool:
        """Makes a neighbour of a peer that asks as `adopt` does, unless there are too many."""
        if link.peer not in self.active and len(self.active) >= self.config.active_most:
            return False
        self._accept(link, beyond=True)
        return True

    def shed(self) -> bool:
        """Gives up a place above the usual that the tree does not use. Whether more are left above it."""
        lazy = self.views.lazy
        if lazy and len(self.active) > self.config.active_size:
            self._part(self._rng.choice(lazy), "one of more neighbours than needed")
        return len(self.active) > self.config.active_size

    # -- time -------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> float:
        """Shuffles, fills and forgets requests when due; returns when to come back."""
        for peer, until in list(self._requests.items()):
            if until <= now:
                self._forget_request(peer)
        if self._next_fill <= now:
            self._fill(now)
            self._next_fill = now + self._fill_pause * (0.5 + self._rng.random())
            self._fill_pause = min(2 * self._fill_pause, self.config.fill_interval_max)
        if self._next_shuffle <= now:
            self._next_shuffle = now + self.config.shuffle_interval * (0.5 + self._rng.random())
            self._shuffle()
        if self._next_mix is None:
            self._next_mix = now + self._mix_pause * (0.5 + self._rng.random()) if self.config.mixes else inf
        elif self._next_mix <= now:
            self._mixes += 1
            self._mix_pause *= 2
            is_last = self._mixes >= self.config.mixes
            self._next_mix = inf if is_last else now + self._mix_pause * (0.5 + self._rng.random())
            self._mix(now)
        return min(self._next_fill, self._next_shuffle, self._next_mix)

    def _mix(self, now: float) -> None:
        """Trades a neighbour for someone far away.

        Peers that come together find their neighbours among one another, and neighbours of neighbours: long paths, and parts that
        hang by few links. Passive views are shuffled, active ones are not, so a few trades early in a peer's life make up for it.
        """
        if len(self.active) < self.config.active_size or len(self.passive) < 2 * self.config.active_size:
            return
        info, via = self.passive[self._rng.choice(list(self.passive))]
        if info.addresses and info.instance not in self._links and info.instance not in self._requests:
            self._mixing = info.instance
            self._requests[info.instance] = now + self.config.request_timeout
            self._out.append(Dial(info.instance, info.addresses, via))

    def _shuffle(self) -> None:
        if not self.active:
            return
        target = self._rng.choice(list(self.active))
        active = [link.info for link in self.active.values() if link.peer != target and link.info.addresses]
        passive = [info for info, _ in self.passive.values() if info.addresses]
        sample = self._rng.sample(active, min(self.config.shuffle_active, len(active)))
        sample += self._rng.sample(passive, min(self.config.shuffle_passive, len(passive)))
        self._send_shuffle(target, self.views.me, self.config.active_random_walk, sample)

    def _send_shuffle(self, peer: bytes, origin: PeerInfo, ttl: int, infos: list[PeerInfo]) -> None:
        self._send(peer, Shuffle(self.views.known(origin, peer), ttl, self.views.told(infos, peer)))

    def _send(self, peer: bytes, frame: Frame) -> None:
        self._out.append(Send(peer, encode(frame)))
