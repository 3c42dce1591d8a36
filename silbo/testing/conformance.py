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
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from itertools import count
from typing import Any, Final, Protocol, TypeAlias
from uuid import uuid4

from silbo.errors import BrokerUnavailable, DeliveryUnknown, MessageRefused, PublishError
from silbo.message import Message, new_publication
from silbo.protocols import Promises, Publisher, SequencedPublisher

__all__ = ["ADDRESS", "CHECKS", "Check", "Rig", "message"]

ADDRESS: Final = "orders"
"""The address to which one of the checks sends; it has to be there where a publisher does not make it."""
PATIENCE: Final = 20.0
"""Seconds for anything that is waited for; so a publisher's own timeout is less in these checks."""
STORM: Final = 200
KEYS: Final = 5


class Rig(Protocol):
    """A publisher under test, and the broker behind it, with nothing published yet."""

    @property
    def publisher(self) -> Publisher:
        """The one under test, always the same; with a timeout of a second or two."""
        ...

    async def arrived(self, to: str | None = None) -> Sequence[Message]:
        """What a consumer that was there from the start has got at an address (the default one) up to now.

        Decoded, in the order in which it came; for a broker with partitions, in any order that keeps theirs.
        """
        ...

    def outage(self) -> AbstractAsyncContextManager[object] | None:
        """Entering makes the broker go away, leaving brings it back; None where it can't go away."""
        ...


Check: TypeAlias = Callable[[Rig], Awaitable[None]]


def message(number: int = 0, *, kind: str = "notification", to: str | None = None, **payload: Any) -> Message:
    """A message as the bridge makes them: its ``n`` is the number, its key one of five."""
    event_id = str(uuid4())
    values = {"event_id": event_id, "event_timestamp": "2026-03-07T09:26:02.588855Z", "n": number} | payload
    headers = {"publication": new_publication(), "version": "1", "key": f"k{number % KEYS}"}
    return Message(f"{kind}_event", "conformance.checked", event_id, values, headers, to, "Checked")


async def whole(rig: Rig) -> None:
    """Both kinds arrive with everything that was in them, and with their origin."""
    sent = [
        message(number, kind=kind, who="Zoë", tags=["a", None, 1.5])
        for number, kind in enumerate(("notification", "ecst"))
    ]
    for one in sent:
        await rig.publisher.publish(one)
    got = {one.message_id: one for one in await _arrived(rig, range(2))}
    for one in sent:
        there = got[one.message_id]
        for part in ("message_type", "message_name", "payload"):
            _must(
                getattr(there, part) == getattr(one, part),
                f"{part} {getattr(one, part)!r} came as {getattr(there, part)!r}",
            )
        changed = {name for name, value in one.headers.items() if there.headers.get(name) != value}
        _must(not changed, f"headers were lost or changed: {sorted(changed)}")
        origin = there.origin
        _must(
            origin is not None and origin.app == rig.publisher.app,
            f"its origin is {origin}, not of {rig.publisher.app!r}",
        )


async def batch(rig: Rig) -> None:
    """The messages of one call arrive, in its order."""
    await rig.publisher.publish(*map(message, range(STORM)))
    _in_order(rig, await _arrived(rig, range(STORM)), range(STORM))


async def calls(rig: Rig) -> None:
    """Calls keep their order, awaited in turn or not."""
    for number in range(KEYS * 2):
        await rig.publisher.publish(message(number))
    begun = range(KEYS * 2, KEYS * 12)
    async with asyncio.TaskGroup() as tasks:
        for number in begun:
            tasks.create_task(rig.publisher.publish(message(number)))
    _in_order(rig, await _arrived(rig, range(begun.stop)), range(begun.stop))


async def nothing(rig: Rig) -> None:
    """A call without messages sends none."""
    await rig.publisher.publish()
    await _settled(rig, ())


async def concurrency(rig: Rig) -> None:
    """Of many calls at once each message arrives once."""
    await asyncio.gather(*(rig.publisher.publish(*map(message, (n, n + STORM))) for n in range(STORM)))
    await _settled(rig, range(2 * STORM))


async def refusal(rig: Rig) -> None:
    """A message that can't be sent is refused, and holds back no other: neither of its call nor later."""
    bad = message(99, what=float("nan"))
    for others, call in (((), (bad,)), ((1, 2, 3), (message(1), bad, message(2), message(3)))):
        outcome = await _outcome(rig.publisher.publish(*call))
        _must(
            isinstance(outcome, MessageRefused),
            f"{len(others)} messages and a NaN ended with {outcome!r}, not MessageRefused",
        )
    await rig.publisher.publish(message(4))
    _in_order(rig, await _settled(rig, range(1, 5)), range(1, 5))


async def address(rig: Rig) -> None:
    """A message goes to the address that a route chose, and to no other."""
    await rig.publisher.publish(message(1, to=ADDRESS), message(2))
    await _settled(rig, [2])
    await _arrived(rig, [1], to=ADDRESS)


async def cancellation(rig: Rig) -> None:
    """A publish that is cancelled ends at once; whether its message arrives is unknown, the others' do."""
    tasks = [asyncio.create_task(rig.publisher.publish(message(number))) for number in range(STORM)]
    await asyncio.sleep(0)
    for task in (cancelled := tasks[::3]):
        task.cancel()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    for task, end in zip(tasks, ends, strict=True):
        ended = end is None or (task in cancelled and isinstance(end, asyncio.CancelledError))
        _must(ended, f"a publish ended with {end!r} when others were cancelled")
    sure = [number for number, end in enumerate(ends) if end is None]
    await _settled(rig, sure, possible=range(STORM))


async def outage(rig: Rig) -> None:
    """A broker goes away and returns: every call gets a true answer, and afterwards all is as before."""
    if (away := rig.outage()) is None:
        return
    outcomes: dict[int, PublishError | None] = {}

    async def publish(number: int) -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                outcomes[number] = await _outcome(rig.publisher.publish(message(number)))
        except TimeoutError:
            raise AssertionError(f"a publish did not answer within {PATIENCE:g} s when the broker was away") from None

    for number in range(KEYS):
        await publish(number)
    _must(not any(outcomes.values()), f"it did not work before the outage: {outcomes}")
    async with away:
        for number in range(100, 103):
            await publish(number)
        async with asyncio.TaskGroup() as tasks:
            for number in range(103, 103 + STORM):
                tasks.create_task(publish(number))
    until = asyncio.get_running_loop().time() + PATIENCE
    for number in count(1000):
        await publish(number)
        if outcomes[number] is None:
            break
        _must(asyncio.get_running_loop().time() < until, f"the broker is back, and a publish fails: {outcomes[number]}")
        await asyncio.sleep(0.05)
    kept = _promises(rig).keeps
    sure = [number for number, outcome in outcomes.items() if outcome is None and (kept or number >= 100)]
    possible = [number for number, outcome in outcomes.items() if not isinstance(outcome, BrokerUnavailable)]
    _in_order(rig, await _settled(rig, sure, possible=possible), sure)


async def closing(rig: Rig) -> None:
    """Closing finishes what is in hand, may be done twice, and lets nothing vanish afterwards."""
    tasks = [asyncio.create_task(_outcome(rig.publisher.publish(message(number)))) for number in range(STORM)]
    await asyncio.sleep(0)
    await rig.publisher.aclose()
    await rig.publisher.aclose()
    outcomes = dict(enumerate(await asyncio.gather(*tasks)))
    try:
        outcomes[STORM] = await _outcome(rig.publisher.publish(message(STORM)))
    except RuntimeError as error:  # a mistake of the caller's, as with an outbox: not sent
        outcomes[STORM] = BrokerUnavailable(str(error))
    sure = [number for number, outcome in outcomes.items() if outcome is None]
    got = await _arrived(rig, sure)
    refused = [number for number, outcome in outcomes.items() if isinstance(outcome, BrokerUnavailable)]
    lied = {one.payload["n"] for one in got} & set(refused)
    _must(not lied, f"messages arrived of which it was said that they were not sent: {sorted(lied)}")


async def sequence(rig: Rig) -> None:
    """Where a publisher knows sequences, a numbered message is added once, however often it is given."""
    publisher = rig.publisher
    if not isinstance(publisher, SequencedPublisher):
        return
    numbered = [(number, message(number)) for number in range(1, 11)]
    await publisher.publish_sequenced("conformance/0", 1, numbered[:6])
    again = await publisher.publish_sequenced("conformance/0", 1, numbered)
    _must(set(again.known) == set(range(1, 7)), f"of 1 to 6, sent before, it knew {sorted(again.known)}")
    _in_order(rig, await _settled(rig, range(1, 11)), range(1, 11))


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
    closing,
    sequence,
)


# -- what the checks share ----------------------------------------------------------------------------------


def _must(promise: bool, text: str) -> None:
    if not promise:
        raise AssertionError(text)


def _promises(rig: Rig) -> Promises:
    promises: Promises = getattr(rig.publisher, "promises", Promises())
    return promises


async def _outcome(publish: Awaitable[None]) -> PublishError | None:
    """None where the broker has the messages."""
    try:
        await publish
    except (BrokerUnavailable, DeliveryUnknown, MessageRefused) as error:
        return error
    except PublishError as error:  # an outbox that is full, or closed: nothing was stored
        return BrokerUnavailable(str(error))
    return None


async def _arrived(rig: Rig, numbers: Iterable[int], to: str | None = None) -> Sequence[Message]:
    """What arrived, once these are among it."""
    wanted = set(numbers)
    loop = asyncio.get_running_loop()
    until = loop.time() + PATIENCE
    while True:
        got = await rig.arrived(to)
        if not (missing := wanted - {one.payload["n"] for one in got}):
            return got
        if loop.time() > until:
            raise AssertionError(
                f"lost {len(missing)} of {len(wanted)} messages without an error: {sorted(missing)[:10]}"
            )
        await asyncio.sleep(0.02)


async def _settled(rig: Rig, sure: Iterable[int], possible: Iterable[int] | None = None) -> Sequence[Message]:
    """What arrived: all of the sure ones, of the possible ones some, no other, and each once."""
    wanted = set(sure)
    allowed = wanted if possible is None else wanted.union(possible)
    last = range(10_000, 10_000 + KEYS)  # one behind each key
    await rig.publisher.publish(*map(message, last))
    got = [one for one in await _arrived(rig, wanted.union(last)) if one.payload["n"] not in last]
    counts = Counter(one.payload["n"] for one in got)
    _must(counts.keys() <= allowed, f"arrived, though not sent or refused: {sorted(counts.keys() - allowed)[:10]}")
    twice = sorted(number for number, count in counts.items() if count > 1)
    _must(not twice, f"arrived more than once: {twice[:10]}")
    return got


def _in_order(rig: Rig, got: Sequence[Message], numbers: Collection[int]) -> None:
    """That these came in the order of the publisher's promise."""
    order = _promises(rig).order
    if order == "none":
        return
    came = [number for one in got if (number := one.payload["n"]) in numbers]
    for key in range(KEYS) if order == "key" else [None]:
        of_key = [number for number in came if key is None or number % KEYS == key]
        _must(of_key == sorted(of_key), f"out of order: {of_key[:30]}")
