"""``silbo plugins``: its arguments, and showing the plugins of an app."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from silbo.cli.app_arguments import add_app_arguments, open_app_of
from silbo.cli.arguments import Commands, add_command, add_json_option
from silbo.cli.output import print_json, print_note
from silbo.cli.rich_output import print_table
from silbo.operations.formatting import format_number

if TYPE_CHECKING:
    from silbo.operations.plugins import PluginInfo
    from silbo.policy import Policy

__all__ = ["add_to"]

COLUMNS: Final = ("name", "version", "state", "limits", "needs", "settings", "hears", "failures", "tasks")

EPILOG = """\
Shows the plugins as they are after the app has loaded them, in a process of its own: a plugin that a running
program has switched off is on here. A plugin that could not be loaded is told on stderr.

APP is most often the function or async context manager that loads the plugins. "limits" are what the
host's policy allows; "hears" are the names for which the plugin has listeners.

examples:
  silbo plugins shop.web:open_plugins
  silbo plugins shop.web:open_plugins --json | jq '{name, requires, settings}'
"""


def add_to(commands: Commands) -> None:
    """Add ``silbo plugins``."""
    parser = add_command(
        commands,
        "plugins",
        "the plugins of a program: state, limits, needs, listeners",
        epilog=EPILOG,
        run=show_plugins,
    )
    add_app_arguments(
        parser,
        "a silbo.Plugins, a dispatcher that has plugins, or an app that holds one",
        example="shop.web:open_plugins",
    )
    add_json_option(parser, "one JSON object for each plugin")


async def show_plugins(options: argparse.Namespace) -> int:
    """Print the plugins of an app."""
    from silbo.operations.plugins import list_plugins

    async with open_app_of(options) as app:
        plugins = list_plugins(app)
    if options.json:
        for plugin in plugins:
            print_json(asdict(plugin))
    elif plugins:
        print_table(COLUMNS, [_to_cells(plugin) for plugin in plugins], numbers=["failures", "tasks"])
    if not plugins:
        print_note("no plugin is loaded")
    return 0


def _to_cells(plugin: PluginInfo) -> tuple[object, ...]:
    host = () if plugin.host_version is None else (f"host {plugin.host_version}",)
    order = (
        f"{word} {', '.join(names)}" for word, names in (("before", plugin.before), ("after", plugin.after)) if names
    )
    return (
        plugin.name,
        plugin.version,
        f"{plugin.state}: {plugin.reason}" if plugin.reason else plugin.state,
        _format_limits(plugin.policy),
        ", ".join((*plugin.requires, *host, *order)),
        plugin.settings,
        ", ".join(dict.fromkeys(listener.name for listener in plugin.listeners)),
        plugin.failures,
        plugin.tasks,
    )


def _format_limits(policy: Policy) -> str:
    """Return the limits of a policy and its budget as ``timeout 5 s, on failure ignore, 3 failures in 60 s``."""
    budget = policy.budget
    limits = [
        "" if policy.timeout is None else f"timeout {format_number(policy.timeout)} s",
        "" if policy.on_failure is None else f"on failure {policy.on_failure}",
    ]
    if budget is not None:
        if budget.failures is not None:
            limits.append(f"{budget.failures} failures in {format_number(budget.window)} s")
        if budget.loop_time is not None:
            limits.append(f"{format_number(budget.loop_time)} s of the event loop a second")
    return ", ".join(filter(None, limits))
