"""UPnP-IGD: the router's description is searched for by SSDP, and its port mappings are set by SOAP.

UPnP Device Architecture 1.1; WANIPConnection:1 and :2, WANPPPConnection:1 of the UPnP Forum. Done here, on what Python brings
along, because the usual C library fetches whatever URL an answer to the search names, allocates what the answer says, blocks
its thread for as long as a device trickles, and has wheels for few systems.
"""

import asyncio
import contextlib
import logging
import random
import socket
from collections.abc import Mapping as Fields
from ipaddress import AddressValueError, IPv4Address
from typing import Any
from xml.etree.ElementTree import Element
from xml.sax.saxutils import escape

from solyd_swarm.discovery.gateway import Gateway
from solyd_swarm.discovery.portmap_client import GOODBYE_WAITS, Mapping, PortMapClient, Refusals, RouterError, SilentRouter, Transport
from solyd_swarm.discovery.portmap_http import Url, exchange, parse_xml, read_response_fields, router_url, text_of
from solyd_swarm.discovery.source import Address
from solyd_swarm.errors import RemoteProtocolError

SEARCHED = (
    "urn:schemas-upnp-org:device:InternetGatewayDevice:1",
    "urn:schemas-upnp-org:device:InternetGatewayDevice:2",
    "urn:schemas-upnp-org:service:WANIPConnection:1",
    "urn:schemas-upnp-org:service:WANPPPConnection:1",
)
SEARCH_WAITS = (1.0, 2.0, 3.0)
"""Seconds: a search is repeated, for multicast is not acknowledged and lost easily on wireless networks."""

PROBE_TIMEOUT = 10.0
"""Seconds for searching and reading descriptions together."""

MAX_WAIT_ASKED = 1
"""MX: devices spread their answers over so many seconds."""

SERVICES = (
    "urn:schemas-upnp-org:service:WANIPConnection:2",
    "urn:schemas-upnp-org:service:WANIPConnection:1",
    "urn:schemas-upnp-org:service:WANPPPConnection:1",
)
"""What can map ports, the best first: only the first has AddAnyPortMapping."""

MAX_SSDP = 4096
MAX_DESCRIPTIONS = 4
"""Different descriptions that we fetch from the router: whoever forges its address can name so many, and then no more."""

MAX_PORTS_TRIED = 4
DESCRIPTION = "solyd_swarm"

INVALID_ACTION, ACTION_FAILED, INVALID_ARGS, NOT_IMPLEMENTED = 401, 501, 402, 602
NO_SUCH_ENTRY, CONFLICT, PERMANENT_ONLY, OTHER_CONFLICT = 714, 718, 725, 729
ERRORS = {
    ACTION_FAILED: "action failed: perhaps the router has no public address",
    606: "not authorised: port mapping is switched off at the router",
    CONFLICT: "that port is another's",
    728: "the router has no room for another mapping",
    OTHER_CONFLICT: "that port is used by the router otherwise",
}

log = logging.getLogger("solyd_swarm.discovery.portmap")


class SoapFault(RouterError):
    """The router refused an action.

    Attributes:
        code: UPnP's, three digits.
    """

    def __init__(self, code: int) -> None:
        super().__init__(ERRORS.get(code, f"refused with code {code}"))
        self.code = code


class Search(asyncio.DatagramProtocol):
    """A socket that searches, and keeps what the router itself answers: where its descriptions are."""

    def __init__(self, gateway: Gateway, refusals: Refusals) -> None:
        self._gateway = gateway
        self._refusals = refusals
        self._known: set[Url] = set()
        self.found: asyncio.Queue[Url] = asyncio.Queue()
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.DatagramTransport | None = None

    async def open(self) -> None:
        """Raises ``OSError``."""
        with contextlib.ExitStack() as stack:
            sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 2)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(self._gateway.source))
            sock.bind((self._gateway.source, 0))
            self._transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: self, sock=sock)
            stack.pop_all()

    def send(self) -> None:
        assert self._transport is not None
        for host, port in self._gateway.searched_at:
            for target in SEARCHED:
                fields = f'HOST: {host}:{port}\r\nMAN: "ssdp:discover"\r\nMX: {MAX_WAIT_ASKED}\r\nST: {target}\r\n'
                self._transport.sendto(f"M-SEARCH * HTTP/1.1\r\n{fields}\r\n".encode("ascii"), (host, port))

    def datagram_received(self, data: bytes, addr: tuple[str | Any, int]) -> None:
        if addr[0] != self._gateway.host:
            self._refusals.add(Upnp.name, "a datagram of somebody else")  # televisions and the like answer, too
            return
        try:
            if len(data) > MAX_SSDP:
                raise RemoteProtocolError("too long")
            url = router_url(read_response_fields(data).get("location", ""), self._gateway)
        except RemoteProtocolError as error:
            self._refusals.add(Upnp.name, str(error))
            return
        if url not in self._known and len(self._known) < MAX_DESCRIPTIONS:
            self._known.add(url)
            self.found.put_nowait(url)

    def error_received(self, exc: Exception) -> None:
        log.debug("%s: %s", Upnp.name, exc)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._closed.done():
            self._closed.set_result(None)

    async def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()
            await self._closed


class Upnp(PortMapClient):
    """UPnP-IGD with one router."""

    name = "UPnP-IGD"

    def __init__(self, gateway: Gateway, refusals: Refusals) -> None:
        super().__init__(gateway, refusals)
        self._control: Url | None = None
        self._service = ""
        self._confirmed: set[tuple[Transport, int]] = set()  # external ports that are ours for certain

    async def probe(self) -> None:
        search = Search(self.gateway, self.refusals)
        trouble: RouterError = SilentRouter("no answer")
        try:
            await search.open()
            async with asyncio.timeout(PROBE_TIMEOUT):
                for wait in SEARCH_WAITS:
                    search.send()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(wait):
                            url = await search.found.get()
                        trouble = await self._try(url)
                    if self._control is not None:
                        return
        except TimeoutError:
            log.debug("%s at %s takes too long", self.name, self.gateway)
        except OSError as error:
            raise RouterError(f"no socket at {self.gateway.source}: {error}") from error
        finally:
            await search.close()
        raise trouble

    async def _try(self, url: Url) -> RouterError:
        """Reads a description and notes what can map; what is wrong with it if it cannot."""
        try:
            service, control = find_service(parse_xml(await self._fetch(url)), url, self.gateway)
        except RouterError as error:
            return error
        except RemoteProtocolError as error:
            self.refusals.add(self.name, str(error))
            return RouterError(f"its description is no good: {error}")
        self._service, self._control = service, control
        return RouterError("")

    async def _fetch(self, url: Url, **request: Any) -> bytes:
        """The body; of an error, too, if it is one of SOAP's."""
        try:
            status, body = await exchange(url, self.gateway, **request)
        except OSError as error:
            raise SilentRouter(f"no answer by HTTP ({error or 'in time'})") from error
        if status != 200 and not (status == 500 and request):
            raise RouterError(f"HTTP status {status}")
        return body

    async def _act(self, action: str, arguments: Fields[str, object]) -> Element:
        """One SOAP action (UPnP Device Architecture 1.1, section 3.2). Raises `RouterError`, `SoapFault` if it was refused."""
        if self._control is None:
            raise RouterError("its description was not read")
        listed = "".join(f"<{name}>{escape(str(value))}</{name}>" for name, value in arguments.items())
        body = (
            '<?xml version="1.0"?>\r\n<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/" '
            's:encodingStyle="http://schemas.xmlsoap.org/soap/encoding/"><s:Body>'
            f'<u:{action} xmlns:u="{self._service}">{listed}</u:{action}></s:Body></s:Envelope>\r\n'
        )
        headers = f'Content-Type: text/xml; charset="utf-8"\r\nSOAPAction: "{self._service}#{action}"\r\n'
        try:
            root = parse_xml(await self._fetch(self._control, method="POST", headers=headers, body=body.encode()))
            if (answer := root.find(f".//{action}Response")) is not None:
                return answer
            raise SoapFault(_number(text_of(root, "errorCode"), 100, 999))
        except RemoteProtocolError as error:
            self.refusals.add(self.name, str(error))
            raise RouterError(f"its answer is no good: {error}") from error

    async def map(self, transport: Transport, port: int, external_port: int, lifetime: int) -> Mapping:
        host = await self._external_host()
        mapped, granted = await self._add(transport, port, external_port, lifetime)
        self._confirmed.add((transport, mapped))
        return Mapping(transport, port, Address(host, mapped), granted)

    async def _external_host(self) -> str:
        text = text_of(await self._act("GetExternalIPAddress", {}), "NewExternalIPAddress")
        try:
            return str(IPv4Address(text))
        except AddressValueError as error:
            raise RouterError("it has no outer address now") from error

    async def _add(self, transport: Transport, port: int, external_port: int, lifetime: int) -> tuple[int, float]:
        """External port and lifetime in seconds. One that is another host's is not taken from it."""
        arguments = {
            "NewRemoteHost": "",
            "NewExternalPort": external_port,
            "NewProtocol": transport.upper(),
            "NewInternalPort": port,
            "NewInternalClient": self.gateway.source,
            "NewEnabled": 1,
            "NewPortMappingDescription": DESCRIPTION,
            "NewLeaseDuration": lifetime,
        }
        is_renewal = (transport, external_port) in self._confirmed
        if self._service == SERVICES[0] and not is_renewal:
            try:
                answer = await self._act("AddAnyPortMapping", arguments)
                return self._read_port(answer), lifetime
            except SoapFault as fault:
                if fault.code not in (INVALID_ACTION, INVALID_ARGS, ACTION_FAILED, NOT_IMPLEMENTED):
                    raise
        for attempt in range(MAX_PORTS_TRIED):
            try:
                # Some routers give a mapping away to whoever asks last: that one would be another host's.
                owner = None if is_renewal else await self._owner(transport, external_port)
                if owner not in (None, "", self.gateway.source):
                    raise SoapFault(CONFLICT)
                await self._act("AddPortMapping", arguments)
                return external_port, lifetime
            except SoapFault as fault:
                if fault.code == PERMANENT_ONLY and arguments["NewLeaseDuration"]:
                    arguments["NewLeaseDuration"] = 0  # stays until it is withdrawn, or the router restarts
                elif fault.code not in (CONFLICT, OTHER_CONFLICT) or is_renewal or attempt + 1 == MAX_PORTS_TRIED:
                    raise
                else:
                    external_port = random.randrange(49152, 65536)  # RFC 6335, section 6: for anybody's use
                    arguments["NewExternalPort"] = external_port
        raise RouterError("no port was free")

    def _read_port(self, answer: Element) -> int:
        return _number(text_of(answer, "NewReservedPort"), 1, 65535)

    async def _owner(self, transport: Transport, external_port: int) -> str | None:
        """The host on our network that a mapping leads to; empty if there is none, None if the router does not tell."""
        arguments = {"NewRemoteHost": "", "NewExternalPort": external_port, "NewProtocol": transport.upper()}
        try:
            return text_of(await self._act("GetSpecificPortMappingEntry", arguments), "NewInternalClient")
        except SoapFault as fault:
            # Not every router has the code that is meant for it.
            return "" if fault.code in (NO_SUCH_ENTRY, INVALID_ARGS, ACTION_FAILED) else None

    async def check(self, mapping: Mapping) -> bool:
        if await self._external_host() != mapping.external.host:
            return False
        return await self._owner(mapping.transport, mapping.external.port) in (None, self.gateway.source)

    async def unmap(self, transport: Transport, port: int, external_port: int) -> None:
        async with asyncio.timeout(sum(GOODBYE_WAITS)):
            if (transport, external_port) not in self._confirmed and await self._owner(transport, external_port) != self.gateway.source:
                return  # it was never made, or it is another's
            arguments = {"NewRemoteHost": "", "NewExternalPort": external_port, "NewProtocol": transport.upper()}
            with contextlib.suppress(SoapFault):  # it knows of none any more
                await self._act("DeletePortMapping", arguments)
            self._confirmed.discard((transport, external_port))

    async def close(self) -> None:
        """Nothing stays open between requests."""


def find_service(description: Element, url: Url, gateway: Gateway) -> tuple[str, Url]:
    """The best service that maps ports: its type, and where it takes actions.

    Raises:
        RouterError: there is none.
        RemoteProtocolError: its URL leads away from the router.
    """
    base_text = text_of(description, "URLBase")
    base = router_url(base_text, gateway, url) if base_text else url
    offered: dict[str, str] = {}
    for service in description.iter("service"):
        offered.setdefault((service.findtext("serviceType") or "").strip(), service.findtext("controlURL") or "")
    for kind in SERVICES:
        if kind in offered:
            return kind, router_url(offered[kind], gateway, base)
    raise RouterError("it describes no connection whose ports it could map")


def _number(text: str, least: int, most: int) -> int:
    """Raises `RemoteProtocolError` for anything else than a number in these bounds."""
    if text.isascii() and text.isdigit() and len(text) <= 5 and least <= int(text) <= most:
        return int(text)
    raise RemoteProtocolError("no number where one should be")
