"""Pulling: fetching from a peer what a digest round, or an offer of its own, showed it to hold and us to lack.

Each id is asked of one peer at a time. No answer of one peer keeps us from asking another: not that it has never heard of the id,
not silence, not answers to what it was asked later, and not that its body is gone. Even where that is believed (`Rumours`) all other
neighbours are asked for what we would still want, and new ones for all: members without replay have no bodies of what others hold.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain, islice

from solyd_swarm.core.events import Action, Send
from solyd_swarm.core.link import SERVED_BYTES, Link
from solyd_swarm.core.log import Log
from solyd_swarm.core.ordered import fingerprint_of
from solyd_swarm.core.rumours import Rumours
from solyd_swarm.core.serving import SHORT_RUN
from solyd_swarm.core.wire import MAX_ROW, MAX_ROWS, Gone, GoneRun, Item, Pull, Seek, Unmatched, encode

MAX_QUEUE = 65_536
"""Ids still to be pulled from one peer: bounds a peer that advertises what nobody has. What does not fit is found again by a
later round."""
LOW_QUEUE = 4096
"""Ids left to be pulled from one peer at which it is asked for more: it lists them faster than it can give the bodies."""
MAX_REFUSED = 65_536
"""Ids that a peer advertised and then did not give, per peer; they are not asked of it again for a while. The oldest go first."""
MAX_SEEKS = 32
"""Frames in which a new neighbour is asked for what others say is gone: enough for all of it, unless it was made up to lie scattered."""


@dataclass(frozen=True, slots=True)
class AntiEntropyConfig:
    """Of digest rounds and of pulls. Times in seconds."""

    # False: no round ever, to measure the tree by itself. A gap in an author's numbers is given up as if there were any.
    rounds: bool = True
    # Rounds run this often while traffic flows, and back off to the longest while the sets are equal and nothing is published.
    digest_interval: float = 1.0
    digest_interval_max: float = 10.0
    # What a periodic round finds missing is mostly on its way on the tree: leave it this long before pulling it.
    pull_grace: float = 0.25
    # A pull without an answer for the link's round trip (mean + 4 deviations), within these bounds, is given up; each time the
    # bound is doubled until something comes, up to the longest: large bodies take long on slow lines.
    patience_min: float = 1.0
    patience: float = 5.0
    patience_max: float = 60.0
    # A message of a digest round is said again after the link's round trip, within these bounds, twice as long each time.
    retry_min: float = 0.5
    retry_max: float = 5.0
    retries: int = 3
    # What one answer carries fills the line; small bodies would let that be very many.
    pull_batch: int = 512
    frame_size_limit: int = 60_000
    # What a peer did not give is not asked of it again for this long: it said so, and only a lie or a body that it got since makes it
    # worth while. As long as it takes until it may say so for the second time.
    refused_ttl: float = 30.0
    # Silence may only mean that it is overloaded, or that the answer was lost: others get their turn, then it is asked again.
    silent_ttl: float = 2.0


class _Queue:
    """What is to be pulled from one peer."""

    __slots__ = ("asked", "complete", "failures", "fed_at", "progress_at", "refused", "rows", "runs", "size", "sought", "sought_at", "todo")

    def __init__(self) -> None:
        self.todo: OrderedDict[bytes, tuple[float, int]] = OrderedDict()  # to be pulled, from when on; the number of its run
        self.asked: dict[bytes, float] = {}  # pulled, not answered yet; since when, the oldest first
        self.runs: dict[bytes, list[bytes]] = {}  # of these what was asked for by its ends, by the last id
        self.refused: OrderedDict[bytes, tuple[float, bool]] = OrderedDict()  # until when; whether it was silent rather than said so
        self.complete = True
        self.progress_at = 0.0  # when it last answered what it was asked first, or was asked after it had answered all
        self.fed_at = float("-inf")  # when a body came
        self.failures = 0  # how often it was given up since its last answer
        self.size = 1024.0  # of its bodies, smoothed
        self.sought_at = float("-inf")  # when it was last asked for what others say is gone
        self.sought = 0  # how much that was, ever
        self.rows: dict[bytes, tuple[Item, Item]] = {}  # by their first ids, what it was

    def batch(self, most: int) -> int:
        """How many may be asked for at a time: what one answer carries."""
        return max(16, min(most, int(SERVED_BYTES / self.size)))


class Puller:
    """All pulls of one topic. It appends what is to be done to `out`.

    Args:
        accept_age: seconds of age beyond which we want no body, at the time given.
        on_drain: told each time there is little or nothing left to be pulled from a link.
    """

    def __init__(
        self,
        links: dict[bytes, Link],
        log: Log,
        out: list[Action],
        config: AntiEntropyConfig,
        accept_age: Callable[[float], float],
        on_drain: Callable[[Link, float], None],
    ) -> None:
        self.config = config
        self._links = links
        self._log = log
        self._out = out
        self._accept_age = accept_age
        self._on_drain = on_drain
        self._queues: dict[bytes, _Queue] = {}
        self._pulling: dict[bytes, bytes] = {}  # id -> the peer asked
        self._run = 0
        self.rumours = Rumours(log, accept_age, config.refused_ttl)

    def link_down(self, link: Link) -> None:
        """What this peer owed us is asked of others, who may have it in their queues too."""
        queue = self._queues.pop(link.peer, None)
        if queue is not None:
            self._release(queue, list(queue.asked))

    def is_idle(self, link: Link) -> bool:
        """Whether nothing is left to be pulled from this peer."""
        queue = self._queues.get(link.peer)
        return queue is None or not (queue.asked or queue.todo)

    def fed_at(self, peer: bytes) -> float:
        """When this peer last gave a body that we had asked it for."""
        queue = self._queues.get(peer)
        return float("-inf") if queue is None else queue.fed_at

    def take_complete(self, link: Link) -> bool:
        """Whether all that was found missing since the last call was asked for and answered."""
        queue = self._queue(link)
        complete, queue.complete = queue.complete, True
        return complete

    def _queue(self, link: Link) -> _Queue:
        queue = self._queues.get(link.peer)
        if queue is None:
            queue = self._queues[link.peer] = _Queue()
        return queue

    # -- asking -----------------------------------------------------------------------------------------------

    def enqueue(self, link: Link, runs: Iterable[list[bytes]], now: float, *, soon: bool) -> None:
        """These are to be had from this peer: at once, if `soon`, else unless the tree brings them before long.

        Args:
            runs: ids that follow one another in the peer's set.
        """
        queue = self._queue(link)
        due = now if soon else now + self.config.pull_grace
        for ids in runs:
            self._run += 1
            for id in ids:
                until, silent = queue.refused.get(id, (now, False))
                if self._log.witnessed(id) or id in queue.asked or id in queue.todo:
                    self._run += 1
                elif until > now or len(queue.todo) >= MAX_QUEUE:
                    queue.complete = queue.complete and until > now and not silent
                    self._run += 1
                else:
                    queue.todo[id] = (due, self._run)

    def offered(self, link: Link, ids: list[bytes], now: float, *, soon: bool) -> None:
        """A Have: something new, or an answer to a Pull that asked for more than went at once."""
        queue = self._queue(link)
        for id in ids:
            if id in queue.asked:
                self._answered(queue, id, now)
                # Others get their turn: who only ever puts off must not keep an id to itself.
                contested = any(id in other.todo for other in self._queues.values())
                self.enqueue(link, [[id]], now, soon=not contested)
        self.enqueue(link, ([id] for id in ids), now, soon=soon)

    def pull_on(self, link: Link, now: float) -> None:
        """Asks for the next batch that is due."""
        queue = self._queue(link)
        was_idle = not queue.asked
        batch = self._next_batch(link, queue, now)
        if batch:
            if was_idle:
                queue.progress_at = now
            ids = [id for run in batch if len(run) <= SHORT_RUN for id in run]
            runs = [run for run in batch if len(run) > SHORT_RUN]
            # In the order in which they are answered: who answers several together names the first and the last.
            queue.asked |= dict.fromkeys(chain(ids, *runs), now)
            queue.runs |= {run[-1]: run for run in runs}
            self._out.append(Send(link.peer, encode(Pull(ids, self._max_age(link, now), [(run[0], run[-1]) for run in runs]))))
        if len(queue.todo) <= LOW_QUEUE:
            self._on_drain(link, now)

    def _max_age(self, link: Link, now: float) -> int:
        """Milliseconds of age beyond which a body is not wanted, by when the peer is asked for it."""
        return max(0, int((self._accept_age(now) + link.round_trip.transit) * 1000))

    def _next_batch(self, link: Link, queue: _Queue, now: float) -> list[list[bytes]]:
        """What is due and may be asked for now, in runs."""
        batch: list[list[bytes]] = []
        left = queue.batch(self.config.pull_batch) - len(queue.asked)
        last = 0
        for _ in range(len(queue.todo)):
            id, (due, run) = next(iter(queue.todo.items()))
            if due > now or left <= 0:
                break
            del queue.todo[id]
            if self._log.witnessed(id):
                last = 0
            elif id in self._pulling:
                self._run += 1
                queue.todo[id] = (now + self.config.pull_grace, self._run)  # another peer was asked; should it fail, this one is
                last = 0
            else:
                self._pulling[id] = link.peer
                left -= 1
                if run == last:
                    batch[-1].append(id)
                else:
                    batch.append([id])
                last = run
        return batch

    def _answered(self, queue: _Queue, id: bytes, now: float) -> None:
        # What was asked first is answered first: who answers anything else only must not keep that to itself.
        if queue.asked[id] == next(iter(queue.asked.values())):
            queue.progress_at = now
        queue.failures = 0  # it is there, and what is lost now and then must not make us ever more patient
        del queue.asked[id]
        self._pulling.pop(id, None)
        # Answers come in the order of what was asked for: what is left of a run when its last one is answered is no part of it where
        # the peer looked, be it that it has expired there, or that the run was made up.
        left = [inner for inner in queue.runs.pop(id, ()) if inner in queue.asked]
        self._release(queue, left)
        self._put_back(queue, ([inner] for inner in left), now)

    def answered(self, link: Link, id: bytes, now: float, size: int = 0) -> bool:
        """An id that we pulled has been answered, by whatever frame. True if the peer owes us nothing for the moment.

        Args:
            size: bytes of its body, where there was one.
        """
        queue = self._queue(link)
        if id not in queue.asked:
            return False
        self._answered(queue, id, now)
        if size:
            queue.fed_at = now
            queue.size += (size - queue.size) / 8
        if len(queue.asked) <= queue.batch(self.config.pull_batch) // 2:
            self.pull_on(link, now)
        return not queue.asked

    def refuse(self, link: Link, id: bytes, now: float, *, silent: bool = False, briefly: bool = False) -> None:
        """Not to be asked of this peer again for a while; it was `silent`, or may yet hear of it."""
        refused = self._queue(link).refused
        refused[id] = (now + (self.config.silent_ttl if silent or briefly else self.config.refused_ttl), silent)
        refused.move_to_end(id)
        if len(refused) > MAX_REFUSED:
            refused.popitem(last=False)

    def gone(self, link: Link, frame: Gone, now: float) -> None:
        """The peer has no body to give."""
        if frame.id not in self._queue(link).asked:
            return
        if frame.known:
            self._all_gone(link, [frame.id], [(frame.timestamp, frame.age)], now)
        else:
            link.excuse(frame.id)
            self.refuse(link, frame.id, now, briefly=True)
            self.answered(link, frame.id, now)

    def gone_run(self, link: Link, frame: GoneRun, now: float) -> None:
        """The peer has no bodies to give of several that it was asked for."""
        queue, entries = self._queue(link), frame.entries()
        if frame.first not in queue.asked or frame.last not in queue.asked:
            return
        ids = _between(queue.asked, frame.first, frame.last)
        if len(ids) == len(entries) and fingerprint_of(ids) == frame.fingerprint:
            self._all_gone(link, ids, entries, now)
            return
        # What it holds is not what it listed any more, or it lies: one by one there is no doubt which ones are meant.
        self._release(queue, ids)
        self._put_back(queue, ([id] for id in ids), now + self.config.silent_ttl)

    def _all_gone(self, link: Link, ids: list[bytes], entries: list[tuple[int, int]], now: float) -> None:
        """The peer says so of these, with timestamps and ages in milliseconds."""
        doubted: list[Item] = []
        missed: list[Item] = []
        others = self._others(link)
        for id, (timestamp, age) in zip(ids, entries, strict=True):
            link.excuse(id)
            self.refuse(link, id, now)
            if not self.rumours.is_believed(link.peer, id, timestamp, now, alone=not others):
                doubted.append((timestamp, id))
            elif self.rumours.believe(id, timestamp, age / 1000 + link.round_trip.transit, now):
                missed.append((timestamp, id))
        # A second one is asked at once, by the ends of runs: in a round with it, it would list them all again.
        for other in others[:1]:
            self.enqueue(other, self.rumours.in_runs(doubted, 0), now, soon=True)
        for other in others if missed else ():
            self.enqueue(other, self.rumours.in_runs(missed, 1), now, soon=False)
        for id in ids:
            self.answered(link, id, now)

    def said_gone(self, link: Link, id: bytes, timestamp: int, age: float, now: float) -> None:
        """The peer gave a body that is too old for us: as good as its word that there is none. `age` in seconds."""
        self.refuse(link, id, now)
        if self.rumours.is_believed(link.peer, id, timestamp, now, alone=not self._others(link)):
            self.rumours.believe(id, timestamp, age, now)

    def _others(self, link: Link) -> list[Link]:
        """All other neighbours."""
        return [other for other in self._links.values() if other.up and other is not link]

    def seek(self, link: Link, now: float) -> None:
        """Asks somebody else for what is said to be gone, and be it because it was too old: that may be a lie, too.

        Not sooner than `refused_ttl` after the last time: a peer can come and go as often as it likes.
        """
        queue = self._queue(link)
        if now < queue.sought_at + self.config.refused_ttl:
            return
        queue.sought_at, queue.sought = now, self._log.rumours
        rows = list(islice(self._log.rows_of_hearsay(), MAX_SEEKS * MAX_ROWS))
        queue.rows = {first[1]: (first, last) for first, last, _ in rows}
        for start in range(0, len(rows), MAX_ROWS):
            self._out.append(Send(link.peer, encode(Seek(self._max_age(link, now), rows[start : start + MAX_ROWS]))))

    def unmatched(self, link: Link, frame: Unmatched, now: float) -> None:
        """What the peer has in these rows is not what we were told is there: it is asked for each id, of whatever timestamp."""
        queue = self._queue(link)
        for first in frame.ids:
            if first in queue.rows:
                ids = self._log.items.between(*queue.rows.pop(first), MAX_ROW)
                self.enqueue(link, ([id] for id in ids), now, soon=True)
        self.pull_on(link, now)

    # -- time -------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[float]:
        """Pulls what is due and gives up on who is silent; returns when to come back."""
        times: list[float] = []
        for link in self._links.values() if self._log.rumours else ():  # this is asked often, and there are none mostly
            if link.up and link.peer in self._queues and self._queues[link.peer].sought != self._log.rumours:
                self.seek(link, now)
                times.append(self._queues[link.peer].sought_at + self.config.refused_ttl)
        for peer, queue in list(self._queues.items()):
            while queue.refused and next(iter(queue.refused.values()))[0] <= now:
                queue.refused.popitem(last=False)
            was_busy = queue.asked or queue.todo
            if queue.asked and now >= self._give_up_at(peer, queue):
                self._give_up(self._links[peer], queue, now)
            if was_busy:
                self.pull_on(self._links[peer], now)
            if queue.asked:
                times.append(self._give_up_at(peer, queue))
            elif queue.todo:
                times.append(next(iter(queue.todo.values()))[0])
        return times

    def _give_up(self, link: Link, queue: _Queue, now: float) -> None:
        """The peer is silent on what it was asked first. Others get their turn; then it is asked again, but not without end."""
        queue.failures += 1
        oldest = next(iter(queue.asked.values()))
        asked = [id for id, at in queue.asked.items() if at == oldest]  # what was asked later has its own time
        # By its ends again only what was not answered at all: of the rest nobody knows what lies between.
        runs = [run for last, run in queue.runs.items() if last in asked and all(id in queue.asked for id in run)]
        alone = dict.fromkeys(asked)
        for run in runs:
            for id in run:
                alone.pop(id, None)
        self._release(queue, asked)
        if queue.failures > self.config.retries:
            queue.complete = False
            for id in asked:
                self.refuse(link, id, now, silent=True)
            return
        self._put_back(queue, chain(([id] for id in alone), runs), now + self.config.silent_ttl)

    def _put_back(self, queue: _Queue, runs: Iterable[list[bytes]], due: float) -> None:
        """To be asked for again from then on."""
        for run in runs:
            self._run += 1
            for id in run:
                queue.todo[id] = (due, self._run)

    def _give_up_at(self, peer: bytes, queue: _Queue) -> float:
        config = self.config
        patience = self._links[peer].round_trip.timeout(config.patience, config.patience_min, config.patience)
        patience = min(patience * (1 << min(queue.failures, 16)), config.patience_max)
        # However well it gets on: a whole batch takes no longer on any line that is of use.
        oldest = next(iter(queue.asked.values()))
        return min(max(queue.progress_at, oldest) + patience, oldest + config.patience_max)

    def _release(self, queue: _Queue, ids: list[bytes]) -> None:
        for id in ids:
            del queue.asked[id]
            queue.runs.pop(id, None)
            self._pulling.pop(id, None)


def _between(asked: Iterable[bytes], first: bytes, last: bytes) -> list[bytes]:
    """What was asked for from one to the other, both included; nothing if they come in the other order."""
    found: list[bytes] = []
    for id in asked:
        if found or id == first:
            found.append(id)
            if id == last:
                return found
    return []
