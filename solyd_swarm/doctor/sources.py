"""The ways of finding peers, as the node runs them: state and figures of each, at the end of the time."""

import asyncio
from collections.abc import Sequence
from ipaddress import ip_address

from solyd_swarm.discovery.reach import source_address
from solyd_swarm.discovery.source import Source
from solyd_swarm.doctor.findings import Finding, counted, listed
from solyd_swarm.doctor.machine import OUTSIDE, knock
from solyd_swarm.doctor.patient import Examination, parts_of, reason_of
from solyd_swarm.net.resolve import resolve

RESOLVE_TIMEOUT = 4.0
KNOCK_TIMEOUT = 3.0
MAX_KNOCKS = 32
"""Bootstrap addresses tried: names may stand for many."""

OFF = {"mdns": "mDNS", "dht": "The peers' DHT", "mainline": "The Mainline DHT"}


async def check_mdns(examination: Examination) -> Sequence[Finding]:
    """The source itself; `solyd_swarm.doctor.multicast` tries the network."""
    source, findings = await _settled(examination, "mdns")
    if source is None:
        return findings
    refused = _count(source, "refused")
    if not refused:
        return [Finding("mdns", True, "mDNS runs.", figures={"refused": 0})]
    says = f"mDNS runs; {counted(refused, 'record')} of others {'was' if refused == 1 else 'were'} malformed, and refused."
    return [Finding("mdns", True, says, figures={"refused": refused})]


async def check_dht(examination: Examination) -> Sequence[Finding]:
    """The embedded DHT: it knows nodes, or learns of the first one from the first peer."""
    source, findings = await _settled(examination, "dht")
    if source is None:
        return findings
    nodes, port = _count(source, "nodes"), _count(source, "port")
    figures = {"nodes": nodes, "port": port}
    here = f"The peers' DHT runs on UDP port {port} and knows {counted(nodes, 'node')}"
    if nodes:
        says = f"{here}, which answered. Whether packets of strangers come in unasked, only strangers can tell."
        return [Finding("dht", True, says, figures=figures, way="dht")]
    says = f"{here}: it learns of the first one from the first peer that is met in another way, so that this alone is no fault."
    return [Finding("dht", None, says, figures=figures)]


async def check_mainline(examination: Examination) -> Sequence[Finding]:
    """The Mainline DHT of the internet, where the node has it."""
    source, findings = await _settled(examination, "mainline")
    if source is None:
        return findings
    nodes = _count(source, "nodes")
    figures = {"nodes": nodes, "state": str(getattr(source, "state", "")), "refused": _count(source, "refused")}
    if nodes:
        return [Finding("mainline", True, f"The Mainline DHT answers: {counted(nodes, 'node')} known.", figures=figures, way="mainline")]
    told = f" ({figures['state']})" if figures["state"] else ""
    says = f"The Mainline DHT knows no node after {examination.seconds:g} s{told}."
    advice = (
        "If this machine is in the internet, let firewall and router pass UDP packets out, and answers to them in; some networks block the"
        " Mainline DHT: use bootstrap addresses there. A longer --seconds may help, too."
    )
    return [Finding("mainline", False if any(map(source_address, OUTSIDE.values())) else None, says, advice, figures)]


async def check_mapping(examination: Examination) -> Sequence[Finding]:
    """Whether the router has opened a port for us."""
    await examination.over.wait()
    mapper, _ = parts_of(examination.node)
    if mapper is None:
        return []
    external = str(mapper.external) if mapper.external is not None else None
    figures = {"state": mapper.state, "external": external}
    if external is not None:
        return [Finding("port mapping", True, f"The router passes {external} on to this machine ({mapper.state}).", figures=figures)]
    return [Finding("port mapping", None, f"No router has opened a port for this machine: {mapper.state}.", figures=figures)]


async def check_outside(examination: Examination) -> Sequence[Finding]:
    """Where others see us: known only once there are others."""
    await examination.over.wait()
    node = examination.node
    _, observed = parts_of(node)
    own = {str(address.ip) for address in examination.local()}
    public = [host for version in (4, 6) if observed is not None and (host := observed.public_host(version))]
    global_own = sorted(host for host in own if ip_address(host).is_global)
    if not examination.outward():
        return []
    if not public and not global_own and not any(map(source_address, OUTSIDE.values())):
        return []  # nobody beyond these networks could tell
    if not public:
        figures: dict[str, object] = {"public": global_own, "behind_nat": None, "reached": None}
        says = (
            f"This machine has addresses of the internet itself: {listed(global_own)}."
            if global_own
            else "Whether this machine is behind a router that translates addresses (NAT), and which address it has in the internet, is not"
            " known: no neighbour out there has told."
        )
        says += " Whether others get through to it is not known either, without one to try it."
        return [Finding("outside", None, says, figures=figures)]
    behind = [host for host in public if host not in own]
    told = {host for host, _ in node.addresses()}
    reached = [host for host in behind if host in told]
    figures = {"public": public, "behind_nat": bool(behind), "reached": bool(reached) if behind else None}
    if not behind:
        says = f"Others see this machine at {listed(public)}, its own address."
        if told.intersection(public):
            return [Finding("outside", True, says, figures=figures)]
        says += " But several of them have tried to dial it there, and did not get through."
        advice = (
            f"Let the firewalls of this machine and of its network pass TCP and UDP port {node.port} in (--listen chooses one that stays)."
        )
        return [Finding("outside", False, says, advice, {**figures, "reached": False})]
    if reached:
        says = f"This machine is behind a NAT; others see it at {listed(behind)}, and somebody has come in that way."
        return [Finding("outside", True, says, figures=figures)]
    says = f"This machine is behind a NAT; others see it at {listed(behind)}, but nobody is known to have come in that way."
    advice = (
        f"If peers in the internet do not find this one: switch UPnP or NAT-PMP on in the router, or forward TCP and UDP port"
        f" {node.port} to this machine (--listen, or listen=, chooses one that stays)."
    )
    return [Finding("outside", None, says, advice, figures)]


async def check_bootstrap(examination: Examination) -> Sequence[Finding]:
    """Whether the addresses given can be looked up, and answer."""
    if not examination.contacts:
        return []
    places, problems = await _look_up([address for contact in examination.contacts for address in contact.addresses])
    node = examination.node
    barred = [place for place in places if not node.may_go_to(place[0])]
    allowed = [place for place in places if place not in barred][:MAX_KNOCKS]
    problems += [f"no interface that may be used leads to {host}" for host, _ in barred[:MAX_KNOCKS]]
    outcomes = await asyncio.gather(*(knock(host, port, KNOCK_TIMEOUT) for host, port in allowed))
    answers = [_shown(place) for place, outcome in zip(allowed, outcomes, strict=True) if not outcome]
    problems += [f"{_shown(place)}: {outcome}" for place, outcome in zip(allowed, outcomes, strict=True) if outcome]
    figures = {"answers": answers, "problems": problems}
    failed = f"; but {'; '.join(problems)}" if problems else ""
    if answers:
        return [Finding("bootstrap", True, f"{listed(answers)} accepts connections{failed}.", figures=figures, way="bootstrap")]
    advice = (
        "See that the program at the bootstrap address runs, and listens at a port that stays (listen=), and that the firewalls on both"
        " sides let connections to it pass."
    )
    return [Finding("bootstrap", False, f"No bootstrap address answers: {'; '.join(problems)}.", advice, figures)]


async def _look_up(addresses: Sequence[tuple[str, int]]) -> tuple[list[tuple[str, int]], list[str]]:
    async def one(host: str, port: int) -> list[tuple[str, int]] | str:
        try:
            async with asyncio.timeout(RESOLVE_TIMEOUT):
                return [(literal, number) for _, literal, number in await resolve(host, port)]
        except TimeoutError:
            return f"{host} cannot be looked up: the name server does not answer"
        except OSError as error:
            return f"{host} cannot be looked up: {reason_of(error)}"

    found = await asyncio.gather(*(one(host, port) for host, port in dict.fromkeys(addresses)))
    places = [place for each in found if not isinstance(each, str) for place in each]
    return list(dict.fromkeys(places)), [each for each in found if isinstance(each, str)]


async def _settled(examination: Examination, name: str) -> tuple[Source | None, list[Finding]]:
    """The source at the end of the time, or what is to be said instead; nothing of one that this version does not have."""
    await examination.over.wait()
    node = examination.node
    source = node.sources.get(name)
    if source is not None:
        return source, []
    title = OFF[name]
    if name in node.problems:
        # The library's errors say what to do.
        return None, [Finding(name, False, f"{title} does not work here: {node.problems[name]}.")]
    state = node.describe_sources().get(name)
    if state is None:
        return None, []
    if getattr(node.options, name, False):
        return None, [Finding(name, None, f"{title} has not come up yet: {state}.")]
    return None, [Finding(name, None, f"{title} is switched off.")]


def _count(source: Source, name: str) -> int:
    value = getattr(source, name, 0)
    return value if isinstance(value, int) else sum(value.values()) if isinstance(value, dict) else 0


def _shown(place: tuple[str, int]) -> str:
    return f"[{place[0]}]:{place[1]}" if ":" in place[0] else f"{place[0]}:{place[1]}"
