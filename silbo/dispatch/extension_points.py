"""The extension points of a dispatcher: the names that its host declares, for others to hear and to dispatch."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable, Sequence
from difflib import get_close_matches
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from silbo.dispatch.received_event import received
from silbo.dispatch.source import find_source
from silbo.dispatch.subscribers import Subscribers
from silbo.errors import EventMismatch, EventMissing, NameUnknown, NameUnknownWarning
from silbo.event import Event
from silbo.names import (
    EventName,
    NameUse,
    check_name_or_pattern,
    compile_pattern,
    find_caller,
    is_pattern,
    use_by,
    warn_caller,
    warn_if_deprecated,
)

if TYPE_CHECKING:
    from types import FrameType

    from silbo.dispatch.listeners import ListenerRegistry
    from silbo.dispatch.options import Listener

__all__ = ["ExtensionPoints", "Names", "Unknown", "check_heard_names", "find_use", "make_event"]

Names: TypeAlias = ModuleType | Iterable[EventName[Any] | ModuleType]
"""Declared names: EventName constants, and modules that have some."""

Unknown: TypeAlias = Literal["allow", "warn", "error"]
"""The answer to a name that is not declared."""

_ADDING: Final = ("add_listener", "listen")
"""The methods that add a listener under a name."""
MOST_TOLD: Final = 1024
"""Most names that are warned of. A program may make new names without end, and each warning is remembered."""


class ExtensionPoints:
    """The names that a host declares on its dispatcher.

    Args:
        names: The names.
        unknown: The answer to any other name.
        registry: The listeners of the dispatcher.

    Attributes:
        names: The declared names, in the order of their declaration.
    """

    def __init__(self, names: Names, unknown: Unknown, registry: ListenerRegistry) -> None:
        if unknown not in ("allow", "warn", "error"):
            raise ValueError(f'unknown is "allow", "warn" or "error", not {unknown!r}')
        self.names: Final = _collect(names)
        self._unknown: Final = unknown
        self._registry = registry
        self._by_text: dict[Any, list[EventName[Any]]] = {}
        for name in self.names:
            self._add(name)
        self._classes: dict[Any, tuple[type, ...]] = {
            text: tuple(name.cls for name in same if name.cls is not None) for text, same in self._by_text.items()
        }
        self._told: dict[Hashable, set[str]] = {}  # the plugins that were told of a name

    def _add(self, name: EventName[Any]) -> None:
        same = self._by_text.setdefault(str(name), [])
        for other in same:
            if other.version == name.version and other.cls is not name.cls:
                raise ValueError(
                    f"version {name.version} of {str(name)!r} is declared twice, with different classes: drop one, or give "
                    "each a version of its own"
                )
        same.append(name)

    # -- names ----------------------------------------------------------------------------------------------

    def check_listener(self, name: Any, listener: Any) -> None:
        """Answer a listener for an undeclared name, or for a pattern that matches none; warn if the name is deprecated.

        Raises:
            NameUnknown: The name is undeclared, and that is an error.
            EventMismatch: The name is a constant of another class than the declared one's: its listener would get events of that.
        """
        check_name_or_pattern(name)
        expected = self._classes.get(name, ())
        own = name.cls if expected and isinstance(name, EventName) else None
        if own is not None and not any(issubclass(one, own) for one in expected):
            raise EventMismatch(str(name), expected, own)
        deprecated = self._deprecation(name)
        if deprecated is None and self._is_known(name):
            return
        caller = find_caller()
        use = find_use(listener, caller)
        if (owner := self._registry.adding) is not None:
            use = use._replace(plugin=owner.name)
        self._answer(name, deprecated, use, caller)

    def check_dispatch(self, name: Any, event: Any) -> None:
        """Answer a dispatch of an undeclared name; warn if the name is deprecated.

        Other programs may use names that this one does not declare: a received event is dispatched under any name.

        Raises:
            NameUnknown: The name is undeclared, and that is an error.
        """
        deprecated = self._deprecation(name)
        if deprecated is None and (self._is_known(name) or _is_received(event)):
            return
        caller = find_caller()
        self._answer(name, deprecated, use_by(caller), caller)

    def check_heard(self, names: Iterable[EventName[Any]]) -> None:
        """Refuse names that a consumer is to hear and that can never be dispatched here.

        Raises:
            NameUnknown: One is undeclared, and that is an error.
            EventMismatch: The class of one is not the declared one.
        """
        for name in names:
            self.check_dispatch(name, None)
            expected = self._classes.get(name)
            if expected and name.cls is not None and not issubclass(name.cls, expected):
                raise EventMismatch(str(name), expected, name.cls)

    def _is_known(self, name: Hashable) -> bool:
        if self._unknown == "allow" or name in self._by_text or name == "**":
            return True
        if isinstance(name, str) and is_pattern(name):
            pattern = compile_pattern(name)
            return any(pattern.fullmatch(f"{text}.") for text in self._by_text)
        return False

    def _deprecation(self, name: Any) -> str | None:
        if isinstance(name, EventName) and name.deprecated is not None:
            return name.deprecated
        return next((same.deprecated for same in self._by_text.get(name, ()) if same.deprecated is not None), None)

    def _answer(self, name: Any, deprecated: str | None, use: NameUse, caller: FrameType) -> None:
        is_known = self._is_known(name)
        if not is_known and self._unknown == "error":
            raise NameUnknown(name, self._find_similar(name), *use)
        told = self._told.get(name)
        if told is None:
            if len(self._told) >= MOST_TOLD:
                return
            told = self._told[name] = set()
        # A task that spawn() has started has asyncio for its caller; the one that spawned was told.
        if use.plugin in told or (told and use.plugin.startswith("asyncio.")):
            return
        told.add(use.plugin)
        if deprecated is not None:
            warn_if_deprecated(name, use, deprecated=deprecated)
        if not is_known:
            warn_caller(str(NameUnknown(name, self._find_similar(name), *use)), NameUnknownWarning, caller)

    def _find_similar(self, name: Hashable) -> str | None:
        if not isinstance(name, str):
            return None
        known = list(self._by_text)
        if is_pattern(name):
            segments = name.split(".")
            known = list(dict.fromkeys(_as_pattern(text.split("."), segments) for text in known))
        return next(iter(get_close_matches(str(name), known, 1)), None)

    # -- classes --------------------------------------------------------------------------------------------

    def class_of(self, name: Hashable) -> type | None:
        """Return the class of the newest version of a declared name; None if it has none."""
        newest = max(self._by_text.get(name, ()), key=lambda same: same.version, default=None)
        return None if newest is None else newest.cls

    def check_event(self, name: Any, event: Any) -> None:
        """Refuse an event of another class than the name's.

        Raises:
            EventMismatch: It is of another class. A received event that nobody hears under this name is passed over.
        """
        expected = self._classes.get(name)
        if expected and not isinstance(event, expected) and not self._is_unheard(name, event):
            raise EventMismatch(str(name), expected, type(event))

    def _is_unheard(self, name: Hashable, event: object) -> bool:
        return _is_received(event) and not self._registry.is_heard(name, self._registry.get(name))

    def guard(self, name: Any, listeners: Sequence[Listener]) -> Sequence[Listener] | None:
        """Return callables that check an event and run these listeners, without a call of their own for the check.

        None if each dispatch of the name has to be answered.
        """
        if not self._is_known(name) or self._deprecation(name) is not None:
            return None
        expected = self._classes.get(name)
        if not expected:
            return listeners
        return (_check_and_run(self, name, expected, listeners[0] if listeners else _do_nothing), *listeners[1:])


def _check_and_run(points: ExtensionPoints, name: Any, expected: tuple[type, ...], run: Listener) -> Listener:
    usual = expected[0]

    def check_and_run(event: Any) -> Any:
        if type(event) is not usual and not isinstance(event, expected):
            points.check_event(name, event)
        return run(event)

    return check_and_run


async def _do_nothing(event: object) -> None:
    """Run in place of a listener where there is none."""


def _is_received(event: object) -> bool:
    dispatched = received.get()
    return dispatched is not None and event is not None and dispatched.event is event


def _as_pattern(text: list[str], pattern: list[str]) -> str:
    """Return a name with the stars that a pattern has at the same segments; as it is if the pattern does not fit it."""
    stars = ["*" if star == "*" else segment for segment, star in zip(text, pattern, strict=False)]
    if pattern[-1] == "**" and len(text) >= len(pattern) - 1:
        return ".".join([*stars[: len(pattern) - 1], "**"])
    return ".".join(stars if len(text) == len(pattern) else text)


def _collect(names: Any) -> tuple[EventName[Any], ...]:
    given = [names] if isinstance(names, ModuleType) else names
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"names is a list of EventName constants, or a module that has some, not {names!r}")
    found: dict[int, EventName[Any]] = {}  # by id: equal names may have different classes
    for one in given:
        if isinstance(one, ModuleType):
            own = [value for value in vars(one).values() if isinstance(value, EventName)]
            if not own:
                raise ValueError(f"{one.__name__} has no EventName among its attributes, so it declares nothing")
            found.update((id(name), name) for name in own)
        elif isinstance(one, EventName):
            found[id(one)] = one
        else:
            raise TypeError(f"names takes EventName constants and modules, not {one!r}: write EventName('user.joined')")
    return tuple(found.values())


def find_use(listener: Any, caller: FrameType) -> NameUse:
    """Return the use of a name by a listener that is being added: its module, and the line that has the name.

    That is the line of the call, or the definition of a subscriber's method, whose ``@on`` has the name.
    """
    source = find_source(listener)
    if source.module.startswith("silbo."):  # of wait_for
        return use_by(caller)
    while caller.f_code.co_name in _ADDING and caller.f_back is not None:  # a host's own method of that name
        caller = caller.f_back
    place = source.place if _is_subscriber_added() else use_by(caller).place
    return NameUse(source.module, place or source.place)


def _is_subscriber_added() -> bool:
    frame: FrameType | None = sys._getframe()  # noqa: SLF001  # the call stack
    while frame is not None and frame.f_code is not Subscribers.add.__code__:
        frame = frame.f_back
    return frame is not None


def check_heard_names(dispatcher: object, names: Iterable[EventName[Any]]) -> None:
    """Refuse names of a consumer that its dispatcher, one of silbo's that declares names, can never dispatch.

    Raises:
        NameUnknown: One is undeclared, and that is an error.
        EventMismatch: The class of one is not the declared one.
    """
    points = getattr(dispatcher, "_points", None)
    if isinstance(points, ExtensionPoints):
        points.check_heard(names)


def make_event(points: ExtensionPoints | None, name: Any) -> Any:
    """Return a new event for a name: of the name's class, else of the declared name's, else an :class:`~silbo.Event`.

    Raises:
        EventMissing: The class can't be made without arguments.
    """
    cls = name.cls if isinstance(name, EventName) else None
    if cls is None and points is not None:
        cls = points.class_of(name)
    if cls is None:
        return Event()
    try:
        return cls()
    except Exception as error:
        raise EventMissing(str(name), cls) from error
