"""Ctrl-C while a swarm or a node is made: at any step, and nothing is left behind."""

import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import solyd_swarm
from solyd_swarm import Node, pubsub
from solyd_swarm.interrupts import held_back

PACKAGE = str(Path(solyd_swarm.__file__).parent)
LOOPBACK: dict[str, Any] = {"listen": ("127.0.0.1", 0), "mdns": False, "dht": False}


def ours() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("solyd")]


def steps(make: Callable[[], object], at: int | None = None) -> int:
    """Makes something and counts the library's functions that are called for it; at that one, Ctrl-C comes."""
    count = 0

    def profile(frame: FrameType, event: str, _argument: object) -> None:
        nonlocal count
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            count += 1
            if count == at:
                signal.raise_signal(signal.SIGINT)

    sys.setprofile(profile)
    try:
        make()
    finally:
        sys.setprofile(None)
    return count


MAKERS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "pubsub": (lambda: pubsub("interrupted", **LOOPBACK), lambda made: made.leave()),
    "Node": (lambda: Node(**LOOPBACK), lambda made: made.close()),
}


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="Python takes signals in the main thread only")
@pytest.mark.parametrize("kind", MAKERS)
def test_at_any_step_nothing_is_left(kind: str) -> None:
    make, end = MAKERS[kind]
    before = signal.getsignal(signal.SIGINT)
    total = steps(lambda: end(make()).result(5.0))
    assert total > 50
    inside = 0
    for at in range(1, total, max(1, total // 60)):
        made: list[object] = []
        try:
            steps(partial(lambda made: made.append(make()), made), at)
        except KeyboardInterrupt:
            assert not made
            inside += 1
        for one in made:  # this time fewer steps were needed
            end(one).result(5.0)
        for thread in ours():
            thread.join(5.0)
        assert not ours(), f"step {at} of {total}"
        assert signal.getsignal(signal.SIGINT) is before
    assert inside > 20


def test_an_interrupt_waits_for_the_end_of_the_block() -> None:
    done: list[bool] = []

    def work() -> None:
        with held_back():
            signal.raise_signal(signal.SIGINT)
            done.append(True)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done
    with held_back():
        pass


def test_the_users_own_handler_gets_it() -> None:
    caught: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        with held_back(), held_back():
            signal.raise_signal(signal.SIGINT)
            assert not caught
        assert caught == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_where_python_has_no_handler_nothing_is_changed(handler: signal.Handlers) -> None:
    before = signal.signal(signal.SIGINT, handler)
    try:
        with held_back():
            assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_leaves_signals_alone() -> None:
    found: list[object] = []

    def work() -> None:
        with held_back():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]
