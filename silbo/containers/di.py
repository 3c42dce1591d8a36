"""Listener classes made by di, and one dispatcher for everybody who asks for one (``pip install 'silbo[di]'``).

container = di.Container()
dispatcher = register_dispatcher(container)

class Invoices:
    def __init__(self, dispatcher: IAsyncEventDispatcher) -> None: ...
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeGuard, TypeVar, overload

from silbo._whistle import IAsyncEventDispatcher, WhistleDispatcher
from silbo.containers import ASK, NOTHING, Adapter
from silbo.dispatch.dispatcher import AsyncEventDispatcher
from silbo.errors import MissingExtra, Unresolvable
from silbo.mediator.mediator import Mediator

try:
    import di
    from di.api.dependencies import DependentBase
    from di.api.scopes import Scope as ScopeName
    from di.dependent import Dependent
    from di.exceptions import DependencyInjectionException
    from di.executors import AsyncExecutor
except ModuleNotFoundError as error:
    if error.name != "di":
        raise
    raise MissingExtra("silbo.containers.di", extra="di") from error

__all__ = ["DIContainer", "register_dispatcher"]

T = TypeVar("T")
D = TypeVar("D", bound=AsyncEventDispatcher)


class DIContainer(Adapter):
    """Makes the objects of listener classes with a di container; di needs no registration of a class it can make.

    Only a dispatcher and a mediator are never made in passing, for nobody would hear them: they have to be bound.

    Each unit of work enters the innermost scope: what belongs to it is made once there, and its generators are closed at
    the end, an error of the dispatch thrown into them. A listener class itself, where nothing is bound to it, is made anew for
    each event.

    Args:
        container: With its binds.
        scopes: The names of the scopes, the outermost first; the last one is entered for each unit of work.
        state: What the host got when it entered the others: ``async with container.enter_scope("app") as state``.
    """

    def __init__(
        self,
        container: di.Container,
        *,
        scopes: Sequence[ScopeName] = ("request",),
        state: di.ScopeState | None = None,
    ) -> None:
        self.container = container
        self._scopes, self._state = scopes, state
        self._solved: dict[type, di.SolvedDependent[Any]] = {}
        self._hooks: list[Any] = []

    @asynccontextmanager
    async def scope(self) -> AsyncGenerator[_Scope]:
        """See :class:`silbo.protocols.Container`."""
        async with self.container.enter_scope(self._scopes[-1], self._state) as state:
            scope = _Scope(self, state)
            await self.check(scope)
            yield scope

    def solve(self, cls: type[T]) -> di.SolvedDependent[T]:
        """How to make a class: looked up once, and again when the binds have changed.

        Raises:
            Unresolvable: something in its graph can't be made.
        """
        hooks: Any = getattr(self.container, "_bind_hooks", None)  # nothing public tells; solving takes 50 executions
        if hooks is None or hooks != self._hooks:
            self._solved.clear()
            self._hooks = list(hooks or ())
        if cls not in self._solved:
            # Uncached: two events side by side have a handler each. What it depends on is shared.
            root = Dependent(cls, scope=self._scopes[-1], use_cache=False)
            solved = self.container.solve(root, scopes=self._scopes)
            self._refuse_strays(cls, solved)
            for part in solved.dag:
                if inspect.isabstract(part.call) or getattr(part.call, "_is_protocol", False):
                    raise Unresolvable(cls, self, f"{_name(part.call)} is abstract, and bound to nothing")
            self._solved[cls] = solved
        return self._solved[cls]

    def _refuse_strays(self, cls: type, solved: di.SolvedDependent[Any]) -> None:
        """A dispatcher that di would make by itself is not the one that others listen on; so with a mediator."""
        asked: list[tuple[object, object]] = [(cls, solved.dependency.call)]
        for parameters in solved.dag.values():
            for one in parameters:
                annotation: Any = one.parameter and one.parameter.annotation
                annotated = getattr(annotation, "__origin__", annotation)  # Annotated[it, ...]
                asked.append((annotated, one.dependency.call))
        for wanted, made in asked:
            if made is wanted and _is_central(made) and self.lookup(made) is NOTHING:
                how = "register_dispatcher(container, dispatcher)"
                if issubclass(made, Mediator):
                    how = "bootstrap(...) binds its own; bind one that you made by hand"
                raise Unresolvable(cls, self, f"{_name(made)} is bound to nothing, and a new one nobody hears: {how}")

    def lookup(self, cls: type[Any]) -> object:
        """See :class:`silbo.containers.Adapter`."""
        asked = Dependent(cls, scope=self._scopes[-1], wire=False)
        try:
            found = self.container.solve(asked, scopes=self._scopes).dependency
        except DependencyInjectionException:  # bound, and to something that can't be made in these scopes
            return ASK
        holder = getattr(found.call, "__self__", None)
        return NOTHING if found is asked else holder.given if isinstance(holder, _Given) else ASK

    def give(self, given: object, types: Sequence[type[Any]]) -> None:
        """See :class:`silbo.containers.Adapter`."""
        call = _Given(given).get

        def bound(param: inspect.Parameter | None, dependent: DependentBase[Any]) -> DependentBase[Any] | None:
            if dependent.call not in types:
                return None
            # In the scope of who asks, whatever the host calls its scopes; uncached, for di refuses one call in two scopes.
            return Dependent(call, scope=dependent.scope, use_cache=False)

        self.container.bind(bound)


class _Given:
    def __init__(self, given: object) -> None:
        self.given = given

    def get(self) -> object:
        return self.given


class _Scope:
    def __init__(self, adapter: DIContainer, state: di.ScopeState) -> None:
        self._adapter, self._state = adapter, state

    async def resolve(self, cls: type[T], /) -> T:
        try:
            return await self._adapter.solve(cls).execute_async(AsyncExecutor(), self._state)
        except DependencyInjectionException as error:
            raise Unresolvable(cls, self._adapter, str(error)) from error


@overload
def register_dispatcher(container: di.Container) -> AsyncEventDispatcher: ...
@overload
def register_dispatcher(container: di.Container, dispatcher: D) -> D: ...
def register_dispatcher(
    container: di.Container, dispatcher: AsyncEventDispatcher | None = None
) -> AsyncEventDispatcher:
    """Make one dispatcher the container's, under every type that a component may ask for.

    Those are ``whistle.IAsyncEventDispatcher`` (which is ``silbo.IAsyncEventDispatcher``), and the dispatcher's own class
    with all it derives from, down to ``silbo.AsyncEventDispatcher`` and ``whistle.AsyncEventDispatcher``.

    Args:
        container: Where to bind it; a later bind goes before this one.
        dispatcher: A dispatcher of yours, of a class of yours if you like; by default a new one, whose listener classes are
            made by this container.

    Returns:
        The dispatcher, also what the container gives from now on. Closing it stays with you.

    Raises:
        TypeError: it is no silbo dispatcher.
        DispatcherConflict: the container has another one; nothing was bound.
    """
    adapter = DIContainer(container)
    found = AsyncEventDispatcher(container=adapter) if dispatcher is None else dispatcher
    adapter.take_dispatcher(found)
    return found


def _is_central(call: object) -> TypeGuard[type[Any]]:
    return isinstance(call, type) and (issubclass(call, WhistleDispatcher | Mediator) or call is IAsyncEventDispatcher)


def _name(call: object) -> str:
    return getattr(call, "__qualname__", repr(call))
