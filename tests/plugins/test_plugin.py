"""The record of a plugin: the kinds of set-up, what a plugin may state, and what is refused with which text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import FrozenInstanceError, dataclass
from functools import partial
from typing import Any

import pytest

import silbo
from silbo import AsyncEventDispatcher, Event
from silbo.errors import PluginInvalid
from silbo.plugins.plugin import Plugin, as_plugin, open_plugin


@dataclass
class Limits:
    size: int = 1


LIMITS = Limits(3)


async def listener(event: Event) -> None:
    event.heard = True  # type: ignore[attr-defined]


def names(d: AsyncEventDispatcher) -> set[Any]:
    return set(d.get_listeners())


class Audit:
    """A subscriber."""

    def __init__(self, settings: Limits | None = None) -> None:
        self.settings = settings

    @silbo.on("user.joined")
    async def heard(self, event: Event) -> None: ...


class Entered:
    """An async context manager that notes what is done with it."""

    def __init__(self, view: Any = None, settings: Limits | None = None) -> None:
        self.view = view
        self.settings = settings
        self.steps: list[str] = []

    async def __aenter__(self) -> str:
        self.steps.append("set up")
        return "not the plugin"

    async def __aexit__(self, *error: object) -> None:
        self.steps.append("torn down")


class EnteredSubscriber(Entered):
    def __init__(self, settings: Limits | None = None) -> None:
        super().__init__(None, settings)

    @silbo.on("user.joined")
    async def heard(self, event: Event) -> None: ...


# -- the kinds of set-up ------------------------------------------------------------------------------------


def sync_setup(view: AsyncEventDispatcher) -> None:
    view.add_listener("user.joined", listener)


async def async_setup(view: AsyncEventDispatcher) -> None:
    await asyncio.sleep(0)
    view.add_listener("user.joined", listener)


class Callee:
    async def __call__(self, view: AsyncEventDispatcher) -> None:
        await async_setup(view)

    def method(self, view: AsyncEventDispatcher) -> None:
        sync_setup(view)


FUNCTIONS = {
    "sync": sync_setup,
    "async": async_setup,
    "partial": partial(async_setup),
    "method": Callee().method,
    "async __call__": Callee(),
    "registration returned": lambda view: view.add_listener("user.joined", listener),
}


@pytest.mark.parametrize("setup", FUNCTIONS.values(), ids=FUNCTIONS)
async def test_function_gets_the_dispatcher(setup: Callable[..., Any]) -> None:
    d = AsyncEventDispatcher()
    async with open_plugin(Plugin(setup, name="audit"), d) as instance:
        assert instance is None
        assert names(d) == {"user.joined"}


@pytest.mark.parametrize("is_async", [False, True])
async def test_function_gets_the_settings_that_the_plugin_states(is_async: bool) -> None:
    got: list[Any] = []

    def setup(view: Any, settings: Any) -> None:
        got.extend((view, settings))

    async def setup_async(view: Any, settings: Any) -> None:
        setup(view, settings)

    d = AsyncEventDispatcher()
    async with open_plugin(Plugin(setup_async if is_async else setup, settings=Limits), d, LIMITS):
        assert got == [d, LIMITS]


async def test_optional_argument_of_a_function_stays_its_own() -> None:
    """A plugin that states no settings gets none, not a None in place of a default."""
    got: list[str] = []

    def setup(view: Any, prefix: str = "default") -> None:
        got.append(prefix)

    async with open_plugin(Plugin(setup), AsyncEventDispatcher()):
        assert got == ["default"]


async def test_context_manager_function_is_torn_down_at_the_end() -> None:
    steps: list[Any] = []

    @asynccontextmanager
    async def setup(view: AsyncEventDispatcher, settings: Limits) -> AsyncGenerator[str]:
        steps.extend((view, settings))
        yield "not the plugin"
        steps.append("torn down")

    d = AsyncEventDispatcher()
    async with open_plugin(Plugin(setup, settings=Limits), d, LIMITS) as instance:
        assert steps == [d, LIMITS]
        assert instance is None
    assert steps[2:] == ["torn down"]


@pytest.mark.parametrize("settings", [None, LIMITS])
async def test_class_of_context_managers_gets_the_dispatcher(settings: Limits | None) -> None:
    d = AsyncEventDispatcher()
    stated = None if settings is None else Limits
    async with open_plugin(Plugin(Entered, settings=stated), d, settings) as instance:
        assert isinstance(instance, Entered)
        assert (instance.view, instance.settings, instance.steps) == (d, settings, ["set up"])
    assert instance.steps == ["set up", "torn down"]


@pytest.mark.parametrize("settings", [None, LIMITS])
async def test_subscriber_class_gets_its_settings_and_is_added(settings: Limits | None) -> None:
    d = AsyncEventDispatcher()
    stated = None if settings is None else Limits
    async with open_plugin(Plugin(Audit, settings=stated), d, settings) as instance:
        assert isinstance(instance, Audit)
        assert instance.settings is settings
        assert names(d) == {"user.joined"}


async def test_each_opening_of_a_class_makes_a_new_object() -> None:
    plugin = Plugin(Audit)
    async with open_plugin(plugin, AsyncEventDispatcher()) as one:
        pass
    async with open_plugin(plugin, AsyncEventDispatcher()) as two:
        assert one is not two


async def test_subscriber_object_is_added_as_it_is() -> None:
    d = AsyncEventDispatcher()
    audit = Audit()
    async with open_plugin(Plugin(audit), d) as instance:
        assert instance is audit
        assert names(d) == {"user.joined"}


@pytest.mark.parametrize("setup", [EnteredSubscriber, EnteredSubscriber()], ids=["class", "object"])
async def test_subscriber_that_is_a_context_manager_is_set_up_before_it_listens(setup: Any) -> None:
    """No event reaches a plugin that has not opened what it needs."""
    d = AsyncEventDispatcher()
    added: list[list[str]] = []
    add = d.add_subscriber
    d.add_subscriber = lambda subscriber: (added.append([*subscriber.steps]), add(subscriber))[1]  # type: ignore[method-assign]
    async with open_plugin(Plugin(setup), d) as instance:
        assert isinstance(instance, EnteredSubscriber)
        assert added == [["set up"]]
        assert names(d) == {"user.joined"}
    assert instance.steps == ["set up", "torn down"]


async def test_object_that_is_a_context_manager_is_entered() -> None:
    entered = Entered()
    async with open_plugin(Plugin(entered), AsyncEventDispatcher()) as instance:
        assert instance is entered
    assert entered.steps == ["set up", "torn down"]


async def test_tear_down_runs_if_the_listeners_can_not_be_added() -> None:
    """A plugin that fails to load leaves nothing open."""
    d = AsyncEventDispatcher()
    d.add_subscriber = lambda subscriber: 1 / 0  # type: ignore[method-assign]
    entered = EnteredSubscriber()
    with pytest.raises(ZeroDivisionError):
        async with open_plugin(Plugin(entered), d):
            pass
    assert entered.steps == ["set up", "torn down"]


async def test_errors_of_the_set_up_come_as_they_are() -> None:
    async def setup(view: object) -> None:
        raise LookupError("no database")

    with pytest.raises(LookupError, match="no database"):
        async with open_plugin(Plugin(setup), AsyncEventDispatcher()):
            pass


def generator(view: object) -> Iterator[None]:
    yield


async def async_generator(view: object) -> AsyncIterator[None]:
    yield


async def returning(view: object) -> Any:
    return asynccontextmanager(async_generator)(view)


RETURNING_WASTE = {
    "coroutine": lambda view: async_setup(view),
    "generator": generator,
    "async generator": async_generator,
    "sync context manager": contextmanager(generator),
    "async function with a context manager": returning,
    "subscriber": lambda view: Audit(),
}


@pytest.mark.parametrize("setup", RETURNING_WASTE.values(), ids=RETURNING_WASTE)
async def test_set_up_that_returns_what_nothing_would_use_is_refused(setup: Callable[..., Any]) -> None:
    """Forgotten ``async``, ``await`` or ``@asynccontextmanager``: else the plugin would be loaded and do nothing."""
    with pytest.raises(PluginInvalid, match="nothing would use.*asynccontextmanager") as raised:
        async with open_plugin(Plugin(setup, name="audit"), AsyncEventDispatcher()):
            pass
    assert raised.value.plugin == "audit"


# -- what a plugin states -----------------------------------------------------------------------------------


def test_name_is_that_of_the_function_class_or_object() -> None:
    found = [as_plugin(each).name for each in (sync_setup, partial(async_setup), Audit, Audit(), Callee().method)]
    assert found == ["sync_setup", "async_setup", "Audit", "Audit", "method"]


def test_package_is_the_top_package_of_the_definition() -> None:
    """Listeners of this package are the plugin's, also those that it registers past its own dispatcher."""
    for each in (
        sync_setup,
        partial(sync_setup),
        asynccontextmanager(async_generator),
        Audit,
        Audit(),
        Callee().method,
    ):
        assert as_plugin(each).package == __name__.partition(".")[0]


def test_plugin_is_taken_as_it_is() -> None:
    plugin = Plugin(Audit, name="audit", version="1.2")
    assert as_plugin(plugin) is plugin
    assert as_plugin(plugin, name="second") == Plugin(Audit, name="second", version="1.2")
    assert as_plugin(Audit, name="second") == Plugin(Audit, name="second")


def test_plugin_is_frozen() -> None:
    plugin = Plugin(Audit, requires=["a"], before=["b"], after=["c"])
    assert (plugin.requires, plugin.before, plugin.after) == (("a",), ("b",), ("c",))
    with pytest.raises(FrozenInstanceError):
        plugin.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("argument", ["requires", "before", "after"])
def test_one_name_in_place_of_a_list_is_refused(argument: str) -> None:
    """A string is a list of letters: ``requires="audit"`` would require five plugins."""
    with pytest.raises(TypeError, match=f"{argument} is a list"):
        Plugin(Audit, **{argument: "audit"})


@pytest.mark.parametrize("name", ["a b", "-a", "a[b]", "a>1"])
def test_name_that_no_requirement_could_name_is_refused(name: str) -> None:
    with pytest.raises(PluginInvalid, match="no name"):
        Plugin(Audit, name=name)


def test_lambda_needs_a_name() -> None:
    with pytest.raises(PluginInvalid, match=r"'<lambda>': this is no name.*name='audit'"):
        Plugin(lambda view: None)


class Plain: ...


async def coroutine(view: object) -> None: ...


@pytest.fixture
def called() -> Generator[Any]:
    made = coroutine(None)
    yield made
    made.close()


def test_what_is_no_plugin_is_refused_with_what_is_one(called: Any) -> None:
    for candidate in (
        42,
        None,
        "acme:setup",
        pytest,
        Plain,
        Plain(),
        called,
        asynccontextmanager(async_generator)(None),
    ):
        with pytest.raises(
            PluginInvalid, match=r"is no plugin: a plugin is a function that takes the dispatcher"
        ) as raised:
            as_plugin(candidate)
        assert isinstance(raised.value, TypeError)


def two(view: object, settings: object) -> None: ...


def one(view: object) -> None: ...


def none() -> None: ...


class NeedsSettings(Audit):
    def __init__(self, settings: Limits) -> None:
        super().__init__(settings)


class NoSettings(Audit):
    def __init__(self) -> None: ...


@pytest.mark.parametrize(
    ("setup", "settings", "text"),
    [
        (two, None, "called with the dispatcher: missing a required argument: 'settings'.*state their class"),
        (none, None, "called with the dispatcher"),
        (one, Limits, "called with the dispatcher and its settings"),
        (NeedsSettings, None, "called with no argument: .*state their class"),
        (NoSettings, Limits, "called with its settings"),
        (Audit(), Limits, "an object has been made already"),
    ],
)
def test_set_up_with_other_arguments_is_refused_when_it_is_stated(setup: Any, settings: Any, text: str) -> None:
    """Before any plugin of the host is loaded."""
    with pytest.raises(PluginInvalid, match=text):
        Plugin(setup, settings=settings)


@pytest.mark.parametrize("settings", [dict, Plain, Limits(), "Limits"])
def test_settings_that_declare_no_fields_are_refused(settings: Any) -> None:
    with pytest.raises(PluginInvalid, match="settings is a dataclass"):
        Plugin(two, settings=settings)
