"""Options of a swarm, and their validation."""

import math
from dataclasses import dataclass

from solyd_swarm.core.log import DEFAULT_BYTES, DEFAULT_WINDOW
from solyd_swarm.core.wire import MAX_MESSAGE
from solyd_swarm.errors import OptionError, OptionTypeError, TopicError, TopicTypeError

# 1 MiB: what a relay can hold for every neighbour at once without noticing.
DEFAULT_MESSAGE_SIZE = 1024 * 1024
# 8 MiB: a tenth of a second of the fastest traffic, and not too much to lose with the process.
DEFAULT_PUBLISH_BUFFER = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class SwarmOptions:
    """What `pubsub` takes beside the topic and the node.

    Attributes:
        secret: whoever lacks it cannot join, nor learn who has.
        replay: whether to get what the window held before we joined.
        max_message_size: bytes of the longest message we publish, encoded.
        retain: seconds that messages are kept for others (the window).
        retain_bytes: bytes of messages kept; the oldest go first.
        publish_buffer: bytes published that no neighbour needs to have accepted yet.
    """

    secret: str | bytes | None = None
    replay: bool = True
    max_message_size: int = DEFAULT_MESSAGE_SIZE
    retain: float = DEFAULT_WINDOW
    retain_bytes: int = DEFAULT_BYTES
    publish_buffer: int = DEFAULT_PUBLISH_BUFFER

    @property
    def secret_bytes(self) -> bytes | None:
        return self.secret.encode("utf-8", "surrogatepass") if isinstance(self.secret, str) else self.secret

    def check(self) -> None:
        """Raises `OptionTypeError` or `OptionError`, naming the option and what it takes."""
        if self.secret is not None and not isinstance(self.secret, str | bytes):
            raise OptionTypeError(f"secret takes a string or bytes, not {type(self.secret).__name__}")
        if self.secret is not None and not self.secret:
            raise OptionError("secret is empty: leave it out, or take a long random one")
        if not isinstance(self.replay, bool):
            raise OptionTypeError(f"replay takes True or False, not {self.replay!r}")
        for name in ("max_message_size", "retain_bytes", "publish_buffer"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise OptionTypeError(f"{name} takes a number of bytes, not {value!r}")
            if value < 1:
                raise OptionError(f"{name} is a number of bytes and must be positive, not {value}")
        if self.max_message_size > MAX_MESSAGE:
            raise OptionError(f"max_message_size is {self.max_message_size}; no peer accepts more than {MAX_MESSAGE}")
        if not isinstance(self.retain, int | float) or isinstance(self.retain, bool):
            raise OptionTypeError(f"retain takes a number of seconds, not {self.retain!r}")
        if not (math.isfinite(self.retain) and 1 <= self.retain <= 7 * 86400):
            raise OptionError(f"retain is {self.retain} seconds; take from 1 second to 7 days")


def check_topic(topic: object) -> str:
    """The topic, if it is a non-empty string. Raises `TopicTypeError` or `TopicError`."""
    if not isinstance(topic, str):
        raise TopicTypeError(f"the topic must be a string, not {type(topic).__name__}: {topic!r}")
    if not topic:
        raise TopicError("the topic is empty: choose a name that the others use too")
    return topic
