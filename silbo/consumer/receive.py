"""A received message as an event: its name, its class, and if it is wanted at all.

:func:`receive` is for a host with a loop of its own around Kafka, FastStream or Service Bus.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from types import SimpleNamespace
from typing import Any, Final, Literal, NamedTuple

from silbo._causes import cause
from silbo._message_observers import Attempt, find_observers, observed
from silbo._whistle import IAsyncEventDispatcher
from silbo.bridge import find_bridges, routing_key
from silbo.dispatch.received_event import Received, dispatch_received
from silbo.errors import MessageInvalid, OwnMessagesUndecided, VersionTooNew
from silbo.event import set_mark
from silbo.message import Delivery, Format, Message, Origin, instance
from silbo.names import MAX_NAME_LENGTH, EventName, Upcast, is_pattern
from silbo.protocols import Subscription
from silbo.wire.decode import check_class, to_event
from silbo.wire.direct import find_reader, read_directly
from silbo.wire.formats import JSON, Envelope, JsonFormat

__all__ = ["EventRebuilder", "Opened", "Own", "RebuiltEvent", "check_own", "make_attempt", "open_delivery", "receive"]

SMALL: Final = 16_384
"""Bytes of a message up to which it is kept decoded in the queue. A larger one is decoded again for its first attempt."""

Opened = Message | Envelope
"""A received message, whose payload may not be decoded yet."""

Own = Literal["skip", "handle"]
"""A decision on messages of the program's own app."""


def check_own(own: object) -> None:
    """Refuse an ``own`` that is neither a decision nor None.

    Raises:
        ValueError: with what to write instead.
    """
    if own not in ("skip", "handle", None):
        raise ValueError(f'own is "skip", "handle" or None, not {own!r}')


def open_delivery(delivery: Delivery) -> Opened:
    """Decode a delivery as far as its format can without its payload.

    Raises:
        MessageInvalid: it is not a valid message; in an envelope the payload may still be malformed.
    """
    form = delivery.format
    return form.open(delivery.raw) if type(form) is JsonFormat else delivery.message()


class RebuiltEvent(NamedTuple):
    """An event that was rebuilt from a message, and the name to dispatch it under."""

    name: Any
    event: Any
    message: Opened


class Direct(NamedTuple):
    """A name whose events are made of bytes directly.

    Attributes:
        name: The name to dispatch under.
        read: Makes an event of a payload's bytes; None if the long way has to.
        takes_key: True if a message without a key may have one all the same: see :meth:`EventRebuilder.routing_key`.
    """

    name: EventName[Any]
    read: Callable[[bytes], Any]
    takes_key: bool


class EventRebuilder:
    """Rebuilds events from deliveries.

    Args:
        events: The names that have a class.
        app: The consuming program's name.
        own: The decision on messages of its own app; None handles them.

    Raises:
        TypeError: one of the events is no EventName.
        ClassUnreadable: events of one of the classes can't be rebuilt.
        ValueError: one version of one comes twice, with different classes or upcasts.
    """

    def __init__(self, events: Iterable[EventName[Any]], *, app: str, own: Own | None) -> None:
        given: object = events
        if isinstance(given, str):
            raise TypeError(f"events is a list of EventName constants: [{given!r}]")
        self._app = app
        self._own = own
        self._by_name: dict[str, EventName[Any]] = {}  # the newest version of each
        self._versions: dict[
            str, _KnownVersions
        ] = {}  # of names with several, or from which older ones were looked for
        self._by_class: dict[str, EventName[Any]] = {}
        self._direct: dict[str, Direct | None] = {}  # by name, of those in events
        for name in events:
            if not isinstance(name, EventName):
                raise TypeError(
                    f"events takes EventName constants, not {name!r}: they say which class a name's events are; "
                    "without one an event arrives with its payload, and needs no mention here"
                )
            same = self._by_name.setdefault(str(name), name)
            if same is not name:
                self._find_versions(str(name)).add(name)
                if name.version > same.version:
                    self._by_name[str(name)] = name
            if name.cls is not None:
                check_class(name.cls)
                same = self._by_class.setdefault(name.cls.__name__, name)
                if same is not name and str(same) == str(name) and same.version < name.version:
                    self._by_class[name.cls.__name__] = name

    @property
    def names(self) -> Collection[EventName[Any]]:
        """The names that have a class, in all their versions."""
        return [
            name
            for text, newest in self._by_name.items()
            for name in (self._versions[text].names if text in self._versions else (newest,))
        ]

    def rebuild(
        self, delivery: Delivery, message: Opened | None = None, *, skips_own_instance: bool
    ) -> RebuiltEvent | None:
        """Return the event to dispatch, a new one at each call; None for an unwanted message of this program's own.

        Args:
            delivery: As it was received.
            message: The delivery's message, if it is opened already and no listener has had its payload.
            skips_own_instance: Messages of this very process are unwanted, whatever ``own`` says.

        Raises:
            MessageInvalid: the delivery is not a message, or does not fit the event's class.
            VersionTooNew: the message is of a newer version than the names of ``events``.
            Exception: whatever a class of the host's raises when an event is made of it.
        """
        message = message or open_delivery(delivery)
        # The event came from outside, even if the message has no origin.
        origin = message.origin or Origin("", "", message.version)
        if origin.app == self._app and self.is_unwanted(origin, skips_own_instance=skips_own_instance):
            return None
        name, cls, steps = self._resolve(message, delivery.format.names, origin.version)
        if delivery.format.names == "class" and cls is not None:  # the class says which version it is
            origin = Origin(origin.app, origin.instance, name.version)
        try:
            event = _make_event(delivery, message, cls, steps)
        except MessageInvalid as error:
            if cls is None or steps or origin.version == name.version:
                raise
            problem = (
                f"{error.problem} (the message has version {origin.version}, and {cls.__qualname__} is version "
                f"{name.version} without an upcast)"
            )
            raise MessageInvalid(problem, field=error.field) from error.__cause__
        if delivery.epoch is not None:
            origin.epoch = delivery.epoch
        set_mark(event, "origin", origin)
        return RebuiltEvent(name, event, message)

    def find_direct(self, name: str) -> Direct | None:
        """Return the direct way for messages of a name in version 1; None if there is none."""
        try:
            return self._direct[name]
        except KeyError:
            known = self._by_name.get(name)
            if known is None:
                return None
        read = find_reader(known.cls) if known.cls is not None and known.version == 1 else None
        direct = None if read is None else Direct(known, read, known.key is not None)
        self._direct[name] = direct
        return direct

    def examine(
        self, delivery: Delivery, *, skips_own_instance: bool
    ) -> tuple[Opened | None, str | None, VersionTooNew | None]:
        """Return the opened message, its routing key, and the error if it is of a newer version than ``events`` has.

        The message is None if it is malformed, which is told when the delivery is attempted, or if it is large.
        """
        try:
            message = open_delivery(delivery)
            too_new = None
            if message.headers.get("version", "1") != "1":  # everybody knows version 1
                too_new = self.find_too_new(delivery, message, skips_own_instance=skips_own_instance)
                if too_new is not None:
                    _ = delivery.message()  # a malformed payload is no better elsewhere
        except MessageInvalid:
            return None, None, None
        key = self.routing_key(delivery, message)
        return message if len(delivery.raw) <= SMALL else None, key, too_new

    def find_too_new(self, delivery: Delivery, message: Opened, *, skips_own_instance: bool) -> VersionTooNew | None:
        """Return the error that :meth:`rebuild` raises for a message of a newer version than ``events`` has; else None.

        Raises:
            MessageInvalid: the message's version is none.
        """
        version = message.version
        if version == 1 or delivery.format.names == "class":
            return None
        newest = self._by_name.get(message.message_name)
        if newest is None or version <= newest.version:
            return None
        if self.is_unwanted(message.origin or Origin("", ""), skips_own_instance=skips_own_instance):
            return None
        return VersionTooNew(message.message_name, version, newest.version)

    def is_unwanted(self, origin: Origin, *, skips_own_instance: bool) -> bool:
        """Return True if a message is this program's own, and not to be handled."""
        return origin.app == self._app and (
            self._own == "skip" or (skips_own_instance and origin.instance == instance())
        )

    def routing_key(self, delivery: Delivery, message: Opened) -> str | None:
        """Return the message's routing key, or else the key that its name gives it here.

        A publisher that writes the name as a plain string sends no key, and its events have to keep their order all the
        same. The text is the one that a publisher with the constant sends, so that both have the same order.
        """
        if message.key is not None or not self._by_name:
            return message.key
        try:
            name, cls, steps = self._resolve(message, delivery.format.names, message.version)
            if not isinstance(name, EventName) or name.key is None:
                return None
            event = _make_event(delivery, message, cls, steps)
            # Without a class the key is looked up in the payload.
            return routing_key(event if cls else SimpleNamespace(**event.payload), str(name), name.key)
        except Exception:  # noqa: BLE001  # of the message or the host's class: reported when the delivery is attempted
            return None

    def _find_versions(self, name: str) -> _KnownVersions:
        known = self._versions.get(name)
        if known is None:
            known = self._versions[name] = _KnownVersions()
            known.add(self._by_name[name])
        return known

    def _resolve(
        self, message: Opened, names: Literal["event", "class"], version: int
    ) -> tuple[Any, type | None, Sequence[tuple[int, Upcast]]]:
        """Return the name to dispatch under, the class, and the upcast functions that older payloads pass through."""
        if names == "class":
            name = self._by_class.get(message.message_name)
            if name is not None:
                return name, name.cls, ()
        elif (name := self._by_name.get(message.message_name)) is not None:
            if name.version == version:
                return name, name.cls, ()
            name, steps = self._find_versions(message.message_name).find(version)
            return name, name.cls, steps
        if is_pattern(message.message_name):
            raise MessageInvalid("a name with '*' can't be dispatched", field="message_name")
        if len(message.message_name) > MAX_NAME_LENGTH:  # from a format of the host's own: silbo's refuse it
            raise MessageInvalid(
                f"{len(message.message_name)} characters, more than {MAX_NAME_LENGTH}", field="message_name"
            )
        return message.message_name, None, ()


def _make_event(delivery: Delivery, message: Opened, cls: type | None, steps: Sequence[tuple[int, Upcast]]) -> Any:
    """Return a new event made of a delivery.

    Raises:
        MessageInvalid: its payload is malformed, or does not fit the class.
    """
    if isinstance(message, Envelope):
        if cls is not None and not steps and (event := read_directly(message.payload, cls)) is not None:
            return event
        message = JSON.complete(message, delivery.raw)
    return to_event(message, cls, steps)


class _KnownVersions:
    """The versions of one event name that ``events=`` has.

    Attributes:
        newest: The highest of them.
    """

    def __init__(self) -> None:
        self.newest = 0
        self._by_version: dict[int, EventName[Any]] = {}
        self._found: dict[int, tuple[EventName[Any], Sequence[tuple[int, Upcast]]]] = {}

    def add(self, name: EventName[Any]) -> None:
        """Add a version.

        Raises:
            ValueError: it is there already, with another class or upcast.
        """
        same = self._by_version.setdefault(name.version, name)
        for what, one, other in (("classes", same.cls, name.cls), ("upcasts", same.upcast, name.upcast)):
            if one != other:
                raise ValueError(
                    f"events has version {name.version} of {str(name)!r} twice, with different {what}; give each payload "
                    "a version of its own"
                )
        self.newest = max(self.newest, name.version)
        self._found = {version: (known, ()) for version, known in self._by_version.items()}

    @property
    def names(self) -> Collection[EventName[Any]]:
        """The names, one for each version."""
        return self._by_version.values()

    def find(self, version: int) -> tuple[EventName[Any], Sequence[tuple[int, Upcast]]]:
        """Return the name whose class events of a version are rebuilt as, and the upcast functions in between.

        That is the name of this version; else the next newer one whose ``upcast`` begins early enough; else the next newer
        one without an ``upcast``.

        Raises:
            VersionTooNew: there is no newer one.
            MessageInvalid: the ``upcast`` of all newer ones begins later.
        """
        found = self._found.get(version)
        if found is not None:
            return found
        newer = [name for known, name in sorted(self._by_version.items()) if known > version]
        if not newer:
            name = self._by_version[self.newest]
            raise VersionTooNew(str(name), version, self.newest)
        for name in newer:
            if version in name.upcast:
                steps = tuple((before, step) for before, step in name.upcast.items() if before >= version)
                return name, steps
        for name in newer:
            if not name.upcast:
                return name, ()
        oldest = min(min(name.upcast) for name in newer)
        raise MessageInvalid(f"version {version} is too old: upcast begins with {oldest}", field="headers.version")


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
        VersionTooNew: the message is of a newer version than ``events`` has. Leave it with the broker: once the newer program
            is deployed, it can handle it.
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
    message = open_delivery(delivery)
    origin = message.origin
    if origin is not None and own != "handle" and _is_own(dispatcher, origin.app, app):
        if own is None:
            raise OwnMessagesUndecided(origin.app)
        return None
    rebuilt = EventRebuilder(events, app="", own="handle").rebuild(delivery, message, skips_own_instance=False)
    if rebuilt is None:
        return None
    dispatched = Received(rebuilt.event, rebuilt.name)
    outer = cause.set(rebuilt.message)
    try:
        if observers := find_observers(dispatcher):
            with observed(observers, "attempt", make_attempt(rebuilt, delivery, delivery.attempt)):
                event = await dispatch_received(dispatcher, dispatched)
        else:
            event = await dispatch_received(dispatcher, dispatched)
    finally:
        cause.reset(outer)
    dispatched.end(done=True)
    return event


def make_attempt(
    rebuilt: RebuiltEvent,
    delivery: Delivery,
    number: int,
    subscription: Subscription | None = None,
    pause: float | None = None,
) -> Attempt:
    """Return the record of an attempt that begins, for observers."""
    return Attempt(
        delivery=delivery,
        name=rebuilt.name,
        message_id=rebuilt.message.message_id,
        headers=rebuilt.message.headers,
        number=number,
        subscription=subscription,
        pause=pause,
    )


def _is_own(dispatcher: IAsyncEventDispatcher, sender: str, app: str | None) -> bool:
    return (
        sender == app if app is not None else any(bridge.publisher.app == sender for bridge in find_bridges(dispatcher))
    )
