"""Observers of messages: hooks around a publish, an attempt of a delivery, and a batch of a relay, for traces and metrics.

An observer of a dispatcher has them beside the methods of :class:`~silbo.Observer`, each as it likes: the dispatcher's bridges
and consumers look for them by their names. A relay, which has no dispatcher, is given observers of its own.
"""

from __future__ import annotations

import logging
from asyncio import CancelledError
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal, TypeAlias

from silbo.message import Delivery, Message
from silbo.protocols import Publisher, Subscription

__all__ = [
    "Attempt",
    "Publishing",
    "RelayedBatch",
    "call_observers",
    "find_observers",
    "observe_publish",
    "observed",
]

logger = logging.getLogger(__name__)

Ending: TypeAlias = Literal["running", "completed", "failed", "cancelled"]


@dataclass(slots=True, eq=False, kw_only=True)
class _Observed:
    duration: float = 0.0
    outcome: Ending = "running"
    error: BaseException | None = None


@dataclass(slots=True, eq=False, kw_only=True)
class Publishing(_Observed):
    """One publish of a message by a bridge: the same object for ``before_publish`` and ``after_publish``.

    Attributes:
        name: The dispatched name.
        message: The message. ``before_publish`` may replace it by one with more headers.
        publisher: A broker, or an outbox, which stores the message.
        duration: Seconds; 0 before the end.
        outcome: ``running`` before the end, then ``completed``, ``failed`` or ``cancelled``.
        error: The error that the publisher raised; None if there was none.
    """

    name: object
    message: Message
    publisher: Publisher


@dataclass(slots=True, eq=False, kw_only=True)
class Attempt(_Observed):
    """One attempt of a delivery by a consumer, or by :func:`~silbo.receive`: the same object for ``before_attempt`` and ``after_attempt``.

    Attributes:
        delivery: The delivery, with the number of the attempt as listeners see it.
        name: The name that the event is dispatched under.
        message_id: The id of the message.
        headers: The headers of the message.
        number: The number of the attempt, from 1, as the log and a dead letter count it. A delivery that was given out again
            without an attempt has used up none, so this may be less than the delivery's own.
        subscription: The description of what the consumer receives; None with ``receive``.
        pause: Seconds between the attempt before and this one, if this consumer made both; else None.
        duration: Seconds; 0 before the end.
        outcome: ``running`` before the end, then ``completed``, ``failed`` or ``cancelled``.
        error: The error that failed the attempt; None if there was none.
    """

    delivery: Delivery
    name: object
    message_id: str
    headers: Mapping[str, str]
    number: int
    subscription: Subscription | None
    pause: float | None


@dataclass(slots=True, eq=False, kw_only=True)
class RelayedBatch(_Observed):
    """Stored messages that a relay sends in one go: the same object for ``before_relay`` and ``after_relay``.

    Attributes:
        messages: The messages, in their order.
        publisher: The broker.
        duration: Seconds; 0 before the end.
        outcome: ``running`` before the end, then ``completed``, ``failed`` or ``cancelled``. Completed also if the broker has
            refused some of the messages.
        error: The error that the broker raised; None if there was none.
    """

    messages: Sequence[Message]
    publisher: Publisher


def find_observers(dispatcher: object) -> Sequence[Any]:
    """Return the observers of a dispatcher; none of a foreign one."""
    observers: Sequence[Any] = getattr(dispatcher, "_observers", ())
    return observers


def call_observers(observers: Sequence[Any], hook: str, *arguments: object) -> None:
    """Call a method of each observer that has it. Errors are only logged."""
    for observer in observers:
        method = getattr(observer, hook, None)
        if method is not None:
            try:
                method(*arguments)
            except Exception:
                logger.exception("observer failed", extra={"observer": repr(observer), "hook": hook})


@contextmanager
def observed(observers: Sequence[Any], what: str, record: Publishing | Attempt | RelayedBatch) -> Generator[None]:
    """Call observers around a block, ``before_`` and ``after_`` it, and write into the record how the block ends."""
    call_observers(observers, f"before_{what}", record)
    started = perf_counter()
    try:
        yield
    except CancelledError as error:
        record.outcome = "cancelled"
        record.error = error
        raise
    except BaseException as error:
        record.outcome = "failed"
        record.error = error
        raise
    else:
        record.outcome = "completed"
    finally:
        record.duration = perf_counter() - started
        call_observers(observers, f"after_{what}", record)


async def observe_publish(observers: Sequence[Any], name: object, publisher: Publisher, message: Message) -> None:
    """Publish a message between the hooks of observers."""
    publishing = Publishing(name=name, message=message, publisher=publisher)
    with observed(observers, "publish", publishing):
        await publisher.publish(publishing.message)
