"""Subscribers: objects whose methods are listeners."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from functools import partial, partialmethod, singledispatchmethod
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, Unpack, overload

from silbo.dispatch.listeners import Registration, undo_registration
from silbo.dispatch.options import is_async
from silbo.names import check_name_or_pattern

if TYPE_CHECKING:
    from silbo.dispatch.options import Listener, ListenerOptions
    from silbo.names import E, EventName, Name

__all__ = ["Subscribers", "is_subscriber", "on"]

_MARK = "__silbo_on__"
_M = TypeVar("_M", bound=Callable[..., Awaitable[object]])
_E_co = TypeVar("_E_co", covariant=True)
_S = TypeVar("_S")
_T = TypeVar("_T")


class Marks(Protocol[_E_co]):
    """The decorator that ``on(EventName)`` returns: it takes an async method for events of that name."""

    # The result takes any event: a second mark above this one would else have to be for the same class of events.
    @overload
    def __call__(
        self, method: Callable[[_S, _E_co], Awaitable[_T]], /
    ) -> Callable[[_S, Any], Coroutine[Any, Any, _T]]: ...
    @overload
    def __call__(self, method: Callable[[_E_co], Awaitable[_T]], /) -> Callable[[Any], Coroutine[Any, Any, _T]]: ...


@overload
def on(name: EventName[E], /, **options: Unpack[ListenerOptions]) -> Marks[E]: ...
@overload
def on(name: Name, /, **options: Unpack[ListenerOptions]) -> Callable[[_M], _M]: ...
def on(name: Any, /, **options: Any) -> Any:
    """Mark an async method as a listener. ``add_subscriber`` registers the marked methods of an object.

    Mark a method several times to hear several names. The options are those of ``add_listener``. A ``classmethod``, ``staticmethod``
    or ``partialmethod`` may stand above or below the mark, and so may a decorator that keeps the method as ``__wrapped__``.

    Raises:
        TypeError: The decorated object is no async method, or there is no name.
    """
    if is_async(name):
        raise TypeError("on takes a name first: @on('user.joined')")
    check_name_or_pattern(name)

    def mark(method: Any) -> Any:
        if not any(map(is_async, _layers(method))):
            raise TypeError(
                f"a listener is an async method, not {method!r}; write 'async def', or @in_thread below @on"
            )
        setattr(method, _MARK, ((name, options), *inspect.getattr_static(method, _MARK, ())))
        return method

    return mark


def _layers(attribute: Any) -> Iterator[Any]:
    """Yield an attribute of a class, then what it wraps, down to the function; runs no code of the attribute."""
    while attribute is not None:
        yield attribute
        if isinstance(attribute, classmethod | staticmethod):
            attribute = attribute.__func__
        elif isinstance(attribute, partialmethod | singledispatchmethod):
            attribute = attribute.func
        else:
            attribute = inspect.getattr_static(attribute, "__wrapped__", None)


def _marks(attribute: object) -> tuple[tuple[Any, ListenerOptions], ...]:
    """Return the names and options with which an attribute of a class is marked, the outermost mark first."""
    found: list[tuple[Any, ListenerOptions]] = []
    for layer in _layers(attribute):
        marks = inspect.getattr_static(layer, _MARK, ())
        found += [mark for mark in marks if not any(mark is other for other in found)]  # functools.wraps copies marks
    return tuple(found)


def is_subscriber(candidate: object) -> bool:
    """Return True if a class or object has a method marked with ``@on``. Runs no code of it."""
    cls = candidate if isinstance(candidate, type) else type(candidate)
    attributes = {attribute: None for base in cls.__mro__ for attribute in base.__dict__}
    return any(_marks(inspect.getattr_static(cls, attribute)) for attribute in attributes)


def _find_listeners(subscriber: object) -> Iterator[tuple[Any, Listener, ListenerOptions]]:
    """Yield name, bound method and options of each listener of an object, in the order of definition, base classes first.

    A method that a subclass overrides without ``@on`` is not a listener.
    """
    seen: dict[str, None] = {}
    for cls in type(subscriber).__mro__[-2::-1]:  # without object
        seen.update(dict.fromkeys(cls.__dict__))
    for attribute in seen:
        for name, options in _marks(inspect.getattr_static(subscriber, attribute)):
            yield name, getattr(subscriber, attribute), options


class Subscribers:
    """The subscribers of one dispatcher, each with its registrations."""

    def __init__(self) -> None:
        # Each time that a subscriber was added, with how to undo it; by id, for two subscribers may be equal.
        self._entries: dict[int, list[tuple[object, list[Callable[[], None]]]]] = {}

    def add(self, dispatcher: Any, subscriber: object) -> Registration:
        """Register the marked methods of an object.

        Raises:
            TypeError: The object is a class, or has no marked method.
        """
        if isinstance(subscriber, type):
            raise TypeError(
                f"{subscriber.__qualname__} is a class; give add_subscriber an object: {subscriber.__qualname__}()"
            )
        found = list(_find_listeners(subscriber))
        if not found:
            raise TypeError(f"{type(subscriber).__qualname__} has no method marked with @silbo.on(...)")
        undo: list[Callable[[], None]] = []
        try:
            for name, listener, options in found:
                registration = dispatcher.add_listener(name, listener, **options)
                undo.append(partial(undo_registration, dispatcher, name, listener, registration))
        except BaseException:  # all of its listeners, or none
            for undo_one in undo:
                undo_one()
            raise
        self._entries.setdefault(id(subscriber), []).append((subscriber, undo))

        def remove() -> None:
            self._forget(subscriber)

        return Registration(remove)

    def remove(self, subscriber: object) -> None:
        """Remove the listeners of an object.

        Raises:
            ValueError: The object was not added as a subscriber.
        """
        if not self._forget(subscriber):
            raise ValueError(f"{subscriber!r} is no subscriber of this dispatcher")

    def _forget(self, subscriber: object) -> bool:
        mine = self._entries.pop(id(subscriber), [])
        for _, undo in mine:
            for undo_one in undo:
                undo_one()
        return bool(mine)
