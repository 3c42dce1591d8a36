"""The event names of an app, as answers: class, key, version and fields of each, and who hears it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from silbo.bridge import Bridge, find_bridges
from silbo.dispatch.dispatcher import AsyncEventDispatcher
from silbo.event import Event, kind_of
from silbo.names import EventName, is_pattern
from silbo.operations.app import App
from silbo.operations.listeners import ListenerInfo, ListenerSearch
from silbo.wire.fields import event_fields
from silbo.wire.hints import find_hints

__all__ = ["FieldInfo", "NameInfo", "find_constants", "find_names", "list_names"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldInfo:
    """A field of an event's payload.

    Attributes:
        name: Its name on the wire.
        type: Its annotation, as text; empty if it has none.
        is_required: True if an event can't be made without it.
    """

    name: str
    type: str
    is_required: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class NameInfo:
    """An event name.

    Attributes:
        name: The name.
        is_declared: True if the dispatcher declares it (``names=``).
        is_consumed: True if a consumer of the app has it in ``events=``.
        cls: The class of its events, as ``shop.events.OrderPaid``; empty if the name has none.
        kind: ``domain``, ``notification`` or ``ecst``; ``plain`` for a class without a kind; empty without a class.
        key: The attribute or function that gives the routing key; empty if there is none.
        version: The version of its payload.
        upcasts: The older versions whose payloads are upcast.
        fields: The fields of the class; empty without a class, or with one that declares none.
        description: For people.
        deprecated: The replacement, as text; empty if the name is not deprecated.
        leaves: True if a bridge sends its events. None if that depends on the event, for the name has no class.
        listeners: The listeners that are meant for it, in running order; not those that hear all names.
        similar: The name that is meant if this one is misspelt, or whose listeners are: see
            :class:`~silbo.operations.listeners.NameListeners`.
    """

    name: str
    is_declared: bool
    is_consumed: bool
    cls: str
    kind: Literal["domain", "notification", "ecst", "plain", ""]
    key: str
    version: int
    upcasts: tuple[int, ...]
    fields: tuple[FieldInfo, ...]
    description: str
    deprecated: str
    leaves: bool | None
    listeners: tuple[ListenerInfo, ...]
    similar: str | None

    @property
    def is_heard(self) -> bool:
        """True if a listener is meant for the name."""
        return bool(self.listeners)

    @property
    def reaches_nobody(self) -> bool:
        """True if no listener is meant for the name, and no bridge sends its events, or they only come in here."""
        return not self.listeners and (self.leaves is False or self.is_consumed)


def list_names(app: App) -> list[NameInfo]:
    """Return the names that the dispatcher declares, that the consumers rebuild, and that have listeners, in this order.

    A name of several versions is there once for each.

    Raises:
        AppInvalid: The app has several dispatchers.
    """
    return list(find_names(app))


def find_names(app: App) -> Iterator[NameInfo]:
    """Yield the names of :func:`list_names` one by one, for a program that has to do something else in between."""
    dispatcher = app.dispatcher
    consumed = {str(name) for consumer in app.consumers for name in consumer.events}
    constants = find_constants(app)
    known = set(map(str, constants))
    heard = [row.name for row in dispatcher.describe() if isinstance(row.name, str) and not is_pattern(row.name)]
    plain = [EventName(name) for name in dict.fromkeys(map(str, heard)) if name not in known]
    search = ListenerSearch(dispatcher)
    has_bridges = any(True for _ in find_bridges(dispatcher))
    for name in (*constants, *plain):
        bridges = _find_bridges_of(name, dispatcher) if has_bridges else []
        yield _to_info(name, search, consumed, bridges)


def find_constants(app: App) -> list[EventName[Any]]:
    """Return the app's EventNames: declared, of the consumers' ``events=``, and those that listeners were registered with."""
    found: dict[tuple[str, int], EventName[Any]] = {}
    sources: Iterable[Iterable[Any]] = (
        *(dispatcher.names for dispatcher in app.dispatchers.values()),
        *(consumer.events for consumer in app.consumers),
        *((row.name for row in dispatcher.describe()) for dispatcher in app.dispatchers.values()),
    )
    for names in sources:
        for name in names:
            if isinstance(name, EventName):
                same = found.setdefault((str(name), name.version), name)
                if same.cls is None and name.cls is not None:
                    found[str(name), name.version] = name
    return list(found.values())


def _find_bridges_of(name: EventName[Any], dispatcher: AsyncEventDispatcher) -> list[Bridge]:
    """Return the bridges that hear a name."""
    owners = (getattr(inspect.unwrap(row.listener), "__self__", None) for row in dispatcher.describe(name))
    return [owner for owner in owners if isinstance(owner, Bridge)]


def _leaves(name: EventName[Any], bridges: Sequence[Bridge]) -> bool | None:
    """Return True if one of the bridges sends the events of a name; None if that depends on their class."""
    if any(bridge.__silbo_sends__(name.cls or Event, name) for bridge in bridges):
        return True
    return None if bridges and name.cls is None else False


def _to_info(name: EventName[Any], search: ListenerSearch, consumed: set[str], bridges: Sequence[Bridge]) -> NameInfo:
    text, cls = str(name), name.cls
    found = search.find(text)
    return NameInfo(
        name=text,
        is_declared=found.is_declared,
        is_consumed=text in consumed,
        cls="" if cls is None else f"{cls.__module__}.{cls.__qualname__}",
        kind="" if cls is None else kind_of(cls) or "plain",
        key=_describe_key(name.key),
        version=name.version,
        upcasts=tuple(sorted(name.upcast)),
        fields=() if cls is None else _find_fields(cls),
        description=name.description,
        deprecated=name.deprecated or "",
        leaves=_leaves(name, bridges),
        listeners=tuple(listener for listener in found.listeners if listener.is_meant),
        similar=found.similar,
    )


def _describe_key(key: Any) -> str:
    if key is None or isinstance(key, str):
        return key or ""
    while isinstance(key, partial):
        key = key.func
    return getattr(key, "__qualname__", type(key).__qualname__)


def _find_fields(cls: type) -> tuple[FieldInfo, ...]:
    """Return the fields of a class that its messages carry, but for the id and the time."""
    try:
        hints = find_hints(cls)
    except TypeError:  # a consumer tells it, where it matters
        hints = {}
    try:
        needed = {
            name
            for name, parameter in inspect.signature(cls).parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        }
    except (TypeError, ValueError):
        needed = set()
    return tuple(
        FieldInfo(name=wire, type=_describe_type(hints.get(attribute)), is_required=bool(needed & {attribute, wire}))
        for attribute, wire in event_fields(cls).payload
    )


def _describe_type(hint: Any) -> str:
    if hint is None:
        return ""
    text = hint.__qualname__ if isinstance(hint, type) else repr(hint)
    return text.replace("typing.", "")
