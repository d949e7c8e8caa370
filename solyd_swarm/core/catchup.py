"""Catching up with one peer at a time.

Whoever lacks much would be told the same long list by every neighbour. So one conversation that shows a large difference puts off
those with others, until it has ended, has come to a halt, or has taken too long.
"""

MUCH = 256
"""Ids of difference in number from which on it is worth while to wait for one another."""
LONGEST = 60.0
"""Seconds after which others get their turn all the same: bounds a peer that keeps us busy with what is not worth having."""


class CatchUp:
    """Whom we catch up with, and who waits for its turn."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._peer = b""
        self._since = 0.0
        self._waiting: dict[bytes, None] = {}
        self._last = b""  # who had its turn while others waited, and comes after them, until then
        self._last_until = 0.0

    def is_with(self, peer: bytes) -> bool:
        return self._peer == peer

    def may_begin(self, peer: bytes, now: float) -> bool:
        """Whether it is this peer's turn: not so where it just had one, and others waited for theirs."""
        return peer != self._last or now >= self._last_until

    def begin(self, peer: bytes, now: float) -> None:
        """A conversation begins in which we shall be told of much."""
        self._peer, self._since = peer, now

    def is_busy(self, now: float, fed_at: float) -> bool:
        """Whether we are catching up, and get on with it. `fed_at`: when the last body came."""
        return bool(self._peer) and now < self._since + LONGEST and now < max(fed_at, self._since) + self._patience

    @property
    def peer(self) -> bytes:
        """Whom we catch up with (empty: nobody)."""
        return self._peer

    def put_off(self, peer: bytes) -> None:
        """A round with this peer is due afterwards. As many wait as there are links."""
        self._waiting[peer] = None

    def end(self, now: float) -> list[bytes]:
        """Nobody is waited for any more; returns who waited."""
        waiting = [peer for peer in self._waiting if peer != self._peer]
        if waiting:
            self._last, self._last_until = self._peer, now + self._patience
        self._peer, self._waiting = b"", {}
        return waiting

    def forget(self, peer: bytes) -> None:
        """The link has gone."""
        self._waiting.pop(peer, None)
