"""Plumtree: eager push along a tree, lazy announcements on all other links, grafts where the tree has failed.

Leitao, Pereira, Rodrigues: Epidemic Broadcast Trees, SRDS 2007, section 3; the names are the paper's.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from heapq import heappop, heappush

from solyd_swarm.core.doubts import DIVIDED_AGE, Doubts
from solyd_swarm.core.events import Action, Send
from solyd_swarm.core.lateness import Lateness, Pause
from solyd_swarm.core.link import SERVED_BYTES, Link
from solyd_swarm.core.log import Log, Record
from solyd_swarm.core.ways import Ways
from solyd_swarm.core.wire import MAX_BATCH, Frame, Gossip, Graft, Have, Ihave, Prune, encode
from solyd_swarm.errors import RemoteProtocolError

MAX_MISSING = 65_536
"""Announced envelopes that are waited for: bounds a peer that announces what does not exist. Further announcements are left
to anti-entropy."""
MAX_ANNOUNCERS = 8
GAINS = 16
"""Announcements over which it is averaged how much shorter another branch would be."""
PRUNE_PAUSE = 1.0
"""Seconds before a Prune is repeated to a peer that goes on pushing: a crossing Graft may have undone it at the other end."""


@dataclass(frozen=True, slots=True)
class BroadcastConfig:
    """Times in seconds."""

    # Announcements are gathered this long: one frame for many, at little cost, since the tree is faster anyway.
    lazy_interval: float = 0.02
    # How long an announced envelope may take on the tree before it is grafted: twice the most that the tree lagged behind
    # announcements lately, within these bounds; until it has lagged once, the first, or what GRAFT_HOPS of that link would take. A
    # graft too early costs more than a body: which of the two copies is first then is chance, and by it a tree that serves many
    # senders drifts to a random one (1,000 peers, 10 senders: last delivery hop 34 instead of 15 after five minutes).
    graft_timeout: float = 0.1
    graft_timeout_min: float = 0.025
    graft_timeout_max: float = 1.0
    # How long a grafted envelope may take before the next announcer is asked: the round trip of the link (mean + 4 deviations),
    # within these bounds; once all were asked three times, twice as long each time. Until there is a round trip, the first.
    graft_retry: float = 0.1
    graft_retry_min: float = 0.02
    graft_retry_max: float = 1.0
    # Each announcer is asked so often, since frames may be lost; after that it is up to anti-entropy.
    graft_tries: int = 6
    # While more than this share of the latest envelopes had to be grafted (one of 64 is less), no link is pruned: where frames are
    # lost, one link to each peer is not enough, and a second copy costs less than asking for the first.
    redundancy_threshold: float = 0.02
    # Plumtree section 3.8: a branch of the tree is swapped for one that is so many hops shorter, here on average over the latest
    # announcements, of whatever senders. The paper looks at one message and needs 7; with the average 3 gives the shortest trees
    # (1,000 peers, 100 senders in turn: mean last delivery hop 11; by single messages 16 with 7, and 31 with 3).
    optimization_threshold: int = 3
    # One tree serves all senders: what is shorter for one may be longer for another. So each swap is followed by a pause, doubled
    # each time until a neighbour comes or goes, and the tree comes to rest. The same holds for flooding anew.
    optimization_pause: float = 0.5
    optimization_pause_max: float = 60.0


class _Missing:
    """An envelope that was announced and has not come.

    Attributes:
        tries: goes through the announcers again and again.
        asked: who was, and whether that link was eager before.
    """

    __slots__ = ("announcers", "asked", "due", "heard_at", "tries")

    def __init__(self, now: float, due: float) -> None:
        self.announcers: list[tuple[bytes, int]] = []
        self.heard_at = now
        self.due = due
        self.tries = 0
        self.asked: dict[bytes, bool] = {}

    def is_of_the_tree(self, record: Record) -> bool:
        """Whether it was to come over the tree. What was caught up on elsewhere is only announced, and is of age by then."""
        return self.heard_at - record.born < DIVIDED_AGE


class Broadcast:
    """The tree of one topic. It appends what is to be done to `out`.

    Args:
        active: the active view: every link in it is either eager or lazy.
        author, epoch: what marks an envelope as our own: those are numbered on each link, to be acknowledged.
    """

    def __init__(
        self,
        active: dict[bytes, Link],
        log: Log,
        out: list[Action],
        author: bytes,
        epoch: Callable[[], int],
        config: BroadcastConfig,
        doubts: Doubts,
    ) -> None:
        self.config = config
        self._active = active
        self._log = log
        self._out = out
        self._author = author
        self._epoch = epoch
        self._doubts = doubts
        self._missing: dict[bytes, _Missing] = {}
        self._lazy: dict[bytes, list[tuple[bytes, int]]] = {}  # peer -> (id, hops) to be announced
        self._lazy_due: float | None = None
        self._due: list[tuple[float, bytes]] = []  # a heap; entries of what has come, or is due later, are stale
        self._lateness = Lateness(config.graft_timeout, config.graft_timeout_min, config.graft_timeout_max)
        self.swaps = 0
        """Branches of the tree that were swapped for shorter ones."""
        self.ways = Ways(active, self._lateness, out, config.optimization_pause, config.optimization_pause_max)
        self._swap_pause = Pause(config.optimization_pause, config.optimization_pause_max)
        self._grafted_share = 0.0  # of the latest envelopes, those that had to be grafted

    def neighbor_up(self, link: Link, now: float) -> None:
        self._neighbors_changed()
        link.eager, link.eager_since = True, now
        link.congested = False

    def neighbor_down(self, link: Link) -> None:
        self._neighbors_changed()
        self._lazy.pop(link.peer, None)

    def _neighbors_changed(self) -> None:
        self._swap_pause.reset()
        self.ways.neighbors_changed()

    # -- sending ----------------------------------------------------------------------------------------------

    def push(self, record: Record, now: float, without: bytes = b"", *, lazily: bool = False, unneeded: Collection[bytes] = ()) -> None:
        """Passes an envelope on to all neighbours but the one it came from: eagerly where the link is, unless told `lazily`.

        Args:
            unneeded: neighbours that have it, or get it otherwise; to them it is announced.
        """
        envelope = record.envelope
        assert envelope is not None
        data = b""
        own_first = self._own_first(record)
        for peer, link in self._active.items():
            if peer == without:
                continue
            if own_first:
                link.note_own(own_first)  # from now on, also where it is announced a moment later
            if link.eager and not lazily and not link.congested and peer not in unneeded:
                data = data or self._gossip(record, now)
                link.note_sent(own_first)
                self._out.append(Send(peer, data))
            else:
                self._lazy.setdefault(peer, []).append((record.id, record.hops))
                if self._lazy_due is None:
                    self._lazy_due = now + self.config.lazy_interval

    def _gossip(self, record: Record, now: float) -> bytes:
        envelope = record.envelope
        assert envelope is not None
        return encode(Gossip(self._log.age_ms(record, now), record.hops, envelope.body, envelope.signature))

    def flush_own(self, now: float, also: Collection[bytes] = ()) -> None:
        """We leave: what was to be announced of our own, and of these, is pushed, for nobody could ask us for it any more."""
        for peer, queue in self._lazy.items():
            for id, _ in queue if peer in self._active else ():
                record = self._log.get(id)
                if record is not None and record.envelope is not None and (id in also or self._own_first(record)):
                    self._out.append(Send(peer, self._gossip(record, now)))
        self._lazy.clear()

    def _own_first(self, record: Record) -> int:
        envelope = record.envelope
        own = envelope is not None and envelope.author == self._author and envelope.epoch == self._epoch()
        return envelope.first if own and envelope is not None else 0

    def _announce(self) -> None:
        self._lazy_due = None
        for peer, queue in self._lazy.items():
            link = self._active.get(peer)
            for start in range(0, len(queue) if link else 0, MAX_BATCH):
                part = queue[start : start + MAX_BATCH]
                for id, _ in part:
                    record = self._log.get(id)
                    assert link is not None
                    link.note_sent(self._own_first(record) if record else 0)
                self._send(peer, Ihave([id for id, _ in part], [hops for _, hops in part]))
        self._lazy.clear()

    # -- receiving --------------------------------------------------------------------------------------------

    def accepted(self, link: Link, record: Record, now: float) -> Collection[bytes]:
        """An envelope came by Gossip and is new: this link is a good one, unless another is much shorter.

        Returns:
            The neighbours to whom it need not be pushed.
        """
        missing = self._missing.pop(record.id, None)
        jumped = self._note_lag(link, record, missing, now)
        if link.up:
            record.via, record.heard_at = link.peer, now
            if not link.congested:
                link.make_eager(now)
        announcers = [peer for peer, _ in missing.announcers] if missing else []
        asked = missing.asked if missing else {}
        may_race = link.up and not self.is_failing
        lazy = self.ways.reflood(link, record.id, now) if jumped and may_race else None
        self.ways.came(link, now, in_time=not jumped and link.peer not in asked, may_race=may_race and lazy is None)
        if lazy is not None:
            return lazy.union(announcers)
        if not link.up:
            return announcers
        if asked or jumped:
            # It had to be grafted: which copy came first is chance. Only a link that had to serve for it alone goes back to what it was.
            for peer, other in self._active.items():
                if other is not link and asked.get(peer, True):
                    other.spare(record.id)
        for peer, hops in missing.announcers if missing else ():
            shorter = self._active.get(peer)
            if shorter is not None and self._optimize(shorter, hops, record, now):
                break
        return announcers

    def _note_lag(self, link: Link, record: Record, missing: _Missing | None, now: float) -> bool:
        """How late the tree was; returns whether it has suddenly become so."""
        was_asked = missing is not None and link.peer in missing.asked
        if not was_asked:
            self._note_failure(False)
        elif missing is not None and missing.is_of_the_tree(record):
            self._note_failure(True)
        lag = 0.0 if missing is None else now - missing.heard_at
        jumped = self._has_jumped(record, lag, now)
        if missing is not None and not was_asked and not jumped:
            self._lateness.sample(lag)
        return jumped

    def _has_jumped(self, record: Record, lag: float, now: float) -> bool:
        assert record.envelope is not None
        age = now - record.born
        return age - lag < DIVIDED_AGE and self._lateness.has_jumped(record.envelope.author, lag, age)

    def _optimize(self, other: Link, hops: int, record: Record, now: float) -> bool:
        """Makes the link of an announcer a branch of the tree, instead of the one that brought the envelope, if it is much shorter."""
        link = self._active.get(record.via)
        if other.eager or other.congested or link is None or not link.eager or link is other:
            return False
        # Fewer hops are none the better if they take longer. Announcements wait, so those that came a little later were not slower.
        is_slower = now - record.heard_at > self.config.lazy_interval
        gain = 0 if is_slower else record.hops - (hops + 1)
        other.gain += (gain - other.gain) / GAINS
        if min(gain, other.gain) < self.config.optimization_threshold or self.is_failing or not self._swap_pause.is_over(now):
            return False
        other.gain = link.gain = 0.0
        self.swaps += 1
        self._swap_pause.begin(now)
        other.make_eager(now)
        link.eager = False
        self._send(other.peer, Graft([]))
        self._send(link.peer, Prune())
        return True

    @property
    def is_failing(self) -> bool:
        """Whether the tree often fails to bring envelopes in time: frames get lost."""
        return self._grafted_share > self.config.redundancy_threshold

    def _note_failure(self, failed: bool) -> None:
        """Whether the tree has failed to bring an envelope in time; the latest 64 or so count."""
        self._grafted_share += (failed - self._grafted_share) / 64

    def duplicate(self, link: Link, id: bytes, now: float) -> None:
        """An envelope came by Gossip that was here already: the link is none of the tree's, unless this one is to say nothing."""
        record = self._log.get(id)
        # What was here before the link became eager was not pushed over it: its copy cannot tell who is faster.
        is_older = record is not None and (record.heard_at or record.born) < link.eager_since
        if is_older or self.is_failing or link.is_spared(id):
            return
        if link.up and (link.eager or now - link.pruned_at >= PRUNE_PAUSE):
            link.eager = False
            link.pruned_at = now
            self._send(link.peer, Prune())

    def is_announced(self, id: bytes) -> bool:
        """Whether a neighbour has announced an envelope that has not come."""
        missing = self._missing.get(id)
        return missing is not None and any(peer in self._active for peer, _ in missing.announcers)

    def fetched(self, id: bytes, now: float) -> None:
        """An envelope came by anti-entropy."""
        missing, record = self._missing.pop(id, None), self._log.get(id)
        if missing is None or record is None or record.envelope is None or not missing.is_of_the_tree(record):
            return
        if missing.asked:
            self._note_failure(True)
        jumped = self._has_jumped(record, now - missing.heard_at, now)
        if jumped and not self.is_failing:
            self.ways.reflood(None, id, now)

    def handle(self, link: Link, frame: Frame, now: float) -> None:
        """One broadcast frame of a neighbour, but for Gossip."""
        match frame:
            case Ihave():
                self._announced(link, frame, now)
            case Graft():
                self._grafted(link, frame, now)
            case Prune():
                link.eager = False

    def _announced(self, link: Link, frame: Ihave, now: float) -> None:
        if len(frame.ids) != len(frame.hops):
            raise RemoteProtocolError("an announcement with more ids than hops, or fewer")
        for id, hops in zip(frame.ids, frame.hops, strict=True):
            held = self._log.witnessed(id)
            link.note_received(id, held, matters=self._log.may_be_by(id, link.author))
            if held:
                record = self._log.get(id)
                if self._doubts and link.up and self._doubts.told(id) and record is not None and record.envelope is not None:
                    self.push(record, now, without=link.peer, lazily=True)
                if record is not None and record.via and link.up:
                    self._optimize(link, hops, record, now)
                continue
            missing = self._missing.get(id)
            due = now + self._graft_timeout(link)
            if missing is None:
                if len(self._missing) >= MAX_MISSING:
                    continue
                missing = self._missing[id] = _Missing(now, due)
                heappush(self._due, (due, id))
            elif due < missing.due and not missing.asked:  # who is slow to answer must not keep a quicker one waiting
                missing.due = due
                heappush(self._due, (due, id))
            # Once each: who announces without end must not take the places of those who have it.
            if len(missing.announcers) < MAX_ANNOUNCERS and all(peer != link.peer for peer, _ in missing.announcers):
                missing.announcers.append((link.peer, hops))

    def _grafted(self, link: Link, frame: Graft, now: float) -> None:
        if link.up and not link.congested:
            link.make_eager(now)
        later: list[bytes] = []
        for id in frame.ids:
            record = self._log.get(id)
            if record is None or record.envelope is None:
                continue
            if link.served >= SERVED_BYTES:
                later.append(id)
                continue
            link.served += record.envelope.size
            link.note_sent(self._own_first(record))
            self._out.append(Send(link.peer, self._gossip(record, now)))
        if later:
            for id in later:
                record = self._log.get(id)
                link.note_sent(self._own_first(record) if record else 0)
            self._send(link.peer, Have(later))

    def _graft(self, now: float) -> None:
        """Asks the announcers of what the tree has failed to bring."""
        wanted: dict[bytes, list[bytes]] = {}
        while self._due and self._due[0][0] <= now:
            due, id = heappop(self._due)
            missing = self._missing.get(id)
            if missing is None or missing.due != due:
                continue
            link = None if self._log.witnessed(id) else self._next_announcer(missing)
            if link is None:
                del self._missing[id]
                continue
            wanted.setdefault(link.peer, []).append(id)
            missing.asked.setdefault(link.peer, link.eager)
            missing.due = now + self._graft_retry(link) * 2 ** max(0, (missing.tries - 1) // len(missing.announcers) - 2)
            heappush(self._due, (missing.due, id))
        for peer, ids in wanted.items():
            self._active[peer].make_eager(now)
            for start in range(0, len(ids), MAX_BATCH):
                self._send(peer, Graft(ids[start : start + MAX_BATCH]))

    def _next_announcer(self, missing: _Missing) -> Link | None:
        while missing.tries < self.config.graft_tries * len(missing.announcers):
            peer, _ = missing.announcers[missing.tries % len(missing.announcers)]
            missing.tries += 1
            if peer in self._active:
                return self._active[peer]
        return None

    def _graft_timeout(self, link: Link) -> float:
        return self._lateness.timeout(link.round_trip.smoothed, failing=self.is_failing)

    def _graft_retry(self, link: Link) -> float:
        config = self.config
        return link.round_trip.timeout(config.graft_retry, config.graft_retry_min, config.graft_retry_max)

    # -- time -------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> float | None:
        """Announces and grafts when due; returns when to come back, if at all."""
        if self._lazy_due is not None and self._lazy_due <= now:
            self._announce()
        due = self._due
        if due and due[0][0] <= now:
            self._graft(now)
        while due and ((missing := self._missing.get(due[0][1])) is None or missing.due != due[0][0]):
            heappop(due)
        if not due:
            return self._lazy_due
        return due[0][0] if self._lazy_due is None else min(self._lazy_due, due[0][0])

    def _send(self, peer: bytes, frame: Frame) -> None:
        self._out.append(Send(peer, encode(frame)))
