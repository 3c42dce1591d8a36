"""One dispatcher for everybody who asks a rodi container for one (``pip install 'silbo[rodi]'``).

container = rodi.Container()
dispatcher = register_dispatcher(container)

class Invoices:
    def __init__(self, dispatcher: IAsyncEventDispatcher) -> None: ...
"""

from __future__ import annotations

from typing import Any, TypeVar, overload

from silbo._whistle import IAsyncEventDispatcher, WhistleDispatcher
from silbo.dispatcher import AsyncEventDispatcher
from silbo.errors import MissingExtra

try:
    import rodi
except ModuleNotFoundError as error:
    if error.name != "rodi":
        raise
    raise MissingExtra("silbo.containers.rodi", extra="rodi") from error

__all__ = ["register_dispatcher"]

D = TypeVar("D", bound=AsyncEventDispatcher)


@overload
def register_dispatcher(container: rodi.Container) -> AsyncEventDispatcher: ...
@overload
def register_dispatcher(container: rodi.Container, dispatcher: D) -> D: ...
def register_dispatcher(
    container: rodi.Container, dispatcher: AsyncEventDispatcher | None = None
) -> AsyncEventDispatcher:
    """Make one dispatcher the container's, under every type that a component may ask for.

    Those are ``whistle.IAsyncEventDispatcher`` (which is ``silbo.IAsyncEventDispatcher``), and the dispatcher's own class
    with all it derives from, down to ``silbo.AsyncEventDispatcher`` and ``whistle.AsyncEventDispatcher``.

    Args:
        container: Where to register it.
        dispatcher: A dispatcher of yours, of a class of yours if you like; by default a new one.

    Returns:
        The dispatcher, also what the container gives from now on. Closing it stays with you: rodi closes nothing.

    Raises:
        TypeError: it is no silbo dispatcher.
        rodi.OverridingServiceException: the container has one under one of these types; nothing was registered.

    Source: rodi resolves by exact type, so each type needs its own entry.
    """
    if dispatcher is None:
        dispatcher = AsyncEventDispatcher()
    elif not isinstance(dispatcher, AsyncEventDispatcher):
        raise TypeError(f"register_dispatcher takes a silbo.AsyncEventDispatcher, not {dispatcher!r}")
    types: list[Any] = [IAsyncEventDispatcher]
    types += [cls for cls in type(dispatcher).__mro__ if issubclass(cls, WhistleDispatcher)]
    for cls in types:
        if cls in container:
            raise rodi.OverridingServiceException(cls, dispatcher)  # type: ignore[no-untyped-call]  # rodi's, untyped
    for cls in types:
        container.add_instance(dispatcher, cls)
    if not container.strict:
        # silbo's class and Whistle's have one name between them: rodi finds a parameter without annotation by its
        # name, and fails where two types claim that, unless one of them is set.
        container.set_alias("async_event_dispatcher", AsyncEventDispatcher, override=True)
    return dispatcher
