"""Whistle's classes, with the types that Whistle does not ship.

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
    """Let a host override a method with Whistle's narrower signature, and still type-check; returns the method.

    Type checkers see a union: callers must satisfy every member, so they are checked against the real signature; an
    override must satisfy one of them.
    """
    return method


if TYPE_CHECKING:
    from collections.abc import Hashable
    from typing import Protocol

    class WhistleEvent:
        """Whistle's event, with the attributes that every dispatch sets."""

        name: Any
        dispatcher: Any
        propagation_stopped: bool

        def stop_propagation(self) -> None: ...

    class IAsyncEventDispatcher(Protocol):
        """The type under which a component asks its container for the dispatcher."""

        def get_listeners(self, event_id: Any = None, /) -> Any: ...

        def has_listeners(self, event_id: Any = None, /) -> Any: ...

        def add_listener(self, event_id: Any, listener: Any, /, *, priority: int = 0) -> Any: ...

        def remove_listener(self, event_id: Any, listener: Any, /) -> Any: ...

        async def adispatch(self, event_id: Any, event: Any = None, /) -> Any: ...

    class WhistleDispatcher(IAsyncEventDispatcher):
        """Whistle's dispatcher, without the methods that silbo replaces."""

        add_listener: Any
        get_listeners: Any
        adispatch: Any

        def dispatch(self, name: Hashable, event: Any = None, /) -> Any: ...

else:
    from whistle import AsyncEventDispatcher as WhistleDispatcher
    from whistle import Event as WhistleEvent
    from whistle import IAsyncEventDispatcher
