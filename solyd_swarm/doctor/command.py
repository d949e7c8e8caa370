"""The command ``solyd-swarm doctor``: a node at work for some seconds, examined meanwhile."""

import argparse
import asyncio
import contextlib
import functools
import logging
import math
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

from solyd_swarm.errors import OptionError

STDOUT, STDERR = 1, 2

SECONDS = 10.0
LONGEST = 3600.0
Secret = Callable[[argparse.Namespace], bytes | None]


def add_doctor(commands: Any, address: Callable[[str], tuple[str, int]], secret: Secret) -> None:
    """Adds the command.

    Args:
        commands: what ``add_subparsers`` returned.
        address: reads ``HOST:PORT``.
        secret: reads the topic's secret from the arguments and the environment.
    """
    doctor = commands.add_parser(
        "doctor",
        help="say what works on this machine and network, and what to do about the rest",
        description="Says what works here, and what to do about the rest: interfaces, multicast, the DHT, firewalls and so on. With TOPIC"
        " it joins that topic and says who is found under it; without, nothing is announced.",
        epilog="Exit status: 0 peers can be found in at least one way (with TOPIC: a neighbour was met); 1 not; 2 an error;"
        " 130 SIGINT, 143 SIGTERM.",
    )
    doctor.set_defaults(run=functools.partial(_run, secret))
    doctor.add_argument("topic", metavar="TOPIC", nargs="?", help="a topic to join, to see who is found under it")
    doctor.add_argument("--seconds", type=_seconds, default=SECONDS, metavar="SECONDS", help=f"how long to listen ({SECONDS:g})")
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead of sentences")
    given = doctor.add_mutually_exclusive_group()
    given.add_argument("--secret-file", metavar="PATH", help="a file that holds the topic's secret, as for pipe")
    given.add_argument("--secret", help="the secret itself; other users of this machine can see it in the list of processes")
    doctor.add_argument("--listen", type=address, metavar="HOST:PORT", help="where to listen (default: all addresses, any free port)")
    doctor.add_argument(
        "--bootstrap", action="append", default=[], metavar="TICKET", help="a peer's ticket, or HOST:PORT; may be given several times"
    )
    doctor.add_argument("--no-mdns", dest="mdns", action="store_false", help="do not look on the local network")
    doctor.add_argument("--no-dht", dest="dht", action="store_false", help="look neither in the peers' own DHT nor in BitTorrent's")
    doctor.add_argument("--interfaces", metavar="NAME,...", help="addresses or names of the network interfaces that may be used")
    doctor.add_argument("-v", "--verbose", action="store_true", help="log what happens to standard error")


def _seconds(text: str) -> float:
    value = float(text)
    if math.isnan(value) or not 0 <= value <= LONGEST:
        raise ValueError(text)
    return value


def _run(secret: Secret, arguments: argparse.Namespace) -> int:
    if arguments.topic is None and (arguments.secret is not None or arguments.secret_file is not None):
        raise OptionError("a secret needs a TOPIC: solyd-swarm doctor TOPIC --secret-file PATH")
    if not arguments.verbose:
        # What does not work is what the findings say, with more.
        logging.getLogger("solyd_swarm").setLevel(logging.ERROR)
    signals: list[int] = []
    try:
        return asyncio.run(_main(arguments, None if arguments.topic is None else secret(arguments), signals))
    except asyncio.CancelledError:
        return 128 + (signals[0] if signals else signal.SIGINT)


async def _main(arguments: argparse.Namespace, secret: bytes | None, signals: list[int]) -> int:
    from solyd_swarm.doctor.examine import at_work, examine  # which load all of the library
    from solyd_swarm.node import NodeOptions

    task = asyncio.current_task()
    assert task is not None
    with _catching(signals, task):
        options = NodeOptions(
            listen=arguments.listen,
            bootstrap=arguments.bootstrap,
            mdns=arguments.mdns,
            dht=arguments.dht,
            interfaces=arguments.interfaces,
        )
        if not arguments.json and os.isatty(STDERR):
            _write(STDERR, f"Looking around for {arguments.seconds:g} s ...\n")
        async with at_work(options, arguments.seconds, arguments.topic, secret) as examination:
            report = await examine(examination)
    if not _write(STDOUT, f"{report.to_json()}\n" if arguments.json else report.to_text()):
        return 1
    return report.status


@contextlib.contextmanager
def _catching(signals: list[int], task: "asyncio.Task[int]") -> Iterator[None]:
    """Signals cancel the task, a second one ends at once; those that were ignored when we started stay so."""
    loop = asyncio.get_running_loop()

    def caught(number: int) -> None:
        if signals:
            os._exit(128 + number)
        signals.append(number)
        task.cancel()

    numbers = [each for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(each) is not signal.SIG_IGN]
    for number in numbers:
        loop.add_signal_handler(number, caught, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _write(descriptor: int, text: str) -> bool:
    """Whether all of it was written. In UTF-8, whatever the locale says."""
    data = text.encode(errors="backslashreplace")
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except OSError as error:
        if not isinstance(error, BrokenPipeError) and descriptor != STDERR:
            _write(STDERR, f"solyd-swarm: standard output cannot be written: {error.strerror}\n")
        return False
    return True
