"""Event names, the patterns that match them, and the names of a class of events."""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from enum import Enum
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary, WeakSet, ref

from silbo.errors import KeyUnknown, NameInvalid
from silbo.event import declared_fields
from silbo.message import VERSION_DIGITS
from silbo.policy import Policy

if TYPE_CHECKING:
    from types import FrameType

    from typing_extensions import TypeVar

    from silbo.event import Event

    E = TypeVar("E", default=Event)
    T = TypeVar("T", default=object)
else:
    from typing import TypeVar

    E, T = TypeVar("E"), TypeVar("T")

__all__ = [
    "MAX_NAME_LENGTH",
    "E",
    "EventName",
    "Key",
    "Name",
    "NameUse",
    "Upcast",
    "check_key",
    "check_name",
    "check_name_or_pattern",
    "claim_own_name",
    "compile_pattern",
    "find_caller",
    "generic_class",
    "has_name",
    "is_pattern",
    "is_too_long",
    "may_be_deprecated",
    "may_have_policy",
    "name_of",
    "use_by",
    "version_of",
    "warn_caller",
    "warn_if_deprecated",
    "watch_names",
]

Key: TypeAlias = str | Callable[[Any], object]
"""The source of a routing key: the name of an attribute, or a function of the event."""

Name: TypeAlias = "str | int | float | bytes | tuple[object, ...] | frozenset[object] | Enum | type[object]"
"""The types that a name may have besides :class:`EventName`; at run time any hashable is a name."""

Upcast: TypeAlias = "Callable[[dict[str, Any]], dict[str, Any]]"
"""A function that makes the payload of the next version of one version's payload: a dict of plain JSON values."""

MAX_NAME_LENGTH: Final = 1_000
"""Most characters of a name or pattern: names come from outside, and are kept in caches."""

_TEXTS: Final = (str, bytes)
_NAME_SHOWN: Final = 60
"""Characters that an error shows of a name that is too long."""


if TYPE_CHECKING:

    class EventName(Generic[E]):
        """A name that carries its event class; the run-time class below has the documentation."""

        cls: type[E] | None
        key: Key | None
        version: int
        upcast: Mapping[int, Upcast]
        description: str
        deprecated: str | None
        policy: Policy | None

        def __init__(
            self,
            name: str,
            cls: type[E] | None = None,
            *,
            key: Key | None = None,
            version: int = 1,
            upcast: Mapping[int, Upcast] | None = None,
            description: str = "",
            deprecated: str | None = None,
            policy: Policy | None = None,
        ) -> None: ...

else:

    class EventName(str):
        """A ``str`` that carries an event class, a routing key, a version, a description and a deprecation.

        To a type checker it is not a ``str``: so mypy and pyright report a listener or an event of the wrong class. Use
        ``str(name)`` where a string is asked for.

        Args:
            name: The dotted name, as ``user.joined``; no ``*``, and at most 1,000 characters.
            cls: The class of its events; a consumer rebuilds messages of this name as this class. The class knows its names
                for as long as they are alive, so names that are made for a tenant or a request are freed.
            key: The routing key: the name of an attribute, or a function of the event. Events with one key keep their order.
            version: The version of the payload, from 1; a header of each message. A consumer with this name in ``events=``
                leaves messages of newer versions to the others of its group.
            upcast: Functions by version, ``{1: add_currency}``: each takes a payload of its version, a dict that it may change,
                and returns that of the next. A consumer rebuilds older messages through them, step by step. From the
                lowest version to the one before ``version`` none may be missing. Without ``upcast`` older payloads are
                rebuilt as they are.
            description: For people.
            deprecated: The replacement, as text. With it, registering a listener and dispatching give a
                ``DeprecationWarning``.
            policy: The limits of its listeners, and the effect of their failures. Declare the name (``names=`` of the
                dispatcher), so that it also holds where a plain string is dispatched.

        Raises:
            KeyUnknown: ``key`` is a text, the class declares its fields (a dataclass, attrs class, Struct or pydantic model), and
                it has no such attribute.
            NameInvalid: the name has a ``*`` or is too long; or handlers are bound to the class already, under the name of
                the class.
            TypeError: The name is not a text, ``cls`` is not a class, ``version`` is no whole number, or something in ``upcast``
                is not a function of one payload.
            ValueError: ``version`` is less than 1 or has more than 18 digits, or ``upcast`` has a hole or a version that is not
                before ``version``.
        """

        __slots__ = ("__weakref__", "cls", "deprecated", "description", "key", "policy", "upcast", "version")

        def __new__(  # noqa: D102  # the docstring of the class says it
            own, name, cls=None, *, key=None, version=1, upcast=None, description="", deprecated=None, policy=None
        ):
            if not isinstance(name, str):
                raise TypeError(f"an EventName is made of a text, as 'user.joined', not of {name!r}")
            if is_pattern(name):
                raise NameInvalid(name, "an event name has no '*'; patterns are for add_listener")
            _check_length(name)
            if cls is not None and not isinstance(cls, type):
                raise TypeError(f"an EventName's cls is an event class, not {cls!r}")
            check_key(name, cls, key)
            self = super().__new__(own, str.__str__(name))  # of a member of a str enum, its value
            self.cls = cls
            self.key = key
            self.version = _check_version(name, version)
            self.upcast = _NO_UPCAST if upcast is None else _check_upcast(name, version, upcast)
            self.description = description
            self.deprecated = deprecated
            self.policy = _check_policy(policy)
            if cls is not None:
                _add_name(cls, self)
            if policy is not None:
                _with_policy.add(str(self))
            if deprecated is not None:
                _deprecated.add(str(self))
            if policy is not None or deprecated is not None:
                for watcher in tuple(_watchers):
                    watcher.refresh()
            return self

        def __class_getitem__(cls, _item):
            return cls

        def __reduce__(self):
            options = {slot: getattr(self, slot) for slot in self.__slots__ if slot != "__weakref__"}
            options["upcast"] = dict(self.upcast)  # the read-only view of it can't be pickled
            return partial(EventName, str(self), **options), ()


# -- the names of a class of events -------------------------------------------------------------------------

_NAMES: Final = "__silbo_names__"
"""The attribute of an event class that holds its EventNames. On the class itself, so that both are freed together."""

_NAMES_SHOWN: Final = 5
"""Most names of a class that an error shows."""

_bound_by_class_name: Final[WeakKeyDictionary[type, WeakSet[Any]]] = WeakKeyDictionary()
"""The classes of events that have handlers under the name of the class, each with the maps that bind these handlers."""


class _LiveNames:
    """The EventNames of a class that are alive: names made for a tenant or a request are freed with it."""

    def __init__(self) -> None:
        self._by_text: dict[str, dict[int, ref[Any]]] = {}  # equal names by id: each may outlive the other

    def add(self, name: Any) -> None:
        text = str(name)
        self._by_text.setdefault(text, {})[id(name)] = ref(name, partial(self._remove, text, id(name)))

    def texts(self) -> list[str]:
        """Return the different names, the oldest first."""
        return list(self._by_text)

    def find(self, text: str) -> Any:
        """Return the newest version of the equal names with this text, the oldest name of it; None if there is none."""
        alive = [name for weak in list(self._by_text.get(text, {}).values()) if (name := weak()) is not None]
        return max(alive, key=lambda name: name.version, default=None)

    def _remove(self, text: str, key: int, _: object) -> None:
        equal = self._by_text.get(text, {})
        equal.pop(key, None)
        if not equal:
            self._by_text.pop(text, None)


def _names_of(cls: type) -> _LiveNames:
    names: _LiveNames = vars(cls).get(_NAMES) or _LiveNames()
    return names


def _add_name(cls: type, name: Any) -> None:
    if _bound_by_class_name.get(cls):
        raise NameInvalid(
            name,
            f"handlers are bound to {cls.__qualname__} already, under the name of the class, and would not hear it: "
            "make the EventName before that, where the class is defined",
        )
    names = _names_of(cls)
    names.add(name)
    if _NAMES not in vars(cls):
        with suppress(TypeError, AttributeError):  # a built-in class, or one that accepts no attribute
            setattr(cls, _NAMES, names)


def claim_own_name(cls: type, claimant: object) -> None:
    """Register that a class of events has handlers under the name of the class.

    As long as the claimant lives, an :class:`EventName` of this class is refused: these handlers would not hear it.
    """
    _bound_by_class_name.setdefault(cls, WeakSet()).add(claimant)


def generic_class(cls: type) -> type:
    """Return the class of which pydantic has made this class for type arguments, ``Page`` of ``Page[int]``; or else the class itself.

    Other libraries make no class for type arguments.
    """
    origin: type | None = vars(cls).get("__pydantic_generic_metadata__", {}).get("origin")
    return cls if origin is None else origin


def name_of(event: object) -> Any:
    """Return the name of an event or of a class of events: its :class:`EventName`, else the name of the class.

    ``Page[int]``, of which pydantic makes a class, has the EventName of ``Page`` if it has none of its own. A mediator dispatches the events that handlers collect under this name, and an :class:`~silbo.EventMap` binds a class to
    it. Use it to dispatch an event of your own in the same way::

        await dispatcher.adispatch(name_of(event), event)

    Raises:
        NameInvalid: the class has several EventNames.
    """
    cls = event if isinstance(event, type) else type(event)
    names = _names_of(cls)
    texts = names.texts()
    if not texts:
        names = _names_of(generic_class(cls))
        texts = names.texts()
    if len(texts) > 1:
        several = ", ".join(map(repr, texts[:_NAMES_SHOWN])) + ", ..." * (len(texts) > _NAMES_SHOWN)
        raise NameInvalid(
            cls.__name__, f"events of this class have several names ({several}); dispatch it under one of them"
        )
    name = names.find(texts[0]) if texts else None
    return cls.__name__ if name is None else name


def has_name(cls: type, name: str) -> bool:
    """Return True if events of a class have this name: it is one of the class's EventNames, or the name of the class."""
    return cls.__name__ == name or any(_names_of(one).find(name) is not None for one in (cls, generic_class(cls)))


def version_of(cls: type, name: str) -> int:
    """Return the version of the payloads of a class under a name: that of its newest EventName; 1 if it has none."""
    names = vars(cls).get(_NAMES)
    found = None if names is None else names.find(name)
    version: int = 1 if found is None else found.version
    return version


# -- routing keys -------------------------------------------------------------------------------------------


def check_key(name: str, cls: type | None, key: object) -> None:
    """Refuse a routing key that names no attribute of an event class, as far as its attributes are known.

    Raises:
        KeyUnknown: the class has no such attribute.
    """
    if cls is None or not isinstance(key, str):
        return
    fields = declared_fields(cls)
    if fields is None or key in fields or any(_may_have(base, key) for base in cls.__mro__):
        return
    written = {one for base in cls.__mro__[:-1] for one in vars(base) if not one.startswith("_")}
    similar = get_close_matches(key, [*fields, *sorted(written)], 1)
    raise KeyUnknown(str(name), cls, key, similar=similar[0] if similar else None, fields=fields)


def _may_have(base: Any, attribute: str) -> bool:
    """Return True if objects of a class may have an attribute that is no field, because of this base of the class."""
    own = vars(base)
    try:
        annotations = inspect.get_annotations(base)
    except NameError:  # Python 3.14 evaluates them, and one names a class that does not exist yet
        return True
    if attribute in own or attribute in annotations or attribute in own.get("__private_attributes__", ()):
        return True
    config = own.get("model_config")
    if isinstance(config, dict) and config.get("extra") == "allow":
        return True
    is_hosts = base is not object and not base.__module__.startswith("pydantic.")
    if is_hosts and ("__getattr__" in own or "__getattribute__" in own):
        return True
    # Set by one of its methods, as __post_init__.
    methods = (getattr(value, "__func__", value) for value in own.values())
    codes = (method.__code__ for method in methods if inspect.isfunction(method))
    return any(attribute in code.co_names or attribute in code.co_consts for code in codes)


_with_policy: Final[set[str]] = set()
"""The texts of all names that were made with a policy."""

_deprecated: Final[set[str]] = set()
"""The texts of all names that were made deprecated."""

_watchers: Final[WeakSet[Any]] = WeakSet()
"""The registries of listeners: each looks its names up anew when a name with a policy, or a deprecated one, is made."""


def watch_names(watcher: Any) -> None:
    """Call ``watcher.refresh()`` whenever a name with a policy, or a deprecated one, is made, as long as the watcher lives."""
    _watchers.add(watcher)


def may_have_policy(name: object) -> bool:
    """Return True if there is, or was, an EventName with this text and a policy."""
    return isinstance(name, str) and name in _with_policy


def may_be_deprecated(name: object) -> bool:
    """Return True if there is, or was, a deprecated EventName with this text."""
    return isinstance(name, str) and name in _deprecated


def _check_policy(policy: object) -> Policy | None:
    if policy is None or (isinstance(policy, Policy) and policy.budget is None):
        return policy
    raise TypeError(f"the policy of a name is a silbo.Policy without a budget, which plugins have, not {policy!r}")


# -- versions -----------------------------------------------------------------------------------------------

_NO_UPCAST: Final[Mapping[int, Upcast]] = MappingProxyType({})


def _check_version(name: object, version: object) -> int:
    if isinstance(version, bool) or not isinstance(version, int):
        raise TypeError(f"the version of {str(name)!r} is a whole number, not {version!r}")
    if not 1 <= version < 10**VERSION_DIGITS:
        raise ValueError(f"the version of {str(name)!r} is 1 or more, with at most {VERSION_DIGITS} digits")
    return version


def _check_upcast(name: object, version: int, upcast: object) -> Mapping[int, Upcast]:
    """Return a read-only copy of an upcast without a hole, in ascending order."""
    if not isinstance(upcast, Mapping):
        raise TypeError(
            f"upcast of {str(name)!r} is a dict of functions by version, as {{1: add_currency}}, not {upcast!r}"
        )
    for before, step in upcast.items():
        if isinstance(before, bool) or not isinstance(before, int):
            raise TypeError(f"upcast of {str(name)!r}: {before!r} is not a version, which is a whole number")
        if not 1 <= before < version:
            raise ValueError(
                f"upcast of {str(name)!r}: {before} is not a version before {version}; the function of a version makes "
                "payloads of the next"
            )
        if not _takes_one_payload(step):
            raise TypeError(f"upcast of {str(name)!r}: {step!r} is not a plain function of one payload")
    missing = sorted(set(range(min(upcast, default=version), version)) - upcast.keys())
    if missing:
        raise ValueError(f"upcast of {str(name)!r} has a hole: no function for version {missing[0]}")
    return MappingProxyType({before: upcast[before] for before in sorted(upcast)})


def _takes_one_payload(step: object) -> bool:
    if not callable(step) or inspect.iscoroutinefunction(step) or inspect.isasyncgenfunction(step):
        return False
    if inspect.iscoroutinefunction(type(step).__call__):
        return False
    try:
        inspect.signature(step).bind({})
    except TypeError:
        return False
    except ValueError:  # a built-in function that does not tell
        return True
    return True


# -- checks and patterns ------------------------------------------------------------------------------------


def is_pattern(name: object) -> bool:
    """Return True if a name is a pattern: a string that contains a ``*``."""
    return isinstance(name, str) and "*" in name


def check_name(name: object) -> None:
    """Refuse to dispatch under a pattern.

    Raises:
        NameInvalid: the name is a pattern, or too long.
        TypeError: the name is None.
    """
    check_name_or_pattern(name)
    if is_pattern(name):
        raise NameInvalid(str(name), "a name with '*' is a pattern; dispatch a name")


def check_name_or_pattern(name: object) -> None:
    """Refuse a text that is too long, and None: without a name, ``get_listeners`` and its like mean all names.

    Raises:
        NameInvalid: the name is too long.
        TypeError: the name is None.
    """
    if name is None:
        raise TypeError("None is not an event name; give a text, as 'user.joined', or any other hashable")
    if isinstance(name, _TEXTS) and len(name) > MAX_NAME_LENGTH:
        _check_length(name)


def is_too_long(name: object) -> bool:
    """Return True if a name is a text, or bytes, of more than MAX_NAME_LENGTH."""
    return isinstance(name, _TEXTS) and len(name) > MAX_NAME_LENGTH


def _check_length(name: Any) -> None:
    if is_too_long(name):
        raise NameInvalid(
            f"{name[:_NAME_SHOWN]!s}...",
            f"{len(name)} characters, more than {MAX_NAME_LENGTH}; put what varies into the event, not into its name",
        )


class NameUse(NamedTuple):
    """A place in the code that uses a name.

    Attributes:
        plugin: The module.
        place: ``file:line``; empty if it has none.
    """

    plugin: str
    place: str

    def __str__(self) -> str:
        return f"used by {self.plugin}, {self.place}" if self.place else f"used by {self.plugin}"


def find_caller() -> FrameType:
    """Return the nearest frame of the call stack that is outside of silbo."""
    frame = sys._getframe()  # noqa: SLF001  # as warnings itself does
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith("silbo."):
        frame = frame.f_back
    return frame


def use_by(caller: FrameType) -> NameUse:
    """Return the place that a frame runs."""
    return NameUse(str(caller.f_globals.get("__name__")), f"{caller.f_code.co_filename}:{caller.f_lineno}")


def warn_caller(text: str, category: type[Warning], caller: FrameType) -> None:
    """Give a warning at the line that a frame runs, as ``warnings.warn`` does with a ``stacklevel``."""
    warnings.warn_explicit(
        text,
        category,
        caller.f_code.co_filename,
        caller.f_lineno,
        module=str(caller.f_globals.get("__name__")),
        registry=caller.f_globals.setdefault("__warningregistry__", {}),
    )


def warn_if_deprecated(name: object, use: NameUse | None = None, *, deprecated: str | None = None) -> None:
    """Give a ``DeprecationWarning`` if a name is deprecated, at the nearest line of the call stack outside of silbo.

    Args:
        name: The name.
        use: The place that uses it, for the text; by default that line.
        deprecated: The text of the deprecation; by default the name's own.
    """
    if deprecated is None and isinstance(name, EventName):
        deprecated = name.deprecated
    if deprecated is not None:
        caller = find_caller()
        text = f"event {name!s} is deprecated: {deprecated} ({use or use_by(caller)})"
        warn_caller(text, DeprecationWarning, caller)


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compile a pattern of names: ``*`` matches one segment, ``**`` any number of segments, also none.

    Match it against the name plus a dot (``"user.joined."``), so that every segment ends in a dot. A match takes time in
    proportion to the name.

    Raises:
        NameInvalid: a ``*`` is only a part of a segment, or the pattern is too long.
    """
    _check_length(pattern)
    runs = [""]  # of segments, with a ** between two runs
    for segment in pattern.split("."):
        if segment == "**":
            runs.append("")
        elif segment == "*":
            runs[-1] += r"[^.]*\."
        elif "*" in segment:
            raise NameInvalid(pattern, "a '*' stands for a whole segment: 'user.*' or 'user.**', not 'user.jo*'")
        else:
            runs[-1] += re.escape(segment) + r"\."
    first, *others = runs
    if others:
        # A run in the middle matches where it first can, and never anywhere else (an atomic group): else each further **
        # would try again all that the ones before it have tried.
        middle = "".join(rf"(?>(?:[^.]*\.)*?{run})" for run in others[:-1] if run)
        first += rf"{middle}(?:[^.]*\.)*{others[-1]}"
    return re.compile(first, re.DOTALL)
