"""What a member remembers of a topic beyond its life: what it has received, except what nobody has read yet.

So a restart repeats nothing and loses nothing. A crash may repeat what came in the last moments before it.
"""

import logging
from collections.abc import Sequence
from hashlib import blake2b

import msgspec

from solyd_swarm.core.envelope import Envelope
from solyd_swarm.core.ledger import Ledger
from solyd_swarm.errors import IdentityError
from solyd_swarm.store.identity import Identity

log = logging.getLogger("solyd_swarm.store.memory")

MANY_UNREAD = 10_000
"""Envelopes that nobody has read, past which only the end is worth the time to save them: a crash then repeats some more."""

Unread = tuple[Envelope, int]
"""An envelope, and how many of its messages have been read all the same."""


class TopicMemory:
    """The memory of one topic, kept with an identity. Blocks while it uses the disk.

    Attributes:
        ledger: the numbers accepted in earlier lives; None where there is nothing, or nothing that can be read.
        partly_read: by (author, epoch), the first number not read of an envelope that will be delivered again.
    """

    def __init__(self, identity: Identity, topic_id: bytes) -> None:
        self._identity = identity
        self._topic_id = topic_id
        self._rest_id = blake2b(topic_id, digest_size=16, person=b"solyd partly").digest()
        self._saved: tuple[int, int, int] | None = None
        self.ledger: Ledger | None = None
        self.partly_read: dict[tuple[bytes, int], int] = {}
        try:
            blob = identity.load_ledger(topic_id)
            self.ledger = None if blob is None else Ledger.load(blob)
            rest = identity.load_ledger(self._rest_id)
            rows = [] if rest is None else msgspec.msgpack.decode(rest, type=list[tuple[bytes, int, int]])
            self.partly_read = {(author, epoch): number for author, epoch, number in rows}
        except (IdentityError, ValueError) as error:
            log.warning("what was kept about a topic cannot be read; messages of the last minutes may be delivered again: %s", error)
        self._rest_saved = dict(self.partly_read)

    def save(self, ledger: Ledger, unread: Sequence[Unread], *, final: bool) -> None:
        """Saves what has changed since the last time.

        Args:
            ledger: the numbers accepted, the unread ones too.
            unread: what was accepted but not read: to be delivered again in the next life.
            final: this life ends.
        """
        state = (ledger.version, len(unread), sum(read for _, read in unread))
        if state == self._saved or (len(unread) > MANY_UNREAD and not final):
            return
        self._saved = state
        rest = self.partly_read | {(envelope.author, envelope.epoch): envelope.first + read for envelope, read in unread if read}
        try:
            if rest != self._rest_saved:
                rows = [(author, epoch, number) for (author, epoch), number in rest.items()]
                self._identity.save_ledger(self._rest_id, msgspec.msgpack.encode(rows))
                self._rest_saved = rest
            without = [(envelope.author, envelope.epoch, envelope.first, envelope.last) for envelope, _ in unread]
            self._identity.save_ledger(self._topic_id, ledger.dump(without=without))
        except (IdentityError, ValueError) as error:
            log.warning("what was received cannot be remembered, a restart may deliver it again: %s", error)
