"""Endpoints on loopback: topics that link, one channel for each pair of instances, and what becomes of goals."""

import asyncio
import secrets

import pytest
from endpoints import HALL, PATIENCE, QUICK, ROOM, Host, hosts, proxy, until

from solyd_swarm.core.events import DialFailed, LinkDown, Received
from solyd_swarm.net.matching import TOPIC


async def link(one: Host, other: Host, at=None):
    """Both join a topic, and one dials the other."""
    a, b = one.join(), other.join()
    one.dial(at or other.at, other.instance)
    await until(lambda: a.ups and b.ups)
    return a, b


async def settled(one: Host, other: Host) -> None:
    """Both ends use one and the same channel, and there is no other."""

    def same() -> bool:
        here, there = one.channel(other), other.channel(one)
        ends = [end.endpoint for end in (one, other)]
        alone = not any(end._strangers or end._others or len(end._connections) != 1 for end in ends)
        return bool(
            here and there and alone and here.handshake_hash == there.handshake_hash and not any(end._dialler._tasks for end in ends)
        )

    await until(same)


async def test_two_who_share_a_topic_are_linked_and_frames_pass():
    async with hosts(Host(told=(("192.0.2.7", 7),)), Host()) as (one, other):
        a, b = await link(one, other)
        (up,), (down,) = a.ups, b.ups
        assert (up.peer, up.author, up.initiated) == (other.instance, bytes(other.key.verify_key), True)
        assert (down.peer, down.author, down.initiated) == (one.instance, bytes(one.key.verify_key), False)
        assert up.addresses == other.at
        assert down.addresses == (*one.at, ("192.0.2.7", 7))
        for number in range(300):
            one.send(other, b"%d" % number)
            other.send(one, b"%d" % number)
        await until(lambda: len(a.frames) == len(b.frames) == 300)
        assert a.frames == b.frames == [b"%d" % number for number in range(300)]
        assert len(b.all(Received)) < 300  # what arrives together is handed over together


async def test_topics_are_kept_apart_and_unknown_numbers_dropped():
    async with hosts(Host(), Host()) as (one, other):
        a, b = await link(one, other)
        hall_a, hall_b = one.join(HALL), other.join(HALL)
        await until(lambda: hall_a.ups and hall_b.ups)
        channel = one.channel(other)
        for number in (0, 77, 65535):
            channel.send(bytes((TOPIC, number >> 8, number & 255)) + b"nobody's")
        channel.send(bytes((TOPIC, 0)))
        channel.send(bytes((TOPIC, 0, 1)))
        one.send(other, b"to the hall", HALL)
        one.send(other, b"to the room")
        await until(lambda: b.frames)
        assert (b.frames, hall_b.frames) == ([b"to the room"], [b"to the hall"])
        assert not a.downs


async def test_leaving_a_topic_leaves_the_others_and_coming_back_links_again():
    async with hosts(Host(), Host()) as (one, other):
        await link(one, other)
        hall_a, hall_b = one.join(HALL), other.join(HALL)
        await until(lambda: hall_a.ups and hall_b.ups)
        for leaver, stayer in ((one, other), (other, one)):
            heard = stayer.endpoint._drivers[ROOM]
            heard.events.clear()
            leaver.endpoint.detach(ROOM)
            await until(lambda heard=heard: heard.downs)
            again = leaver.join()
            await until(lambda again=again, heard=heard: again.ups and heard.ups)
        assert not hall_a.downs + hall_b.downs
        assert len(one.endpoint._connections) == 1


@pytest.mark.parametrize("delay", [0.0, 0.02])
async def test_crossing_dials_end_in_one_channel_at_both_ends(delay):
    """Many pairs, whose frames overtake one another from connection to connection."""

    async def meet() -> None:
        async with hosts(Host(), Host()) as (one, other), proxy(one.port, delay) as to_one, proxy(other.port, delay) as to_other:
            a, b = one.join(), other.join()
            one.dial(to_other.at, other.instance)
            other.dial(to_one.at)
            await until(lambda: a.ups and b.ups)
            await settled(one, other)
            one.send(other, b"hello")
            other.send(one, b"hello")
            await until(lambda: a.frames and b.frames)
            assert (len(a.ups), len(b.ups)) == (1, 1)  # neither saw the link come and go
            assert not a.downs + b.downs
            assert not a.failures
            assert all(not failure.instance for failure in b.failures)

    async with asyncio.TaskGroup() as group:
        for _ in range(30):
            group.create_task(meet())


async def test_dials_that_cross_at_every_distance():
    for pause in range(0, 12):
        async with hosts(Host(), Host()) as (one, other):
            a, b = one.join(), other.join()
            one.dial(other.at)
            for _ in range(pause):
                await asyncio.sleep(0)
            other.dial(one.at)
            await until(lambda a=a, b=b: a.ups and b.ups)
            await settled(one, other)
            assert not a.downs + b.downs


@pytest.mark.parametrize("smaller_lost", [True, False])
@pytest.mark.parametrize("same_direction", [True, False])
async def test_who_lost_its_channel_replaces_the_dead_one_of_the_other(smaller_lost, same_direction):
    """The network swallows all that the old channel says, its end too: only one side knows that it is dead."""
    async with hosts(*sorted((Host(), Host()), key=lambda host: host.instance)) as ends:
        lost, kept = ends if smaller_lost else reversed(ends)
        dialler, dialled = (lost, kept) if same_direction else (kept, lost)
        async with proxy(dialled.port) as between:
            await link(dialler, dialled, between.at)
            between.frozen = True
            lost.channel(kept).abort("the cable was pulled")
            back, heard = lost.endpoint._drivers[ROOM], kept.endpoint._drivers[ROOM]
            await until(lambda: back.downs)
            heard.events.clear()
            back.events.clear()
            lost.dial(kept.at, kept.instance)
            await until(lambda: back.ups and heard.ups)
            assert [type(event).__name__ for event in heard.events] == ["LinkDown", "LinkUp"]
            assert heard.downs == [LinkDown(lost.instance, "replaced by a newer connection")]
            lost.send(kept, b"here again")
            await until(lambda: heard.frames)
            await settled(lost, kept)


async def test_a_known_peer_dialled_again_costs_one_handshake_and_then_nothing():
    async with hosts(Host(), Host()) as (one, other), proxy(one.port) as to_one:
        a, b = await link(one, other)
        for index in range(10):  # a source without instance keys reports the peer again and again
            other.dial(to_one.at)
            await until(lambda index=index: len(b.failures) > index)
        assert to_one.connections == 1
        assert b.failures[0] == DialFailed(b"", to_one.at)
        assert not a.downs + b.downs
        assert other.endpoint.instance_at((("192.0.2.1", 1), *to_one.at)) == one.instance
        assert other.endpoint.instance_at(one.at) == b""  # where it says that it listens; we have not been there
        await settled(one, other)


async def test_what_a_peer_claims_does_not_hide_another():
    """A member says that it listens where somebody else does."""
    victim = Host()
    async with hosts(victim, Host(told=victim.at), Host()) as (victim, liar, member):
        a = member.join()
        liar.join()
        victim.join()
        member.dial(liar.at)
        await until(lambda: a.ups)
        assert victim.at[0] in a.ups[0].addresses
        member.dial(victim.at)
        await until(lambda: len(a.ups) == 2)
        assert a.ups[1].peer == victim.instance


async def test_addresses_that_a_peer_may_not_send_us_to_are_left_out():
    told = (("10.1.2.3", 22), ("192.0.2.9", 9))
    async with hosts(Host(told=told), Host(may_dial=lambda address, teller: (address, teller) != ("10.1.2.3", "127.0.0.1"))) as (
        one,
        other,
    ):
        _, b = await link(one, other)
        assert b.ups[0].addresses == (*one.at, told[1])


async def test_another_instance_than_the_one_wanted():
    """An old ticket: the port now belongs to somebody else. It is a peer, but the goal is not reached."""
    async with hosts(Host(), Host()) as (one, other), proxy(other.port) as to_other:
        a, _ = one.join(), other.join()
        wanted = secrets.token_bytes(32)
        one.dial(to_other.at, wanted)
        await until(lambda: a.ups and a.failures)
        assert a.failures == [DialFailed(wanted, to_other.at)]
        assert a.ups[0].peer == other.instance
        assert a.ups[0].dialled == ()
        for index in range(1, 5):
            one.dial(to_other.at, wanted)
            await until(lambda index=index: len(a.failures) > index)
        assert to_other.connections == 1


async def test_a_goal_waits_for_a_topic_that_is_joined_a_little_later():
    async with hosts(Host(), Host()) as (one, other):
        await link(one, other)
        a = one.join(HALL)
        one.dial(other.at, other.instance, HALL)
        one.dial(other.at, b"", HALL)
        one.dial((*other.at, ("127.0.0.1", 1)), b"", HALL)
        b = other.join(HALL)
        await until(lambda: a.ups and b.ups and a.failures)
        assert a.ups[0].dialled == other.at
        assert a.failures == [DialFailed(b"", (*other.at, ("127.0.0.1", 1)))]  # another name of the same peer


async def test_a_goal_fails_where_the_topic_is_not_shared():
    async with hosts(Host(QUICK), Host()) as (one, other):
        a, hall = one.join(), one.join(HALL)
        one.dial(other.at)
        one.dial(other.at, topic_key=HALL)
        await until(lambda: a.failures and hall.failures, QUICK.meeting + 1)
        one.dial(other.at, other.instance)
        await until(lambda: len(a.failures) == 2, QUICK.meeting + 1)
        assert not a.ups + hall.ups
        assert len(a.failures) == 2


async def test_several_topics_share_a_dial():
    async with hosts(Host(), Host()) as (one, other), proxy(other.port) as to_other:
        mine = [one.join(key) for key in (ROOM, HALL)]
        yours = [other.join(key) for key in (ROOM, HALL)]
        for key in (ROOM, HALL, ROOM):
            one.dial(to_other.at, topic_key=key)
        await until(lambda: all(driver.ups for driver in mine + yours))
        assert to_other.connections == 1
        assert [driver.ups[0].dialled for driver in mine] == [to_other.at] * 2
        assert not any(driver.failures for driver in mine)


async def test_ourselves_are_no_peer():
    async with hosts(Host()) as (one,), proxy(one.port) as to_one:
        a = one.join()
        for index in range(3):
            one.dial(to_one.at)
            await until(lambda index=index: len(a.failures) > index)
        assert to_one.connections == 1
        assert not a.ups
        await until(lambda: not (one.endpoint._strangers or one.endpoint._connections or one.endpoint._others))


async def test_ports_of_the_dht_are_told_also_when_they_come_late():
    async with hosts(Host(), Host()) as (one, other):
        one.endpoint.announce_dht(4000)
        await link(one, other)
        assert (one.met, other.met) == ([], [("127.0.0.1", 4000)])
        other.endpoint.announce_dht(5000)
        await until(lambda: one.met)
        assert one.met == [("127.0.0.1", 5000)]


async def test_the_host_of_a_member_is_remembered_after_it_has_gone():
    async with hosts(Host(), Host()) as (one, other):
        a, _ = await link(one, other)
        assert one.endpoint.address_of(other.instance) == other.at[0]
        await asyncio.wait_for(other.endpoint.close(), PATIENCE)
        await until(lambda: a.downs)
        assert one.endpoint.address_of(other.instance) is None
        assert one.endpoint.host_of(other.instance) == "127.0.0.1"
        assert one.endpoint.host_of(one.instance) is None
