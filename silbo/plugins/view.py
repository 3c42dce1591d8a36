"""The view of the dispatcher that a plugin gets: what the plugin adds through it is the plugin's own."""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Callable
from types import CodeType
from typing import TYPE_CHECKING, Any, Final, NoReturn
from weakref import WeakKeyDictionary

from silbo.dispatch.dispatcher import AsyncEventDispatcher
from silbo.dispatch.listeners import registry_of
from silbo.dispatch.on_loop import Unmarked
from silbo.dispatch.policy_listener import as_coroutine
from silbo.dispatch.subscribers import Subscribers
from silbo.dispatch.tasks import background_of
from silbo.errors import PluginForbidden, PluginUnloaded
from silbo.plugins.scope import PluginScope

if TYPE_CHECKING:
    from silbo.dispatch.listeners import Registration
    from silbo.dispatch.sync_callers import Portal

__all__ = ["PluginView", "make_view"]

_OWN: Final = ("scope", "_root", "_subscribers")
"""The attributes that a view has itself; every other is the dispatcher's."""


class PluginView(AsyncEventDispatcher):
    """The host's dispatcher, as one plugin sees it: a dispatcher with the same methods, of the same class.

    What is added through it belongs to the plugin, and is removed with it. It removes only what is the plugin's own. The host
    alone closes and drains the dispatcher.

    What the host's class overrides is called: ``listen``, ``add_subscriber``, ``remove_subscriber`` and ``wait_for`` on the view,
    where attributes are those of the dispatcher, the others on the dispatcher itself.

    Attributes:
        scope: The plugin's scope: ``view.scope.create_task(...)``.
    """

    scope: PluginScope
    _root: AsyncEventDispatcher

    # -- the plugin's own -----------------------------------------------------------------------------------

    def add_listener(self, name: Any, listener: Any, /, **options: Any) -> Registration:
        """Register a listener of the plugin; see :meth:`silbo.AsyncEventDispatcher.add_listener`.

        Raises:
            PluginUnloaded: The plugin was unloaded.
        """
        self._check_loaded()
        with registry_of(self._root).adding_for(self.scope.owner):
            return self._root.add_listener(name, listener, **options)

    def remove_listener(self, name: Any, listener: Any, /) -> None:
        """Remove every registration of a listener that the plugin itself has made for a name.

        Raises:
            ValueError: No listener was ever registered for this name.
        """
        with registry_of(self._root).adding_for(self.scope.owner):
            self._root.remove_listener(name, listener)

    def add_subscriber(self, subscriber: object, /) -> Registration:
        """Register every ``@on`` method of an object; see :meth:`silbo.AsyncEventDispatcher.add_subscriber`."""
        return super().add_subscriber(subscriber)

    def remove_subscriber(self, subscriber: object, /) -> None:
        """Remove the listeners of an object that the plugin itself has added."""
        super().remove_subscriber(subscriber)

    def spawn(self, name: Any, event: Any = None, /) -> asyncio.Task[Any]:
        """Dispatch in a new task, which is cancelled when the plugin is unloaded."""
        self._check_loaded()
        task = self.scope.hold(self._root.spawn(name, event))
        background_of(self._root).name_plugin(task, self.scope.name)
        return task

    async def wait_for(
        self, name: Any, /, *, where: Callable[[Any], object] | None = None, timeout: float | None = None
    ) -> Any:
        """Wait for the next event of a name; see :meth:`silbo.AsyncEventDispatcher.wait_for`.

        Raises:
            PluginUnloaded: The plugin was unloaded, before or meanwhile.
        """
        self._check_loaded()
        return await super().wait_for(name, where=where, timeout=timeout)

    # -- the dispatcher's -----------------------------------------------------------------------------------

    def get_listeners(self, name: Any = None, /) -> Any:
        """Return the listeners of the dispatcher, of the host and of all plugins."""
        return self._root.get_listeners(name)

    def has_listeners(self, name: Any = None, /) -> bool:
        """Return True if a dispatch of the name would run a listener, of the host or of any plugin."""
        return self._root.has_listeners(name)

    def describe(self, name: Any = None, /) -> Any:
        """Return the listeners of a name in running order, each with its plugin."""
        return self._root.describe(name)

    async def adispatch(self, name: Any, event: Any = None, /) -> Any:
        """Dispatch to the listeners of the host and of all plugins."""
        dispatched = self._root.adispatch(name, event)
        on_loop = self.scope.owner.on_loop
        if on_loop.coroutine is None:  # no listener of a plugin calls
            return await dispatched
        return await Unmarked(on_loop, as_coroutine(dispatched))

    async def _adispatch(self, listeners: Any, event: Any, /) -> None:
        await self._root._adispatch(listeners, event)  # noqa: SLF001  # the method that a host may override

    def dispatch(self, name: Any, event: Any = None, /) -> Any:
        """Raise, as on every async dispatcher."""
        return self._root.dispatch(name, event)

    def portal(self) -> Portal:
        """Return the way into this event loop for other threads."""
        return self._root.portal()

    # -- the host's -----------------------------------------------------------------------------------------

    def observe(self, observer: object, /) -> NoReturn:
        """Refuse: the host observes its dispatcher.

        Raises:
            PluginForbidden: Always.
        """
        raise _forbidden(self, "observe()")

    async def drain(self, timeout: float | None = None) -> NoReturn:
        """Refuse: the host drains its dispatcher.

        Raises:
            PluginForbidden: Always.
        """
        raise _forbidden(self, "drain()")

    async def aclose(self) -> NoReturn:
        """Refuse: the host closes its dispatcher.

        Raises:
            PluginForbidden: Always.
        """
        raise _forbidden(self, "aclose()")

    async def __aenter__(self) -> NoReturn:
        raise _forbidden(self, "async with")

    def __setattr__(self, attribute: str, value: Any) -> None:
        if sys._getframe(1).f_code not in _codes_of(type(self._root)):  # noqa: SLF001  # the code that sets it
            raise _forbidden(self, f"setting .{attribute}")
        setattr(self._root, attribute, value)  # a method of the host's class, called on the view

    def __delattr__(self, attribute: str) -> None:
        raise _forbidden(self, f"deleting .{attribute}")

    def __getattr__(self, attribute: str) -> Any:
        if attribute in _OWN:
            raise AttributeError(attribute)
        return getattr(self._root, attribute)

    def __repr__(self) -> str:
        return f"<view of {self._root!r} for plugin {self.scope.name!r}>"

    def _check_loaded(self) -> None:
        if self.scope.is_closed:
            raise PluginUnloaded(self.scope.name, "it is unloaded")


def _forbidden(view: PluginView, what: str) -> PluginForbidden:
    return PluginForbidden(view.scope.name, f"{what} is for the host alone; a plugin has a view of the dispatcher")


def make_view(dispatcher: AsyncEventDispatcher, scope: PluginScope) -> PluginView:
    """Return a view of a dispatcher, which is an object of the dispatcher's class, too."""
    view: PluginView = object.__new__(_view_class(type(dispatcher)))
    vars(view).update(scope=scope, _root=dispatcher, _subscribers=Subscribers())
    return view


_classes: Final[WeakKeyDictionary[type, type[PluginView]]] = WeakKeyDictionary()


def _view_class(cls: type[AsyncEventDispatcher]) -> type[PluginView]:
    """Return the class of the views of a host's class. What the host has added to it is called on the dispatcher itself."""
    if cls not in _classes:
        if cls is AsyncEventDispatcher:
            return PluginView
        added = {name: _delegate(name) for name in dir(cls) if not hasattr(AsyncEventDispatcher, name)}
        _classes[cls] = type(f"PluginView of {cls.__qualname__}", (PluginView, cls), added)
    return _classes[cls]


def _codes_of(cls: type) -> set[CodeType]:
    """Return the code of the methods that a host's class has beside those of silbo's."""
    own = cls.__mro__[: cls.__mro__.index(AsyncEventDispatcher)]
    methods = (inspect.unwrap(method) for one in own for method in vars(one).values() if callable(method))
    return {method.__code__ for method in methods if hasattr(method, "__code__")}


def _delegate(name: str) -> property:
    return property(lambda view: PluginView.__getattr__(view, name))
