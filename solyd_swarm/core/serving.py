"""Serving: bodies, and what is known of those that are gone, to peers that pull or seek; and offers of what they lack."""

from collections.abc import Callable, Iterable
from itertools import pairwise

from solyd_swarm.core import wire
from solyd_swarm.core.doubts import DIVIDED_AGE
from solyd_swarm.core.envelope import Envelope
from solyd_swarm.core.events import Action, Send
from solyd_swarm.core.link import SERVED_BYTES, Link
from solyd_swarm.core.log import Log, Record
from solyd_swarm.core.ordered import fingerprint_of
from solyd_swarm.core.wire import MAX_BATCH, MAX_ENVELOPE, MAX_ROW, Frame, Gone, GoneRun, Have, Proof, Pull, Seek, Transfer, encode

SHORT_RUN = 2
"""Ids that are asked for, and said to be gone, one by one; more that follow one another by their ends."""
GONE_BYTES = 20
"""Of what is said of one body that is gone, about: these count too, since a run asks for many in few bytes."""


class Server:
    """Answers to the pulls of one topic. It appends what is to be done to `out`.

    Args:
        own_first: first sequence of an envelope if it is our own, else 0.
    """

    def __init__(self, log: Log, out: list[Action], own_first: Callable[[bytes], int]) -> None:
        self._log = log
        self._out = out
        self._own_first = own_first

    def serve(self, link: Link, frame: Pull, now: float) -> None:
        """Answers every id asked for, by itself, together with others that are gone, or by the offer to ask again."""
        later: list[bytes] = []
        gone: list[tuple[Record, int]] = []
        for id in frame.ids + self._expand(frame.runs):
            if link.served >= 2 * SERVED_BYTES:
                break
            record = self._log.get(id)
            age = 0 if record is None else self._log.age_ms(record, now)
            # What we know by hearsay says nothing: anybody can make that up.
            link.divided |= age > 1000 * DIVIDED_AGE and record is not None and record.stream is not None
            if record is not None and not _is_there(record, age, frame.max_age):
                link.served += GONE_BYTES
                gone.append((record, age))
                continue
            self._say_gone(link, gone)
            gone = []
            if record is None:
                self._send(link, Gone(id, False, 0, 0))
            elif not self._give(link, record, age):
                later.append(id)
        self._say_gone(link, gone)
        self.offer(link, later, now)

    def sought(self, link: Link, frame: Seek, now: float) -> None:
        """Gives what is there of all in these rows, or offers it; and names the rows in which we have something else."""
        items = self._log.items
        later: list[bytes] = []
        other: list[bytes] = []
        for first, last, fingerprint in frame.rows:
            if link.served >= 2 * SERVED_BYTES:
                break
            lower, upper = items.places(first, last)
            if not 0 < upper - lower <= MAX_ROW or items.fingerprint(lower, upper) != fingerprint:
                other.append(first[1])
                continue
            for id in items.ids(lower, upper):
                record = self._log.get(id)
                age = 0 if record is None else self._log.age_ms(record, now)
                if record is not None and _is_there(record, age, frame.max_age) and not self._give(link, record, age):
                    later.append(id)
        if other:
            self._send(link, wire.Unmatched(other))
        self.offer(link, later, now)

    def show(self, link: Link, proof: tuple[Envelope, Envelope], age: int) -> None:
        """Proves an equivocation: where two large envelopes would not fit one frame, by these themselves. `age` in milliseconds."""
        one, other = proof
        if one.size + other.size <= MAX_ENVELOPE:
            self._send(link, Proof(age, one.body, one.signature, other.body, other.signature))
            return
        for envelope in proof:
            link.note_sent()
            self._send(link, Transfer(age, 0, envelope.body, envelope.signature))

    def offer(self, link: Link, ids: list[bytes], now: float) -> None:
        """Names what we hold and the peer does not, for it to pull."""
        for start in range(0, len(ids), MAX_BATCH):
            part = ids[start : start + MAX_BATCH]
            for id in part:
                link.note_sent(self._own_first(id), owed=True)
            self._send(link, Have(part))

    def _give(self, link: Link, record: Record, age: int) -> bool:
        """Sends what there is, unless enough was asked for already."""
        if link.served >= SERVED_BYTES:
            link.served += len(record.id)
            return False
        link.served += record.bodies_size
        if record.proof is not None:
            self.show(link, record.proof, age)
        elif record.envelope is not None:
            link.note_sent(self._own_first(record.id))
            self._send(link, Transfer(age, record.hops, record.envelope.body, record.envelope.signature))
        return True

    def _say_gone(self, link: Link, gone: list[tuple[Record, int]]) -> None:
        """Tells timestamps and ages of what follows one another in what was asked for."""
        if len(gone) <= SHORT_RUN:
            for record, age in gone:
                self._send(link, Gone(record.id, True, record.timestamp, age))
            return
        ids = [record.id for record, _ in gone]
        timestamps = _differences([record.timestamp for record, _ in gone])
        ages = _differences([age for _, age in gone])
        self._send(link, GoneRun(ids[0], ids[-1], fingerprint_of(ids), timestamps, ages))

    def _expand(self, runs: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
        """The ids of runs, at most `MAX_BATCH` of them. Of a run whose ends we do not know, only those ends."""
        ids: list[bytes] = []
        for ends in runs:
            first, last = (self._log.get(end) for end in ends)
            if first is None or last is None:
                ids += ends
            else:
                ids += self._log.items.between((first.timestamp, first.id), (last.timestamp, last.id), MAX_BATCH)
            if len(ids) >= MAX_BATCH:
                break
        return ids[:MAX_BATCH]

    def _send(self, link: Link, frame: Frame) -> None:
        self._out.append(Send(link.peer, encode(frame)))


def _is_there(record: Record, age: int, max_age: int) -> bool:
    """Whether we have what was asked for: a body no older than that, or a proof however old."""
    return bool(record.bodies_size) and (record.proof is not None or age <= max_age)


def _differences(values: list[int]) -> list[int]:
    """The first one, and what each differs by from the one before."""
    return values[:1] + [later - earlier for earlier, later in pairwise(values)]
