import asyncio
import gc
import threading
import time
import traceback

import pytest

from solyd_swarm.errors import SwarmLeft
from solyd_swarm.pending import Pending


def make() -> Pending[int]:
    return Pending(lambda: False)


async def waiting(pending: Pending[int], count: int) -> None:
    async with asyncio.timeout(5):
        while len(pending._waiters) < count:
            await asyncio.sleep(0)


def test_result_waits_for_another_thread() -> None:
    pending = make()
    assert not pending.done()
    timer = threading.Timer(0.05, pending.set_result, (7,))
    timer.start()
    assert pending.result(5) == 7
    assert pending.result() == 7
    assert pending.done()
    timer.join()


@pytest.mark.parametrize("timeout", [0, 0.01, -1])
def test_result_too_late(timeout: float) -> None:
    pending = make()
    with pytest.raises(TimeoutError):
        pending.result(timeout)
    assert not pending._waiters
    pending.set_result(1)
    assert pending.result(timeout) == 1


def test_huge_timeout() -> None:
    pending = make()
    timer = threading.Timer(0.05, pending.set_result, (7,))
    timer.start()
    assert pending.result(float("inf")) == 7
    timer.join()


def test_first_one_wins() -> None:
    pending = make()
    pending.set_result(1)
    pending.set_result(2)
    pending.set_exception(SwarmLeft("no"))
    assert pending.result() == 1
    other = make()
    other.set_exception(SwarmLeft("gone"))
    other.set_result(2)
    with pytest.raises(SwarmLeft, match="gone"):
        other.result()


def test_result_on_own_thread_always_refused() -> None:
    me = threading.get_ident()
    pending: Pending[int] = Pending(lambda: threading.get_ident() == me)
    with pytest.raises(RuntimeError, match="await"):
        pending.result(0)
    pending.set_result(1)
    with pytest.raises(RuntimeError, match="await"):
        pending.result(0)


def test_traceback_does_not_grow() -> None:
    pending = make()
    pending.set_exception(SwarmLeft("gone"))
    lengths = set()
    for _ in range(5):
        with pytest.raises(SwarmLeft) as caught:
            pending.result()
        lengths.add(len(traceback.extract_tb(caught.value.__traceback__)))
    assert len(lengths) == 1


def test_unfetched_exception_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    pending = make()
    pending.set_exception(SwarmLeft("gone"))
    del pending
    gc.collect()
    assert not caplog.records


async def test_many_awaiters_and_threads() -> None:
    pending = make()
    tasks = [asyncio.ensure_future(pending) for _ in range(20)]
    threads = [asyncio.create_task(asyncio.to_thread(pending.result, 5)) for _ in range(3)]
    elsewhere = asyncio.create_task(asyncio.to_thread(lambda: asyncio.run(await_it(pending))))
    await waiting(pending, 24)
    threading.Thread(target=pending.set_result, args=(9,)).start()
    assert await asyncio.gather(*tasks, *threads, elsewhere) == [9] * 24
    assert await pending == 9


async def await_it(pending: Pending[int]) -> int:
    return await pending


async def test_cancelling_an_awaiter_leaves_the_rest_alone() -> None:
    pending = make()
    tasks = [asyncio.ensure_future(pending) for _ in range(2)]
    await waiting(pending, 2)
    tasks[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]
    assert not pending.done()
    assert len(pending._waiters) == 1
    pending.set_result(3)
    assert await tasks[1] == 3


async def test_wait_for_and_timeout() -> None:
    pending = make()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(pending, 0.01)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await pending
    assert not pending._waiters
    pending.set_exception(SwarmLeft("gone"))
    with pytest.raises(SwarmLeft):
        await asyncio.wait_for(pending, 1)


async def test_cancelled_and_resolved_at_once() -> None:
    pending = make()
    task = asyncio.ensure_future(pending)
    await waiting(pending, 1)
    pending.set_result(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0)


def test_loop_closed_while_awaiting() -> None:
    pending = make()
    loop = asyncio.new_event_loop()
    woken: list[int] = []

    async def one() -> None:
        woken.append(await pending)

    coroutine = one()
    task = loop.create_task(coroutine)
    loop.run_until_complete(asyncio.sleep(0))
    waiter = threading.Thread(target=lambda: woken.append(pending.result(5)))
    waiter.start()
    deadline = time.monotonic() + 5
    while len(pending._waiters) < 2 and time.monotonic() < deadline:
        time.sleep(0)
    loop.call_soon(task.cancel)
    loop.close()
    pending.set_result(4)
    waiter.join(5)
    assert woken == [4]
    coroutine.close()
    task._log_destroy_pending = False  # type: ignore[attr-defined]
