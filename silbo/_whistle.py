"""Whistle's classes, with the types that Whistle does not ship.

At run time these are Whistle's own classes. A type checker sees the same surface with types, so that a misspelt
attribute or method of an event or a dispatcher is an error instead of ``Any``.

Source: whistle 2.1, ``whistle/event.py``, ``whistle/dispatchers/base.py``, ``whistle/typing/``.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

__all__ = ["IAsyncEventDispatcher", "WhistleDispatcher", "WhistleEvent", "overridable", "overridable_async"]

_M = TypeVar("_M", bound=Callable[..., object])
_S = TypeVar("_S")
_P = ParamSpec("_P")
_R = TypeVar("_R")


def overridable(method: _M) -> _M | Callable[..., Any]:
    """Let a host override a method with Whistle's narrower signature, and still type-check; returns the method.

    Type checkers see a union: callers must satisfy every member, so they are checked against the real signature; an
    override must satisfy one of them.
    """
    return method


MYPY = False
"""mypy takes a constant of this name to be True."""

if TYPE_CHECKING:
    from collections.abc import Hashable
    from typing import Protocol, overload

    _B = TypeVar("_B", covariant=True)

    class _OverridableCoroutine(Protocol[_B]):
        """An async method: any other may override it, and a call of it is checked as ``_B``."""

        @overload
        def __get__(self, instance: None, owner: type, /) -> Callable[..., Coroutine[Any, Any, Any]]: ...
        @overload
        def __get__(self, instance: object, owner: type | None = None, /) -> _B: ...
        def __call__(self, *args: Any, **keywords: Any) -> Coroutine[Any, Any, Any]: ...

    # Either checker reports a call without await only if the type of the result is one Coroutine. mypy simplifies
    # Coroutine[R | Any] | Coroutine[Any] to that, and pyright does not. pyright compares an override with the type of the
    # attribute, which need not be the type of a call; mypy compares it with the type of a call.
    if MYPY:

        def overridable_async(  # pyright: ignore[reportRedeclaration]
            method: Callable[Concatenate[_S, _P], Coroutine[Any, Any, _R]],
        ) -> Callable[Concatenate[_S, _P], Coroutine[Any, Any, _R | Any]] | Callable[..., Coroutine[Any, Any, Any]]: ...

    else:

        def overridable_async(
            method: Callable[Concatenate[Any, _P], Coroutine[Any, Any, _R]],
        ) -> _OverridableCoroutine[Callable[_P, Coroutine[Any, Any, _R]]]: ...

else:

    def overridable_async(method):
        """Let a host override an async method as :func:`overridable` does, and still report a call without ``await``."""
        return method


if TYPE_CHECKING:

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
