"""A received message as an event: under which name, of which class, and whether it is wanted at all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from silbo.codec import to_event
from silbo.errors import MessageInvalid
from silbo.event import write
from silbo.message import Delivery, Message, Origin, instance
from silbo.names import EventName, is_pattern

__all__ = ["Arrival", "Incoming", "Own"]

Own = Literal["skip", "handle"]


class Arrival(NamedTuple):
    """What to dispatch for a delivery, and the message that it was made of."""

    name: Any
    event: Any
    message: Message


class Incoming:
    """Rebuilds events from deliveries.

    Args:
        events: The names that have a class.
        app: The consuming program's own.
        own: Whether messages of its own app are wanted.

    Raises:
        TypeError: one of the events is no EventName.
        ValueError: one comes twice, with different classes.
    """

    def __init__(self, events: Iterable[EventName[Any]], *, app: str, own: Own | None) -> None:
        given: object = events
        if isinstance(given, str):
            raise TypeError(f"events is a list of EventName constants: [{given!r}]")
        self._app, self._own = app, own
        self._by_name: dict[str, EventName[Any]] = {}
        self._by_class: dict[str, EventName[Any]] = {}
        for name in events:
            if not isinstance(name, EventName):
                raise TypeError(
                    f"events takes EventName constants, not {name!r}: they say which class a name's events are; "
                    "without one an event arrives with its payload, and needs no mention here"
                )
            if self._by_name.setdefault(str(name), name).cls is not name.cls:
                raise ValueError(f"events has {str(name)!r} twice, with different classes")
            if name.cls is not None:
                self._by_class.setdefault(name.cls.__name__, name)

    def arrival(
        self, delivery: Delivery, message: Message | None = None, *, skips_own_instance: bool
    ) -> Arrival | None:
        """The event to dispatch, new at each call; None for a message of our own that is not wanted.

        Args:
            delivery: What was received.
            message: It, decoded and not used yet, where that is done already.
            skips_own_instance: Whether messages of this very process are not wanted, whatever ``own`` says.

        Raises:
            Exception: MessageInvalid, or whatever a class of the host's raises when it is built.
        """
        message = message or delivery.message()
        origin = message.origin or Origin("", "")  # it came from outside, even where nothing says whence
        if origin.app == self._app and (self._own == "skip" or (skips_own_instance and origin.instance == instance())):
            return None
        name, cls = self._resolve(message, delivery.format.names)
        event = to_event(message, cls)
        write(event, "origin", origin)
        return Arrival(name, event, message)

    def _resolve(self, message: Message, names: Literal["event", "class"]) -> tuple[Any, type | None]:
        known = self._by_name if names == "event" else self._by_class
        name = known.get(message.message_name)
        if name is not None:
            return name, name.cls
        if is_pattern(message.message_name):
            raise MessageInvalid("a name with '*' can't be dispatched", field="message_name")
        return message.message_name, None
