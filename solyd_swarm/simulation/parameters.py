"""What a simulated run consists of."""

from dataclasses import dataclass

LATENCIES = {"lan": (0.2, 1.0), "wan": (20.0, 150.0)}
"""Milliseconds one way, (least, most) of a pair of peers."""
JOINS = ("star", "chain", "random", "simultaneous")


@dataclass(frozen=True, slots=True)
class Parameters:
    """One run. Times in seconds unless said otherwise; all shares between 0 and 1.

    Attributes:
        peers: how many there are from the start.
        messages: how many are measured, after `warmup` others.
        senders: how many peers publish, in turn.
        interval: between two messages.
        size: bytes of a message.
        fail: share of the peers that die at once, after the warm-up; the neighbours of the dead notice at once.
        wait: between that and the first measured message.
        loss: share of all frames that are lost.
        latency: milliseconds one way, (least, most) of a pair of peers.
        jitter: milliseconds by which a frame may take longer, at most.
        partition: for so long the peers are cut in two halves, from the first measured message on.
        churn: share of the peers that is replaced by new ones in a minute, while messages are measured.
        join: how peers come: all by the first at once (star), each by the one before it (chain), each by a random earlier one, one
            after the other (random), or all at the same moment by random others (simultaneous).
        settle: from the last join to the first message.
        drain: how long it may take until nobody misses anything, after the last message.
        antientropy: whether digests are compared at all.
        directory: whether peers go on discovering others (late, and a few at a time).
        hops: Plumtree's threshold for swapping a link of the tree, or None for the default.
    """

    peers: int = 100
    messages: int = 100
    senders: int = 1
    interval: float = 0.2
    size: int = 100
    warmup: int = 10
    fail: float = 0.0
    wait: float = 0.0
    loss: float = 0.0
    latency: tuple[float, float] = LATENCIES["lan"]
    jitter: float = 0.1
    partition: float = 0.0
    churn: float = 0.0
    join: str = "random"
    settle: float = 20.0
    drain: float = 60.0
    antientropy: bool = True
    directory: bool = True
    hops: int | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        """Raises `ValueError` naming what is wrong."""
        if not 1 < self.peers <= 1_000_000:
            raise ValueError(f"peers must be at least 2, not {self.peers}")
        if self.messages < 1 or self.warmup < 0 or self.size < 1:
            raise ValueError("there must be at least one message, of at least one byte")
        if not 1 <= self.senders <= self.peers:
            raise ValueError(f"senders must be at least 1 and at most the {self.peers} peers, not {self.senders}")
        for name, most in (("fail", 0.95), ("loss", 0.9), ("churn", 10.0)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be a share from 0 to {most}, not {getattr(self, name)}")
        if not 0 <= self.latency[0] <= self.latency[1] or self.jitter < 0:
            raise ValueError(f"latency must be MIN-MAX milliseconds, MIN at most MAX, not {self.latency}")
        for name in ("interval", "wait", "partition", "settle", "drain"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative")
        if self.join not in JOINS:
            raise ValueError(f"join must be one of {', '.join(JOINS)}, not {self.join!r}")


def parse_latency(text: str) -> tuple[float, float]:
    """`lan`, `wan` or `MIN-MAX` in milliseconds. Raises `ValueError`."""
    if text in LATENCIES:
        return LATENCIES[text]
    least, dash, most = text.partition("-")
    try:
        return float(least), float(most if dash else least)
    except ValueError:
        raise ValueError(f"latency must be lan, wan or MIN-MAX milliseconds, not {text!r}") from None
