"""Event names, and patterns over them."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, TypeAlias
from weakref import WeakKeyDictionary, WeakSet

from silbo.errors import NameInvalid

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    from silbo.event import Event

    E = TypeVar("E", default=Event)
    T = TypeVar("T", default=object)
else:
    from typing import TypeVar

    E, T = TypeVar("E"), TypeVar("T")

__all__ = [
    "EventName",
    "Key",
    "Name",
    "check_name",
    "claim_own_name",
    "compile_pattern",
    "has_name",
    "is_pattern",
    "name_of",
    "warn_if_deprecated",
]

Key: TypeAlias = "str | Callable[[Any], object]"
"""Where a routing key comes from: an attribute's name, or a function of the event."""

Name: TypeAlias = "str | int | float | bytes | tuple[object, ...] | frozenset[object] | Enum | type[object]"
"""Any hashable is a name; an :class:`EventName` is typed apart."""


if TYPE_CHECKING:

    class EventName(Generic[E]):
        """A name that knows its event class. See the run-time class below."""

        cls: type[E] | None
        key: Key | None
        version: int
        description: str
        deprecated: str | None

        def __init__(
            self,
            name: str,
            cls: type[E] | None = None,
            *,
            key: Key | None = None,
            version: int = 1,
            description: str = "",
            deprecated: str | None = None,
        ) -> None: ...

else:

    class EventName(str):
        """A ``str`` that knows its event class, routing key, version, description and deprecation.

        To a type checker it is not a ``str``: that is how a listener or an event of the wrong class becomes an error in
        mypy and pyright. Use ``str(name)`` where a string is asked for.

        Args:
            name: The dotted name, as ``user.joined``; no ``*``.
            cls: The class of its events; a consumer rebuilds messages of this name as this class.
            key: The routing key, an attribute's name or a function of the event: events with the same key stay in order.
            version: The version of the payload, sent along as a header.
            description: For people.
            deprecated: What to use instead; registering a listener or dispatching gives a ``DeprecationWarning``.

        Raises:
            NameInvalid: a ``*``; or handlers are bound to the class already, and so under the class's own name.
        """

        __slots__ = ("cls", "deprecated", "description", "key", "version")

        def __new__(own, name, cls=None, *, key=None, version=1, description="", deprecated=None):  # noqa: D102  # the class says it
            if is_pattern(name):
                raise NameInvalid(name, "an event name has no '*'; patterns are for add_listener")
            if cls is not None and not isinstance(cls, type):
                raise TypeError(f"an EventName's cls is an event class, not {cls!r}")
            self = super().__new__(own, name)
            self.cls, self.key, self.version = cls, key, version
            self.description, self.deprecated = description, deprecated
            _check_unclaimed(self)
            _make_known(self)
            return self

        def __class_getitem__(cls, _item):
            return cls

        def __reduce__(self):
            options = {slot: getattr(self, slot) for slot in self.__slots__}
            return partial(EventName, str(self), **options), ()


_KNOWN: Final = "__silbo_names__"
"""On an event class, its names; there, so that a class that nobody needs any more can go."""


def _make_known(name: Any) -> None:
    known = () if name.cls is None else vars(name.cls).get(_KNOWN, ())
    if name.cls is not None and name not in known:
        with suppress(TypeError, AttributeError):  # a built-in class, or one that is closed
            setattr(name.cls, _KNOWN, (*known, name))


_claimed: Final[WeakKeyDictionary[type, WeakSet[Any]]] = WeakKeyDictionary()
"""Classes of events that are bound under their own name, and where."""


def claim_own_name(cls: type, where: object) -> None:
    """Note that handlers of a class of events are bound under the class's own name: an ``EventName`` would come too late."""
    _claimed.setdefault(cls, WeakSet()).add(where)


def _check_unclaimed(name: Any) -> None:
    if name.cls is not None and _claimed.get(name.cls):
        raise NameInvalid(
            name,
            f"handlers are bound to {name.cls.__qualname__} already, under the name of the class, and would not hear it: "
            "make the EventName before that, where the class is defined",
        )


def name_of(event: object) -> Any:
    """The name of an event, or of a class of events: the :class:`EventName` that was made for its class, else the class's name.

    Under this name a mediator dispatches what handlers collect, and an :class:`~silbo.EventMap` binds a class. To dispatch an event
    of your own so::

        await dispatcher.adispatch(name_of(event), event)

    Raises:
        NameInvalid: its class has several EventNames.
    """
    cls = event if isinstance(event, type) else type(event)
    known: tuple[Any, ...] = vars(cls).get(_KNOWN, ())
    if len(known) > 1:
        names = ", ".join(map(repr, map(str, known)))
        raise NameInvalid(
            cls.__name__, f"events of this class have several names ({names}); dispatch it under one of them"
        )
    return known[0] if known else cls.__name__


def has_name(cls: type, name: str) -> bool:
    """Whether events of a class have this name: as one of its EventNames, or because the class is called so."""
    return cls.__name__ == name or name in vars(cls).get(_KNOWN, ())


def is_pattern(name: object) -> bool:
    """Whether a name is a pattern: it contains a ``*``."""
    return isinstance(name, str) and "*" in name


def check_name(name: object) -> None:
    """Look at a name before a dispatch: a deprecated one gives a warning.

    Raises:
        NameInvalid: it is a pattern.
    """
    if is_pattern(name):
        raise NameInvalid(str(name), "a name with '*' is a pattern; dispatch a name")
    warn_if_deprecated(name)


def warn_if_deprecated(name: object) -> None:
    """Give a ``DeprecationWarning`` at the line outside of silbo that used a deprecated name."""
    if not isinstance(name, EventName) or name.deprecated is None:
        return
    level, frame = 1, sys._getframe()  # noqa: SLF001  # as warnings itself does
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith("silbo."):
        level, frame = level + 1, frame.f_back
    warnings.warn(f"event {name!s} is deprecated: {name.deprecated}", DeprecationWarning, stacklevel=level)


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """What a pattern matches: ``*`` is one segment, ``**`` any number of them, none included.

    Matched against the name with a dot behind it, so that each segment ends in one.

    Raises:
        NameInvalid: a ``*`` that is only a part of a segment.
    """
    parts: list[str] = []
    for segment in pattern.split("."):
        if segment == "**":
            part = r"(?:[^.]*\.)*"
            if parts and parts[-1] == part:
                continue  # two in a row say no more than one, and backtrack more
        elif segment == "*":
            part = r"[^.]*\."
        elif "*" in segment:
            raise NameInvalid(pattern, "a '*' stands for a whole segment: 'user.*' or 'user.**', not 'user.jo*'")
        else:
            part = re.escape(segment) + r"\."
        parts.append(part)
    return re.compile("".join(parts), re.DOTALL)
