"""A publisher under test, and what the checks of :mod:`silbo.testing.conformance` see of it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Collection, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, Protocol
from uuid import uuid4

from silbo.errors import BrokerUnavailable, DeliveryUnknown, MessageRefused, PublishError
from silbo.message import Message, new_publication
from silbo.protocols import Promises, Publisher

__all__ = ["ADDRESS", "Rig", "message"]

ADDRESS: Final = "orders"
"""The address to which one of the checks sends; it has to be there where a publisher does not make it."""
PATIENCE: Final = 20.0
"""Seconds for anything that is waited for; so a publisher's own timeout is less in these checks."""
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
        """Entering makes the broker go away, leaving brings it back; None where it can't go away.

        It is left in good order, whatever a check finds; only a cancelled one leaves it with an error.
        """
        ...

    def freeze(self) -> AbstractAsyncContextManager[object] | None:
        """Entering makes the broker answer nothing, as SIGSTOP does, leaving ends that; None where there is no such thing.

        Connections stay, and what it is sent meanwhile it may carry out afterwards.
        """
        ...


def message(number: int = 0, *, kind: str = "notification", to: str | None = None, **payload: Any) -> Message:
    """A message as the bridge makes them: its ``n`` is the number, its key one of five."""
    event_id = str(uuid4())
    values = {"event_id": event_id, "event_timestamp": "2026-03-07T09:26:02.588855Z", "n": number} | payload
    headers = {"publication": new_publication(), "version": "1", "key": f"k{number % KEYS}"}
    return Message(f"{kind}_event", "conformance.checked", event_id, values, headers, to, "Checked")


def must(promise: bool, text: str) -> None:
    """Say which promise was broken."""
    if not promise:
        raise AssertionError(text)


def promises_of(rig: Rig) -> Promises:
    """What the publisher declares; all, where it declares nothing."""
    promises: Promises = getattr(rig.publisher, "promises", Promises())
    return promises


async def publish(rig: Rig, *messages: Message) -> None:
    """Publish where nothing is amiss."""
    error = await outcome(rig.publisher.publish(*messages))
    must(error is None, f"a publish of {len(messages)} messages failed, with nothing amiss: {error!r}")


async def outcome(publishing: Awaitable[None], *, unsent: type[Exception] = PublishError) -> PublishError | None:
    """How a publish ended: None where the broker has the messages.

    Args:
        publishing: The call.
        unsent: A further error which says that nothing was sent. An outbox that is full has some of its own.
    """
    limit = asyncio.timeout(PATIENCE)
    try:
        async with limit:
            await publishing
    except (BrokerUnavailable, DeliveryUnknown, MessageRefused) as error:
        return error
    except (PublishError, unsent) as error:
        return BrokerUnavailable(str(error))
    except Exception as error:
        must(not limit.expired(), f"a publish did not answer within {PATIENCE:g} s")
        raise AssertionError(
            f"a publish raised {error!r}, and not BrokerUnavailable, DeliveryUnknown or MessageRefused"
        ) from error
    return None


async def together(awaitables: Iterable[Awaitable[None]]) -> None:
    """Await them at once, to the last; the first failure comes out alone."""
    for end in await asyncio.gather(*awaitables, return_exceptions=True):
        if end is not None:
            raise end


async def arrived(rig: Rig, numbers: Iterable[int], to: str | None = None) -> Sequence[Message]:
    """What arrived, once these are among it."""
    wanted = set(numbers)
    loop = asyncio.get_running_loop()
    until = loop.time() + PATIENCE
    while True:
        got = await rig.arrived(to)
        if not (missing := wanted - {one.payload.get("n") for one in got}):
            return got
        lost = f"lost {len(missing)} of {len(wanted)} messages without an error: {sorted(missing)[:10]}"
        must(loop.time() <= until, lost)
        await asyncio.sleep(0.02)


async def settled(rig: Rig, sure: Iterable[int], possible: Iterable[int] | None = None) -> Sequence[Message]:
    """What arrived: all of the sure ones, of the possible ones some, no other, and each once."""
    wanted = set(sure)
    allowed = wanted if possible is None else wanted.union(possible)
    last = range(10_000, 10_000 + KEYS)  # one behind each key
    await publish(rig, *map(message, last))
    got = [one for one in await arrived(rig, wanted.union(last)) if one.payload.get("n") not in last]
    counts: Counter[Any] = Counter(one.payload.get("n") for one in got)
    must(counts.keys() <= allowed, f"arrived, though not sent or refused: {sorted(counts.keys() - allowed)[:10]}")
    twice = sorted(number for number, count in counts.items() if count > 1)
    must(not twice, f"arrived more than once: {twice[:10]}")
    return got


def in_order(rig: Rig, got: Sequence[Message], numbers: Collection[int]) -> None:
    """That these came in the order of the publisher's promise."""
    order = promises_of(rig).order
    if order == "none":
        return
    came = [number for one in got if (number := one.payload["n"]) in numbers]
    for key in range(KEYS) if order == "key" else [None]:
        of_key = [number for number in came if key is None or number % KEYS == key]
        must(of_key == sorted(of_key), f"out of order: {of_key[:30]}")
