"""Same seed, same run: to the frame and the byte, also in another process with another hash seed."""

import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

from simulated import mesh

from solyd_swarm.simulation.network import Network


def run(seed: int) -> str:
    """A busy minute, and what came of it."""
    net = Network(seed, loss=0.05)
    peers = mesh(net, 12, settle=2.0)
    for n in range(60):
        net.publish(net.rng.choice(net.living), b"%d" % n)
        net.run(net.rng.random())
        if n % 20 == 10:
            net.crash(net.rng.choice(net.living))
        if n % 20 == 15:
            newcomer = net.add_peer()
            net.discover(newcomer, net.rng.choice(net.living[:-1]))
    net.run(10.0)
    deliveries = sha256()
    for peer in net.peers:
        for each in peer.delivered:
            deliveries.update(b"%d" % peer.index + each.envelope.id + each.propagation_source + bytes([each.late]))
    assert sum(len(peer.delivered) for peer in peers) > 300
    return f"{net.frames_sent} {net.bytes_sent} {deliveries.hexdigest()}"


def test_the_same_seed_gives_the_same_run_and_another_one_another(seed: int) -> None:
    first = run(seed)
    assert run(seed) == first
    assert run(seed + 1) != first


def test_the_hash_seed_makes_no_difference(seed: int) -> None:
    outcomes = set()
    for hash_seed in ("0", "1", "4242"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
        command = [sys.executable, "-P", "-c", f"import test_determinism; print(test_determinism.run({seed}))"]
        outcomes.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout)
    assert len(outcomes) == 1
    assert outcomes == {run(seed) + "\n"}
