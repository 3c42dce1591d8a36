"""The checks that every publisher must pass, whichever broker is behind it: run them on a publisher of your own.

A :class:`Rig` is a publisher, with a way to see the messages that arrived. Each of the ``CHECKS`` takes a fresh rig, and
raises AssertionError with the promise that was broken. With pytest::

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    async def test_my_publisher(check):
        async with my_rig() as rig:
            await check(rig)

A publisher that can't keep all promises declares those it keeps, as its attribute ``promises``: see
:class:`~silbo.protocols.Promises`. Without this attribute, the checks ask for all of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from itertools import count
from typing import Final, TypeAlias

from silbo.errors import BrokerUnavailable, MessageRefused, PublishError
from silbo.protocols import SequencedPublisher
from silbo.testing.rig import (
    ADDRESS,
    KEYS,
    PATIENCE,
    Rig,
    check_order,
    gather_all,
    get_outcome,
    get_promises,
    message,
    publish,
    require,
    wait_for_all,
    wait_for_exactly,
)

__all__ = ["ADDRESS", "CHECKS", "Check", "Rig", "message"]

MANY: Final = 200
"""Messages that are published at once, where a check publishes many."""

Check: TypeAlias = Callable[[Rig], Awaitable[None]]
"""A check: takes a fresh rig, and raises AssertionError with the promise that was broken."""


async def check_content(rig: Rig) -> None:
    """Check that messages of both kinds arrive with all their fields, and with their origin."""
    sent = [
        message(number, kind=kind, who="Zoë", tags=["a", None, 1.5])
        for number, kind in enumerate(("notification", "ecst"))
    ]
    for each in sent:
        await publish(rig, each)
    got = {each.message_id: each for each in await wait_for_exactly(rig, range(2))}
    require(got.keys() == {each.message_id for each in sent}, f"message_ids were lost or changed: {sorted(got)}")
    for each in sent:
        received = got[each.message_id]
        for part in ("message_type", "message_name", "payload"):
            require(
                getattr(received, part) == getattr(each, part),
                f"{part} {getattr(each, part)!r} came as {getattr(received, part)!r}",
            )
        changed = {name for name, value in each.headers.items() if received.headers.get(name) != value}
        require(not changed, f"headers were lost or changed: {sorted(changed)}")
        origin = received.origin
        require(
            origin is not None and origin.app == rig.publisher.app,
            f"its origin is {origin}, not of {rig.publisher.app!r}",
        )


async def check_batch(rig: Rig) -> None:
    """Check that the messages of one call arrive once, in the order of the call."""
    await publish(rig, *map(message, range(MANY)))
    check_order(rig, await wait_for_exactly(rig, range(MANY)), range(MANY))


async def check_call_order(rig: Rig) -> None:
    """Check that messages arrive in the order of their calls, even if the calls are not awaited one after another."""
    for number in range(KEYS * 2):
        await publish(rig, message(number))
    begun = range(KEYS * 2, KEYS * 12)
    await gather_all(publish(rig, message(number)) for number in begun)
    check_order(rig, await wait_for_exactly(rig, range(begun.stop)), range(begun.stop))


async def check_empty_call(rig: Rig) -> None:
    """Check that a call without messages sends none."""
    await publish(rig)
    await wait_for_exactly(rig, ())


async def check_concurrency(rig: Rig) -> None:
    """Check that each message of many calls at once arrives once."""
    await gather_all(publish(rig, message(n), message(n + MANY)) for n in range(MANY))
    await wait_for_exactly(rig, range(2 * MANY))


async def check_refusal(rig: Rig) -> None:
    """Check that a message that can't be sent is refused, while the other messages of its call and later ones are sent."""
    bad = message(99, what=float("nan"))
    for call in ((bad,), (message(1), bad, message(2), message(3))):
        end = await get_outcome(rig.publisher.publish(*call))
        require(
            isinstance(end, MessageRefused),
            f"{len(call) - 1} messages and a NaN ended with {end!r}, not MessageRefused",
        )
    await publish(rig, message(4))
    check_order(rig, await wait_for_exactly(rig, range(1, 5)), range(1, 5))


async def check_address(rig: Rig) -> None:
    """Check that a message goes to the address that a route chose, and to no other."""
    await publish(rig, message(1, to=ADDRESS), message(2))
    await wait_for_exactly(rig, [2])
    await wait_for_all(rig, [1], to=ADDRESS)


async def check_cancellation(rig: Rig) -> None:
    """Check that a cancelled publish ends at once, and that the messages of the others arrive; its own may arrive."""
    tasks = [asyncio.create_task(rig.publisher.publish(message(number))) for number in range(MANY)]
    await asyncio.sleep(0)
    for task in (cancelled := tasks[::3]):
        task.cancel()
    _, hanging = await asyncio.wait(tasks, timeout=PATIENCE)
    for task in hanging:
        task.cancel()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    require(not hanging, f"{len(hanging)} publishes did not answer within {PATIENCE:g} s when others were cancelled")
    for task, end in zip(tasks, ends, strict=True):
        ended = end is None or (task in cancelled and isinstance(end, asyncio.CancelledError))
        require(ended, f"a publish ended with {end!r} when others were cancelled")
    sure = [number for number, end in enumerate(ends) if end is None]
    await wait_for_exactly(rig, sure, possible=range(MANY))


async def check_outage(rig: Rig) -> None:
    """Check that every call has a true outcome while the broker is away, and that all is as before when it is back."""
    await _check_away(rig, rig.outage(), MANY)


async def check_freeze(rig: Rig) -> None:
    """Check the same with a broker that does not answer.

    The broker may carry out later what it was sent. So the outcome of such a publish is DeliveryUnknown, never
    BrokerUnavailable.
    """
    await _check_away(rig, rig.freeze(), KEYS)


async def _check_away(rig: Rig, away: AbstractAsyncContextManager[object] | None, at_once: int) -> None:
    """Publish before, while and after the broker is away: one after another, and ``at_once`` at once."""
    if away is None:
        return
    outcomes: dict[int, PublishError | None] = {}

    async def publish_one(number: int) -> None:
        outcomes[number] = await get_outcome(rig.publisher.publish(message(number)))

    async def publish_while_away() -> None:
        for number in range(100, 103):
            await publish_one(number)
        await gather_all(publish_one(number) for number in range(103, 103 + at_once))

    for number in range(KEYS):
        await publish_one(number)
    require(not any(outcomes.values()), f"it did not work before the broker went away: {outcomes}")
    async with away:  # left without an error, whatever the publishes raise
        (problem,) = await asyncio.gather(publish_while_away(), return_exceptions=True)
    if problem is not None:
        raise problem
    deadline = asyncio.get_running_loop().time() + PATIENCE
    for number in count(1000):
        await publish_one(number)
        if outcomes[number] is None:
            break
        require(
            asyncio.get_running_loop().time() < deadline, f"the broker is back, and a publish fails: {outcomes[number]}"
        )
        await asyncio.sleep(0.05)
    keeps = get_promises(rig).keeps
    sure = [number for number, end in outcomes.items() if end is None and (keeps or number >= 100)]
    possible = [number for number, end in outcomes.items() if not isinstance(end, BrokerUnavailable)]
    check_order(rig, await wait_for_exactly(rig, sure, possible=possible), sure)


async def check_closing(rig: Rig) -> None:
    """Check that ``aclose`` finishes the publishes in hand, may be called twice, and that later publishes fail."""
    tasks = [asyncio.create_task(get_outcome(rig.publisher.publish(message(number)))) for number in range(MANY)]
    await asyncio.sleep(0)
    try:
        for which in ("first", "second"):
            try:
                await rig.publisher.aclose()
            except Exception as error:
                raise AssertionError(f"the {which} aclose() raised {error!r}") from error
    finally:
        ends = await asyncio.gather(*tasks, return_exceptions=True)  # all of them, so that none is left running
    for end in ends:
        if isinstance(end, AssertionError):
            raise end
    # An outbox raises a RuntimeError, a mistake of the caller: not sent.
    ends.append(await get_outcome(rig.publisher.publish(message(MANY)), unsent=RuntimeError))
    got = await wait_for_all(rig, [number for number, end in enumerate(ends) if end is None])
    unsent = {number for number, end in enumerate(ends) if isinstance(end, BrokerUnavailable)}
    lied = unsent & {each.payload.get("n") for each in got}
    require(not lied, f"messages arrived of which it was said that they were not sent: {sorted(lied)}")


async def check_sequence(rig: Rig) -> None:
    """Check that a publisher that knows sequences adds a numbered message once, however often it is given."""
    publisher = rig.publisher
    if not isinstance(publisher, SequencedPublisher):
        return
    numbered = [(number, message(number)) for number in range(1, 11)]
    try:
        await publisher.publish_sequenced("conformance/0", 1, numbered[:6])
        again = await publisher.publish_sequenced("conformance/0", 1, numbered)
    except Exception as error:
        raise AssertionError(f"publish_sequenced raised {error!r}") from error
    require(set(again.known) == set(range(1, 7)), f"of 1 to 6, sent before, it knew {sorted(again.known)}")
    check_order(rig, await wait_for_exactly(rig, range(1, 11)), range(1, 11))


CHECKS: Final[Sequence[Check]] = (
    check_content,
    check_batch,
    check_call_order,
    check_empty_call,
    check_concurrency,
    check_refusal,
    check_address,
    check_cancellation,
    check_outage,
    check_freeze,
    check_closing,
    check_sequence,
)
"""All checks."""
