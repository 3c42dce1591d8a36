"""The adapter of rodi: makes listener classes, and gives one dispatcher to all components (``pip install 'silbo[rodi]'``).

container = rodi.Container()
dispatcher = register_dispatcher(container)

class Invoices:
    def __init__(self, dispatcher: IAsyncEventDispatcher) -> None: ...
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import Any, TypeVar, overload

from silbo._checks import require_extra
from silbo.containers._adapter import NOTHING, UNKNOWN, Adapter
from silbo.dispatch.dispatcher import AsyncEventDispatcher
from silbo.errors import Unresolvable

with require_extra("silbo.containers.rodi", extra="rodi", libraries=("rodi",)):
    import rodi

__all__ = ["RodiContainer", "register_dispatcher"]

T = TypeVar("T")
D = TypeVar("D", bound=AsyncEventDispatcher)


class RodiContainer(Adapter):
    """Makes the objects of listener classes with a rodi container.

    Each unit of work has an activation scope: a class that was registered with ``add_scoped`` has one object in it. rodi
    knows no clean-up: at the end, scoped objects are forgotten, not closed.

    Args:
        container: Classes may be registered until the first dispatch that needs the container: then rodi checks and builds
            everything in it.
    """

    def __init__(self, container: rodi.Container) -> None:
        self.container = container

    @asynccontextmanager
    async def scope(self) -> AsyncGenerator[_Scope]:
        """See :class:`silbo.protocols.Container`."""
        with ExitStack() as stack:
            scope = _Scope(self, stack)
            await self.check_scope(scope)
            yield scope

    def find(self, cls: type[Any]) -> object:
        """See :class:`silbo.containers._adapter.Adapter`."""
        entry = next((entry for key, entry in self.container if key is cls), None)
        if entry is None:
            return NOTHING
        return entry.instance if isinstance(entry, rodi.InstanceResolver) else UNKNOWN

    def register(self, registered: object, types: Sequence[type[Any]]) -> None:
        """See :class:`silbo.containers._adapter.Adapter`.

        Source: rodi resolves by exact type, so each type needs its own entry. After a new entry rodi builds everything anew,
        singletons included. So if rodi has built before, the entry is added to what it has built, which is kept.
        """
        built: Any = getattr(self.container, "_provider", None)
        for cls in types:
            self.container.add_instance(registered, cls)
        if AsyncEventDispatcher in types and not self.container.strict:
            # silbo's class and Whistle's have the same name. rodi finds a parameter without annotation by its name, and
            # fails if two types claim the name, unless an alias is set.
            self.container.set_alias("async_event_dispatcher", AsyncEventDispatcher, override=True)
        if built is not None:
            built._map.update({cls: lambda _scope, _asked: registered for cls in types})  # noqa: SLF001
            self.container._provider = built  # noqa: SLF001


class _Scope:
    def __init__(self, adapter: RodiContainer, stack: ExitStack) -> None:
        self._adapter = adapter
        self._stack = stack
        self._activation: rodi.ActivationScope | None = None

    async def resolve(self, cls: type[T], /) -> T:
        try:
            if self._activation is None:  # rodi builds: raises if any class in the container lacks a dependency
                self._activation = self._stack.enter_context(self._adapter.container.provider.create_scope())
            return self._activation.get(cls)
        except rodi.DIException as error:
            raise Unresolvable(cls, self._adapter, str(error)) from error


@overload
def register_dispatcher(container: rodi.Container) -> AsyncEventDispatcher: ...
@overload
def register_dispatcher(container: rodi.Container, dispatcher: D) -> D: ...
def register_dispatcher(
    container: rodi.Container, dispatcher: AsyncEventDispatcher | None = None
) -> AsyncEventDispatcher:
    """Register one dispatcher in the container, under every type that a component may ask for.

    Those are ``whistle.IAsyncEventDispatcher`` (which is ``silbo.IAsyncEventDispatcher``), and the dispatcher's own class
    with all its bases down to ``silbo.AsyncEventDispatcher`` and ``whistle.AsyncEventDispatcher``.

    Args:
        container: The one that gets the dispatcher.
        dispatcher: Your own dispatcher, perhaps of a class of yours; by default a new one, whose listener classes are made by
            this container.

    Returns:
        The dispatcher, which the container gives from now on. You close it yourself: rodi closes nothing.

    Raises:
        TypeError: it is not a silbo dispatcher.
        DispatcherConflict: the container has another dispatcher under one of these types; nothing was registered.
    """
    return RodiContainer(container).register_dispatcher(dispatcher)
