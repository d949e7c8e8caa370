"""As much HTTP and XML as a home router speaks, read as if it were hostile.

An answer to a UPnP search can come from anyone on the network and names a URL to fetch, which names further ones. Whoever
follows them can be sent anywhere, to services on loopback, say. So: only IPv4 literals, only the router's own. Bytes, time,
depth and elements are bounded, and a document type (the way to entities that swell or fetch) is refused.
"""

import asyncio
import contextlib
import logging
import re
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address
from urllib.parse import urljoin, urlsplit
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from solyd_swarm.discovery.gateway import Gateway
from solyd_swarm.errors import RemoteProtocolError

HTTP_TIMEOUT = 5.0
"""Seconds for a whole exchange: a router that trickles a byte now and then is given up."""

MAX_HEAD = 8 * 1024
MAX_BODY = 64 * 1024
"""Bytes; descriptions of real routers have 2 to 20 thousand. Longer ones are refused, unread beyond this."""

MAX_URL = 512
MAX_DEPTH = 32
MAX_ELEMENTS = 4000

_HEADER_END = b"\r\n\r\n"
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9])(?: |\r)")
_VISIBLE = re.compile(r"[!-~]+")  # no blanks or line ends, by which a URL could add lines to our request

log = logging.getLogger("solyd_swarm.discovery.portmap")


@dataclass(frozen=True, slots=True)
class Url:
    """A place at the router: an IPv4 literal, a port, a path with its query."""

    host: str
    port: int
    path: str


def router_url(text: str, gateway: Gateway, base: Url | None = None) -> Url:
    """A URL, perhaps relative to another, that leads to the router itself. Raises `RemoteProtocolError` for any other."""
    text = text.strip()
    if len(text) > MAX_URL or not _VISIBLE.fullmatch(text):
        raise RemoteProtocolError("a URL that is none")
    try:
        if base is not None:
            text = urljoin(f"http://{base.host}:{base.port}{base.path}", text)
        parts = urlsplit(text)
        host, port = str(IPv4Address(parts.hostname or "")), 80 if parts.port is None else parts.port
    except (AddressValueError, ValueError) as error:
        raise RemoteProtocolError("a URL that is none") from error
    if parts.scheme != "http" or host != gateway.host or not port or parts.username is not None:
        raise RemoteProtocolError("a URL that leads elsewhere than to the router")
    path = parts.path or "/"
    return Url(host, port, f"{path}?{parts.query}" if parts.query else path)


async def exchange(url: Url, gateway: Gateway, *, method: str = "GET", headers: str = "", body: bytes = b"") -> tuple[int, bytes]:
    """One request on a connection of its own: (status, body). Redirections are not followed.

    Args:
        headers: lines that end in CR LF, beside the usual ones.

    Raises:
        RemoteProtocolError: the answer is no HTTP, or too large (a fixed sentence).
        OSError: no connection, or no complete answer within `HTTP_TIMEOUT` (``TimeoutError``).
    """
    request = f"{method} {url.path} HTTP/1.1\r\nHost: {url.host}:{url.port}\r\nConnection: close\r\n{headers}"
    if body:
        request += f"Content-Length: {len(body)}\r\n"
    async with asyncio.timeout(HTTP_TIMEOUT):
        # Both ends are literals, which asyncio does not look up.
        reader, writer = await asyncio.open_connection(url.host, url.port, local_addr=(gateway.source, 0), limit=MAX_HEAD)
        try:
            writer.write(f"{request}\r\n".encode("ascii") + body)
            return await _read_response(reader)
        except (asyncio.LimitOverrunError, asyncio.IncompleteReadError) as error:
            raise RemoteProtocolError("an HTTP answer that is cut off, or too large") from error
        finally:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def _read_response(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(_HEADER_END)
    status = _STATUS.match(head)
    if status is None:
        raise RemoteProtocolError("no HTTP")
    fields = _fields(head)
    if fields.get("transfer-encoding", "").lower() == "chunked":
        return int(status[1]), await _read_chunks(reader)
    length = fields.get("content-length")
    if length is None:
        return int(status[1]), await _read_to_end(reader)
    if not re.fullmatch("[0-9]{1,9}", length) or int(length) > MAX_BODY:
        raise RemoteProtocolError("an HTTP answer that is too large")
    return int(status[1]), await reader.readexactly(int(length))


def _fields(head: bytes) -> dict[str, str]:
    """The header's fields by their name in small letters."""
    lines = (line.partition(":") for line in head.decode("latin-1").split("\r\n")[1:])
    return {name.strip().lower(): value.strip() for name, colon, value in lines if colon}


async def _read_to_end(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while piece := await reader.read(MAX_HEAD):
        body += piece
        if len(body) > MAX_BODY:
            raise RemoteProtocolError("an HTTP answer that is too large")
    return body


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while True:
        size = re.match(rb"[0-9A-Fa-f]{1,8}(?=[;\s])", await reader.readuntil(b"\n"))
        if size is None:
            raise RemoteProtocolError("no HTTP")
        length = int(size[0], 16)
        if len(body) + length > MAX_BODY:
            raise RemoteProtocolError("an HTTP answer that is too large")
        if not length:
            return body
        body += await reader.readexactly(length)
        await reader.readexactly(2)


def read_response_fields(datagram: bytes) -> dict[str, str]:
    """The header of an HTTP response that came as a datagram (SSDP). Raises `RemoteProtocolError`."""
    status = _STATUS.match(datagram)
    if status is None or status[1] != b"200":
        raise RemoteProtocolError("no answer to a search")
    return _fields(datagram)


def parse_xml(document: bytes) -> Element:
    """The root element; names are without their namespaces. Raises `RemoteProtocolError` for anything amiss or excessive."""
    builder = TreeBuilder()
    depth = elements = 0

    def start(name: str, _: dict[str, str]) -> None:
        nonlocal depth, elements
        depth += 1
        elements += 1
        if depth > MAX_DEPTH or elements > MAX_ELEMENTS:
            raise RemoteProtocolError("XML that is too large")
        builder.start(name.rpartition(" ")[2], {})

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(name.rpartition(" ")[2])

    def refuse(*_: object) -> None:
        raise RemoteProtocolError("XML with a document type")

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(document.strip(b"\0 \t\r\n"), True)
        return builder.close()
    except (expat.ExpatError, AssertionError, ValueError, LookupError) as error:  # an unknown encoding says LookupError
        raise RemoteProtocolError("XML that is none") from error


def text_of(root: Element, name: str) -> str:
    """The text of the first element of this name below; empty where there is none."""
    return (root.findtext(f".//{name}") or "").strip()
