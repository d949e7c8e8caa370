"""How messages get to iterators and handlers, late joiners and those that come back, in a script."""

import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from script_kit import PATIENCE, Collector, Make, library_threads, meet, on_loop, pair, party, publish_raw, until

from solyd_swarm import Message, Swarm


@pytest.fixture
def make() -> Iterator[Make]:
    with party() as made:
        yield made


class Reader(threading.Thread):
    """Iterates over a swarm in a thread of its own, as far as it is told."""

    def __init__(self, swarm: Swarm, stop_at: Any = None) -> None:
        super().__init__()
        self.got = Collector()
        self.swarm = swarm
        self.stop_at = stop_at
        self.start()

    def run(self) -> None:
        for message in self.swarm:
            self.got(message.data)
            if message.data == self.stop_at:
                break
        self.got("end")


def take(swarm: Swarm, count: int) -> list[Any]:
    """That many messages, by a loop that is then left."""
    found: list[Any] = []
    too_late = threading.Timer(PATIENCE, swarm.leave)  # ends the loop
    too_late.start()
    for message in swarm:
        found.append(message.data)
        if len(found) == count:
            break
    too_late.cancel()
    too_late.join()
    assert len(found) == count, found
    return found


# -- iterators ----------------------------------------------------------------------------------------------------


def test_an_iterator_yields_messages_and_ends_with_the_swarm(make: Make) -> None:
    one, other = pair(make)
    id = other.publish("hello")
    message = next(iter(one))
    assert isinstance(message, Message)
    assert (message.data, message.id, message.source) == ("hello", id, other.id)
    reader = Reader(one)
    other.publish("again")
    assert reader.got.wait() == ["again"]
    one.leave().result(PATIENCE)
    assert reader.got.wait(2) == ["again", "end"]
    reader.join(PATIENCE)


def test_messages_wait_for_the_first_iterator(make: Make) -> None:
    one, other = pair(make)
    for number in range(10):
        other.publish(number)
    other.flush().result(PATIENCE)
    assert take(one, 10) == list(range(10))


@pytest.mark.parametrize("together", [True, False])
def test_breaking_out_and_iterating_again_loses_nothing(make: Make, together: bool) -> None:
    one, other = pair(make)

    def publish() -> None:
        for number in range(1_000):
            other.publish(number)
            if not together:
                other.flush().result(PATIENCE)

    thread = threading.Thread(target=publish)
    thread.start()
    got: list[int] = []
    size = 1
    while len(got) < 1_000:
        got += take(one, min(size, 1_000 - len(got)))
        size = size % 7 + 1
    thread.join(PATIENCE)
    assert got == list(range(1_000))
    assert one.stats.lagged == 0


def test_an_iterator_in_a_cycle_gives_back_what_it_has_when_it_is_collected(make: Make) -> None:
    one, other = pair(make)
    for number in range(3):
        other.publish(number)
    iterator: Any = iter(one)
    assert next(iterator).data == 0
    cycle: list[Any] = [iterator]
    cycle.append(cycle)
    del iterator, cycle
    gc.collect()
    assert take(one, 2) == [1, 2]


def test_several_iterators_get_everything_each(make: Make) -> None:
    one, other = pair(make)
    readers = [Reader(one) for _ in range(3)]
    until(lambda: len(one._delivery._iterators) == 3)
    handler = Collector()
    one.on("message", handler)
    on_loop(one, int)  # it is known on the loop now
    for number in range(100):
        other.publish(number)
    for collector in (handler, *(reader.got for reader in readers)):
        assert collector.wait(100) == list(range(100))
    one.leave().result(PATIENCE)
    for reader in readers:
        assert reader.got.wait(101)[-1] == "end"
        reader.join(PATIENCE)


def test_one_of_two_iterators_breaks(make: Make) -> None:
    one, other = pair(make)
    first, second = Reader(one, stop_at=1), Reader(one)
    until(lambda: len(one._delivery._iterators) == 2)
    for number in range(4):
        other.publish(number)
    assert first.got.wait(3) == [0, 1, "end"]
    assert second.got.wait(4) == [0, 1, 2, 3]
    first.join(PATIENCE)
    later = Reader(one)
    until(lambda: len(on_loop(one, one._delivery._living)) == 2)
    other.publish(4)
    assert later.got.wait() == [4]  # nothing twice, as the second one has got all
    one.leave().result(PATIENCE)
    for reader in (second, later):
        reader.join(PATIENCE)


def test_what_was_not_consumed_can_be_read_after_leaving(make: Make) -> None:
    one, other = pair(make)
    for number in range(5):
        other.publish(number)
    other.flush().result(PATIENCE)
    assert take(one, 2) == [0, 1]
    one.leave().result(PATIENCE)
    assert [message.data for message in one] == [2, 3, 4]
    assert list(one) == []


def test_iterating_while_it_leaves_ends(make: Make) -> None:
    for _ in range(20):
        one = make(f"room {_}", bootstrap=None)
        leaving = one.leave()
        assert list(one) == []
        leaving.result(PATIENCE)


# -- what is too slow ---------------------------------------------------------------------------------------------


def test_a_slow_handler_lags(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    one, other = make(retain_bytes=5_000), make()
    meet(one, other)
    got, lagged, begun, go_on = Collector(), Collector(), threading.Event(), threading.Event()

    def handler(obj: list[Any]) -> None:
        begun.set()
        go_on.wait(PATIENCE)
        got(obj[0])

    one.on("message", handler)
    one.on("lagged", lagged)
    other.publish([-1, b""])
    assert begun.wait(PATIENCE)
    for number in range(100):
        other.publish([number, bytes(500)])
        other.flush().result(PATIENCE)
    assert 80 <= one.stats.lagged <= 95
    go_on.set()
    until(lambda: got.calls[-1:] == [99])
    assert got.calls == [-1, *range(one.stats.lagged, 100)]  # the oldest were dropped
    assert lagged.wait() == [one.stats.lagged]  # told all at once
    assert caplog.text.count("too slow") == 1
    assert one.stats.delivered == 101 - one.stats.lagged


def test_a_slow_iterator_lags_alone(make: Make) -> None:
    one, other = make(retain_bytes=5_000), make()
    meet(one, other)
    lagged, quick = Collector(), Reader(one, stop_at=[99, bytes(500)])
    one.on("lagged", lagged)
    slow = iter(one)
    until(lambda: len(one._delivery._iterators) == 2)
    for number in range(100):
        other.publish([number, bytes(500)])
        other.flush().result(PATIENCE)
        quick.got.wait(number + 1)
    quick.join(PATIENCE)
    until(lambda: sum(lagged.calls) == one.stats.lagged >= 80)
    assert next(slow).data[0] == one.stats.lagged


def test_where_nobody_listens_the_window_is_the_limit(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody is too slow there, and nobody is told so."""
    one, other = make(retain_bytes=5_000), make()
    meet(one, other)
    for number in range(50):
        other.publish([number, bytes(500)])
        other.flush().result(PATIENCE)
    numbers = [data[0] for data in take(one, 8)]
    assert numbers == list(range(42, 50))
    assert one.stats.lagged == 0
    assert "too slow" not in caplog.text


def test_one_large_message_passes_a_small_bound(make: Make) -> None:
    one, other = make(retain_bytes=1_000), make()
    meet(one, other)
    other.publish(bytes(500_000))
    assert len(take(one, 1)[0]) == 500_000


# -- the window ---------------------------------------------------------------------------------------------------


def test_a_late_joiner_gets_the_window(make: Make) -> None:
    one, other = pair(make)
    for number in range(10):
        one.publish(number)
    one.flush().result(PATIENCE)
    one.leave().result(PATIENCE)
    late = make(bootstrap=other.ticket)
    got = Collector()
    late.on("received", got)
    messages = got.wait(10)
    assert [message.data for message in messages] == list(range(10))
    assert {message.source for message in messages} == {one.id}  # who has left meanwhile
    assert {message.propagation_source for message in messages} == {other.id}
    assert {message.late for message in messages} == {False}


def test_without_replay_only_what_comes_from_now_on(make: Make) -> None:
    one, _ = pair(make)
    one.publish("before")
    one.flush().result(PATIENCE)
    late = make(replay=False)
    got = Collector()
    late.on("message", got)
    meet(late)
    one.publish("after")
    assert got.wait() == ["after"]
    one.flush().result(PATIENCE)  # it has been told what it did not want, and acknowledges all
    assert got.calls == ["after"]


def test_a_small_window(make: Make) -> None:
    one, other = make(retain_bytes=3_000), make(retain_bytes=3_000)
    meet(one, other)
    for number in range(20):
        one.publish([number, bytes(900)])
        one.flush().result(PATIENCE)
    late = make()
    got = Collector()
    late.on("message", got)
    assert [number for number, _ in got.wait(3)] == [17, 18, 19]


def test_a_short_window(make: Make) -> None:
    one = make(retain=1)
    one.publish("old")
    until(lambda: one.stats.held == 1)
    until(lambda: one.stats.held_bytes == 0)
    one.publish("new")
    other = make()
    assert take(other, 1) == ["new"]


def test_a_secret_keeps_others_out(make: Make) -> None:
    one = make(secret="rosebud")
    same, bytes_too, wrong, without = make(secret="rosebud"), make(secret=b"rosebud"), make(secret="Rosebud"), make()
    meet(one, same, bytes_too)
    with pytest.raises(TimeoutError):
        wrong.joined().result(0.2)
    assert wrong.peers == without.peers == ()
    one.publish("a secret")
    assert take(same, 1) == take(bytes_too, 1) == ["a secret"]


# -- coming back --------------------------------------------------------------------------------------------------


def test_a_restart_repeats_nothing_and_loses_nothing(make: Make, tmp_path: Path) -> None:
    one = make()
    heard = Collector()
    one.on("received", heard)
    identity, ids, all_got = tmp_path / "identity", set(), []
    for life in range(3):
        back = make(identity=identity)
        ids.add(back.id)
        got = Collector()
        back.on("message", got)
        meet(back)
        one.publish([life, "while it is here"])
        back.publish(life)
        back.flush().result(PATIENCE)
        assert heard.wait(life + 1)[-1].data == life
        # What was published while it was away, then what came now.
        all_got += got.wait(1 if life == 0 else 2)
        back.leave().result(PATIENCE)
        one.publish([life, "while it is away"])
    assert len(ids) == 1
    assert all_got == [
        [0, "while it is here"],
        *([life + number, text] for life in range(2) for number, text in enumerate(("while it is away", "while it is here"))),
    ]
    messages = heard.calls
    assert [message.sequence for message in messages] == [1, 1, 1]
    assert [message.epoch for message in messages] == sorted({message.epoch for message in messages})


def test_what_nobody_has_read_comes_again_after_a_restart(make: Make, tmp_path: Path) -> None:
    one = make()
    identity = tmp_path / "identity"
    first = make(identity=identity)
    meet(first)
    for number in range(6):
        one.publish(number)
        one.flush().result(PATIENCE)
    assert take(first, 2) == [0, 1]
    first.leave().result(PATIENCE)
    second = make(identity=identity)
    assert take(second, 4) == [2, 3, 4, 5]


def test_what_cannot_be_decoded_is_not_counted_as_delivered(make: Make) -> None:
    one, other = pair(make)
    got = Collector()
    one.on("message", got)
    publish_raw(other, b"\xc1")
    other.publish("x")
    got.wait()
    until(lambda: one.stats.delivered + one.stats.undecodable == 2)


def test_nothing_is_left_behind(make: Make) -> None:
    one, other = pair(make)
    iterator = iter(one)
    for swarm in (one, other):
        swarm.leave().result(PATIENCE)
    until(lambda: not library_threads())
    with pytest.raises(StopIteration):
        next(iterator)
