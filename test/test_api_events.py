"""Every event of a swarm, with its arguments and its order, in a script."""

import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from script_kit import PATIENCE, Collector, Make, meet, on_loop, pair, party, start, until

import solyd_swarm.swarm


@pytest.fixture
def make() -> Iterator[Make]:
    with party() as made:
        yield made


# -- listeners ----------------------------------------------------------------------------------------------------


def test_on_once_and_remove_listener(make: Make) -> None:
    one, other = pair(make)
    every, first, removed, decorated, decorated_once = (Collector() for _ in range(5))
    assert one.on("message", every) is every
    assert one.once("message", first) is first
    one.on("message", removed)

    @one.on("message")
    def on_message(obj: Any) -> None:
        decorated(obj)

    @one.once("message")
    def on_first(obj: Any) -> None:
        decorated_once(obj)

    one.remove_listener("message", removed)
    for number in range(3):
        other.publish(number)
    assert every.wait(3) == decorated.wait(3) == [0, 1, 2]
    assert first.calls == decorated_once.calls == [0]
    assert removed.calls == []
    on_message("it is still a function")
    assert decorated.calls[-1] == "it is still a function"


def test_an_unknown_event_is_warned_about(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    one = make()
    one.on("mesage", print)
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "'mesage'" in record.getMessage()
    assert "did you mean 'message'?" in record.getMessage()
    with pytest.raises(TypeError, match="callable"):
        one.on("message", "print")  # type: ignore[call-overload]


def test_emit_never_raises(make: Make) -> None:
    one = make()

    def bad(*_: object) -> None:
        raise ValueError("bad")

    got = Collector()
    one.on("message", bad)
    one.on("message", got)
    assert one.emit("message", 1) is True
    assert got.calls == [1]
    assert one.emit("error", ValueError("nobody listens")) is False


# -- neighbours ---------------------------------------------------------------------------------------------------


def test_connected_before_the_first_message(make: Make) -> None:
    one = make()
    order = Collector()
    one.on("connected", lambda: order("connected"))
    one.on("neighbor_up", lambda peer: order(("up", peer.id)))
    one.on("message", order)
    other = make()
    other.publish("at once")
    assert order.wait(3) == ["connected", ("up", other.id), "at once"]


def test_a_connected_listener_is_called_once_whenever_it_was_added(make: Make) -> None:
    one = make()
    early, while_connected, once, early_once, removed = (Collector() for _ in range(5))
    one.on("connected", early)
    one.once("connected", early_once)
    other = make()
    early.wait()
    one.on("connected", while_connected)
    one.once("connected", once)
    one.on("connected", removed)
    while_connected.wait()
    once.wait()
    one.on("connected", while_connected)  # is there already
    third = make()
    meet(third)
    last = Collector()
    one.on("connected", last)
    last.wait()
    assert [len(each.calls) for each in (early, early_once, while_connected, once)] == [1, 1, 1, 1]
    gone = Collector()
    one.on("disconnected", gone)
    for swarm in (other, third):
        swarm.leave().result(PATIENCE)
    gone.wait()
    meet(make(bootstrap=one.ticket))
    assert len(early.wait(2)) == len(while_connected.wait(2)) == 2
    assert (len(once.calls), len(early_once.calls)) == (1, 1)


def test_a_connected_listener_added_in_the_very_moment_is_called_once(make: Make) -> None:
    one = make()
    collectors = []
    make()
    while not one.peers or len(collectors) < 50:
        collectors.append(Collector())
        one.on("connected", collectors[-1])
    for collector in collectors:
        collector.wait()
    done = Collector()
    one.on("connected", done)
    done.wait()
    assert {len(collector.calls) for collector in collectors} == {1}


def test_a_connected_listener_that_is_removed_at_once_is_not_called(make: Make) -> None:
    one, _ = pair(make)
    busy = threading.Event()
    last, removed = Collector(), Collector()
    one.on("connected", lambda: busy.wait(PATIENCE))
    one.on("connected", removed)
    one.remove_listener("connected", removed)
    busy.set()
    one.on("connected", last)
    last.wait()
    assert removed.calls == []


def test_neighbours_come_and_go(make: Make) -> None:
    one = make()
    order = Collector()
    for event in ("connected", "disconnected", "left"):
        one.on(event, lambda event=event: order(event))
    one.on("neighbor_up", lambda peer: order(("up", peer.id)))
    one.on("neighbor_down", lambda peer, reason: order(("down", peer.id, reason)))
    ids = []
    for times in (1, 2):
        other = make()
        ids.append(other.id)
        order.wait(4 * times - 2)
        other.leave().result(PATIENCE)
        order.wait(4 * times)
    one.leave().result(PATIENCE)
    assert order.calls == [
        *("connected", ("up", ids[0]), ("down", ids[0], "left"), "disconnected"),
        *("connected", ("up", ids[1]), ("down", ids[1], "left"), "disconnected"),
        "left",
    ]


def test_a_neighbour_that_is_killed(make: Make) -> None:
    one = make()
    ups, downs, gone = Collector(), Collector(), Collector()
    one.on("neighbor_up", ups)
    one.on("neighbor_down", downs)
    one.on("disconnected", gone)
    program = """
    import sys
    from solyd_swarm import pubsub
    swarm = pubsub("room", mdns=False, dht=False, bootstrap=sys.argv[1])
    """
    with start(program, one.ticket) as process:
        (peer,) = ups.wait()
        process.kill()
        ((lost, reason),) = downs.wait()
    assert lost == peer
    assert isinstance(reason, str)
    assert reason not in ("", "left")
    gone.wait()


def test_ones_own_leaving_disconnects(make: Make) -> None:
    one, other = pair(make)
    order, late = Collector(), Collector()
    one.on("disconnected", lambda: order("disconnected"))
    one.on("left", lambda: order("left"))
    one.leave().result(PATIENCE)
    assert order.calls == ["disconnected", "left"]
    one.on("connected", late)
    assert late.calls == []
    until(lambda: not other.peers)


# -- alone --------------------------------------------------------------------------------------------------------


def test_alone_for_long(make: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert solyd_swarm.swarm.ALONE_WARNING == 10
    monkeypatch.setattr(solyd_swarm.swarm, "ALONE_WARNING", 0.05)
    one = make("nobody comes here")
    until(lambda: "nobody found" in caplog.text)
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    text = record.getMessage()
    assert "'nobody comes here'" in text
    for word in ("mdns: off", "dht: off", "bootstrap", "topic", "secret", "multicast", "ticket", str(one._node.port)):
        assert word in text


def test_not_alone(make: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has had a neighbour need not be told how to find one."""
    one, other = pair(make)
    other.leave().result(PATIENCE)
    until(lambda: not one.peers)
    on_loop(one, one._warn_alone)
    assert "nobody found" not in caplog.text
