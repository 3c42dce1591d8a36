"""A loaded plugin: what it adds is its own, and is gone when it is unloaded."""

from __future__ import annotations

import asyncio
import gc
import inspect
import sys
import threading
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import whistle

from silbo import (
    AsyncEventDispatcher,
    Budget,
    Event,
    EventName,
    Plugin,
    PluginReport,
    Plugins,
    PluginView,
    Policy,
    in_thread,
    on,
)
from silbo.dispatch import in_thread as in_thread_module
from silbo.errors import (
    LoopConflict,
    PluginConflict,
    PluginForbidden,
    PluginMissing,
    PluginSettingsInvalid,
    PluginUnloaded,
)


async def hear(event: Event) -> None: ...


class Hears:
    """A subscriber."""

    @on("a")
    async def hear(self, event: Any) -> None:
        event.heard = [*getattr(event, "heard", ()), self]


# -- the view -----------------------------------------------------------------------------------------------


async def test_a_view_is_a_dispatcher_of_the_hosts_own_class() -> None:
    """A plugin typed against Whistle, or against the host's class, works unchanged; what the host added is called on it."""

    class HostDispatcher(AsyncEventDispatcher):
        def __init__(self) -> None:
            super().__init__()
            self.greeted: list[str] = []

        def greet(self, name: str) -> None:
            self.greeted.append(name)

        def add_listener(self, name: Any, listener: Any, /, *, priority: int = 0) -> Any:  # as Whistle declares it
            self.greeted.append(f"listener of {name}")
            return super().add_listener(name, listener, priority=priority)

    dispatcher = HostDispatcher()
    seen: list[Any] = []

    def setup(view: HostDispatcher) -> None:
        seen.append(view)
        view.greet("plugin")
        view.add_listener("a", hear, priority=3)

    async with Plugins(dispatcher) as plugins:
        await plugins.load(setup)
        (view,) = seen
        assert isinstance(view, HostDispatcher)
        assert isinstance(view, PluginView)
        assert isinstance(view, whistle.AsyncEventDispatcher)
        assert dispatcher.greeted == ["plugin", "listener of a"]
        assert view.get_listeners("a") == dispatcher.get_listeners("a") == (hear,)
        assert [(row.plugin, row.priority) for row in dispatcher.describe("a")] == [("setup", 3)]


async def test_what_the_host_overrides_is_called_by_a_plugin_too() -> None:
    """A host that counts, checks or logs what is added sees what plugins add, and it is the plugin's all the same."""

    class HostDispatcher(AsyncEventDispatcher):
        calls: tuple[str, ...] = ()

        def listen(self, name: Any, /, **options: Any) -> Any:
            self.calls += ("listen",)
            return super().listen(name, **options)

        def add_subscriber(self, subscriber: object, /) -> Any:
            self.calls += ("add_subscriber",)
            return super().add_subscriber(subscriber)

        def remove_subscriber(self, subscriber: object, /) -> None:
            self.calls += ("remove_subscriber",)
            super().remove_subscriber(subscriber)

        def remove_listener(self, name: Any, listener: Any, /) -> None:
            self.calls += ("remove_listener",)
            super().remove_listener(name, listener)

        async def wait_for(self, name: Any, /, **options: Any) -> Any:
            self.calls += ("wait_for",)
            return await super().wait_for(name, **options)

    dispatcher = HostDispatcher()
    removed = Hears()
    dispatcher.add_listener("a", hear)
    dispatcher.add_subscriber(removed)  # the host's own stays
    dispatcher.calls = ()

    def setup(view: PluginView) -> None:
        view.listen("a")(hear)
        view.add_subscriber(removed)
        view.remove_subscriber(removed)
        view.remove_listener("a", hear)
        view.add_subscriber(Hears())
        view.scope.create_task(view.wait_for("b"))

    async with Plugins(dispatcher, report=lambda report: None) as plugins:
        await plugins.load(setup)
        await asyncio.sleep(0)
        add, remove = "add_subscriber", "remove_subscriber"
        assert dispatcher.calls == ("listen", add, remove, "remove_listener", add, "wait_for")
        assert [row.name for row in plugins["setup"].listeners()] == ["a", "b"]
        assert len(dispatcher.describe("a")) == 3
        with pytest.raises(PluginForbidden, match=r"setting \.calls"):
            plugins["setup"].view.calls = ()  # type: ignore[attr-defined]
    assert len(dispatcher.describe()) == 2


async def test_a_plugin_dispatches_through_a_hosts_own_method_that_gives_a_task() -> None:
    class HostDispatcher(AsyncEventDispatcher):
        def adispatch(self, name: Any, event: Any = None, /) -> Any:
            return asyncio.ensure_future(super().adispatch(name, event))

    dispatcher = HostDispatcher()
    answers: list[Any] = []

    def setup(view: PluginView) -> None:
        async def ask(event: Event) -> None:
            answers.append(await view.adispatch("asked"))

        view.add_listener("a", ask)

    async with Plugins(dispatcher, policy=Policy(on_failure="raise")) as plugins:
        await plugins.load(setup)
        await dispatcher.adispatch("a")
    assert [answer.name for answer in answers] == ["asked"]


async def test_every_method_of_the_dispatcher_has_its_answer_in_the_view() -> None:
    """A new public method of the dispatcher must be decided for the view: the plugin's, the dispatcher's or the host's."""
    shared = {"listen", "__aexit__", "__init__"}  # through other methods; or never called on a view
    public = {
        name
        for cls in AsyncEventDispatcher.__mro__[:-1]
        for name, value in vars(cls).items()
        if inspect.isfunction(value) and (not name.startswith("_") or name in ("__aenter__", "__aexit__"))
    }
    assert public - vars(PluginView).keys() - shared == set()


async def test_a_view_removes_only_the_plugins_own() -> None:
    """The host's registration of the same listener stays, and so does another plugin's."""
    dispatcher = AsyncEventDispatcher()
    dispatcher.add_listener("a", hear)
    views: list[PluginView] = []

    def one(view: PluginView) -> None:
        view.add_listener("a", hear)
        views.append(view)

    async with Plugins(dispatcher) as plugins:
        await plugins.load(one)
        await plugins.load(one, name="other")
        assert [row.plugin for row in dispatcher.describe("a")] == [__name__, "one", "other"]
        views[0].remove_listener("a", hear)
        assert [row.plugin for row in dispatcher.describe("a")] == [__name__, "other"]
        views[0].remove_listener("a", hear)  # a known name: silent, as in Whistle
        with pytest.raises(ValueError, match="unknown"):
            views[0].remove_listener("unknown", hear)


async def test_the_host_alone_closes_drains_and_observes() -> None:
    """A call that would end or watch the whole host is refused, with the plugin's name."""
    dispatcher = AsyncEventDispatcher()
    async with Plugins(dispatcher) as plugins:
        view = (await plugins.load(lambda view: None, name="eager")).view
        for call in (view.aclose, view.drain, view.__aenter__):
            with pytest.raises(PluginForbidden, match="eager"):
                await call()
        with pytest.raises(PluginForbidden, match="eager"):
            view.observe(object())
        with pytest.raises(PluginForbidden, match="eager"):
            view.get_listeners = None
        with pytest.raises(NotImplementedError):
            view.dispatch("a")


async def test_an_events_dispatcher_is_the_root() -> None:
    """A listener that a host's listener registers through ``event.dispatcher`` is the host's, also in a plugin's dispatch."""
    dispatcher = AsyncEventDispatcher()

    async def grow(event: Event) -> None:
        event.dispatcher.add_listener("b", hear)

    dispatcher.add_listener("a", grow)
    async with Plugins(dispatcher) as plugins:
        scope = await plugins.load(lambda view: None, name="p")
        event = await scope.view.adispatch("a")
        assert event.dispatcher is dispatcher
        await plugins.unload("p")
    assert dispatcher.get_listeners("b") == (hear,)


# -- load ---------------------------------------------------------------------------------------------------


async def test_a_plugin_that_fails_to_load_is_never_half_loaded() -> None:
    """Its listeners, tasks and open resources are gone, and the error names it. Its listeners have heard nothing."""
    dispatcher = AsyncEventDispatcher()
    closed: list[str] = []
    heard: list[Any] = []
    tasks: list[asyncio.Task[Any]] = []

    async def listen(event: Event) -> None:
        heard.append(event)

    @asynccontextmanager
    async def resource() -> AsyncIterator[None]:
        yield
        closed.append("resource")

    async def setup(view: PluginView) -> None:
        view.add_listener("a", listen)
        tasks.append(view.scope.create_task(asyncio.Event().wait()))  # type: ignore[arg-type]
        await view.scope.stack.enter_async_context(resource())
        await view.adispatch("a")
        raise OSError("no licence")

    async with Plugins(dispatcher) as plugins:
        with pytest.raises(OSError, match="no licence") as caught:
            await plugins.load(setup, name="costly")
        assert "costly" in caught.value.__notes__[0]
        assert dispatcher.describe() == []
        assert (closed, heard) == (["resource"], [])
        assert tasks[0].cancelled()
        assert "costly" not in plugins
        await plugins.load(lambda view: None, name="costly")  # the name is free


class TakesNoNote(Exception):
    """An error that refuses a note in the way that it is made with."""

    def __init__(self, way: str) -> None:
        super().__init__("no")
        object.__setattr__(self, "way", way)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"frozen: {name}")

    def add_note(self, note: str, /) -> None:
        if self.way == "add_note":  # type: ignore[attr-defined]  # see __init__
            raise TypeError(note)
        super().add_note(note)

    @property
    def __notes__(self) -> object:
        if self.way == "notes":  # type: ignore[attr-defined]  # see __init__
            raise RuntimeError("no notes")
        return [3]


@pytest.mark.parametrize("way", ["frozen", "add_note", "notes"])
async def test_an_error_that_takes_no_note_is_as_any_other(way: str) -> None:
    """A failed set-up is undone, and a failed listener is isolated, if their error can't be given a note."""

    async def fail(event: Event) -> None:
        raise TakesNoNote(way)

    @asynccontextmanager
    async def broken(view: PluginView) -> AsyncIterator[None]:
        view.add_listener("a", hear)
        view.scope.create_task(asyncio.Event().wait())  # type: ignore[arg-type]
        raise TakesNoNote(way)
        yield

    dispatcher = AsyncEventDispatcher()
    reports: list[PluginReport] = []
    async with Plugins(dispatcher, report=reports.append) as plugins:
        failed = await plugins.load_all([broken])
        assert isinstance(failed["broken"], TakesNoNote)
        assert (dispatcher.describe(), len(asyncio.all_tasks())) == ([], 1)
        await plugins.load(lambda view: view.add_listener("a", fail), name="fails")
        await dispatcher.adispatch("a")
    assert [(report.kind, report.plugin) for report in reports] == [("not loaded", "broken"), ("failed", "fails")]


async def test_several_plugins_are_loaded_in_order_and_a_failure_holds_nobody_up() -> None:
    """Each after those that it requires; what fails, or needs what has failed, is reported; the others are loaded."""
    reports: list[PluginReport] = []
    loaded: list[str] = []

    def make(name: str, **states: Any) -> Plugin:
        return Plugin(lambda view: loaded.append(name), name=name, **states)

    def broken(view: Any) -> None:
        raise RuntimeError("broken set-up")

    async with Plugins(AsyncEventDispatcher(), report=reports.append) as plugins:
        failed = await plugins.load_all(
            [
                make("web", requires=["db"]),
                make("lonely", requires=["nobody"]),
                Plugin(broken, name="bad"),
                make("needs-bad", requires=["bad"]),
                make("db"),
                object(),
            ]
        )
        assert loaded == ["db", "web"]
        assert list(plugins) == ["db", "web"]
        assert {"lonely", "bad", "needs-bad"} < failed.keys()
        assert len(failed) == 4
        assert {report.kind for report in reports} == {"not loaded"}
        with pytest.raises(PluginConflict, match="web"):
            await plugins.unload("db")


async def test_a_circle_of_plugins_is_reported_and_the_others_are_loaded() -> None:
    """Plugins that require one another are left out, with the circle in the error."""
    async with Plugins(AsyncEventDispatcher(), report=lambda report: None) as plugins:
        failed = await plugins.load_all(
            [
                Plugin(lambda view: None, name="a", requires=["b"]),
                Plugin(lambda view: None, name="b", requires=["a"]),
                Plugin(lambda view: None, name="c"),
            ]
        )
        assert list(plugins) == ["c"]
        assert failed.keys() == {"a", "b"}
        assert "a -> b -> a" in str(failed["a"])


async def test_settings_come_from_the_host() -> None:
    """A plugin's settings are checked before its set-up runs."""
    from dataclasses import dataclass

    @dataclass
    class Limits:
        most: int = 3

    got: list[Limits] = []

    def setup(view: Any, settings: Limits) -> None:
        got.append(settings)

    plugin = Plugin(setup, settings=Limits)
    async with Plugins(AsyncEventDispatcher(), settings={"setup": {"most": 5}}) as plugins:
        await plugins.load(plugin)
        await plugins.reload("setup")
        with pytest.raises(PluginSettingsInvalid, match="mots"):
            await plugins.load(plugin, name="other", settings={"mots": 1})
        await plugins.load(plugin, name="third", settings={"most": 7})
    assert got == [Limits(5), Limits(5), Limits(7)]


async def test_a_misspelt_table_or_policy_is_told(tmp_path: Path) -> None:
    """The plugin would run with its defaults, or without the limits that the host has meant for it."""
    file = tmp_path / "plugins.toml"
    file.write_text("[audti]\nfolder = 'x'\n[audit2]\n[other]\n")
    reports: list[PluginReport] = []

    @dataclass
    class Folder:
        folder: str = "."

    def setup(view: Any, folder: Folder) -> None: ...

    audit, audit2 = (Plugin(setup, name=name, settings=Folder) for name in ("audit", "audit2"))
    policies = {"adit": Policy(timeout=1), "audit2": Policy()}
    async with Plugins(AsyncEventDispatcher(), settings=file, policies=policies, report=reports.append) as plugins:
        assert await plugins.load_all([audit, audit2]) == {}
        await plugins.load(Plugin(setup, name="third", settings=Folder))
        assert [(report.kind, report.plugin, report.text) for report in reports] == [
            (
                "misspelt",
                "audit",
                "the settings have no table for it, but 'audti' has one, and is no plugin: did you mean 'audit'?",
            ),
            (
                "misspelt",
                "audit",
                "policies= has no policy of its own for it, but 'adit' has one, and is no plugin: did you mean 'audit'?",
            ),
        ]


async def test_before_and_after_order_listeners_of_equal_priority() -> None:
    """Priority decides first; among equals a plugin runs before or after those that it names, and keeps its place on reload."""
    dispatcher = AsyncEventDispatcher()
    ran: list[str] = []

    def make(name: str, **states: Any) -> Plugin:
        async def hear(event: Any) -> None:
            ran.append(name)

        async def early(event: Any) -> None:
            ran.append(f"{name} early")

        def setup(view: Any) -> None:
            view.add_listener("a", hear)
            view.add_listener("a", early, priority=-1)

        return Plugin(setup, name=name, **states)

    async with Plugins(dispatcher) as plugins:
        await plugins.load(make("one"))
        await plugins.load(make("two"))
        await plugins.load(make("first", before=["one", "absent"]))
        await plugins.load(make("last", after=["two"]))
        order = ["first", "one", "two", "last"]
        for name in (None, "one", "first"):
            if name is not None:
                await plugins.reload(name)
            ran.clear()
            await dispatcher.adispatch("a")
            assert ran == [f"{name} early" for name in order] + order
            assert [row.name for row in plugins.describe()] == order
            for rows in (dispatcher.describe("a"), dispatcher.describe()):
                assert [row.plugin for row in rows] == order * 2
        with pytest.raises(PluginConflict, match="circle"):
            await plugins.load(make("odd", before=["two"], after=["last"]))
        assert "odd" not in plugins
        assert len(dispatcher.describe("a")) == 8


# -- unload -------------------------------------------------------------------------------------------------


async def test_unloading_removes_exactly_what_the_plugin_has() -> None:
    """Listeners, subscribers, tasks, pending waits and resources; then what it uses of its view is refused."""
    dispatcher = AsyncEventDispatcher()
    dispatcher.add_listener("a", hear)
    steps: list[str] = []
    tasks: list[asyncio.Task[Any]] = []

    @asynccontextmanager
    async def plugin(view: PluginView) -> AsyncIterator[None]:
        view.add_listener("a", hear)
        view.add_listener("**", hear, once=True)
        view.add_subscriber(Hears())
        view.scope.stack.callback(steps.append, "exit stack")
        tasks.append(view.scope.create_task(forever()))
        tasks.append(view.spawn("slow"))
        yield
        steps.append("tear-down")

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            steps.append("task")

    async def slow(event: Event) -> None:
        await asyncio.Event().wait()

    dispatcher.add_listener("slow", slow)
    async with Plugins(dispatcher) as plugins:
        scope = await plugins.load(plugin)
        waiting = asyncio.create_task(scope.view.wait_for("never"))
        await asyncio.sleep(0)
        assert {row.plugin for row in dispatcher.describe()} == {__name__, "plugin"}
        await plugins.unload("plugin")
        assert [row.listener for row in dispatcher.describe()] == [hear, slow]
        assert steps == ["task", "exit stack", "tear-down"]
        assert all(task.cancelled() for task in tasks)
        with pytest.raises(PluginUnloaded, match="plugin"):
            await waiting
        view = scope.view
        calls: list[Any] = [
            lambda: view.add_listener("a", hear),
            lambda: view.add_subscriber(Hears()),
            lambda: view.spawn("a"),
            lambda: scope.create_task(forever()),
        ]
        for call in calls:
            with pytest.raises(PluginUnloaded):
                call()
        with pytest.raises(PluginMissing, match="plugin"):
            await plugins.unload("plugin")


async def test_unloading_waits_for_listeners_that_run_and_ends_the_late_ones() -> None:
    """A listener in the middle of its work gets its time; one that takes too long is cancelled, and its change undone."""
    dispatcher = AsyncEventDispatcher()
    go, started = asyncio.Event(), asyncio.Semaphore(0)

    def plugin(view: PluginView) -> None:
        async def quick(event: Any) -> None:
            event.text = "half"
            started.release()
            await go.wait()
            event.text = "done"

        async def hung(event: Any) -> None:
            event.text = "half"
            started.release()
            await asyncio.Event().wait()

        view.add_listener("quick", quick)
        view.add_listener("hung", hung)

    class Said(Event):
        text = "before"

    reports: list[PluginReport] = []
    async with Plugins(dispatcher, report=reports.append) as plugins:
        await plugins.load(plugin)
        quick = asyncio.create_task(dispatcher.adispatch("quick", Said()))
        hung = asyncio.create_task(dispatcher.adispatch("hung", Said()))
        await started.acquire()
        await started.acquire()
        unloading = asyncio.create_task(plugins.unload("plugin", timeout=0.05))
        await asyncio.sleep(0)
        go.set()
        await unloading
        assert (await quick).text == "done"
        assert (await hung).text == "before"
        assert [(report.kind, type(report.error)) for report in reports] == [("failed", PluginUnloaded)]


@pytest.mark.parametrize("call", ["unload", "reload", "overlap"])
async def test_a_plugin_can_be_unloaded_from_inside_of_its_own_listener(call: str) -> None:
    """A command "unload me" does not wait for itself; nor does one in a task of the plugin."""
    dispatcher = AsyncEventDispatcher()
    done: list[str] = []

    async def act(plugins: Plugins) -> None:
        await asyncio.sleep(0)
        if call == "unload":
            await plugins.unload("own", timeout=60)
        else:
            await plugins.reload("own", overlap=call == "overlap", timeout=60)
        done.append(call)

    async with Plugins(dispatcher, policy=Policy(on_failure="raise")) as plugins:

        def own(view: PluginView) -> None:
            async def leave(event: Event) -> None:
                await act(plugins)

            async def by_task(event: Event) -> None:
                view.scope.create_task(act(plugins))

            view.add_listener("leave", leave)
            view.add_listener("task", by_task)

        for name in ("leave", "task"):
            if "own" not in plugins:
                await plugins.load(own)
            async with asyncio.timeout(50):
                await dispatcher.adispatch(name)
                while not done:
                    await asyncio.sleep(0)
            assert done == [call]
            assert ("own" in plugins) == (call != "unload")
            assert len(dispatcher.describe()) == (0 if call == "unload" else 2)
            done.clear()


@pytest.mark.parametrize("whose", ["listener", "task"])
@pytest.mark.parametrize("by", ["wait_for", "task", "gather", "wait", "shield", "group"])
async def test_a_plugin_may_wait_for_a_task_that_unloads_it(whose: str, by: str) -> None:
    """The unload does not wait for the listener that waits for it, and does not cancel a task that does; ``wait_for`` of Python 3.11 makes a task, too."""
    dispatcher = AsyncEventDispatcher()

    async with Plugins(dispatcher, policy=Policy(on_failure="raise")) as plugins:

        async def leave(event: object) -> None:
            unload = plugins.unload("own", timeout=0.01)  # then the listener would be ended with PluginUnloaded
            if by == "wait_for":
                await asyncio.wait_for(unload, 100)
            elif by == "task":
                await asyncio.create_task(unload)
            elif by == "gather":
                await asyncio.gather(asyncio.sleep(0), unload)
            elif by == "wait":
                await asyncio.wait([asyncio.create_task(unload)])
            elif by == "shield":
                await asyncio.shield(unload)
            else:
                async with asyncio.TaskGroup() as group:
                    group.create_task(unload)

        scope = await plugins.load(lambda view: view.add_listener("leave", leave), name="own")
        if whose == "listener":
            await dispatcher.adispatch("leave")
        else:
            await scope.create_task(leave(None))
        assert len(plugins) == 0


async def test_a_cancelled_unload_undoes_everything_all_the_same() -> None:
    """A host that shuts down in haste is left without a half-unloaded plugin."""
    dispatcher = AsyncEventDispatcher()
    steps: list[str] = []
    started = asyncio.Event()

    @asynccontextmanager
    async def plugin(view: PluginView) -> AsyncIterator[None]:
        async def hang(event: Event) -> None:
            started.set()
            await asyncio.Event().wait()

        view.add_listener("a", hang)
        task = view.scope.create_task(asyncio.Event().wait())  # type: ignore[arg-type]
        task.add_done_callback(lambda task: steps.append("task"))
        yield
        steps.append("tear-down")

    async with Plugins(dispatcher) as plugins:
        await plugins.load(plugin)
        running = asyncio.create_task(dispatcher.adispatch("a"))
        await started.wait()
        unloading = asyncio.create_task(plugins.unload("plugin", timeout=60))
        await asyncio.sleep(0)
        unloading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await unloading
        assert steps == ["task", "tear-down"]
        assert "plugin" not in plugins
        running.cancel()


async def test_what_goes_wrong_at_the_end_is_reported_and_the_rest_is_undone() -> None:
    """A tear-down that fails, and a listener that the plugin's package has added past its view."""
    dispatcher = AsyncEventDispatcher()
    reports: list[PluginReport] = []

    @asynccontextmanager
    async def plugin(view: PluginView) -> AsyncIterator[None]:
        view.add_listener("a", hear)
        yield
        raise OSError("disk full")

    async with Plugins(dispatcher, report=reports.append) as plugins:
        plugins._host_package = "another"
        await plugins.load(plugin)
        dispatcher.add_listener("b", hear)  # of the same package as the plugin, and not through the view
        await plugins.unload("plugin")
    assert [report.kind for report in reports] == ["left behind", "left behind"]
    assert "disk full" in reports[0].text
    assert f"{__name__!r} has added a listener of 'b'" in reports[1].text
    assert [row.name for row in dispatcher.describe()] == ["b"]


async def test_set_up_and_tear_down_run_in_one_task() -> None:
    """A plugin may hold a TaskGroup or a cancel scope open: another task can load it than unloads it."""
    steps: list[str] = []

    @asynccontextmanager
    async def plugin(view: PluginView) -> AsyncIterator[None]:
        async def work() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                steps.append("work")

        async with asyncio.TaskGroup() as group:
            task = group.create_task(work())
            await view.scope.stack.enter_async_context(asyncio.timeout(60))
            yield
            task.cancel()
        steps.append("tear-down")

    async with Plugins(AsyncEventDispatcher()) as plugins:
        await asyncio.create_task(plugins.load(plugin))
        await asyncio.sleep(0)
        await asyncio.create_task(plugins.unload("plugin"))
        assert steps == ["work", "tear-down"]


async def test_a_plugin_whose_task_group_dies_is_switched_off() -> None:
    """A plugin that lives no more must not answer, and the host is told why."""
    reports: list[PluginReport] = []
    fail = asyncio.Event()

    @asynccontextmanager
    async def plugin(view: PluginView) -> AsyncIterator[None]:
        async def work() -> None:
            await fail.wait()
            raise OSError("connection lost")

        view.add_subscriber(Hears())
        async with asyncio.TaskGroup() as group:
            group.create_task(work())
            yield

    dispatcher = AsyncEventDispatcher()
    async with Plugins(dispatcher, report=reports.append) as plugins:
        await plugins.load(plugin)
        fail.set()
        async with asyncio.timeout(60):
            while not reports:
                await asyncio.sleep(0)
        assert not hasattr(await dispatcher.adispatch("a"), "heard")
        assert plugins.describe()[0].state == "off"
        await plugins.unload("plugin")
    (report,) = reports
    assert (report.kind, report.plugin) == ("switched off", "plugin")
    assert "OSError: connection lost" in report.text


async def test_a_cancelled_load_leaves_nothing() -> None:
    """A host that gives up on a set-up that hangs is left without a half-loaded plugin."""
    steps: list[str] = []

    @asynccontextmanager
    async def plugin(view: PluginView) -> AsyncIterator[None]:
        view.add_subscriber(Hears())
        try:
            await asyncio.Event().wait()
            yield
        finally:
            steps.append("ended")

    dispatcher = AsyncEventDispatcher()
    async with Plugins(dispatcher) as plugins:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await plugins.load(plugin)
        assert (steps, dispatcher.describe(), list(plugins)) == (["ended"], [], [])


async def test_the_threads_of_a_plugin_are_bounded_together_and_end_with_it() -> None:
    """Several ``in_thread`` listeners of a plugin share its threads; unloaded, it keeps none, and a busy one is told."""
    dispatcher = AsyncEventDispatcher()
    reports: list[PluginReport] = []
    running, most = 0, 0
    lock, go, block = threading.Lock(), threading.Event(), threading.Event()

    def work(event: Event) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            if running == 2:
                go.set()
        go.wait(60)
        with lock:
            running -= 1

    def plugin(view: PluginView) -> None:
        for name in "abcdef":
            view.add_listener(name, in_thread(work))
        view.add_listener("block", in_thread(lambda event: block.wait(60)))

    before = set(threading.enumerate())
    policy = Policy(on_failure="ignore", timeout=0.05, budget=Budget(threads=2))
    slow = Policy(on_failure="raise", budget=Budget(threads=2))  # no time limit
    async with Plugins(dispatcher, policies={"slow": slow}, policy=policy, report=reports.append) as plugins:
        await plugins.load(plugin, name="slow")
        await asyncio.gather(*(dispatcher.adispatch(name) for name in "abcdef"))
        assert most == 2
        await plugins.unload("slow")
        await plugins.load(plugin, name="hung")
        await dispatcher.adispatch("block")
        await plugins.unload("hung")
        assert [report.kind for report in reports] == ["failed", "left behind"]
        assert "1 of its threads" in reports[1].text
        block.set()
    async with asyncio.timeout(60):
        while set(threading.enumerate()) - before:
            await asyncio.sleep(0.01)


async def test_a_listener_of_a_plugin_that_waits_for_a_thread_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_thread_module, "REPORT_AFTER", 0.01)
    dispatcher = AsyncEventDispatcher()
    told: asyncio.Queue[PluginReport] = asyncio.Queue()
    go = threading.Event()
    policy = Policy(budget=Budget(threads=1))
    async with Plugins(dispatcher, policy=policy, report=told.put_nowait) as plugins:
        await plugins.load(lambda view: view.add_listener("a", in_thread(lambda event: go.wait(60))), name="p")
        runs = [asyncio.create_task(dispatcher.adispatch("a")) for _ in range(2)]
        async with asyncio.timeout(60):
            report = await told.get()
        assert (report.kind, report.plugin) == ("long", "p")
        assert "waited for a free thread" in report.text
        go.set()
        await asyncio.gather(*runs)


def test_another_loop_is_told_so_at_once() -> None:
    """Plugins have tasks in the loop that loaded them: a second running loop gets an error that names both, and no hang."""
    plugins = Plugins(AsyncEventDispatcher(), slow_after=None)
    errors: list[Exception] = []

    async def elsewhere() -> None:
        for call in (plugins.unload("p"), plugins.reload("p"), plugins.load(Hears), plugins.aclose()):
            try:
                await call
            except LoopConflict as error:
                errors.append(error)

    async def here() -> None:
        await plugins.load(lambda view: None, name="p")
        await asyncio.to_thread(asyncio.run, elsewhere())
        assert list(plugins) == ["p"]

    asyncio.run(here())
    assert len(errors) == 4
    asyncio.run(plugins.aclose())  # the loop of before has ended: the next one may take over
    assert list(plugins) == []


# -- reload -------------------------------------------------------------------------------------------------


async def test_a_reload_makes_a_new_generation_after_the_old_one() -> None:
    """By default the old generation is torn down first: never two of them hold something exclusive."""
    steps: list[str] = []

    @asynccontextmanager
    async def plugin(view: PluginView) -> AsyncIterator[None]:
        steps.append("set-up")
        yield
        steps.append("tear-down")

    async with Plugins(AsyncEventDispatcher()) as plugins:
        old = await plugins.load(plugin)
        new = await plugins.reload("plugin")
        assert new is not old
        assert new is plugins["plugin"]
        assert steps == ["set-up", "tear-down", "set-up"]
        await plugins.reload("plugin", overlap=True)
        assert steps == ["set-up", "tear-down", "set-up", "set-up", "tear-down"]


async def test_a_reload_that_fails_keeps_the_old_generation_only_with_overlap() -> None:
    """The error is the set-up's; with ``overlap`` nothing has changed, else the plugin is unloaded, and reported."""
    dispatcher = AsyncEventDispatcher()
    reports: list[PluginReport] = []
    fails = False

    def plugin(view: PluginView) -> None:
        view.add_listener("a", hear)
        if fails:
            raise OSError("no")

    async with Plugins(dispatcher, report=reports.append) as plugins:
        await plugins.load(plugin)
        fails = True
        with pytest.raises(OSError, match="no"):
            await plugins.reload("plugin", overlap=True)
        assert len(dispatcher.get_listeners("a")) == 1
        assert reports == []
        with pytest.raises(OSError, match="no"):
            await plugins.reload("plugin")
        assert dispatcher.get_listeners("a") == ()
        assert "plugin" not in plugins
        assert [report.kind for report in reports] == ["not loaded"]


async def test_no_dispatch_is_without_a_generation_or_with_two() -> None:
    """Under load, with a slow set-up and a slow tear-down, each dispatch has exactly one generation with ``overlap``."""
    dispatcher = AsyncEventDispatcher()
    counts: list[int] = []

    @asynccontextmanager
    async def plugin(view: PluginView) -> AsyncIterator[None]:
        view.add_subscriber(Hears())
        await asyncio.sleep(0)
        yield
        await asyncio.sleep(0)

    async def load() -> None:
        while True:
            event = await dispatcher.adispatch("a")
            counts.append(len(getattr(event, "heard", ())))
            await asyncio.sleep(0)

    async with Plugins(dispatcher) as plugins:
        await plugins.load(plugin)
        loads = [asyncio.create_task(load()) for _ in range(4)]
        for _ in range(50):
            await plugins.reload("plugin", overlap=True)
        for task in loads:
            task.cancel()
        assert len(counts) > 50
        assert set(counts) == {1}


@pytest.mark.parametrize("call", ["unload", "reload", "overlap"])
async def test_no_listener_runs_after_its_tear_down(call: str) -> None:
    """A dispatch that waits in an earlier listener goes on without the plugin; with ``overlap`` the tear-down waits for it."""
    dispatcher = AsyncEventDispatcher()
    go, waits = asyncio.Event(), asyncio.Event()
    alive: list[object] = []
    heard: list[bool] = []

    async def early(event: Event) -> None:
        waits.set()
        await go.wait()

    @asynccontextmanager
    async def plugin(view: PluginView) -> AsyncIterator[None]:
        generation = object()
        alive.append(generation)

        async def hear(event: Event) -> None:
            heard.append(generation in alive)

        view.add_listener("a", hear)
        yield
        alive.remove(generation)

    dispatcher.add_listener("a", early, priority=-1)
    async with Plugins(dispatcher) as plugins:
        await plugins.load(plugin)
        dispatching = asyncio.create_task(dispatcher.adispatch("a"))
        await waits.wait()
        work = plugins.unload("plugin") if call == "unload" else plugins.reload("plugin", overlap=call == "overlap")
        unloading = asyncio.create_task(work)
        for _ in range(5):
            await asyncio.sleep(0)
        go.set()
        await dispatching
        await unloading
        assert heard == ([True] if call == "overlap" else [])


async def test_a_dispatch_that_waits_for_longer_goes_on_without_the_plugin() -> None:
    """After the time for running listeners the plugin is torn down, and is passed over; a name that decides refuses."""
    may = EventName("may", policy=Policy(on_failure="refuse"))
    dispatcher = AsyncEventDispatcher(names=[may, EventName("a")])
    go = asyncio.Event()
    heard: list[Event] = []

    async def early(event: Event) -> None:
        await go.wait()

    async def hear(event: Event) -> None:
        heard.append(event)

    dispatcher.add_listener("**", early, priority=-1)
    async with Plugins(dispatcher) as plugins:
        await plugins.load(lambda view: view.add_listener("**", hear), name="p")
        dispatching = [asyncio.create_task(dispatcher.adispatch(name)) for name in ("a", may)]
        await asyncio.sleep(0)
        await plugins.unload("p", timeout=0.02)
        go.set()
        plain, refused = await asyncio.gather(*dispatching)
        assert heard == []
        assert plain.refusal is None
        assert isinstance(refused.refusal.error, PluginUnloaded)  # type: ignore[union-attr]


RELOADS = 150


@pytest.mark.long
@pytest.mark.parametrize("overlap", [False, True])
async def test_reloads_leave_nothing(overlap: bool) -> None:
    """No listener, task, thread or instance of an older generation is left, and memory does not grow."""
    await reload_many_times(RELOADS, overlap=overlap)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("overlap", [False, True])
async def test_ten_thousand_reloads_leave_nothing(overlap: bool) -> None:
    """The same, ten thousand times."""
    await reload_many_times(10_000, overlap=overlap)


async def reload_many_times(reloads: int, *, overlap: bool) -> None:
    threads = set(threading.enumerate())
    dispatcher = AsyncEventDispatcher()
    instances: weakref.WeakSet[Any] = weakref.WeakSet()
    count = 0

    class Busy:
        def __init__(self, view: PluginView) -> None:
            nonlocal count
            count += 1
            instances.add(self)
            self.view = view

        async def __aenter__(self) -> None:
            self.view.add_listener("a", self.hear)
            self.view.add_listener(f"name.{count}", self.hear)
            self.view.add_listener("a", self.hear, once=True)
            self.view.add_subscriber(Hears())
            self.task = self.view.scope.create_task(self.run())
            self.waits = self.view.scope.create_task(self.view.wait_for("never"))

        async def __aexit__(self, *error: object) -> None: ...

        async def hear(self, event: Event) -> None:
            await asyncio.sleep(0)

        async def run(self) -> None:
            await asyncio.Event().wait()

    async def load() -> None:
        while True:
            await dispatcher.adispatch("a")
            await asyncio.sleep(0)

    async with Plugins(dispatcher) as plugins:
        await plugins.load(Busy)
        loads = [asyncio.create_task(load()) for _ in range(3)]
        for _ in range(50):
            await plugins.reload("Busy", overlap=overlap)
        gc.collect()
        before = sys.getallocatedblocks()  # each of at most 512 bytes
        for _ in range(reloads):
            await plugins.reload("Busy", overlap=overlap)
        gc.collect()
        after = sys.getallocatedblocks()
        for task in loads:
            task.cancel()
        await asyncio.gather(*loads, return_exceptions=True)
        loads.clear()  # their cancellations hold the frames that they have ended
        del task
        gc.collect()
        assert count == reloads + 51
        assert len(instances) == 1
        assert len(plugins["Busy"].tasks()) == 2
        assert (after - before) * 512 < 1_000_000
        await plugins.unload("Busy")
        gc.collect()
        assert len(instances) == 0
    assert dispatcher.describe() == []
    assert len(asyncio.all_tasks()) == 1
    assert [thread.name for thread in set(threading.enumerate()) - threads if thread.name.startswith("silbo")] == []


@pytest.mark.parametrize("unloaded", ["afterwards", "meanwhile"])
async def test_a_step_in_another_thread_keeps_no_generation_alive(unloaded: str) -> None:
    """The loops of two threads share the mark of the listener that runs. One puts back the other's, which has ended meanwhile."""
    dispatcher = AsyncEventDispatcher()
    first_runs, second_runs, go = (threading.Event() for _ in range(3))

    class First:
        @on("first")
        async def hear(self, event: Event) -> None:
            first_runs.set()
            assert second_runs.wait(30)

    async def second(event: Event) -> None:
        second_runs.set()
        assert go.wait(30)

    def run_second() -> None:
        assert first_runs.wait(30)
        asyncio.run(dispatcher.adispatch("second"))

    async with Plugins(dispatcher, slow_after=None) as plugins:
        await plugins.load(lambda view: view.add_listener("second", second), name="second")
        instance = weakref.ref((await plugins.load(First)).instance)
        thread = threading.Thread(target=run_second)
        thread.start()
        await dispatcher.adispatch("first")
        if unloaded == "meanwhile":
            await plugins.unload("First")
        go.set()
        thread.join()
        if unloaded == "afterwards":
            await plugins.unload("First")
        gc.collect()
        assert instance() is None


async def test_reports_name_what_is_at_fault() -> None:
    """Each report stands for itself: the plugin, the setting, the plugin that is missing, the task."""
    from dataclasses import dataclass

    @dataclass
    class Limits:
        percent: int = 3

    reports: list[PluginReport] = []

    def setup(view: Any, settings: Limits) -> None: ...

    def tasker(view: PluginView) -> None:
        async def fail() -> None:
            raise OSError("task failed")

        view.scope.create_task(fail(), name="beat")

    settings = {"discount": {"percnt": 1}}
    async with Plugins(AsyncEventDispatcher(), settings=settings, report=reports.append) as plugins:
        await plugins.load_all(
            [
                Plugin(setup, name="discount", settings=Limits),
                Plugin(lambda view: None, name="journal", requires=["discount"]),
                tasker,
            ]
        )
        async with asyncio.timeout(60):
            while len(reports) < 3:
                await asyncio.sleep(0)
    texts = {report.plugin: (report.kind, report.text) for report in reports}
    assert texts["discount"][0] == "not loaded"
    assert "percnt" in texts["discount"][1]
    assert "discount" in texts["journal"][1]
    assert texts["tasker"] == ("failed", "its task 'beat'")


async def test_a_policy_without_a_word_about_failures_isolates() -> None:
    """A host that gives its plugins a time limit does not lose their isolation by it."""
    dispatcher = AsyncEventDispatcher(on_error="raise")
    reports: list[PluginReport] = []

    async def hang(event: Event) -> None:
        await asyncio.Event().wait()

    async with Plugins(dispatcher, policy=Policy(timeout=0.01), report=reports.append) as plugins:
        await plugins.load(lambda view: view.add_listener("a", hang, on_error="raise"), name="p")
        await dispatcher.adispatch("a")
    assert [report.kind for report in reports] == ["failed"]


# -- switched off and on ------------------------------------------------------------------------------------


async def test_a_plugin_is_switched_off_and_on_by_hand() -> None:
    """Off, it stays loaded and hears nothing; the reason is shown."""
    dispatcher = AsyncEventDispatcher()
    reports: list[PluginReport] = []
    async with Plugins(dispatcher, report=reports.append) as plugins:
        await plugins.load(Hears)
        plugins.switch_off("Hears", "maintenance")
        assert not hasattr(await dispatcher.adispatch("a"), "heard")
        (row,) = plugins.describe()
        assert (row.state, row.reason, row.listeners) == ("off", "maintenance", 1)
        plugins.switch_on("Hears")
        assert len((await dispatcher.adispatch("a")).heard) == 1
        assert [report.kind for report in reports] == ["switched off", "switched on"]
        with pytest.raises(PluginMissing, match="Hears"):
            plugins.switch_off("Haers")


async def test_single_plugins_have_policies_of_their_own() -> None:
    """The host's policy for one plugin comes in place of that for all."""

    async def fail(event: Event) -> None:
        raise ValueError("no")

    dispatcher = AsyncEventDispatcher()
    reports: list[PluginReport] = []
    strict = Policy(on_failure="raise")
    async with Plugins(dispatcher, policies={"strict": strict}, report=reports.append) as plugins:
        await plugins.load(lambda view: view.add_listener("a", fail), name="lax")
        await dispatcher.adispatch("a")
        await plugins.load(lambda view: view.add_listener("a", fail), name="strict")
        with pytest.raises(ValueError, match="no"):
            await dispatcher.adispatch("a")
        assert [(report.plugin, report.kind) for report in reports] == [("lax", "failed")] * 2


@pytest.mark.parametrize("wrong", [whistle.AsyncEventDispatcher(), object(), None])
def test_plugins_need_silbos_dispatcher(wrong: Any) -> None:
    """Another dispatcher has no owners of listeners."""
    with pytest.raises(TypeError, match="AsyncEventDispatcher"):
        Plugins(wrong)
