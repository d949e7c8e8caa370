"""Every exception this library raises, in one tree.

::

    SwarmError
    ├── TopicError                 a topic that is empty (ValueError) ...
    │   └── TopicTypeError         ... or no string at all (TypeError)
    ├── OptionError                an option out of range (ValueError) ...
    │   └── OptionTypeError        ... of the wrong type, or contradicting another (TypeError)
    ├── TicketError                a bootstrap entry that is neither ticket nor host:port (ValueError)
    ├── PublishError
    │   ├── UnpublishableType      would not decode equal (TypeError)
    │   ├── UnpublishableValue     out of range, or nested too deep (ValueError)
    │   ├── MessageTooLarge        larger than max_message_size (ValueError)
    │   └── SwarmBusy              the publish buffer is full
    ├── SwarmLeft                  used after leave() (RuntimeError)
    ├── ForkedError                used in a forked child (RuntimeError)
    ├── IdentityError              the identity file cannot be read or written (OSError)
    ├── ListenError                the listening socket cannot be bound (OSError)
    ├── DiscoveryError             one way of finding peers does not work here
    │   └── InterfaceError         no such network interface or address (OSError)
    ├── RemoteProtocolError        a peer broke the protocol; its channel is closed
    └── PayloadError               a message arrived that cannot be decoded

Those that have a natural builtin counterpart derive from it too, so ``except ValueError`` works as expected.
Each carries a sentence that says what to do.
"""


class SwarmError(Exception):
    """Base of all errors of this library."""


class TopicError(SwarmError, ValueError):
    """The topic is not usable: it must be a non-empty string."""


class TopicTypeError(TopicError, TypeError):
    """The topic is not a string."""


class OptionError(SwarmError, ValueError):
    """An option has a value that cannot work."""


class OptionTypeError(OptionError, TypeError):
    """An option has the wrong type, is unknown, or contradicts another."""


class TicketError(SwarmError, ValueError):
    """A bootstrap entry is neither a ticket nor ``"host:port"``."""


class PublishError(SwarmError):
    """Base of what ``publish`` raises about the message itself or the room for it."""


class UnpublishableType(PublishError, TypeError):
    """An object inside the message would not arrive equal; the text names its place."""


class UnpublishableValue(PublishError, ValueError):
    """A value inside the message is out of range or nested too deep; the text names its place."""


class MessageTooLarge(PublishError, ValueError):
    """The encoded message is larger than ``max_message_size``."""


class SwarmBusy(PublishError):
    """No neighbour has accepted what was published so far and the publish buffer is full: wait, then try again."""


class SwarmLeft(SwarmError, RuntimeError):
    """The swarm has left; make a new one with ``pubsub``."""


class ForkedError(SwarmError, RuntimeError):
    """The swarm belongs to the parent process; make a new one in the child."""


class IdentityError(SwarmError, OSError):
    """The identity file cannot be created, read or written."""


class ListenError(SwarmError, OSError):
    """The listening socket cannot be bound."""


class DiscoveryError(SwarmError):
    """One way of finding peers does not work here; the others go on."""


class InterfaceError(DiscoveryError, OSError):
    """A network interface or address named in ``interfaces`` does not exist here."""


class RemoteProtocolError(SwarmError):
    """A peer sent something the protocol does not allow; its channel is closed."""


class PayloadError(SwarmError):
    """A message arrived whose payload cannot be decoded. It is stored and relayed all the same.

    Attributes:
        message_id: id of the message.
        source: id of its author.
    """

    def __init__(self, text: str, *, message_id: str = "", source: str = "") -> None:
        super().__init__(text)
        self.message_id = message_id
        self.source = source
