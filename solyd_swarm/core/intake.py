"""Intake: what becomes of envelopes and proofs that arrive. Verified first, then logged, relayed, and delivered in order."""

from collections.abc import Callable, Iterable

from solyd_swarm.core.antientropy import AntiEntropy, check_proof
from solyd_swarm.core.broadcast import Broadcast
from solyd_swarm.core.doubts import DIVIDED_AGE, Doubts
from solyd_swarm.core.envelope import Envelope, Verifier, envelope_id, equivocate, equivocation_id, open_envelope
from solyd_swarm.core.events import Action, Deliver, Equivocated
from solyd_swarm.core.link import Link
from solyd_swarm.core.log import Log, Outcome, Record
from solyd_swarm.core.order import Delivery, Sequencer
from solyd_swarm.core.wire import MAX_HOPS, Gossip, Proof, Transfer
from solyd_swarm.errors import RemoteProtocolError


class Intake:
    """Takes in Gossip, Transfer and Proof of one topic. It appends what is to be done to `out`.

    Args:
        author: our own key: what it signed is kept and relayed, but not delivered to us.
        accept_age: seconds of age beyond which a body is not wanted, at the time given.
    """

    def __init__(
        self,
        topic_id: bytes,
        author: bytes,
        verify: Verifier,
        log: Log,
        sequencer: Sequencer,
        broadcast: Broadcast,
        antientropy: AntiEntropy,
        doubts: Doubts,
        active: dict[bytes, Link],
        out: list[Action],
        accept_age: Callable[[float], float],
    ) -> None:
        self._topic_id = topic_id
        self._author = author
        self._verify = verify
        self._log = log
        self._sequencer = sequencer
        self._broadcast = broadcast
        self._antientropy = antientropy
        self._doubts = doubts
        self._active = active
        self._out = out
        self._accept_age = accept_age
        self._expected: int | None = None  # what the ledger knew before the envelope at hand

    def gossip(self, link: Link, frame: Gossip, now: float) -> bool:
        """An eager push. Whether deadlines may have changed."""
        id = envelope_id(frame.body)
        if self._log.witnessed(id):
            link.note_received(id, True, matters=self._log.may_be_by(id, link.author))
            if self._doubts and link.up and self._doubts.told(id):
                self._pass_on(id, now, without=link.peer)
            else:
                self._broadcast.duplicate(link, id, now)
            return False
        taken = self._take(link, id, frame, now, pulled=False)
        link.note_received(id, True, matters=taken is None or taken[1].author == link.author)
        if taken is None:
            return False
        record, envelope = taken
        unneeded = self._broadcast.accepted(link, record, now)
        self._broadcast.push(record, now, without=link.peer, unneeded=unneeded)
        return self._deliver_on(envelope, link, now)

    def transfer(self, link: Link, frame: Transfer, now: float) -> bool:
        """What we pulled. Whether deadlines may have changed."""
        id = envelope_id(frame.body)
        is_news = self._log.get(id) is None
        taken = None if self._log.witnessed(id) else self._take(link, id, frame, now, pulled=True)
        link.note_received(id, True, matters=self._log.may_be_by(id, link.author))
        link.divided |= is_news and taken is not None and frame.age > 1000 * DIVIDED_AGE
        announced = self._broadcast.is_announced(id)
        self._broadcast.fetched(id, now)
        review = False
        if taken is not None:
            record, envelope = taken
            if not announced and self._is_doubtful(link, id, frame.age / 1000, now):
                review = True
            elif self._sequencer.settled:
                # Others may lack it too, and learn of it now rather than a digest period later; not so what a joiner catches up on.
                self._broadcast.push(record, now, without=link.peer, lazily=True)
            review = self._deliver_on(envelope, link, now) or review
        # Answered only now: ending the round may begin delivery, which must see this envelope.
        return self._antientropy.pulls.answered(link, id, now, len(frame.body)) or review

    def _is_doubtful(self, link: Link, id: bytes, age: float, now: float) -> bool:
        """Whether neighbours may yet bring what someone else gave us; then it is held until that is clear."""
        if link.up or age > DIVIDED_AGE or not self._active or not self._sequencer.settled:
            return False
        if self._broadcast.is_failing:
            return False  # where much is lost, neighbours tell late, or never
        return self._doubts.hold(id, link.peer, now + DIVIDED_AGE - age)

    def _pass_on(self, id: bytes, now: float, without: bytes = b"", *, lazily: bool = False) -> None:
        record = self._log.get(id)
        if record is not None and record.envelope is not None:
            self._broadcast.push(record, now, without=without, lazily=lazily)

    def release(self, now: float) -> list[bytes]:
        """Passes on what was held long enough. Returns who gave something that no neighbour has told of."""
        due = self._doubts.due(now)
        for id, _ in due:
            self._pass_on(id, now, lazily=True)
        return list(dict.fromkeys(giver for _, giver in due))

    def trust(self, giver: bytes, now: float) -> None:
        """Passes on what is held of a peer, which is a neighbour now."""
        for id in self._doubts.release(giver):
            self._pass_on(id, now, without=giver, lazily=True)

    def let_go(self, now: float) -> None:
        """We leave: what is held, and our own that was to be announced, goes to the neighbours, who could not ask us for it any more."""
        released = self._doubts.release()
        for id in released:
            self._pass_on(id, now)
        self._broadcast.flush_own(now, set(released))

    def told(self, link: Link, ids: Iterable[bytes], now: float) -> None:
        """A peer offers these: what is held is in doubt no longer if it is a neighbour."""
        for id in ids if self._doubts and link.up else ():
            if self._doubts.told(id):
                self._pass_on(id, now, without=link.peer, lazily=True)

    def _take(self, link: Link, id: bytes, frame: Gossip | Transfer, now: float, *, pulled: bool) -> tuple[Record, Envelope] | None:
        """Verifies an envelope and offers it to the log; its record and itself where it is new, to be relayed and delivered."""
        envelope = open_envelope(self._topic_id, frame.body, frame.signature, self._verify, id=id)
        age = frame.age / 1000 + link.round_trip.transit
        if age > self._accept_age(now):
            # Not wanted: published before we joined (without replay), or older than what we keep.
            self._antientropy.pulls.said_gone(link, id, envelope.time, age, now)
            return None
        self._expected = self._log.ledger.expected(envelope.author, envelope.epoch)
        match self._log.add(envelope, age, min(frame.hops + 1, MAX_HOPS), now, pulled=pulled):
            case Outcome.ACCEPTED:
                record = self._log.get(id)
                return None if record is None else (record, envelope)
            case Outcome.EQUIVOCATION:
                self._convicted(envelope.author, envelope.epoch, now)
                self._antientropy.pulls.answered(link, equivocation_id(envelope.author, envelope.epoch), now)
            case Outcome.STALE | Outcome.EXPIRED:
                self._antientropy.pulls.refuse(link, id, now)
        return None

    def _deliver_on(self, envelope: Envelope, link: Link, now: float) -> bool:
        review = self._antientropy.traffic(now)
        stream = (envelope.author, envelope.epoch)
        had_gap = self._sequencer.has_gap_in(stream)
        if envelope.author != self._author:
            self.deliver(self._sequencer.accept(envelope, link.peer, self._expected, now))
        if not had_gap and self._sequencer.has_gap_in(stream):
            review = True
            if link.up:
                self._antientropy.open_round(link, now)
        return review

    def deliver(self, deliveries: list[Delivery]) -> None:
        """Hands messages to the application."""
        for envelope, source, late in deliveries:
            self._out.append(Deliver(envelope, source, late))

    def proof(self, link: Link, frame: Proof, now: float) -> None:
        """An equivocation, proven."""
        check_proof(frame)
        one = open_envelope(self._topic_id, frame.first, frame.first_signature, self._verify)
        other = open_envelope(self._topic_id, frame.second, frame.second_signature, self._verify)
        if not equivocate(one, other):
            raise RemoteProtocolError("a proof of equivocation that proves nothing")
        if self._log.convict((one, other), frame.age / 1000, now):
            self._convicted(one.author, one.epoch, now, without=link.peer)
        self._antientropy.pulls.answered(link, equivocation_id(one.author, one.epoch), now)

    def _convicted(self, author: bytes, epoch: int, now: float, without: bytes = b"") -> None:
        """Reports an equivocation once, silences the author for the epoch, and tells the neighbours."""
        self._sequencer.silence(author, epoch)
        record = self._log.get(equivocation_id(author, epoch))
        if record is None or record.proof is None:
            return
        self._out.append(Equivocated(author, epoch, record.proof))
        for peer, link in self._active.items():
            if peer != without:
                self._antientropy.server.show(link, record.proof, self._log.age_ms(record, now))
