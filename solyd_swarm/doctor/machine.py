"""This machine: interfaces, routes, what it runs in, clock, versions, and whether its own listener answers."""

import asyncio
import contextlib
import platform
import re
import socket
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from itertools import groupby
from pathlib import Path

from solyd_swarm import __version__
from solyd_swarm.discovery.interfaces import LocalAddress
from solyd_swarm.discovery.reach import source_address
from solyd_swarm.doctor.findings import Finding, listed
from solyd_swarm.doctor.patient import Examination, families, reason_of
from solyd_swarm.net.sockaddr import socket_address

SHOWN = 8
"""Interfaces named to people; a machine full of containers has hundreds."""

CONNECT_TIMEOUT = 2.0

EARLIEST, LATEST = 2025, 2100
"""Years between which a clock may be right: from this library's first on."""

OUTSIDE = {4: "192.0.2.1", 6: "2001:db8::1"}
"""Addresses of nobody (RFC 5737, RFC 3849) that a default route leads to. Nothing is sent there."""

BROKEN_PYTHONS = ((3, 12, 0), (3, 12, 1))


async def check_interfaces(examination: Examination) -> Sequence[Finding]:
    """Which interfaces there are to use, with which addresses."""
    local, outward = examination.local(), examination.outward()
    figures = {
        "interfaces": {name: [f"{address.ip}/{address.prefix}" for address in group] for name, group in _by_interface(local)},
        "families": families(outward),
        "limited": examination.limited,
    }
    if not local:
        says, advice = "This machine has no network address, not even loopback.", "Bring a network interface up (ip link set lo up)."
        return [Finding("interfaces", False, says, advice, figures)]
    if not outward and examination.limited:
        says = "Only loopback may be used, by --interfaces or SOLYD_SWARM_INTERFACES: nobody beyond this machine can be found."
        return [Finding("interfaces", True, says, figures=figures)]
    if not outward:
        says = "This machine has no network interface with an address but loopback: nobody beyond it can be found."
        advice = "Connect it to a network: a cable, a wireless network, for a container a network of its host."
        return [Finding("interfaces", False, says, advice, figures)]
    names = [f"{name} ({', '.join(str(address.ip) for address in group)})" for name, group in _by_interface(outward)]
    more = [f"{len(names) - SHOWN} more"] if len(names) > SHOWN else []
    limit = "may be used by --interfaces or SOLYD_SWARM_INTERFACES" if examination.limited else "can be used"
    says = f"Interfaces: {listed(names[:SHOWN] + more)} {limit}."
    if all(address.ip.is_link_local for address in outward):
        advice = "See to it that the network gives this machine an address (DHCP), if it is to reach more than its neighbours."
        return [Finding("interfaces", None, f"{says} All their addresses are link-local.", advice, figures)]
    return [Finding("interfaces", True, says, figures=figures)]


def _by_interface(addresses: Sequence[LocalAddress]) -> list[tuple[str, list[LocalAddress]]]:
    ordered = sorted(addresses, key=lambda address: (address.index, address.interface))
    return [(name, list(group)) for name, group in groupby(ordered, key=lambda address: address.interface)]


async def check_routes(examination: Examination) -> Sequence[Finding]:
    """Whether default routes lead out, by an interface that may be used."""
    outward = examination.outward()
    if not outward:
        return []
    sources = {version: source_address(host) for version, host in OUTSIDE.items()}
    allowed = {version: source for version, source in sources.items() if source in {str(address.ip) for address in outward}}
    figures = {f"ipv{version}": allowed.get(version) for version in OUTSIDE}
    if allowed:
        ways = listed([f"IPv{version} (from {source})" for version, source in allowed.items()])
        return [Finding("routes", True, f"A default route leads out for {ways}.", figures=figures)]
    if any(sources.values()):
        says = "The default route leads out by an interface that may not be used: only hosts of the allowed networks can be reached."
    else:
        says = "There is no default route: only hosts of the networks named above can be reached, nobody in the internet."
    return [Finding("routes", None, says, figures=figures)]


async def check_surroundings(examination: Examination, root: Path = Path("/")) -> Sequence[Finding]:
    """Containers and virtual machines whose network keeps multicast to itself."""
    if not examination.outward():
        return []
    kind = confinement(root)
    return [Finding("surroundings", None, _SURROUNDINGS[kind], figures={"kind": kind})] if kind else []


_SURROUNDINGS = {
    "container": "This is a container. The usual (bridged) network of one passes no multicast to the host's network, and lets nobody in.",
    "wsl": "This is Linux inside Windows (WSL), whose usual network passes no multicast, and lets nobody in.",
}


def confinement(root: Path = Path("/")) -> str:
    """``"container"``, ``"wsl"``, or an empty string; `multicast` says what to do where it turns out to matter."""
    if (root / ".dockerenv").exists() or (root / "run/.containerenv").exists():
        return "container"
    with contextlib.suppress(OSError):
        if "microsoft" in (root / "proc/sys/kernel/osrelease").read_text().lower():
            return "wsl"
    return ""


async def check_listener(examination: Examination) -> Sequence[Finding]:
    """Whether our TCP port answers at our own addresses."""
    node = examination.node
    hosts = node.own_addresses()[:SHOWN]
    outcomes = await asyncio.gather(*(knock(host, node.port, CONNECT_TIMEOUT) for host in hosts))
    failed = {host: outcome for host, outcome in zip(hosts, outcomes, strict=True) if outcome}
    figures = {"port": node.port, "answers": [host for host in hosts if host not in failed], "failed": failed}
    if failed:
        told = "; ".join(f"{host}: {reason}" for host, reason in failed.items())
        says = f"TCP port {node.port} is listened on, but does not answer this very machine at all of its addresses ({told})."
        advice = f"Let this machine's firewall pass TCP connections to port {node.port}; --listen (listen=) chooses a port that stays."
        return [Finding("listener", False, says, advice, figures)]
    says = f"TCP port {node.port} answers at {listed(hosts) or 'no address'}. Whether others get through to it, only others can tell."
    return [Finding("listener", True if hosts else None, says, figures=figures)]


async def knock(host: str, port: int, seconds: float) -> str:
    """Connects to an IP literal and closes at once; why it failed, or an empty string."""
    try:
        family, address = socket_address(host, port)
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            async with asyncio.timeout(seconds):
                await asyncio.get_running_loop().sock_connect(probe, address)
    except (OSError, ValueError, OverflowError) as error:
        return reason_of(error)
    return ""


async def check_clock(now: float | None = None) -> Sequence[Finding]:
    """Whether the clock can be right: DHT records are kept under the day's key."""
    now = time.time() if now is None else now
    moment = time.gmtime(now)
    shown = time.strftime("%Y-%m-%d %H:%M UTC", moment)
    figures = {"unix": int(now)}
    if EARLIEST <= moment.tm_year < LATEST:
        return [Finding("clock", True, f"The clock says {shown}, which can be right.", figures=figures)]
    says = f"The clock says {shown}, which cannot be right: whoever is more than a day away is not found by a DHT."
    return [Finding("clock", False, says, "Set this machine's clock, best by NTP (timedatectl set-ntp true).", figures)]


async def check_versions() -> Sequence[Finding]:
    """Python, this library, and what it is built on."""
    installed = _dependencies()
    figures = {
        "python": platform.python_version(),
        "solyd_swarm": __version__,
        "platform": platform.platform(),
        "packages": installed,
    }
    says = (
        f"solyd_swarm {__version__}, {platform.python_implementation()} {platform.python_version()}, {platform.platform()};"
        f" {', '.join(f'{name} {version}' for name, version in installed.items()) or 'no package is known'}."
    )
    if sys.version_info < (3, 11) or sys.version_info[:3] in BROKEN_PYTHONS:
        return [Finding("versions", False, says, "Use Python 3.11 or later, but neither 3.12.0 nor 3.12.1.", figures)]
    return [Finding("versions", True, says, figures=figures)]


def _dependencies() -> dict[str, str]:
    """Versions of what this library requires, tests aside, as far as it is installed."""
    found = {}
    with contextlib.suppress(metadata.PackageNotFoundError):
        for requirement in metadata.requires("solyd-swarm") or ():
            name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
            if not re.search(r"extra == ['\"](test|plot)['\"]", requirement):
                with contextlib.suppress(metadata.PackageNotFoundError):
                    found[name] = metadata.version(name)
    return found
