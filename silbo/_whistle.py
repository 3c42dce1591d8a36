"""Whistle ships no types: this is the one place where that is met.

At run time these are Whistle's own classes. A type checker sees the same surface with types, so that a misspelt
attribute or method of an event or a dispatcher is an error instead of ``Any``.

Source: whistle 2.1, ``whistle/event.py``, ``whistle/dispatchers/base.py``, ``whistle/typing/``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

__all__ = ["IAsyncEventDispatcher", "WhistleDispatcher", "WhistleEvent", "overridable"]

_M = TypeVar("_M", bound=Callable[..., object])


def overridable(method: _M) -> _M | Callable[..., Any]:
    """A method that a host may override with Whistle's narrower signature, and still type-check.

    Callers have to satisfy every member of the union, so they are checked against the real signature; an override has to
    satisfy one of them. At run time it is the method.
    """
    return method


if TYPE_CHECKING:
    from collections.abc import Hashable
    from typing import Protocol

    class WhistleEvent:
        """Whistle's event: what every dispatch writes on it."""

        name: Any
        dispatcher: Any
        propagation_stopped: bool

        def stop_propagation(self) -> None: ...

    class IAsyncEventDispatcher(Protocol):
        """What a component asks its container for."""

        def get_listeners(self, event_id: Any = None, /) -> Any: ...

        def has_listeners(self, event_id: Any = None, /) -> Any: ...

        def add_listener(self, event_id: Any, listener: Any, /, *, priority: int = 0) -> Any: ...

        def remove_listener(self, event_id: Any, listener: Any, /) -> Any: ...

        async def adispatch(self, event_id: Any, event: Any = None, /) -> Any: ...

    class WhistleDispatcher(IAsyncEventDispatcher):
        """Whistle's dispatcher, as far as silbo does not give a method of its own."""

        add_listener: Any
        get_listeners: Any
        adispatch: Any

        def dispatch(self, name: Hashable, event: Any = None, /) -> Any: ...

else:
    from whistle import AsyncEventDispatcher as WhistleDispatcher
    from whistle import Event as WhistleEvent
    from whistle import IAsyncEventDispatcher
