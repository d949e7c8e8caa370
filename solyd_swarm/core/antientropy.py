"""Anti-entropy: digest rounds with neighbours.

One side opens a round with the size and fingerprint of its set. Equal sets end it at once. Otherwise one side, the one with far
fewer items if there is such a one, leads a Negentropy conversation, names what it has more (Have), pulls what it lacks, and says
Done when it has been answered. Rounds run on each new neighbour and periodically: often while traffic flows, seldom while the
sets are equal and idle. Whatever is not answered in time is said again, for a while.
"""

import random
from collections.abc import Callable

from solyd_swarm.core.catchup import MUCH, CatchUp
from solyd_swarm.core.events import Action, Send
from solyd_swarm.core.link import SERVED_BYTES, Link
from solyd_swarm.core.log import Log
from solyd_swarm.core.ordered import ID_SIZE
from solyd_swarm.core.pulling import AntiEntropyConfig, Puller
from solyd_swarm.core.reconcile import Negentropy
from solyd_swarm.core.serving import Server
from solyd_swarm.core.wire import Done, Frame, Gone, GoneRun, Have, InSync, Proof, Pull, Reconcile, Seek, Summary, Unmatched, encode
from solyd_swarm.errors import RemoteProtocolError

__all__ = ["AntiEntropy", "AntiEntropyConfig", "check_proof"]

FOLLOWED = -1
"""Stands for a round that the other side led."""
MAX_OPENED = 4
"""Rounds of ours on one link that may be without an answer: bounds a peer that never answers. The oldest are forgotten."""
OFFER_RATE = 1024 * 1024
"""Bytes of ids a second that a peer may have us offer: bounds one that says again and again that it holds nothing."""
FEWER = 16
"""The side with this many items fewer leads: being told of ids costs their 32 bytes each, and asking for a run of them next to
nothing, while whoever leads with more has to offer them one by one. For fewer the time of one more message is not worth it."""


class _Opened:
    """A round of ours without an answer."""

    __slots__ = ("at", "through", "tries")

    def __init__(self, through: int, at: float) -> None:
        self.through = through  # our last sequence when we opened it
        self.at: float | None = at  # None: the other side has taken it up
        self.tries = 0


class _Session:
    """The digest rounds of one link."""

    __slots__ = (
        "asked_at",
        "done_round",
        "done_through",
        "lead_from",
        "lead_round",
        "lead_through",
        "negentropy",
        "opened",
        "paused",
        "query",
        "resends",
        "settled",
        "step",
    )

    def __init__(self) -> None:
        self.opened: dict[int, _Opened] = {}
        self.negentropy: Negentropy | None = None  # while we lead a conversation
        self.lead_from = float("-inf")  # when we may lead the next conversation
        self.lead_round = 0
        self.lead_through = 0
        self.step = 0  # of the conversation: its queries are numbered, and so are their answers
        self.query = b""
        self.asked_at = 0.0
        self.resends = 0
        self.paused = b""  # the next query, while there is enough to be pulled
        self.done_round: int | None = None  # the round to end, and to say Done for if we led it, once our pulls are answered
        self.done_through = 0
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
        self.pulls = Puller(links, log, out, config, accept_age, self._drained)
        self.server = Server(log, out, own_first)
        self._catchup = CatchUp(config.patience)
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

    def link_down(self, link: Link, now: float) -> None:
        """The channel has ended, and all rounds on it."""
        self._sessions.pop(link.peer, None)
        self.pulls.link_down(link)
        self._catchup.forget(link.peer)
        if self._catchup.is_with(link.peer):
            self._others_turn(now)

    def open_round(self, link: Link, now: float) -> None:
        """Compares digests with this peer now, or once we have caught up with another."""
        if not self.config.rounds:
            return
        if self._is_catching_up(now):
            self._catchup.put_off(link.peer)
            return
        session = self._session(link)
        self._round += 1
        session.opened[self._round] = _Opened(self._published(), now)
        if len(session.opened) > MAX_OPENED:
            del session.opened[next(iter(session.opened))]
        self._summarise(link, self._round)

    def _summarise(self, link: Link, round: int) -> None:
        count, fingerprint = self._log.items.summary()
        self._send(link, Summary(round, count, fingerprint))

    def _is_catching_up(self, now: float) -> bool:
        peer = self._catchup.peer
        if not peer:
            return False
        return self._catchup.is_busy(now, self.pulls.fed_at(peer))

    def _others_turn(self, now: float) -> None:
        for peer in self._catchup.end(now):
            if peer in self._links:
                self.open_round(self._links[peer], now)

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
                self.server.serve(link, frame, now)
            case Seek():
                self.server.sought(link, frame, now)
            case Unmatched():
                self.pulls.unmatched(link, frame, now)
            case Gone():
                self.pulls.gone(link, frame, now)
            case GoneRun():
                self.pulls.gone_run(link, frame, now)

    def _summarised(self, link: Link, frame: Summary, now: float) -> None:
        session = self._session(link)
        if (frame.count, frame.fingerprint) == self._log.items.summary():
            self._send(link, InSync(frame.round))
            self._settle(link, session, self._published(), True, now)
            return
        if session.negentropy is not None or not self.config.rounds:
            return  # we lead a conversation with this peer already
        count = len(self._log.items)
        if count > frame.count + FEWER:
            waits = any(opened.at is not None and opened.tries < self.config.retries for opened in session.opened.values())
            if not waits:  # a summary of ours, or one that we shall repeat, is on its way
                self.open_round(link, now)
            return
        much = frame.count > count + MUCH
        if now < session.lead_from or (much and not self._catchup.may_begin(link.peer, now)):
            return  # it will ask again
        for opened in session.opened.values():
            opened.at = None  # no answer to these will come: we lead
        if abs(frame.count - count) > MUCH and self._is_catching_up(now):
            self._catchup.put_off(link.peer)
            return
        if much:
            self._catchup.begin(link.peer, now)
        session.negentropy = Negentropy(self.config.frame_size_limit, items=self._log.items, rng=self._rng)
        session.lead_round, session.lead_through = frame.round, self._published()
        self._ask(link, session, session.negentropy.initiate(), now)

    def _ask(self, link: Link, session: _Session, query: bytes, now: float) -> None:
        session.step += 1
        session.query, session.paused, session.asked_at, session.resends = query, b"", now, 0
        self._send(link, Reconcile(session.lead_round, True, query, session.step))

    def _in_sync(self, link: Link, frame: InSync, now: float) -> None:
        session = self._session(link)
        self._taken_up(link, session, frame.round, now)
        through = self._close_round(session, frame.round)
        if through is not None:
            self._settle(link, session, through, True, now)

    def _taken_up(self, link: Link, session: _Session, round: int, now: float) -> None:
        """The other side has answered the opening of a round."""
        opened = session.opened.get(round)
        if opened is not None and opened.at is not None:
            if opened.tries == 0:  # Karn's rule: of what was said twice nobody knows which one was answered
                link.round_trip.sample(now - opened.at)
            opened.at = None

    def _close_round(self, session: _Session, round: int) -> int | None:
        """Our last sequence when we opened this round, or None where it is none of ours; earlier rounds end with it."""
        opened = session.opened.get(round)
        if opened is None:
            return None
        session.opened = {number: kept for number, kept in session.opened.items() if number > round}
        return opened.through

    def _reconcile(self, link: Link, frame: Reconcile, now: float) -> None:
        session = self._session(link)
        if frame.query:
            self._taken_up(link, session, frame.round, now)
            if link.served < SERVED_BYTES:
                self._answer(link, frame)
            return
        if session.negentropy is None or session.paused or (frame.round, frame.step) != (session.lead_round, session.step):
            return  # the answer to a conversation that we gave up, or to what we said twice
        if session.resends == 0:
            link.round_trip.sample(now - session.asked_at)
        result = session.negentropy.reconcile(frame.message)
        self.server.offer(link, result.have, now)
        session.lead_from = max(now, session.lead_from) + ID_SIZE * len(result.have) / OFFER_RATE
        self.pulls.enqueue(link, result.runs, now, soon=not session.settled)
        if result.reply is not None:
            session.paused = result.reply
        else:
            session.negentropy = None
            session.done_round, session.done_through = frame.round, session.lead_through
        self.pulls.pull_on(link, now)

    def _answer(self, link: Link, frame: Reconcile) -> None:
        reply = Negentropy(self.config.frame_size_limit, items=self._log.items).reconcile(frame.message).reply
        if reply is not None:
            link.served += len(reply)
            self._send(link, Reconcile(frame.round, False, reply, frame.step))

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

    def _drained(self, link: Link, now: float) -> None:
        """Little is left to be pulled: goes on with the round, if there is one, or ends it once everything has been answered."""
        session = self._session(link)
        if session.negentropy is not None:
            if session.paused:
                self._ask(link, session, session.paused, now)
            return
        if session.done_round is None or not self.pulls.is_idle(link):
            return
        # Where something was left out the other side must not believe that we hold all it has; a later round tells.
        if self.pulls.take_complete(link) and session.done_round != FOLLOWED:
            self._send(link, Done(session.done_round))
        session.done_round = None
        self._settle(link, session, session.done_through, False, now)
        if self._catchup.is_with(link.peer):
            self._others_turn(now)

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
        if self._catchup.peer and not self._is_catching_up(now):
            self._others_turn(now)
        for peer, session in self._sessions.items():
            if session.opened or session.negentropy is not None:
                times += self._say_again(self._links[peer], session, now)
        if not self._active:
            self._next_digest = None
        elif self._next_digest is None:
            self._next_digest = now + self._interval
        elif self._next_digest <= now:
            self.open_round(self._active[self._rng.choice(list(self._active))], now)
            self._next_digest = now + self._interval * (0.75 + self._rng.random() / 2)
        if self._next_digest is not None:
            times.append(self._next_digest)
        return min(times, default=None)

    def _say_again(self, link: Link, session: _Session, now: float) -> list[float]:
        """Repeats what has not been answered in time, and gives up in the end; returns when to look again."""
        config, times = self.config, []
        timeout = link.round_trip.timeout(1.0, config.retry_min, config.retry_max)
        if session.negentropy is not None and not session.paused:
            due = session.asked_at + timeout * (2 ** (session.resends + 1) - 1)
            if due <= now and session.resends < config.retries:
                session.resends += 1
                self._send(link, Reconcile(session.lead_round, True, session.query, session.step))
                due = session.asked_at + timeout * (2 ** (session.resends + 1) - 1)
            elif due <= now:
                session.negentropy = None
            times += [due] if session.negentropy is not None else []
        for round in list(session.opened)[-1:]:
            opened = session.opened[round]
            if opened.at is None or opened.tries >= config.retries:
                continue
            due = opened.at + timeout * (2 ** (opened.tries + 1) - 1)
            if due <= now:
                opened.tries += 1
                self._summarise(link, round)
                due = opened.at + timeout * (2 ** (opened.tries + 1) - 1)
            times.append(due)
        return times

    def _send(self, link: Link, frame: Frame) -> None:
        self._out.append(Send(link.peer, encode(frame)))


def check_proof(frame: Proof) -> None:
    """A proof of two equal bodies proves nothing. Raises `RemoteProtocolError`."""
    if frame.first == frame.second:
        raise RemoteProtocolError("a proof of equivocation that holds the same envelope twice")
