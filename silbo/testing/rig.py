"""The rig of a publisher under test, and the steps of which the checks of :mod:`silbo.testing.conformance` consist."""

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

__all__ = [
    "ADDRESS",
    "KEYS",
    "PATIENCE",
    "Rig",
    "check_order",
    "gather_all",
    "get_outcome",
    "get_promises",
    "message",
    "publish",
    "require",
    "wait_for_all",
    "wait_for_exactly",
]

ADDRESS: Final = "orders"
"""The address to which one of the checks sends. It has to exist, unless the publisher makes it."""
PATIENCE: Final = 20.0
"""Seconds that a check waits for anything; the publisher's own timeout has to be shorter."""
KEYS: Final = 5
"""Keys over which the messages of a check are spread."""


class Rig(Protocol):
    """A publisher under test and the broker behind it, with nothing published yet."""

    @property
    def publisher(self) -> Publisher:
        """The publisher under test, always the same object; with a timeout of one or two seconds."""
        ...

    async def arrived(self, to: str | None = None) -> Sequence[Message]:
        """Return all messages that a consumer has got so far at an address, the default address for None.

        The consumer has to be there from the start. The messages are decoded, in the order in which they came; for a broker
        with partitions, in any order that keeps the order of each partition.
        """
        ...

    def outage(self) -> AbstractAsyncContextManager[object] | None:
        """Return a context manager that takes the broker away when entered, and brings it back when left.

        None if the broker can't go away. The checks leave it without an error whatever they find; only if a check is
        cancelled is it left with an error.
        """
        ...

    def freeze(self) -> AbstractAsyncContextManager[object] | None:
        """Return a context manager in which the broker does not answer, as after a SIGSTOP; None if that can't happen.

        Connections stay open, and the broker may carry out afterwards what it is sent meanwhile.
        """
        ...


def message(number: int = 0, *, kind: str = "notification", to: str | None = None, **payload: Any) -> Message:
    """Return a message as the bridge makes it, with the number as ``n`` in its payload, and one of five keys."""
    event_id = str(uuid4())
    values = {"event_id": event_id, "event_timestamp": "2026-03-07T09:26:02.588855Z", "n": number} | payload
    headers = {"publication": new_publication(), "version": "1", "key": f"k{number % KEYS}"}
    return Message(f"{kind}_event", "conformance.checked", event_id, values, headers, to, "Checked")


def require(promise: bool, text: str) -> None:
    """Raise AssertionError with this text if ``promise`` is false."""
    if not promise:
        raise AssertionError(text)


def get_promises(rig: Rig) -> Promises:
    """Return the promises that the publisher declares; if it declares none, all of them."""
    promises: Promises = getattr(rig.publisher, "promises", Promises())
    return promises


async def publish(rig: Rig, *messages: Message) -> None:
    """Publish messages while nothing is wrong, so that the call has to succeed."""
    error = await get_outcome(rig.publisher.publish(*messages))
    require(error is None, f"a publish of {len(messages)} messages failed, with nothing amiss: {error!r}")


async def get_outcome(publishing: Awaitable[None], *, unsent: type[Exception] = PublishError) -> PublishError | None:
    """Return the error of a publish; None if the broker has the messages.

    Args:
        publishing: The call.
        unsent: Another class of errors which mean that nothing was sent. They are returned as BrokerUnavailable, as are the
            errors of an outbox, such as OutboxFull.

    Raises:
        AssertionError: the publish raised an error that a publisher must not raise, or did not answer.
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
        require(not limit.expired(), f"a publish did not answer within {PATIENCE:g} s")
        raise AssertionError(
            f"a publish raised {error!r}, and not BrokerUnavailable, DeliveryUnknown or MessageRefused"
        ) from error
    return None


async def gather_all(awaitables: Iterable[Awaitable[None]]) -> None:
    """Await all at once, to the last of them; then raise the first error, if any failed."""
    for end in await asyncio.gather(*awaitables, return_exceptions=True):
        if end is not None:
            raise end


async def wait_for_all(rig: Rig, numbers: Iterable[int], to: str | None = None) -> Sequence[Message]:
    """Wait until the messages with these numbers have arrived; return all that arrived."""
    wanted = set(numbers)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PATIENCE
    while True:
        got = await rig.arrived(to)
        if not (missing := wanted - {each.payload.get("n") for each in got}):
            return got
        lost = f"lost {len(missing)} of {len(wanted)} messages without an error: {sorted(missing)[:10]}"
        require(loop.time() <= deadline, lost)
        await asyncio.sleep(0.02)


async def wait_for_exactly(rig: Rig, sure: Iterable[int], possible: Iterable[int] | None = None) -> Sequence[Message]:
    """Wait until everything has arrived, and return it: each message once, and no others than these.

    Args:
        rig: With the publisher.
        sure: Numbers of messages that have to arrive.
        possible: Numbers of messages that may arrive.
    """
    wanted = set(sure)
    allowed = wanted if possible is None else wanted.union(possible)
    last = range(10_000, 10_000 + KEYS)  # a last message for each key
    await publish(rig, *map(message, last))
    arrived = await wait_for_all(rig, wanted.union(last))
    got = [each for each in arrived if each.payload.get("n") not in last]
    counts: Counter[Any] = Counter(each.payload.get("n") for each in got)
    require(counts.keys() <= allowed, f"arrived, though not sent or refused: {sorted(counts.keys() - allowed)[:10]}")
    twice = sorted(number for number, count in counts.items() if count > 1)
    require(not twice, f"arrived more than once: {twice[:10]}")
    return got


def check_order(rig: Rig, got: Sequence[Message], numbers: Collection[int]) -> None:
    """Check that the messages with these numbers came in the order that the publisher promises."""
    order = get_promises(rig).order
    if order == "none":
        return
    came = [number for each in got if (number := each.payload["n"]) in numbers]
    for key in range(KEYS) if order == "key" else [None]:
        of_key = [number for number in came if key is None or number % KEYS == key]
        require(of_key == sorted(of_key), f"out of order: {of_key[:30]}")
