"""The neighbours of one swarm as its user sees them, and those who wait for the first."""

from collections.abc import Iterator
from datetime import UTC, datetime

from solyd_swarm.core.keys import format_author
from solyd_swarm.message import Peer
from solyd_swarm.pending import Pending


class Neighbors:
    """The neighbours by instance key. Changed on the loop, read from any thread."""

    def __init__(self) -> None:
        self.were_any = False
        """Whether there has ever been one."""
        self._peers: dict[bytes, Peer] = {}
        self._waiting: list[Pending[None]] = []

    def __len__(self) -> int:
        return len(self._peers)

    def __iter__(self) -> Iterator[Peer]:
        return iter(tuple(self._peers.values()))

    def add(self, instance: bytes, author: bytes, address: tuple[str, int]) -> Peer:
        """A new neighbour, `address` being that of the other end of the channel. `settle` follows."""
        host, port = address
        peer = Peer(format_author(author), f"[{host}]:{port}" if ":" in host else f"{host}:{port}", datetime.now(UTC))
        self._peers[instance] = peer
        self.were_any = True
        return peer

    def remove(self, instance: bytes) -> Peer | None:
        """None if it was none."""
        return self._peers.pop(instance, None)

    def clear(self) -> None:
        """None is a neighbour any more."""
        self._peers.clear()

    def wait(self, pending: Pending[None]) -> None:
        """`pending` is done when there is one."""
        if self._peers:
            pending.set_result(None)
        else:
            self._waiting = [each for each in self._waiting if not each.done()]
            self._waiting.append(pending)

    def settle(self) -> None:
        """Tells those who wait that there is one."""
        waiting, self._waiting = self._waiting, []
        for pending in waiting:
            pending.set_result(None)

    def give_up(self, error: Exception) -> None:
        """Tells those who wait that there will be none."""
        waiting, self._waiting = self._waiting, []
        for pending in waiting:
            pending.set_exception(error)
