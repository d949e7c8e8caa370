"""Where instances are, by our own experience and not by what anybody claims.

A source that reports one and the same candidate again and again costs nothing then. A claim would not do: who claims to listen at
the address of another would keep us from ever dialling it.
"""

from collections import OrderedDict

MAX_PLACES = 1024
"""Addresses remembered: bounds a member that has us find it at one port after another. The one found longest ago goes."""

MAX_PEERS = 1024
"""Members whose host is remembered; the one that came up longest ago is forgotten."""

Address = tuple[str, int]


class Places:
    """Which instance answered at an address, forgotten with its channel; and the hosts that members were seen at."""

    def __init__(self) -> None:
        self._instances: OrderedDict[Address, bytes] = OrderedDict()
        self._hosts: OrderedDict[bytes, str] = OrderedDict()

    def at(self, address: Address) -> bytes:
        """The instance reached there; empty if we do not know of one."""
        return self._instances.get(address, b"")

    def reached(self, address: Address, instance: bytes) -> None:
        """Our dial of this address was answered by this instance."""
        self._instances[address] = instance
        self._instances.move_to_end(address)
        while len(self._instances) > MAX_PLACES:
            self._instances.popitem(last=False)

    def lost(self, instance: bytes) -> None:
        """There is no channel to this instance any more."""
        for address in [address for address, other in self._instances.items() if other == instance]:
            del self._instances[address]

    def met(self, instance: bytes, host: str) -> None:
        """A member has a channel with us, from this IP literal."""
        self._hosts[instance] = host
        self._hosts.move_to_end(instance)
        while len(self._hosts) > MAX_PEERS:
            self._hosts.popitem(last=False)

    def host_of(self, instance: bytes) -> str | None:
        """The IP literal that a member was last seen at."""
        return self._hosts.get(instance)
