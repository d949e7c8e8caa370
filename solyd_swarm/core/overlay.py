"""One topic: membership, broadcast and anti-entropy over one log of envelopes, as a machine without IO.

`handle(event, now) -> list[Action]` is all there is to drive it: `now` is passed in, randomness is handed over at
construction, and nothing iterates a set where order could reach the wire, so that equal inputs give equal outputs.
"""

import random
from dataclasses import dataclass, field

from solyd_swarm.core import wire
from solyd_swarm.core.antientropy import AntiEntropy, AntiEntropyConfig, check_proof
from solyd_swarm.core.broadcast import Broadcast, BroadcastConfig
from solyd_swarm.core.envelope import (
    Signer,
    Verifier,
    envelope_id,
    equivocate,
    equivocation_id,
    open_envelope,
    seal,
    split_batch,
    verify_ed25519,
)
from solyd_swarm.core.events import (
    Action,
    Addresses,
    Close,
    Congested,
    Deliver,
    Dial,
    DialFailed,
    Discovered,
    Drained,
    Equivocated,
    Event,
    LinkDown,
    LinkUp,
    Progress,
    Publish,
    Quit,
    Received,
    Schedule,
    Send,
    Tick,
)
from solyd_swarm.core.ledger import Ledger
from solyd_swarm.core.link import Link
from solyd_swarm.core.log import DEFAULT_BYTES, DEFAULT_WINDOW, Log, Outcome, Record
from solyd_swarm.core.membership import Membership, MembershipConfig
from solyd_swarm.core.order import Delivery, Sequencer
from solyd_swarm.core.wire import PeerInfo
from solyd_swarm.errors import RemoteProtocolError

MAX_CANDIDATES = 256
"""Discovered peers outside our views, kept for healing: bounds a poisoned source. A random one goes."""
SETTLE_TIMEOUT = 3.0
"""Seconds after the first neighbour by which delivery begins even if no digest round has come to its end."""

_FREQUENT = wire.Gossip | wire.Transfer | wire.Ihave | wire.Ack


@dataclass(frozen=True, slots=True)
class OverlayConfig:
    """What is tuned, in one place. Times in seconds."""

    membership: MembershipConfig = field(default_factory=MembershipConfig)
    broadcast: BroadcastConfig = field(default_factory=BroadcastConfig)
    antientropy: AntiEntropyConfig = field(default_factory=AntiEntropyConfig)
    window: float = DEFAULT_WINDOW
    max_bytes: int = DEFAULT_BYTES
    replay: bool = True
    # DESIGN: each member tries one discovered peer outside its views about this often, and keeps it when digests differ.
    heal_interval: float = 20.0

    @property
    def gap_wait(self) -> float:
        """A gap is waited for three digest periods."""
        return 3 * self.antientropy.digest_interval


class Overlay:
    """One topic, as seen by one peer.

    Args:
        me: our entry, as other members shall hear it.
        topic_id: 16 bytes that bind envelopes to the topic.
        author: our Ed25519 public key; `sign` signs with it, in `epoch`.
        rng: all randomness of this peer.
        ledger: numbers accepted in an earlier life.
        verify: checks signatures; replaced in simulations only.
    """

    def __init__(
        self,
        me: PeerInfo,
        topic_id: bytes,
        author: bytes,
        epoch: int,
        sign: Signer,
        rng: random.Random,
        config: OverlayConfig | None = None,
        *,
        ledger: Ledger | None = None,
        verify: Verifier = verify_ed25519,
    ) -> None:
        self.config = config = config or OverlayConfig()
        self.topic_id = topic_id
        self.author = author
        self.epoch = epoch
        self.published = 0
        self._sign = sign
        self._verify = verify
        self._rng = rng
        self._out: list[Action] = []
        self._links: dict[bytes, Link] = {}
        self._candidates: dict[bytes | Addresses, tuple[bytes, Addresses]] = {}
        self._healing: dict[bytes, float] = {}  # links dialled to compare digests only
        self._probes: dict[bytes | Addresses, float] = {}  # dials on their way for healing
        self.log = Log(window=config.window, max_bytes=config.max_bytes, ledger=ledger)
        self.sequencer = Sequencer(replay=config.replay, gap_wait=config.gap_wait, max_waiting=config.max_bytes)
        self.membership = Membership(me, self._links, self._out, rng, config.membership, self._neighbor_up, self._neighbor_down)
        active = self.membership.active
        self.broadcast = Broadcast(active, self.log, self._out, author, lambda: self.epoch, config.broadcast)
        self.antientropy = AntiEntropy(
            self._links,
            active,
            self.log,
            self._out,
            rng,
            config.antientropy,
            accept_age=self._accept_age,
            published=lambda: self.published,
            own_first=self._own_first,
            on_settled=self._settled,
        )
        self._now = 0.0
        self._expected: int | None = None  # what the ledger knew before the envelope at hand
        self._joined_at: float | None = None
        self._settle_at: float | None = None
        self._heal_at: float | None = None
        self._progress = (0, 0)
        self._dirty: dict[bytes, None] = {}  # links that may owe an Ack
        self._scheduled: float | None = None
        self._review = True  # whether deadlines may have changed, other than those of the broadcast
        self.closed = False

    # -- what others read -------------------------------------------------------------------------------------

    @property
    def neighbors(self) -> dict[bytes, Link]:
        """The active view."""
        return self.membership.active

    def link(self, peer: bytes) -> Link | None:
        """The link to a peer, neighbour or not."""
        return self._links.get(peer)

    def uses(self, peer: bytes) -> bool:
        """Whether this topic has a use for the peer's channel."""
        return peer in self.membership.active or peer in self._healing

    # -- events -----------------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Action]:
        """Takes in one event and returns what is to be done, in order."""
        self._now = now
        if self._joined_at is None:
            self._joined_at = now
        if not self.closed:
            self._dispatch(event, now)
            self._flush(event, now)
        out = self._out[:]
        self._out.clear()
        return out

    def _dispatch(self, event: Event, now: float) -> None:
        match event:
            case Received():
                self._received(event, now)
            case Publish():
                self._publish(event, now)
            case Tick():
                self._scheduled = None
            case LinkUp():
                self._link_up(event, now)
            case LinkDown():
                self._link_down(event.peer, event.reason, now, failed=True)
            case Discovered():
                self._discovered(event, now)
            case DialFailed():
                self._dial_failed(event, now)
            case Congested():
                self._congested(event.peer, True)
            case Drained():
                self._congested(event.peer, False)
            case Quit():
                for peer in self._links:
                    self._out.append(Send(peer, wire.encode(wire.Leave())))
                self.closed = True

    # -- links ------------------------------------------------------------------------------------------------

    def _link_up(self, event: LinkUp, now: float) -> None:
        if event.peer in self._links:
            self._link_down(event.peer, "replaced by a new connection", now, failed=True)
        link = Link(PeerInfo(event.peer, event.addresses), event.author, initiated=event.initiated)
        self._links[event.peer] = link
        self._candidates.pop(event.peer, None)
        self._candidates.pop(event.dialled, None)
        probing = self._probes.pop(event.peer, None) or self._probes.pop(event.dialled, None)
        if probing is not None and self.membership.active:
            self._healing[event.peer] = now + self.config.antientropy.patience
            self.antientropy.open_round(link, now)
        else:
            self.membership.link_up(link, now)

    def _link_down(self, peer: bytes, reason: str, now: float, *, failed: bool) -> None:
        link = self._links.pop(peer, None)
        if link is None:
            return
        self._healing.pop(peer, None)
        self.antientropy.link_down(link)
        self.membership.link_down(link, reason, now, failed=failed)

    def _neighbor_up(self, link: Link) -> None:
        self._healing.pop(link.peer, None)
        self.broadcast.neighbor_up(link)
        if self._settle_at is None and not self.sequencer.settled:
            self._settle_at = self._now + SETTLE_TIMEOUT
        # One of the two opens the first round; both would only do the work twice.
        if self.membership.me.instance < link.peer and not self.antientropy.is_settled(link.peer):
            self.antientropy.open_round(link, self._now)

    def _neighbor_down(self, link: Link) -> None:
        self.broadcast.neighbor_down(link)

    def _congested(self, peer: bytes, congested: bool) -> None:
        link = self._links.get(peer)
        if link is not None:
            link.congested = congested
            link.eager = not congested

    # -- frames -----------------------------------------------------------------------------------------------

    def _received(self, event: Received, now: float) -> None:
        link = self._links.get(event.peer)
        for data in event.frames:
            if link is None:
                return
            try:
                frame = wire.decode(data)
                if frame is not None:
                    self._frame(link, frame, now)
            except RemoteProtocolError as error:
                self._out.append(Close(event.peer, str(error)))
                self._link_down(event.peer, str(error), now, failed=False)
            link = self._links.get(event.peer)
        if link is not None:
            self._dirty[event.peer] = None

    def _frame(self, link: Link, frame: wire.Frame, now: float) -> None:
        match frame:
            case wire.Gossip():
                self._gossip(link, frame, now)
            case wire.Transfer():
                self._transfer(link, frame, now)
            case wire.Proof():
                self._proof(link, frame, now)
            case wire.Ihave() | wire.Graft() | wire.Prune():
                self.broadcast.handle(link, frame, now)
            case wire.Ack():
                if not link.acked(frame.count):
                    raise RemoteProtocolError("an acknowledgement of more than was sent")
            case wire.Summary() | wire.InSync() | wire.Reconcile() | wire.Have() | wire.Done() | wire.Pull() | wire.Gone():
                self.antientropy.handle(link, frame, now)
            case wire.Leave():
                self._link_down(link.peer, "left", now, failed=False)
            case _:
                self.membership.handle(link, frame, now)
        if not isinstance(frame, _FREQUENT):
            self._review = True

    def _gossip(self, link: Link, frame: wire.Gossip, now: float) -> None:
        id = envelope_id(frame.body)
        known = self.log.get(id)
        if known is not None and (known.envelope is not None or known.stream is not None):
            link.note_received(id, True)
            self.broadcast.duplicate(link)
            return
        record = self._take(link, id, frame, now)
        link.note_received(id, True)
        if record is not None:
            self.broadcast.accepted(link, record)
            self.broadcast.push(record, now, without=link.peer)
            self._deliver_on(record, link, now)

    def _transfer(self, link: Link, frame: wire.Transfer, now: float) -> None:
        id = envelope_id(frame.body)
        record = self._take(link, id, frame, now)
        link.note_received(id, True)
        self.broadcast.fetched(id)
        if record is not None:
            if self.sequencer.settled:
                # Others may lack it too, and learn of it now rather than a digest period later; not so what a joiner catches up on.
                self.broadcast.push(record, now, without=link.peer, lazily=True)
            self._deliver_on(record, link, now)
        # Answered only now: ending the round may begin delivery, which must see this envelope.
        self.antientropy.answered(link, id, now)

    def _take(self, link: Link, id: bytes, frame: wire.Gossip | wire.Transfer, now: float) -> Record | None:
        """Verifies an envelope and offers it to the log; the record where it is new, to be relayed and delivered."""
        known = self.log.get(id)
        if known is not None and known.envelope is not None:
            return None
        envelope = open_envelope(self.topic_id, frame.body, frame.signature, self._verify, id=id)
        age = frame.age / 1000
        if age > self._accept_age(now):
            # Not wanted: published before we joined (without replay), or older than what we keep.
            if not self.log.add_gone(id, envelope.time, age, now):
                self.antientropy.unwanted(id, now)
            return None
        self._expected = self.log.ledger.expected(envelope.author, envelope.epoch)
        match self.log.add(envelope, age, frame.hops + 1, now):
            case Outcome.ACCEPTED:
                return self.log.get(id)
            case Outcome.EQUIVOCATION:
                self._convicted(envelope.author, envelope.epoch, now)
            case Outcome.REFUSED:
                self.log.refuse(id)
            case Outcome.EXPIRED:
                self.antientropy.unwanted(id, now)
        return None

    def _deliver_on(self, record: Record, link: Link, now: float) -> None:
        assert record.envelope is not None
        self._review |= self.antientropy.traffic(now)
        had_gap = self.sequencer.has_gap
        if record.envelope.author != self.author:
            self._deliver(self.sequencer.accept(record.envelope, link.peer, self._expected, now))
        if self.sequencer.has_gap and not had_gap:
            self._review = True
            if link.up:
                self.antientropy.open_round(link, now)

    def _deliver(self, deliveries: list[Delivery]) -> None:
        for envelope, source, late in deliveries:
            self._out.append(Deliver(envelope, source, late))

    def _proof(self, link: Link, frame: wire.Proof, now: float) -> None:
        check_proof(frame)
        one = open_envelope(self.topic_id, frame.first, frame.first_signature, self._verify)
        other = open_envelope(self.topic_id, frame.second, frame.second_signature, self._verify)
        if not equivocate(one, other):
            raise RemoteProtocolError("a proof of equivocation that proves nothing")
        if self.log.convict((one, other), frame.age / 1000, now):
            self._convicted(one.author, one.epoch, now)
        self.antientropy.answered(link, equivocation_id(one.author, one.epoch), now)

    def _convicted(self, author: bytes, epoch: int, now: float) -> None:
        """Reports an equivocation once, silences the author for the epoch, and tells the neighbours."""
        self.sequencer.silence(author, epoch)
        record = self.log.get(equivocation_id(author, epoch))
        if record is None or record.proof is None:
            return
        one, other = record.proof
        self._out.append(Equivocated(author, epoch, record.proof))
        data = wire.encode(wire.Proof(self.log.age_ms(record, now), one.body, one.signature, other.body, other.signature))
        for peer in self.membership.active:
            self._out.append(Send(peer, data))

    # -- our own messages -------------------------------------------------------------------------------------

    def _publish(self, event: Publish, now: float) -> None:
        first = event.first
        for payloads in split_batch(event.payloads):
            envelope = seal(self.topic_id, self.author, self.epoch, first, event.time, payloads, self._sign)
            first += len(payloads)
            self.published = envelope.last
            if self.log.add(envelope, 0.0, 0, now) is Outcome.ACCEPTED:
                record = self.log.get(envelope.id)
                if record is not None and record.envelope is not None:
                    self.broadcast.push(record, now)
        self._review |= self.antientropy.traffic(now)

    def _own_first(self, id: bytes) -> int:
        record = self.log.get(id)
        envelope = record.envelope if record else None
        return envelope.first if envelope is not None and (envelope.author, envelope.epoch) == (self.author, self.epoch) else 0

    def _accept_age(self, now: float) -> float:
        """Seconds of age beyond which a body is not wanted."""
        age = self.log.max_age(now)
        if not self.config.replay and self._joined_at is not None:
            age = min(age, now - self._joined_at)
        return age

    # -- finding others ---------------------------------------------------------------------------------------

    def _discovered(self, event: Discovered, now: float) -> None:
        key = event.instance or event.addresses
        if event.instance in self._links or event.instance == self.membership.me.instance:
            return
        self._candidates[key] = (event.instance, event.addresses)
        while len(self._candidates) > MAX_CANDIDATES:
            del self._candidates[self._rng.choice(list(self._candidates))]
        if event.instance:
            self.membership.discovered(event.instance, event.addresses)
        if len(self.membership.active) < self.config.membership.active_size:
            self._out.append(Dial(event.instance, event.addresses))

    def _dial_failed(self, event: DialFailed, now: float) -> None:
        self._candidates.pop(event.instance or event.addresses, None)
        self._probes.pop(event.instance or event.addresses, None)
        if event.instance:
            self.membership.dial_failed(event.instance, now)

    def _heal(self, now: float) -> None:
        """Tries one discovered peer outside our views: two halves that formed apart become one swarm."""
        for peer, until in list(self._healing.items()):
            if until <= now:
                del self._healing[peer]
        self._probes = {key: until for key, until in self._probes.items() if until > now}
        outside = [key for key, (instance, _) in self._candidates.items() if instance not in self._links]
        if outside:
            key = self._rng.choice(outside)
            instance, addresses = self._candidates[key]
            self._probes[key] = now + self.config.heal_interval
            self._out.append(Dial(instance, addresses))

    def _settled(self, link: Link, equal: bool, now: float) -> None:
        """A digest round with this peer has ended."""
        self._deliver(self.sequencer.settle(now))
        if self._healing.pop(link.peer, None) is not None and not equal and not link.up:
            self.membership.request(link, now, high=True)

    # -- time -------------------------------------------------------------------------------------------------

    def _flush(self, event: Event, now: float) -> None:
        """What is due, what is owed, and when to be called next."""
        self._acknowledge()
        times = [self.broadcast.tick(now)]
        # Looking at every deadline for every envelope would cost more than the envelope.
        if self._review or self._scheduled is None or self._scheduled <= now or not isinstance(event, Received | Publish):
            self._review = False
            times += self._tick(now)
        else:
            times.append(self._scheduled)
        self._report_progress()
        at = min((time for time in times if time is not None), default=None)
        if at is not None and at != self._scheduled:
            self._scheduled = at
            self._out.append(Schedule(at))

    def _tick(self, now: float) -> list[float | None]:
        self.log.expire(now)
        self._deliver(self.sequencer.expire(now))
        if self._settle_at is not None and self._settle_at <= now:
            self._deliver(self.sequencer.settle(now))
        if self.sequencer.settled:
            self._settle_at = None
        if self._heal_at is None:
            self._heal_at = now + self.config.heal_interval * self._rng.random()
        elif self._heal_at <= now:
            self._heal_at = now + self.config.heal_interval * (0.75 + self._rng.random() / 2)
            self._heal(now)
        return [
            self.membership.tick(now),
            self.antientropy.tick(now),
            self.log.next_expiry(),
            self.sequencer.deadline,
            self._settle_at,
            self._heal_at,
        ]

    def _acknowledge(self) -> None:
        for peer in self._dirty:
            link = self._links.get(peer)
            count = link.acknowledge(self.log.holds) if link else None
            if count is not None:
                self._out.append(Send(peer, wire.encode(wire.Ack(count))))
        self._dirty.clear()

    def _report_progress(self) -> None:
        active = self.membership.active
        held = [link.holds_through(self.published) for link in active.values()]
        progress = (max(self._progress[0], *held) if held else self._progress[0], min(held, default=0))
        if progress != self._progress:
            self._progress = progress
            self._out.append(Progress(*progress))
