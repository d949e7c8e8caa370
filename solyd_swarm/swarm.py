"""`pubsub` and what it returns: the swarm that users hold."""

import asyncio
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TypeVar

from solyd_swarm import lifetime, payload
from solyd_swarm.core.events import Deliver, Equivocated, Publish, Quit
from solyd_swarm.core.keys import derive_topic_key, format_author, format_message_id
from solyd_swarm.core.overlay import OverlayConfig
from solyd_swarm.emitter import SwarmEmitter
from solyd_swarm.errors import ForkedError, MessageTooLarge, PayloadError, SwarmBusy, SwarmLeft
from solyd_swarm.inbox import Inbox, MessageIterator
from solyd_swarm.message import Batch, Message, Peer, Stats
from solyd_swarm.net.driver import Driver
from solyd_swarm.node import BaseNode
from solyd_swarm.options import SwarmOptions
from solyd_swarm.pending import Pending

log = logging.getLogger("solyd_swarm.swarm")

ALONE_WARNING = 10.0
ACK_WAIT = 0.25
"""Seconds that leaving waits for what was just published to be acknowledged by somebody."""
HANDLER_WAIT = 0.5
"""Seconds that leaving waits for handlers to finish what is queued."""

T = TypeVar("T")


class Swarm(SwarmEmitter):
    """One topic, joined. Made by `pubsub`; an event emitter whose methods may be called from any thread.

    Events: ``message(obj)``; ``received(Message)``; ``connected()``, ``disconnected()``; ``neighbor_up(Peer)``,
    ``neighbor_down(Peer, reason)``; ``lagged(count)``; ``equivocation(author, proof)``; ``error(exc)``; ``left()``.
    """

    def __init__(self, topic: str, options: SwarmOptions, node: BaseNode, on_left: Callable[["Swarm"], None], *, owns_node: bool) -> None:
        super().__init__()
        self.topic = topic
        self._options = options
        self._node = node
        self._home = node.home
        self._owns_node = owns_node
        self._on_left = on_left
        self._topic_key = derive_topic_key(topic, options.secret_bytes)
        self._epoch = node.identity.next_epoch()
        self._state = threading.Lock()  # guards what publish() shares with the loop
        self._sequence = 0
        self._outgoing: list[tuple[int, bytes]] = []
        self._outgoing_bytes = 0
        self._drain_scheduled = False
        self._unaccepted: deque[tuple[int, int]] = deque()  # (last sequence, bytes) that no neighbour has acknowledged
        self._unaccepted_bytes = 0
        self._acked_by_any = 0
        self._acked_by_all = 0
        self._peers: dict[bytes, Peer] = {}
        self._leaving = False
        self._leave_bounds = (ACK_WAIT, HANDLER_WAIT)
        self._left_for_handlers: Pending[None] = Pending(self._is_own_thread)
        self._left: Pending[None] = Pending(self._is_own_thread)
        self._joins: list[Pending[None]] = []
        self._flushes: list[tuple[int, Pending[None]]] = []
        self._acks_changed = asyncio.Event()
        self._driver: Driver | None = None
        self._leave_task: asyncio.Task[None] | None = None
        self._alone_timer: asyncio.TimerHandle | None = None
        self._counts = {"delivered": 0, "late": 0, "lagged": 0, "undecodable": 0}
        self._executor = self._home.executor(self._handler_failed)
        self._inbox = Inbox(options.retain_bytes, self._lagged)
        self._pumps = 0  # calls of _pump on their way to the executor
        self._iterators: dict[int, weakref.ref[MessageIterator]] = {}
        self._greeted: set[int] | None = None  # while connected: the handlers that were told so
        node.on_loop_ending.append(self._begin_leave)
        if self._home.keeps_alive:
            lifetime.register(self)
        self._home.call(self._join_topic)

    def __repr__(self) -> str:
        return f"<Swarm {self.topic!r} {self.id} {'left' if self._leaving else f'{len(self._peers)} neighbours'}>"

    # -- what it is -------------------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """Our author id: ``"<base64 of the 32-byte Ed25519 public key>.ed25519"``."""
        return self._node.identity.author

    @property
    def ticket(self) -> str:
        """A short text for ``bootstrap=`` of others: instance key and addresses, no topic."""
        return self._node.ticket

    @property
    def peers(self) -> tuple[Peer, ...]:
        """The neighbours now."""
        return tuple(self._peers.values())

    @property
    def stats(self) -> Stats:
        """What happened so far."""
        overlay_log = self._driver.overlay.log if self._driver is not None else None
        bytes_in, bytes_out = self._node.endpoint.traffic()
        return Stats(
            neighbors=len(self._peers),
            published=self._sequence,
            acknowledged=self._acked_by_any,
            held=len(overlay_log) if overlay_log is not None else 0,
            held_bytes=overlay_log.bytes if overlay_log is not None else 0,
            bytes_in=bytes_in,
            bytes_out=bytes_out,
            discovery=self._node.describe_sources(),
            **self._counts,
        )

    # -- publishing -------------------------------------------------------------------------------------------

    def publish(self, obj: Any) -> str:
        """Publishes an object to all members; never blocks.

        Args:
            obj: None, bool, int, float, str, bytes, list, tuple (arrives as a list), dict, aware datetime, nested at will.
                It is encoded at once: changing it later changes nothing.

        Returns:
            The message's id, equal at every peer.

        Raises:
            UnpublishableType: something inside would not arrive equal; a ``TypeError`` that names its place.
            UnpublishableValue: out of range or nested too deep; a ``ValueError`` that names its place.
            MessageTooLarge: longer than ``max_message_size`` when encoded; a ``ValueError``.
            SwarmBusy: no neighbour has accepted what was published so far, and the publish buffer is full.
            SwarmLeft: the swarm has left.
        """
        if self._leaving or lifetime.forked(self._home.birth):
            self._check_usable()
        data = payload.encode(obj)
        size = len(data)
        if size > self._options.max_message_size:
            raise MessageTooLarge(
                f"the message is {size} bytes long when encoded, and max_message_size is {self._options.max_message_size}: "
                "publish it in parts, or give pubsub() a larger max_message_size"
            )
        with self._state:
            if self._leaving:
                raise SwarmLeft("the swarm has left: publish before leave(), or make a new one with pubsub()")
            self._check_room(size)
            self._sequence = sequence = self._sequence + 1
            self._outgoing.append((sequence, data))
            self._outgoing_bytes += size
            schedule, self._drain_scheduled = not self._drain_scheduled, True
        if schedule:
            self._home.call(self._drain)
        return format_message_id(self._node.identity.public_key, self._epoch, sequence)

    def _check_room(self, size: int) -> None:
        """Raises `SwarmBusy`. Alone, the window is the buffer: what does not fit drops its oldest."""
        limit = self._options.publish_buffer if self._peers else max(self._options.publish_buffer, self._options.retain_bytes)
        waiting = self._outgoing_bytes + (self._unaccepted_bytes if self._peers else 0)
        if waiting and waiting + size > limit:
            raise SwarmBusy(
                f"{waiting} bytes published are not yet accepted by any neighbour, and the publish buffer holds {limit}: "
                "wait for swarm.flush(), then try again"
            )

    def _drain(self) -> None:
        """Hands what was published since the last turn to the core, as one batch."""
        with self._state:
            batch, self._outgoing = self._outgoing, []
            size, self._outgoing_bytes = self._outgoing_bytes, 0
            self._drain_scheduled = False
            if batch:
                self._unaccepted.append((batch[-1][0], size))
                self._unaccepted_bytes += size
        if batch and self._driver is not None:
            self._driver.feed(Publish(batch[0][0], time.time_ns() // 1000, [data for _, data in batch]))

    # -- waiting ----------------------------------------------------------------------------------------------

    def joined(self) -> Pending[None]:
        """Done when there is at least one neighbour: at once if there is one. `SwarmLeft` if we leave before."""
        self._check_usable()
        pending: Pending[None] = Pending(self._is_own_thread)
        self._home.call(self._await_join, pending)
        return pending

    def _await_join(self, pending: Pending[None]) -> None:
        if self._peers:
            pending.set_result(None)
        elif self._leaving:
            pending.set_exception(_left_error())
        else:
            self._joins = [each for each in self._joins if not each.done()]
            self._joins.append(pending)

    def flush(self) -> Pending[None]:
        """Done when what was published so far is acknowledged by every present neighbour, and by one at least."""
        self._check_usable()
        pending: Pending[None] = Pending(self._is_own_thread)
        self._home.call(self._await_flush, self._sequence, pending)
        return pending

    def _await_flush(self, sequence: int, pending: Pending[None]) -> None:
        if self._leave_task is not None:
            pending.set_exception(_left_error())
        else:
            self._flushes.append((sequence, pending))
            self._settle_flushes()

    def _settle_flushes(self) -> None:
        waiting = []
        for sequence, pending in self._flushes:
            if self._acked_by_any >= sequence and (not self._peers or self._acked_by_all >= sequence):
                pending.set_result(None)
            else:
                waiting.append((sequence, pending))
        self._flushes = waiting

    def wait(self, timeout: float | None = None) -> None:
        """Blocks until the swarm has left. Raises ``TimeoutError`` after ``timeout`` seconds."""
        self._left.result(timeout)

    # -- leaving ----------------------------------------------------------------------------------------------

    def leave(self) -> Pending[None]:
        """Says goodbye, drains, closes: nothing is left behind, within a second. Idempotent; from any thread, also a handler.

        A handler that waits for the result (with ``await``) is neither cancelled nor waited for.
        """
        if not lifetime.forked(self._home.birth):
            self._begin_leave()
        return self._left_for_handlers if self._is_own_thread() else self._left

    def begin_leave(self, within: float) -> None:
        """As `leave`, when the process ends."""
        self._leave_bounds = (min(ACK_WAIT, within / 6), min(HANDLER_WAIT, within / 6))
        self._begin_leave()

    def _begin_leave(self) -> None:
        with self._state:
            if self._leaving:
                return
            self._leaving = True
        self._home.call(self._start_leaving)

    def _start_leaving(self) -> None:
        self._leave_task = self._home.loop.create_task(self._leave(), name="solyd_swarm leave")
        self._leave_task.add_done_callback(self._after_leaving)

    async def _leave(self) -> None:
        handler = asyncio.current_task()
        assert handler is not None
        self._drain()
        await self._wait_for_acks(self._leave_bounds[0])
        self._settle_all_waiting()
        if self._alone_timer is not None:
            self._alone_timer.cancel()
        if self._driver is not None:
            self._driver.feed(Quit())
        self._node.close_topic(self._topic_key)
        self._warn_of_unreceived()
        self._on_left(self)
        for iterator in self._living_iterators():
            iterator.end()
        self._post("disconnected" if self._peers else "")
        self._peers.clear()
        self._post("left")
        closed = self._executor.close(self._leave_bounds[1])
        if self._owns_node:
            await self._node.close()
        await self._let_handlers_finish(closed)
        if self._begin_leave in self._node.on_loop_ending:
            self._node.on_loop_ending.remove(self._begin_leave)
        self._left_for_handlers.set_result(None)

    async def _wait_for_acks(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                while self._peers and self._acked_by_any < self._sequence:
                    self._acks_changed.clear()
                    await self._acks_changed.wait()
        except TimeoutError:
            log.debug("leaving before everything published was acknowledged")

    def _settle_all_waiting(self) -> None:
        for pending in [*self._joins, *(pending for _, pending in self._flushes)]:
            pending.set_exception(_left_error())
        self._joins, self._flushes = [], []

    def _warn_of_unreceived(self) -> None:
        missing = self._sequence - self._acked_by_any
        if missing:
            log.warning(
                "left %r with %d of %d published messages that no other peer is known to have received",
                self.topic,
                missing,
                self._sequence,
            )

    async def _let_handlers_finish(self, closed: Pending[int]) -> None:
        """Waits, within bounds, for handlers at work; not for one that may itself be waiting for us."""
        self.drop_waiting()
        if not (self._executor.is_current() or closed.done()):
            try:
                async with asyncio.timeout(self._leave_bounds[1] + 0.1):
                    await closed
            except TimeoutError:
                log.debug("a handler is still at work; it is left to itself")

    def _after_leaving(self, task: "asyncio.Task[None]") -> None:
        """The last step: what is left of us ends with the task that is done now."""
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("leaving %r failed", self.topic, exc_info=error)
        self._left_for_handlers.set_result(None)
        gone = self._home.exit(self._node) if self._owns_node else None

        def finish() -> None:
            lifetime.unregister(self)
            self._left.set_result(None)

        if gone is None:
            finish()
        else:
            gone.when_done(finish)

    # -- consuming --------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Message]:
        return self._iterate()

    def __aiter__(self) -> AsyncIterator[Message]:
        return self._iterate()

    def _iterate(self) -> MessageIterator:
        self._check_forked()
        iterator = MessageIterator(
            self._options.retain_bytes, self._lagged, self._undecodable, self._iterator_closed, self._is_own_thread
        )
        if self._left.done() or self._left_for_handlers.done():
            for batch in self._inbox.take_all():
                iterator.put(batch)
            iterator.end()
            return iterator
        with self._state:
            self._iterators[id(iterator)] = weakref.ref(iterator)
        self._home.call(self._serve)
        return iterator

    def _iterator_closed(self, iterator: MessageIterator, rest: Iterable[Batch]) -> None:
        with self._state:
            self._iterators.pop(id(iterator), None)
            nobody = not self._iterators
        if nobody and not self._has_message_handlers():
            for batch in rest:
                self._inbox.put(batch)

    def _living_iterators(self) -> list[MessageIterator]:
        with self._state:
            found = [reference() for reference in self._iterators.values()]
        return [iterator for iterator in found if iterator is not None]

    def _has_message_handlers(self) -> bool:
        return self.handles("message") or self.handles("received")

    def _serve(self) -> None:
        """On the loop: passes what waits to the iterators that are there, and to the handlers."""
        iterators = self._living_iterators()
        handled = self._has_message_handlers()
        if not iterators and not handled:
            return
        if iterators:
            waiting = self._inbox.take_all()
            for batch in waiting:
                for iterator in iterators:
                    iterator.put(batch)
                if not handled:
                    self._count(batch)
                else:
                    self._executor.post(self._handle_batch, batch)
        elif handled:
            while self._pumps < len(self._inbox):
                self._pumps += 1
                self._executor.post(self._pump)

    def _pump(self) -> None:
        """On the executor: hands one batch to the handlers. What came too fast has been dropped from the inbox meanwhile."""
        self._pumps -= 1
        batch = self._inbox.take()
        if batch is not None:
            self._handle_batch(batch)

    def _handle_batch(self, batch: Batch) -> None:
        self._count(batch)
        emit = self.emit
        for index in range(batch.start, len(batch.envelope.payloads)):
            try:
                data = batch.decode(index)
            except PayloadError as error:
                self._undecodable(error)
                continue
            emit("message", data)
            if self.handles("received"):
                emit("received", batch.message(index, data))

    def _count(self, batch: Batch) -> None:
        self._counts["delivered"] += len(batch)
        if batch.late:
            self._counts["late"] += len(batch)

    # -- what the driver tells us (Sink), on the loop -----------------------------------------------------------

    def deliver(self, delivery: Deliver) -> None:
        self._inbox.put(Batch.of(delivery, self._author_of(delivery.propagation_source), self.topic))
        self._serve()

    def neighbor_up(self, peer: bytes, author: bytes) -> None:
        address = self._node.endpoint.address_of(peer) or ("", 0)
        new = Peer(format_author(author), f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}", _now())
        first = not self._peers
        self._peers[peer] = new
        log.debug("neighbour up: %s at %s", new.id, new.address)
        if first:
            self._executor.post(self._connected)
            joins, self._joins = self._joins, []
            for pending in joins:
                pending.set_result(None)
        self._post("neighbor_up", new)

    def neighbor_down(self, peer: bytes, author: bytes, reason: str) -> None:
        old = self._peers.pop(peer, None)
        if old is None:
            return
        log.debug("neighbour down: %s: %s", old.id, reason)
        self._post("neighbor_down", old, reason)
        self._settle_flushes()
        if not self._peers:
            self._executor.post(self._disconnected)
            self._node.look_again(self._topic_key)

    def progress(self, by_any: int, by_all: int) -> None:
        self._acked_by_any, self._acked_by_all = by_any, by_all
        with self._state:
            while self._unaccepted and self._unaccepted[0][0] <= by_any:
                self._unaccepted_bytes -= self._unaccepted.popleft()[1]
        self._acks_changed.set()
        self._settle_flushes()

    def equivocated(self, event: Equivocated) -> None:
        author = format_author(event.author)
        log.warning("%s signed two different messages with one number; nothing more of that session is accepted", author)
        self._post("equivocation", author, tuple((envelope.body, envelope.signature) for envelope in event.proof))

    def _author_of(self, peer: bytes) -> bytes:
        assert self._driver is not None
        link = self._driver.overlay.link(peer)
        return link.author if link is not None else b"\0" * 32

    # -- beginning --------------------------------------------------------------------------------------------

    def _join_topic(self) -> None:
        if self._leaving:
            return
        config = OverlayConfig(window=self._options.retain, max_bytes=self._options.retain_bytes, replay=self._options.replay)
        self._driver = self._node.open_topic(self._topic_key, self._epoch, config, self)
        self._alone_timer = self._home.loop.call_later(ALONE_WARNING, self._warn_alone)

    def _warn_alone(self) -> None:
        if self._peers or (self._sequence and self._acked_by_any):
            return
        tried = "; ".join(f"{name}: {state}" for name, state in self._node.describe_sources().items())
        log.warning(
            "%r: nobody found after %d s (%s; listening on port %d). Check that another program runs with this very topic"
            " (and secret), that both are on one network which passes multicast, or give one of them bootstrap= with the"
            " other's ticket",
            self.topic,
            ALONE_WARNING,
            tried,
            self._node.port,
        )

    # -- events -----------------------------------------------------------------------------------------------

    def _post(self, event: str, *args: Any) -> None:
        if event and self.handles(event):
            self._executor.post(self.emit, event, *args)

    def _connected(self) -> None:
        with self._lock:
            self._greeted = {id(handler) for handler in self._events.get("connected", {}).values()}
        self.emit("connected")

    def _disconnected(self) -> None:
        self._greeted = None
        self.emit("disconnected")

    def _listener_added(self, event: str, handler: Callable[..., Any]) -> None:
        self._check_forked()
        if event == "connected" and not self._leaving:
            self._executor.post(self._greet, handler)
        elif event in ("message", "received") and not self._leaving:
            self._home.call(self._serve)

    def _greet(self, handler: Callable[..., Any]) -> None:
        """A handler added while connected is called once, and not twice if it was added just before."""
        if self._greeted is not None and id(handler) not in self._greeted:
            self._greeted.add(id(handler))
            self._run("connected", handler, handler, (), {})

    def _lagged(self, count: int) -> None:
        if not self._counts["lagged"]:
            log.warning("handlers of %r are too slow: messages are dropped, oldest first (the lagged event counts them)", self.topic)
        self._counts["lagged"] += count
        self._post("lagged", count)

    def _undecodable(self, error: PayloadError) -> None:
        self._counts["undecodable"] += 1
        self._report_error(error)

    def _handler_failed(self, error: BaseException) -> None:
        self._report_error(error)

    def _report_error(self, error: BaseException) -> None:
        if self.handles("error"):
            self._executor.post(self.emit, "error", error)
        elif isinstance(error, PayloadError):
            log.warning("%s", error)
        else:
            log.error("a handler of %r raised", self.topic, exc_info=error)

    def _call_on_loop(self, function: Callable[..., object], *args: Any) -> None:
        self._home.call(function, *args)

    # -- guards -----------------------------------------------------------------------------------------------

    def _is_own_thread(self) -> bool:
        return self._home.is_current() or self._executor.is_current()

    def _check_forked(self) -> None:
        if lifetime.forked(self._home.birth):
            raise ForkedError("this swarm belongs to the parent process: make a new one with pubsub() in the child")

    def _check_usable(self) -> None:
        self._check_forked()
        if self._leaving:
            raise _left_error()

    # -- context managers ---------------------------------------------------------------------------------------

    def __enter__(self) -> "Swarm":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        leaving = self.leave()
        if not self._is_own_thread():
            leaving.result()

    async def __aenter__(self) -> "Swarm":
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        await self.leave()


def _left_error() -> SwarmLeft:
    return SwarmLeft("the swarm has left: make a new one with pubsub()")


def _now() -> datetime:
    return datetime.now(UTC)
