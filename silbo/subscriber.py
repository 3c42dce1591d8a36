"""Subscribers: many listeners grouped in one object."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from silbo.guard import is_async

if TYPE_CHECKING:
    from silbo.guard import Listener, ListenerOptions
    from silbo.names import EventName, Name

__all__ = ["on", "subscriptions"]

_MARK = "__silbo_on__"
_M = TypeVar("_M", bound=Callable[..., Awaitable[object]])


def on(name: Name | EventName[Any], /, **options: Unpack[ListenerOptions]) -> Callable[[_M], _M]:
    """Make a method a listener of its object, once the object is given to ``add_subscriber``.

    May be stacked, for several names. The options are those of ``add_listener``.
    """

    def mark(method: _M) -> _M:
        if not is_async(method):
            raise TypeError(f"a listener is an async method, not {method!r}; write 'async def'")
        marks = getattr(method, _MARK, ())
        setattr(method, _MARK, ((name, options), *marks))
        return method

    return mark


def subscriptions(subscriber: object) -> Iterator[tuple[Any, Listener, ListenerOptions]]:
    """The listeners of an object: name, bound method, options; in the order they are defined, base classes first.

    A method that a subclass overrides without ``@on`` is no listener any more.
    """
    seen: dict[str, None] = {}
    for cls in reversed(type(subscriber).__mro__):
        seen.update(dict.fromkeys(cls.__dict__))
    for attribute in seen:
        marks = getattr(inspect.getattr_static(subscriber, attribute), _MARK, ())
        for name, options in marks:
            yield name, getattr(subscriber, attribute), options
