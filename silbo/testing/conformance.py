"""What every publisher must show, whatever is behind it: run it on one of your own.

A :class:`Rig` is a publisher, and a look at what arrived. Each of the ``CHECKS`` takes a fresh one and raises
AssertionError, with the promise that was broken. With pytest::

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    async def test_my_publisher(check):
        async with my_rig() as rig:
            await check(rig)

What a publisher can't promise it declares, as its attribute ``promises``: see :class:`~silbo.protocols.Promises`. Without
one it is held to all of them.
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
    arrived,
    in_order,
    message,
    must,
    outcome,
    promises_of,
    publish,
    settled,
    together,
)

__all__ = ["ADDRESS", "CHECKS", "Check", "Rig", "message"]

STORM: Final = 200

Check: TypeAlias = Callable[[Rig], Awaitable[None]]


async def whole(rig: Rig) -> None:
    """Both kinds arrive with everything that was in them, and with their origin."""
    sent = [
        message(number, kind=kind, who="Zoë", tags=["a", None, 1.5])
        for number, kind in enumerate(("notification", "ecst"))
    ]
    for one in sent:
        await publish(rig, one)
    got = {one.message_id: one for one in await settled(rig, range(2))}
    must(got.keys() == {one.message_id for one in sent}, f"message_ids were lost or changed: {sorted(got)}")
    for one in sent:
        there = got[one.message_id]
        for part in ("message_type", "message_name", "payload"):
            must(
                getattr(there, part) == getattr(one, part),
                f"{part} {getattr(one, part)!r} came as {getattr(there, part)!r}",
            )
        changed = {name for name, value in one.headers.items() if there.headers.get(name) != value}
        must(not changed, f"headers were lost or changed: {sorted(changed)}")
        origin = there.origin
        must(
            origin is not None and origin.app == rig.publisher.app,
            f"its origin is {origin}, not of {rig.publisher.app!r}",
        )


async def batch(rig: Rig) -> None:
    """The messages of one call arrive once, in its order."""
    await publish(rig, *map(message, range(STORM)))
    in_order(rig, await settled(rig, range(STORM)), range(STORM))


async def calls(rig: Rig) -> None:
    """Calls keep their order, awaited in turn or not."""
    for number in range(KEYS * 2):
        await publish(rig, message(number))
    begun = range(KEYS * 2, KEYS * 12)
    await together(publish(rig, message(number)) for number in begun)
    in_order(rig, await settled(rig, range(begun.stop)), range(begun.stop))


async def nothing(rig: Rig) -> None:
    """A call without messages sends none."""
    await publish(rig)
    await settled(rig, ())


async def concurrency(rig: Rig) -> None:
    """Of many calls at once each message arrives once."""
    await together(publish(rig, message(n), message(n + STORM)) for n in range(STORM))
    await settled(rig, range(2 * STORM))


async def refusal(rig: Rig) -> None:
    """A message that can't be sent is refused, and holds back no other: neither of its call nor later."""
    bad = message(99, what=float("nan"))
    for others, call in (((), (bad,)), ((1, 2, 3), (message(1), bad, message(2), message(3)))):
        end = await outcome(rig.publisher.publish(*call))
        must(
            isinstance(end, MessageRefused), f"{len(others)} messages and a NaN ended with {end!r}, not MessageRefused"
        )
    await publish(rig, message(4))
    in_order(rig, await settled(rig, range(1, 5)), range(1, 5))


async def address(rig: Rig) -> None:
    """A message goes to the address that a route chose, and to no other."""
    await publish(rig, message(1, to=ADDRESS), message(2))
    await settled(rig, [2])
    await arrived(rig, [1], to=ADDRESS)


async def cancellation(rig: Rig) -> None:
    """A publish that is cancelled ends at once; whether its message arrives is unknown, the others' do."""
    tasks = [asyncio.create_task(rig.publisher.publish(message(number))) for number in range(STORM)]
    await asyncio.sleep(0)
    for task in (cancelled := tasks[::3]):
        task.cancel()
    _, hanging = await asyncio.wait(tasks, timeout=PATIENCE)
    for task in hanging:
        task.cancel()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    must(not hanging, f"{len(hanging)} publishes did not answer within {PATIENCE:g} s when others were cancelled")
    for task, end in zip(tasks, ends, strict=True):
        ended = end is None or (task in cancelled and isinstance(end, asyncio.CancelledError))
        must(ended, f"a publish ended with {end!r} when others were cancelled")
    sure = [number for number, end in enumerate(ends) if end is None]
    await settled(rig, sure, possible=range(STORM))


async def outage(rig: Rig) -> None:
    """A broker goes away and returns: every call gets a true answer, and afterwards all is as before."""
    await _survives(rig, rig.outage(), STORM)


async def freeze(rig: Rig) -> None:
    """The same with a broker that answers nothing: it may do later what it was told, so that is unknown, not "not sent"."""
    await _survives(rig, rig.freeze(), KEYS)


async def _survives(rig: Rig, away: AbstractAsyncContextManager[object] | None, at_once: int) -> None:
    if away is None:
        return
    outcomes: dict[int, PublishError | None] = {}

    async def noted(number: int) -> None:
        outcomes[number] = await outcome(rig.publisher.publish(message(number)))

    async def meanwhile() -> None:
        for number in range(100, 103):
            await noted(number)
        await together(noted(number) for number in range(103, 103 + at_once))

    for number in range(KEYS):
        await noted(number)
    must(not any(outcomes.values()), f"it did not work before the broker went away: {outcomes}")
    async with away:  # left in good order, whatever is found in it
        (problem,) = await asyncio.gather(meanwhile(), return_exceptions=True)
    if problem is not None:
        raise problem
    until = asyncio.get_running_loop().time() + PATIENCE
    for number in count(1000):
        await noted(number)
        if outcomes[number] is None:
            break
        must(asyncio.get_running_loop().time() < until, f"the broker is back, and a publish fails: {outcomes[number]}")
        await asyncio.sleep(0.05)
    kept = promises_of(rig).keeps
    sure = [number for number, end in outcomes.items() if end is None and (kept or number >= 100)]
    possible = [number for number, end in outcomes.items() if not isinstance(end, BrokerUnavailable)]
    in_order(rig, await settled(rig, sure, possible=possible), sure)


async def closing(rig: Rig) -> None:
    """Closing finishes what is in hand, may be done twice, and lets nothing vanish afterwards."""
    tasks = [asyncio.create_task(outcome(rig.publisher.publish(message(number)))) for number in range(STORM)]
    await asyncio.sleep(0)
    for which in ("first", "second"):
        try:
            await rig.publisher.aclose()
        except Exception as error:
            raise AssertionError(f"the {which} aclose() raised {error!r}") from error
    ends = await asyncio.gather(*tasks)
    # A RuntimeError is a mistake of the caller's, as with an outbox: not sent.
    ends.append(await outcome(rig.publisher.publish(message(STORM)), unsent=RuntimeError))
    got = await arrived(rig, [number for number, end in enumerate(ends) if end is None])
    refused = {number for number, end in enumerate(ends) if isinstance(end, BrokerUnavailable)}
    lied = refused & {one.payload.get("n") for one in got}
    must(not lied, f"messages arrived of which it was said that they were not sent: {sorted(lied)}")


async def sequence(rig: Rig) -> None:
    """Where a publisher knows sequences, a numbered message is added once, however often it is given."""
    publisher = rig.publisher
    if not isinstance(publisher, SequencedPublisher):
        return
    numbered = [(number, message(number)) for number in range(1, 11)]
    try:
        await publisher.publish_sequenced("conformance/0", 1, numbered[:6])
        again = await publisher.publish_sequenced("conformance/0", 1, numbered)
    except Exception as error:
        raise AssertionError(f"publish_sequenced raised {error!r}") from error
    must(set(again.known) == set(range(1, 7)), f"of 1 to 6, sent before, it knew {sorted(again.known)}")
    in_order(rig, await settled(rig, range(1, 11)), range(1, 11))


CHECKS: Final[Sequence[Check]] = (
    whole,
    batch,
    calls,
    nothing,
    concurrency,
    refusal,
    address,
    cancellation,
    outage,
    freeze,
    closing,
    sequence,
)
