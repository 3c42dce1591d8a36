"""Calls of ``Plugins`` that overlap, fail or are cancelled, or that a plugin makes about itself."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest

from silbo import AsyncEventDispatcher, Event, Plugin, PluginReport, Plugins, PluginView
from silbo.errors import MissingExtra, PluginConflict, PluginForbidden, PluginInvalid, PluginMissing, PluginUnloaded


async def hear(event: Event) -> None: ...


def listens(view: PluginView) -> None:
    view.add_listener("a", hear)


def torn_down(torn: list[str], name: str) -> Callable[[PluginView], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def plugin(view: PluginView) -> AsyncIterator[None]:
        yield
        await asyncio.sleep(0)
        torn.append(name)

    return plugin


class Gate:
    """A set-up that waits from its ``at``-th run on, until it may go on or fail."""

    def __init__(self, at: int = 1) -> None:
        self.runs = 0
        self.at = at
        self.reached = asyncio.Event()
        self.go = asyncio.Event()
        self.error: Exception | None = None

    def plugin(self, *requires: str) -> Plugin:
        async def gate(view: PluginView) -> None:
            self.runs += 1
            view.add_listener("a", hear)
            if self.runs >= self.at:
                self.reached.set()
                await self.go.wait()
                if self.error is not None:
                    raise self.error

        return Plugin(gate, requires=requires)


# -- a reload that fails ------------------------------------------------------------------------------------


async def test_a_failed_reload_holds_up_nobody_else() -> None:
    """A plugin is gone that another requires: others are loaded, and all are unloaded, dependents first."""
    dispatcher = AsyncEventDispatcher()
    torn: list[str] = []
    fails = False

    @asynccontextmanager
    async def base(view: PluginView) -> AsyncIterator[None]:
        if fails:
            raise OSError("port taken")
        yield
        torn.append("base")

    plugins = Plugins(dispatcher, report=lambda report: None)
    await plugins.load(base)
    await plugins.load(Plugin(torn_down(torn, "needs"), name="needs", requires=["base"]))
    fails = True
    with pytest.raises(OSError, match="port taken"):
        await plugins.reload("base")
    torn.clear()
    await plugins.load(listens)
    assert await plugins.load_all([Plugin(hear_nothing)]) == {}
    with pytest.raises(PluginMissing, match="base"):
        await plugins.reload("needs")
    assert torn == []  # the old generation goes on
    fails = False
    await plugins.load(base)  # again, after the one that requires it
    await plugins.aclose()
    assert (torn, list(plugins), dispatcher.describe()) == (["needs", "base"], [], [])


def hear_nothing(view: PluginView) -> None: ...


async def test_a_plugin_stays_while_another_that_requires_it_is_set_up() -> None:
    """It is refused to unload it meanwhile; and a plugin whose requirement is gone after its set-up is undone."""
    dispatcher = AsyncEventDispatcher()
    gate, base = Gate(), Gate(at=2)
    base.error = OSError("no")
    async with Plugins(dispatcher, report=lambda report: None) as plugins:
        await plugins.load(base.plugin(), name="base")
        loading = asyncio.create_task(plugins.load(gate.plugin("base")))
        await gate.reached.wait()
        with pytest.raises(PluginConflict, match="'gate' requires it"):
            await plugins.unload("base")
        base.go.set()
        with pytest.raises(OSError, match="no"):
            await plugins.reload("base")
        gate.go.set()
        with pytest.raises(PluginMissing, match="base"):
            await loading
        assert (list(plugins), dispatcher.describe()) == ([], [])


# -- from inside of the plugin ------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["load", "unload", "reload", "aclose"])
@pytest.mark.parametrize("by", ["set-up", "listener", "tear-down"])
@pytest.mark.timeout(60)
async def test_a_plugin_cannot_wait_for_its_own_set_up_or_tear_down(call: str, by: str) -> None:
    """It is told so at once, also from a listener to which its set-up dispatches."""
    dispatcher = AsyncEventDispatcher()
    errors: list[PluginConflict] = []
    plugins = Plugins(dispatcher)

    async def act(event: object = None) -> None:
        try:
            if call == "load":
                await plugins.load(own)
            elif call == "aclose":
                await plugins.aclose()
            else:
                await getattr(plugins, call)("own")
        except PluginConflict as error:
            errors.append(error)

    @asynccontextmanager
    async def own(view: PluginView) -> AsyncIterator[None]:
        if by == "set-up":
            await act()
        elif by == "listener":
            await view.adispatch("act")
        yield
        if by == "tear-down":
            await act()

    dispatcher.add_listener("act", act)
    await plugins.load(own)
    await plugins.unload("own")
    await plugins.aclose()
    assert [error.plugin for error in errors] == ["own"]
    assert ("unloaded" if by == "tear-down" else "loaded") in errors[0].problem


@pytest.mark.timeout(60)
@pytest.mark.parametrize("call", ["unload", "aclose"])
async def test_a_task_group_of_a_plugin_may_unload_it(call: str) -> None:
    """The tear-down waits for the task, so the task does not wait for the tear-down: its end is waited for elsewhere."""
    reports: list[PluginReport] = []
    steps: list[str] = []
    go, ended = asyncio.Event(), asyncio.Event()

    async def leave() -> None:
        await go.wait()
        with pytest.raises(PluginConflict, match="create_task"):
            await plugins.reload("group")
        await (plugins.aclose() if call == "aclose" else plugins.unload("group"))
        steps.append("unloaded")

    @asynccontextmanager
    async def group(view: PluginView) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(leave())
            yield
        steps.append("torn down")
        ended.set()

    async with Plugins(AsyncEventDispatcher(), report=reports.append) as plugins:
        await plugins.load(group)
        go.set()
        await ended.wait()
        assert (steps, list(plugins)) == (["unloaded", "torn down"], [])
    assert reports == []


# -- calls that overlap -------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["load", "reload", "overlap"])
async def test_aclose_ends_set_ups_that_run(call: str) -> None:
    """Nothing is loaded after it, no thread is left, and meanwhile nothing new is loaded."""
    threads = set(threading.enumerate())
    dispatcher = AsyncEventDispatcher()
    torn: list[str] = []
    gate = Gate(at=1 if call == "load" else 2)
    plugins = Plugins(dispatcher, report=lambda report: None)
    await plugins.load(torn_down(torn, "first"), name="first")
    if call != "load":
        await plugins.load(gate.plugin())
    calling: asyncio.Task[Any] = asyncio.create_task(
        plugins.load(gate.plugin()) if call == "load" else plugins.reload("gate", overlap=call == "overlap")
    )
    await gate.reached.wait()
    closing = asyncio.create_task(plugins.aclose())
    await asyncio.sleep(0)
    with pytest.raises(PluginConflict, match="aclose"):
        await plugins.load(listens)
    await closing
    with pytest.raises(PluginUnloaded):
        await calling
    assert (torn, list(plugins), dispatcher.describe()) == (["first"], [], [])
    assert [thread.name for thread in set(threading.enumerate()) - threads if thread.name.startswith("silbo")] == []
    await plugins.load(listens)  # after it
    await plugins.aclose()


async def test_a_cancelled_aclose_unloads_all() -> None:
    """Each tear-down has run when the cancellation is raised."""
    torn: list[str] = []
    plugins = Plugins(AsyncEventDispatcher())
    for name in "abc":
        await plugins.load(torn_down(torn, name), name=name)
    closing = asyncio.create_task(plugins.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert (torn, list(plugins)) == (["c", "b", "a"], [])


async def test_a_plugin_counts_as_loaded_while_it_is_reloaded() -> None:
    """It can be switched off, and stays off; an unload waits for the reload. A reload by itself keeps it on."""
    gate = Gate(at=2)
    async with Plugins(AsyncEventDispatcher(), report=lambda report: None) as plugins:
        await plugins.load(gate.plugin())
        reloading = asyncio.create_task(plugins.reload("gate"))
        await gate.reached.wait()
        plugins.switch_off("gate", "maintenance")
        assert [row.name for row in plugins.describe()] == ["gate"]
        unloading = asyncio.create_task(plugins.unload("gate"))
        gate.go.set()
        assert (await reloading).owner.off == "maintenance"
        await unloading
        assert list(plugins) == []


async def test_a_reload_keeps_off_only_by_the_hosts_hand() -> None:
    """A plugin whose budget was used up, or whose set-up ended by itself, gets a new start."""
    told: list[str] = []
    async with Plugins(AsyncEventDispatcher(), report=lambda report: told.append(report.kind)) as plugins:
        scope = await plugins.load(listens)
        scope.owner.switch_off("used up")
        assert not (await plugins.reload("listens")).owner.off
        plugins.switch_off("listens")
        for overlap in (False, True):
            assert (await plugins.reload("listens", overlap=overlap)).owner.off
        plugins.switch_on("listens")
        assert not (await plugins.reload("listens")).owner.off
    assert told == ["switched off", "switched off", "switched on"]  # no reload repeats it


async def test_all_can_be_unloaded_in_a_loop() -> None:
    """``for name in plugins`` goes over a copy."""
    async with Plugins(AsyncEventDispatcher()) as plugins:
        await plugins.load(listens)
        await plugins.load(listens, name="other")
        for name in plugins:
            await plugins.unload(name)
        assert len(plugins) == 0


async def test_a_cancelled_unload_ends_a_hung_listener() -> None:
    """It is cancelled; one that goes on after its cancellation is told."""
    dispatcher = AsyncEventDispatcher()
    reports: list[PluginReport] = []
    started = asyncio.Event()

    async def hang(event: Event) -> None:
        started.set()
        await asyncio.Event().wait()

    async with Plugins(dispatcher, report=reports.append) as plugins:
        await plugins.load(lambda view: view.add_listener("a", hang), name="hangs")
        running = asyncio.create_task(dispatcher.adispatch("a"))
        await started.wait()
        unloading = asyncio.create_task(plugins.unload("hangs", timeout=60))
        await asyncio.sleep(0)
        unloading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await unloading
        async with asyncio.timeout(30):
            await running
    assert [type(report.error) for report in reports] == [PluginUnloaded]


# -- a failure of one plugin --------------------------------------------------------------------------------


async def test_one_bad_plugin_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also not by the version of one that is loaded, by an exit, or by a missing library."""
    reports: list[PluginReport] = []

    def leaves(view: PluginView) -> None:
        sys.exit(3)

    async with Plugins(AsyncEventDispatcher(), report=reports.append) as plugins:
        await plugins.load(Plugin(listens, name="odd", version="banana"))
        await plugins.load(Plugin(listens, name="even", version="1"))
        failed = await plugins.load_all([Plugin(listens, name="needs", requires=["odd>=1"]), leaves, listens])
        assert {name: type(error) for name, error in failed.items()} == {
            "needs": PluginInvalid,
            "leaves": PluginInvalid,
        }
        assert "SystemExit" in str(failed["leaves"])
        for module in [name for name in sys.modules if name.startswith("packaging")]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setattr(sys, "meta_path", [_NoPackaging(), *sys.meta_path])
        failed = await plugins.load_all([Plugin(listens, name="needs", requires=["even>=1"]), hear_nothing])
        assert {name: type(error) for name, error in failed.items()} == {"needs": MissingExtra}
        assert list(plugins) == ["odd", "even", "listens", "hear_nothing"]
    assert [report.plugin for report in reports] == ["needs", "leaves", "needs"]


class _NoPackaging:
    """Finds no library named packaging."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.startswith("packaging"):
            raise ModuleNotFoundError(f"No module named {name!r}", name="packaging")


# -- small --------------------------------------------------------------------------------------------------


async def test_an_async_report_is_refused() -> None:
    """Nobody would await it."""

    async def report(report: PluginReport) -> None: ...

    with pytest.raises(TypeError, match="report is async"):
        Plugins(AsyncEventDispatcher(), report=report)


async def test_a_view_keeps_its_attributes() -> None:
    """Without its scope it would be no view."""
    async with Plugins(AsyncEventDispatcher()) as plugins:
        view = (await plugins.load(listens)).view
        with pytest.raises(PluginForbidden, match=r"deleting \.scope"):
            del view.scope  # type: ignore[attr-defined]


async def test_new_names_leave_nothing_and_a_reload_keeps_its_place() -> None:
    """A host that loads plugins under ever new names does not grow."""
    dispatcher = AsyncEventDispatcher()
    async with Plugins(dispatcher) as plugins:
        await plugins.load(listens)
        await plugins.load(listens, name="last")
        for number in range(5):
            await plugins.load(hear_nothing, name=f"new-{number}")
            await plugins.unload(f"new-{number}")
        await plugins.reload("listens")
        assert [row.plugin for row in dispatcher.describe("a")] == ["listens", "last"]
        assert set(plugins._places) == {"listens", "last"}
        assert set(plugins._turns) <= {"listens", "last"}


async def test_a_task_in_another_loop_does_not_hold_up_an_unload() -> None:
    """It is cancelled there, and not waited for."""
    dispatcher = AsyncEventDispatcher()
    reached, ended = threading.Event(), threading.Event()

    async def wait(event: Event) -> None:
        reached.set()
        await asyncio.Event().wait()

    dispatcher.add_listener("slow", wait)
    async with Plugins(dispatcher) as plugins:
        view = (await plugins.load(hear_nothing)).view

        async def spawn() -> None:
            try:
                await view.spawn("slow")
            except asyncio.CancelledError:
                ended.set()

        thread = threading.Thread(target=lambda: asyncio.run(spawn()))
        thread.start()
        assert await asyncio.to_thread(reached.wait, 30)
        waited: list[object] = []
        unloading = asyncio.create_task(plugins.unload("hear_nothing"))
        unloading.add_done_callback(waited.append)
        for _ in range(100):
            await asyncio.sleep(0)
        assert waited
        assert await asyncio.to_thread(ended.wait, 30)
        await asyncio.to_thread(thread.join, 30)


async def test_the_log_of_a_spawned_dispatch_names_the_plugin(caplog: pytest.LogCaptureFixture) -> None:
    """The error is that of a listener of the host, and the plugin has spawned the dispatch."""
    dispatcher = AsyncEventDispatcher()

    async def fail(event: Event) -> None:
        raise ValueError("no")

    dispatcher.add_listener("fails", fail)
    async with Plugins(dispatcher) as plugins:
        view = (await plugins.load(hear_nothing)).view
        await asyncio.wait([view.spawn("fails"), dispatcher.spawn("fails")])
        await asyncio.sleep(0)
    records = [record for record in caplog.records if record.message == "spawned dispatch failed"]
    assert [getattr(record, "plugin", None) for record in records] == ["hear_nothing", None]
    assert dispatcher._background._plugins == {}
