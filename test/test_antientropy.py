"""Digest rounds and pulls: nearly free when there is nothing to say, complete when there is, and no prey to those who lie."""

from collections import Counter

import pytest
from simulated import Puppet, digests, gossip, mesh, star

from solyd_swarm.core import pulling as module
from solyd_swarm.core import rumours, wire
from solyd_swarm.core.antientropy import AntiEntropyConfig
from solyd_swarm.core.events import Received
from solyd_swarm.core.overlay import OverlayConfig
from solyd_swarm.core.reconcile import Negentropy
from solyd_swarm.core.wire import decode
from solyd_swarm.simulation.network import Network
from solyd_swarm.simulation.peer import Peer

DIGESTS = (wire.Summary, wire.InSync, wire.Reconcile, wire.Have, wire.Done, wire.Pull, wire.Transfer, wire.Gone)


class Meter:
    """Frames and bytes of anti-entropy."""

    def __init__(self, net: Network) -> None:
        self.frames: Counter[str] = Counter()
        self.bytes = 0
        net.filter = self._see

    def _see(self, sender: Peer, receiver: Peer, data: bytes) -> bool:
        frame = decode(data)
        if isinstance(frame, DIGESTS):
            self.frames[type(frame).__name__] += 1
            self.bytes += len(data)
        return True


def test_equal_and_idle_members_exchange_next_to_nothing(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 10)
    for n in range(500):
        net.publish(peers[n % 10], b"%d" % n)
        net.run(0.01)
    net.run(30.0)
    meter = Meter(net)
    net.run(100.0)
    assert meter.frames.keys() <= {"Summary", "InSync"}
    healing = 10 * 100 / 15  # each member compares with somebody outside its view, too
    assert 10 * 100 / 15 <= meter.frames["Summary"] <= 10 * 100 / 7 + healing
    assert abs(meter.frames["Summary"] - meter.frames["InSync"]) <= 3  # some are on their way
    assert meter.bytes <= (10 * 100 / 7 + healing) * 60


def test_rounds_come_often_while_traffic_flows_and_seldom_afterwards(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 2)
    meter = Meter(net)
    for n in range(100):
        net.publish(peers[0], b"%d" % n)
        net.run(0.1)
    assert 10 <= meter.frames["Summary"] <= 30
    before = meter.frames["Summary"]
    net.run(100.0)
    assert meter.frames["Summary"] - before <= 45


def test_a_large_difference_is_settled_in_one_conversation(seed: int) -> None:
    net = Network(seed)
    one, other = net.add_peer(), net.add_peer()
    for peer in (one, other):
        for n in range(3000):
            net.publish(peer, b"%d" % n)
            net.run(0.0001)
    meter = Meter(net)
    net.discover(one, other)
    net.run(5.0)
    assert len(one.messages) == len(other.messages) == 3000
    assert len(digests([one, other])) == 1
    # A Have of a round that crosses a Pull reads like "ask again": a few are then sent twice.
    assert 6000 <= meter.frames["Transfer"] <= 6200
    assert meter.frames["Reconcile"] < 60


def test_a_member_that_misses_pushes_gets_them_by_digest(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 5)
    net.filter = lambda sender, receiver, data: not isinstance(decode(data), wire.Gossip | wire.Ihave)
    for n in range(20):
        net.publish(peers[n % 5], b"%d" % n)
        net.run(0.1)
    assert net.run_until(lambda: all(len(peer.messages) == 16 for peer in peers), 15.0)


def test_a_gap_is_pulled_at_once(seed: int) -> None:
    """Not a digest period later."""
    slow = OverlayConfig(antientropy=AntiEntropyConfig(digest_interval=2.0, digest_interval_max=100.0))
    net = Network(seed, config=slow)
    one, other = mesh(net, 2, settle=300.0)
    net.filter = lambda sender, receiver, data: b"lost on the way" not in data or data[0] != wire.Gossip.TYPE
    net.publish(one, b"lost on the way")
    net.publish(one, b"arrives")
    assert net.run_until(lambda: other.messages == [b"lost on the way", b"arrives"], 0.5)


def test_pulls_are_spread_and_nothing_is_fetched_twice(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 6)
    for n in range(200):
        net.publish(peers[n % 6], b"%d" % n)
        net.run(0.01)
    net.run(3.0)
    meter = Meter(net)
    joiner = net.add_peer()
    for peer in peers[:4]:
        net.discover(joiner, peer)
    net.run(5.0)
    assert sorted(joiner.messages) == sorted(b"%d" % n for n in range(200))
    assert meter.frames["Transfer"] <= 220


# -- gone -----------------------------------------------------------------------------------------------------


def test_what_has_no_body_any_more_is_known_by_id_and_not_asked_for_again(seed: int) -> None:
    net = Network(seed, config=OverlayConfig(window=100.0))
    peers = mesh(net, 3)
    for n in range(10):
        net.publish(peers[0], b"%d" % n)
        net.run(0.1)
    net.run(105.0)
    joiner = net.add_peer()
    net.discover(joiner, peers[0])
    assert net.run_until(lambda: len(digests([*peers, joiner])) == 1, 45.0)
    assert len(joiner.overlay.log) == 10
    assert joiner.messages == []
    net.run(2.0)
    meter = Meter(net)
    net.run(20.0)
    assert meter.frames.keys() <= {"Summary", "InSync"}


def test_with_one_neighbour_only_its_word_counts_after_a_while(seed: int) -> None:
    net = Network(seed, config=OverlayConfig(window=100.0))
    one, other = star(net, 2)
    net.run(2.0)
    net.publish(one, b"old")
    net.run(105.0)
    net.crash(other)
    joiner = net.add_peer()
    net.discover(joiner, one)
    assert net.run_until(lambda: len(digests([one, joiner])) == 1, 60.0)


def test_members_without_replay_do_not_hide_from_a_joiner_what_others_hold(seed: int) -> None:
    """They know by id what they did not want, and say that it is gone."""
    net = Network(seed)
    old = net.add_peer()
    for n in range(20):
        net.publish(old, b"%d" % n)
        net.run(0.01)
    net.run(5.0)
    fresh = [net.add_peer(config=OverlayConfig(replay=False)) for _ in range(4)]
    for peer in fresh:
        net.discover(peer, old)
    assert net.run_until(lambda: len(digests([old, *fresh])) == 1, 70.0)
    joiner = net.add_peer()
    for peer in fresh:
        net.discover(joiner, peer)
    net.run(2.0)
    net.discover(joiner, old)
    assert net.run_until(lambda: len(joiner.messages) == 20, 10.0)
    assert not any(peer.messages for peer in fresh)


class Liar(Puppet):
    """Offers an id to a victim and answers every pull of it in its own way."""

    def answer(self, victim: Peer, id: bytes, *answers: wire.Frame) -> None:
        asked = len(self.heard_of(wire.Pull))
        self.send(victim, wire.Have([id]))
        self.net.run(0.3)
        if len(self.heard_of(wire.Pull)) > asked:
            self.send(victim, *answers)
            self.net.run(0.05)


@pytest.mark.parametrize("answer", ["gone", "gone long ago", "nearly expired", "unknown", "later", "nothing"])
def test_no_answer_of_a_liar_keeps_an_envelope_out(answer: str, seed: int) -> None:
    """Neither by push, nor by announcement, nor by digest."""
    net = Network(seed)
    one, other = star(net, 2)
    net.run(3.0)
    late = net.add_peer(name="late author")
    net.publish(late, b"wanted")
    ((time, id),) = late.overlay.log.items
    liar = Liar(net)
    for peer in (one, other):
        liar.connect(peer)
        answers = {
            "gone": [wire.Gone(id, True, time, 1000)],
            "gone long ago": [wire.Gone(id, True, time, 700_000)],
            "nearly expired": [wire.Gone(id, True, time, 1_199_999)],
            "unknown": [wire.Gone(id, False, 0, 0)],
            "later": [wire.Have([id])],
            "nothing": [],
        }
        liar.answer(peer, id, *answers[answer])
    net.discover(late, one)
    assert net.run_until(lambda: one.messages == [b"wanted"] and other.messages == [b"wanted"], 12.0)


def test_an_id_that_two_liars_call_gone_is_still_taken_from_who_announces_it(seed: int) -> None:
    net = Network(seed)
    one, other = star(net, 2)
    net.run(3.0)
    first, second = Liar(net, "first liar"), Liar(net, "second liar")
    envelope = first.seal(1, b"wanted")
    for liar in (first, second):
        liar.connect(other)
        liar.answer(other, envelope.id, wire.Gone(envelope.id, True, 1, 1000))
    assert other.overlay.log.holds(envelope.id)
    one.overlay.neighbors[other.id].eager = False
    first.connect(one)
    first.send(one, gossip(envelope))
    net.run(2.0)
    assert other.messages == [b"wanted"]


def test_one_liar_does_not_hide_an_envelope_from_the_digest(seed: int) -> None:
    net = Network(seed)
    one, other = star(net, 2)
    net.run(3.0)
    liar, author = Liar(net, "liar"), Puppet(net, "author")
    envelope = author.seal(1, b"wanted")
    liar.connect(other)
    liar.answer(other, envelope.id, wire.Gone(envelope.id, True, 1, 900_000))
    assert liar.heard_of(wire.Pull)
    net.filter = lambda sender, receiver, data: receiver is not other or not isinstance(decode(data), wire.Gossip | wire.Ihave)
    author.connect(one)
    author.send(one, gossip(envelope))
    assert net.run_until(lambda: other.messages == [b"wanted"], 15.0)


def test_what_two_liars_call_gone_is_asked_of_a_new_neighbour(seed: int) -> None:
    net = Network(seed)
    other = net.add_peer()
    first, second, author = Liar(net, "first liar"), Liar(net, "second liar"), Puppet(net, "author")
    envelope = author.seal(1, b"wanted")
    for liar in (first, second):
        liar.connect(other)
        liar.answer(other, envelope.id, wire.Gone(envelope.id, True, 1, 900_000))
    assert other.overlay.log.holds(envelope.id)
    one = net.add_peer()
    author.connect(one)
    author.send(one, gossip(envelope))
    net.run(0.5)
    net.discover(one, other)
    assert net.run_until(lambda: other.messages == [b"wanted"], 3.0)


def test_who_puts_off_for_ever_does_not_keep_a_joiner_from_asking_others(seed: int) -> None:
    """A neighbour that answers each pull by offering the same again, without ever giving it."""
    net = Network(seed)
    peers = mesh(net, 3)
    for n in range(30):
        net.publish(peers[0], b"%d" % n)
    net.run(2.0)
    joiner = net.add_peer()
    puppet = Puppet(net)
    ids = [id for _, id in peers[0].overlay.log.items]

    def put_off() -> None:
        for pull in puppet.heard_of(wire.Pull):
            puppet.send(joiner, wire.Have(pull.ids))
        puppet.heard.clear()
        net.after(0.001, put_off)

    puppet.connect(joiner)
    puppet.send(joiner, wire.Have(ids))
    put_off()
    net.run(0.5)
    net.discover(joiner, peers[1])
    assert net.run_until(lambda: len(joiner.messages) == 30, 8.0)


# -- bounds ---------------------------------------------------------------------------------------------------


def test_ids_that_nobody_has_are_bounded(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MAX_QUEUE", "MAX_REFUSED"):
        monkeypatch.setattr(module, name, 500)
    monkeypatch.setattr(rumours, "MAX_SAID_ONCE", 500)
    net = Network(seed)
    peers = mesh(net, 2)
    puppet = Puppet(net)
    puppet.connect(peers[0])
    for n in range(40):
        puppet.send(peers[0], wire.Have([(n * 100 + k).to_bytes(32, "big") for k in range(100)]))
    for _ in range(60):
        net.run(0.3)
        pulls, puppet.heard = puppet.heard_of(wire.Pull), []
        for place, pull in enumerate(pulls):
            puppet.send(peers[0], *[wire.Gone(id, place % 2 == 0, 1, 1) for id in pull.ids])
    pulls_state = peers[0].overlay.antientropy.pulls
    queue = pulls_state._queues[puppet.peer.id]
    assert len(queue.todo) <= 500
    assert len(queue.refused) <= 500
    assert len(queue.asked) <= 64
    assert len(pulls_state.rumours._words) <= 501
    net.publish(peers[1], b"still heard")
    net.run(2.0)
    assert peers[0].messages == [b"still heard"]
    net.cut(peers[0], puppet.peer)
    assert puppet.peer.id not in pulls_state._queues
    assert not pulls_state._pulling


def test_a_queue_that_overflowed_is_not_called_done(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Done says that everything was asked for; the other side takes it for held."""
    monkeypatch.setattr(module, "MAX_QUEUE", 20)
    for n in range(4):  # either may lead the round
        overflow(Network(seed + n))


def overflow(net: Network) -> None:
    one, other = net.add_peer(), net.add_peer()
    for n in range(100):
        net.publish(one, b"%d" % n)
        net.run(0.001)
    claims: list[tuple[int, int]] = []
    handle = one.overlay.handle

    def spy(event: object, now: float) -> object:
        actions = handle(event, now)  # type: ignore[arg-type]
        for action in actions:
            if type(action).__name__ == "Progress":
                claims.append((action.by_all, len(other.overlay.log)))
        return actions

    one.overlay.handle = spy  # type: ignore[assignment, method-assign]
    net.discover(other, one)
    assert net.run_until(lambda: len(other.messages) == 100, 90.0)
    net.run(30.0)
    assert all(claimed <= held for claimed, held in claims)
    assert claims[-1] == (100, 100)


@pytest.mark.parametrize("kind", ["Pull", "Pull of a proof", "Graft", "Reconcile"])
def test_small_frames_cannot_ask_for_everything_many_times(kind: str, seed: int) -> None:
    net = Network(seed)
    one, _ = mesh(net, 2)
    for n in range(8):
        net.publish(one, bytes([n]) * 400_000)
        net.run(0.01)
    puppet = Puppet(net)
    puppet.connect(one, join=False)
    ids = [id for _, id in one.overlay.log.items]
    if kind == "Pull of a proof":
        yes, no = puppet.seal(1, bytes(400_000)), puppet.seal(1, bytes(400_001))
        puppet.send(one, gossip(yes), gossip(no))
        net.run(1.0)
        ids = [id for _, id in one.overlay.log.items if (record := one.overlay.log.get(id)) and record.proof]
        assert ids
    frame = {
        "Pull": wire.Pull(ids * 100, 2**40),
        "Pull of a proof": wire.Pull(ids * 1000, 2**40),
        "Graft": wire.Graft(ids * 100),
        "Reconcile": wire.Reconcile(1, True, Negentropy().initiate()),
    }[kind]
    before = net.bytes_sent
    net.feed(one, Received(puppet.peer.id, [wire.encode(frame)] * 40))
    assert net.bytes_sent - before < 1024 * 1024 + 900_000 + 40 * 1000 * 40


def test_a_conversation_that_is_never_ended_leaves_the_others_alone(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 3)
    for n in range(50):
        net.publish(peers[0], b"%d" % n)
    net.run(1.0)
    puppet = Puppet(net)
    puppet.connect(peers[0])
    for n in range(100):
        puppet.send(peers[0], wire.Summary(n, n, bytes(16)))
        net.run(0.1)
        for frame in puppet.heard_of(wire.Reconcile):
            puppet.send(peers[0], wire.Reconcile(frame.round, False, Negentropy(items=None).reconcile(frame.message).reply or b"a"))
        puppet.heard.clear()
    net.publish(peers[1], b"heard")
    net.run(3.0)
    assert peers[0].messages == [b"heard"]
    assert len(digests(peers)) == 1


def test_rounds_without_an_answer_are_bounded(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 2)
    puppet = Puppet(net)
    puppet.connect(peers[0])
    net.run(300.0)
    for session in peers[0].overlay.antientropy._sessions.values():
        assert len(session.opened) <= 5


def test_a_pull_that_is_not_answered_is_made_elsewhere(seed: int) -> None:
    net = Network(seed)
    peers = mesh(net, 3)
    envelope_ids: list[bytes] = []
    joiner = net.add_peer()
    puppet = Puppet(net)
    puppet.connect(joiner)
    for n in range(5):
        net.publish(peers[0], b"%d" % n)
        net.run(0.1)
    envelope_ids = [id for _, id in peers[0].overlay.log.items]
    puppet.send(joiner, wire.Have(envelope_ids))
    net.run(0.3)
    assert puppet.heard_of(wire.Pull)
    net.discover(joiner, peers[1])
    assert net.run_until(lambda: len(joiner.messages) == 5, 7.0)
