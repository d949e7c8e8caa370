"""The emitter by itself: who is called, how often, on what, and what happens to what handlers raise."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest

from solyd_swarm import emitter as emitter_module
from solyd_swarm.emitter import EVENTS, MANY_CALLS, SwarmEmitter


class Emitter(SwarmEmitter):
    """What a swarm adds, written down."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[BaseException] = []
        self.added: list[str] = []
        self.lag = 0
        self.times_drained = 0

    def _call_on_loop(self, function: Callable[..., object], *args: Any) -> None:
        asyncio.get_running_loop().call_soon(function, *args)

    def _report_error(self, error: BaseException) -> None:
        self.errors.append(error)

    def _lagged(self, count: int) -> None:
        self.lag += count

    def _listener_added(self, event: str) -> None:
        self.added.append(event)

    def _drained(self) -> None:
        self.times_drained += 1


async def idle(emitter: Emitter) -> None:
    """Until no coroutine handler is at work."""
    await asyncio.sleep(0)
    while tasks := emitter.running_handlers():
        await asyncio.wait(tasks)


def test_all_handlers_in_the_order_they_were_added() -> None:
    emitter = Emitter()
    calls: list[Any] = []
    for name in "abc":
        emitter.on("message", lambda obj, name=name: calls.append((name, obj)))
    assert emitter.emit("message", 1) is True
    assert calls == [("a", 1), ("b", 1), ("c", 1)]
    assert emitter.emit("left") is False
    assert emitter.added == ["message"] * 3


def test_known_events(caplog: pytest.LogCaptureFixture) -> None:
    emitter = Emitter()
    for event in (*EVENTS, "new_listener"):
        emitter.on(event, lambda *_: None)
        assert emitter.handles(event)
    assert caplog.records == []
    emitter.on("conected", print)
    emitter.on("completely different", print)
    first, second = [record.getMessage() for record in caplog.records]
    assert "did you mean 'connected'?" in first
    assert all(event in second for event in EVENTS)


def test_new_listener() -> None:
    emitter = Emitter()
    seen: list[Any] = []
    emitter.on("new_listener", lambda event, handler: seen.append((event, handler, emitter.handles(event))))
    emitter.on("message", print)
    assert seen == [("message", print, False)]


def test_handlers_that_change_while_they_are_called() -> None:
    emitter = Emitter()
    calls: list[str] = []

    def first(_: Any) -> None:
        calls.append("first")
        emitter.remove_listener("message", second)
        emitter.on("message", third)

    def second(_: Any) -> None:
        calls.append("second")

    def third(_: Any) -> None:
        calls.append("third")

    emitter.on("message", first)
    emitter.on("message", second)
    emitter.emit("message", 1)
    assert calls == ["first", "second"]  # as they were when it began
    emitter.emit("message", 2)
    assert calls[2:] == ["first", "third"]
    emitter.remove_all_listeners("message")
    assert not emitter.handles("message")
    assert emitter.emit("message", 3) is False
    emitter.on("message", first)
    with pytest.raises(KeyError):
        emitter.remove_listener("message", second)
    emitter.remove_all_listeners()
    assert not emitter.handles("message")


def test_once_in_a_handler_that_emits() -> None:
    emitter = Emitter()
    calls: list[int] = []

    def handler(number: int) -> None:
        calls.append(number)
        emitter.emit("message", number + 1)

    emitter.once("message", handler)
    emitter.emit("message", 1)
    assert calls == [1]


@pytest.mark.parametrize("kind", [ValueError, asyncio.CancelledError])
def test_exceptions_are_reported_and_the_others_still_run(kind: type[BaseException]) -> None:
    emitter = Emitter()
    calls: list[Any] = []

    def bad(_: Any) -> None:
        raise kind("bad")

    emitter.on("message", bad)
    emitter.on("message", calls.append)
    emitter.emit("message", 1)
    assert calls == [1]
    assert [type(error) for error in emitter.errors] == [kind]


def test_an_error_listener_that_raises_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    emitter = Emitter()

    def bad(_: Any) -> None:
        raise ValueError("bad listener")

    emitter.on("error", bad)
    emitter.emit("error", KeyError("first"))
    assert emitter.errors == []
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "bad listener" in caplog.text


@pytest.mark.parametrize("reason", [SystemExit, KeyboardInterrupt])
def test_what_ends_the_process_passes(reason: type[BaseException]) -> None:
    emitter = Emitter()

    def handler(_: Any) -> None:
        raise reason

    emitter.on("message", handler)
    with pytest.raises(reason):
        emitter.emit("message", 1)


def test_wrong_calls_are_errors_too() -> None:
    emitter = Emitter()
    emitter.on("message", lambda: None)
    emitter.emit("message", 1)
    (error,) = emitter.errors
    assert isinstance(error, TypeError)


# -- connected ----------------------------------------------------------------------------------------------------


def test_greeting() -> None:
    emitter = Emitter()
    calls: list[str] = []
    early, late, removed = (lambda name=name: calls.append(name) for name in ("early", "late", "removed"))
    emitter.on("connected", early)
    emitter.emit_connected()
    emitter.greet(connected=True)  # that of `early`, which comes after the event has called it
    assert calls == ["early"]
    emitter.once("connected", late)
    emitter.on("connected", removed)
    emitter.remove_listener("connected", removed)
    emitter.greet(connected=True)
    emitter.greet(connected=True)
    assert calls == ["early", "late"]
    emitter.on("connected", early)
    emitter.greet(connected=True)
    assert calls == ["early", "late"]
    emitter.remove_listener("connected", early)
    emitter.on("connected", early)
    emitter.greet(connected=True)
    assert calls == ["early", "late", "early"]
    emitter.on("connected", removed)
    emitter.greet(connected=False)
    emitter.emit_connected()
    assert calls[3:] == ["early", "removed"]


# -- coroutine handlers -------------------------------------------------------------------------------------------


async def test_one_call_at_a_time_in_order() -> None:
    emitter = Emitter()
    steps: list[Any] = []

    async def handler(number: int) -> None:
        steps.append(("begin", number))
        await asyncio.sleep(0)
        steps.append(("end", number))

    emitter.on("message", handler)
    emitter.on("left", handler)  # one handler, whatever calls it
    emitter.emit("message", 1)
    emitter.emit("left", 2)
    await idle(emitter)
    emitter.emit("message", 3)
    await idle(emitter)
    assert steps == [(what, number) for number in (1, 2, 3) for what in ("begin", "end")]


async def test_what_a_coroutine_raises_belongs_to_its_event(caplog: pytest.LogCaptureFixture) -> None:
    emitter = Emitter()

    async def handler(obj: Any) -> None:
        raise ValueError(obj)

    emitter.on("message", handler)
    emitter.on("error", handler)
    emitter.emit("message", "first")
    emitter.emit("error", "second")
    emitter.emit("message", "third")
    await idle(emitter)
    assert [str(error) for error in emitter.errors] == ["first", "third"]
    assert [record.getMessage() for record in caplog.records] == ["a handler of the error event raised"]


async def test_a_coroutine_that_waits_for_something_cancelled_goes_on() -> None:
    emitter = Emitter()
    done: list[int] = []

    async def handler(number: int) -> None:
        if number == 1:
            task = asyncio.ensure_future(asyncio.sleep(10))
            task.cancel()
            await task
        done.append(number)

    emitter.on("message", handler)
    emitter.emit("message", 1)
    emitter.emit("message", 2)
    await idle(emitter)
    assert done == [2]
    assert [type(error) for error in emitter.errors] == [asyncio.CancelledError]


async def test_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emitter_module, "MAX_CALLS", 2 * MANY_CALLS)
    emitter = Emitter()
    go_on = asyncio.Event()
    done: list[int] = []

    async def handler(number: int) -> None:
        await go_on.wait()
        done.append(number)

    emitter.on("message", handler)
    emitter.emit("message", 0)
    await asyncio.sleep(0)
    await asyncio.sleep(0)  # it is at work
    for number in range(1, MANY_CALLS):
        emitter.emit("message", number)
    assert not emitter.is_behind()
    for number in range(MANY_CALLS, 2 * MANY_CALLS + 3):
        emitter.emit("message", number)
    assert emitter.is_behind()
    assert emitter.lag == 2  # the newest
    go_on.set()
    await idle(emitter)
    assert done == list(range(2 * MANY_CALLS + 1))
    assert emitter.times_drained == 1
    assert not emitter.is_behind()


async def test_what_waits_can_be_dropped() -> None:
    emitter = Emitter()
    done: list[int] = []

    async def handler(number: int) -> None:
        await asyncio.sleep(0)
        done.append(number)

    emitter.on("message", handler)
    for number in range(3):
        emitter.emit("message", number)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    emitter.drop_waiting()
    await idle(emitter)
    assert done == [0]


async def test_handlers_that_are_gone_leave_nothing() -> None:
    emitter = Emitter()
    for number in range(100):

        async def handler(obj: Any) -> None:
            await asyncio.sleep(0)

        emitter.once("message", handler)
        emitter.emit("message", number)
        await idle(emitter)
    assert len(emitter._workers) == 1
