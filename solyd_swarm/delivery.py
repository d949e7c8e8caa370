"""From the overlay to handlers and iterators: each message to everybody who listens, or kept while nobody does."""

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from solyd_swarm.emitter import SwarmEmitter
from solyd_swarm.errors import PayloadError
from solyd_swarm.home import Executor, Home
from solyd_swarm.inbox import Inbox, MessageIterator, MessageRest
from solyd_swarm.message import Batch

_NO_NAMES: dict[str, Any] = {}


class Delivery:
    """Delivery of one swarm. Iterators come and go on the loop only, so that what one leaves behind keeps its place.

    Args:
        home: where the loop is.
        executor: what plain handlers run on.
        emitter: the swarm's.
        max_bytes: what may wait for the handlers, and for each iterator.
        max_age: seconds that messages wait for the first who listens.
        on_lag: told how many messages had to go because handlers or an iterator are too slow.
        on_error: told of what cannot be decoded.
        is_own_thread: tells whether a blocking ``for`` would block the swarm itself.
    """

    def __init__(
        self,
        home: Home,
        executor: Executor,
        emitter: SwarmEmitter,
        *,
        max_bytes: int,
        max_age: float,
        on_lag: Callable[[int], None],
        on_error: Callable[[PayloadError], None],
        is_own_thread: Callable[[], bool],
    ) -> None:
        self.delivered = 0
        self.late = 0
        self._home = home
        self._executor = executor
        self._emitter = emitter
        self._max_bytes = max_bytes
        self._max_age = max_age
        self._on_lag = on_lag
        self._on_error = on_error
        self._is_own_thread = is_own_thread
        self._inbox = Inbox(max_bytes)
        self._iterators: list[weakref.ref[MessageIterator]] = []
        self._abandoned: deque[MessageRest] = deque()  # of iterators that are not used any more
        self._at_hand: tuple[Batch, int] | None = None  # what the handlers are at, and the number after the message they have got
        self.ended = False

    def arrived(self, batch: Batch) -> None:
        """On the loop: the overlay delivers."""
        self._take_back()
        handled = self._handled()
        iterators = self._living()
        if iterators:
            self._hand_over(batch.as_shared() if handled else batch, iterators)
        if handled or not iterators:
            lost = self._inbox.put(batch.as_shared() if iterators else batch)
            if not handled:
                self._inbox.drop_older(self._max_age)
            elif lost:
                self._on_lag(lost)
        if handled:
            self._promise()

    def serve(self) -> None:
        """On the loop: somebody listens now, or has time again."""
        self._take_back()
        if self._handled():
            self._promise()
        elif iterators := self._living():
            for batch in self._inbox.take_all():
                if not batch.shared:
                    self._hand_over(batch, iterators)

    def iterate(self) -> MessageIterator:
        """A new iterator; from any thread."""
        iterator = MessageIterator(self._max_bytes, self._on_error, self._iterator_closed, self._is_own_thread)
        try:
            self._home.call(self._add, weakref.ref(iterator))
        except RuntimeError:  # the loop has ended, and nobody else is at work here
            self._add(weakref.ref(iterator))
        return iterator

    def end(self) -> None:
        """On the loop: nothing arrives any more. Iterators end with what they have got."""
        self.ended = True
        for iterator in self._living():
            iterator.end()

    def unread(self) -> list[Batch]:
        """On the loop: what nobody has read yet, each from its first message on that was not."""
        self._take_back()
        at_hand = self._at_hand
        waiting = [at_hand[0].rest(at_hand[1])] if at_hand is not None and at_hand[1] < at_hand[0].end else []
        iterators = self._living()
        if not iterators or self._handled():
            return waiting + self._inbox.waiting()
        return waiting + min((iterator.rest.waiting() for iterator in iterators), key=lambda batches: sum(map(len, batches)))

    # -- iterators, on the loop ---------------------------------------------------------------------------------

    def _add(self, reference: "weakref.ref[MessageIterator]") -> None:
        self._iterators.append(reference)
        self.serve()
        iterator = reference()
        if iterator is not None and self.ended:
            iterator.end()

    def _living(self) -> list[MessageIterator]:
        if not self._iterators:
            return []
        found = [iterator for reference in self._iterators if (iterator := reference()) is not None]
        if len(found) < len(self._iterators):
            self._iterators = [reference for reference in self._iterators if reference() is not None]
        return found

    def _hand_over(self, batch: Batch, iterators: list[MessageIterator]) -> None:
        lost = max([iterator.put(batch) for iterator in iterators])
        if not self._handled():
            self._count(batch, len(batch))
        if lost:
            self._on_lag(lost)

    def _iterator_closed(self, rest: MessageRest) -> None:
        """From any thread, also out of the garbage collector: takes no lock."""
        self._abandoned.append(rest)
        try:
            self._home.call(self.serve)
        except RuntimeError:
            return  # the loop has ended; the next iterator finds it all the same

    def _take_back(self) -> None:
        """What the last iterator has not consumed waits for the next one who listens, who may be there already."""
        batches: list[Batch] = []
        while self._abandoned:
            rest = self._abandoned.popleft()
            self._iterators = [ref for ref in self._iterators if (iterator := ref()) is not None and iterator.rest is not rest]
            batches = rest.take_all()
        if not batches or self._iterators:
            return
        if self._handled():  # by handlers that were there before, or that came after the iterator
            self._inbox.put_back(batch for batch in batches if not batch.shared)
        else:
            self._inbox.drop_shared()
            self._inbox.put_back(batch.as_shared(False) for batch in batches)

    # -- handlers -----------------------------------------------------------------------------------------------

    def _handled(self) -> bool:
        return self._emitter.handles("message") or self._emitter.handles("received")

    def _promise(self) -> None:
        if self._emitter.is_behind():
            return  # it has `serve` called when it is not any more
        for _ in range(self._inbox.promise()):
            self._executor.post(self._pump)

    def _pump(self) -> None:
        """On the executor: hands one batch to the handlers. What came too fast has been dropped from the inbox meanwhile."""
        self._inbox.redeem()
        if self._handled() and not self._emitter.is_behind():
            batch = self._inbox.take()
            if batch is not None:
                self._handle(batch)

    def _handle(self, batch: Batch) -> None:
        handlers_of, run = self._emitter.handlers_of, self._emitter.run
        index = batch.start
        undecodable = 0
        while index < batch.end:
            # Looked up for each message, since the one before may have changed them.
            message, received = handlers_of("message"), handlers_of("received")
            if not message and not received:
                break
            index += 1
            self._at_hand = batch, index
            try:
                data = batch.decode(index - 1)
            except PayloadError as error:
                undecodable += 1
                self._on_error(error)
                continue
            run("message", message, (data,), _NO_NAMES)
            if received:
                run("received", received, (batch.message(index - 1, data),), _NO_NAMES)
        self._at_hand = None
        self._count(batch, index - batch.start - undecodable)
        if index < batch.end and not batch.shared:
            # The last handler has gone: the rest waits for the next one who listens.
            self._inbox.put_back([batch.rest(index)])
            self._home.call(self.serve)

    def _count(self, batch: Batch, messages: int) -> None:
        self.delivered += messages
        if batch.late:
            self.late += messages
