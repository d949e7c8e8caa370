"""The routing table of the DHT: the package's buckets, which no single network can keep for itself."""

from collections import Counter
from heapq import nsmallest
from typing import Any

from kademlia.node import Node
from kademlia.routing import RoutingTable

from solyd_swarm.discovery.dht_storage import network_of
from solyd_swarm.discovery.scope import scope_of

MAX_CONTACTS = 1_024
MAX_PER_NETWORK = 16
"""Contacts of one network in the table. The same network may be many honest nodes (behind one address), so it is not one alone."""
MAX_PER_BUCKET = 2
"""Contacts of one network that keep their place in a full bucket when others come; and those of its list of replacements."""


class Table(RoutingTable):  # type: ignore[misc]
    """The package's routing table; a full bucket's oldest node is checked without an orphaned task."""

    def get_bucket_for(self, node: Node) -> int:
        """Index of the bucket; ranges include both ends (the package leaves the upper one out, so such nodes were never removed)."""
        return next(index for index, bucket in enumerate(self.buckets) if node.long_id <= bucket.range[1])

    def add_contact(self, node: Node) -> None:
        while True:
            index = self.get_bucket_for(node)
            bucket = self.buckets[index]
            if not bucket.is_new_node(node) or len(bucket) < self.ksize:
                bucket.add_node(node)
                return
            if not bucket.has_in_range(self.node) and bucket.depth() % 5 == 0:  # section 4.2 of the Kademlia paper
                break
            self.split_bucket(index)
        if not self._displace(bucket, node) and self._may_wait(bucket, node):
            bucket.add_node(node)  # to the replacements, as the bucket is full
            self.protocol.check(bucket.head())

    def find_neighbors(self, node: Node, k: int | None = None, exclude: Node | None = None) -> list[Node]:
        """The closest nodes, exactly (the package takes the first ones that a walk over the buckets meets), closest first."""
        self.buckets[self.get_bucket_for(node)].touch_last_updated()
        others = (other for other in self.contacts() if other.id != node.id and not (exclude and other.same_home_as(exclude)))
        return nsmallest(k or self.ksize, others, key=node.distance_to)

    def contacts(self) -> list[Node]:
        """Every node in the table."""
        return [node for bucket in self.buckets for node in bucket.get_nodes()]

    def get(self, node_id: bytes) -> Node | None:
        """The node of that id."""
        return self.buckets[self.get_bucket_for(Node(node_id))][node_id]

    def has_room_for(self, node: Node) -> bool:
        """Whether a node may get into the table at all. Whoever is at its very address now does not count: it makes way."""
        others = [other for other in self.contacts() if not other.same_home_as(node)]
        # Attack: one network plays many nodes to surround us. Its later ones are refused; nobody is evicted for them. Processes of
        # this machine share one address and could surround us by simpler means.
        local = scope_of(node.ip) == "loopback"
        crowd = 0 if local else sum(network_of(other.ip) == network_of(node.ip) for other in others)
        return len(others) < MAX_CONTACTS and crowd < MAX_PER_NETWORK

    def _displace(self, bucket: Any, node: Node) -> bool:
        """A node comes to a full bucket: it takes the place of the newest one of a network that has too many there, if it is of another."""
        # Attack: one network fills buckets before anybody else comes. It may have what nobody wants: it loses its newest, and keeps two.
        crowds = Counter(network_of(other.ip) for other in bucket.nodes.values())
        network, crowd = crowds.most_common(1)[0]
        if crowd <= MAX_PER_BUCKET or crowds[network_of(node.ip)] >= MAX_PER_BUCKET:
            return False
        newest = next(other for other in reversed(bucket.nodes.values()) if network_of(other.ip) == network)
        del bucket.nodes[newest.id]
        bucket.add_node(node)
        return True

    def _may_wait(self, bucket: Any, node: Node) -> bool:
        # Attack: one network fills the list of those that come after, and inherits the bucket. Its later ones are refused.
        waiting = bucket.replacement_nodes.values()
        crowd = sum(network_of(other.ip) == network_of(node.ip) for other in waiting if other.id != node.id)
        return crowd < MAX_PER_BUCKET
