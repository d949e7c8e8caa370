"""Where others see us, and what follows from it: our public address, and how the address translation (NAT) in between behaves.

Nobody is trusted. An address counts as ours when tellers in two networks agree, as long as there are tellers in two; and what is
told decides only what we ask others to try, and where the two ends of a punched connection aim: see `solyd_swarm.net.reachable`.
The terms are those of RFC 4787 (section 4.1: endpoint-independent mapping).
"""

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Container
from dataclasses import dataclass
from ipaddress import ip_address

from solyd_swarm.discovery.scope import may_dial, scope_of

MAX_TELLERS = 64
"""Peers whose word is kept: bounds a flood of instances. The oldest of the network that has most goes, so that one network cannot push
out the others."""
AGREEING = 2
"""Networks that must name an address, where as many say anything."""


def network_of(host: str) -> bytes:
    """What a host is counted by, as whoever has one address there easily has more: the /16 of an IPv4 address, the /32 of an IPv6 one."""
    ip = ip_address(host.partition("%")[0])
    mapped = None if ip.version == 4 else ip.ipv4_mapped
    packed = (mapped or ip).packed
    return packed[:2] if len(packed) == 4 else packed[:4]


def is_near(host: str, other: str) -> bool:
    """Whether two hosts may be on one link, where no firewall is in between: in one /64 of IPv6, or one /24 of IPv4."""
    one, two = (ip_address(each.partition("%")[0]) for each in (host, other))
    size = 3 if one.version == 4 else 8
    return one.version == two.version and one.packed[:size] == two.packed[:size]


@dataclass(frozen=True, slots=True)
class _Word:
    network: bytes
    host: str
    port: int
    stands: bool  # for our listening port, as we dialled from it


class Observed:
    """What neighbours say about where we are. Without IO.

    Attributes:
        refused: how many addresses were told that cannot be, by reason: ``"port"`` (0), ``"invalid"`` (multicast, unspecified,
            reserved ...), ``"scope"`` (one inside a network, from somebody outside it).
    """

    def __init__(self, may_tell: Callable[[str, str], bool] = may_dial) -> None:
        self.refused: Counter[str] = Counter()
        self._may_tell = may_tell
        self._words: OrderedDict[bytes, _Word] = OrderedDict()

    def tell(self, teller: bytes, teller_host: str, host: str, port: int, *, stands: bool) -> bool:
        """An instance, which we see at `teller_host`, says that it sees us at this address; its earlier word is forgotten.

        Args:
            stands: we dialled it from our listening port, so that the port, too, says where others may find us.

        Returns:
            Whether that can be.
        """
        if port == 0:
            reason = "port"
        elif scope_of(host) == "invalid":
            reason = "invalid"
        elif not self._may_tell(host, teller_host):
            reason = "scope"
        else:
            self._words.pop(teller, None)
            self._words[teller] = _Word(network_of(teller_host), host, port, stands)
            self._make_room()
            return True
        self.refused[reason] += 1
        return False

    def _make_room(self) -> None:
        while len(self._words) > MAX_TELLERS:
            networks = Counter(word.network for word in self._words.values())
            busiest = max(networks.values())
            del self._words[next(teller for teller, word in self._words.items() if networks[word.network] == busiest)]

    def forget(self, keep: Container[bytes] = ()) -> None:
        """We are somewhere else now; only the word of these tellers still counts."""
        self._words = OrderedDict((teller, word) for teller, word in self._words.items() if teller in keep)

    def host_by(self, teller: bytes) -> str:
        """Where this instance sees us; empty if it has not said."""
        word = self._words.get(teller)
        return word.host if word is not None else ""

    def public_host(self, version: int) -> str:
        """Our address in the internet, of this version of IP (4 or 6), as far as tellers agree; else empty."""
        networks: defaultdict[str, set[bytes]] = defaultdict(set)
        for word in self._words.values():
            if scope_of(word.host) == "global" and ip_address(word.host).version == version:
                networks[word.host].add(word.network)
        if not networks:
            return ""
        ranked = sorted(networks, key=lambda host: len(networks[host]), reverse=True)
        needed = min(AGREEING, len(set.union(*networks.values())))
        tied = len(ranked) > 1 and len(networks[ranked[0]]) == len(networks[ranked[1]])
        return ranked[0] if len(networks[ranked[0]]) >= needed and not tied else ""

    def mapped_ports(self, host: str) -> list[int]:
        """Where our listening port appeared on this address, most often told first."""
        return [port for port, _ in Counter(word.port for word in self._words.values() if word.stands and word.host == host).most_common()]

    def is_endpoint_independent(self, host: str) -> bool | None:
        """Whether our listening port has one port on this address, whomever we speak to; None while fewer than two have told."""
        told = [word.port for word in self._words.values() if word.stands and word.host == host]
        return len(set(told)) == 1 if len(told) > 1 else None
