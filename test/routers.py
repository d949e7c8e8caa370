"""A home with a real router: Debian's miniupnpd, which speaks UPnP-IGD, NAT-PMP and PCP, beside nftables masquerading.

The outer addresses are of 11.0.0.0/8: miniupnpd maps nothing while its own is private, reserved or for documentation.
Needs what `hosts` needs, nftables, and the package miniupnpd-nftables.
"""

import contextlib
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hosts import Bridge, Host, Lab
from processes import PATIENCE, Process

INNER, ROUTER, OUTSIDE, STRANGER = "192.168.1.2", "192.168.1.1", "11.0.0.1", "11.0.0.2"

# The tables and chains that miniupnpd fills, under the names it has by default.
CHAINS = """
table inet filter {
    chain miniupnpd { }
    chain forward { type filter hook forward priority 0; jump miniupnpd; }
    chain prerouting_miniupnpd { }
    chain prerouting { type nat hook prerouting priority -100; jump prerouting_miniupnpd; }
    chain postrouting_miniupnpd { }
    chain postrouting { type nat hook postrouting priority 100; jump postrouting_miniupnpd; }
}
"""

# How the other protocols are silenced: by the version that each datagram to port 5351 begins with, and by SSDP's port.
ONLY = {
    "PCP": ("udp dport 5351 @th,64,8 0", "udp dport 1900"),
    "NAT-PMP": ("udp dport 5351 @th,64,8 2", "udp dport 1900"),
    "UPnP-IGD": ("udp dport 5351",),
    "": (),
    "none": ("udp dport 5351", "udp dport 1900"),
}


@dataclass
class Home:
    """A network, a host on it, its router, a host outside that has no way in."""

    lan: Bridge
    inner: Host
    router: Host
    stranger: Host
    directory: Path

    def only(self, protocol: str) -> None:
        """The router answers this protocol only; all with an empty name."""
        for what in ONLY[protocol]:
            self.router.drop(what)

    @contextlib.contextmanager
    def daemon(self, *options: str) -> Iterator[Process]:
        """miniupnpd, ready. It forgets its mappings when it ends, and its clock starts anew."""
        lines = ("ext_ifname=eth1", "listening_ip=eth0", "enable_upnp=yes", "enable_natpmp=yes", "secure_mode=yes", "ipv6_disable=yes")
        more = ("min_lifetime=1", "system_uptime=no", "notify_interval=60", "uuid=a795757c-bfe4-4445-b4b5-85aea922d738")
        allow = ("allow 1024-65535 192.168.1.0/24 1024-65535", "deny 0-65535 0.0.0.0/0 0-65535")
        config = self.directory / "miniupnpd.conf"
        leases = f"lease_file={self.directory / 'leases'}"
        config.write_text("\n".join((*lines, *more, leases, *options, *allow, "")))
        arguments = ["miniupnpd", "-d", "-f", str(config), "-P", str(self.directory / "pid")]
        with self.router.process(arguments) as process:
            self._await_ready(process)
            try:
                yield process
            finally:
                self._end(process)

    def _end(self, process: Process) -> None:
        """It looks whether it was told to end before it waits, for as long as nothing comes: a signal in between is lost."""
        deadline = time.monotonic() + PATIENCE
        while True:
            process.process.send_signal(signal.SIGTERM)
            try:
                process.process.wait(0.5)
                return
            except subprocess.TimeoutExpired:
                assert time.monotonic() < deadline, "miniupnpd does not end"

    def _await_ready(self, process: Process) -> None:
        """It tells nobody when it is, so the kernel is asked whether its sockets are bound."""
        sockets = Path(f"/proc/{process.process.pid}/net/udp")
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            assert process.process.poll() is None, process.errors()
            bound = {line.split()[1].rpartition(":")[2] for line in sockets.read_text().splitlines()[1:]}
            if {"076C", "14E7"} <= bound:  # 1900, 5351
                return
            time.sleep(0.01)
        raise AssertionError("miniupnpd did not start")

    def mappings(self) -> list[str]:
        """The rules that it has made."""
        listed = self.router.run("nft", "list", "chain", "inet", "filter", "prerouting_miniupnpd")
        return [line.strip() for line in listed.splitlines() if "dnat" in line]

    def forget(self) -> None:
        """As a power cut would."""
        for chain in ("prerouting_miniupnpd", "postrouting_miniupnpd", "miniupnpd"):
            self.router.run("nft", "flush", "chain", "inet", "filter", chain)
        (self.directory / "leases").unlink(missing_ok=True)


@contextlib.contextmanager
def home(directory: Path, outside: str = OUTSIDE) -> Iterator[Home]:
    """A home whose router has this outer address; miniupnpd does not run yet."""
    with Lab() as lab:
        lan, net = lab.bridge(), lab.bridge()
        inner, router, stranger = lab.host(), lab.host(), lab.host()
        inner.plug(lan, f"{INNER}/24", gateway=ROUTER)
        router.masquerade(router.plug(lan, f"{ROUTER}/24"), router.plug(net, f"{outside}/8"))
        router.nft(CHAINS)
        stranger.plug(net, f"{STRANGER}/8")
        yield Home(lan, inner, router, stranger, directory)
