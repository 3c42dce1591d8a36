"""The event: the envelope that listeners receive, its three kinds, and the marks that a dispatch sets on it.

An event is any object that carries a host's data. ``silbo.Event`` adds no field, no slot, no metaclass and no
``__init__``, so dataclasses, attrs classes, msgspec Structs and pydantic models can derive from it, frozen or not. A
dispatch sets *marks* (``name``, ``dispatcher``, ``propagation_stopped``, ``origin``) in the instance's ``__dict__``, past
any freeze.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from inspect import getattr_static
from time import time_ns
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, NamedTuple, TypeVar, overload
from uuid import UUID
from weakref import WeakSet

from silbo._whistle import WhistleEvent
from silbo.errors import EnvelopeConflict, NotAnEvent
from silbo.message import check_header

if TYPE_CHECKING:
    from silbo.message import Origin

__all__ = [
    "ENVELOPE",
    "DomainEvent",
    "ECSTEvent",
    "Event",
    "NotificationEvent",
    "Refusal",
    "begin_dispatch",
    "check_fields",
    "collected_errors",
    "declared_fields",
    "end_dispatch",
    "find_id_maker",
    "find_time_writer",
    "kind_of",
    "new_id",
    "pass_class_keywords",
    "prepare_event",
    "set_header",
    "set_mark",
]

Kind = Literal["domain", "notification", "ecst"]
"""The kinds of event: domain events stay in the process, notification and ECST events leave it."""
ENVELOPE: Final = frozenset({"name", "dispatcher", "propagation_stopped", "origin", "refusal"})
"""The attributes that belong to the envelope; a payload field can't have one of these names."""

_T = TypeVar("_T")

_DATACLASS_OPTIONS: Final = inspect.signature(dataclass).parameters.keys() - {"cls"}


def pass_class_keywords(cls: type, keywords: Mapping[str, Any], init_subclass: Callable[..., object]) -> None:
    """Call the next ``__init_subclass__`` with the keywords of a class statement.

    Raises:
        TypeError: no base class takes the keywords. For those of a dataclass, which python-cqrs takes as in
            ``class UserJoined(DomainEvent, frozen=True)``, the text says to use the decorator.
    """
    try:
        init_subclass(**keywords)
    except TypeError:
        if keywords.keys().isdisjoint(_DATACLASS_OPTIONS):
            raise
        given = ", ".join(f"{name}={value!r}" for name, value in keywords.items())
        raise TypeError(f"{cls.__qualname__} takes no class keywords: put @dataclass({given}) above it") from None


@dataclass(frozen=True, slots=True, eq=False)
class Refusal:
    """The reason why a policy has stopped an event; ``propagation_stopped`` is then this object.

    Attributes:
        plugin: The plugin that failed, or that is switched off; None for a listener of the host.
        listener: The listener that failed, or that was left out.
        error: The error: of the listener, a ListenerTimeout, or a PluginOff.
    """

    plugin: str | None
    listener: object
    error: Exception

    def __str__(self) -> str:
        try:
            text = str(self.error)
        except Exception:  # noqa: BLE001  # a plugin's error class may fail in __str__
            text = "(it has no text)"
        cause = f"{type(self.error).__name__}: {text}"
        return cause if self.plugin is None else f"plugin {self.plugin!r}: {cause}"


class _RefusalOf:
    """The attribute ``refusal`` of an event: without a value of its own, so that no dispatch has to reset it."""

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return None
        stopped = instance.propagation_stopped
        return stopped if isinstance(stopped, Refusal) else None


DISPATCHED: Final = "dispatched"
"""The phase of an event during its dispatch."""
UNTIMED: Final = "untimed"
"""The phase of an event that leaves before its first dispatch, which sets its time."""
LIMITED: Final = "limited"
"""The phase of an event whose next dispatch is not to be a direct one: its listeners have a time limit."""


def _read_stopped(event: Any) -> Any:
    return getattr(event, "__silbo_stopped__", False)


def _write_stopped(event: Any, stopped: object) -> None:
    set_mark(event, "propagation_stopped", stopped)


class Event(WhistleEvent):
    """A plain event: it stays in the process unless a :class:`~silbo.Route` gives it a kind.

    Attributes:
        name: The name of the last dispatch.
        dispatcher: The dispatcher of the last dispatch.
        propagation_stopped: True if a listener has stopped the last dispatch; the next dispatch sets it to False.
        origin: The app and instance that sent the event, if a consumer dispatched it; else None.
        refusal: The reason why the policy of the name has stopped the last dispatch; else None.

    The same object may be dispatched again, also from inside its own dispatch; a refusal there stops the outer dispatch, too. Two *concurrent* dispatches of one object are
    unsupported: they would overwrite each other's marks.
    """

    if TYPE_CHECKING:
        origin: Origin | None
        refusal: Refusal | None
        __silbo_direct__: type[Event] | None
        __silbo_phase__: str | None
        __silbo_stopped__: object
        __silbo_time__: int
        __silbo_errors__: list[Exception] | None
        __silbo_headers__: dict[str, str] | None
    else:  # no annotations at run time: pydantic would make fields of them
        origin = None
        refusal = _RefusalOf()
        # CPython reads and writes an attribute of an object slowly if the class has one of that name, too. So the marks that a
        # dispatch writes for itself are attributes that no class has: __silbo_stopped__ and __silbo_phase__ (None or absent
        # outside of a dispatch). A dispatch takes 30 to 40 % less on 3.11 for 1 listener, 25 % less on 3.13 for 10.
        propagation_stopped = property(_read_stopped, _write_stopped)
        __silbo_direct__ = None  # the class itself, if assignment sets a mark as writing into __dict__ does
        __silbo_headers__ = None  # the headers that were set on the event
        __silbo_errors__ = None  # the errors collected so far, during a dispatch that may collect

        def __init_subclass__(cls, **keywords):
            pass_class_keywords(cls, keywords, super().__init_subclass__)

    def stop_propagation(self) -> None:
        """End this dispatch after the running listener."""
        # A concurrent listener may have failed: its Refusal stays.
        if _is_direct(self):
            if not getattr(self, "__silbo_stopped__", False):
                self.__silbo_stopped__ = True
        elif not self.propagation_stopped:
            set_mark(self, "propagation_stopped", True)


class DomainEvent(Event):
    """A fact of the domain; it never leaves the process."""

    __silbo_kind__ = "domain"


class _OnFirstRead(Generic[_T]):
    """An attribute whose value is made at the first read and kept in the instance's ``__dict__``.

    It is a non-data descriptor, so that a class may declare a field of the same name.
    """

    def __init__(self, make: Callable[[], _T], doc: str) -> None:
        self._make = make
        self.__doc__ = doc

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> _OnFirstRead[_T]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> _T: ...
    def __get__(self, instance: object | None, owner: type) -> _OnFirstRead[_T] | _T:
        if instance is None:
            return self
        value: _T = instance.__dict__.setdefault(self._name, self._make())
        return value


IDS_AT_ONCE: Final = 256
"""The ids that are made of one read of random bytes."""
_TAIL: Final = 23
"""The characters of a UUID's text behind its time: ``-7c4e-8f14-46d3a8aa17b3``."""
_HEX_DIGITS: Final = [place for place in range(_TAIL) if place not in (0, 5, 10)]
"""The places of the hexadecimal digits in this text."""
_VARIANT: Final = bytes.maketrans(b"0123456789abcdef", b"89ab" * 4)
"""The digit of a UUID that holds its variant, for each random digit."""
_spare_tails: list[str] = []
os.register_at_fork(after_in_child=_spare_tails.clear)  # or parent and child would give the same ids
_last_time = 0, ""  # the last millisecond of an id, and the text for it
_last_second = 0, "1970-01-01T00:00:00"  # the last second of a time, and the text for it


def new_id() -> str:
    """Return a version 7 UUID as text: it begins with the time, which leads ``silbo why`` to the event's place in a stream."""
    global _last_time
    now = time_ns() // 1_000_000
    at, text = _last_time
    if now != at:
        digits = f"{now:012x}"
        text = f"{digits[:8]}-{digits[8:]}"
        _last_time = now, text
    try:
        return text + _spare_tails.pop()
    except IndexError:
        return text + _make_tails()


def _make_tails() -> str:
    """Return the random end of an id, and make more for the next ids.

    Many are made at a time, digit by digit for all of them: a tenth of the time of one read of ``os.urandom`` for each.
    """
    digits = os.urandom(10 * IDS_AT_ONCE).hex().encode()
    texts = bytearray(b"-" * _TAIL * IDS_AT_ONCE)
    for number, place in enumerate(_HEX_DIGITS):
        texts[place::_TAIL] = digits[number::20]
    texts[1::_TAIL] = b"7" * IDS_AT_ONCE
    texts[6::_TAIL] = texts[6::_TAIL].translate(_VARIANT)
    text = texts.decode()
    tails = [text[start : start + _TAIL] for start in range(0, len(text), _TAIL)]
    last = tails.pop()  # not from the list of all threads, which another one may have emptied
    _spare_tails.extend(tails)
    return last


class _EventTime(_OnFirstRead[datetime]):
    """The time of an event. Its first dispatch only notes the clock; the datetime is made at the first read."""

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is not None and (clock := getattr(instance, "__silbo_time__", None)) is not None:
            return instance.__dict__.setdefault(self._name, datetime.fromtimestamp(clock // 1000 / 1_000_000, UTC))
        return super().__get__(instance, owner)

    def text(self, event: Any) -> str | None:
        """Return the time of an event as ISO 8601 text in UTC; None if it has been read as a datetime, or was set.

        No datetime is made: a small event becomes a message in 11 % less time.
        """
        global _last_second
        marks = event.__dict__
        clock: int | None = marks.get("__silbo_time__")
        if clock is None or self._name in marks:
            return None
        second, microsecond = divmod(clock // 1000, 1_000_000)
        at, text = _last_second
        if second != at:
            text = datetime.fromtimestamp(second, UTC).isoformat()[:19]
            _last_second = second, text
        return f"{text}.{microsecond:06d}Z" if microsecond else f"{text}Z"


class _EventId(_OnFirstRead[UUID]):
    """The id of an event. Its text is made first, the UUID at the first read: most ids are only sent."""

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is not None and (text := instance.__dict__.get("__silbo_id__")) is not None:
            return instance.__dict__.setdefault(self._name, UUID(text))
        return super().__get__(instance, owner)

    def text(self, event: Any) -> str | None:
        """Return the id of an event as text; None if the id has been read as a UUID, or was set."""
        marks = event.__dict__
        if self._name in marks:
            return None
        text: str | None = marks.get("__silbo_id__")
        if text is None:
            text = new_id()
            marks["__silbo_id__"] = text
        return text


class _Outward(Event):
    """The base of the events that leave: each has an id that names the fact, and a time."""

    if TYPE_CHECKING:
        event_id: UUID
        event_timestamp: datetime
    else:
        __silbo_phase__ = UNTIMED
        event_id = _EventId(lambda: UUID(new_id()), "The id of the fact; the same event sent twice has it twice.")
        event_timestamp = _EventTime(lambda: datetime.now(UTC), "The time of the fact: aware, UTC.")


class NotificationEvent(_Outward):
    """An event that tells the outside that something happened, by identifiers.

    Attributes:
        event_id: The id of the fact; made at the first read, or when the event is sent.
        event_timestamp: The time of the fact, aware, UTC; set at the latest when the first dispatch starts.
    """

    __silbo_kind__ = "notification"


class ECSTEvent(_Outward):
    """An event that carries the new state to the outside (event-carried state transfer).

    Attributes:
        event_id: The id of the fact; made at the first read, or when the event is sent.
        event_timestamp: The time of the fact, aware, UTC; set at the latest when the first dispatch starts.
    """

    __silbo_kind__ = "ecst"


# -- classes of events --------------------------------------------------------------------------------------


def kind_of(cls: type) -> Kind | None:
    """Return the kind of an event class; None for plain events and foreign classes."""
    kind: Kind | None = getattr(cls, "__silbo_kind__", None)
    return kind


def find_id_maker(cls: type) -> Callable[[Any], str | None] | None:
    """Return the function that makes the ids of a class's events as text; None if the class declares its own ``event_id``.

    The function takes an event. It returns None if the id has been read as a UUID, or was set.
    """
    own = getattr_static(cls, "event_id", None)
    return own.text if isinstance(own, _EventId) else None


def find_time_writer(cls: type) -> Callable[[Any], str | None] | None:
    """Return the function that gives the times of a class's events as text; None if the class declares its own.

    The function takes an event. It returns None if the time has been read as a datetime, or was set.
    """
    own = getattr_static(cls, "event_timestamp", None)
    return own.text if isinstance(own, _EventTime) else None


def declared_fields(cls: type) -> tuple[str, ...] | None:
    """Return the fields that a dataclass, attrs class, Struct or pydantic model declares; None for a plain class.

    Each library is recognised by the attributes that it sets on its classes, so it need not be installed.
    """
    if (fields := getattr(cls, "__struct_fields__", None)) is not None:
        return tuple(fields)
    if (fields := getattr(cls, "__pydantic_fields__", None)) is not None:
        return tuple(fields)
    if (fields := getattr(cls, "__attrs_attrs__", None)) is not None:
        return tuple(field.name for field in fields)
    if dataclasses.is_dataclass(cls):
        return tuple(field.name for field in dataclasses.fields(cls))
    return None


# -- the marks of a dispatch --------------------------------------------------------------------------------

_foreign_errors: dict[int, list[Exception]] = {}
"""The errors collected so far, by ``id(event)``, of foreign events in a dispatch; silbo's carry ``__silbo_errors__``."""

_prepared: WeakSet[type] = WeakSet()
"""The classes whose fields :func:`prepare_event` has checked."""


class _Marks(NamedTuple):
    """The marks of an outer dispatch, kept while the same event is in an inner dispatch.

    Attributes:
        errors: The errors that the outer dispatch has collected; None if it can't collect any.
    """

    name: Any
    dispatcher: object
    stopped: bool | Refusal
    errors: list[Exception] | None


def prepare_event(event: Any) -> None:
    """Check the class of an event before a dispatch, once for each class, and set the time of an event that leaves.

    Raises:
        EnvelopeConflict: the class declares a payload field under one of the envelope's names.
        TypeError: it is an event class, not an event.
    """
    cls = type(event)
    if getattr(cls, "__silbo_direct__", None) is not cls:
        if issubclass(cls, type) and issubclass(event, Event):
            raise TypeError(f"{event.__qualname__} is a class; dispatch an object of it: {event.__qualname__}(...)")
        if cls not in _prepared:
            check_fields(cls)
            _prepared.add(cls)
            if issubclass(cls, Event) and cls.__setattr__ is object.__setattr__ and _takes_assignment(cls):
                cls.__silbo_direct__ = cls
    if isinstance(event, _Outward) and event.__dict__.get("__silbo_time__") is None:
        set_mark(event, "__silbo_time__", time_ns())  # the id may be made later: nobody can tell when it was made


def check_fields(cls: type) -> None:
    """Refuse an event class whose payload a dispatch would overwrite.

    Raises:
        EnvelopeConflict: it declares a payload field under one of the envelope's names.
    """
    # A foreign class with an envelope of its own (Whistle's IEvent) declares those names on purpose.
    if issubclass(cls, WhistleEvent) or not hasattr(cls, "stop_propagation"):
        for field in declared_fields(cls) or ():
            if field in ENVELOPE:
                raise EnvelopeConflict(cls, field)


def _takes_assignment(cls: type) -> bool:
    """Return True if ``event.name = ...`` has the same effect as writing into ``__dict__``: nothing of the host's is in the way."""
    others = ENVELOPE - {"propagation_stopped"}
    return (
        getattr_static(cls, "propagation_stopped") is Event.propagation_stopped
        and not any(hasattr(type(getattr_static(cls, mark)), "__set__") for mark in others)
        and not hasattr(cls, "__getattr__")  # it would be asked for marks that are not there yet
        and getattr_static(cls, "__getattribute__") is object.__getattribute__
    )


def begin_dispatch(event: Any, name: Hashable, dispatcher: object) -> _Marks | None:
    """Set the marks of a dispatch that begins.

    Returns:
        The marks of the dispatch around this one, for :func:`end_dispatch`; None for an outermost dispatch.

    Raises:
        NotAnEvent: a foreign object that accepts no attribute.
    """
    errors = collected_errors(event)
    outer = None
    if errors is not None or (isinstance(event, Event) and _phase(event) is DISPATCHED):
        outer = _Marks(event.name, event.dispatcher, event.propagation_stopped, errors)
    if isinstance(event, Event) and _is_direct(event):  # with set_mark it takes five times as long
        event.name = name
        event.dispatcher = dispatcher
        event.__silbo_stopped__ = False
        event.__silbo_errors__ = []
        event.__silbo_phase__ = DISPATCHED
    else:
        _set_marks(event, name, dispatcher, stopped=False)
        _set_errors(event, [], is_dispatched=True)
    return outer


def end_dispatch(event: Any, outer: _Marks | None) -> None:
    """Set the marks of the dispatch around the ended one; after an outermost dispatch the event keeps its marks.

    A refusal of the ended one stays: without it, the event would look as if it had been allowed.
    """
    if outer is None:
        _set_errors(event, None, is_dispatched=False)
        return
    _set_errors(event, outer.errors, is_dispatched=True)
    inner = event.propagation_stopped
    stopped = inner if isinstance(inner, Refusal) else outer.stopped
    _set_marks(event, outer.name, outer.dispatcher, stopped=stopped)


def collected_errors(event: Any) -> list[Exception] | None:
    """Return the list of errors that the running dispatch of an event has collected, for listeners to append to.

    None if the event is in no dispatch, or in one whose listeners all raise or keep their errors.
    """
    return event.__silbo_errors__ if isinstance(event, Event) else _foreign_errors.get(id(event))


def set_mark(event: Any, mark: str, value: object) -> None:
    """Set one mark: on a silbo event past any freeze, on a foreign event by assignment, or past the freeze if that fails.

    Raises:
        NotAnEvent: a foreign object that accepts no attribute.
    """
    if isinstance(event, Event):
        if mark == "propagation_stopped" and type(event).propagation_stopped is Event.propagation_stopped:
            mark = "__silbo_stopped__"
        if _is_direct(event):
            setattr(event, mark, value)  # CPython reads attributes slower once somebody has asked for __dict__
        else:
            event.__dict__[mark] = value
        return
    try:
        setattr(event, mark, value)
    except Exception:  # noqa: BLE001  # frozen classes raise errors of their own kinds
        if not hasattr(event, "__dict__"):
            raise NotAnEvent(type(event)) from None
        event.__dict__[mark] = value


def set_header(event: Any, name: str, value: str) -> None:
    """Set a header of the messages that bridges make of an event, as in ``set_header(event, "tenant", "acme")``.

    It stays on the event, for this dispatch and later ones, and takes the place of the header of that name that a
    :class:`~silbo.Route` or silbo itself gives. CloudEvents carry only names of lower-case letters and digits.

    Args:
        event: An event of any class, before it reaches the bridge.
        name: A text; not ``app``, ``instance``, ``key``, ``publication`` or ``version``, which silbo sets.
        value: A text.

    Raises:
        HeaderInvalid: the name or the value is none of these.
        NotAnEvent: a foreign object that accepts no attribute.
    """
    check_header(name, value)
    headers = getattr(event, "__silbo_headers__", None)
    if type(headers) is not dict:  # a foreign class may have a __getattr__ that has an answer to all
        headers = {}
    set_mark(event, "__silbo_headers__", {**headers, name: value})


def _set_marks(event: Any, name: Hashable, dispatcher: object, *, stopped: bool | Refusal) -> None:
    set_mark(event, "name", name)
    set_mark(event, "dispatcher", dispatcher)
    set_mark(event, "propagation_stopped", stopped)


def _set_errors(event: Any, errors: list[Exception] | None, *, is_dispatched: bool) -> None:
    if isinstance(event, Event):
        set_mark(event, "__silbo_errors__", errors)
        set_mark(event, "__silbo_phase__", DISPATCHED if is_dispatched else None)
    elif errors is not None:
        _foreign_errors[id(event)] = errors
    else:
        _foreign_errors.pop(id(event), None)


def _phase(event: Event) -> str | None:
    if _is_direct(event):
        return getattr(event, "__silbo_phase__", None)
    phase: str | None = event.__dict__.get(
        "__silbo_phase__"
    )  # the class may have a __getattr__ that has an answer to all
    return phase


def _is_direct(event: Event) -> bool:
    return type(event).__silbo_direct__ is type(event)
