"""One encrypted channel over one TCP connection: an asyncio protocol around a `NoiseSession`.

The channel knows frames, not what they mean. It owns one timer and, while something waits, one scheduled flush; both end with it.
"""

import asyncio
import enum
import logging
import socket
from collections.abc import Iterable
from typing import Protocol, cast

from solyd_swarm.errors import RemoteProtocolError
from solyd_swarm.net.limits import DEFAULT_LIMITS, Limits
from solyd_swarm.net.noise import (
    KEEPALIVE,
    MAX_FRAME,
    MAX_HANDSHAKE_MESSAGE,
    MAX_PLAINTEXT,
    PROLOGUE,
    FrameReader,
    FrameWriter,
    NoiseSession,
)
from solyd_swarm.net.sockaddr import read_address

logger = logging.getLogger(__name__)

_READ_BUFFER = 256 * 1024  # must hold one Noise message and its length; what is not used yet costs no memory
_WRITE_BUFFER = 256 * 1024  # above it the transport pauses us, so that what waits does so in our queue, unsealed and countable
_SEALED_AT_ONCE = 4 * MAX_PLAINTEXT
_SEALED_PER_TURN = 16 * MAX_PLAINTEXT  # a fast peer must not keep the loop from everyone else


class ChannelOwner(Protocol):
    """What a channel calls, on its loop. `RemoteProtocolError` from the first two closes the channel with that text as reason.

    None of these is called from inside `send`, `abort` or `pause`; `channel_closed` is the last call, and never comes from inside any.
    """

    def channel_ready(self, channel: "Channel") -> None:
        """The handshake is complete: the properties that it yields can be read. Not called if it fails."""

    def channel_frames(self, channel: "Channel", frames: list[bytes]) -> None:
        """Frames that arrived together, in order, none empty."""

    def channel_backlog(self, channel: "Channel", size: int) -> None:
        """The backlog, now ``size`` bytes, has risen above the high mark or fallen to the low mark again."""

    def channel_closed(self, channel: "Channel", reason: str) -> None:
        """It has ended; called exactly once for each channel that was connected."""


class _State(enum.Enum):
    NEW = enum.auto()  # no connection yet
    HANDSHAKE = enum.auto()
    OPEN = enum.auto()
    LEAVING = enum.auto()  # what is queued still goes out, what comes in is thrown away
    CLOSED = enum.auto()  # connection_lost is due or has come


class Channel(asyncio.BufferedProtocol):
    """One encrypted channel. Made by the protocol factory of ``create_connection`` or ``create_server``, inside a running loop.

    A stranger can fill one handshake message here and no more; a peer one read buffer and one frame of `frame_limit` bytes.

    Args:
        owner: who is told.
        initiator: whether this side dialled.
        static_private: 32-byte X25519 private key of this instance.
        payload: at most 1,024 bytes that the other side finds in `remote_payload`.
        prologue: must be equal on both sides.
        limits: see `Limits`.
        may_cross: the other side may have dialled as well, and both have met in this connection.

    Attributes:
        initiator: whether this side dialled; if both did, to one connection, one of them gives way in the handshake.
        bytes_in, bytes_out: bytes received, and bytes handed to the socket, as on the wire.
        opened_at: loop time at which the handshake completed; 0.0 before.
        remote_address: IP literal (an IPv4 address mapped into IPv6 is given as IPv4; link-local ones with their zone) and port;
            ``("", 0)`` before the connection, or where the system does not tell.
        local_address: the same of this end.

    Raises:
        ValueError: the key is not 32 bytes long, or the payload is too long.
    """

    def __init__(
        self,
        owner: ChannelOwner,
        initiator: bool,
        static_private: bytes,
        *,
        payload: bytes = b"",
        prologue: bytes = PROLOGUE,
        limits: Limits = DEFAULT_LIMITS,
        may_cross: bool = False,
    ) -> None:
        self.initiator = initiator
        self.bytes_in = 0
        self.bytes_out = 0
        self.opened_at = 0.0
        self.remote_address: tuple[str, int] = ("", 0)
        self.local_address: tuple[str, int] = ("", 0)
        self._owner = owner
        self._limits = limits
        self._session = NoiseSession(initiator, static_private, prologue=prologue, payload=payload, may_cross=may_cross)
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport  # from connection_made on: in every state but NEW
        self._state = _State.NEW
        self._reason = ""
        self._closed = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._flusher: asyncio.Handle | None = None
        self._reader = FrameReader()
        self._input = memoryview(bytearray(2 + MAX_HANDSHAKE_MESSAGE))
        self._filled = 0
        self._reading_paused = False
        self._received_at = 0.0
        self._queue = FrameWriter()
        self._writing_paused = False
        self._above_mark = False
        self._sent_at = 0.0
        self._left = 0  # how many of bytes_out had left the transport when last looked at
        self._progress_at = 0.0
        self._peer_ended = False
        self._ended = False

    # What the owner reads.

    @property
    def is_open(self) -> bool:
        """Whether the handshake is complete and nobody has begun to close: what is sent now is queued."""
        return self._state is _State.OPEN

    @property
    def crossed(self) -> bool:
        """Whether both sides dialled, and met in one connection."""
        return self._session.crossed

    @property
    def remote_instance(self) -> bytes:
        """The other side's 32-byte instance key. Raises ``RuntimeError`` before the handshake is complete, like the next two."""
        return self._session.remote_static

    @property
    def handshake_hash(self) -> bytes:
        """64 bytes, equal on both sides, of this channel alone."""
        return self._session.handshake_hash

    @property
    def remote_payload(self) -> bytes:
        """The other side's ``payload``."""
        return self._session.remote_payload

    @property
    def frame_limit(self) -> int:
        """Longest frame accepted, in bytes (17 MiB). May be set, so that strangers can be held to less."""
        return self._reader.limit

    @frame_limit.setter
    def frame_limit(self, limit: int) -> None:
        self._reader.limit = min(limit, MAX_FRAME)

    @property
    def backlog(self) -> int:
        """Bytes that wait: in our queue and in the transport. What the system's socket buffers hold is not counted."""
        return 0 if self._state in (_State.NEW, _State.CLOSED) else self._queue.size + self._transport.get_write_buffer_size()

    @property
    def progress_at(self) -> float:
        """Loop time at which bytes were last seen to leave; now, if none is held up."""
        if self._state not in (_State.NEW, _State.CLOSED):
            self._watch_progress(self._loop.time())
        return self._progress_at

    # What the owner does.

    def send(self, frame: bytes) -> None:
        """Queue one frame; all that is queued in one turn of the loop is sealed and written together, at its end.

        Before the handshake it waits; while leaving and after the end it is thrown away, for `channel_closed` tells that anyway.
        With more than ``limits.backlog`` bytes queued the channel closes itself as too slow.

        Raises:
            ValueError: the frame is empty (that is the keepalive) or longer than `MAX_FRAME`.
        """
        if self._state in (_State.LEAVING, _State.CLOSED):
            return
        self._queue.push(frame)
        self._queued()

    def send_many(self, frames: Iterable[bytes]) -> None:
        """Queue frames in order, as `send` does. If one is refused, those before it are queued."""
        if self._state in (_State.LEAVING, _State.CLOSED):
            return
        push = self._queue.push
        try:
            for frame in frames:
                push(frame)
        finally:
            self._queued()

    def pause(self) -> None:
        """Stop reading: the peer will find us slow. Frames already read are still delivered, and silence is not held against it:
        that it died may go unnoticed until `resume`.
        """
        if self._state is _State.OPEN and not self._reading_paused:
            self._reading_paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read again."""
        if self._state in (_State.OPEN, _State.LEAVING) and self._reading_paused:
            self._reading_paused = False
            self._received_at = self._loop.time()
            self._transport.resume_reading()

    def close(self, reason: str, *, drain: bool = True) -> None:
        """Leave: take no more, send what is queued, say that we have ended, wait for the peer's end, all that in 0.5 s at most.

        Closing a socket with unread input resets the connection, and a reset throws away what the peer has not read yet: so input
        is read, and discarded, to its end. Before the handshake is complete this is `abort`; after the first time, nothing.

        Args:
            reason: a short sentence for `channel_closed`.
            drain: ``False`` throws away what is queued and not sealed yet.
        """
        if self._state in (_State.NEW, _State.HANDSHAKE):
            self.abort(reason)
        elif self._state is _State.OPEN:
            self._leave(reason)
            if not drain:
                self._queue.clear()
            self.resume()
            self._flush()

    def abort(self, reason: str) -> None:
        """End at once; what waits is lost. Idempotent. The reason given first, here or to `close`, is the one reported."""
        if self._state is _State.CLOSED:
            return
        was, self._state = self._state, _State.CLOSED
        self._reason = self._reason or reason
        self._release()
        if was is _State.NEW:
            self._closed.set()
        else:
            self._transport.abort()

    async def wait_closed(self) -> None:
        """Return when the connection has ended and `channel_closed` was called; at once if aborted before there was one."""
        await self._closed.wait()

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # create_connection and create_server make nothing else
        if self._state is _State.CLOSED:  # aborted while it was dialled
            self._transport.abort()
            return
        self.remote_address = read_address(transport.get_extra_info("peername"))
        self.local_address = read_address(transport.get_extra_info("sockname"))
        endpoint = transport.get_extra_info("socket")
        if endpoint is not None:
            endpoint.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._transport.set_write_buffer_limits(high=_WRITE_BUFFER)
        self._state = _State.HANDSHAKE
        self._progress_at = self._loop.time()
        self._arm(self._progress_at + self._limits.handshake)
        logger.debug("connected to %s port %d, %s", *self.remote_address, "dialled" if self.initiator else "accepted")
        first = self._session.start()
        if first:
            self._write(first)

    def connection_lost(self, exc: Exception | None) -> None:
        self._state = _State.CLOSED
        # Another error than OSError is one that an owner raised into the transport, which has reported it to the loop.
        self._reason = self._reason or ("connection lost" if exc is None or isinstance(exc, OSError) else "internal error")
        self._release()
        self._closed.set()
        logger.debug("closed %s port %d: %s", *self.remote_address, self._reason)
        self._owner.channel_closed(self, self._reason)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._input[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self.bytes_in += nbytes
        self._received_at = self._loop.time()
        if self._state not in (_State.HANDSHAKE, _State.OPEN):
            return
        self._filled += nbytes
        frames: list[bytes] = []
        try:
            try:
                self._read_messages(frames)
            finally:  # a broken message takes nothing away from the whole ones before it
                if frames and self.is_open:
                    self._owner.channel_frames(self, frames)
        except RemoteProtocolError as error:
            self.abort(str(error))

    def eof_received(self) -> bool:
        self._peer_ended = True
        whole = not self._filled and not self._reader.partial
        if self._state is _State.HANDSHAKE:
            self.abort("closed during the handshake" if whole else "connection lost")
        elif self._state is _State.OPEN:
            self._leave("closed by the peer" if whole else "connection lost")
            self._flush()
        elif self._state is _State.LEAVING and self._ended:
            self._transport.close()
        return True  # our half stays open until it is sent, or the timer ends it

    def pause_writing(self) -> None:
        self._writing_paused = True

    def resume_writing(self) -> None:
        self._writing_paused = False
        self._schedule_flush()

    # Receiving.

    def _read_messages(self, frames: list[bytes]) -> None:
        view, filled, position = self._input, self._filled, 0
        while filled - position >= 2:
            start = position + 2
            stop = start + (view[position] << 8 | view[position + 1])
            if self._state is _State.HANDSHAKE and stop - start > MAX_HANDSHAKE_MESSAGE:
                raise RemoteProtocolError("handshake message too long")
            if stop > filled:
                break
            position = stop
            if self._state is _State.OPEN:
                self._reader.feed(self._session.open(view[start:stop]), frames)
            elif self._state is _State.HANDSHAKE:
                self._read_handshake(bytes(view[start:stop]))
            else:  # the owner closed it in channel_ready
                return
        rest = view[position:filled]
        if self._session.complete and len(view) < _READ_BUFFER:
            self._input = memoryview(bytearray(_READ_BUFFER))
        self._input[: len(rest)] = rest
        self._filled = len(rest)

    def _read_handshake(self, message: bytes) -> None:
        reply = self._session.read_handshake(message)
        self.initiator = self._session.initiator
        if reply:
            self._write(reply)
        if self._session.complete:
            self._state = _State.OPEN
            self.opened_at = self._sent_at = self._loop.time()
            self._on_timer()
            logger.debug("channel to %s port %d is open", *self.remote_address)
            self._owner.channel_ready(self)
            if self._queue.size:
                self._schedule_flush()

    # Sending.

    def _queued(self) -> None:
        if self._queue.size > self._limits.backlog:
            self.abort("too slow")
        elif self._flusher is None and self._state is _State.OPEN and not (self._writing_paused and self._above_mark):
            # Also where the transport takes nothing: somebody has to see the queue grow.
            self._flusher = self._loop.call_soon(self._flush)

    def _schedule_flush(self) -> None:
        if self._flusher is None and self._state in (_State.OPEN, _State.LEAVING):
            self._flusher = self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        """Seal and write what is queued, while the transport takes it and others get their turn."""
        self._flusher = None
        if self._state not in (_State.OPEN, _State.LEAVING):
            return
        self._watch_progress(self._loop.time())
        room = _SEALED_PER_TURN
        while self._queue.size and room > 0 and not self._writing_paused and not self._transport.is_closing():
            room -= _SEALED_AT_ONCE
            self._seal(self._queue.take(_SEALED_AT_ONCE))
        if self._queue.size and not self._writing_paused:
            self._schedule_flush()
        if self._state is _State.OPEN:
            self._tell_backlog()
        elif self._state is _State.LEAVING and not self._queue.size:
            self._end()

    def _seal(self, plaintext: bytes) -> None:
        try:
            self._write(self._session.seal(plaintext))
        except OverflowError as error:
            self.abort(str(error))

    def _write(self, data: bytes) -> None:
        self._transport.write(data)
        self.bytes_out += len(data)
        self._sent_at = self._loop.time()

    def _tell_backlog(self) -> None:
        size = self.backlog
        if self._above_mark != (size > (self._limits.low_mark if self._above_mark else self._limits.high_mark)):
            self._above_mark = not self._above_mark
            self._owner.channel_backlog(self, size)

    def _watch_progress(self, now: float) -> None:
        """Bytes have left, or none waits in the transport: it takes what we give it, so our own queue is not held up either."""
        waiting = self._transport.get_write_buffer_size()
        if not waiting or self.bytes_out - waiting > self._left:
            self._progress_at = now
        self._left = self.bytes_out - waiting

    # Ending.

    def _leave(self, reason: str) -> None:
        self._state = _State.LEAVING
        self._reason = reason
        self._filled = 0
        self._arm(self._loop.time() + self._limits.drain)
        logger.debug("leaving %s port %d: %s", *self.remote_address, reason)

    def _end(self) -> None:
        """All is written: end our half, or the whole if the peer has ended its own. The transport sends its buffer first."""
        if self._peer_ended:
            self._transport.close()
        elif not self._ended:
            self._ended = True
            try:
                self._transport.write_eof()
            except OSError:  # the connection broke, and the transport does not know yet
                self.abort(self._reason)

    def _release(self) -> None:
        """Let go of everything that could fire or fill."""
        for handle in (self._timer, self._flusher):
            if handle is not None:
                handle.cancel()
        self._timer = self._flusher = None
        self._queue.clear()

    def _arm(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(when, self._on_timer)

    def _on_timer(self) -> None:
        """Look at every deadline, then sleep until the next. They only ever move back, so traffic need not touch the timer."""
        now, limits = self._loop.time(), self._limits
        if self._state is _State.HANDSHAKE:
            self.abort(f"handshake not finished after {limits.handshake:g} s")
        elif self._state is _State.LEAVING:
            self.abort(self._reason)
        elif self._state is _State.OPEN:
            self._watch_progress(now)
            idle = not self.backlog
            if now >= self._progress_at + limits.stall:
                self.abort(f"no progress for {limits.stall:g} s")
            elif not self._reading_paused and now >= self._received_at + limits.silence:
                self.abort(f"silent for {limits.silence:g} s")
            else:
                if idle and now >= self._sent_at + limits.keepalive:
                    self._seal(KEEPALIVE)
                self._arm_next(now, idle)

    def _arm_next(self, now: float, idle: bool) -> None:
        """Each deadline, or for one that does not count at present the earliest it could be if it did from now on."""
        self._arm(
            min(
                (self._sent_at if idle else now) + self._limits.keepalive,
                (now if self._reading_paused else self._received_at) + self._limits.silence,
                self._progress_at + self._limits.stall,
            )
        )
