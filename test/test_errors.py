"""Every error that `pubsub`, `Node` and `publish` raise, where it is raised, and that it says what to do."""

import inspect
import socket
from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from script_kit import ALONE, PATIENCE, Make, library_threads, party, until

import solyd_swarm
from solyd_swarm import (
    DiscoveryError,
    IdentityError,
    InterfaceError,
    ListenError,
    MessageTooLarge,
    Node,
    OptionError,
    OptionTypeError,
    PublishError,
    SwarmError,
    SwarmLeft,
    TicketError,
    TopicError,
    TopicTypeError,
    UnpublishableType,
    UnpublishableValue,
    errors,
    pubsub,
)
from solyd_swarm.store.identity import Identity


@pytest.fixture
def make() -> Iterator[Make]:
    with party() as made:
        yield made


def test_all_are_of_one_tree_and_public() -> None:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    assert all(issubclass(kind, SwarmError) for kind in kinds)
    assert {kind.__name__ for kind in kinds} <= set(solyd_swarm.__all__)
    for kind in kinds:
        assert kind.__doc__
        assert kind.__name__ in (errors.__doc__ or "")


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (TopicError, ValueError),
        (TopicTypeError, TypeError),
        (OptionError, ValueError),
        (OptionTypeError, TypeError),
        (TicketError, ValueError),
        (UnpublishableType, TypeError),
        (UnpublishableValue, ValueError),
        (MessageTooLarge, ValueError),
        (SwarmLeft, RuntimeError),
        (IdentityError, OSError),
        (ListenError, OSError),
        (InterfaceError, OSError),
        (InterfaceError, DiscoveryError),
    ],
)
def test_they_are_what_one_would_catch(kind: type[Exception], builtin: type[Exception]) -> None:
    assert issubclass(kind, builtin)


# -- publishing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("obj", "kind", "place"),
    [
        ({"a": [1, {2, 3}]}, TypeError, 'message["a"][1]'),
        (object(), TypeError, "message"),
        ([Decimal(1)], TypeError, "message[0]"),
        (datetime(2024, 1, 1), TypeError, "message"),
        ({"big": 2**64}, ValueError, 'message["big"]'),
        ("\ud800", ValueError, "message"),
    ],
)
def test_what_cannot_be_published(make: Make, obj: Any, kind: type[Exception], place: str) -> None:
    one = make()
    with pytest.raises(kind) as caught:
        one.publish(obj)
    assert place in str(caught.value)
    assert isinstance(caught.value, PublishError)
    assert one.stats.published == 0


def test_too_deep(make: Make) -> None:
    one = make()
    deep: list[Any] = []
    deep.append(deep)
    with pytest.raises(ValueError):
        one.publish(deep)


def test_too_large(make: Make) -> None:
    one = make(max_message_size=1_000)
    one.publish(bytes(997))  # 3: the header
    with pytest.raises(MessageTooLarge, match=r"1001 bytes.*max_message_size is 1000"):
        one.publish(bytes(998))
    assert one.stats.published == 1
    with pytest.raises(MessageTooLarge):
        make("other").publish(bytes(1024 * 1024))
    largest = make("largest", max_message_size=16 * 1024 * 1024)
    largest.publish(bytes(16 * 1024 * 1024 - 5))


# -- topics and options -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topic", [None, b"bytes", 1, ["topic"]])
def test_a_topic_is_a_string(topic: Any) -> None:
    with pytest.raises(TypeError, match="string"):
        pubsub(topic)
    with Node(**ALONE) as node, pytest.raises(TopicTypeError):
        node.pubsub(topic)


def test_a_topic_is_not_empty() -> None:
    with pytest.raises(ValueError, match="empty"):
        pubsub("")


@pytest.mark.parametrize("topic", [" ", "ü☃", "a\0b", "x" * 100_000, "\ud800"])
def test_any_other_string_is_a_topic(make: Make, topic: str) -> None:
    one, other = make(topic), make(topic)
    one.joined().result(PATIENCE)
    assert one.topic == other.topic == topic


@pytest.mark.parametrize(
    "option",
    [
        {"node": "node"},
        {"secret": 1},
        {"replay": 1},
        {"max_message_size": 1.5},
        {"max_message_size": True},
        {"retain": "1"},
        {"retain": True},
        {"retain_bytes": None},
        {"publish_buffer": "1"},
        {"identity": 1},
        {"listen": 7000},
        {"listen": ("127.0.0.1",)},
        {"listen": ("127.0.0.1", "7000")},
        {"listen": (None, 7000)},
        {"bootstrap": 1},
        {"bootstrap": [1]},
        {"mdns": None},
        {"dht": 1},
        {"interfaces": 1},
        {"interfaces": [1]},
    ],
)
def test_the_wrong_type_of_an_option(option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(OptionTypeError, match=name) as caught:
        pubsub("room", **option)
    assert isinstance(caught.value, TypeError)
    assert library_threads() == []


@pytest.mark.parametrize(
    "option",
    [
        {"secret": ""},
        {"secret": b""},
        {"max_message_size": 0},
        {"max_message_size": 2**30},
        {"retain": 0},
        {"retain": float("nan")},
        {"retain": float("inf")},
        {"retain": 10**9},
        {"retain_bytes": 0},
        {"publish_buffer": -1},
        {"listen": ("127.0.0.1", 65536)},
        {"listen": ("127.0.0.1", -1)},
    ],
)
def test_an_option_out_of_range(option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(OptionError, match=name):
        pubsub("room", **option)
    assert library_threads() == []


def test_an_unknown_option() -> None:
    with pytest.raises(TypeError, match="colour"):
        pubsub("room", colour="red")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="colour"):
        Node(colour="red")  # type: ignore[call-arg]
    with Node(**ALONE) as node, pytest.raises(TypeError, match="colour"):
        node.pubsub("room", colour="red")


def test_node_options_together_with_a_node() -> None:
    with Node(**ALONE) as node:
        for option in ({"mdns": False}, {"identity": None}, {"listen": None}, {"bootstrap": None}, {"interfaces": "127.0.0.1"}):
            with pytest.raises(TypeError, match=f"{next(iter(option))} cannot be given together with node="):
                pubsub("room", node=node, **option)  # type: ignore[arg-type]
            with pytest.raises(TypeError, match=next(iter(option))):
                node.pubsub("room", **option)


# -- what the machine refuses -------------------------------------------------------------------------------------


def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ListenError, match=f"port {port} of 127.0.0.1 is in use"):
            pubsub("room", **ALONE, listen=("127.0.0.1", port))
        with pytest.raises(ListenError):
            Node(**ALONE, listen=("127.0.0.1", port))
    assert library_threads() == []


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host.invalid"])
def test_an_address_that_is_not_ours(host: str) -> None:
    with pytest.raises(ListenError, match="listen on"):
        pubsub("room", **ALONE, listen=(host, 0))


def test_a_free_port_is_taken_and_given_back(make: Make) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for _ in range(2):
        with Node(**ALONE, listen=("127.0.0.1", port)) as node:
            assert node.port == port


def test_an_identity_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="create it first"):
        pubsub("room", **ALONE, identity=tmp_path / "missing" / "identity")
    with pytest.raises(IdentityError, match="regular file"):
        pubsub("room", **ALONE, identity=tmp_path)
    other = tmp_path / "other"
    other.write_text("something else")
    with pytest.raises(IdentityError, match="is left as it is"):
        Node(**ALONE, identity=str(other))
    assert other.read_text() == "something else"
    assert library_threads() == []


def test_an_identity_that_fails_when_the_topic_is_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node that was made for the swarm is not left behind."""

    def fail(self: Identity) -> int:
        raise IdentityError("the disk is full")

    monkeypatch.setattr(Identity, "next_epoch", fail)
    with pytest.raises(IdentityError, match="disk is full"):
        pubsub("room", **ALONE, identity=tmp_path / "identity")
    with pytest.raises(IdentityError, match="disk is full"):
        pubsub("room")
    until(lambda: not library_threads())
    monkeypatch.undo()
    with pubsub("room"):
        pass


@pytest.mark.parametrize("interfaces", ["nonexistent0", "192.0.2.1", ["127.0.0.1", "nonexistent0"]])
def test_an_interface_that_does_not_exist(interfaces: Any) -> None:
    with pytest.raises(InterfaceError, match=r"there is no network interface or address.*127\.0\.0\.1"):
        pubsub("room", interfaces=interfaces)
    assert library_threads() == []


def test_an_interface_that_does_not_exist_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLYD_SWARM_INTERFACES", "127.0.0.1, nonexistent0")
    with pytest.raises(InterfaceError, match="nonexistent0"):
        pubsub("room")


def test_a_bootstrap_entry_that_is_garbage() -> None:
    with pytest.raises(TicketError, match="neither a ticket"):
        pubsub("room", bootstrap="garbage")
    with pytest.raises(TicketError, match="copy it again"):
        Node(bootstrap=["127.0.0.1:7000", "solyd1garbage"])
    assert library_threads() == []
