"""A received message as an event: under which name, of which class, and whether it is wanted at all.

:func:`receive` is for a host with a loop of its own around Kafka, FastStream or Service Bus.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

from silbo._whistle import IAsyncEventDispatcher
from silbo.bridge import find_bridges, read_routing_key
from silbo.errors import MessageInvalid, OwnMessagesUndecided
from silbo.event import set_mark
from silbo.message import Delivery, Format, Message, Origin, instance
from silbo.names import EventName, is_pattern
from silbo.wire.decode import to_event
from silbo.wire.formats import JSON

__all__ = ["Arrival", "Incoming", "Own", "receive"]

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
        set_mark(event, "origin", origin)
        return Arrival(name, event, message)

    def key(self, delivery: Delivery, message: Message) -> str | None:
        """The routing key of a message; where it has none, what its name here would give it.

        A publisher that writes the name as a plain string gives none, and its events are to keep their order all the same.
        The text is what a publisher that uses the constant sends, so that both have one order.
        """
        if message.key is not None or not self._by_name:
            return message.key
        try:
            name, cls = self._resolve(message, delivery.format.names)
            if not isinstance(name, EventName) or name.key is None:
                return None
            event = to_event(message, cls)
            # Without a class it is as the payload has it.
            return read_routing_key(event if cls else SimpleNamespace(**event.payload), str(name), name.key)
        except Exception:  # noqa: BLE001  # the message's or the class's own, and told in its turn
            return None

    def _resolve(self, message: Message, names: Literal["event", "class"]) -> tuple[Any, type | None]:
        known = self._by_name if names == "event" else self._by_class
        name = known.get(message.message_name)
        if name is not None:
            return name, name.cls
        if is_pattern(message.message_name):
            raise MessageInvalid("a name with '*' can't be dispatched", field="message_name")
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

    What it raises is the caller's to act on: acknowledge when it returns, leave the message with the broker or park it
    when it raises. It retries nothing. What arrives is not bridged again.

    Args:
        dispatcher: Any dispatcher of silbo's or Whistle's.
        raw: The message as it came. None, a record without a value, is no message.
        events: The names whose events are rebuilt as their class. Others arrive as a notification or ECST event whose
            data is its ``payload``.
        format: Of these bytes.
        own: What to do with messages of this program's own app, whose listeners have run where they were dispatched:
            ``"skip"`` or ``"handle"``. It has to be said where such a message can come.
        app: The program's name; by default, that of each bridge on the dispatcher.

    Returns:
        The event after its dispatch; None for a message of this program's own that is skipped.

    Raises:
        MessageInvalid: the bytes are no message, or don't fit the event's class. It will never get better.
        OwnMessagesUndecided: it is this program's own, and ``own`` is not given.
        TypeError: ``raw`` is something else than bytes or str, as a dict that the library has decoded already.
        Exception: whatever a listener raised.
    """
    if own not in ("skip", "handle", None):
        raise ValueError(f'own is "skip", "handle" or None, not {own!r}')
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
    arrival = Incoming(events, app="", own="handle").arrival(delivery, message, skips_own_instance=False)
    return None if arrival is None else await dispatcher.adispatch(arrival.name, arrival.event)


def _is_own(dispatcher: IAsyncEventDispatcher, sender: str, app: str | None) -> bool:
    return (
        sender == app if app is not None else any(bridge.publisher.app == sender for bridge in find_bridges(dispatcher))
    )
