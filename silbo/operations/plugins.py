"""The plugins of an app, as answers: state, limits, settings, needs, and what each has registered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from silbo.errors import AppInvalid
from silbo.operations.app import App
from silbo.operations.listeners import ListenerInfo, to_listener_info
from silbo.plugins.plugins import PluginRow, Plugins
from silbo.policy import Policy

__all__ = ["PluginInfo", "list_plugins"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginInfo:
    """A loaded plugin.

    Attributes:
        name: Its name.
        version: Its version; None if it states none.
        state: ``on`` or ``off``.
        reason: The reason why it is off; empty if it is on.
        policy: The host's policy for it, with its budget.
        failures: The number of its runs that failed, since it was loaded.
        tasks: The number of its tasks that run.
        host_version: The versions of the host that it works with; None if it states none.
        requires: The plugins that it needs.
        before: The plugins before which its listeners run.
        after: The plugins after which its listeners run.
        settings: The class of its settings, as ``shop_audit.Settings``; empty if it has none. Never their values.
        package: The top package that defines it.
        listeners: The listeners that it has registered.
    """

    name: str
    version: str | None
    state: Literal["on", "off"]
    reason: str
    policy: Policy
    failures: int
    tasks: int
    host_version: str | None
    requires: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    settings: str
    package: str
    listeners: tuple[ListenerInfo, ...]


def list_plugins(app: App) -> list[PluginInfo]:
    """Return the plugins that are loaded, in the order in which their listeners of equal priority run.

    Raises:
        AppInvalid: The app has no ``Plugins`` object.
    """
    if not app.plugins:
        problem = (
            "it has no silbo.Plugins: name the function or async context manager that loads the plugins, and gives "
            "the dispatcher or the Plugins"
        )
        raise AppInvalid(app.reference, problem)
    return [_to_info(plugins, row) for plugins in app.plugins for row in plugins.describe()]


def _to_info(plugins: Plugins, row: PluginRow) -> PluginInfo:
    scope = plugins[row.name]
    plugin = scope.plugin
    settings = plugin.settings
    return PluginInfo(
        name=row.name,
        version=row.version,
        state=row.state,
        reason=row.reason,
        policy=row.policy,
        failures=row.failures,
        tasks=row.tasks,
        host_version=plugin.host_version,
        requires=tuple(plugin.requires),
        before=tuple(plugin.before),
        after=tuple(plugin.after),
        settings="" if settings is None else f"{settings.__module__}.{settings.__qualname__}",
        package=plugin.package,
        listeners=tuple(to_listener_info(listener, off=row.reason) for listener in scope.listeners()),
    )
