"""Bodies that are gone: told of in few bytes, believed with care, and sought at every new neighbour all the same."""

from dataclasses import replace
from itertools import pairwise

import pytest
from simulated import Puppet, digests, gossip, star

from solyd_swarm.core import wire
from solyd_swarm.core.antientropy import AntiEntropyConfig
from solyd_swarm.core.link import SERVED_BYTES
from solyd_swarm.core.ordered import fingerprint_of
from solyd_swarm.core.overlay import OverlayConfig
from solyd_swarm.core.wire import decode
from solyd_swarm.simulation.network import Network
from solyd_swarm.simulation.peer import Peer

WINDOW = 10.0
SHORT = OverlayConfig(window=WINDOW)
QUIET = OverlayConfig(
    window=WINDOW, antientropy=AntiEntropyConfig(digest_interval=1000.0, digest_interval_max=1000.0), heal_interval=1000.0
)
Items = list[tuple[int, bytes]]


def published(net: Network, peer: Peer, count: int) -> Items:
    """So many messages of a peer, an envelope each; the items of its digest."""
    for n in range(count):
        net.publish(peer, b"%d" % n)
        net.run(0.001)
    return list(peer.overlay.log.items)


def ask(net: Network, puppet: Puppet, peer: Peer, frame: wire.Frame) -> list[wire.Frame]:
    """What comes back; shuffles and the like may come at any time."""
    heard = len(puppet.heard)
    puppet.send(peer, frame)
    net.run(0.5)
    return [answer for _, answer in puppet.heard[heard:] if isinstance(answer, wire.Transfer | wire.Gone | wire.GoneRun | wire.Have)]


def gone_run(items: Items, age: int) -> wire.GoneRun:
    """As a server would say it of items that are all of one age, in milliseconds."""
    steps = [items[0][0]] + [later - earlier for (earlier, _), (later, _) in pairwise(items)]
    ids = [id for _, id in items]
    return wire.GoneRun(ids[0], ids[-1], fingerprint_of(ids), steps, [age] + [0] * (len(ids) - 1))


def offer(net: Network, puppet: Puppet, peer: Peer, ids: list[bytes]) -> None:
    """Returns once the peer has asked for them."""
    puppet.send(peer, wire.Have(ids))
    assert net.run_until(lambda: bool(puppet.heard_of(wire.Pull)), 5.0)


def made_up(net: Network, count: int) -> Items:
    return [(1000 + number, net.rng.randbytes(32)) for number in range(count)]


# -- who serves -----------------------------------------------------------------------------------------------


def test_what_is_gone_is_told_together(seed: int) -> None:
    net = Network(seed)
    peer = net.add_peer(config=QUIET)
    items = published(net, peer, 40)
    puppet = Puppet(net)
    puppet.connect(peer)
    net.run(WINDOW)
    ids = [id for _, id in items]
    (answer,) = ask(net, puppet, peer, wire.Pull([ids[2], ids[0]], wire.MAX_AGE, [(ids[5], ids[30])]))
    assert isinstance(answer, wire.GoneRun)
    asked = [items[2], items[0], *items[5:31]]
    assert (answer.first, answer.last) == (ids[2], ids[30])
    assert answer.fingerprint == fingerprint_of([id for _, id in asked])
    assert [timestamp for timestamp, _ in answer.entries()] == [timestamp for timestamp, _ in asked]
    records = [peer.overlay.log.get(id) for _, id in asked]
    for record, (_, age) in zip(records, answer.entries(), strict=True):
        assert record is not None
        assert 0 <= net.now - record.born - age / 1000 < 1.0
    assert len(wire.encode(answer)) < 10 * len(asked) + 100


def test_bodies_and_unknown_ids_divide_what_is_told_together(seed: int) -> None:
    net = Network(seed)
    peer = net.add_peer(config=QUIET)
    old = [id for _, id in published(net, peer, 5)]
    net.run(WINDOW)
    (_, new) = published(net, peer, 1)[-1]
    puppet = Puppet(net)
    puppet.connect(peer)
    unknown = bytes(32)
    answers = ask(net, puppet, peer, wire.Pull([*old[:3], new, *old[3:], unknown], wire.MAX_AGE))
    assert [type(answer) for answer in answers] == [wire.GoneRun, wire.Transfer, wire.Gone, wire.Gone, wire.Gone]
    assert [(answer.id, answer.known) for answer in answers if isinstance(answer, wire.Gone)] == [
        (old[3], True),
        (old[4], True),
        (unknown, False),
    ]


def test_what_is_too_old_for_the_asker_is_told_together(seed: int) -> None:
    net = Network(seed)
    peer = net.add_peer(config=QUIET)
    ids = [id for _, id in published(net, peer, 5)]
    puppet = Puppet(net)
    puppet.connect(peer)
    (answer,) = ask(net, puppet, peer, wire.Pull([], 100, [(ids[0], ids[4])]))
    assert isinstance(answer, wire.GoneRun)


def row(peer: Peer, first: tuple[int, bytes], last: tuple[int, bytes]) -> tuple[tuple[int, bytes], tuple[int, bytes], bytes]:
    """As somebody would name it who holds what the peer holds."""
    return first, last, peer.overlay.log.items.fingerprint(*peer.overlay.log.items.places(first, last))


def test_who_seeks_gets_what_is_there_and_no_word_of_the_rest(seed: int) -> None:
    net = Network(seed)
    peer = net.add_peer(config=QUIET)
    published(net, peer, 5)
    net.run(WINDOW - 1.0)
    items = published(net, peer, 5)
    puppet = Puppet(net)
    puppet.connect(peer)
    net.run(1.0)
    # The ends need not be known.
    rows = [row(peer, (0, bytes(32)), items[6]), row(peer, items[8], (2**63 - 1, bytes(32)))]
    answers = ask(net, puppet, peer, wire.Seek(wire.MAX_AGE, rows))
    assert all(isinstance(answer, wire.Transfer) for answer in answers)
    assert len(answers) == 4
    assert ask(net, puppet, peer, wire.Seek(100, [row(peer, items[0], items[9])])) == []
    assert puppet.heard_of(wire.Unmatched) == []


def test_who_holds_something_else_there_says_so(seed: int) -> None:
    net = Network(seed)
    peer = net.add_peer(config=replace(QUIET, window=600.0))
    items = published(net, peer, 5)
    puppet = Puppet(net)
    puppet.connect(peer)
    first, last = (0, bytes(32)), (2**63 - 1, bytes(32))
    rows = [(items[0], items[2], bytes(16)), (items[2], items[1], bytes(16)), (first, first, bytes(16))]
    assert ask(net, puppet, peer, wire.Seek(wire.MAX_AGE, rows)) == []
    assert [frame.ids for frame in puppet.heard_of(wire.Unmatched)] == [[items[0][1], items[2][1], first[1]]]
    published(net, peer, wire.MAX_ROW)
    ask(net, puppet, peer, wire.Seek(wire.MAX_AGE, [row(peer, first, last)]))
    assert puppet.heard_of(wire.Unmatched)[1].ids == [first[1]]  # too long


def test_seeking_is_no_lever(seed: int) -> None:
    net = Network(seed)
    peer = net.add_peer(config=replace(QUIET, window=600.0))
    for _ in range(6):
        net.publish(peer, net.rng.randbytes(SERVED_BYTES // 2))
        net.run(0.001)
    items = list(peer.overlay.log.items)
    puppet = Puppet(net)
    puppet.connect(peer)
    net.run(1.0)
    puppet.heard.clear()
    ask(net, puppet, peer, wire.Seek(wire.MAX_AGE, [row(peer, items[0], items[-1])] * wire.MAX_ROWS))
    assert sum(len(frame.body) for frame in puppet.heard_of(wire.Transfer)) <= 2 * SERVED_BYTES
    assert 0 < sum(len(have.ids) for have in puppet.heard_of(wire.Have)) <= SERVED_BYTES // 32


# -- who asks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replay", [True, False])
def test_a_joiner_is_told_of_what_is_gone_once(replay: bool, seed: int) -> None:
    """Nobody lists the same ids again and again, whoever else it meets meanwhile."""
    net = Network(seed)
    peers = star(net, 8, config=SHORT)
    net.run(10.0)
    published(net, peers[0], 400)
    net.run(WINDOW)
    listed = told = 0

    def see(sender: Peer, receiver: Peer, data: bytes) -> bool:
        nonlocal listed, told
        if receiver is joiner:
            listed += len(data) if data[0] == wire.Reconcile.TYPE else 0
            told += len(data) if data[0] in (wire.Gone.TYPE, wire.GoneRun.TYPE) else 0
        return True

    joiner = net.add_peer(config=replace(SHORT, replay=replay))
    net.filter = see
    net.discover(joiner, peers[3])
    assert net.run_until(lambda: len(joiner.overlay.log) == 400, 5.0)
    net.run(4.0)
    assert len(joiner.overlay.neighbors) >= 2
    assert len(digests([joiner, *peers])) == 1
    assert listed < 3 * 32 * 400
    assert told < 3 * 10 * 400


def test_a_joiner_catches_up_while_the_oldest_ids_expire(seed: int) -> None:
    """The first of a run may have expired by when it is asked for; the joiner must not wait for it, nor ask two by two."""
    net = Network(seed, latency=(0.1, 0.1), config=SHORT)
    server = net.add_peer()
    for n in range(1250):  # over two windows and a half
        net.publish(server, b"%d" % n)
        net.run(WINDOW / 500)
    joiner = net.add_peer()
    net.discover(joiner, server)
    assert net.run_until(lambda: joiner.overlay.antientropy.is_settled(server.id), 2.5)
    assert len(joiner.messages) >= 300
    assert joiner.messages == [b"%d" % n for n in range(1250 - len(joiner.messages), 1250)]


def test_the_word_of_the_only_neighbour_is_enough_and_every_other_is_asked(seed: int) -> None:
    net = Network(seed)
    peer, puppet, author = net.add_peer(), Puppet(net), Puppet(net, "author")
    envelopes = [author.seal(n, b"%d" % n, time=1000 + n) for n in range(1, 31)]
    items = [(envelope.time, envelope.id) for envelope in envelopes]
    puppet.connect(peer)
    offer(net, puppet, peer, [id for _, id in items])
    assert puppet.heard_of(wire.Pull)[0].ids == [id for _, id in items]
    puppet.send(peer, gone_run(items, 900_000))
    net.run(0.1)
    assert list(peer.overlay.log.items) == items
    # By range, in one frame, from whoever comes; although it was said to be past the window.
    one = net.add_peer()
    author.connect(one)
    author.send(one, *map(gossip, envelopes))
    net.run(0.5)
    sought: list[wire.Seek] = []

    def see(sender: Peer, receiver: Peer, data: bytes) -> bool:
        frame = decode(data)
        if sender is peer and isinstance(frame, wire.Seek):
            sought.append(frame)
        return True

    net.filter = see
    net.discover(one, peer)
    assert net.run_until(lambda: len(peer.messages) == 30, 3.0)
    assert [(first, last) for first, last, _ in sought[0].rows] == [(items[0], items[-1])]


@pytest.mark.parametrize("shift", [1, 5000])
def test_a_wrong_timestamp_hides_no_body(shift: int, seed: int) -> None:
    """Neither the sums of ids nor rows show it."""
    net = Network(seed)
    peer, liar, author = net.add_peer(), Puppet(net, "liar"), Puppet(net, "author")
    envelopes = [author.seal(n, b"%d" % n, time=1000 * n) for n in range(1, 31)]
    liar.connect(peer)
    offer(net, liar, peer, [envelope.id for envelope in envelopes])
    liar.send(peer, gone_run([(envelope.time + shift, envelope.id) for envelope in envelopes], 900_000))
    net.run(0.1)
    assert len(peer.overlay.log) == 30
    one = net.add_peer()
    author.connect(one)
    author.send(one, *map(gossip, envelopes))
    net.run(0.5)
    net.discover(one, peer)
    assert net.run_until(lambda: len(peer.messages) == 30, 5.0)
    assert list(peer.overlay.log.items) == list(one.overlay.log.items)


def test_a_neighbour_is_asked_once_for_what_others_say_is_gone(seed: int) -> None:
    net = Network(seed)
    peer, one, other = net.add_peer(), Puppet(net, "one"), Puppet(net, "other")
    items = made_up(net, 50)
    one.connect(peer)
    offer(net, one, peer, [id for _, id in items])
    one.send(peer, gone_run(items, 1000))
    net.run(0.1)
    other.connect(peer, join=False)
    for _ in range(20):
        other.send(peer, wire.Neighbor(True), wire.Disconnect([]))
    net.run(1.0)
    assert len(other.heard_of(wire.Seek)) == 1
    net.run(60.0)
    assert len(other.heard_of(wire.Seek)) == 1


def test_of_two_neighbours_both_are_asked_and_the_second_by_the_ends(seed: int) -> None:
    net = Network(seed)
    peer, one, other = net.add_peer(), Puppet(net, "one"), Puppet(net, "other")
    items = made_up(net, 20)
    for puppet in (one, other):
        puppet.connect(peer)
    offer(net, one, peer, [id for _, id in items])
    one.send(peer, gone_run(items, 1000))
    net.run(0.1)
    assert len(peer.overlay.log) == 0
    (pull,) = other.heard_of(wire.Pull)
    assert (pull.ids, pull.runs) == ([], [(items[0][1], items[-1][1])])
    other.send(peer, gone_run(items, 1000))
    net.run(0.1)
    assert list(peer.overlay.log.items) == items


def test_a_second_neighbour_is_asked_in_the_order_of_the_digest(seed: int) -> None:
    """In whatever order the first one offered and answered."""
    net = Network(seed)
    peer, one, other = net.add_peer(), Puppet(net, "one"), Puppet(net, "other")
    items = made_up(net, 20)
    for puppet in (one, other):
        puppet.connect(peer)
    mixed = items[10:] + items[:10]
    offer(net, one, peer, [id for _, id in mixed])
    one.send(peer, gone_run(mixed, 1000))
    net.run(0.1)
    (pull,) = other.heard_of(wire.Pull)
    assert (pull.ids, pull.runs) == ([], [(items[0][1], items[-1][1])])


def test_a_liar_that_changes_its_word_does_not_undo_that_of_others(seed: int) -> None:
    net = Network(seed)
    peer, liar, one, other = net.add_peer(), Puppet(net, "liar"), Puppet(net, "one"), Puppet(net, "other")
    ((_, id),) = made_up(net, 1)
    for puppet in (liar, one, other):
        puppet.connect(peer)
    for puppet, timestamp in ((one, 7), (liar, 1), (other, 7)):
        offer(net, puppet, peer, [id])
        puppet.send(peer, wire.Gone(id, True, timestamp, 1000))
        net.run(0.1)
    assert list(peer.overlay.log.items) == [(7, id)]


def test_what_is_left_of_a_run_whose_end_has_expired_is_asked_for_at_once(seed: int) -> None:
    net = Network(seed)
    peer, one, other = net.add_peer(), Puppet(net, "one"), Puppet(net, "other")
    items = made_up(net, 20)
    ids = [id for _, id in items]
    for puppet in (one, other):
        puppet.connect(peer)
    offer(net, one, peer, ids)
    one.send(peer, gone_run(items, 1000))
    net.run(0.1)
    assert other.heard_of(wire.Pull)[0].runs == [(ids[0], ids[-1])]
    other.heard.clear()
    other.send(peer, wire.Gone(ids[0], False, 0, 0), wire.Gone(ids[-1], True, items[-1][0], 1000))
    net.run(0.1)
    (pull,) = other.heard_of(wire.Pull)
    assert (pull.ids, pull.runs) == (ids[1:-1], [])


def test_two_that_disagree_on_the_timestamp_are_not_believed(seed: int) -> None:
    net = Network(seed)
    peer, *puppets = net.add_peer(), Puppet(net, "one"), Puppet(net, "two"), Puppet(net, "three")
    ((_, id),) = made_up(net, 1)
    for puppet in puppets:
        puppet.connect(peer)
    for puppet, timestamp, believed in zip(puppets, (1, 2, 2), (False, False, True), strict=True):
        offer(net, puppet, peer, [id])
        puppet.send(peer, wire.Gone(id, True, timestamp, 1000))
        net.run(0.1)
        assert peer.overlay.log.holds(id) == believed
    assert list(peer.overlay.log.items) == [(2, id)]


def test_a_wrong_timestamp_is_put_right(seed: int) -> None:
    """Else digests would differ until the id expires."""
    net = Network(seed)
    config = OverlayConfig(window=60.0)
    peers = star(net, 4, config=config)
    published(net, peers[0], 5)
    net.run(61.0)
    ids = [id for _, id in peers[0].overlay.log.items]
    victim, liar = net.add_peer(config=config), Puppet(net, "liar")
    liar.connect(victim)
    offer(net, liar, victim, ids)
    liar.send(victim, gone_run([(1 + place, id) for place, id in enumerate(ids)], 61_000))
    net.run(0.1)
    assert [timestamp for timestamp, _ in victim.overlay.log.items] == [1, 2, 3, 4, 5]
    for peer in peers:
        net.discover(victim, peer)
    right = list(peers[0].overlay.log.items)
    assert net.run_until(lambda: list(victim.overlay.log.items) == right, 40.0)


@pytest.mark.parametrize("lie", ["another number", "another fingerprint"])
def test_a_run_that_is_not_what_was_asked_for_is_asked_for_one_by_one(lie: str, seed: int) -> None:
    net = Network(seed)
    peer, puppet = net.add_peer(), Puppet(net)
    items = made_up(net, 12)
    puppet.connect(peer)
    offer(net, puppet, peer, [id for _, id in items])
    answer = gone_run(items, 1000)
    if lie == "another number":
        answer = wire.GoneRun(answer.first, answer.last, answer.fingerprint, answer.timestamps[:-1], answer.ages[:-1])
    else:
        answer = wire.GoneRun(answer.first, answer.last, bytes(16), answer.timestamps, answer.ages)
    puppet.heard.clear()
    puppet.send(peer, answer)
    net.run(0.1)
    assert len(peer.overlay.log) == 0
    assert net.run_until(lambda: bool(puppet.heard_of(wire.Pull)), 5.0)
    (pull,) = puppet.heard_of(wire.Pull)
    assert (pull.ids, pull.runs) == ([id for _, id in items], [])
    puppet.send(peer, *[wire.Gone(id, True, timestamp, 1000) for timestamp, id in items])
    net.run(0.1)
    assert list(peer.overlay.log.items) == items
    assert not peer.closed


def test_an_answer_to_nothing_says_nothing(seed: int) -> None:
    net = Network(seed)
    peer, puppet = net.add_peer(), Puppet(net)
    items = made_up(net, 5)
    puppet.connect(peer)
    puppet.send(peer, gone_run(items, 1000))
    offer(net, puppet, peer, [id for _, id in items[1:4]])
    puppet.send(peer, gone_run(items, 1000), gone_run(items[::-1], 1000))
    net.run(0.1)
    assert len(peer.overlay.log) == 0
    assert not peer.closed


def test_a_run_of_what_cannot_be_ends_the_channel(seed: int) -> None:
    net = Network(seed)
    peer, puppet = net.add_peer(), Puppet(net)
    puppet.connect(peer)
    puppet.send(peer, wire.GoneRun(bytes(32), bytes(32), bytes(16), [1], []))
    net.run(0.2)
    assert [close.reason for close in peer.closed] == ["1 timestamps and 0 ages in a GoneRun"]
