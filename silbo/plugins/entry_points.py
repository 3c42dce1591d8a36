"""Plugins of installed distributions, found through entry points: only those that the host allows are imported."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from silbo._checks import check_list, suggest_name
from silbo._reports import describe_error
from silbo.errors import PluginConflict, PluginError, PluginInvalid, PluginMissing
from silbo.plugins.plugin import Plugin, as_plugin

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["FoundPlugin", "find_plugins"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundPlugin:
    """An allowed plugin: imported, or with the reason why not.

    Attributes:
        name: The name on the host's list.
        plugin: The plugin; None if there is an error.
        error: The reason why it can't be loaded; None if there is a plugin.
        distribution: The name of the distribution that offers it; empty if none does, or more than one.
    """

    name: str
    plugin: Plugin | None = None
    error: PluginError | None = None
    distribution: str = ""


def find_plugins(group: str, *, allow: Iterable[str]) -> list[FoundPlugin]:
    """Import the allowed plugins of a group of entry points. Nothing else is imported, and an error stops no other plugin.

    Args:
        group: The group that the host names for its plugins, as ``"myhost.plugins"``.
        allow: The names of the entry points that may be imported.

    Returns:
        One record for each allowed name, in the order of the list. The name of the entry point is the plugin's name; the version
        of the distribution is the plugin's, unless that states one.
    """
    from importlib.metadata import entry_points  # slow to import, and needed by hosts with entry points only

    offered: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=group):
        offered.setdefault(entry.name, []).append(entry)
    return [_find(group, name, offered) for name in dict.fromkeys(check_list("allow", allow))]


def _find(group: str, name: str, offered: dict[str, list[EntryPoint]]) -> FoundPlugin:
    entries = offered.get(name, ())
    if not entries:
        hint = suggest_name(name, sorted(offered))
        problem = f"no installed distribution offers it in the group {group!r} of entry points{hint}"
        return FoundPlugin(name=name, error=PluginMissing(name, problem))
    if len(entries) > 1:
        return FoundPlugin(name=name, error=PluginConflict(name, _tell_owners(entries)))
    (entry,) = entries
    distribution = "" if entry.dist is None else entry.dist.name
    try:
        return FoundPlugin(name=name, plugin=_import(entry), distribution=distribution)
    except PluginError as error:
        return FoundPlugin(name=name, error=error, distribution=distribution)


def _tell_owners(entries: Sequence[EntryPoint]) -> str:
    owners = " and ".join(f"{_owner(entry)} ({entry.value})" for entry in entries)
    return f"it is offered more than once, and was not imported: {owners}; uninstall one"


def _owner(entry: EntryPoint) -> str:
    return "an unknown distribution" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"


def _import(entry: EntryPoint) -> Plugin:
    """Return the plugin of an entry point.

    Raises:
        PluginInvalid: It can't be imported, is no plugin, or states another name.
    """
    try:
        candidate = entry.load()
    except (Exception, SystemExit) as error:  # a module is any code: one that exits doesn't end the host
        problem = f"{entry.value} of {_owner(entry)} can't be imported: {describe_error(error)}"
        raise PluginInvalid(entry.name, problem) from error
    if isinstance(candidate, Plugin) and candidate.name not in (entry.name, candidate.default_name):
        raise PluginInvalid(
            entry.name,
            f"{entry.value} of {_owner(entry)} is the plugin {candidate.name!r}; its entry point and Plugin(name=) have to be the same",
        )
    plugin = as_plugin(candidate, name=entry.name)
    if plugin.version is None and entry.dist is not None:
        return replace(plugin, version=entry.dist.version)
    return plugin
