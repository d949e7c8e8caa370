"""`pubsub` and `Node`: how swarms are made, and which node a swarm lives on."""

import asyncio
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Final

from solyd_swarm import interrupts, lifetime
from solyd_swarm.core.keys import derive_topic_key
from solyd_swarm.core.log import DEFAULT_BYTES, DEFAULT_WINDOW
from solyd_swarm.errors import ForkedError, OptionError, OptionTypeError, SwarmLeft
from solyd_swarm.home import Home, ScriptHome, would_be_script
from solyd_swarm.node import BaseNode, NodeOptions
from solyd_swarm.options import DEFAULT_MESSAGE_SIZE, DEFAULT_PUBLISH_BUFFER, SwarmOptions, check_topic
from solyd_swarm.pending import Pending
from solyd_swarm.swarm import Swarm

log = logging.getLogger("solyd_swarm.pubsub")


class _Unset:
    def __repr__(self) -> str:
        return "<default>"


_UNSET: Final[Any] = _Unset()


class Node:
    """One identity, one listening socket and one discovery for many topics; a context manager, also an asynchronous one.

    Args:
        identity: path of a file that keeps keys, epoch, what was delivered and where members were, made with mode 0600 if it is not
            there; None: fresh ones.
        listen: (host, port) to listen at; an empty host means all addresses of the interfaces, port 0 any free one.
        bootstrap: a ticket, ``"host:port"``, or a list of them.
        mdns, dht: whether to look on the local network, and in the distributed hash table that the peers form.
        mainline: whether to look in the BitTorrent DHT too (not with ``dht=False``); or ``"host:port"`` of nodes to enter one by, or a
            list of them, instead of the public ones.
        portmap: whether to ask the router to pass connections from outside on to us (PCP, NAT-PMP, UPnP).
        interfaces: the addresses (or names) of the network interfaces on which we may listen, dial and search. By default those that
            the environment variable ``SOLYD_SWARM_INTERFACES`` names, separated by commas, or all.

    Raises:
        OptionError, TicketError, IdentityError, ListenError, InterfaceError: each says what to do.
    """

    def __init__(
        self,
        *,
        identity: str | os.PathLike[str] | None = None,
        listen: tuple[str, int] | None = None,
        bootstrap: str | Iterable[str] | None = None,
        mdns: bool = True,
        dht: bool = True,
        mainline: bool | str | Iterable[str] = True,
        portmap: bool = True,
        interfaces: str | Sequence[str] | None = None,
    ) -> None:
        self._implicit = False
        options = NodeOptions(identity, listen, bootstrap, mdns, dht, mainline, portmap, interfaces)
        made = False
        try:
            with interrupts.held_back():
                self._make(options)
                made = True
        except KeyboardInterrupt:
            if made:
                self.close()  # nobody else could
            raise

    def _make(self, options: NodeOptions) -> None:
        self._base = BaseNode(options)
        self._swarms: dict[bytes, Swarm] = {}
        self._lock = threading.RLock()
        self._closing = False
        self._last_swarms: list[Swarm] = []  # those that were there when closing began
        self._closed: Pending[None] = Pending(self._is_own_thread)
        self._closed_for_handlers: Pending[None] = Pending(self._is_own_thread)

    @property
    def id(self) -> str:
        """The author id of all swarms of this node."""
        return self._base.identity.author

    @property
    def ticket(self) -> str:
        """A short text for ``bootstrap=`` of others: instance key and addresses, no topic."""
        return self._base.ticket

    @property
    def port(self) -> int:
        """The TCP port listened on."""
        return self._base.port

    @property
    def home(self) -> Home:
        """Where it runs; for the library's own use."""
        return self._base.home

    def pubsub(self, topic: str, **options: Any) -> Swarm:
        """Joins a topic on this node. Takes the options of `solyd_swarm.pubsub` that are not a node's.

        Raises:
            TopicError, TopicTypeError: see `solyd_swarm.pubsub`.
            OptionError: an option cannot work, or the node has this topic already (and the same secret); a ``ValueError``.
            OptionTypeError: an option of another type, or one that there is not; a ``TypeError``.
            SwarmLeft: the node is closed.
            ForkedError: it belongs to the parent process.
        """
        try:
            swarm_options = SwarmOptions(**options)
        except TypeError as error:
            raise OptionTypeError(f"node.pubsub() {str(error).removeprefix('SwarmOptions.__init__() ')}") from None
        swarm_options.check()
        return _whole(lambda: self._open(check_topic(topic), swarm_options))

    def _open(self, topic: str, options: SwarmOptions) -> Swarm:
        key = derive_topic_key(topic, options.secret_bytes)
        if lifetime.forked(self._base.home.birth):
            raise ForkedError("this node belongs to the parent process: make a new one in the child")
        with self._lock:
            if self._closing:
                raise SwarmLeft("the node is closed: make a new one with Node()")
            if key in self._swarms:
                raise OptionError(f"this node has joined {topic!r} already: leave it first, or use another node")
            swarm = Swarm(topic, options, self._base, self._swarm_left, owns_node=self._implicit)
            self._swarms[key] = swarm
            return swarm

    def _has(self, key: bytes) -> bool:
        return key in self._swarms

    def _swarm_left(self, swarm: Swarm) -> None:
        """On the loop: a swarm is about to have left. An implicit node ends with its last one."""
        with self._lock:
            self._swarms = {key: other for key, other in self._swarms.items() if other is not swarm}
            swarm._owns_node = self._implicit and not self._swarms
            if swarm._owns_node:
                self._closing = True
        if swarm._owns_node:
            _forget_default(self)

    def close(self) -> Pending[None]:
        """Leaves all topics and ends the node; nothing is left behind. Idempotent, from any thread. Does nothing in a forked child."""
        if lifetime.forked(self._base.home.birth):
            nothing: Pending[None] = Pending(lambda: False)
            nothing.set_result(None)
            return nothing
        with self._lock:
            first, self._closing = not self._closing, True
            if first:
                self._last_swarms = list(self._swarms.values())
        if first:
            self._base.home.call(self._start_closing, [swarm.leave() for swarm in self._last_swarms])
        return self._closed_for_handlers if self._is_own_thread() else self._closed

    def _is_own_thread(self) -> bool:
        swarms = [*self._swarms.values(), *self._last_swarms]
        return self._base.home.is_current() or any(swarm._is_own_thread() for swarm in swarms)

    def _start_closing(self, leaving: list[Pending[None]]) -> None:
        task = self._base.home.loop.create_task(self._close(leaving), name="solyd_swarm close")
        task.add_done_callback(self._after_closing)

    async def _close(self, leaving: list[Pending[None]]) -> None:
        for pending in leaving:
            await pending
        await self._base.close()
        self._closed_for_handlers.set_result(None)

    def _after_closing(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("closing the node failed", exc_info=error)
        self._closed_for_handlers.set_result(None)
        self._base.home.exit(self._base).when_done(lambda: self._closed.set_result(None))

    def __enter__(self) -> "Node":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        closing = self.close()
        if not self._is_own_thread():
            closing.result()

    async def __aenter__(self) -> "Node":
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        await self.close()


_defaults: "weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Node]" = weakref.WeakKeyDictionary()
_defaults_lock = threading.RLock()


def pubsub(
    topic: str,
    *,
    node: Node | None = None,
    secret: str | bytes | None = None,
    replay: bool = True,
    max_message_size: int = DEFAULT_MESSAGE_SIZE,
    retain: float = DEFAULT_WINDOW,
    retain_bytes: int = DEFAULT_BYTES,
    publish_buffer: int = DEFAULT_PUBLISH_BUFFER,
    identity: str | os.PathLike[str] | None = _UNSET,
    listen: tuple[str, int] | None = _UNSET,
    bootstrap: str | Iterable[str] | None = _UNSET,
    mdns: bool = _UNSET,
    dht: bool = _UNSET,
    mainline: bool | str | Iterable[str] = _UNSET,
    portmap: bool = _UNSET,
    interfaces: str | Sequence[str] | None = _UNSET,
) -> Swarm:
    """Joins a topic: finds others interested in it, connects to a few of them, and gossips.

    Args:
        topic: a non-empty string; whoever gives the same one (and the same secret) is met.
        node: the `Node` to live on. Without it, and without options of a node, all swarms of a loop (or of a script) share one.
        secret: not empty; whoever lacks it cannot join, nor learn who has joined. Text counts as its UTF-8.
        replay: whether to get the messages that the window held before we joined.
        max_message_size: bytes of the longest message to publish, encoded: 1 MiB, at most 16 MiB.
        retain: seconds that messages are kept for those who come late (the window): 600, from 1 to 7 days.
        retain_bytes: bytes of messages kept, 64 MiB; the oldest go first. So much may also wait for slow handlers, and for each iterator.
        publish_buffer: bytes that may be published before some neighbour has accepted them: 8 MiB. While there is none, `retain_bytes`.
        identity, listen, bootstrap, mdns, dht, mainline, portmap, interfaces: as for `Node`; with any of them the swarm gets a node of
            its own.

    Raises:
        TopicError, OptionError, TicketError, IdentityError, ListenError, InterfaceError: each says what to do.
        SwarmLeft: the node is closed.
        ForkedError: the node belongs to the parent process.
    """
    topic = check_topic(topic)
    options = SwarmOptions(secret, replay, max_message_size, retain, retain_bytes, publish_buffer)
    options.check()
    named: dict[str, Any] = {
        "identity": identity,
        "listen": listen,
        "bootstrap": bootstrap,
        "mdns": mdns,
        "dht": dht,
        "mainline": mainline,
        "portmap": portmap,
        "interfaces": interfaces,
    }
    given = {name: value for name, value in named.items() if value is not _UNSET}
    if node is not None:
        if not isinstance(node, Node):
            raise OptionTypeError(f"node takes a Node, not {type(node).__name__}")
        if given:
            raise OptionTypeError(f"{', '.join(given)} cannot be given together with node=: give them to Node() instead")
        return _whole(lambda: node._open(topic, options))
    if given:
        return _whole(lambda: _open_implicit(Node(**given), topic, options))
    return _whole(lambda: _open_on_default(topic, options))


def _whole(make: Callable[[], Swarm]) -> Swarm:
    """Ctrl-C meanwhile comes after it; then the swarm leaves, as nobody else could have it do so."""
    swarm: Swarm | None = None
    try:
        with interrupts.held_back():
            swarm = make()
    except KeyboardInterrupt:
        if swarm is not None:
            swarm.leave()
        raise
    return swarm


def _open_implicit(node: Node, topic: str, options: SwarmOptions) -> Swarm:
    node._implicit = True
    try:
        return node._open(topic, options)
    except BaseException:
        node.close()
        raise


def _open_on_default(topic: str, options: SwarmOptions) -> Swarm:
    """On the node that the swarms of this loop share; on a new one where that has the topic already."""
    key = derive_topic_key(topic, options.secret_bytes)
    with _defaults_lock:
        for shared in list(_defaults.values()):
            with shared._lock:
                usable = not shared._closing and not shared._has(key) and not lifetime.forked(shared.home.birth)
                if usable and _is_ours(shared.home):
                    return shared._open(topic, options)
        node = Node()
        swarm = _open_implicit(node, topic, options)
        _defaults.setdefault(node.home.loop, node)
        if _defaults[node.home.loop]._closing:
            _defaults[node.home.loop] = node
        return swarm


def _forget_default(node: Node) -> None:
    """It has ended: neither it nor its loop is to be kept alive."""
    with _defaults_lock:
        if _defaults.get(node.home.loop) is node:
            del _defaults[node.home.loop]


def _is_ours(home: Home) -> bool:
    """Whether a swarm made here and now would live there."""
    if would_be_script():
        return isinstance(home, ScriptHome) and not home.ended
    return not isinstance(home, ScriptHome) and home.loop is asyncio.get_running_loop()


def _after_fork_in_child() -> None:
    global _defaults_lock
    _defaults_lock = threading.RLock()  # another thread may have held it


lifetime.call_in_child(_after_fork_in_child)
