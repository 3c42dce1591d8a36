"""The checks that every subscription must pass, whichever broker is behind it: run them on a subscription of your own.

A :class:`SubscriptionRig` makes subscriptions, and publishes messages for them. Each of the ``SUBSCRIPTION_CHECKS`` takes a fresh rig,
and raises AssertionError with the promise that was broken. With pytest::

    @pytest.mark.parametrize("check", SUBSCRIPTION_CHECKS, ids=lambda check: check.__name__)
    async def test_my_subscription(check):
        async with my_rig() as rig:
            await check(rig)

A broker that keeps no deliveries gives them an empty ``id``: then nothing is asked of acknowledgements and redelivery. Where a
subscription has a name, it is that of a group, and the checks ask for groups.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final, Protocol, TypeAlias

from silbo.errors import BrokerUnavailable, Gap
from silbo.message import Delivery, Message
from silbo.protocols import Publisher, Receiver, Subscription
from silbo.testing.rig import PATIENCE, get_outcome, message, require

__all__ = ["SUBSCRIPTION_CHECKS", "SubscriptionCheck", "SubscriptionRig"]

MANY: Final = 50
"""Messages of a check that publishes many."""
LAST: Final = 10_000
"""The number of a message behind all others."""


class SubscriptionRig(Protocol):
    """A broker whose subscriptions are checked, with nothing published yet."""

    @property
    def publisher(self) -> Publisher:
        """A publisher whose messages, without an address of their own, reach the subscriptions."""
        ...

    def subscribe(self, group: str) -> Subscription:
        """Return a subscription that begins with new messages: one of this group, if the broker has groups."""
        ...

    def outage(self) -> AbstractAsyncContextManager[object] | None:
        """Return a context manager in which the broker is away; None if it can't go away. It is left without an error."""
        ...


SubscriptionCheck: TypeAlias = Callable[[SubscriptionRig], Awaitable[None]]
"""A check: takes a fresh rig, and raises AssertionError with the promise that was broken."""


# -- the steps ----------------------------------------------------------------------------------------------


@asynccontextmanager
async def _opened(rig: SubscriptionRig, group: str = "checks") -> AsyncGenerator[Receiver]:
    receiver = await _answer("open", rig.subscribe(group).open())
    try:
        yield receiver
    finally:
        await _answer("aclose", receiver.aclose())


async def _answer(call: str, answer: Awaitable[Any]) -> Any:
    """Return the answer of a call while nothing is wrong.

    Raises:
        AssertionError: it raised an error, or did not answer.
    """
    limit = asyncio.timeout(PATIENCE)
    try:
        async with limit:
            return await answer
    except Exception as error:
        require(not limit.expired(), f"{call}() did not answer within {PATIENCE:g} s")
        raise AssertionError(f"{call}() raised {error!r}, with nothing amiss") from error


async def _publish(rig: SubscriptionRig, *messages: Message) -> None:
    error = await get_outcome(rig.publisher.publish(*messages))
    require(error is None, f"a publish failed, with nothing amiss: {error!r}")


async def _receive(receiver: Receiver, numbers: Iterable[int], limit: int = 1000) -> list[Delivery]:
    """Receive until the messages with these numbers have come; return all deliveries in their order."""
    wanted = set(numbers)
    got: list[Delivery] = []
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PATIENCE
    while missing := wanted - {_number(delivery) for delivery in got}:
        require(loop.time() <= deadline, f"did not come within {PATIENCE:g} s: {sorted(missing)[:10]}")
        items: Sequence[Delivery | Gap] = await _answer("receive", receiver.receive(limit))
        require(len(items) <= limit, f"receive({limit}) returned {len(items)}")
        got += [item for item in items if isinstance(item, Delivery)]
    return got


async def _receive_rest(rig: SubscriptionRig, receiver: Receiver) -> list[Delivery]:
    """Return the deliveries that a receiver still gets, which are then all that there were."""
    await _publish(rig, message(LAST))
    rest = await _receive(receiver, [LAST])
    return [delivery for delivery in rest if _number(delivery) != LAST]


def _number(delivery: Delivery) -> int:
    number: int = delivery.message().payload["n"]
    return number


def _numbers(deliveries: Iterable[Delivery]) -> list[int]:
    return [_number(delivery) for delivery in deliveries]


async def _receive_kept(rig: SubscriptionRig, receiver: Receiver, numbers: Sequence[int]) -> list[Delivery]:
    """Publish messages and receive them; an empty list if the broker does not keep deliveries."""
    await _publish(rig, *map(message, numbers))
    got = await _receive(receiver, numbers)
    require(_numbers(got) == list(numbers), f"{list(numbers)} came as {_numbers(got)}")
    return got if all(delivery.id for delivery in got) else []


# -- the checks ---------------------------------------------------------------------------------------------


async def check_description(rig: SubscriptionRig) -> None:
    """Check that a subscription and its receiver say what they are; no connection is needed for the first."""
    subscription = rig.subscribe("checks")
    require(subscription.app == rig.publisher.app, f"its app is {subscription.app!r}, not {rig.publisher.app!r}")
    require(isinstance(subscription.name, str), f"its name is {subscription.name!r}: the group's, or an empty text")
    async with _opened(rig) as receiver:
        every = receiver.keep_every
        require(every is None or every > 0, f"keep_every is seconds or None, not {every!r}")
        require(receiver.skips_own_instance in (True, False), "skips_own_instance is True or False")


async def check_content(rig: SubscriptionRig) -> None:
    """Check that a delivery has its message with all fields and its origin, its address, and attempt 1."""
    sent = message(1, who="Zoë", tags=["a", None, 1.5])
    async with _opened(rig) as receiver:
        await _publish(rig, sent)
        [delivery] = await _receive(receiver, [1])
        got = delivery.message()
        for part in ("message_type", "message_name", "message_id", "payload"):
            require(
                getattr(got, part) == getattr(sent, part),
                f"{part} {getattr(sent, part)!r} came as {getattr(got, part)!r}",
            )
        origin = got.origin
        require(origin is not None and origin.app == rig.publisher.app, f"its origin is {origin}")
        require(bool(delivery.address), "the delivery has no address")
        require(delivery.attempt == 1, f"the first delivery has attempt {delivery.attempt}")
        await _answer("ack", receiver.ack(delivery))


async def check_opening(rig: SubscriptionRig) -> None:
    """Check that what is published after ``open`` has returned arrives, and what was published before does not."""
    for number in range(5):
        await _publish(rig, message(100 + number))
        async with _opened(rig, f"checks-{number}") as receiver:
            await _publish(rig, message(number))
            got = _numbers(await _receive(receiver, [number]))
            require(got == [number], f"only {number} was published after open(), and {got} came")


async def check_order_and_limit(rig: SubscriptionRig) -> None:
    """Check that deliveries come in the order of their publishing, at most ``limit`` of them at once."""
    async with _opened(rig) as receiver:
        await _publish(rig, *map(message, range(MANY)))
        got = _numbers(await _receive(receiver, range(MANY), limit=7))
        require(got == list(range(MANY)), f"out of order, or twice: {got}")


async def check_waiting(rig: SubscriptionRig) -> None:
    """Check that a receive without messages returns nothing after a moment; and that it wakes up when a message comes."""
    async with _opened(rig) as receiver:
        began = asyncio.get_running_loop().time()
        items: Sequence[Delivery | Gap] = await _answer("receive", receiver.receive(10))
        took = asyncio.get_running_loop().time() - began
        require(took < PATIENCE / 2, f"a receive without messages returned after {took:.1f} s; half a second is right")
        require(list(items) == [], f"nothing was published, and {items} came")
        receiving = asyncio.create_task(_receive(receiver, [1]))
        await asyncio.sleep(0)
        await _publish(rig, message(1))
        await receiving


async def check_cancellation(rig: SubscriptionRig) -> None:
    """Check that a receive that is cancelled while it waits loses nothing that is published later."""
    async with _opened(rig) as receiver:
        for number in range(3):
            receiving = asyncio.create_task(receiver.receive(10))
            await asyncio.wait([receiving], timeout=0.01 * number)
            receiving.cancel()
            (ended,) = await asyncio.gather(receiving, return_exceptions=True)
            is_right = isinstance(ended, asyncio.CancelledError) or not (isinstance(ended, BaseException) or ended)
            require(is_right, f"a cancelled receive ended with {ended!r}")
            await _publish(rig, message(number))
            got = await _receive(receiver, [number])
            require(_numbers(got) == [number], f"after a cancelled receive {number} came as {_numbers(got)}")
            await _answer("ack", receiver.ack(*got))  # else it may come again, over a new connection


async def check_groups(rig: SubscriptionRig) -> None:
    """Check that each group gets every message, and one of its receivers each; the others of a broker without groups get all."""
    async with _opened(rig) as one, _opened(rig) as two, _opened(rig, "others") as other:
        await _publish(rig, *map(message, range(MANY)))
        got = _numbers(await _receive(other, range(MANY)))
        require(got == list(range(MANY)), f"a group of one got {got}")
        if not rig.subscribe("checks").name:
            for each in (one, two):
                require(
                    _numbers(await _receive(each, range(MANY))) == list(range(MANY)), "a subscriber did not get all"
                )
            return
        shared: list[int] = []
        loop = asyncio.get_running_loop()
        deadline = loop.time() + PATIENCE
        while len(set(shared)) < MANY:
            require(loop.time() <= deadline, f"of {MANY} messages a group of two got {len(set(shared))}")
            for each in (one, two):
                items = await _answer("receive", each.receive(5))
                shared += _numbers(item for item in items if isinstance(item, Delivery))
        twice = len(shared) - len(set(shared))
        require(not twice, f"{twice} messages went to both receivers of a group")


async def check_redelivery(rig: SubscriptionRig) -> None:
    """Check that what was not acknowledged goes to the group's next receiver, in order and as a further attempt."""
    async with _opened(rig) as receiver:
        got = await _receive_kept(rig, receiver, [1, 2, 3, 4])
        if not got:
            await _answer("ack", receiver.ack())
            return
        await _answer("ack", receiver.ack(got[1], got[3]))
    async with _opened(rig) as receiver:
        again = await _receive(receiver, [1, 3])
        require(_numbers(again) == [1, 3], f"1 and 3 of 4 were not acknowledged, and {_numbers(again)} came again")
        attempts = [delivery.attempt for delivery in again]
        require(attempts == [2, 2], f"without a counted attempt a redelivery has attempt 2, not {attempts}")
        await _answer("ack", receiver.ack(*again))
        await _answer("ack", receiver.ack(*again))  # safe to repeat
        rest = _numbers(await _receive_rest(rig, receiver))
        require(rest == [], f"acknowledged, and came again: {rest}")


async def check_acknowledging_while_receiving(rig: SubscriptionRig) -> None:
    """Check that deliveries are acknowledged while ``receive`` waits."""
    async with _opened(rig) as receiver:
        await _publish(rig, message(1))
        got = await _receive(receiver, [1])
        receiving = asyncio.create_task(_receive(receiver, [2]))
        await asyncio.sleep(0)
        await _answer("ack", receiver.ack(*got))
        await _publish(rig, message(2))
        await receiving


async def check_counting(rig: SubscriptionRig) -> None:
    """Check that attempts are counted for a delivery, also over its redelivery; acknowledging forgets them."""
    async with _opened(rig) as receiver:
        got = await _receive_kept(rig, receiver, [1, 2])
        if not got:
            return
        counts = [await _answer("count", receiver.count(got[0])) for _ in range(2)]
        require(counts == [1, 2], f"two attempts were counted as {counts}")
    async with _opened(rig) as receiver:
        again = await _receive(receiver, [1, 2])
        attempts = [delivery.attempt for delivery in again]
        require(attempts == [4, 2], f"2 plus the attempts counted so far is [4, 2] after 2 and 0, not {attempts}")
        third = await _answer("count", receiver.count(again[0]))
        require(third == 3, f"the third attempt was counted as {third}")
        await _answer("ack", receiver.ack(*again))


async def check_burying(rig: SubscriptionRig) -> None:
    """Check that a dead letter is stored once and does not come again; only one of its own can be buried."""
    async with _opened(rig) as receiver:
        got = await _receive_kept(rig, receiver, [1, 2])
        if not got:
            return
        buried = await _answer("bury", receiver.bury(got[0], error="ValueError: no", attempts=1))
        require(buried is True, f"bury() returned {buried!r} for a delivery in hand")
        again = await _answer("bury", receiver.bury(got[0], error="ValueError: no", attempts=1))
        require(again is False, f"bury() returned {again!r} for a delivery that is done")
    async with _opened(rig) as receiver:
        rest = await _receive(receiver, [2])
        require(_numbers(rest) == [2], f"1 was buried and 2 was not, and {_numbers(rest)} came again")
        await _answer("ack", receiver.ack(*rest))


async def check_keeping(rig: SubscriptionRig) -> None:
    """Check that deliveries in hand stay there when they are kept."""
    async with _opened(rig) as receiver, _opened(rig):
        got = await _receive_kept(rig, receiver, [1, 2])
        lost: Collection[Delivery] = await _answer("keep", receiver.keep(*got))
        require(not lost, f"keep() says that another consumer has {_numbers(lost)}, and there is none that could")
        await _answer("keep", receiver.keep())
        await _answer("ack", receiver.ack(*got))


async def check_offering(rig: SubscriptionRig) -> None:
    """Check that an offered delivery goes to another receiver of the group, and to that alone; ``keep`` ends the offer."""
    async with _opened(rig) as giver:
        got = await _receive_kept(rig, giver, [1, 2])
        if not got:
            return
        offered: Sequence[float | None] = await _answer("offer", giver.offer(*got))
        require(
            len(offered) == 2 and all(each is not None and each >= 0 for each in offered), f"offer() said {offered}"
        )
        lost: Collection[Delivery] = await _answer("keep", giver.keep(got[1]))
        require(not lost, "keep() did not take back an offer that nobody had taken")
        async with _opened(rig) as taker:
            taken = await _receive(taker, [1])
            require(_numbers(taken) == [1] and taken[0].attempt == 2, f"1 was offered, and came as {taken}")
            lost = await _answer("keep", giver.keep(*got))
            require(_numbers(lost) == [1], f"keep() says that {_numbers(lost)} is another's, and 1 is")
            again: Sequence[float | None] = await _answer("offer", giver.offer(got[0]))
            require(list(again) == [None], f"offer() says {again} of a delivery that another consumer has")
            buried = await _answer("bury", giver.bury(got[0], error="no", attempts=1))
            require(buried is False, "bury() took a delivery that another consumer has")
            await _answer("ack", taker.ack(*taken))
        await _answer("ack", giver.ack(got[1]))


async def check_outage(rig: SubscriptionRig) -> None:
    """Check that an outage is told as BrokerUnavailable and as nothing else, and that all is as before when it is over."""
    outage = rig.outage()
    if outage is None:
        return
    async with _opened(rig) as receiver:
        kept = await _receive_kept(rig, receiver, [1])
        problems: list[Exception] = []
        async with outage:  # left without an error, whatever the receiver raises
            for _ in range(3):
                try:
                    async with asyncio.timeout(PATIENCE):
                        await receiver.receive(10)
                except BrokerUnavailable:
                    pass
                except Exception as error:  # noqa: BLE001  # told below
                    problems.append(error)
        require(not problems, f"a receive raised {problems[:1]}, and not BrokerUnavailable, while the broker was away")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + PATIENCE
        got: set[int] = set()
        number = 100
        while not any(each >= 100 for each in got):
            require(loop.time() <= deadline, "the broker is back, and nothing comes")
            number += 1
            await get_outcome(rig.publisher.publish(message(number)))
            try:
                items = await receiver.receive(10)
            except BrokerUnavailable:
                await asyncio.sleep(0.05)
                continue
            got |= {_number(item) for item in items if isinstance(item, Delivery)}
        if kept:
            lost: Collection[Delivery] = await _answer("keep", receiver.keep(*kept))
            require(not lost, "a delivery in hand was given away in an outage")


async def check_closing(rig: SubscriptionRig) -> None:
    """Check that ``aclose`` may be called twice, and leaves the other subscriptions as they are."""
    async with _opened(rig, "others") as other:
        async with _opened(rig) as receiver:
            await _answer("aclose", receiver.aclose())
        await _publish(rig, message(1))
        await _receive(other, [1])


SUBSCRIPTION_CHECKS: Final[Sequence[SubscriptionCheck]] = (
    check_description,
    check_content,
    check_opening,
    check_order_and_limit,
    check_waiting,
    check_cancellation,
    check_groups,
    check_redelivery,
    check_acknowledging_while_receiving,
    check_counting,
    check_burying,
    check_keeping,
    check_offering,
    check_outage,
    check_closing,
)
"""All checks."""
