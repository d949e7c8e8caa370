"""Who was found under the topic, by whom, and why others were not reached."""

from collections import Counter
from collections.abc import Sequence

from solyd_swarm.discovery.source import Address, Candidate
from solyd_swarm.doctor.findings import Finding, counted, listed
from solyd_swarm.doctor.patient import NO_ANSWER, Examination

SHOWN = 8
"""Failed dials told; the rest are counted."""

INCOMING = "incoming"
"""Neighbours that no source of ours has found: they found us, or another neighbour told of them."""


async def check_peers(examination: Examination) -> Sequence[Finding]:
    """Candidates and neighbours by source, at the end of the time."""
    await examination.over.wait()
    if examination.swarm is None:
        return [Finding("peers", None, "Without a topic nobody in particular was looked for (solyd-swarm doctor TOPIC does that).")]
    candidates = {source: list(found.values()) for source, found in sorted(examination.node.candidates.items())}
    finders = [examination.node.finders(address) or (INCOMING,) for address in examination.met.values()]
    neighbors = Counter(source for sources in finders for source in sources)
    failed = _failed(examination, [each for found in candidates.values() for each in found])
    figures = {
        "neighbors": len(examination.met),
        "neighbors_by_source": dict(neighbors),
        "candidates_by_source": {source: len(found) for source, found in candidates.items()},
        "failed": {str(address): reason for address, reason in list(failed.items())[:SHOWN]},
        "failed_count": len(failed),
    }
    if examination.met:
        groups = Counter(listed(sources) for sources in finders)
        by = listed([f"{number} found by {names}" if names != INCOMING else f"{number} that found us" for names, number in groups.items()])
        says = f"{counted(len(examination.met), 'neighbour').capitalize()} met under this topic: {by}."
        return [Finding("peers", True, says + _trouble(failed), figures=figures)]
    if not candidates:
        says = f"Nobody was found under this topic within {examination.seconds:g} s."
        advice = (
            "See that another program runs now with this very topic, and the same secret or none, on this network; or give --bootstrap the"
            " ticket of one (solyd-swarm pipe TOPIC --ticket prints its own)."
        )
        return [Finding("peers", False, says, advice, figures)]
    found = listed([f"{counted(len(each), 'candidate')} by {source}" for source, each in candidates.items()])
    says = f"{found[0].upper()}{found[1:]}, but nobody was met within {examination.seconds:g} s."
    return [Finding("peers", False, says + _trouble(failed), _advice(examination, candidates, failed), figures)]


def _failed(examination: Examination, candidates: Sequence[Candidate]) -> dict[Address, str]:
    """Of the candidates' addresses, those whose dials failed last, with the reasons."""
    addresses = dict.fromkeys(address for each in candidates for address in each.addresses)
    met = set(examination.met.values())
    reasons = {address: examination.dials.get((address.host, address.port)) for address in addresses if str(address) not in met}
    return {address: reason for address, reason in reasons.items() if reason is not None}


def _trouble(failed: dict[Address, str]) -> str:
    if not failed:
        return ""
    told = [f"{address} ({reason})" for address, reason in list(failed.items())[:SHOWN]]
    more = [f"{len(failed) - SHOWN} more"] if len(failed) > SHOWN else []
    return f" Dialled in vain: {listed(told + more)}."


def _advice(examination: Examination, candidates: dict[str, list[Candidate]], failed: dict[Address, str]) -> str:
    endpoint = examination.node.endpoint
    everyone = [each for found in candidates.values() for each in found]
    if any(endpoint.instance_at(tuple((address.host, address.port) for address in each.addresses)) for each in everyone):
        return "Somebody was reached who does not have this topic: see that both sides name the same topic and secret."
    if NO_ANSWER in failed.values():
        return (
            "On the host that does not answer, let the firewall pass TCP connections to the port that the program listens on, best one that"
            " stays (listen=); this machine's firewall must let them out."
        )
    if failed:
        return "See that the program still runs at that address, and that no firewall rejects connections to its port."
    return "It was dialled and has not answered yet: try again with a longer --seconds."
