"""The services that were heard: those of our topics, and others, in case we join theirs."""

from collections import OrderedDict
from collections.abc import Iterator

from solyd_swarm.discovery.mdns_service import Service

MAX_SERVICES = 512
"""Services remembered of our topics, and as many of others: floods of made-up services would fill the memory. The
one not heard for longest goes. Only who knows a topic, or replays an announcement of it, gets into the first table, so that a flood cannot
push out those we need."""


class Known:
    """Two tables by name, in the order of when they were last heard.

    Attributes:
        matched: (topic key, service) of each service that belongs to one of our topics.
        unmatched: the others.
    """

    def __init__(self) -> None:
        self.matched: OrderedDict[str, tuple[bytes, Service]] = OrderedDict()
        self.unmatched: OrderedDict[str, Service] = OrderedDict()

    def __iter__(self) -> Iterator[tuple[str, Service]]:
        yield from [(name, service) for name, (_, service) in self.matched.items()]
        yield from list(self.unmatched.items())

    def __len__(self) -> int:
        return len(self.matched) + len(self.unmatched)

    def find(self, name: str) -> tuple[bytes | None, Service | None]:
        """Its topic key, if it is one of ours, and the service, if it is known."""
        return self.matched.get(name) or (None, self.unmatched.get(name))

    def of(self, topic_key: bytes) -> list[Service]:
        """The services of one of our topics."""
        return [service for key, service in self.matched.values() if key == topic_key]

    def remember(self, name: str, topic_key: bytes | None, service: Service) -> None:
        """It was heard just now."""
        self.forget(name)
        if topic_key is not None:
            self.matched[name] = (topic_key, service)
        else:
            self.unmatched[name] = service
        for table in (self.matched, self.unmatched):
            while len(table) > MAX_SERVICES:
                table.popitem(last=False)

    def forget(self, name: str) -> None:
        """It has gone."""
        self.matched.pop(name, None)
        self.unmatched.pop(name, None)

    def release(self, topic_key: bytes) -> None:
        """The topic is no longer one of ours."""
        for name, (key, service) in list(self.matched.items()):
            if key == topic_key:
                self.remember(name, None, service)

    def clear(self) -> None:
        self.matched.clear()
        self.unmatched.clear()
