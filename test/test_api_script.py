"""Everything that `Swarm` and `Node` promise to a script, apart from events, delivery and leaving: no event loop runs here."""

import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from script_kit import ALONE, PATIENCE, Collector, Make, deaf, library_threads, meet, pair, party, until

from solyd_swarm import Node, Peer, Pending, Stats, Swarm, SwarmBusy, SwarmLeft, pubsub


@pytest.fixture
def make() -> Iterator[Make]:
    with party() as made:
        yield made


# -- what it is ---------------------------------------------------------------------------------------------------


def test_what_a_swarm_is(make: Make) -> None:
    before = datetime.now(UTC)
    one, other = pair(make)
    assert isinstance(one, Swarm)
    assert one.topic == "room"
    assert one.id.endswith(".ed25519")
    assert len(one.id) == 44 + len(".ed25519")
    assert one.id != other.id
    (peer,) = one.peers
    assert isinstance(peer, Peer)
    assert peer.id == other.id
    assert peer.address.startswith("127.0.0.1:")
    assert before <= peer.since <= datetime.now(UTC)
    assert repr(one) == f"<Swarm 'room' {one.id} 1 neighbours>"
    one.leave().result(PATIENCE)
    assert one.peers == ()
    assert repr(one) == f"<Swarm 'room' {one.id} left>"


def test_stats(make: Make) -> None:
    one, other = pair(make)
    got = Collector()
    other.on("message", got)
    for number in range(3):
        one.publish(number)
    one.flush().result(PATIENCE)
    got.wait(3)
    mine, theirs = one.stats, other.stats
    assert isinstance(mine, Stats)
    assert (mine.neighbors, mine.published, mine.acknowledged, mine.delivered) == (1, 3, 3, 0)
    assert (theirs.neighbors, theirs.published) == (1, 0)
    until(lambda: other.stats.delivered == 3)
    assert (theirs.late, theirs.lagged, theirs.undecodable) == (0, 0, 0)
    assert 1 <= theirs.held <= 3
    assert theirs.held_bytes > 0
    assert mine.bytes_out > 0 < mine.bytes_in
    assert theirs.discovery == {"mdns": "off", "dht": "off", "mainline": "off", "portmap": "off", "bootstrap": "on"}
    with pytest.raises(AttributeError):
        mine.published = 7  # type: ignore[misc]


def test_two_in_one_process_find_one_another_by_mdns() -> None:
    with pubsub("on loopback", dht=False) as one, pubsub("on loopback", dht=False) as other:
        meet(one, other)
        assert [peer.id for peer in one.peers] == [other.id]


# -- publishing ---------------------------------------------------------------------------------------------------


def test_what_is_published_arrives_equal_with_its_id(make: Make) -> None:
    sent = [
        None,
        True,
        -(2**63),
        2**64 - 1,
        0.5,
        "text ☃",
        b"bytes",
        [1, [2, []]],
        {"a": {1: None}, b"b": [True]},
        datetime(2024, 2, 29, 12, 30, 15, 123456, tzinfo=UTC),
    ]
    one, other = pair(make)
    got = Collector()
    other.on("received", got)
    ids = [one.publish(obj) for obj in sent]
    messages = got.wait(len(sent))
    assert [message.data for message in messages] == sent
    assert [type(message.data) for message in messages] == [type(obj) for obj in sent]
    assert [message.id for message in messages] == ids
    assert len(set(ids)) == len(ids)
    one.publish((1, (2,)))
    assert got.wait(len(sent) + 1)[-1].data == [1, [2]]


def test_an_object_is_encoded_at_the_call(make: Make) -> None:
    one, other = pair(make)
    got = Collector()
    other.on("message", got)
    obj = {"list": [1]}
    one.publish(obj)
    obj["list"].append(2)
    assert got.wait() == [{"list": [1]}]


def test_from_many_threads_at_once(make: Make) -> None:
    one, other = pair(make)
    got = Collector()
    other.on("received", got)
    ids: list[list[str]] = [[] for _ in range(8)]

    def publish(thread: int) -> None:
        ids[thread] += [one.publish([thread, number]) for number in range(100)]

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    messages = got.wait(800)
    assert [message.sequence for message in messages] == list(range(1, 801))
    assert {message.id: message.data for message in messages} == {
        id: [thread, number] for thread, of_thread in enumerate(ids) for number, id in enumerate(of_thread)
    }
    for thread in range(8):
        assert [number for of, number in (message.data for message in messages) if of == thread] == list(range(100))


def test_messages_are_not_echoed(make: Make) -> None:
    one, other = pair(make)
    mine, theirs = Collector(), Collector()
    one.on("message", mine)
    other.on("message", theirs)
    one.publish("from one")
    theirs.wait()
    other.publish("from other")
    assert mine.wait() == ["from other"]


def test_busy_when_no_neighbour_accepts(make: Make) -> None:
    one, other = pair(make, publish_buffer=10_000)
    one.publish(bytes(9_000))  # whatever the size, when nothing waits
    one.flush().result(PATIENCE)
    with deaf(other):
        for _ in range(9):
            one.publish(bytes(1_000))
        with pytest.raises(SwarmBusy, match="10000"):
            one.publish(bytes(1_000))
        one.publish(b"there is room for this one")
        with pytest.raises(TimeoutError):
            one.flush().result(0.01)
    one.flush().result(PATIENCE)
    one.publish(bytes(9_000))


def test_alone_the_window_is_the_buffer(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    one = make(publish_buffer=1_000, retain_bytes=20_000)
    for number in range(100):
        one.publish([number, bytes(1_000)])
        until(lambda number=number: one.stats.held == number + 1)
    assert one.stats.held_bytes <= 20_000
    other = make()
    got = Collector()
    other.on("message", got)
    until(lambda: got.calls and got.calls[-1][0] == 99)
    numbers = [number for number, _ in got.calls]
    assert numbers == list(range(100 - len(numbers), 100))
    assert 10 <= len(numbers) < 20
    # What the window could not hold is said to be lost, and not counted as received by anybody.
    one.flush().result(10)
    assert one.stats.lost == 100 - len(numbers)
    assert one.stats.acknowledged == len(numbers)
    assert "leave the window" in caplog.text
    one.leave().result(10)
    assert f"{100 - len(numbers)} of 100 published messages" in caplog.text


# -- waiting ------------------------------------------------------------------------------------------------------


def test_joined(make: Make) -> None:
    one = make()
    joining = one.joined()
    assert isinstance(joining, Pending)
    assert not joining.done()
    with pytest.raises(TimeoutError):
        joining.result(0.01)
    other = make()
    joining.result(PATIENCE)
    other.joined().result(PATIENCE)
    one.joined().result(PATIENCE)  # at once


def test_flush(make: Make) -> None:
    one = make()
    one.flush().result(PATIENCE)  # nothing was published
    one.publish("hello")
    waiting = one.flush()
    with pytest.raises(TimeoutError):
        waiting.result(0.01)  # by one neighbour at least
    other = make()
    waiting.result(PATIENCE)
    assert one.stats.acknowledged == 1
    third = make()
    meet(third)
    one.publish("to both")
    one.flush().result(PATIENCE)
    for swarm in (other, third):
        until(lambda swarm=swarm: swarm.stats.held == 2)


def test_flush_when_the_only_neighbour_that_has_it_has_gone(make: Make) -> None:
    one, other = pair(make)
    one.publish("hello")
    one.flush().result(PATIENCE)
    other.leave().result(PATIENCE)
    until(lambda: not one.peers)
    one.flush().result(PATIENCE)


def test_waiting_ends_with_the_swarm(make: Make) -> None:
    one = make()
    one.publish("to nobody")
    waiting = [one.joined(), one.flush()]
    one.leave().result(PATIENCE)
    for pending in waiting:
        with pytest.raises(SwarmLeft):
            pending.result(PATIENCE)


def test_waiting_in_a_handler_is_refused(make: Make) -> None:
    one, other = pair(make)
    errors = Collector()

    def handler(obj: object) -> None:
        for wait in (one.flush, one.joined, one.leave):
            try:
                wait().result(1)
            except RuntimeError as error:
                errors(type(error))
        try:
            one.wait(1)
        except RuntimeError as error:
            errors(type(error))
        try:
            next(iter(one))
        except RuntimeError as error:
            errors(type(error))

    one.on("message", handler)
    other.publish(1)
    assert errors.wait(5) == [RuntimeError] * 5


# -- nodes --------------------------------------------------------------------------------------------------------


def test_with() -> None:
    with pubsub("room", **ALONE) as swarm:
        assert swarm.publish("x")
    with pytest.raises(SwarmLeft):
        swarm.publish("y")
    until(lambda: not library_threads())


def test_a_node_has_many_topics() -> None:
    with Node(**ALONE) as node, Node(**ALONE, bootstrap=node.ticket) as other:
        assert 1024 <= node.port < 65536 != other.port
        assert node.id != other.id
        got = {}
        for topic in ("red", "green"):
            mine, theirs = node.pubsub(topic), pubsub(topic, node=other)
            assert (mine.id, theirs.id) == (node.id, other.id)
            assert mine.ticket == node.ticket
            meet(mine, theirs)
            got[topic] = Collector()
            mine.on("message", got[topic])
            theirs.publish(topic)
        for topic, collector in got.items():
            assert collector.wait() == [topic]
        with pytest.raises(ValueError, match="red"):
            node.pubsub("red")
        with pytest.raises(ValueError, match="red"):
            pubsub("red", node=node)
        secret = node.pubsub("red", secret="another topic then")
        secret.leave().result(PATIENCE)
        mine.leave().result(PATIENCE)
        assert node.pubsub("green").topic == "green"  # free again
    with pytest.raises(SwarmLeft):
        node.pubsub("blue")
    with pytest.raises(SwarmLeft):
        theirs.publish("late")
    node.close().result(PATIENCE)  # idempotent
    until(lambda: not library_threads())


def test_a_node_is_closed_from_a_handler_and_from_a_thread() -> None:
    node, other = Node(**ALONE), Node(**ALONE)
    one = node.pubsub("room")
    refused = Collector()

    def handler() -> None:
        try:
            node.close().result(1)
        except RuntimeError as error:
            refused(type(error))

    one.on("connected", handler)
    with pubsub("room", **ALONE, bootstrap=node.ticket):
        assert refused.wait() == [RuntimeError]
        node.close().result(PATIENCE)
    thread = threading.Thread(target=lambda: other.close().result(PATIENCE))
    thread.start()
    other.close().result(PATIENCE)
    thread.join(PATIENCE)
    one.wait(PATIENCE)


def test_a_coroutine_handler_may_wait_for_its_node_to_close() -> None:
    node = Node(**ALONE)
    one = node.pubsub("room")
    closed = Collector()

    async def handler() -> None:
        await node.close()
        closed("closed")

    one.on("connected", handler)
    with pubsub("room", **ALONE, bootstrap=node.ticket):
        assert closed.wait() == ["closed"]
        node.close().result(PATIENCE)


def test_swarms_without_node_options_share_one() -> None:
    with pubsub("one") as one, pubsub("two") as two:
        assert one.id == two.id
        assert one.ticket == two.ticket
        with pubsub("one") as again:
            assert again.id != one.id  # two peers, who hear one another
            meet(one, again)
            got = Collector()
            one.on("message", got)
            again.publish("hello")
            assert got.wait() == ["hello"]
            with pubsub("two", **ALONE) as own:
                assert own.id not in (two.id, again.id)
    until(lambda: not library_threads())
    with pubsub("one", mdns=True) as later:
        assert later.id != one.id


def test_the_shared_node_lives_as_long_as_one_of_its_swarms() -> None:
    one = pubsub("one")
    two = pubsub("two")
    one.leave().result(PATIENCE)
    with pubsub("three") as three:
        assert three.id == two.id
    two.leave().result(PATIENCE)
    with pubsub("four") as four:
        assert four.id != two.id


def test_leaving_and_making_at_the_same_time() -> None:
    """Whether the old shared node or a new one is taken, it works."""
    deadline = time.monotonic() + 1
    swarm = pubsub("0")
    for number in range(1, 10_000):
        leaving = swarm.leave()
        swarm = pubsub(str(number))
        swarm.publish(number)
        if time.monotonic() > deadline:
            break
        leaving.result(PATIENCE)
    swarm.leave().result(PATIENCE)
