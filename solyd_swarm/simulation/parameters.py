"""What a simulated run consists of."""

import math
from dataclasses import dataclass

from solyd_swarm.core.wire import MAX_MESSAGE

LATENCIES = {"lan": (0.2, 1.0), "wan": (20.0, 150.0)}
"""Milliseconds one way, (least, most) of a pair of peers."""
JOINS = ("star", "chain", "random", "simultaneous")
BOUNDS: dict[str, tuple[float, float]] = {
    "peers": (2, 1_000_000),
    "messages": (1, math.inf),
    "interval": (0, math.inf),
    "size": (1, MAX_MESSAGE),
    "warmup": (0, math.inf),
    "fail": (0, 0.95),
    "wait": (0, math.inf),
    "loss": (0, 0.9),
    "jitter": (0, math.inf),
    "partition": (0, math.inf),
    "churn": (0, 10),
    "settle": (0, math.inf),
    "drain": (0, math.inf),
}
"""(least, most), where one does not depend on another; everything is finite."""


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
        """Raises `ValueError`, a sentence that begins with the name of what is wrong."""
        for name, (least, most) in BOUNDS.items():
            value = getattr(self, name)
            if not least <= value <= most or value == math.inf:
                wanted = f"from {least} to {most:,}" if most < math.inf else "finite" if value == math.inf else f"at least {least}"
                raise ValueError(f"{name} must be {wanted}, not {value}")
        if not 1 <= self.senders <= self.peers:
            raise ValueError(f"senders must be from 1 to the number of peers, {self.peers:,}, not {self.senders}")
        if not 0 <= self.latency[0] <= self.latency[1] < math.inf:
            raise ValueError("latency must be MIN-MAX milliseconds, 0 <= MIN <= MAX, not {:g}-{:g}".format(*self.latency))
        if self.join not in JOINS:
            raise ValueError(f"join must be one of {', '.join(JOINS)}, not {self.join!r}")


def parse_latency(text: str) -> tuple[float, float]:
    """`lan`, `wan` or `MIN-MAX` in milliseconds. Raises `ValueError`."""
    if text in LATENCIES:
        return LATENCIES[text]
    least, dash, most = text.partition("-")
    try:
        found = float(least), float(most if dash else least)
    except ValueError:
        found = math.nan, math.nan
    if not all(map(math.isfinite, found)):
        raise ValueError(f"must be lan, wan or MIN-MAX milliseconds, not {text!r}")
    return found
