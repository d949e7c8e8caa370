"""Anti-entropy: digest rounds with neighbours, and pulling what they show to be missing.

One side opens a round with the size and fingerprint of its set. Equal sets end it at once. Otherwise the other side leads
a Negentropy conversation, names what it has more (Have), pulls what it lacks, and says Done when it has been answered.
Rounds run on each new neighbour and periodically: often while traffic flows, seldom while the sets are equal and idle.
"""

import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from solyd_swarm.core.events import Action, Send
from solyd_swarm.core.link import Link
from solyd_swarm.core.log import Log
from solyd_swarm.core.reconcile import Negentropy
from solyd_swarm.core.wire import (
    MAX_BATCH,
    Done,
    Frame,
    Gone,
    Have,
    InSync,
    Proof,
    Pull,
    Reconcile,
    Summary,
    Transfer,
    encode,
)
from solyd_swarm.errors import RemoteProtocolError

MAX_QUEUE = 65_536
"""Ids still to be pulled from one peer: bounds a peer that advertises what nobody has. What does not fit is found again by a
later round."""
MAX_UNKNOWN = 65_536
"""Ids that a peer advertised and then did not know; they are not asked for again for a while. The oldest go first."""
FOLLOWED = -1
"""Stands for a round that the other side led."""
TRANSFER_BYTES = 1024 * 1024
"""Bytes that one Pull may put into a peer's queue; the rest of what it asks for is asked again when these have come."""


@dataclass(frozen=True, slots=True)
class AntiEntropyConfig:
    """Times in seconds."""

    # Rounds run this often while traffic flows, and back off to the longest while the sets are equal and nothing is published.
    digest_interval: float = 1.0
    digest_interval_max: float = 10.0
    # What a periodic round finds missing is mostly on its way on the tree: leave it this long before pulling it.
    pull_grace: float = 0.25
    # A conversation or a pull that makes no progress for this long is given up; the next round starts afresh.
    patience: float = 5.0
    pull_batch: int = 64
    frame_size_limit: int = 60_000
    unknown_ttl: float = 30.0


class _Session:
    """The anti-entropy state of one link."""

    __slots__ = (
        "asked",
        "done_round",
        "done_through",
        "lead_round",
        "lead_through",
        "negentropy",
        "opened",
        "progress_at",
        "queue",
        "settled",
    )

    def __init__(self) -> None:
        self.opened: tuple[int, int, float] | None = None  # our Summary: round, our last sequence then, when
        self.negentropy: Negentropy | None = None  # while we lead a conversation
        self.lead_round = 0
        self.lead_through = 0
        self.done_round: int | None = None  # the round to end, and to say Done for if we led it, once our pulls are answered
        self.done_through = 0
        self.queue: OrderedDict[bytes, float] = OrderedDict()  # to be pulled, from when on
        self.asked: set[bytes] = set()  # pulled, not answered yet
        self.progress_at = 0.0
        self.settled = False  # one round has come to its end: the first one pulls at once, later ones leave time to the tree


class AntiEntropy:
    """Digest rounds of one topic. It appends what is to be done to `out`.

    Args:
        links: all links, active or not (healing compares digests over inactive ones).
        accept_age: seconds of age beyond which we want no body, at the time given.
        published: the last sequence we published.
        on_settled: told when a link's round has ended: (link, whether the sets were equal from the start).
    """

    def __init__(
        self,
        links: dict[bytes, Link],
        active: dict[bytes, Link],
        log: Log,
        out: list[Action],
        rng: random.Random,
        config: AntiEntropyConfig,
        *,
        accept_age: Callable[[float], float],
        published: Callable[[], int],
        own_first: Callable[[bytes], int],
        on_settled: Callable[[Link, bool, float], None],
    ) -> None:
        self.config = config
        self._links = links
        self._active = active
        self._log = log
        self._out = out
        self._rng = rng
        self._accept_age = accept_age
        self._published = published
        self._own_first = own_first
        self._on_settled = on_settled
        self._sessions: dict[bytes, _Session] = {}
        self._pulling: dict[bytes, bytes] = {}  # id -> the peer asked
        self._unknown: OrderedDict[bytes, float] = OrderedDict()
        self._round = 0
        self._interval = config.digest_interval
        self._next_digest: float | None = None

    # -- links ------------------------------------------------------------------------------------------------

    def link_down(self, link: Link) -> None:
        """What this peer owed us is asked of others, who may have it in their queues too."""
        session = self._sessions.pop(link.peer, None)
        if session is not None:
            self._forget_asked(session)

    def open_round(self, link: Link, now: float) -> None:
        """Compares digests with this peer now."""
        session = self._session(link)
        self._round += 1
        session.opened = (self._round, self._published(), now)
        count, fingerprint = self._log.items.summary()
        self._send(link, Summary(self._round, count, fingerprint))

    def traffic(self, now: float) -> bool:
        """Something new came or was published: rounds are due soon again. Whether that changes when to come back."""
        if self._interval <= self.config.digest_interval:
            return False
        self._interval = self.config.digest_interval
        self._next_digest = now + self._interval
        return True

    def is_settled(self, peer: bytes) -> bool:
        """Whether a round with this peer has come to its end."""
        session = self._sessions.get(peer)
        return session is not None and session.settled

    def _session(self, link: Link) -> _Session:
        session = self._sessions.get(link.peer)
        if session is None:
            session = self._sessions[link.peer] = _Session()
        return session

    # -- rounds -----------------------------------------------------------------------------------------------

    def handle(self, link: Link, frame: Frame, now: float) -> None:
        """One anti-entropy frame of a peer, but for Transfer and Proof."""
        match frame:
            case Summary():
                self._summarised(link, frame, now)
            case InSync():
                self._in_sync(link, frame, now)
            case Reconcile():
                self._reconcile(link, frame, now)
            case Have():
                self._offered(link, frame, now)
            case Done():
                self._done(link, frame, now)
            case Pull():
                self._serve(link, frame, now)
            case Gone():
                self._gone(link, frame, now)

    def _summarised(self, link: Link, frame: Summary, now: float) -> None:
        session = self._session(link)
        if (frame.count, frame.fingerprint) == self._log.items.summary():
            self._send(link, InSync(frame.round))
            self._settle(link, session, self._published(), True, now)
            return
        if session.negentropy is not None and now - session.progress_at < self.config.patience:
            return  # we lead a conversation with this peer already
        session.negentropy = Negentropy(self.config.frame_size_limit, items=self._log.items, rng=self._rng)
        session.lead_round, session.lead_through, session.progress_at = frame.round, self._published(), now
        self._send(link, Reconcile(frame.round, True, session.negentropy.initiate()))

    def _in_sync(self, link: Link, frame: InSync, now: float) -> None:
        session = self._session(link)
        if session.opened is not None and session.opened[0] == frame.round:
            through = session.opened[1]
            session.opened = None
            self._settle(link, session, through, True, now)

    def _reconcile(self, link: Link, frame: Reconcile, now: float) -> None:
        session = self._session(link)
        if frame.query:
            reply = Negentropy(self.config.frame_size_limit, items=self._log.items).reconcile(frame.message).reply
            if reply is not None:
                self._send(link, Reconcile(frame.round, False, reply))
            return
        if session.negentropy is None or frame.round != session.lead_round:
            return  # the answer to a conversation that we gave up
        session.progress_at = now
        result = session.negentropy.reconcile(frame.message)
        self._offer(link, result.have)
        self._enqueue(session, result.need, now)
        if result.reply is not None:
            self._send(link, Reconcile(frame.round, True, result.reply))
        else:
            session.negentropy = None
            session.done_round, session.done_through = frame.round, session.lead_through
        self._pull_on(link, session, now)

    def _offer(self, link: Link, have: list[bytes]) -> None:
        for start in range(0, len(have), MAX_BATCH):
            part = have[start : start + MAX_BATCH]
            for id in part:
                link.note_sent(self._own_first(id), owed=True)
            self._send(link, Have(part))

    def _offered(self, link: Link, frame: Have, now: float) -> None:
        session = self._session(link)
        for id in frame.ids:
            link.note_received(id, self._log.holds(id))
            if id in session.asked:
                session.asked.discard(id)
                self._pulling.pop(id, None)
        self._enqueue(session, frame.ids, now)
        self._pull_on(link, session, now)

    def _done(self, link: Link, frame: Done, now: float) -> None:
        session = self._session(link)
        if session.opened is not None and session.opened[0] == frame.round:
            link.synced(session.opened[1])
            session.opened = None
            if session.done_round is None:
                session.done_round, session.done_through = FOLLOWED, -1
                session.progress_at = now
            self._pull_on(link, session, now)

    def _finish(self, link: Link, session: _Session, now: float) -> None:
        """Ends the round once everything pulled has been answered."""
        if session.done_round is None or session.asked or session.queue:
            return
        if session.done_round != FOLLOWED:
            self._send(link, Done(session.done_round))
        session.done_round = None
        self._settle(link, session, session.done_through, False, now)

    def _settle(self, link: Link, session: _Session, through: int, equal: bool, now: float) -> None:
        link.synced(through)
        session.settled = True
        self._on_settled(link, equal, now)

    # -- pulling ----------------------------------------------------------------------------------------------

    def _enqueue(self, session: _Session, ids: list[bytes], now: float) -> None:
        due = now + self.config.pull_grace if session.settled else now
        for id in ids:
            if len(session.queue) < MAX_QUEUE and not self._log.holds(id) and id not in self._unknown:
                session.queue.setdefault(id, due)

    def _pull_on(self, link: Link, session: _Session, now: float) -> None:
        """Asks a peer for the next batch of what it holds and we lack."""
        batch: list[bytes] = []
        for _ in range(len(session.queue)):
            id, due = next(iter(session.queue.items()))
            if due > now or len(session.asked) >= self.config.pull_batch:
                break
            del session.queue[id]
            if self._log.holds(id) or id in self._unknown:
                continue
            if id in self._pulling:
                session.queue[id] = now + self.config.pull_grace  # another peer was asked; should it fail, this one is
                continue
            self._pulling[id] = link.peer
            session.asked.add(id)
            batch.append(id)
        if batch:
            session.progress_at = now
            self._send(link, Pull(batch, max(0, int(self._accept_age(now) * 1000))))
        self._finish(link, session, now)

    def answered(self, link: Link, id: bytes, now: float) -> bool:
        """An id that we pulled has been answered, by whatever frame. False where this peer was not asked."""
        session = self._session(link)
        if id not in session.asked:
            return False
        session.asked.discard(id)
        self._pulling.pop(id, None)
        session.progress_at = now
        if len(session.asked) <= self.config.pull_batch // 2:
            self._pull_on(link, session, now)
        return True

    def _forget_asked(self, session: _Session) -> None:
        for id in sorted(session.asked):
            self._pulling.pop(id, None)
        session.asked.clear()

    def unwanted(self, id: bytes, now: float) -> None:
        """Not to be asked for again for a while."""
        self._unknown[id] = now + self.config.unknown_ttl
        self._unknown.move_to_end(id)
        if len(self._unknown) > MAX_UNKNOWN:
            self._unknown.popitem(last=False)

    def _serve(self, link: Link, frame: Pull, now: float) -> None:
        sent = 0
        for id in frame.ids:
            record = self._log.get(id)
            if record is None:
                self._send(link, Gone(id, False, 0, 0))
                continue
            age = self._log.age_ms(record, now)
            if record.proof is not None:
                (one, other) = record.proof
                self._send(link, Proof(age, one.body, one.signature, other.body, other.signature))
            elif record.envelope is None or age > frame.max_age:
                self._send(link, Gone(id, True, record.timestamp, age))
            elif sent < TRANSFER_BYTES or sent == 0:
                sent += record.envelope.size
                link.note_sent(self._own_first(id))
                self._send(link, Transfer(age, record.hops, record.envelope.body, record.envelope.signature))
            else:
                self._send(link, Have([id]))
                link.note_sent(self._own_first(id), owed=True)

    def _gone(self, link: Link, frame: Gone, now: float) -> None:
        session = self._session(link)
        if frame.id not in session.asked:
            return
        if frame.known:
            self._log.add_gone(frame.id, frame.timestamp, frame.age / 1000, now)
        if not self._log.holds(frame.id):
            self.unwanted(frame.id, now)
        self.answered(link, frame.id, now)

    # -- time -------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> float | None:
        """Opens periodic rounds, pulls and gives up when due; returns when to come back."""
        while self._unknown and next(iter(self._unknown.values())) <= now:
            self._unknown.popitem(last=False)
        times: list[float] = []
        for peer, session in list(self._sessions.items()):
            self._pull_on(self._links[peer], session, now)
            if session.asked or session.negentropy or session.done_round is not None:
                if now - session.progress_at >= self.config.patience:
                    self._give_up(session)
                else:
                    times.append(session.progress_at + self.config.patience)
            if session.queue and not session.asked:
                times.append(next(iter(session.queue.values())))
        if not self._active:
            self._next_digest = None
        elif self._next_digest is None:
            self._next_digest = now + self._interval
        elif self._next_digest <= now:
            self.open_round(self._active[self._rng.choice(list(self._active))], now)
            self._interval = min(self._interval * 1.5, self.config.digest_interval_max)
            self._next_digest = now + self._interval * (0.75 + self._rng.random() / 2)
        if self._next_digest is not None:
            times.append(self._next_digest)
        return min(times, default=None)

    def _give_up(self, session: _Session) -> None:
        """No progress: the next round starts afresh."""
        session.negentropy = session.done_round = None
        session.queue.clear()
        self._forget_asked(session)

    def _send(self, link: Link, frame: Frame) -> None:
        self._out.append(Send(link.peer, encode(frame)))


def check_proof(frame: Proof) -> None:
    """A proof of two equal bodies proves nothing. Raises `RemoteProtocolError`."""
    if frame.first == frame.second:
        raise RemoteProtocolError("a proof of equivocation that holds the same envelope twice")
