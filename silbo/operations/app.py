"""A host's own objects, found by a reference such as ``shop.web:dispatcher``."""

from __future__ import annotations

import inspect
import pkgutil
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Final, TypeVar

from silbo._checks import describe_object
from silbo._whistle import WhistleDispatcher
from silbo.consumer.consumer import Consumer
from silbo.dispatch.dispatcher import AsyncEventDispatcher
from silbo.errors import AppFailed, AppInvalid
from silbo.mediator.mediator import Mediator
from silbo.outbox.outbox import Outbox
from silbo.outbox.relay import Relay
from silbo.plugins.plugins import Plugins, plugins_of

__all__ = ["App", "find_app", "open_app"]

FORM: Final = "write module:attribute, as shop.web:dispatcher"
KINDS: Final = (
    "a dispatcher, a consumer, a list of them, an app that holds one, a function that returns one, or an async context manager "
    "that yields one"
)
SHOWN: Final = 5
"""Most names that an error shows."""
_PARTS: Final = (AsyncEventDispatcher, Consumer, Plugins, Mediator, Outbox, Relay)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class App:
    """The dispatchers, consumers, plugins, outboxes and relays that a reference has led to.

    Attributes:
        reference: As it was given.
        dispatchers: The dispatchers by the reference that leads to each.
        consumers: The consumers.
        plugins: The ``Plugins`` objects, those of the dispatchers included.
        outboxes: The outboxes.
        relays: The relays without an outbox.
    """

    reference: str
    dispatchers: Mapping[str, AsyncEventDispatcher]
    consumers: tuple[Consumer, ...]
    plugins: tuple[Plugins, ...]
    outboxes: tuple[Outbox, ...] = ()
    relays: tuple[Relay, ...] = ()

    @property
    def dispatcher(self) -> AsyncEventDispatcher:
        """The only dispatcher.

        Raises:
            AppInvalid: There are several, or none.
        """
        if not self.dispatchers:
            raise AppInvalid(self.reference, "it has an outbox or a relay, and no dispatcher: name one that has")
        if len(self.dispatchers) > 1:
            problem = (
                f"it has {len(self.dispatchers)} dispatchers, {', '.join(self.dispatchers)}: name one that is an attribute, "
                "or a function that returns one"
            )
            raise AppInvalid(self.reference, problem)
        return next(iter(self.dispatchers.values()))


@asynccontextmanager
async def open_app(reference: str, *, app_dir: str | None = None, lifespan: bool = False) -> AsyncGenerator[App]:
    """Import the module of a reference, and find what its attribute has.

    The attribute is a dispatcher, a consumer, a ``Plugins``, a mediator or an outbox; a list of them; an object that holds one as its own
    attribute, in its ``state`` (FastAPI, Starlette) or as an item (aiohttp); a function without arguments, sync or async, that
    returns any of these; or an async context manager that yields any of these, which stays open for the block. No other module is
    imported.

    Args:
        reference: ``package.module:attribute``; the attribute may have dots.
        app_dir: A folder to import from, before all others; None for no change of ``sys.path``.
        lifespan: If true, the lifespan of a web application (Starlette, FastAPI) runs for the block, with all that it starts:
            consumers, a relay. By default it does not, and what it makes is not found.

    Raises:
        AppInvalid: There is no such module or attribute, or it has nothing of silbo's.
        AppFailed: The host's own code has failed: the module at its import, the function, or the context manager at its start.
    """
    if app_dir is not None:
        _import_from(app_dir)
    value = _find_attribute(reference)
    async with AsyncExitStack() as stack:
        found = _Found(reference)
        found.collect(value)
        if not found and _is_factory(value):
            value = await _call(reference, value)
            found.collect(value)
        if lifespan and (context := getattr(getattr(value, "router", None), "lifespan_context", None)) is not None:
            state = await _guard(reference, "its lifespan", stack.enter_async_context(context(value)))
            found = _Found(reference)
            found.collect(value)
            found.collect(state)
        if (
            not found and hasattr(type(value), "__aenter__") and not isinstance(value, Outbox | Relay)
        ):  # which would send
            given = await _guard(reference, "its start", stack.enter_async_context(value))
            found.collect(value if given is None else given)
        if not (found or found.outboxes or found.relays):
            raise AppInvalid(reference, _explain_nothing(reference, value, found, lifespan=lifespan))
        yield found.to_app()


def find_app(value: object, reference: str) -> App:
    """Return the dispatchers, consumers, plugins, outboxes and relays that an object holds, itself included. Nothing is imported or called.

    Args:
        value: As the attribute of :func:`open_app`, but for functions and context managers.
        reference: The words for it.

    Returns:
        Possibly without any.
    """
    found = _Found(reference)
    found.collect(value)
    return found.to_app()


class _Found:
    """The objects found so far, by the reference that leads to each."""

    def __init__(self, reference: str) -> None:
        self._reference = reference
        self.dispatchers: dict[str, AsyncEventDispatcher] = {}
        self.consumers: list[Consumer] = []
        self.plugins: list[Plugins] = []
        self.outboxes: list[Outbox] = []
        self.relays: list[Relay] = []
        self.foreign: list[str] = []  # dispatchers of Whistle's own
        self._seen: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return bool(self.dispatchers)

    def collect(self, value: Any) -> None:
        """Add an object, its items if it is a list or mapping, or what it holds."""
        self._collect(value, self._reference, looks_inside=True)

    def to_app(self) -> App:
        return App(
            reference=self._reference,
            dispatchers=self.dispatchers,
            consumers=tuple(self.consumers),
            plugins=tuple(self.plugins),
            outboxes=tuple(self.outboxes),
            relays=tuple(self.relays),
        )

    def _collect(self, value: Any, path: str, *, looks_inside: bool) -> None:
        if isinstance(value, type | ModuleType | str | bytes) or id(value) in self._seen:
            return
        self._seen[id(value)] = value  # so that no other object gets its id
        if self._add(value, path):
            return
        if isinstance(value, Mapping) and (looks_inside or isinstance(value, dict)):  # another one may be a store
            for key, item in value.items():
                self._collect(item, f"{path}[{key!r}]", looks_inside=False)
        elif isinstance(value, list | tuple | set | frozenset):
            for number, item in enumerate(value):
                self._collect(item, f"{path}[{number}]", looks_inside=False)
        if not looks_inside or inspect.isroutine(value):
            return
        for name, item in _attributes(value):
            self._collect(item, f"{path}.{name}", looks_inside=False)
        state = getattr(value, "state", None)
        for name, item in _attributes(state):
            if name == "_state" and isinstance(item, dict):  # Starlette's keeps its attributes in a dict
                for key, inside in item.items():
                    self._collect(inside, f"{path}.state.{key}", looks_inside=False)
            else:
                self._collect(item, f"{path}.state.{name}", looks_inside=False)

    def _add(self, value: Any, path: str) -> bool:
        """Add an object of one of the classes that are looked for. True if it is one."""
        if isinstance(value, AsyncEventDispatcher):
            if all(value is not other for other in self.dispatchers.values()):
                self.dispatchers[path] = value
                for plugins in plugins_of(value):
                    self._add_plugins(plugins)
        elif isinstance(value, Consumer):
            self.consumers.append(value)
            self._add(value.dispatcher, f"{path}.dispatcher")
        elif isinstance(value, Plugins):
            self._add_plugins(value)
            self._add(value.dispatcher, f"{path}.dispatcher")
        elif isinstance(value, Mediator):
            self._add(value.dispatcher, f"{path}.dispatcher")
        elif isinstance(value, Outbox):
            self.outboxes.append(value)
        elif isinstance(value, Relay):
            self.relays.append(value)
        elif isinstance(value, WhistleDispatcher):
            self.foreign.append(path)
        else:
            return False
        return True

    def _add_plugins(self, plugins: Plugins) -> None:
        if all(plugins is not other for other in self.plugins):
            self.plugins.append(plugins)


def _attributes(value: Any) -> list[tuple[str, Any]]:
    slots = [slot for cls in type(value).__mro__ for slot in getattr(cls, "__slots__", ())]
    return [*getattr(value, "__dict__", {}).items(), *((slot, getattr(value, slot, None)) for slot in slots)]


# -- from a reference to its object -------------------------------------------------------------------------


def _import_from(folder: str) -> None:
    sys.path.insert(0, str(Path(folder).resolve()))


def _find_attribute(reference: str) -> Any:
    name, colon, path = reference.partition(":")
    if name.endswith(".py") or not all(part.isidentifier() for part in name.split(".")):
        raise AppInvalid(reference, f"{name!r} is no name of a module: {FORM}{_suggest_form(reference)}")
    module = _import(reference, name)
    if not colon or not path:
        raise AppInvalid(reference, f"{FORM}{_list_candidates(module)}")
    value: Any = module
    for part in path.split("."):
        try:
            value = getattr(value, part)
        except AttributeError:
            raise AppInvalid(reference, _explain_missing(value, module, part)) from None
    return value


def _import(reference: str, name: str) -> ModuleType:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise AppFailed(reference, "its import", error) from error
        missing = error.name
    except (Exception, SystemExit) as error:  # a module is any code: one that exits doesn't end the command
        if isinstance(error, RuntimeError) and "asyncio.run() cannot be called" in str(error):
            problem = (
                f"{name} runs a program when it is imported: write asyncio.run(...) under `if __name__ == '__main__':`"
            )
            raise AppInvalid(reference, problem) from error
        raise AppFailed(reference, "its import", error) from error
    parent, _, last = missing.rpartition(".")
    folders = sys.modules[parent].__path__ if parent else [folder or "." for folder in sys.path[:1]]
    known = [module.name for module in pkgutil.iter_modules(folders)]
    problem = f"there is no module {missing!r} in {', '.join(map(str, folders))}"
    if near := get_close_matches(last, known, 1):
        problem += f"; did you mean {'.'.join(filter(None, (parent, near[0])))!r}?"
    elif not parent:
        problem += "; --app-dir says where else it is"
    raise AppInvalid(reference, problem)


def _explain_missing(value: Any, module: ModuleType, attribute: str) -> str:
    names = [name for name in dir(value) if not name.startswith("__")]
    where = module.__name__ if value is module else describe_object(value)
    problem = f"{where} has no attribute {attribute!r}"
    if near := get_close_matches(attribute, names, 1):
        return f"{problem}; did you mean {near[0]!r}?"
    return problem + _list_candidates(module)


def _list_candidates(module: ModuleType) -> str:
    """Return the end of a sentence: the attributes of a module that a reference can lead to."""
    candidates = [name for name, value in vars(module).items() if isinstance(value, _PARTS)]
    more = ", ..." if len(candidates) > SHOWN else ""
    return f"; {module.__name__} has {', '.join(candidates[:SHOWN])}{more}" if candidates else ""


def _suggest_form(reference: str) -> str:
    """Return the end of a sentence: the reference that a path of a file may mean."""
    file, _, attribute = reference.partition(":")
    if not Path(file).is_file():
        return ""
    module = ".".join(Path(file).with_suffix("").parts)
    return f"; did you mean {module}:{attribute or 'dispatcher'}?"


# -- from an object to what it has --------------------------------------------------------------------------


def _is_factory(value: Any) -> bool:
    return callable(value) and (isinstance(value, type) or inspect.isroutine(value) or isinstance(value, partial))


async def _call(reference: str, factory: Callable[[], Any]) -> Any:
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise AppInvalid(
            reference, f"a function is called without arguments, and this one can't be ({error}); name one that can"
        ) from None
    except ValueError:
        pass  # a function written in C tells no signature

    async def call() -> Any:
        made = factory()
        return await made if inspect.isawaitable(made) else made

    return await _guard(reference, "its call", call())


async def _guard(reference: str, step: str, work: Awaitable[_T]) -> _T:
    try:
        return await work
    except (Exception, SystemExit) as error:  # as above
        raise AppFailed(reference, step, error) from error


def _explain_nothing(reference: str, value: Any, found: _Found, *, lifespan: bool) -> str:
    if found.foreign:
        return "it is a dispatcher of Whistle's own, which tells no priorities: make it a silbo.AsyncEventDispatcher"
    what = describe_object(value)
    if inspect.isasyncgen(value):
        what += " (put @contextlib.asynccontextmanager above its function)"
    elif hasattr(type(value), "__enter__") and not hasattr(type(value), "__aenter__"):
        what += " (a context manager has to be async)"
    elif lifespan and hasattr(value, "router"):
        return (
            f"it is {what}, and its lifespan has run and left none of silbo's objects in it: keep one in its state, as "
            "app.state.dispatcher = dispatcher; or name it where it is"
        )
    elif hasattr(value, "router") or hasattr(value, "state"):
        return (
            f"it is {what}, and holds none of silbo's objects before its lifespan has run: name the function or the async "
            "context manager that makes them; or let the lifespan run, with all that it starts: --lifespan"
        )
    module = sys.modules[reference.partition(":")[0]]
    return f"it is {what}, and has none of silbo's objects: name {KINDS}{_list_candidates(module)}"
