"""Names to addresses, in daemon threads of our own.

asyncio resolves names in its thread pool. That pool is shut down while a script's swarm still works, and its threads are
waited for at exit, where a resolver that hangs would hold up the process for minutes.
"""

import asyncio
import contextlib
import ipaddress
import logging
import os
import socket
import threading
from collections import deque
from collections.abc import Callable

log = logging.getLogger("solyd_swarm.net.resolve")

MAX_THREADS = 4
"""Look-ups at a time, in this process. Names come from the user and from peers' records: a peer that sends us to dead name
servers can only hang so many threads."""

MAX_WAITING = 256
"""Look-ups that wait for a thread. A flood of names, or a resolver that hangs, refuses the newest beyond this."""

Resolved = tuple[socket.AddressFamily, str, int]
Answer = tuple[list[Resolved], OSError | None]


async def resolve(host: str, port: int) -> list[Resolved]:
    """The addresses of a TCP endpoint as (family, IP literal, port), in the resolver's order, each once.

    An IP literal (IPv6 link-local ones with their zone) is answered at once. There is no time limit: use ``asyncio.timeout``;
    a cancelled look-up that waits for a thread is never started.

    Raises:
        OSError: the name cannot be resolved (``socket.gaierror``), or too many look-ups wait already (``EAI_AGAIN``).
    """
    with contextlib.suppress(ValueError):
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
        return [(family, host, port)]
    loop = asyncio.get_running_loop()
    future: asyncio.Future[list[Resolved]] = loop.create_future()

    def settle(answer: Answer) -> None:
        addresses, error = answer
        if future.done():
            return
        if error is None:
            future.set_result(addresses)
        else:
            future.set_exception(error)

    def answered(answer: Answer) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
            loop.call_soon_threadsafe(settle, answer)

    job = _Job(host, port, answered)
    _pool.submit(job)
    try:
        return await future
    finally:
        _pool.withdraw(job)


class _Job:
    __slots__ = ("answered", "host", "port")

    def __init__(self, host: str, port: int, answered: Callable[[Answer], None]) -> None:
        self.host = host
        self.port = port
        self.answered = answered


class _Pool:
    """Threads that live as long as there is something to look up, so that nobody has to end them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[_Job] = deque()
        self._threads = 0

    def submit(self, job: _Job) -> None:
        with self._lock:
            if self._threads >= MAX_THREADS:
                if len(self._waiting) >= MAX_WAITING:
                    raise socket.gaierror(socket.EAI_AGAIN, "too many names are being looked up")
                self._waiting.append(job)
                return
            self._threads += 1
        try:
            threading.Thread(target=self._work, args=(job,), name="solyd_swarm resolver", daemon=True).start()
        except RuntimeError as error:
            with self._lock:
                self._threads -= 1
            raise socket.gaierror(socket.EAI_AGAIN, "no thread can be started to look up names") from error

    def withdraw(self, job: _Job) -> None:
        with self._lock, contextlib.suppress(ValueError):
            self._waiting.remove(job)

    def _work(self, job: _Job) -> None:
        while True:
            job.answered(_look_up(job.host, job.port))
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                job = self._waiting.popleft()


def _look_up(host: str, port: int) -> Answer:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        return [], error
    except ValueError as error:  # a name that cannot be one: IDNA says UnicodeError, a NUL byte ValueError
        return [], socket.gaierror(socket.EAI_NONAME, f"not a host name: {host!r} ({error})")
    except Exception as error:
        log.exception("looking up %r failed", host)
        return [], socket.gaierror(socket.EAI_FAIL, str(error))
    addresses = [(family, _with_zone(sockaddr), port) for family, *_, sockaddr in found if family in (socket.AF_INET, socket.AF_INET6)]
    return list(dict.fromkeys(addresses)), None


def _with_zone(sockaddr: tuple[object, ...]) -> str:
    """The IP literal, with the zone that a link-local IPv6 address is useless without."""
    address = str(sockaddr[0])
    zone = sockaddr[3] if len(sockaddr) == 4 else 0
    if not zone or "%" in address:
        return address
    return f"{address}%{zone}"


_pool = _Pool()


def _after_fork_in_child() -> None:
    global _pool
    _pool = _Pool()  # the child has none of the threads, and the lock may have been held


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
