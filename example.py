"""Run this in two terminals: each prints what the other says, then both end."""

from typing import Any

from solyd_swarm import pubsub

swarm = pubsub("foobar")


def on_message(obj: Any) -> None:
    print("message", obj)
    swarm.leave()


swarm.on("message", on_message)
swarm.on("connected", lambda: print("connected"))
swarm.on("connected", lambda: swarm.publish({"data": f"hello warld from {swarm.id}!"}))
