import asyncio
import gc
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from solyd_swarm.net import resolve as resolving
from solyd_swarm.net.resolve import resolve
from solyd_swarm.runtime import Dispatcher, LoopThread

Exits = list[SystemExit | KeyboardInterrupt]


@pytest.fixture
def exits() -> Exits:
    return []


@pytest.fixture
def loop_thread(exits: Exits) -> Iterator[LoopThread]:
    made = LoopThread(on_exit=exits.append)
    yield made
    made.stop().result(5)


@pytest.fixture
def errors() -> list[BaseException]:
    return []


@pytest.fixture
def dispatcher(errors: list[BaseException], exits: Exits) -> Iterator[Dispatcher]:
    made = Dispatcher(errors.append, on_exit=exits.append)
    yield made
    made.close(0).result(5)


def wait(event: threading.Event) -> None:
    assert event.wait(5)


# ---- LoopThread


def test_starts_on_first_need_and_stops(exits: Exits) -> None:
    thread = LoopThread(on_exit=exits.append)
    assert "solyd_swarm loop" not in {each.name for each in threading.enumerate()}
    order: list[int] = []
    done = threading.Event()
    for number in range(3):
        thread.call(order.append, number)
    thread.call(done.set)
    wait(done)
    assert order == [0, 1, 2]
    [running] = [each for each in threading.enumerate() if each.name == "solyd_swarm loop"]
    assert running.daemon
    assert not thread.is_current()
    thread.stop().result(5)
    thread.stop().result(5)
    running.join(5)
    assert not running.is_alive()
    with pytest.raises(RuntimeError, match="stopped"):
        thread.call(print)


def test_stop_without_start() -> None:
    LoopThread().stop().result(5)


def test_run_gives_result_and_exception(loop_thread: LoopThread) -> None:
    async def good() -> bool:
        await asyncio.sleep(0)
        return loop_thread.is_current()

    async def bad() -> None:
        raise KeyError("x")

    assert loop_thread.run(good()).result(5) is True
    with pytest.raises(KeyError):
        loop_thread.run(bad()).result(5)


async def test_run_is_awaitable_from_another_loop(loop_thread: LoopThread) -> None:
    async def answer() -> int:
        return 42

    assert await loop_thread.run(answer()) == 42


def test_result_refused_on_the_loop(loop_thread: LoopThread) -> None:
    async def ask() -> None:
        loop_thread.run(asyncio.sleep(0)).result(1)

    with pytest.raises(RuntimeError, match="own thread"):
        loop_thread.run(ask()).result(5)


def test_stop_cancels_tasks() -> None:
    thread = LoopThread()
    started, ended = threading.Event(), threading.Event()

    async def forever() -> None:
        try:
            started.set()
            await asyncio.Event().wait()
        finally:
            ended.set()

    pending = thread.run(forever())
    wait(started)
    thread.stop().result(5)
    assert ended.is_set()
    with pytest.raises(asyncio.CancelledError):
        pending.result(0)


def test_run_after_stop_does_not_leak_the_coroutine() -> None:
    thread = LoopThread()
    thread.stop().result(5)
    with pytest.raises(RuntimeError):
        thread.run(asyncio.sleep(0))
    gc.collect()  # a coroutine never awaited would warn here, and warnings are errors


def test_a_task_that_resists(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("solyd_swarm.runtime.CANCEL_TIMEOUT", 0.05)
    thread = LoopThread()
    started = threading.Event()

    async def stubborn() -> None:
        while True:
            try:
                started.set()
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                continue

    pending = thread.run(stubborn())
    wait(started)
    thread.stop().result(5)
    assert "resists" in caplog.text
    with pytest.raises(asyncio.CancelledError):
        pending.result(0)
    gc.collect()  # asyncio complains of the abandoned task now, and not in the midst of another test


def test_exit_in_coroutine_task_and_callback(loop_thread: LoopThread, exits: Exits, caplog: pytest.LogCaptureFixture) -> None:
    async def leave() -> None:
        raise SystemExit(3)

    async def spawn() -> None:
        asyncio.get_running_loop().create_task(leave())

    def callback() -> None:
        raise SystemExit(4)

    with pytest.raises(SystemExit):
        loop_thread.run(leave()).result(5)
    loop_thread.run(spawn()).result(5)
    loop_thread.call(callback)
    loop_thread.run(asyncio.sleep(0)).result(5)  # the loop goes on: the goodbye needs it
    gc.collect()
    loop_thread.run(asyncio.sleep(0)).result(5)
    assert [each.code for each in exits if isinstance(each, SystemExit)] == [3, 3, 4]
    assert not caplog.records


def test_loop_errors_are_logged(loop_thread: LoopThread, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ValueError("oops")

    loop_thread.call(fail)
    loop_thread.run(asyncio.sleep(0)).result(5)
    assert [record.name for record in caplog.records] == ["solyd_swarm.runtime"]
    assert "oops" in caplog.text


def test_loop_factory() -> None:
    made: list[asyncio.AbstractEventLoop] = []

    def factory() -> asyncio.AbstractEventLoop:
        made.append(asyncio.new_event_loop())
        return made[0]

    thread = LoopThread(loop_factory=factory)
    assert not made
    assert thread.loop is made[0]
    thread.stop().result(5)
    assert made[0].is_closed()


# ---- Dispatcher


def test_in_order_on_one_daemon_thread(dispatcher: Dispatcher) -> None:
    seen: list[tuple[int, bool]] = []
    done = threading.Event()
    for number in range(100):
        assert dispatcher.post(lambda number: seen.append((number, dispatcher.is_current())), number)
    assert dispatcher.post_many((lambda number: seen.append((number, True)), (number,)) for number in range(100, 200))
    dispatcher.post(done.set)
    wait(done)
    assert seen == [(number, True) for number in range(200)]
    assert [each.daemon for each in threading.enumerate() if each.name == "solyd_swarm dispatcher"] == [True]


def test_many_threads_post(dispatcher: Dispatcher) -> None:
    seen: list[tuple[int, int]] = []
    ready = threading.Barrier(4)

    def post(who: int) -> None:
        ready.wait(5)
        for number in range(5000):
            dispatcher.post(seen.append, (who, number))

    threads = [threading.Thread(target=post, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done = threading.Event()
    dispatcher.post(done.set)
    wait(done)
    for who in range(4):
        assert [number for each, number in seen if each == who] == list(range(5000))


def test_wakes_again_and_again(dispatcher: Dispatcher) -> None:
    for _ in range(500):
        done = threading.Event()
        dispatcher.post(done.set)
        wait(done)


def test_errors_are_handed_over(dispatcher: Dispatcher, errors: list[BaseException]) -> None:
    def fail(error: BaseException) -> None:
        raise error

    done = threading.Event()
    dispatcher.post(fail, ValueError("a"))
    dispatcher.post(fail, asyncio.CancelledError())
    dispatcher.post(done.set)
    wait(done)
    assert [type(each) for each in errors] == [ValueError, asyncio.CancelledError]


def test_error_callback_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: object) -> None:
        raise ValueError("oops")

    dispatcher = Dispatcher(fail)
    done = threading.Event()
    dispatcher.post(fail)
    dispatcher.post(done.set)
    wait(done)
    assert "oops" in caplog.text
    dispatcher.close(0).result(5)


@pytest.mark.parametrize("reason", [SystemExit(3), KeyboardInterrupt()])
def test_exit_ends_the_dispatcher(dispatcher: Dispatcher, exits: Exits, reason: SystemExit | KeyboardInterrupt) -> None:
    def leave() -> None:
        raise reason

    ran = threading.Event()
    dispatcher.post_many([(leave, ()), (ran.set, ())])
    dispatcher.close(5).result(5)
    assert exits == [reason]
    assert not ran.is_set()
    assert not dispatcher.post(ran.set)


def test_close_finishes_what_is_queued(dispatcher: Dispatcher) -> None:
    seen: list[int] = []
    entered, go = threading.Event(), threading.Event()
    dispatcher.post(entered.set)
    dispatcher.post(go.wait, 5)
    wait(entered)
    for number in range(10):
        dispatcher.post(seen.append, number)
    closed = dispatcher.close(5)
    assert not dispatcher.post(seen.append, 99)
    assert not dispatcher.post_many([(seen.append, (99,))])
    assert not closed.done()
    assert len(dispatcher) in (10, 11)
    go.set()
    assert closed.result(5) == 0
    assert seen == list(range(10))


def test_close_drops_after_the_deadline(dispatcher: Dispatcher) -> None:
    seen: list[int] = []
    entered, go = threading.Event(), threading.Event()

    def busy() -> None:
        entered.set()
        go.wait(5)

    dispatcher.post(busy)
    dispatcher.post(seen.append, 1)
    wait(entered)
    dispatcher.post(seen.append, 2)
    dispatcher.close(60)
    closed = dispatcher.close(0)
    go.set()
    assert closed.result(5) == 2
    assert not seen


def test_close_idle_and_never_started() -> None:
    never = Dispatcher(print)
    assert never.close(1).result(1) == 0
    assert not never.post(print)
    idle = Dispatcher(print)
    done = threading.Event()
    idle.post(done.set)
    wait(done)
    [thread] = [each for each in threading.enumerate() if each.name == "solyd_swarm dispatcher"]
    assert idle.close(1).result(5) == 0
    thread.join(5)
    assert not thread.is_alive()


def test_close_from_a_callable(dispatcher: Dispatcher) -> None:
    dispatcher.post(dispatcher.close, 1)
    ended = threading.Event()
    dispatcher._closed._add_waiter(object(), ended.set)
    wait(ended)


def test_throughput(dispatcher: Dispatcher) -> None:
    count = 100_000
    done = threading.Event()
    start = time.perf_counter()
    for _ in range(count // 100):
        dispatcher.post_many([(int, ())] * 100)
    dispatcher.post(done.set)
    assert done.wait(30)
    assert count / (time.perf_counter() - start) > 50_000  # measured: millions; the bound only catches a blunder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_fork_in_a_handler_ends_with_the_handler(dispatcher: Dispatcher, loop_thread: LoopThread) -> None:
    children: list[int] = []
    done = threading.Event()

    def handler() -> None:
        child = os.fork()
        if child:
            children.append(child)
            done.set()

    for run in (dispatcher.post, loop_thread.call):
        done.clear()
        run(handler)
        wait(done)
    loop_thread.run(asyncio.sleep(0)).result(5)  # the parent's loop is none the worse
    for child in children:
        deadline = time.monotonic() + 10
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert ended == (child, 0)
    loop_thread.run(asyncio.sleep(0)).result(5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_use_in_a_forked_child(dispatcher: Dispatcher, loop_thread: LoopThread) -> None:
    loop_thread.run(asyncio.sleep(0)).result(5)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            assert not dispatcher.post(print)
            assert dispatcher.close(1).result(1) == 0
            with pytest.raises(RuntimeError, match="parent"):
                loop_thread.call(print)
            loop_thread.stop().result(1)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


# ---- resolve


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "fe80::1%eth0"])
async def test_literals_need_no_thread(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", None)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    assert await resolve(host, 80) == [(family, host, 80)]


async def test_resolves_names() -> None:
    found = await asyncio.wait_for(resolve("localhost", 80), 5)
    assert {host for _, host, _ in found} <= {"127.0.0.1", "::1"}
    assert found
    assert len(found) == len(set(found))


async def test_a_zone_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: [(socket.AF_INET6, 1, 6, "", ("fe80::1", 80, 0, 7))])
    assert await resolve("peer.local", 80) == [(socket.AF_INET6, "fe80::1%7", 80)]


@pytest.mark.parametrize("host", ["a" * 70 + ".example", "nul\0byte", ""])
async def test_no_host_name(host: str) -> None:
    with pytest.raises(socket.gaierror):
        await asyncio.wait_for(resolve(host, 80), 5)


async def test_errors_of_the_resolver(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(error: Exception) -> Callable[..., Any]:
        def lookup(*_: object, **__: object) -> None:
            raise error

        return lookup

    monkeypatch.setattr(socket, "getaddrinfo", fail(socket.gaierror(socket.EAI_NONAME, "no such host")))
    with pytest.raises(socket.gaierror, match="no such host"):
        await asyncio.wait_for(resolve("nowhere.invalid", 80), 5)
    monkeypatch.setattr(socket, "getaddrinfo", fail(KeyError("bug")))
    with caplog.at_level(logging.CRITICAL), pytest.raises(OSError, match="bug"):
        await asyncio.wait_for(resolve("nowhere.invalid", 80), 5)


async def test_hanging_look_ups_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    running: list[str] = []

    def hang(host: str, port: int, **_: object) -> list[Any]:
        running.append(host)
        release.wait(10)
        return [(socket.AF_INET, 1, 6, "", ("192.0.2.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    monkeypatch.setattr(resolving, "MAX_WAITING", 10)
    monkeypatch.setattr(resolving, "_pool", resolving._Pool())
    tasks = [asyncio.create_task(resolve(f"host{number}", 80)) for number in range(resolving.MAX_THREADS + 10)]
    async with asyncio.timeout(5):
        while len(running) < resolving.MAX_THREADS:
            await asyncio.sleep(0.001)
    with pytest.raises(socket.gaierror, match="too many"):
        await resolve("one-more", 80)
    threads = [each for each in threading.enumerate() if each.name == "solyd_swarm resolver"]
    assert len(threads) == resolving.MAX_THREADS
    assert all(each.daemon for each in threads)
    tasks[0].cancel()  # runs, and is let go
    tasks[-1].cancel()  # waits, and never runs
    await asyncio.wait(tasks[-1:] + tasks[:1])
    release.set()
    results = await asyncio.wait_for(asyncio.gather(*tasks[1:-1]), 5)
    assert results == [[(socket.AF_INET, "192.0.2.1", 80)]] * (len(tasks) - 2)
    assert tasks[-1].cancelled()
    assert f"host{len(tasks) - 1}" not in running
    for each in threads:
        await asyncio.to_thread(each.join, 5)
        assert not each.is_alive()
