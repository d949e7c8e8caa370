"""One topic: membership, broadcast and anti-entropy over one log of envelopes, as a machine without IO.

`handle(event, now) -> list[Action]` is all there is to drive it: `now` is passed in, randomness is handed over at
construction, and nothing iterates a set where order could reach the wire, so that equal inputs give equal outputs.
"""

import random
from dataclasses import dataclass, field

from solyd_swarm.core import wire
from solyd_swarm.core.adoption import Adoption
from solyd_swarm.core.antientropy import AntiEntropy, AntiEntropyConfig
from solyd_swarm.core.broadcast import Broadcast, BroadcastConfig
from solyd_swarm.core.doubts import Doubts
from solyd_swarm.core.envelope import Envelope, Signer, Verifier, seal, split_batch, verify_ed25519
from solyd_swarm.core.events import (
    Action,
    Close,
    Congested,
    DialFailed,
    Discovered,
    Drained,
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
from solyd_swarm.core.healing import Healing
from solyd_swarm.core.intake import Intake
from solyd_swarm.core.ledger import Ledger
from solyd_swarm.core.link import Link
from solyd_swarm.core.log import DEFAULT_BYTES, DEFAULT_WINDOW, Log, Outcome
from solyd_swarm.core.membership import Membership, MembershipConfig
from solyd_swarm.core.order import Sequencer
from solyd_swarm.core.wire import PeerInfo, make_peer_info
from solyd_swarm.errors import RemoteProtocolError

SETTLE_TIMEOUT = 3.0
"""Seconds after the first neighbour by which delivery begins even if no digest round has come to its end."""

_NEIGHBOURLY = wire.Gossip | wire.Ihave | wire.Prune | wire.Shuffle | wire.ForwardJoin | wire.View
"""What is sent to neighbours only. (Grafts may answer an announcement of before.)"""
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
        self._out: list[Action] = []
        self._links: dict[bytes, Link] = {}
        self.log = Log(window=config.window, max_bytes=config.max_bytes, ledger=ledger, on_drop=self._dropped)
        self.sequencer = Sequencer(replay=config.replay, gap_wait=config.gap_wait, max_waiting=config.max_bytes)
        self.membership = Membership(me, self._links, self._out, rng, config.membership, self._neighbor_up, self._neighbor_down)
        self.adoption = Adoption(self.membership, self._out)
        active = self.membership.active
        self.doubts = Doubts(self.log.conceal, self.log.reveal)
        self.broadcast = Broadcast(active, self.log, self._out, author, lambda: self.epoch, config.broadcast, self.doubts)
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
        self.intake = Intake(
            topic_id,
            author,
            verify,
            self.log,
            self.sequencer,
            self.broadcast,
            self.antientropy,
            self.doubts,
            active,
            self._out,
            self._accept_age,
        )
        self.healing = Healing(
            self._links,
            self.membership,
            self._out,
            rng,
            interval=config.heal_interval,
            patience=config.antientropy.patience,
            open_round=self.antientropy.open_round,
            lacks=self.antientropy.pulls.rumours.lacks,
            ask=self.antientropy.pulls.seek,
        )
        self._now = 0.0
        self._joined_at: float | None = None
        self._settle_at: float | None = None
        self._progress = (0, 0, 0)
        self._lost = 0  # our own messages that left the window before anybody held them
        self._held_by_gone = 0  # through which sequence some former neighbour held our own messages
        self._changes = 0  # what the log counted when we last looked for what can be acknowledged
        self._dirty = b""  # the link that frames came from: it may be owed an Ack
        self._scheduled: float | None = None
        self._next_review = 0.0  # when the next of the deadlines is due, other than those of the broadcast
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
        return peer in self.membership.active or self.healing.uses(peer) or self.doubts.concerns(peer)

    # -- events -----------------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Action]:
        """Takes in one event and returns what is to be done, in order."""
        self._now = now
        if self._joined_at is None:
            self._joined_at = self.log.started = now
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
                self.healing.discovered(event, now)
            case DialFailed():
                self.healing.dial_failed(event)
                if event.instance not in (b"", *self._links):
                    self.membership.dial_failed(event.instance, now)
            case Congested():
                self._congested(event.peer, True)
            case Drained():
                self._congested(event.peer, False)
            case Quit():
                self.intake.let_go(now)
                for peer in self._links:
                    self._out.append(Send(peer, wire.encode(wire.Leave())))
                self.closed = True

    # -- links ------------------------------------------------------------------------------------------------

    def _link_up(self, event: LinkUp, now: float) -> None:
        if event.peer in self._links:
            # It has come back by this very link: nobody else need be asked to take its place.
            self._link_down(event.peer, "replaced by a new connection", now, failed=False)
        info = make_peer_info(event.peer, event.addresses)
        link = Link(info, event.author, initiated=event.initiated, dialled=event.dialled)
        link.parted_at = now
        self._links[event.peer] = link
        if not self.healing.link_up(link, event, now):
            self.membership.link_up(link, now)

    def _link_down(self, peer: bytes, reason: str, now: float, *, failed: bool) -> None:
        link = self._links.pop(peer, None)
        if link is None:
            return
        if peer in self.membership.active:  # its last acknowledgement may have come with its goodbye
            self._held_by_gone = max(self._held_by_gone, link.holds_through(self.published))
        self._review = True
        self.healing.link_down(peer)
        self.antientropy.link_down(link, now)
        self.membership.link_down(link, reason, now, failed=failed)

    def _neighbor_up(self, link: Link) -> None:
        self.healing.neighbor_up(link.peer)
        self.adoption.changed(self._now)
        self.intake.trust(link.peer, self._now)
        self.broadcast.neighbor_up(link, self._now)
        link.covers_from(self.published)
        self.antientropy.pulls.seek(link, self._now)
        if self._settle_at is None and not self.sequencer.settled:
            self._settle_at = self._now + SETTLE_TIMEOUT
        # One of the two opens the first round; both would only do the work twice. A round that ended before we published more, or
        # while the link was idle, says nothing about that.
        is_opener = self.membership.views.me.instance < link.peer
        if (is_opener and not self.antientropy.is_settled(link.peer)) or (self.antientropy.is_settled(link.peer) and link.lacks_round):
            self.antientropy.open_round(link, self._now)

    def _neighbor_down(self, link: Link) -> None:
        link.parted_at = self._now
        self.adoption.neighbor_down(link.peer)
        self.adoption.changed(self._now)
        self.broadcast.neighbor_down(link)
        if not self.membership.active:
            self.healing.alone(self._now)

    def _congested(self, peer: bytes, congested: bool) -> None:
        link = self._links.get(peer)
        if link is not None:
            link.congested = congested
            if congested:
                link.eager = False  # once drained the tree decides: the peer grafts what it misses
                self.adoption.congested(link, self._now)

    # -- frames -----------------------------------------------------------------------------------------------

    def _received(self, event: Received, now: float) -> None:
        link = self._links.get(event.peer)
        if link is not None:
            link.served = 0
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
            self._dirty = event.peer

    def _frame(self, link: Link, frame: wire.Frame, now: float) -> None:
        if not link.up and isinstance(frame, _NEIGHBOURLY):
            self.membership.stray(link, now)
        match frame:
            case wire.Gossip():
                self._review |= self.intake.gossip(link, frame, now)
            case wire.Transfer():
                self._review |= self.intake.transfer(link, frame, now)
            case wire.Proof():
                self.intake.proof(link, frame, now)
            case wire.Ihave() | wire.Graft() | wire.Prune():
                self.broadcast.handle(link, frame, now)
            case wire.Ack():
                if not link.acked(frame.count):
                    raise RemoteProtocolError("an acknowledgement of more than was sent")
            case wire.Have():
                self.intake.told(link, frame.ids, now)
                self.antientropy.handle(link, frame, now)
            case wire.Summary() | wire.InSync() | wire.Reconcile() | wire.Done():
                self.antientropy.handle(link, frame, now)
            case wire.Pull() | wire.Seek() | wire.Unmatched() | wire.Gone() | wire.GoneRun():
                self.antientropy.handle(link, frame, now)
            case wire.View():
                self.adoption.heard(link, frame)
            case wire.Neighbor() if frame.instead and self.adoption.asked(link, frame):
                pass
            case wire.Leave():
                self._link_down(link.peer, "left", now, failed=False)
            case _:
                self.membership.handle(link, frame, now)
        if not isinstance(frame, _FREQUENT):
            self._review = True

    # -- our own messages -------------------------------------------------------------------------------------

    def _publish(self, event: Publish, now: float) -> None:
        first = event.first
        for place, payloads in enumerate(split_batch(event.payloads)):
            # A microsecond apart, so that the digest, and with it whoever catches up, keeps them in order.
            envelope = seal(self.topic_id, self.author, self.epoch, first, event.time + place, payloads, self._sign)
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

    def _settled(self, link: Link, equal: bool, now: float) -> None:
        """A digest round with this peer has ended."""
        self.intake.deliver(self.sequencer.settle(now))
        self.healing.settled(link, equal, now)

    # -- time -------------------------------------------------------------------------------------------------

    def _flush(self, event: Event, now: float) -> None:
        """What is due, what is owed, and when to be called next."""
        self._acknowledge()
        # Looking at every deadline for every envelope, or for every announcement, would cost more than the envelope.
        if self._review or self._next_review <= now or not isinstance(event, Received | Publish | Tick):
            self._review = False
            self._next_review = self._tick(now)
        due = self.broadcast.tick(now)  # last, since the others have it announce
        if self.published:
            self._report_progress()
        at = self._next_review if due is None else min(due, self._next_review)
        if at != self._scheduled:
            self._scheduled = at
            self._out.append(Schedule(at))

    def _tick(self, now: float) -> float:
        """All that is due but for the broadcast; returns when to come back."""
        self.log.expire(now)
        self.intake.deliver(self.sequencer.expire(now))
        if self._settle_at is not None and self._settle_at <= now:
            self.intake.deliver(self.sequencer.settle(now))
        if self.sequencer.settled:
            self._settle_at = None
        for giver in self.intake.release(now) if self.doubts else ():
            self.healing.divided(giver, now)
        times = (self.antientropy.tick(now), self.doubts.next, self.log.next_expiry(), self.sequencer.deadline, self._settle_at)
        parts = (self.membership.tick(now), self.adoption.tick(now), self.healing.tick(now))
        return min(*parts, *[time for time in times if time is not None])

    def _acknowledge(self) -> None:
        if self._changes != self.log.changes:
            # Others too: what one link announced may have come over another.
            self._changes = self.log.changes
            for link in self._links.values():
                if link.owes or link.peer == self._dirty:
                    self._acknowledge_on(link)
        elif self._dirty and (last := self._links.get(self._dirty)) is not None:
            self._acknowledge_on(last)
        self._dirty = b""

    def _acknowledge_on(self, link: Link) -> None:
        count = link.acknowledge(self.log.holds, lambda id: self.log.may_be_by(id, link.author))
        if count is not None:
            self._out.append(Send(link.peer, wire.encode(wire.Ack(count))))

    def _dropped(self, envelope: Envelope) -> None:
        if (envelope.author, envelope.epoch) == (self.author, self.epoch):
            held = [link.holds_through(self.published) for link in self.membership.active.values()]
            self._lost += max(0, envelope.last - max(self._progress[0], self._held_by_gone, envelope.first - 1, *held))

    def _report_progress(self) -> None:
        active = self.membership.active
        held = [link.holds_through(self.published) for link in active.values()]
        progress = (max(self._progress[0], self._held_by_gone, *held), min(held, default=0), self._lost)
        if progress != self._progress:
            self._progress = progress
            self._out.append(Progress(*progress))
