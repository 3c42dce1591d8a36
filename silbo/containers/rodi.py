"""Listener classes made by rodi, and one dispatcher for everybody who asks for one (``pip install 'silbo[rodi]'``).

container = rodi.Container()
dispatcher = register_dispatcher(container)

class Invoices:
    def __init__(self, dispatcher: IAsyncEventDispatcher) -> None: ...
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import Any, TypeVar, overload

from silbo.containers import ASK, NOTHING, Adapter
from silbo.dispatch.dispatcher import AsyncEventDispatcher
from silbo.errors import MissingExtra, Unresolvable

try:
    import rodi
except ModuleNotFoundError as error:
    if error.name != "rodi":
        raise
    raise MissingExtra("silbo.containers.rodi", extra="rodi") from error

__all__ = ["RodiContainer", "register_dispatcher"]

T = TypeVar("T")
D = TypeVar("D", bound=AsyncEventDispatcher)


class RodiContainer(Adapter):
    """Makes the objects of listener classes with a rodi container.

    Each unit of work has an activation scope: ``add_scoped`` is one object for it. rodi knows no clean-up: what is scoped
    is forgotten at the end, not closed.

    Args:
        container: May be filled until the first dispatch that needs it: then rodi checks and builds everything in it.
    """

    def __init__(self, container: rodi.Container) -> None:
        self.container = container

    @asynccontextmanager
    async def scope(self) -> AsyncGenerator[_Scope]:
        """See :class:`silbo.protocols.Container`."""
        with ExitStack() as stack:
            scope = _Scope(self, stack)
            await self.check(scope)
            yield scope

    def lookup(self, cls: type[Any]) -> object:
        """See :class:`silbo.containers.Adapter`."""
        found = next((entry for key, entry in self.container if key is cls), NOTHING)
        return found.instance if isinstance(found, rodi.InstanceResolver) else found if found is NOTHING else ASK

    def give(self, given: object, types: Sequence[type[Any]]) -> None:
        """See :class:`silbo.containers.Adapter`.

        Source: rodi resolves by exact type, so each type needs its own entry. One that is added later makes it build
        anew, singletons included; so what it has built gets the entry, too, and is kept.
        """
        built: Any = getattr(self.container, "_provider", None)
        for cls in types:
            self.container.add_instance(given, cls)
        if AsyncEventDispatcher in types and not self.container.strict:
            # silbo's class and Whistle's have one name between them: rodi finds a parameter without annotation by its
            # name, and fails where two types claim that, unless one of them is set.
            self.container.set_alias("async_event_dispatcher", AsyncEventDispatcher, override=True)
        if built is not None:
            built._map.update({cls: lambda _scope, _asked: given for cls in types})  # noqa: SLF001
            self.container._provider = built  # noqa: SLF001


class _Scope:
    def __init__(self, adapter: RodiContainer, stack: ExitStack) -> None:
        self._adapter, self._stack = adapter, stack
        self._activation: rodi.ActivationScope | None = None

    async def resolve(self, cls: type[T], /) -> T:
        try:
            if self._activation is None:  # what any class in the container misses comes out here
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
    """Make one dispatcher the container's, under every type that a component may ask for.

    Those are ``whistle.IAsyncEventDispatcher`` (which is ``silbo.IAsyncEventDispatcher``), and the dispatcher's own class
    with all it derives from, down to ``silbo.AsyncEventDispatcher`` and ``whistle.AsyncEventDispatcher``.

    Args:
        container: Where to register it.
        dispatcher: A dispatcher of yours, of a class of yours if you like; by default a new one, whose listener classes are
            made by this container.

    Returns:
        The dispatcher, also what the container gives from now on. Closing it stays with you: rodi closes nothing.

    Raises:
        TypeError: it is no silbo dispatcher.
        DispatcherConflict: the container has another one under one of these types; nothing was registered.
    """
    adapter = RodiContainer(container)
    found = AsyncEventDispatcher(container=adapter) if dispatcher is None else dispatcher
    adapter.take_dispatcher(found)
    return found
