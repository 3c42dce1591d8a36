"""The record of a plugin: its set-up, and what it states of itself."""

from __future__ import annotations

import inspect
import re
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeAlias

from silbo._checks import check_list, describe_object
from silbo.dispatch.dispatcher import AsyncEventDispatcher
from silbo.dispatch.listeners import Registration
from silbo.dispatch.options import is_async
from silbo.dispatch.subscribers import is_subscriber
from silbo.errors import PluginInvalid
from silbo.event import declared_fields

__all__ = ["NAME", "Plugin", "as_plugin", "open_plugin"]

NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
"""The pattern of a plugin's name: that of a distribution's name."""

_KINDS = (
    "a plugin is a function that takes the dispatcher, an async context manager that takes it "
    "(contextlib.asynccontextmanager), a class or object with @silbo.on methods, or a silbo.Plugin of one of them; the "
    "function itself, not the result of a call"
)

_Kind: TypeAlias = Literal["function", "class", "object"]


@dataclass(frozen=True, slots=True)
class Plugin:
    """A plugin: its set-up, and what it states of itself.

    Args:
        setup: One of:

            - a function, sync or async, that takes the dispatcher, adds listeners to it and returns None;
            - an async context manager function (``contextlib.asynccontextmanager``) that takes the dispatcher: the part before
              its ``yield`` is the set-up, the part after it the tear-down;
            - a class whose objects are such async context managers;
            - a class with ``@silbo.on`` methods, which takes no argument. If its objects are async context managers, they are
              entered before their listeners are added;
            - an object with ``@silbo.on`` methods, or one that is an async context manager, or both.

            With ``settings``, a function or class takes one argument more, the settings, at the end.
        name: Letters, digits and ``. _ -``; by default the name of the function or class.
        version: As ``"1.2"``. From an entry point, the version of its distribution by default.
        host_version: The versions of the host that the plugin works with, as ``">=2,<3"`` (PEP 440).
        requires: The plugins that have to be loaded before this one, each with its versions if they matter: ``"audit"``,
            ``"audit>=1.2,<2"``. To compare versions takes ``pip install 'silbo[plugins]'``.
        settings: The class of its settings: a dataclass, msgspec Struct, attrs class or pydantic model.
        before: Names of plugins. The listeners of this plugin run before theirs, among those of equal priority.
        after: Names of plugins. The listeners of this plugin run after theirs, among those of equal priority.

    Attributes:
        kind: ``"function"``, ``"class"`` or ``"object"``, whichever the set-up is.

    Raises:
        PluginInvalid: The set-up is no plugin, or can't be called as said above; the name or the settings are none.
        TypeError: ``requires``, ``before`` or ``after`` is not a list.
    """

    setup: Any
    _: KW_ONLY
    name: str = ""
    version: str | None = None
    host_version: str | None = None
    requires: Sequence[str] = ()
    settings: type | None = None
    before: Sequence[str] = ()
    after: Sequence[str] = ()
    kind: _Kind = field(init=False, repr=False)

    def __post_init__(self) -> None:
        name = self.name or _definition(self.setup).__name__
        kind = _find_kind(name, self.setup)
        if not re.fullmatch(NAME, name):
            raise PluginInvalid(
                name, "this is no name: give one of letters, digits and . _ -, Plugin(..., name='audit')"
            )
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "kind", kind)
        for attribute in ("requires", "before", "after"):
            object.__setattr__(self, attribute, check_list(attribute, getattr(self, attribute)))
        settings: Any = self.settings
        if settings is not None and not (isinstance(settings, type) and declared_fields(settings) is not None):
            raise PluginInvalid(
                name,
                f"settings is a dataclass, msgspec Struct, attrs class or pydantic model, not {describe_object(settings)}",
            )
        _check_arguments(self)

    @property
    def default_name(self) -> str:
        """The name of the function or class: that of the plugin, if it states none and comes from no entry point."""
        return str(_definition(self.setup).__name__)

    @property
    def package(self) -> str:
        """The top package in which the set-up is defined."""
        return str(_definition(self.setup).__module__).partition(".")[0]


def as_plugin(candidate: object, *, name: str | None = None) -> Plugin:
    """Return what a host was handed in as a plugin: a :class:`Plugin` as it is, anything else as the ``setup`` of one.

    Args:
        candidate: A Plugin, or what ``Plugin(setup)`` takes.
        name: The name of the plugin, in place of its own.

    Raises:
        PluginInvalid: The object is no plugin.
    """
    if isinstance(candidate, Plugin):
        return candidate if name is None else replace(candidate, name=name)
    return Plugin(candidate, name=name or "")


@asynccontextmanager
async def open_plugin(plugin: Plugin, view: AsyncEventDispatcher, settings: object = None) -> AsyncGenerator[object]:
    """Run the set-up of a plugin; at the end of the block, run its tear-down.

    The listeners of a subscriber are added, and not removed at the end: who owns the view removes everything that was added
    through it.

    Args:
        plugin: The plugin.
        view: The dispatcher that the plugin gets.
        settings: An object of the plugin's class of settings, if it states one.

    Yields:
        The object of the plugin: the subscriber or the async context manager; None if its set-up is a function.

    Raises:
        PluginInvalid: The set-up returned what nothing would use: a coroutine, a generator.
        Exception: The error of the set-up or tear-down, as it is.
    """
    async with AsyncExitStack() as stack:
        made = plugin.setup if plugin.kind == "object" else plugin.setup(*_arguments(plugin, view, settings))
        if plugin.kind == "function":
            if is_async(plugin.setup):
                made = await made
            elif _is_context_manager(made):
                await stack.enter_async_context(made)
                made = None
            _check_returned(plugin, made)
            made = None
        else:
            if _is_context_manager(made):
                await stack.enter_async_context(made)
            if is_subscriber(made):
                view.add_subscriber(made)
        yield made


def _definition(setup: Any) -> Any:
    """Return the function or class that a set-up is, calls, or is an object of."""
    while isinstance(setup, partial):
        setup = setup.func
    return setup if hasattr(setup, "__name__") and hasattr(setup, "__module__") else type(setup)


def _find_kind(name: str, setup: Any) -> _Kind:
    if isinstance(setup, type):
        if is_subscriber(setup) or _is_context_manager(setup):
            return "class"
    elif is_subscriber(setup) or (_is_context_manager(setup) and type(setup).__module__ != "contextlib"):
        return "object"
    elif callable(setup) and type(setup).__module__ != "contextlib":
        return "function"
    raise PluginInvalid(name, f"{describe_object(setup)} is no plugin: {_KINDS}")


def _is_context_manager(candidate: object) -> bool:
    cls = candidate if isinstance(candidate, type) else type(candidate)
    return hasattr(cls, "__aenter__") and hasattr(cls, "__aexit__")


def _arguments(plugin: Plugin, view: object, settings: object) -> tuple[object, ...]:
    """Return the arguments of a set-up that is a function or class."""
    takes_view = plugin.kind == "function" or not is_subscriber(plugin.setup)
    return (*((view,) if takes_view else ()), *((settings,) if plugin.settings is not None else ()))


def _check_arguments(plugin: Plugin) -> None:
    if plugin.kind == "object":
        if plugin.settings is not None:
            raise PluginInvalid(plugin.name, "an object has been made already, so it gets no settings: give its class")
        return
    arguments = _arguments(plugin, "the dispatcher", "its settings")
    try:
        inspect.signature(plugin.setup).bind(*arguments)
    except TypeError as error:
        called = " and ".join(map(str, arguments)) or "no argument"
        hint = "" if plugin.settings is not None else " (if it wants its settings: state their class, settings=)"
        raise PluginInvalid(plugin.name, f"its set-up is called with {called}: {error}{hint}") from None
    except ValueError:
        pass  # a function written in C tells no signature


def _check_returned(plugin: Plugin, returned: object) -> None:
    if returned is None or isinstance(returned, Registration):
        return
    if inspect.iscoroutine(returned):
        returned.close()  # it would warn that it was never awaited
    raise PluginInvalid(
        plugin.name,
        f"its set-up returned {describe_object(returned)}, which nothing would use: a set-up returns None and is `async def` if "
        "it awaits; one with a tear-down has one `yield` and @contextlib.asynccontextmanager",
    )
