"""A port of the home router that leads to ours, so that strangers can dial us: asked for by PCP, NAT-PMP and UPnP-IGD at once.

All three are first asked something that changes nothing. Whichever answers first makes the mapping; only if it refuses is the
next one asked, so that there is never more than one to withdraw. The mapping is renewed, watched and, at the end, withdrawn.
"""

import asyncio
import contextlib
import logging
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from solyd_swarm.discovery.gateway import Gateway, find_gateway, gateway_at
from solyd_swarm.discovery.portmap_client import Mapping, PortMapClient, Refusals, RouterError, SilentRouter, Transport
from solyd_swarm.discovery.portmap_natpmp import NatPmp
from solyd_swarm.discovery.portmap_pcp import Pcp
from solyd_swarm.discovery.portmap_upnp import Upnp
from solyd_swarm.discovery.scope import scope_of
from solyd_swarm.discovery.source import Address

PROTOCOLS: tuple[type[PortMapClient], ...] = (Pcp, NatPmp, Upnp)
"""In the order preferred among those that answer at the same moment."""

LIFETIME = 2 * 3600
"""Seconds asked for: what RFC 6886 recommends. After a crash the mapping is gone by itself."""

LONGEST_LIFETIME = 24 * 3600
CHECK_EVERY = 60.0
"""Seconds between two looks whether the router still has it: routers restart, and forget. One small exchange."""

MAX_SILENT_CHECKS = 3
POLL_EVERY = 15.0 if sys.platform == "linux" else 60.0
"""Seconds between two looks at our own address and gateway. Reads a file on Linux, and runs a program elsewhere."""

SHORTEST_RENEWAL = 4.0
"""Seconds (RFC 6887, section 11.2.1): a router that grants less cannot make us send without pause."""

FIRST_RETRY, LAST_RETRY = 30.0, 900.0
SHORTEST_PAUSE = 1.0
"""Seconds: however often the network changes, no more attempts than this."""

GOODBYE = 0.4
"""Seconds that withdrawing may take."""

log = logging.getLogger("solyd_swarm.discovery.portmap")


@dataclass(slots=True)
class _Held:
    """A mapping of ours, and when to renew it (times of the loop, in seconds)."""

    mapping: Mapping
    renew_at: float
    expires_at: float


class PortMapper:
    """Keeps a port of the router mapped to ours for as long as it runs. Everything happens beside the caller, on its loop.

    Args:
        port: our TCP port.
        changed: called with the outer TCP address whenever there is another one; None when there is none any more.
        udp_port: a UDP port to map as well, if any; see `external_udp`.
        gateway: IPv4 literal of the router; by default the default gateway, looked up again as the network changes.
        interfaces: names or IP literals of the interfaces that may be used; empty: all.
        protocols: the ways tried.
        lifetime: seconds asked for; a router may grant others.
        check_every: seconds between two looks whether the router still knows of it.
        poll_every: seconds between two looks whether our address or gateway changed.
        is_public: whether an IP literal can be reached from the internet: others are not reported.

    Attributes:
        state: what is the case, in plain words.
        external: the outer address of the TCP port, None without mapping.
        external_udp: the same of the UDP port.
        refused: how many answers were refused, by protocol and reason.
    """

    def __init__(
        self,
        port: int,
        *,
        changed: Callable[[Address | None], None],
        udp_port: int | None = None,
        gateway: str | Gateway | None = None,
        interfaces: Sequence[str] = (),
        protocols: Sequence[type[PortMapClient]] = PROTOCOLS,
        lifetime: int = LIFETIME,
        check_every: float = CHECK_EVERY,
        poll_every: float = POLL_EVERY,
        is_public: Callable[[str], bool] = lambda ip: scope_of(ip) == "global",
    ) -> None:
        self._ports: dict[Transport, int] = {"tcp": port}
        if udp_port is not None:
            self._ports["udp"] = udp_port
        self._changed = changed
        self._wanted_gateway = gateway
        self._interfaces = tuple(interfaces)
        self._protocols = tuple(protocols)
        self._lifetime = max(1, min(lifetime, LONGEST_LIFETIME))
        self._check_every = check_every
        self._poll_every = poll_every
        self._is_public = is_public
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._asked: dict[Transport, int] = {}  # external ports asked for: what must be withdrawn, granted or not
        self._held: dict[Transport, _Held] = {}
        self.refused: Counter[str] = Counter()
        self._refusals = Refusals(self.refused)
        self.state = "not started"
        self.external: Address | None = None
        self.external_udp: Address | None = None

    async def start(self) -> None:
        """Begin. Returns at once; what becomes of it is told by ``changed`` and `state`."""
        if self._task is None:
            self._say("asking for a router")
            self._task = asyncio.create_task(self._run(), name="solyd_swarm port mapping")

    def network_changed(self) -> None:
        """Look at the network again now. Cheap to call often."""
        self._wake.set()

    async def close(self) -> None:
        """Withdraw the mapping and end, within half a second; idempotent. ``changed`` is not called any more."""
        if self._task is not None:
            self._changed = lambda _: None
            self._task.cancel()
            await asyncio.wait([self._task])
        self._say("ended")

    def _say(self, state: str) -> None:
        if state != self.state:
            log.info("port mapping: %s", state)
        self.state = state

    async def _run(self) -> None:
        delay = FIRST_RETRY
        while True:
            gateway = None
            try:
                gateway = await self._gateway()
                await self._serve(gateway)
                delay = FIRST_RETRY
                await asyncio.sleep(SHORTEST_PAUSE)
                continue
            except RouterError as error:
                self._say(str(error))
            except Exception:
                log.exception("port mapping failed, and is tried again in %.0f s", delay)
                self._say("failed, by a fault of its own")
            if await self._until(asyncio.get_running_loop().time() + delay * random.uniform(0.8, 1.2), gateway):
                delay = FIRST_RETRY
                await asyncio.sleep(SHORTEST_PAUSE)
            else:
                delay = min(delay * 2, LAST_RETRY)

    async def _gateway(self) -> Gateway | None:
        if isinstance(self._wanted_gateway, Gateway):
            return self._wanted_gateway
        if self._wanted_gateway is not None:
            return gateway_at(self._wanted_gateway, self._interfaces)
        return await find_gateway(self._interfaces)

    async def _serve(self, gateway: Gateway | None) -> None:
        """Map and keep mapped, until the network changes. Raises `RouterError` with the reason why it cannot (go on)."""
        if gateway is None:
            raise RouterError("no router: there is no IPv4 default gateway on the interfaces that may be used")
        if self._is_public(gateway.source):
            raise RouterError(f"not needed: our own address {gateway.source} is a public one")
        clients = [protocol(gateway, self._refusals) for protocol in self._protocols]
        client: PortMapClient | None = None
        try:
            client = await self._pick(clients)
            await self._keep(client, gateway)
        finally:
            # Also when cancelled: that is how closing gets here.
            if client is not None:
                await self._withdraw(client)
            for each in clients:
                await each.close()
            self._report()

    async def _pick(self, clients: Sequence[PortMapClient]) -> PortMapClient:
        """The first that answers and maps. Raises `RouterError` with what each of them said."""
        probes = {asyncio.create_task(client.probe()): client for client in clients}
        refusals: dict[str, str] = {}
        gateway = clients[0].gateway
        try:
            while probes:
                done, _ = await asyncio.wait(probes, return_when=asyncio.FIRST_COMPLETED)
                for probe in [each for each in probes if each in done]:
                    client = probes.pop(probe)
                    try:
                        probe.result()
                        await self._map_first(client)
                        return client
                    except RouterError as error:
                        log.debug("%s at %s: %s", client.name, gateway, error)
                        if probe.exception() is None or not isinstance(error, SilentRouter):
                            refusals[client.name] = str(error)
        finally:
            for probe in probes:
                probe.cancel()
            if probes:
                await asyncio.wait(probes)
                for probe in probes:
                    if not probe.cancelled():
                        probe.exception()  # seen
        if refusals:
            said = {reason: [name for name in refusals if refusals[name] == reason] for reason in refusals.values()}
            reasons = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in said.items())
            raise RouterError(f"the router at {gateway} maps no port for us ({reasons})")
        names = [client.name for client in reversed(clients)]
        tried = f"{', '.join(names[:-1])} and {names[-1]} were" if len(names) > 1 else f"{names[0]} was"
        raise RouterError(f"no router answered ({tried} tried)")

    async def _map_first(self, client: PortMapClient) -> None:
        """`_map`; leaves nothing behind at the router if it fails, or is cancelled."""
        try:
            await self._map(client)
        except BaseException:
            await self._withdraw(client)
            raise

    async def _map(self, client: PortMapClient) -> None:
        """Make or renew all mappings. Raises `RouterError` if that of the TCP port fails, or is worthless."""
        await self._map_one(client, "tcp")
        host = self._held["tcp"].mapping.external.host
        if scope_of(host) == "invalid":
            raise RouterError("it has no outer address")
        if not self._is_public(host):
            raise RouterError(f"its outer address {host} is itself a private one: there is another router before it, or the provider's")
        if "udp" in self._ports:
            try:
                await self._map_one(client, "udp")
            except RouterError as error:
                self._held.pop("udp", None)
                log.info("the router maps no UDP port: %s", error)
        mapping = self._held["tcp"].mapping
        self._say(f"mapped {mapping.external} by {client.name} for {_duration(mapping.lifetime)}")
        self._report()

    async def _map_one(self, client: PortMapClient, transport: Transport) -> None:
        wished = self._asked.setdefault(transport, self._ports[transport])
        mapping = await client.map(transport, self._ports[transport], wished, self._lifetime)
        lifetime = min(mapping.lifetime, LONGEST_LIFETIME)
        now = asyncio.get_running_loop().time()
        # RFC 6887, section 11.2.1: somewhere from a half to five eighths.
        self._asked[transport] = mapping.external.port
        self._held[transport] = _Held(mapping, now + max(lifetime * random.uniform(0.5, 0.625), SHORTEST_RENEWAL), now + lifetime)
        log.debug("%s maps %s %s to our port %d for %.0f s", client.name, transport, mapping.external, mapping.port, lifetime)

    async def _withdraw(self, client: PortMapClient) -> None:
        """Withdraw whatever may have been made, all at once, for a bounded time, also while being cancelled."""
        asked, self._asked = self._asked, {}
        self._held.clear()

        async def withdraw(transport: Transport, external_port: int) -> None:
            try:
                await client.unmap(transport, self._ports[transport], external_port)
            except (RouterError, TimeoutError) as error:
                log.debug("%s: the mapping of %s port %d may stay until it expires: %s", client.name, transport, external_port, error)

        tasks = [asyncio.create_task(withdraw(*each)) for each in asked.items()]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=GOODBYE)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)

    async def _keep(self, client: PortMapClient, gateway: Gateway) -> None:
        """Renew and watch until the network changes. Raises `RouterError` once the mapping is gone and cannot be had again."""
        loop = asyncio.get_running_loop()
        silent = 0
        while True:
            next_check = loop.time() + self._check_every * random.uniform(0.9, 1.1)
            if await self._until(min(next_check, *(held.renew_at for held in self._held.values())), gateway):
                if await self._gateway() != gateway:
                    self._say("the network changed: asking for a router")
                    return
                await asyncio.sleep(SHORTEST_PAUSE)
            try:
                if loop.time() < min(held.renew_at for held in self._held.values()) and await self._is_known(client):
                    silent = 0
                    continue
                await self._map(client)
                silent = 0
            except SilentRouter as error:
                silent += 1
                if silent >= MAX_SILENT_CHECKS or self._postpone(loop.time()):
                    raise RouterError(f"the router at {gateway} answers no more ({client.name}: {error})") from error

    async def _is_known(self, client: PortMapClient) -> bool:
        for held in tuple(self._held.values()):
            if not await client.check(held.mapping):
                log.info("the router has lost our mapping, or its outer address changed")
                return False
        return True

    def _postpone(self, now: float) -> bool:
        """After a renewal that was not answered: tried again after half of what is left. True if nothing is left."""
        for held in self._held.values():
            if held.renew_at <= now:
                held.renew_at = now + max((held.expires_at - now) / 2, SHORTEST_RENEWAL)
        return any(held.expires_at <= now for held in self._held.values())

    async def _until(self, deadline: float, gateway: Gateway | None) -> bool:
        """Waits until then. True as soon as the network has changed, or somebody says so."""
        loop = asyncio.get_running_loop()
        while (left := deadline - loop.time()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left, self._poll_every)):
                    await self._wake.wait()
            if self._wake.is_set():
                self._wake.clear()
                return True
            if await self._gateway() != gateway:
                return True
        return False

    def _report(self) -> None:
        """Tells what changed."""
        tcp, udp = self._held.get("tcp"), self._held.get("udp")
        self.external_udp = udp.mapping.external if udp else None
        external = tcp.mapping.external if tcp else None
        if external != self.external:
            self.external = external
            self._changed(external)


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} s"
