"""A received message as an event: its name, its class, and if it is wanted at all.

:func:`receive` is for a host with a loop of its own around Kafka, FastStream or Service Bus.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

from silbo._whistle import IAsyncEventDispatcher
from silbo.bridge import find_bridges, routing_key
from silbo.dispatch.received import Received, dispatch_received
from silbo.errors import MessageInvalid, OwnMessagesUndecided
from silbo.event import set_mark
from silbo.message import Delivery, Format, Message, Origin, instance
from silbo.names import MAX_NAME_LENGTH, EventName, is_pattern, is_too_long
from silbo.wire.decode import check_class, to_event
from silbo.wire.formats import JSON

__all__ = ["EventRebuilder", "Own", "RebuiltEvent", "check_own", "receive"]

Own = Literal["skip", "handle"]
"""A decision on messages of the program's own app."""


def check_own(own: object) -> None:
    """Refuse an ``own`` that is neither a decision nor None.

    Raises:
        ValueError: with what to write instead.
    """
    if own not in ("skip", "handle", None):
        raise ValueError(f'own is "skip", "handle" or None, not {own!r}')


class RebuiltEvent(NamedTuple):
    """An event that was rebuilt from a message, and the name to dispatch it under."""

    name: Any
    event: Any
    message: Message


class EventRebuilder:
    """Rebuilds events from deliveries.

    Args:
        events: The names that have a class.
        app: The consuming program's name.
        own: The decision on messages of its own app; None handles them.

    Raises:
        TypeError: one of the events is no EventName.
        ClassUnreadable: events of one of the classes can't be rebuilt.
        ValueError: one comes twice, with different classes.
    """

    def __init__(self, events: Iterable[EventName[Any]], *, app: str, own: Own | None) -> None:
        given: object = events
        if isinstance(given, str):
            raise TypeError(f"events is a list of EventName constants: [{given!r}]")
        self._app = app
        self._own = own
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
                check_class(name.cls)
                self._by_class.setdefault(name.cls.__name__, name)

    @property
    def names(self) -> Collection[EventName[Any]]:
        """The names that have a class."""
        return self._by_name.values()

    def rebuild(
        self, delivery: Delivery, message: Message | None = None, *, skips_own_instance: bool
    ) -> RebuiltEvent | None:
        """Return the event to dispatch, a new one at each call; None for an unwanted message of this program's own.

        Args:
            delivery: As it was received.
            message: The delivery's message, if it is decoded already and no listener has had its payload.
            skips_own_instance: Messages of this very process are unwanted, whatever ``own`` says.

        Raises:
            MessageInvalid: the delivery is not a message, or does not fit the event's class.
            Exception: whatever a class of the host's raises when an event is made of it.
        """
        message = message or delivery.message()
        origin = message.origin or Origin("", "")  # the event came from outside, even if the message has no origin
        if origin.app == self._app and (self._own == "skip" or (skips_own_instance and origin.instance == instance())):
            return None
        name, cls = self._resolve(message, delivery.format.names)
        event = to_event(message, cls)
        set_mark(event, "origin", origin)
        return RebuiltEvent(name, event, message)

    def routing_key(self, delivery: Delivery, message: Message) -> str | None:
        """Return the message's routing key, or else the key that its name gives it here.

        A publisher that writes the name as a plain string sends no key, and its events have to keep their order all the
        same. The text is the one that a publisher with the constant sends, so that both have the same order.
        """
        if message.key is not None or not self._by_name:
            return message.key
        try:
            name, cls = self._resolve(message, delivery.format.names)
            if not isinstance(name, EventName) or name.key is None:
                return None
            event = to_event(message, cls)
            # Without a class the key is looked up in the payload.
            return routing_key(event if cls else SimpleNamespace(**event.payload), str(name), name.key)
        except Exception:  # noqa: BLE001  # of the message or the host's class: reported when the delivery is attempted
            return None

    def _resolve(self, message: Message, names: Literal["event", "class"]) -> tuple[Any, type | None]:
        known = self._by_name if names == "event" else self._by_class
        name = known.get(message.message_name)
        if name is not None:
            return name, name.cls
        if is_pattern(message.message_name):
            raise MessageInvalid("a name with '*' can't be dispatched", field="message_name")
        if is_too_long(message.message_name):  # from a format of the host's own: silbo's refuse it
            raise MessageInvalid(
                f"{len(message.message_name)} characters, more than {MAX_NAME_LENGTH}", field="message_name"
            )
        return message.message_name, None


async def receive(
    dispatcher: IAsyncEventDispatcher,
    raw: bytes | str | None,
    *,
    events: Iterable[EventName[Any]] = (),
    format: Format = JSON,  # noqa: A002  # the word of every broker
    own: Own | None = None,
    app: str | None = None,
) -> Any:
    """Dispatch one message as a consumer would: under its name, rebuilt as its class, with its ``origin``.

    Acknowledge the message when this function returns; leave it with the broker, or park it, when it raises. Nothing is
    retried here. The event is not bridged again.

    Args:
        dispatcher: Any dispatcher of silbo's or Whistle's.
        raw: The message as it came. None, as in a record without a value, is refused with MessageInvalid.
        events: The names whose events are rebuilt as their class. Others arrive as a notification or ECST event whose
            data is its ``payload``.
        format: The format of the bytes.
        own: ``"skip"`` or ``"handle"`` messages of this program's own app, whose listeners have run where they were
            dispatched. Has to be given if such a message can come.
        app: The program's name; by default, the app of each bridge on the dispatcher.

    Returns:
        The event after its dispatch; None for a skipped message of this program's own.

    Raises:
        MessageInvalid: the bytes are not a message, or don't fit the event's class. Not safe to retry: it fails again.
        OwnMessagesUndecided: the message is this program's own, and ``own`` is not given.
        TypeError: ``raw`` is neither bytes nor str, as a dict that another library has decoded already.
        Exception: whatever a listener raised, also one that the dispatcher isolates.
    """
    check_own(own)
    if raw is None:
        raise MessageInvalid("there is nothing in it")
    given: object = raw
    if not isinstance(given, (bytes, bytearray, memoryview, str)):
        raise TypeError(f"raw is the message as it came, bytes or str, not {type(given).__name__}")
    delivery = Delivery(raw.encode() if isinstance(raw, str) else bytes(raw), "", format)
    message = delivery.message()
    origin = message.origin
    if origin is not None and own != "handle" and _is_own(dispatcher, origin.app, app):
        if own is None:
            raise OwnMessagesUndecided(origin.app)
        return None
    rebuilt = EventRebuilder(events, app="", own="handle").rebuild(delivery, message, skips_own_instance=False)
    return None if rebuilt is None else await dispatch_received(dispatcher, rebuilt.name, Received(rebuilt.event))


def _is_own(dispatcher: IAsyncEventDispatcher, sender: str, app: str | None) -> bool:
    return (
        sender == app if app is not None else any(bridge.publisher.app == sender for bridge in find_bridges(dispatcher))
    )
