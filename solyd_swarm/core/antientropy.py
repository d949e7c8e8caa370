"""Anti-entropy: digest rounds with neighbours.

One side opens a round with the size and fingerprint of its set. Equal sets end it at once. Otherwise the other side leads
a Negentropy conversation, names what it has more (Have), pulls what it lacks, and says Done when it has been answered.
Rounds run on each new neighbour and periodically: often while traffic flows, seldom while the sets are equal and idle.
"""

import random
from collections.abc import Callable

from solyd_swarm.core.broadcast import SERVED_BYTES
from solyd_swarm.core.events import Action, Send
from solyd_swarm.core.link import Link
from solyd_swarm.core.log import Log
from solyd_swarm.core.pulling import AntiEntropyConfig, Puller
from solyd_swarm.core.reconcile import Negentropy
from solyd_swarm.core.wire import Done, Frame, Gone, Have, InSync, Proof, Pull, Reconcile, Summary, encode
from solyd_swarm.errors import RemoteProtocolError

__all__ = ["AntiEntropy", "AntiEntropyConfig", "check_proof"]

FOLLOWED = -1
"""Stands for a round that the other side led."""
MAX_OPENED = 4
"""Rounds of ours on one link that may be without an answer: bounds a peer that never answers. The oldest are forgotten."""


class _Session:
    """The digest rounds of one link."""

    __slots__ = ("done_round", "done_through", "lead_round", "lead_through", "negentropy", "opened", "progress_at", "settled")

    def __init__(self) -> None:
        self.opened: dict[int, int] = {}  # our rounds without an answer: our last sequence when we opened each
        self.negentropy: Negentropy | None = None  # while we lead a conversation
        self.lead_round = 0
        self.lead_through = 0
        self.done_round: int | None = None  # the round to end, and to say Done for if we led it, once our pulls are answered
        self.done_through = 0
        self.progress_at = 0.0
        self.settled = False  # one round has come to its end: the first one pulls at once, later ones leave time to the tree


class AntiEntropy:
    """Digest rounds of one topic. It appends what is to be done to `out`.

    Args:
        links: all links, active or not (healing compares digests over inactive ones).
        accept_age: seconds of age beyond which we want no body, at the time given.
        published: the last sequence we published.
        own_first: first sequence of an envelope if it is our own, else 0.
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
        self.pulls = Puller(links, log, out, config, accept_age, own_first, self._finish)
        self._links = links
        self._active = active
        self._log = log
        self._out = out
        self._rng = rng
        self._published = published
        self._on_settled = on_settled
        self._sessions: dict[bytes, _Session] = {}
        self._round = 0
        self._interval = config.digest_interval
        self._next_digest: float | None = None

    # -- links ------------------------------------------------------------------------------------------------

    def link_down(self, link: Link) -> None:
        """The channel has ended, and all rounds on it."""
        self._sessions.pop(link.peer, None)
        self.pulls.link_down(link)

    def open_round(self, link: Link) -> None:
        """Compares digests with this peer now."""
        if not self.config.rounds:
            return
        session = self._session(link)
        self._round += 1
        session.opened[self._round] = self._published()
        if len(session.opened) > MAX_OPENED:
            del session.opened[next(iter(session.opened))]
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
                self.pulls.serve(link, frame, now)
            case Gone():
                self.pulls.gone(link, frame, now)

    def _summarised(self, link: Link, frame: Summary, now: float) -> None:
        session = self._session(link)
        if (frame.count, frame.fingerprint) == self._log.items.summary():
            self._send(link, InSync(frame.round))
            self._settle(link, session, self._published(), True, now)
            return
        if session.negentropy is not None and now < session.progress_at + self.config.patience:
            return  # we lead a conversation with this peer already
        session.negentropy = Negentropy(self.config.frame_size_limit, items=self._log.items, rng=self._rng)
        session.lead_round, session.lead_through, session.progress_at = frame.round, self._published(), now
        self._send(link, Reconcile(frame.round, True, session.negentropy.initiate()))

    def _in_sync(self, link: Link, frame: InSync, now: float) -> None:
        session = self._session(link)
        through = self._close_round(session, frame.round)
        if through is not None:
            self._settle(link, session, through, True, now)

    def _close_round(self, session: _Session, round: int) -> int | None:
        """Our last sequence when we opened this round, or None where it is none of ours; earlier rounds end with it."""
        through = session.opened.get(round)
        if through is not None:
            session.opened = {number: kept for number, kept in session.opened.items() if number > round}
        return through

    def _reconcile(self, link: Link, frame: Reconcile, now: float) -> None:
        session = self._session(link)
        if frame.query:
            if link.served < SERVED_BYTES:
                self._answer(link, frame)
            return
        if session.negentropy is None or frame.round != session.lead_round:
            return  # the answer to a conversation that we gave up
        session.progress_at = now
        result = session.negentropy.reconcile(frame.message)
        self.pulls.offer(link, result.have)
        self.pulls.enqueue(link, result.need, now, soon=not session.settled)
        if result.reply is not None:
            self._send(link, Reconcile(frame.round, True, result.reply))
        else:
            session.negentropy = None
            session.done_round, session.done_through = frame.round, session.lead_through
        self.pulls.pull_on(link, now)

    def _answer(self, link: Link, frame: Reconcile) -> None:
        reply = Negentropy(self.config.frame_size_limit, items=self._log.items).reconcile(frame.message).reply
        if reply is not None:
            link.served += len(reply)
            self._send(link, Reconcile(frame.round, False, reply))

    def _offered(self, link: Link, frame: Have, now: float) -> None:
        for id in frame.ids:
            link.note_received(id, self._log.holds(id), matters=self._log.may_be_by(id, link.author))
        self.pulls.offered(link, frame.ids, now, soon=not self._session(link).settled)
        self.pulls.pull_on(link, now)

    def _done(self, link: Link, frame: Done, now: float) -> None:
        session = self._session(link)
        through = self._close_round(session, frame.round)
        if through is not None:
            link.synced(through)
            if session.done_round is None:
                session.done_round, session.done_through = FOLLOWED, through
            self.pulls.pull_on(link, now)

    def _finish(self, link: Link, now: float) -> None:
        """Everything pulled has been answered: ends the round, if there is one."""
        session = self._session(link)
        if session.done_round is None or session.negentropy is not None:
            return
        # Where something was left out the other side must not believe that we hold all it has; a later round tells.
        if self.pulls.take_complete(link) and session.done_round != FOLLOWED:
            self._send(link, Done(session.done_round))
        session.done_round = None
        self._settle(link, session, session.done_through, False, now)

    def _settle(self, link: Link, session: _Session, through: int, equal: bool, now: float) -> None:
        link.synced(through, equal=equal)
        if equal:
            link.caught_up()
            # Only equality makes rounds rarer: one that found a difference, or was lost on the way, is followed by another soon.
            self._interval = min(self._interval * 1.5, self.config.digest_interval_max)
        else:
            self._interval = self.config.digest_interval
        session.settled = True
        self._on_settled(link, equal, now)

    # -- time -------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> float | None:
        """Opens periodic rounds, pulls and gives up when due; returns when to come back."""
        times = self.pulls.tick(now)
        for session in self._sessions.values():
            if session.negentropy is None:
                continue
            if now >= session.progress_at + self.config.patience:
                session.negentropy = None
            else:
                times.append(session.progress_at + self.config.patience)
        if not self._active:
            self._next_digest = None
        elif self._next_digest is None:
            self._next_digest = now + self._interval
        elif self._next_digest <= now:
            self.open_round(self._active[self._rng.choice(list(self._active))])
            self._next_digest = now + self._interval * (0.75 + self._rng.random() / 2)
        if self._next_digest is not None:
            times.append(self._next_digest)
        return min(times, default=None)

    def _send(self, link: Link, frame: Frame) -> None:
        self._out.append(Send(link.peer, encode(frame)))


def check_proof(frame: Proof) -> None:
    """A proof of two equal bodies proves nothing. Raises `RemoteProtocolError`."""
    if frame.first == frame.second:
        raise RemoteProtocolError("a proof of equivocation that holds the same envelope twice")
