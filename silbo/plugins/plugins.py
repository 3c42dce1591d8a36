"""The plugins of a host: loaded, limited, watched, reloaded and unloaded.

One file, for each of these waits for the others: a reload is a set-up and a tear-down under the same lock.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from os import PathLike
from typing import Any, Final, Literal, TypeAlias
from weakref import WeakSet, WeakValueDictionary

from silbo._checks import check_hook, check_list, check_seconds, suggest_name
from silbo._closing import AsyncCloseable
from silbo._loops import LoopBinding
from silbo._reports import describe_error
from silbo.dispatch.dispatcher import AsyncEventDispatcher
from silbo.dispatch.listeners import registry_of
from silbo.dispatch.on_loop import OnLoop
from silbo.dispatch.options import Listener, is_async
from silbo.dispatch.owner import Owner
from silbo.errors import PluginConflict, PluginError, PluginMissing
from silbo.plugins.entry_points import find_plugins
from silbo.plugins.order import check_plugin, required_names, requirement_order, running_order
from silbo.plugins.plugin import Plugin, as_plugin
from silbo.plugins.scope import PluginScope
from silbo.plugins.settings import read_settings, read_tables
from silbo.plugins.view import make_view
from silbo.plugins.watchdog import Blocked, Watchdog
from silbo.policy import Policy

__all__ = ["PluginReport", "PluginRow", "Plugins", "plugins_of"]

logger = logging.getLogger(__name__)

Settings: TypeAlias = "Mapping[str, Any] | str | PathLike[str] | None"

ReportKind: TypeAlias = Literal[
    "failed", "long", "blocked", "switched off", "switched on", "not loaded", "left behind", "misspelt"
]
_LIKE: Final = 0.75
"""The likeness of a name, as of ``difflib``, from which on it is taken for a misspelling."""
_SERIOUS: Final = ("failed", "switched off", "not loaded", "left behind")


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginReport:
    """One thing that a host is told about a plugin.

    Attributes:
        kind: ``failed``: a listener failed, and the dispatch went on. ``long``: a listener runs longer than ``report_after``, or waits
            for a free thread.
            ``blocked``: a listener holds the event loop. ``switched off``, ``switched on``: by its budget or by hand.
            ``not loaded``: its set-up failed. ``left behind``: something of it is still there after it was unloaded.
            ``misspelt``: it has no settings, or no policy of its own, but a name like its own has, which is no plugin's.
        plugin: The name of the plugin.
        text: What happened, for people.
        listener: The listener; None if there is none.
        error: The error; None if there is none.
        stack: The call stack of a listener that blocks; empty if it is not known.
    """

    kind: ReportKind
    plugin: str
    text: str
    listener: Listener | None = None
    error: BaseException | None = None
    stack: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginRow:
    """One line of ``Plugins.describe()``.

    Attributes:
        name: The name.
        version: Its version; None if it states none.
        state: ``on`` or ``off``.
        reason: The reason why it is off; empty if it is on.
        listeners: The number of its listeners.
        tasks: The number of its tasks that run.
        failures: The number of its runs that failed, since it was loaded.
        policy: The host's policy for it.
    """

    name: str
    version: str | None
    state: Literal["on", "off"]
    reason: str
    listeners: int
    tasks: int
    failures: int
    policy: Policy


_all: Final[WeakSet[Plugins]] = WeakSet()
"""The Plugins objects of this process."""


class Plugins(AsyncCloseable):
    """The plugins of one dispatcher. Leaving the ``async with`` block unloads all of them.

    Args:
        dispatcher: The dispatcher, to which the plugins get a view.
        policy: The policy for all plugins. Where it does not say ``on_failure``, a failing listener is reported, and the dispatch
            goes on.
        policies: The policy of single plugins, by name, in place of ``policy``.
        host_version: The version of the host, for plugins that state which ones they work with.
        settings: The settings by plugin: a mapping, or the path of a TOML file with a table for each.
        slow_after: Seconds for which a listener of a plugin may hold the event loop. One that does so for longer is reported, with
            its line and stack where they can be seen. A thread watches from the first plugin on until ``aclose()``; None for
            no such thread.
        report: Called with each :class:`PluginReport`; by default they are logged. It may be called in another thread, for
            a blocked loop. A plain function: nobody would await another.

    Raises:
        TypeError: The dispatcher is not silbo's; or ``report`` is async.
    """

    def __init__(
        self,
        dispatcher: AsyncEventDispatcher,
        *,
        policy: Policy | None = None,
        policies: Mapping[str, Policy] | None = None,
        host_version: str | None = None,
        settings: Settings = None,
        slow_after: float | None = 0.25,
        report: Callable[[PluginReport], object] | None = None,
    ) -> None:
        if not isinstance(dispatcher, AsyncEventDispatcher):
            raise TypeError(f"plugins are for a silbo.AsyncEventDispatcher, not for {dispatcher!r}")
        self._dispatcher = dispatcher
        self._policy = Policy(on_failure="ignore") if policy is None else policy
        self._policies = dict(policies or {})
        for given in (self._policy, *self._policies.values()):
            if not isinstance(given, Policy):
                raise TypeError(f"a policy is a silbo.Policy, not {given!r}")
        self._host_version = host_version
        self._settings = settings
        self._report_hook = report if report is None else check_hook("report", report)
        if is_async(report):
            raise TypeError(
                f"report is async, and nobody would await it: give a function, and start a task in it, not {report!r}"
            )
        self._loaded: dict[
            str, PluginScope
        ] = {}  # in the order of loading; while a reload runs, its old generation or the new
        self._moving: dict[str, PluginScope] = {}  # in its set-up, or being closed
        self._turns: WeakValueDictionary[str, asyncio.Lock] = (
            WeakValueDictionary()
        )  # one call at a time for each plugin
        self._places: dict[
            str, float
        ] = {}  # of each that is loaded, before ``before`` and ``after``: a reload keeps it
        self._expected: Counter[str] = Counter()  # the plugins that calls of load_all() are about to load
        self._closers = 0  # calls of aclose() that run
        self._endings: dict[asyncio.Task[None], PluginScope] = {}  # wait for a tear-down for which its caller could not
        self._on_loop = OnLoop()
        self._watchdog: Final = (
            None if slow_after is None else Watchdog(self._on_loop, slow_after=slow_after, report=self._report_blocked)
        )
        self._host_package = _package_of_caller()
        self._loop = LoopBinding("Plugins", is_busy=self._has_plugins)
        _all.add(self)

    @property
    def dispatcher(self) -> AsyncEventDispatcher:
        """The dispatcher whose plugins these are."""
        return self._dispatcher

    # -- load -----------------------------------------------------------------------------------------------

    async def load(self, plugin: Any, *, name: str | None = None, settings: Settings = None) -> PluginScope:
        """Load one plugin: run its set-up.

        Args:
            plugin: A :class:`~silbo.plugins.Plugin`, or a function, subscriber or async context manager, as its ``setup``.
            name: The name of the plugin, in place of its own.
            settings: Its settings: a mapping. By default those that this object was made with.

        Returns:
            Its scope.

        Raises:
            PluginConflict: A plugin of this name is loaded; or it does not fit to this host or to another plugin; or ``aclose()``
                runs.
            PluginUnloaded: ``aclose()`` has ended its set-up.
            PluginMissing: It requires a plugin that is not loaded.
            PluginInvalid: The object is no plugin.
            LoopConflict: Another event loop has loaded plugins.
            PluginSettingsInvalid: Its settings are wrong.
            Exception: The error of its set-up, with a note that names the plugin. Nothing of the plugin is left.
        """
        self._loop.enter("load")
        wanted = as_plugin(plugin, name=name)
        self._refuse_loaded(wanted.name)
        async with self._turn(wanted.name):
            self._refuse_loaded(wanted.name)
            self._check(wanted)
            scope = self._make_scope(wanted)
            await self._set_up(scope, self._read_settings(wanted, settings))
            self._places[wanted.name] = scope.owner.place
            self._loaded[wanted.name] = scope
            try:
                self._arrange()
            except PluginConflict:
                await self._unload(scope, 0.0)
                raise
            scope.owner.is_active = True
            self._refresh()
            return scope

    async def load_all(self, plugins: Iterable[Any]) -> dict[str, BaseException]:
        """Load several plugins, each after those that it requires. One that fails is reported, and the others are loaded.

        Args:
            plugins: What :meth:`load` takes.

        Returns:
            The errors by name of plugin; empty if all are loaded.
        """
        failed: dict[str, BaseException] = {}
        wanted: dict[str, Plugin] = {}
        twice: set[str] = set()
        for candidate in plugins:
            try:
                plugin = as_plugin(candidate)
                if wanted.setdefault(plugin.name, plugin) is not plugin:
                    twice.add(plugin.name)
                    problem = "two plugins have this name; give one of them another: Plugin(..., name=)"
                    raise PluginConflict(plugin.name, problem)
            except Exception as error:  # noqa: BLE001  # told to the host
                self._fail(failed, getattr(error, "plugin", str(candidate)), error)
        for name in twice:
            del wanted[name]
        with self._expecting(wanted):
            for plugin in self._ordered(wanted, failed):
                try:
                    await self.load(plugin)
                except Exception as error:  # noqa: BLE001  # told to the host
                    self._fail(failed, plugin.name, error)
        return failed

    async def load_entry_points(self, group: str, *, allow: Iterable[str]) -> dict[str, BaseException]:
        """Load the plugins that installed distributions offer as entry points; nothing else is imported.

        Args:
            group: The group of entry points, as ``myhost.plugins``.
            allow: The names that may be loaded.

        Returns:
            The errors by name, as of :meth:`load_all`; also those of entry points that are missing or can't be imported.
        """
        failed: dict[str, BaseException] = {}
        plugins: list[Plugin] = []
        allowed = check_list("allow", allow)
        for found in find_plugins(group, allow=allowed):
            if found.plugin is not None:
                plugins.append(found.plugin)
            elif found.error is not None:
                self._fail(failed, found.name, found.error)
        with self._expecting(allowed):
            return failed | await self.load_all(plugins)

    # -- unload, reload -------------------------------------------------------------------------------------

    async def unload(self, name: str, *, timeout: float = 5.0) -> None:
        """Remove a plugin: its listeners, its tasks, and all that its tear-down removes.

        From inside of one of its own listeners or tasks it works, too: that one is not waited for.

        Args:
            name: The name of the plugin.
            timeout: Seconds to wait for its listeners that run; then they are cancelled.

        Raises:
            PluginMissing: It is not loaded.
            PluginConflict: Another plugin requires it, one that is loaded or in its set-up; or its own set-up or tear-down calls.
        """
        check_seconds("timeout", timeout, zero=True)
        self._loop.enter("unload")
        async with self._turn(name):
            scope = self[name]
            for other in (*self._loaded.values(), *self._moving.values()):
                if other.name != name and not other.is_closed and name in required_names(other.plugin):
                    raise PluginConflict(name, f"{other.name!r} requires it; unload that first")
            await self._unload(scope, timeout)

    async def reload(self, name: str, *, overlap: bool = False, timeout: float = 5.0) -> PluginScope:
        """Unload a plugin and load it again: a new generation, made by the same set-up. Its modules are not imported anew.

        Args:
            name: The name of the plugin.
            overlap: If true, the new generation is set up while the old one runs, and takes over between two dispatches: no
                dispatch is without one of them. If false, the old one is torn down first: for plugins that hold something
                exclusive.
            timeout: Seconds to wait for listeners of the old generation that run.

        Raises:
            PluginMissing: It is not loaded, or a plugin is not that it requires: the old generation goes on.
            PluginConflict: Its own set-up or tear-down calls, or a task for which its tear-down may wait; or ``aclose()`` runs.
            Exception: The error of its set-up. With ``overlap`` the old generation goes on; else the plugin is unloaded.
        """
        check_seconds("timeout", timeout, zero=True)
        self._loop.enter("reload")
        async with self._turn(name):
            old = self[name]
            self._check(old.plugin)
            if not overlap and old.is_called_by_child():
                problem = (
                    "its tear-down may wait for this task, which can't wait for the tear-down: start the task with "
                    "view.scope.create_task(), or reload with overlap=True"
                )
                raise PluginConflict(name, problem)
            new = self._make_scope(old.plugin)
            try:
                if not overlap:
                    await self._close(old, timeout)
                    self._check(old.plugin)
                await self._set_up(new, old.settings)
            except BaseException as error:
                if not overlap:
                    self._forget(name)
                    if isinstance(error, Exception):
                        text = f"its set-up failed on reload: {_problem(name, error)}"
                        self._report(PluginReport(kind="not loaded", plugin=name, text=text, error=error))
                raise
            self._loaded[name] = new
            self._arrange()
            if old.owner.off and old.owner.is_off_by_host:
                new.owner.stay_off(old.owner)
            old.owner.is_active = False
            old.has_successor = overlap
            new.owner.is_active = True
            self._refresh()
            if overlap:
                await self._close(old, timeout)
            return new

    async def aclose(self) -> None:
        """Unload all plugins, the last one first; end set-ups that run. May be called twice. All are unloaded also if it is cancelled.

        Raises:
            LoopConflict: Another event loop has loaded them.
            PluginConflict: The set-up or tear-down of a plugin calls, for which this would wait.
        """
        self._loop.enter("aclose")
        for name in self._moving:
            self._refuse_inside(name)
        cancelled: asyncio.CancelledError | None = None
        self._closers += 1
        try:
            while names := [*self._moving, *self._closing_order()]:
                for scope in self._moving.values():
                    scope.give_up()
                try:
                    async with self._lock(names[0]):
                        if names[0] in self._loaded:
                            await self._unload(self._loaded[names[0]], 5.0 if cancelled is None else 0.0)
                except asyncio.CancelledError as error:
                    cancelled = error
            if endings := [task for task, scope in self._endings.items() if not scope.is_called_by_child()]:
                await asyncio.wait(endings)
        finally:
            self._closers -= 1
            if self._watchdog is not None:
                self._watchdog.close()
        if cancelled is not None:
            raise cancelled

    # -- switch, look ---------------------------------------------------------------------------------------

    def switch_off(self, name: str, reason: str = "by hand") -> None:
        """Run no listener of a plugin from now on, also after a reload. It stays loaded, and its tasks go on."""
        self[name].owner.switch_off(reason, by_host=True)

    def switch_on(self, name: str) -> None:
        """Run the listeners of a plugin again that was switched off, by hand or by its budget."""
        self[name].owner.switch_on()

    def describe(self) -> list[PluginRow]:
        """Return the plugins that are loaded, in the order in which their listeners of equal priority run."""
        return [
            PluginRow(
                name=scope.name,
                version=scope.plugin.version,
                state="off" if scope.owner.is_off() else "on",
                reason=scope.owner.off,
                listeners=len(scope.listeners()),
                tasks=len(scope.tasks()),
                failures=scope.owner.failures,
                policy=scope.owner.policy or Policy(),
            )
            for scope in sorted(self._loaded.values(), key=lambda scope: scope.owner.place)
        ]

    def __getitem__(self, name: str) -> PluginScope:
        """Return the scope of a plugin.

        Raises:
            PluginMissing: It is not loaded.
        """
        if name not in self._loaded:
            raise PluginMissing(name, f"it is not loaded{suggest_name(name, self._loaded)}")
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        return name in self._loaded

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._loaded))  # each may be unloaded meanwhile

    def __len__(self) -> int:
        return len(self._loaded)

    # -- within ---------------------------------------------------------------------------------------------

    def _has_plugins(self) -> bool:
        return bool(self._loaded or self._moving)

    def _turn(self, name: str) -> asyncio.Lock:
        """Return the lock for calls about a plugin.

        Raises:
            PluginConflict: The plugin's own set-up or tear-down calls: it would wait for itself.
        """
        self._refuse_inside(name)
        return self._lock(name)

    def _lock(self, name: str) -> asyncio.Lock:
        return self._turns.setdefault(name, asyncio.Lock())

    def _refuse_inside(self, name: str) -> None:
        scope = self._moving.get(name)
        if scope is not None and scope.is_around():
            state = "unloaded" if scope.is_closed else "loaded"
            raise PluginConflict(
                name, f"it is being {state}, and its own code can't wait for that: call this later, or from elsewhere"
            )

    def _refuse_loaded(self, name: str) -> None:
        if name in self._loaded:
            raise PluginConflict(name, "it is loaded already; unload or reload it")

    def _check(self, plugin: Plugin) -> None:
        """Refuse a plugin that can't be loaded now."""
        if self._closers:
            raise PluginConflict(plugin.name, "all plugins are being unloaded by aclose(): load it after that")
        check_plugin(
            plugin, {name: scope.plugin for name, scope in self._loaded.items()}, host_version=self._host_version
        )

    def _ordered(self, wanted: dict[str, Plugin], failed: dict[str, BaseException]) -> list[Plugin]:
        """Return plugins in the order of loading, without those that require one another in a circle."""
        while True:
            try:
                return requirement_order(wanted.values())
            except PluginConflict as error:
                for name in dict.fromkeys(error.circle):
                    del wanted[name]
                    self._fail(failed, name, error)

    def _closing_order(self) -> list[str]:
        try:
            return [plugin.name for plugin in requirement_order(scope.plugin for scope in self._loaded.values())][::-1]
        except PluginConflict:  # a circle
            return [*self._loaded][::-1]

    def _make_scope(self, plugin: Plugin) -> PluginScope:
        name = plugin.name

        def report(kind: Any, text: str, /, *, listener: Any, error: Any) -> None:
            self._report(PluginReport(kind=kind, plugin=name, text=text, listener=listener, error=error))

        place = self._places.get(name)
        owner = Owner(
            name,
            policy=_isolating(self._policies.get(name, self._policy)),
            place=registry_of(self._dispatcher).next_place() if place is None else place,
            on_loop=self._on_loop,
            report=report,
        )
        return PluginScope(plugin, self._dispatcher, owner, make_view)

    def _read_settings(self, plugin: Plugin, given: Settings) -> Any:
        source = self._settings if given is None else {plugin.name: given} if isinstance(given, Mapping) else given
        if plugin.settings is not None and given is None:
            self._check_spelling("the settings have no table for it", plugin.name, read_tables(plugin, source))
        self._check_spelling("policies= has no policy of its own for it", plugin.name, self._policies)
        return read_settings(plugin, source)

    def _check_spelling(self, problem: str, name: str, given: Iterable[str]) -> None:
        """Tell the host that a plugin has nothing under its name, but another name is like it, and is no plugin's."""
        names = set(given)
        if name not in names:
            others = names - {*self._loaded, *self._moving, *self._expected}
            for near in get_close_matches(name, others, 1, _LIKE):
                text = f"{problem}, but {near!r} has one, and is no plugin: did you mean {name!r}?"
                self._report(PluginReport(kind="misspelt", plugin=name, text=text))

    @contextmanager
    def _expecting(self, names: Iterable[str]) -> Generator[None]:
        """Take names for those of plugins that are about to be loaded, within the block."""
        expected = list(names)
        self._expected.update(expected)
        try:
            yield
        finally:
            self._expected -= Counter(expected)

    def _arrange(self) -> None:
        """Give each plugin the place that ``before`` and ``after`` ask for."""
        scopes = sorted(self._loaded.values(), key=lambda scope: self._places[scope.name])
        places = [self._places[scope.name] for scope in scopes]
        for name, place in zip(running_order([scope.plugin for scope in scopes]), places, strict=True):
            self._loaded[name].owner.place = place

    def _refresh(self) -> None:
        registry_of(self._dispatcher).refresh()

    async def _set_up(self, scope: PluginScope, settings: object) -> None:
        """Run the set-up of a plugin. No listener of it runs before that has ended.

        What the plugin requires is checked again after it: that may have been unloaded meanwhile.
        """
        if self._watchdog is not None:
            self._watchdog.start()
        scope.owner.is_active = False
        self._moving[scope.name] = scope
        try:
            await scope.open(settings)
            try:
                self._check(scope.plugin)
            except Exception:
                await scope.close(0.0)
                raise
        finally:
            del self._moving[scope.name]

    async def _unload(self, scope: PluginScope, timeout: float) -> None:
        self._forget(scope.name)
        await self._close(scope, timeout)

    def _forget(self, name: str) -> None:
        self._loaded.pop(name, None)
        self._places.pop(name, None)

    async def _close(self, scope: PluginScope, timeout: float) -> None:
        self._moving[scope.name] = scope
        try:
            await scope.close(timeout)
        finally:
            del self._moving[scope.name]
            self._tell_left(scope)
            if not scope.has_ended():
                ending = asyncio.get_running_loop().create_task(self._finish(scope))
                self._endings[ending] = scope
                ending.add_done_callback(self._endings.pop)

    async def _finish(self, scope: PluginScope) -> None:
        scope.left.clear()
        await scope.finish()
        self._tell_left(scope)

    def _tell_left(self, scope: PluginScope) -> None:
        package = scope.plugin.package
        rows = [] if package == self._host_package else registry_of(self._dispatcher).rows_of_package(package)
        scope.left.extend(
            f"{row.plugin!r} has added a listener of {row.name!r} past the plugin's view ({row.defined_at}): it stays"
            for row in rows
        )
        for text in scope.left:
            self._report(PluginReport(kind="left behind", plugin=scope.name, text=text))

    def _fail(self, failed: dict[str, BaseException], name: str, error: BaseException) -> None:
        failed[name] = error
        self._report(PluginReport(kind="not loaded", plugin=name, text=_problem(name, error), error=error))

    def _report_blocked(self, blocked: Blocked) -> None:
        """Report a listener that holds the loop. Called by the watchdog's thread."""
        self._report(
            PluginReport(
                kind="blocked",
                plugin=blocked.plugin,
                text=str(blocked),
                listener=blocked.listener,
                stack=blocked.stack,
            )
        )

    def _report(self, report: PluginReport) -> None:
        if self._report_hook is None:
            level = logging.ERROR if report.kind in _SERIOUS else logging.WARNING
            if report.kind == "switched on":
                level = logging.INFO
            extra = {"plugin": report.plugin, "report": report.kind}
            text = "\n".join(part for part in (report.text, report.stack) if part)
            logger.log(
                level,
                "plugin %s: %s: %s",
                report.plugin,
                report.kind,
                text,
                exc_info=_unforeseen(report.error),
                extra=extra,
            )
            return
        try:
            self._report_hook(report)
        except Exception:
            logger.exception("report hook failed", extra={"plugin": report.plugin})


def plugins_of(dispatcher: AsyncEventDispatcher) -> list[Plugins]:
    """Return the ``Plugins`` objects that were made for a dispatcher and are alive; most often one or none."""
    return [plugins for plugins in _all if plugins.dispatcher is dispatcher]


def _isolating(policy: Policy) -> Policy:
    """Return a policy that says what a failure does: by default it is reported, and the dispatch goes on."""
    return replace(policy, on_failure="ignore") if policy.on_failure is None else policy


def _problem(plugin: str, error: BaseException) -> str:
    if isinstance(error, PluginError):
        return str(error).removeprefix(f"plugin {plugin!r}").lstrip(",: ")
    return describe_error(error)


def _unforeseen(error: BaseException | None) -> BaseException | None:
    """Return an error whose traceback tells more than its text."""
    return None if isinstance(error, PluginError) and error.__cause__ is None else error


def _package_of_caller() -> str:
    frame = sys._getframe(2)  # noqa: SLF001  # the code that makes the Plugins: that of the host
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
