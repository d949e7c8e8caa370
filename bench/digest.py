"""What the digest costs: insert and remove at any size, and a round after a change, against building the set anew.

``python bench/digest.py [--items N ...]``: both sides in one run, each figure the median of several. Exit status 0; 2 bad usage.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable

from solyd_swarm.core.reconcile import ItemSet, Negentropy

REPEAT = 7


def median(action: Callable[[], object]) -> float:
    """Seconds that it takes, the median of `REPEAT` times."""
    times = []
    for _ in range(REPEAT):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def items(count: int, rng: random.Random) -> list[tuple[int, bytes]]:
    """Timestamps of ten minutes, in microseconds, and ids."""
    return sorted((rng.randrange(600_000_000), rng.randbytes(32)) for _ in range(count))


def conversation(ours: ItemSet, theirs: ItemSet) -> int:
    """A whole reconciliation; returns the bytes of it."""
    leader, answerer = Negentropy(60_000, items=ours), Negentropy(60_000, items=theirs)
    query: bytes | None = leader.initiate()
    total = 0
    while query is not None:
        answer = answerer.reconcile(query).reply
        assert answer is not None
        total += len(query) + len(answer)
        query = leader.reconcile(answer).reply
    return total


def measure(count: int, rng: random.Random) -> dict[str, float]:
    """Microseconds for one item, milliseconds for a round, by what it is."""
    content = items(count, rng)
    held, other = ItemSet(content), ItemSet(content)
    fresh = items(1000, rng)

    def insert_and_remove() -> None:
        for timestamp, id in fresh:
            held.add(timestamp, id)
        for timestamp, id in fresh:
            held.remove(timestamp, id)

    def insert_with_summary() -> None:
        for timestamp, id in fresh:
            held.add(timestamp, id)
            held.summary()
        for timestamp, id in fresh:
            held.remove(timestamp, id)

    extra = items(100, rng)

    def round_after_changes() -> None:
        for timestamp, id in extra:
            held.add(timestamp, id)
        conversation(held, other)
        for timestamp, id in extra:
            held.remove(timestamp, id)

    def rebuild() -> None:
        """As the reference implementation does: sort and seal all before a round."""
        conversation(ItemSet(sorted([*content, *extra])), other)

    return {
        "insert or remove, us": median(insert_and_remove) / 2000 * 1e6,
        "insert, summary and remove, us": median(insert_with_summary) / 1000 * 1e6,
        "round with 100 differences, ms": median(round_after_changes) * 1e3,
        "the same, the set built anew, ms": median(rebuild) * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What the digest costs.")
    parser.add_argument("--items", type=int, nargs="+", default=[1000, 10_000, 100_000, 400_000], help="sizes of the set")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if min(options.items) < 100:
        parser.error("--items: at least 100")
    rows = {count: measure(count, random.Random(options.seed)) for count in options.items}
    print(f"{'items':>36}" + "".join(f"{count:>12,}" for count in rows))
    for name in next(iter(rows.values())):
        print(f"{name:>36}" + "".join(f"{row[name]:>12.2f}" for row in rows.values()))


if __name__ == "__main__":
    main()
