"""Measures of the overlay's graph: active views as edges (HyParView, DSN 2007, section 2.3)."""

import random
from collections import deque
from dataclasses import dataclass

from solyd_swarm.simulation.peer import Peer

PATH_SOURCES = 64
"""Peers from which shortest paths are measured, where there are more: all pairs of 10,000 would take longer than the run."""


@dataclass(frozen=True, slots=True)
class Graph:
    """Attributes:

    in_degree: how many peers have how many others that hold them in their active views, by that number.
    clustering: mean over peers of the share of pairs of their neighbours that are neighbours of each other (peers with fewer than two
        neighbours count as 0).
    path: mean length of shortest paths, in hops, from up to `PATH_SOURCES` random peers to all that can be reached from them.
    diameter: the longest of those.
    isolated: peers without neighbours.
    components: sizes of what is connected, largest first.
    """

    in_degree: dict[int, int]
    clustering: float
    path: float
    diameter: int
    isolated: int
    components: list[int]


def neighbours(peers: list[Peer]) -> dict[int, list[int]]:
    """Index of each living peer -> indices of its active view, as far as those are alive."""
    by_id = {peer.id: peer.index for peer in peers if peer.alive}
    return {peer.index: [by_id[other] for other in peer.overlay.neighbors if other in by_id] for peer in peers if peer.alive}


def distances(edges: dict[int, list[int]], source: int) -> dict[int, int]:
    """Hops from one peer to each that can be reached: what a flood over links of equal latency needs."""
    found = {source: 0}
    todo = deque([source])
    while todo:
        at = todo.popleft()
        for other in edges[at]:
            if other not in found:
                found[other] = found[at] + 1
                todo.append(other)
    return found


def measure(peers: list[Peer], seed: int) -> Graph:
    """Measures the graph as it is now. `seed` chooses where paths are measured from."""
    edges = neighbours(peers)
    in_degree: dict[int, int] = {}
    counts = dict.fromkeys(edges, 0)
    for others in edges.values():
        for other in others:
            counts[other] += 1
    for count in counts.values():
        in_degree[count] = in_degree.get(count, 0) + 1
    sources = sorted(edges)
    if len(sources) > PATH_SOURCES:
        sources = random.Random(seed).sample(sources, PATH_SOURCES)
    total = pairs = diameter = 0
    for source in sources:
        found = distances(edges, source)
        total += sum(found.values())
        pairs += len(found) - 1
        diameter = max(diameter, max(found.values()))
    return Graph(
        dict(sorted(in_degree.items())),
        _clustering(edges),
        total / pairs if pairs else 0.0,
        diameter,
        sum(1 for others in edges.values() if not others),
        _components(edges),
    )


def _clustering(edges: dict[int, list[int]]) -> float:
    total = 0.0
    for others in edges.values():
        if len(others) > 1:
            known = set(others)
            closed = sum(1 for other in others for third in edges[other] if third in known)
            total += closed / (len(others) * (len(others) - 1))
    return total / len(edges) if edges else 0.0


def _components(edges: dict[int, list[int]]) -> list[int]:
    left = dict.fromkeys(edges)
    sizes: list[int] = []
    while left:
        found = distances(edges, next(iter(left)))
        for index in found:
            left.pop(index, None)
        sizes.append(len(found))
    return sorted(sizes, reverse=True)
