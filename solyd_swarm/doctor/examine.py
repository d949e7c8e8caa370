"""An examination from beginning to end: a node at work, all checks beside it, and a report."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from solyd_swarm.doctor import firewall, machine, multicast, peers, sources
from solyd_swarm.doctor.findings import Check, Checkup
from solyd_swarm.doctor.patient import Examination, Patient, noting_dials
from solyd_swarm.doctor.report import Report
from solyd_swarm.message import Peer
from solyd_swarm.node import NodeOptions
from solyd_swarm.options import SwarmOptions, check_topic
from solyd_swarm.swarm import Swarm

MARGIN = 1.5
"""Seconds beyond the time to listen that a check may take."""


@asynccontextmanager
async def at_work(options: NodeOptions, seconds: float, topic: str | None, secret: bytes | None) -> AsyncIterator[Examination]:
    """A node, and with a topic a swarm, for as long as the block lasts; nothing of them is left afterwards.

    Raises:
        SwarmError: what `solyd_swarm.pubsub` raises for such options.
    """
    swarm_options = SwarmOptions(secret=secret)
    swarm_options.check()
    if topic is not None:
        check_topic(topic)
    node = Patient(options)
    examination = Examination.of(node, seconds)
    timer = asyncio.get_running_loop().call_later(seconds, examination.over.set)
    try:
        with noting_dials(examination.dials):
            if topic is not None:
                examination.swarm = Swarm(topic, swarm_options, node, lambda swarm: None, owns_node=False)
                examination.swarm.on("neighbor_up", partial(_note, examination))
            yield examination
    finally:
        timer.cancel()
        if examination.swarm is not None:
            await examination.swarm.leave()
        await node.close()


def _note(examination: Examination, peer: Peer) -> None:
    examination.met[peer.id] = peer.address


async def examine(examination: Examination) -> Report:
    """All checks, side by side."""
    checks = [
        Check("interfaces", partial(machine.check_interfaces, examination)),
        Check("routes", partial(machine.check_routes, examination)),
        Check("surroundings", partial(machine.check_surroundings, examination)),
        Check("firewall", partial(firewall.check_firewall, examination.node.port)),
        Check("listener", partial(machine.check_listener, examination)),
        Check("multicast", partial(multicast.check_multicast, examination)),
        Check("mdns", partial(sources.check_mdns, examination)),
        Check("dht", partial(sources.check_dht, examination)),
        Check("mainline", partial(sources.check_mainline, examination)),
        Check("port mapping", partial(sources.check_mapping, examination)),
        Check("outside", partial(sources.check_outside, examination)),
        Check("bootstrap", partial(sources.check_bootstrap, examination)),
        Check("peers", partial(peers.check_peers, examination)),
        Check("clock", machine.check_clock),
        Check("versions", machine.check_versions),
    ]
    findings = await Checkup(checks, examination.seconds + MARGIN).run()
    return Report(findings, examination.seconds, len(examination.met) if examination.swarm is not None else None)
