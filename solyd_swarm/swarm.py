"""What `pubsub` returns: the swarm that users hold."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, TypeVar

from solyd_swarm import lifetime, payload
from solyd_swarm.core.events import Deliver, Equivocated, Publish, Quit
from solyd_swarm.core.keys import derive_topic_key, format_author, format_message_id
from solyd_swarm.core.overlay import OverlayConfig
from solyd_swarm.delivery import Delivery
from solyd_swarm.departure import Departure
from solyd_swarm.emitter import MAX_CALLS, SwarmEmitter
from solyd_swarm.errors import ForkedError, PayloadError, SwarmLeft
from solyd_swarm.lagging import Lagging
from solyd_swarm.message import Batch, Message, Peer, Stats
from solyd_swarm.neighbors import Neighbors
from solyd_swarm.net.driver import Driver
from solyd_swarm.node import BaseNode
from solyd_swarm.options import SwarmOptions
from solyd_swarm.outbox import Outbox
from solyd_swarm.pending import Pending
from solyd_swarm.store.memory import Unread

log = logging.getLogger("solyd_swarm.swarm")

ALONE_WARNING = 10.0

T = TypeVar("T")


class Swarm(SwarmEmitter):
    """One topic, joined. Made by `pubsub`; an event emitter whose methods may be called from any thread.

    Events:
        message(obj): an object has arrived; received(Message): the same with all that is known of it.
        connected(), disconnected(): there is a first neighbour; there is none any more. A handler of ``connected`` that is added while
            there is one is called, too.
        neighbor_up(Peer), neighbor_down(Peer, reason): ``reason`` is a short sentence.
        lagged(count): so many messages were dropped since the last time, because handlers or iterators are too slow.
        equivocation(author, proof): ``author`` an id; ``proof`` two pairs (body, signature) of bytes, as in docs/protocol.rst.
        error(exc): a handler raised, or a message could not be decoded (`PayloadError`).
        left(): the swarm has left.

    Attributes:
        topic: as given to `pubsub`.
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
        self._neighbors = Neighbors()
        self._outbox = Outbox(
            format_message_id(node.identity.public_key, self._epoch, 0)[:-1],
            options,
            has_peers=lambda: bool(self._neighbors),
            call=self._home.call,
            feed=self._feed,
        )
        self._driver: Driver | None = None
        self._partly_read: dict[tuple[bytes, int], int] = {}  # in an earlier life, with the first number that was not
        self._remember: Callable[[], None] | None = None
        self._alone_timer: asyncio.TimerHandle | None = None
        self._undecodable_count = 0
        self._counting = threading.RLock()  # collecting garbage may close an iterator anywhere
        self._lagging = Lagging(topic, self._enqueue, lambda count: self.emit("lagged", count))
        self._executor = self._home.executor(self._handler_failed)
        self._departure = Departure(self, self._home, self._executor, self._outbox, self._is_own_thread)
        self._delivery = Delivery(
            self._home,
            self._executor,
            self,
            max_bytes=options.retain_bytes,
            max_age=options.retain,
            on_lag=self._lagged,
            on_error=self._undecodable,
            is_own_thread=self._is_own_thread,
        )
        self._told_connected = False  # on the executor: which of the two events came last
        node.on_loop_ending.append(self._departure.end_with_loop)
        self._home.call(self._join_topic)
        if self._home.keeps_alive:
            lifetime.register(self)

    def __repr__(self) -> str:
        return f"<Swarm {self.topic!r} {self.id} {'left' if self._departure.begun else f'{len(self._neighbors)} neighbours'}>"

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
        return tuple(self._neighbors)

    @property
    def stats(self) -> Stats:
        """What happened so far."""
        overlay_log = self._driver.overlay.log if self._driver is not None else None
        bytes_in, bytes_out = self._node.endpoint.traffic()
        return Stats(
            neighbors=len(self._neighbors),
            published=self._outbox.published,
            acknowledged=self._outbox.acknowledged,
            lost=self._outbox.lost,
            held=len(overlay_log) if overlay_log is not None else 0,
            held_bytes=overlay_log.bytes if overlay_log is not None else 0,
            bytes_in=bytes_in,
            bytes_out=bytes_out,
            delivered=self._delivery.delivered,
            late=self._delivery.late,
            lagged=self._lagging.count,
            undecodable=self._undecodable_count,
            discovery=self._node.describe_sources(),
        )

    # -- publishing -------------------------------------------------------------------------------------------

    def publish(self, obj: Any) -> str:
        """Publishes an object to all members; never blocks.

        Args:
            obj: None, bool, int, float, str, bytes, list, tuple (arrives as a list), dict, aware datetime, nested at will.
                It is encoded at once: changing it later changes nothing.

        Returns:
            The message's id, equal at every peer: ``"<author>:<epoch>:<sequence>"``.

        Raises:
            UnpublishableType: something inside would not arrive equal; a ``TypeError`` that names its place.
            UnpublishableValue: out of range or nested too deep; a ``ValueError`` that names its place.
            MessageTooLarge: longer than ``max_message_size`` when encoded; a ``ValueError``.
            SwarmBusy: no neighbour has accepted what was published so far, and the publish buffer is full. (Where there is no neighbour
                the window is the buffer, and its oldest go: see `Stats.lost`.)
            SwarmLeft: the swarm has left.
            ForkedError: it belongs to the parent process.
        """
        if self._departure.begun or lifetime.forked(self._home.birth):
            self._check_usable()
        return self._outbox.add(payload.encode(obj))

    def _feed(self, batch: Publish) -> None:
        if self._driver is not None:
            self._driver.feed(batch)

    # -- waiting ----------------------------------------------------------------------------------------------

    def joined(self) -> Pending[None]:
        """Done when there is at least one neighbour: at once if there is one.

        Raises `SwarmLeft` (the result, too, if we leave before there is one), `ForkedError`.
        """
        self._check_usable()
        pending: Pending[None] = Pending(self._is_own_thread)
        self._home.call(self._await_join, pending)
        return pending

    def _await_join(self, pending: Pending[None]) -> None:
        if self._departure.begun and not self._neighbors:
            pending.set_exception(_left_error())
        else:
            self._neighbors.wait(pending)

    def flush(self) -> Pending[None]:
        """Done when what was published so far is acknowledged by every present neighbour, and by one at least.

        What left the window before anybody had it (`Stats.lost`) is not waited for. Raises `SwarmLeft` (the result, too, if we leave
        before), `ForkedError`.
        """
        self._check_usable()
        pending: Pending[None] = Pending(self._is_own_thread)
        self._home.call(self._await_flush, self._outbox.published, pending)
        return pending

    def _await_flush(self, sequence: int, pending: Pending[None]) -> None:
        if self._departure.under_way:
            pending.set_exception(_left_error())
        else:
            self._outbox.flush(sequence, pending)

    def wait(self, timeout: float | None = None) -> None:
        """Blocks until the swarm has left.

        Raises:
            TimeoutError: after ``timeout`` seconds.
            RuntimeError: called on the swarm's own threads, as in a handler.
            ForkedError: it belongs to the parent process.
        """
        self._check_forked()
        self._departure.done.result(timeout)

    # -- leaving ----------------------------------------------------------------------------------------------

    def leave(self) -> Pending[None]:
        """Says goodbye, drains, closes: nothing is left behind, within a second. Idempotent; from any thread, also a handler.

        A handler that waits for the result (with ``await``) is neither cancelled nor waited for. In a forked child it does nothing.
        """
        if lifetime.forked(self._home.birth):
            nothing: Pending[None] = Pending(lambda: False)
            nothing.set_result(None)
            return nothing
        self._departure.begin()
        return self._departure.pending()

    def begin_leave(self, within: float) -> None:
        """As `leave`, when the process ends."""
        self._departure.begin(within)

    def say_goodbye(self) -> None:
        """For `Departure`."""
        self._neighbors.give_up(_left_error())
        self._outbox.give_up(_left_error())
        if self._alone_timer is not None:
            self._alone_timer.cancel()
        if self._driver is not None:
            self._driver.feed(Quit())
        self._remember = self._node.close_topic(self._topic_key) if self._remember is None else self._remember
        self._warn_of_unreceived()
        self._on_left(self)
        self._delivery.end()
        if self._neighbors:
            self._enqueue(self._disconnected)
        self._neighbors.clear()
        self._post("left")

    async def close_node(self) -> None:
        """For `Departure`."""
        if self._remember is not None:
            self._remember()
        if self._owns_node:
            await self._node.close()

    def leave_loop(self) -> Pending[None] | None:
        """For `Departure`."""
        if self._departure.end_with_loop in self._node.on_loop_ending:
            self._node.on_loop_ending.remove(self._departure.end_with_loop)
        return self._home.exit(self._node) if self._owns_node else None

    def _warn_of_unreceived(self) -> None:
        missing = self._outbox.published - self._outbox.acknowledged
        if missing and not self._delivery.ended:
            log.warning(
                "left %r with %d of %d published messages that no other peer is known to have received",
                self.topic,
                missing,
                self._outbox.published,
            )

    # -- consuming --------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Message]:
        """Yields messages until the swarm has left, from a queue of its own (``retain_bytes``; beyond it ``lagged``).

        Those that cannot be decoded are told by ``error`` and left out. Raises ``RuntimeError`` on the swarm's own threads.
        """
        self._check_forked()
        return self._delivery.iterate()

    def __aiter__(self) -> AsyncIterator[Message]:
        """As `__iter__`, on any event loop."""
        self._check_forked()
        return self._delivery.iterate()

    # -- what the driver tells us (Sink), on the loop -----------------------------------------------------------

    def deliver(self, delivery: Deliver) -> None:
        batch = Batch.of(delivery, self._author_of(delivery.propagation_source), self.topic)
        if self._partly_read:
            envelope = delivery.envelope
            unread = self._partly_read.get((envelope.author, envelope.epoch), 0)
            if envelope.first < unread <= envelope.last:
                del self._partly_read[envelope.author, envelope.epoch]
                batch = batch.rest(unread - envelope.first)
        self._delivery.arrived(batch)

    def _unread(self) -> list[Unread]:
        return [(batch.envelope, batch.start) for batch in self._delivery.unread()]

    def neighbor_up(self, peer: bytes, author: bytes) -> None:
        is_first = not self._neighbors
        new = self._neighbors.add(peer, author, self._node.endpoint.address_of(peer) or ("", 0))
        log.debug("neighbour up: %s at %s", new.id, new.address)
        if is_first:
            self._enqueue(self._connected)
            self._neighbors.settle()
        self._post("neighbor_up", new)

    def neighbor_down(self, peer: bytes, author: bytes, reason: str) -> None:
        old = self._neighbors.remove(peer)
        if old is None:
            return
        log.debug("neighbour down: %s: %s", old.id, reason)
        self._post("neighbor_down", old, reason)
        self._outbox.settle()
        if not self._neighbors:
            self._enqueue(self._disconnected)
            self._node.look_again(self._topic_key)

    def progress(self, by_any: int, by_all: int, lost: int) -> None:
        if lost and not self._outbox.lost:
            log.warning(
                "messages published on %r leave the window, and nobody is known to have received them (stats.lost counts them):"
                " see that somebody is there, publish slower, or give pubsub() a larger retain or retain_bytes",
                self.topic,
            )
        self._outbox.progress(by_any, by_all, lost)

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
        if self._departure.begun:
            return
        config = OverlayConfig(window=self._options.retain, max_bytes=self._options.retain_bytes, replay=self._options.replay)
        self._driver, self._partly_read = self._node.open_topic(self._topic_key, self._epoch, config, self, self._unread)
        self._alone_timer = self._home.loop.call_later(ALONE_WARNING, self._warn_alone)

    def _warn_alone(self) -> None:
        if self._neighbors.were_any:
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
        if self.handles(event):
            self._enqueue(self.emit, event, *args)

    def _enqueue(self, function: Callable[..., object], *args: Any) -> bool:
        """Has something called on the executor. Bounds peers that come and go while a handler hangs: the newest is dropped."""
        if len(self._executor) >= MAX_CALLS:
            log.debug("handlers of %r are far behind: an event is dropped", self.topic)
            return False
        return self._executor.post(function, *args)

    def _connected(self) -> None:
        self._told_connected = True
        self.emit_connected()

    def _disconnected(self) -> None:
        self._told_connected = False
        self.emit("disconnected")

    def _greet(self) -> None:
        self.greet(connected=self._told_connected)

    def _listener_added(self, event: str) -> None:
        self._check_forked()
        if event == "connected":
            self._enqueue(self._greet)
        elif event in ("message", "received"):
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nothing arrives any more
                self._home.call(self._delivery.serve)

    def _drained(self) -> None:
        self._delivery.serve()

    def _lagged(self, count: int) -> None:
        self._lagging.dropped(count)

    def _undecodable(self, error: PayloadError) -> None:
        with self._counting:
            self._undecodable_count += 1
        self._report_error(error)

    def _handler_failed(self, error: BaseException) -> None:
        self._report_error(error)

    def _report_error(self, error: BaseException) -> None:
        if self.handles("error") and self._enqueue(self.emit, "error", error):
            return
        if isinstance(error, PayloadError):
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
        if self._departure.begun:
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
