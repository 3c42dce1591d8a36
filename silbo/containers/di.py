"""The adapter of di: makes listener classes, and gives one dispatcher to all components (``pip install 'silbo[di]'``).

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

from silbo._checks import require_extra
from silbo._whistle import IAsyncEventDispatcher, WhistleDispatcher
from silbo.containers._adapter import NOTHING, UNKNOWN, Adapter
from silbo.dispatch.dispatcher import AsyncEventDispatcher
from silbo.errors import Unresolvable
from silbo.mediator.mediator import Mediator

with require_extra("silbo.containers.di", extra="di", libraries=("di",)):
    import di
    from di.api.dependencies import DependentBase
    from di.api.scopes import Scope as ScopeName
    from di.dependent import Dependent
    from di.exceptions import DependencyInjectionException
    from di.executors import AsyncExecutor

__all__ = ["DIContainer", "register_dispatcher"]

T = TypeVar("T")
D = TypeVar("D", bound=AsyncEventDispatcher)


class DIContainer(Adapter):
    """Makes the objects of listener classes with a di container; di needs no registration of a class it can make.

    Only a dispatcher and a mediator have to be bound: di would make a new one for each component, without listeners.

    Each unit of work enters the innermost scope: an object of that scope is made once in it. Generators are closed at the
    end; the error of a failed dispatch is thrown into them. A listener class to which nothing is bound is made anew for each
    event.

    Args:
        container: The container, with its binds.
        scopes: The names of the scopes, the outermost first; the last one is entered for each unit of work.
        state: The state of the outer scopes, from ``async with container.enter_scope("app") as state``.
    """

    def __init__(
        self,
        container: di.Container,
        *,
        scopes: Sequence[ScopeName] = ("request",),
        state: di.ScopeState | None = None,
    ) -> None:
        self.container = container
        self._scopes = scopes
        self._state = state
        self._solved: dict[type, di.SolvedDependent[Any]] = {}
        self._hooks: list[Any] = []

    @asynccontextmanager
    async def scope(self) -> AsyncGenerator[_Scope]:
        """See :class:`silbo.protocols.Container`."""
        async with self.container.enter_scope(self._scopes[-1], self._state) as state:
            scope = _Scope(self, state)
            await self.check_scope(scope)
            yield scope

    def solve(self, cls: type[T]) -> di.SolvedDependent[T]:
        """Return the plan by which di makes a class, made once and again after the binds have changed.

        Raises:
            Unresolvable: a class in the plan can't be made.
        """
        # No public attribute shows a change of the binds. To solve takes as long as to execute 50 times.
        hooks: Any = getattr(self.container, "_bind_hooks", None)
        if hooks is None or hooks != self._hooks:
            self._solved.clear()
            self._hooks = list(hooks or ())
        if cls not in self._solved:
            # Uncached: two events that are handled side by side have a handler each. Its dependencies are shared.
            root = Dependent(cls, scope=self._scopes[-1], use_cache=False)
            solved = self.container.solve(root, scopes=self._scopes)
            self._refuse_unbound(cls, solved)
            for part in solved.dag:
                if inspect.isabstract(part.call) or getattr(part.call, "_is_protocol", False):
                    raise Unresolvable(cls, self, f"{_name(part.call)} is abstract, and bound to nothing")
            self._solved[cls] = solved
        return self._solved[cls]

    def _refuse_unbound(self, cls: type, solved: di.SolvedDependent[Any]) -> None:
        """Raise Unresolvable if di would make a new dispatcher or mediator: the program's listeners are not on a new one."""
        asked: list[tuple[object, object]] = [(cls, solved.dependency.call)]
        for parameters in solved.dag.values():
            for used in parameters:
                annotation: Any = used.parameter and used.parameter.annotation
                annotated = getattr(annotation, "__origin__", annotation)  # of Annotated[cls, ...]: cls
                asked.append((annotated, used.dependency.call))
        for wanted, made in asked:
            if made is wanted and _is_central(made) and self.find(made) is NOTHING:
                how = "register_dispatcher(container, dispatcher)"
                if issubclass(made, Mediator):
                    how = "bootstrap(...) binds its own; bind one that you made by hand"
                raise Unresolvable(cls, self, f"{_name(made)} is bound to nothing, and a new one nobody hears: {how}")

    def find(self, cls: type[Any]) -> object:
        """See :class:`silbo.containers._adapter.Adapter`."""
        asked = Dependent(cls, scope=self._scopes[-1], wire=False)
        try:
            found = self.container.solve(asked, scopes=self._scopes).dependency
        except DependencyInjectionException:  # bound to a class that can't be made in these scopes
            return UNKNOWN
        if found is asked:
            return NOTHING
        holder = getattr(found.call, "__self__", None)
        return holder.registered if isinstance(holder, _Registered) else UNKNOWN

    def register(self, registered: object, types: Sequence[type[Any]]) -> None:
        """See :class:`silbo.containers._adapter.Adapter`."""
        call = _Registered(registered).get

        def bound(param: inspect.Parameter | None, dependent: DependentBase[Any]) -> DependentBase[Any] | None:
            if dependent.call not in types:
                return None
            # In the scope of the component that asks, for the host names its scopes. Uncached: di refuses a call in two scopes.
            return Dependent(call, scope=dependent.scope, use_cache=False)

        self.container.bind(bound)


class _Registered:
    def __init__(self, registered: object) -> None:
        self.registered = registered

    def get(self) -> object:
        return self.registered


class _Scope:
    def __init__(self, adapter: DIContainer, state: di.ScopeState) -> None:
        self._adapter = adapter
        self._state = state

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
    """Register one dispatcher in the container, under every type that a component may ask for.

    Those are ``whistle.IAsyncEventDispatcher`` (which is ``silbo.IAsyncEventDispatcher``), and the dispatcher's own class
    with all its bases down to ``silbo.AsyncEventDispatcher`` and ``whistle.AsyncEventDispatcher``.

    Args:
        container: The one that gets the dispatcher; a later bind takes precedence.
        dispatcher: Your own dispatcher, perhaps of a class of yours; by default a new one, whose listener classes are made by
            this container.

    Returns:
        The dispatcher, which the container gives from now on. You close it yourself.

    Raises:
        TypeError: it is not a silbo dispatcher.
        DispatcherConflict: the container has another dispatcher; nothing was bound.
    """
    return DIContainer(container).register_dispatcher(dispatcher)


def _is_central(call: object) -> TypeGuard[type[Any]]:
    return isinstance(call, type) and (issubclass(call, WhistleDispatcher | Mediator) or call is IAsyncEventDispatcher)


def _name(call: object) -> str:
    return getattr(call, "__qualname__", repr(call))
