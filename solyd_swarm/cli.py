"""The command ``solyd-swarm``; `solyd_swarm.pipe` tells what its ``pipe`` does, `solyd_swarm.bootstrap_command` its ``bootstrap``.

Exit status: 0; 1: see the command; 2: bad usage, or an error of this library, told in one sentence on standard error; 129, 130: left
after SIGHUP, SIGINT. SIGTERM, SIGINT and SIGHUP leave (``doctor`` is ended by them), unless whoever started the command had them
ignored; a second one ends at once.
"""

import argparse
import contextlib
import logging
import math
import os
import signal
from collections.abc import Sequence
from typing import NoReturn

from solyd_swarm import OptionError, SwarmError, __version__, bootstrap_command, pubsub
from solyd_swarm.doctor.command import add_doctor
from solyd_swarm.pipe import STDERR, Pipe, Waiting, complain

SECRET_VARIABLE = "SOLYD_SWARM_SECRET"

LEAVE = 3.0
"""Seconds that leaving may take at most; it takes less than one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status; bad usage raises ``SystemExit``, as argparse does."""
    try:
        arguments = _parser().parse_args(argv)
        _occupy_standard_streams()
        _log_to_stderr(verbose=arguments.verbose)
        status: int = arguments.run(arguments)
        return status
    except SwarmError as error:
        complain(str(error))
        return 2
    except KeyboardInterrupt:  # before our own handler was in place, or after
        return 128 + signal.SIGINT


# ---- arguments


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="solyd-swarm", description="Serverless publish/subscribe: peers find each other and gossip signed messages.")
    parser.add_argument("--version", action="version", version=f"solyd-swarm {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_pipe(commands)
    _add_bootstrap(commands)
    add_doctor(commands, _address, _secret)
    return parser


def _add_pipe(commands: "argparse._SubParsersAction[_Parser]") -> None:
    pipe = commands.add_parser(
        "pipe",
        help="publish lines of standard input, print what arrives as JSON lines",
        description="Publishes the lines of standard input and prints what arrives as JSON lines. At the end of input it waits until a peer"
        " has received everything, then leaves; without input (/dev/null) it listens. SIGTERM and SIGINT leave.",
        epilog="Exit status: 0 left; 1 not everything was published, received by a peer, or written; 2 an error; 129 SIGHUP; 130 SIGINT.",
    )
    pipe.set_defaults(run=_pipe)
    pipe.add_argument("topic", metavar="TOPIC", help="what to meet under; a non-empty text")
    pipe.add_argument("--full", action="store_true", help="print whole messages: data, id, source, published_at, ...")
    pipe.add_argument("--stay", action="store_true", help="go on receiving after the end of input")
    pipe.add_argument(
        "--timeout", type=_seconds, default=60.0, metavar="SECONDS", help="how long to wait for a receiver at the end of input (60)"
    )
    secret = pipe.add_mutually_exclusive_group()
    secret.add_argument(
        "--secret-file", metavar="PATH", help=f"a file that holds the topic's secret; without it, the environment's {SECRET_VARIABLE}"
    )
    secret.add_argument("--secret", help="the secret itself; other users of this machine can see it in the list of processes")
    pipe.add_argument("--identity", metavar="PATH", help="a file that keeps who we are, made if missing (default: somebody new)")
    pipe.add_argument("--listen", type=_address, metavar="HOST:PORT", help="where to listen (default: all addresses, any free port)")
    pipe.add_argument(
        "--bootstrap", action="append", default=[], metavar="TICKET", help="a peer's ticket, or HOST:PORT; may be given several times"
    )
    pipe.add_argument("--no-mdns", dest="mdns", action="store_false", help="do not look on the local network")
    pipe.add_argument("--no-dht", dest="dht", action="store_false", help="look neither in the peers' own DHT nor in BitTorrent's")
    pipe.add_argument("--interfaces", metavar="NAME,...", help="addresses or names of the network interfaces that may be used")
    pipe.add_argument("--no-replay", dest="replay", action="store_false", help="do not print what was published before we came")
    pipe.add_argument("--ticket", action="store_true", help="write our own ticket, a line, to standard error")
    pipe.add_argument("-v", "--verbose", action="store_true", help="log what happens to standard error")


def _add_bootstrap(commands: "argparse._SubParsersAction[_Parser]") -> None:
    bootstrap = commands.add_parser(
        "bootstrap",
        help="run a node of the distributed hash table that peers begin at",
        description='Runs a node of the distributed hash table at a fixed place, for others to begin at: bootstrap="HOST:PORT". It joins'
        " no topic. Once it listens it prints a line that says where, with its ticket. SIGTERM and SIGINT end it.",
        epilog="Exit status: 0 ended; 1 the address is in use, or the DHT does not work here; 2 an error; 130 SIGINT.",
    )
    bootstrap.set_defaults(run=_bootstrap)
    bootstrap.add_argument(
        "--listen",
        type=_address,
        required=True,
        metavar="HOST:PORT",
        help="where to listen, by TCP and UDP; :PORT for all addresses, port 0 for any free one",
    )
    bootstrap.add_argument(
        "--bootstrap", action="append", default=[], metavar="HOST:PORT", help="another such node, to be in one DHT with; several times"
    )
    bootstrap.add_argument("--identity", metavar="PATH", help="a file that keeps who we are, made if missing (default: somebody new)")
    bootstrap.add_argument("--mdns", action="store_true", help="look on the local network, too")
    bootstrap.add_argument("--interfaces", metavar="NAME,...", help="addresses or names of the network interfaces that may be used")
    bootstrap.add_argument("-v", "--verbose", action="store_true", help="log what happens to standard error")


def _seconds(text: str) -> float:
    value = float(text)
    if math.isnan(value) or value < 0:
        raise ValueError(text)
    return value


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not (colon and port.isascii() and port.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, like 0.0.0.0:7000, [::]:7000 or :7000")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _secret(arguments: argparse.Namespace) -> bytes | None:
    if arguments.secret is not None:
        return os.fsencode(arguments.secret)
    if arguments.secret_file is None:
        # Set but empty is an error (of pubsub): a secret that could not be fetched must not let us join in the open.
        value = os.environ.get(SECRET_VARIABLE)
        return None if value is None else os.fsencode(value)
    try:
        with open(arguments.secret_file, "rb") as file:
            return file.read().removesuffix(b"\n").removesuffix(b"\r")
    except OSError as error:
        raise OptionError(f"the secret cannot be read from {arguments.secret_file!r}: {error.strerror}") from error


# ---- the process


def _occupy_standard_streams() -> None:
    """What was closed when we started becomes ``/dev/null``: a socket of ours must not get its number and our output."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        pass
    os.close(descriptor)


def _log_to_stderr(*, verbose: bool) -> None:
    if verbose:
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        logging.getLogger("solyd_swarm").setLevel(logging.DEBUG)
    else:
        logging.basicConfig(format="solyd-swarm: %(message)s")


def _pipe(arguments: argparse.Namespace) -> int:
    waiting = Waiting()
    with waiting.catching(signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        swarm = pubsub(
            arguments.topic,
            secret=_secret(arguments),
            replay=arguments.replay,
            identity=arguments.identity,
            listen=arguments.listen,
            bootstrap=arguments.bootstrap,
            mdns=arguments.mdns,
            dht=arguments.dht,
            interfaces=arguments.interfaces,
        )
        try:
            if arguments.ticket:
                os.write(STDERR, f"{swarm.ticket}\n".encode())
            status = Pipe(swarm, waiting, full=arguments.full, stay=arguments.stay, timeout=arguments.timeout).run()
        finally:
            with contextlib.suppress(TimeoutError):
                swarm.leave().result(LEAVE)
    return _status(waiting, status)


def _bootstrap(arguments: argparse.Namespace) -> int:
    waiting = Waiting()
    with waiting.catching(signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        status = bootstrap_command.run(
            waiting,
            listen=arguments.listen,
            bootstrap=arguments.bootstrap,
            identity=arguments.identity,
            mdns=arguments.mdns,
            interfaces=arguments.interfaces,
        )
    return _status(waiting, status)


def _status(waiting: Waiting, status: int) -> int:
    """The exit status, of a signal where one has ended it."""
    return status if waiting.signal in (None, signal.SIGTERM) else 128 + (waiting.signal or 0)
