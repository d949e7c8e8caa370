"""Firewalls of this machine, as far as they can be noticed by reading alone."""

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from solyd_swarm.discovery.command import output_of
from solyd_swarm.doctor.findings import Finding, listed

COMMAND_TIMEOUT = 2.0
MACOS_FIREWALL = "/usr/libexec/ApplicationFirewall/socketfilterfw"


async def check_firewall(port: int, *, root: Path = Path("/"), system: str = sys.platform) -> Sequence[Finding]:
    """What may keep others from coming in.

    Args:
        port: TCP port that is listened on.
    """
    if system == "win32":
        says = "The Windows firewall asks when a program first listens; whoever says no, or is on a 'public' network, is not found."
        advice = "Allow python.exe in 'Allow an app through the firewall', for private networks."
        return [Finding("firewall", None, says, advice, {"found": []})]
    if system == "darwin":
        return await _check_macos()
    return await _check_linux(port, root)


async def _check_linux(port: int, root: Path) -> Sequence[Finding]:
    found, allow = [], []
    with contextlib.suppress(OSError):
        if re.search(r"^\s*ENABLED\s*=\s*yes\b", (root / "etc/ufw/ufw.conf").read_text(errors="replace"), re.M | re.I):
            found.append("ufw")
            allow.append(f"ufw allow 5353/udp; ufw allow {port}/tcp; ufw allow {port}/udp")
    if (root / "run/firewalld.pid").exists() or (root / "var/run/firewalld.pid").exists():
        found.append("firewalld")
        allow.append(f"firewall-cmd --add-service=mdns --add-port={port}/tcp --add-port={port}/udp")
    can_list = os.geteuid() == 0
    chains = dropping_chains(await _output("nft", "-j", "list", "ruleset")) if can_list else []
    if chains:
        found.append(f"nftables ({', '.join(chains)})")
        rule = f"nft insert rule {chains[0]}"
        allow.append(f"{rule} udp dport '{{ 5353, {port} }}' accept; {rule} tcp dport {port} accept")
    if can_list and _has_legacy_tables(root) and re.search(r"DROP|REJECT", await _output("iptables-legacy", "-S", "INPUT")):
        found.append("iptables")
        allow.append(f"iptables -I INPUT -p udp --dport 5353 -j ACCEPT; iptables -I INPUT -p tcp --dport {port} -j ACCEPT")
    figures = {"found": found, "complete": can_list}
    if not found:
        rest = "" if can_list else "; the rules of nftables and iptables can be read by root alone"
        return [Finding("firewall", True if can_list else None, f"No firewall was noticed on this machine{rest}.", figures=figures)]
    says = f"A firewall filters what comes in to this machine: {listed(found)}."
    advice = (
        f"If others do not find this machine, let its firewall pass UDP port 5353 (mDNS), and the port that is listened on, TCP and UDP,"
        f" here {port} (--listen, or listen=, chooses one that stays): {' or: '.join(allow)}"
    )
    return [Finding("firewall", None, says, advice, figures)]


def _has_legacy_tables(root: Path) -> bool:
    """Whether the old iptables are in use; asking the program itself would load them into the kernel."""
    with contextlib.suppress(OSError):
        return "filter" in (root / "proc/net/ip_tables_names").read_text().split()
    return False


def dropping_chains(listing: str) -> list[str]:
    """The chains for incoming packets that drop or reject some, as ``family table chain``.

    Args:
        listing: what ``nft -j list ruleset`` prints (libnftables-json(5)); anything else has none.
    """
    try:
        items = json.loads(listing)["nftables"]
        chains = {_key(item["chain"], "name"): item["chain"] for item in items if "chain" in item}
        rules: dict[tuple[str, str, str], list[Any]] = {}
        for item in items:
            if "rule" in item:
                rules.setdefault(_key(item["rule"], "chain"), []).extend(item["rule"].get("expr", ()))
        inputs = [key for key, chain in chains.items() if chain.get("hook") == "input"]
        return [" ".join(key) for key in inputs if chains[key].get("policy") == "drop" or _drops(key, rules)]
    except (ValueError, TypeError, KeyError, AttributeError):
        return []


def _key(item: dict[str, str], name: str) -> tuple[str, str, str]:
    return item["family"], item["table"], item[name]


def _drops(start: tuple[str, str, str], rules: dict[tuple[str, str, str], list[Any]]) -> bool:
    """Whether some rule of the chain, or of one that it jumps to, drops or rejects."""
    seen, waiting = {start}, [start]
    while waiting:
        key = waiting.pop()
        statements = [statement for statement in rules.get(key, ()) if isinstance(statement, dict)]
        if any("drop" in statement or "reject" in statement for statement in statements):
            return True
        targets = {(*key[:2], target) for target in _targets(statements)} - seen
        seen |= targets
        waiting += targets
    return False


def _targets(statements: Iterable[dict[str, Any]]) -> Iterable[str]:
    for statement in statements:
        for verb in ("jump", "goto"):
            if verb in statement:
                yield statement[verb]["target"]


async def _check_macos() -> Sequence[Finding]:
    state = await _output(MACOS_FIREWALL, "--getglobalstate")
    blocks_all = "State = 2" in state
    figures = {"found": ["application firewall"] if re.search(r"State = [12]", state) else [], "complete": bool(state)}
    if not figures["found"]:
        return [Finding("firewall", True if state else None, "The application firewall of macOS is not on.", figures=figures)]
    says = f"The application firewall of macOS is on{', and blocks all incoming connections' if blocks_all else ''}."
    advice = (
        "Allow Python in System Settings, Network, Firewall, Options; and in Privacy & Security, Local Network, let the terminal (or"
        " whatever starts the program) find devices on local networks."
    )
    return [Finding("firewall", False if blocks_all else None, says, advice, figures)]


async def _output(program: str, *arguments: str) -> str:
    return await output_of(program, *arguments, seconds=COMMAND_TIMEOUT)
