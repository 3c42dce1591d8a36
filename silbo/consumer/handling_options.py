"""A consumer's options for the handling of deliveries."""

from __future__ import annotations

from dataclasses import dataclass

from silbo._retry import Backoff
from silbo._whistle import IAsyncEventDispatcher
from silbo.consumer.heard_names import HeardNames
from silbo.consumer.receive import EventRebuilder
from silbo.protocols import Inbox, Subscription

__all__ = ["HandlingOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HandlingOptions:
    """A consumer's options for the handling of deliveries.

    Attributes:
        dispatcher: Runs the listeners.
        heard: Tells which names its listeners hear.
        rebuilder: Makes events of deliveries.
        listener_timeout: Seconds that a listener may run that has no limit of its own; None for no limit.
        max_attempts: Counted attempts after which a delivery is given up.
        give_up_on: Errors after which a delivery is given up at once.
        backoff: Delays between two attempts.
        needs_keys: A message that somebody listens to is malformed without a key.
        inbox: Remembers publications; None if they are not remembered.
        subscription: The description of what is received; the inbox remembers publications for its group.
        newer_version_wait: Seconds in which the group's other consumers may take over a message of a version that this one
            does not know.
    """

    dispatcher: IAsyncEventDispatcher
    heard: HeardNames
    rebuilder: EventRebuilder
    listener_timeout: float | None
    max_attempts: int
    give_up_on: tuple[type[Exception], ...]
    backoff: Backoff
    needs_keys: bool
    inbox: Inbox | None
    subscription: Subscription
    newer_version_wait: float
