"""How swarms leave: from anywhere, within a second, with nothing left behind, in scripts."""

import asyncio
import logging
import threading
import time
from collections.abc import Iterator

import pytest
from script_kit import ALONE, PATIENCE, Collector, Make, deaf, library_threads, meet, pair, party, run, until

from solyd_swarm import Pending, SwarmLeft, pubsub


@pytest.fixture
def make() -> Iterator[Make]:
    with party() as made:
        yield made


def test_leaving_twice(make: Make) -> None:
    one = make()
    first = one.leave()
    assert isinstance(first, Pending)
    one.leave().result(PATIENCE)
    first.result(PATIENCE)
    assert first.done()
    one.leave().result(0)
    one.wait(0)


def test_a_left_swarm(make: Make) -> None:
    one = make()
    one.leave().result(PATIENCE)
    for use in (lambda: one.publish(1), one.joined, one.flush):
        with pytest.raises(SwarmLeft, match=r"pubsub\(\)"):
            use()
    assert list(one) == []
    assert one.on("message", print) is print  # harmless
    assert one.stats.neighbors == 0
    assert one.topic
    assert one.ticket


def test_alone_it_leaves_within_a_second_and_leaves_nothing(make: Make) -> None:
    one = pubsub("alone")  # with all ways of finding others
    begun = time.monotonic()
    one.leave().result(PATIENCE)
    assert time.monotonic() - begun < 1
    until(lambda: not library_threads())


def test_at_once(make: Make) -> None:
    for _ in range(5):
        begun = time.monotonic()
        pubsub("at once").leave().result(PATIENCE)
        assert time.monotonic() - begun < 1


def test_neighbours_are_told(make: Make) -> None:
    one, other = pair(make)
    down, gone = Collector(), Collector()
    one.on("neighbor_down", down)
    one.on("disconnected", gone)
    begun = time.monotonic()
    other.leave().result(PATIENCE)
    ((peer, reason),) = down.wait()
    assert (peer.id, reason) == (other.id, "left")
    gone.wait()
    assert time.monotonic() - begun < 1
    assert one.peers == ()


def test_from_a_handler(make: Make) -> None:
    one, other = pair(make)
    left, after = Collector(), Collector()

    def handler(obj: object) -> None:
        one.leave()
        after("goes on")

    one.on("message", handler)
    one.on("left", lambda: left("left"))
    begun = time.monotonic()
    other.publish("leave!")
    one.wait(PATIENCE)
    assert time.monotonic() - begun < 1
    assert (left.calls, after.calls) == (["left"], ["goes on"])
    until(lambda: not other.peers)


def test_from_a_coroutine_handler_that_waits_for_it(make: Make) -> None:
    """It is neither cancelled nor waited for."""
    one, other = pair(make)
    steps = Collector()

    async def handler(obj: object) -> None:
        try:
            await one.leave()
            steps("has left")
            await asyncio.sleep(0.01)
            steps("goes on")
        except asyncio.CancelledError:
            steps("was cancelled")
            raise

    one.on("message", handler)
    begun = time.monotonic()
    other.publish("leave!")
    one.wait(PATIENCE)
    assert time.monotonic() - begun < 1
    assert steps.calls == ["has left", "goes on"]


def test_from_another_thread(make: Make) -> None:
    one = make()
    thread = threading.Thread(target=lambda: one.leave().result(PATIENCE))
    thread.start()
    one.wait(PATIENCE)
    thread.join(PATIENCE)
    with pytest.raises(SwarmLeft):
        one.publish(1)


def test_awaiting_it_on_another_loop(make: Make) -> None:
    one, other = pair(make)

    async def main() -> str:
        await one.joined()
        one.publish("from a loop")
        await one.flush()
        await one.leave()
        return "done"

    assert asyncio.run(main()) == "done"
    assert next(iter(other)).data == "from a loop"


def test_what_was_just_published_still_goes_out(make: Make) -> None:
    one, other = pair(make)
    got = Collector()
    other.on("message", got)
    for number in range(1_000):
        one.publish(number)
    one.leave().result(PATIENCE)
    assert got.wait(1_000) == list(range(1_000))


def test_what_has_arrived_is_still_handled(make: Make) -> None:
    one, other = pair(make)
    got, awaited = Collector(), Collector()
    begun, go_on = threading.Event(), threading.Event()

    def handler(obj: int) -> None:
        begun.set()
        go_on.wait(PATIENCE)
        got(obj)

    async def also(obj: int) -> None:
        await asyncio.sleep(0)
        awaited(obj)

    one.on("message", handler)
    one.on("message", also)
    for number in range(10):
        other.publish(number)
        other.flush().result(PATIENCE)
    assert begun.wait(PATIENCE)
    leaving = one.leave()
    go_on.set()
    leaving.result(PATIENCE)
    assert got.calls == awaited.calls == list(range(10))


@pytest.mark.parametrize("kind", ["plain", "coroutine"])
def test_a_handler_that_hangs_does_not_keep_it(make: Make, kind: str) -> None:
    one, other = pair(make)
    begun, go_on = Collector(), threading.Event()

    def plain(obj: object) -> None:
        begun("begun")
        go_on.wait(PATIENCE)

    async def coroutine(obj: object) -> None:
        begun("begun")
        await asyncio.sleep(PATIENCE)

    one.on("message", plain if kind == "plain" else coroutine)
    other.publish("hang!")
    begun.wait()
    other.leave().result(PATIENCE)
    start = time.monotonic()
    one.leave().result(PATIENCE)
    assert time.monotonic() - start < 1
    go_on.set()
    until(lambda: not library_threads())


def test_a_stuck_neighbour_does_not_keep_it(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    one, other = pair(make)
    with deaf(other):
        one.publish("x")
        begun = time.monotonic()
        one.leave().result(PATIENCE)
        assert time.monotonic() - begun < 1
    assert "1 of 1 published messages" in caplog.text


def test_the_number_of_messages_nobody_received_is_warned_about(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    one = make()
    for number in range(3):
        one.publish(number)
    one.leave().result(PATIENCE)
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.getMessage() == "left 'room' with 3 of 3 published messages that no other peer is known to have received"


def test_no_warning_where_all_was_received(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    one, other = pair(make)
    one.publish("x")
    one.flush().result(PATIENCE)
    other.leave().result(PATIENCE)
    until(lambda: not one.peers)
    one.leave().result(PATIENCE)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_in_a_with_block_that_raises() -> None:
    with pytest.raises(KeyError), pubsub("room", **ALONE) as one:
        raise KeyError("of the block")
    with pytest.raises(SwarmLeft):
        one.publish(1)


def test_wait(make: Make) -> None:
    one = make()
    with pytest.raises(TimeoutError):
        one.wait(0.01)
    timer = threading.Timer(0.01, one.leave)
    timer.start()
    one.wait(PATIENCE)
    timer.join()


def test_all_at_once(make: Make) -> None:
    swarms = [make() for _ in range(6)]
    meet(*swarms)
    begun = time.monotonic()
    leaving = [swarm.leave() for swarm in swarms]
    for pending in leaving:
        pending.result(PATIENCE)
    assert time.monotonic() - begun < 1
    until(lambda: not library_threads())


def test_what_is_raised_while_it_leaves_is_reported(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """As an event if there is still time for it, else in the log."""
    one = make()
    errors = Collector()

    def handler() -> None:
        raise ValueError("in the last handler")

    one.on("left", handler)
    one.on("error", errors)
    one.leave().result(PATIENCE)
    until(lambda: errors.calls or "in the last handler" in caplog.text)


def test_a_script_lives_until_its_swarms_have_left() -> None:
    out, errors, status = run(
        """
        import threading
        from solyd_swarm import pubsub
        alone = {"mdns": False, "dht": False}
        one = pubsub("room", **alone)
        other = pubsub("room", **alone, bootstrap=one.ticket)

        def on_message(obj):
            print("got", obj)
            one.leave()
            other.leave()

        one.on("message", on_message)
        other.on("connected", lambda: other.publish("hello"))
        one.on("left", lambda: print("left"))
        print("main is done")
        """
    )
    assert out.splitlines() == ["main is done", "got hello", "left"]
    assert (errors, status) == ("", 0)


def test_a_forked_child_raises_on_use_and_does_not_disturb_its_parent() -> None:
    out, errors, status = run(
        """
        import os, warnings
        warnings.simplefilter("ignore")
        from solyd_swarm import ForkedError, Node, pubsub
        alone = {"mdns": False, "dht": False}
        with Node(**alone) as node, pubsub("room", **alone) as one, pubsub("room", **alone, bootstrap=one.ticket) as other:
            one.joined().result(10)
            joined = other.joined()
            mine = node.pubsub("mine")
            child = os.fork()
            if child == 0:
                uses = [
                    lambda: one.publish(1), one.joined, one.flush, lambda: one.on("message", print), lambda: iter(one),
                    one.wait, lambda: node.pubsub("x"),
                ]
                for use in uses:
                    try:
                        use()
                    except ForkedError:
                        pass
                    else:
                        os._exit(9)
                one.leave().result(10)
                node.close().result(10)
                with pubsub("room", **alone, bootstrap=other.ticket) as own:
                    own.joined().result(10)
                    own.publish("from the child")
                    own.flush().result(10)
                    assert own.id not in (one.id, other.id)
                os._exit(7)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            one.publish("still works")
            print(sorted([next(other_messages).data for other_messages in [iter(other)] for _ in range(2)]))
        """
    )
    assert (out.splitlines(), errors, status) == (["7", "['from the child', 'still works']"], "", 0)
