"""The order in which plugins are loaded, and the order in which their listeners run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter

from silbo._checks import require_extra, suggest_name
from silbo.errors import PluginConflict, PluginInvalid, PluginMissing
from silbo.plugins.plugin import NAME, Plugin

__all__ = ["check_plugin", "load_order", "required_names", "requirement_order", "running_order"]


def load_order(plugins: Iterable[Plugin], *, host_version: str | None = None) -> list[Plugin]:
    """Return plugins in an order in which each stands after those that it requires; else in the order given.

    Args:
        plugins: All plugins that will be loaded together, with those that are loaded already.
        host_version: The version of the host; needed if a plugin states which one it works with.

    Raises:
        PluginMissing: A required plugin is not among them.
        PluginConflict: Two have one name, a version doesn't fit, or plugins require one another in a circle.
        PluginInvalid: A stated requirement or version can't be read.
        MissingExtra: A version is stated, and ``packaging`` is not installed.
    """
    by_name: dict[str, Plugin] = {}
    for plugin in plugins:
        if by_name.setdefault(plugin.name, plugin) is not plugin:
            raise PluginConflict(
                plugin.name, "two plugins have this name; give one of them another: Plugin(..., name=)"
            )
    for plugin in by_name.values():
        check_plugin(plugin, by_name, host_version=host_version)
    return requirement_order(by_name.values())


def check_plugin(plugin: Plugin, others: Mapping[str, Plugin], *, host_version: str | None = None) -> None:
    """Refuse a plugin that does not work with a host and other plugins.

    Args:
        plugin: The plugin.
        others: The plugins that are there, by name.
        host_version: The version of the host; None if it is not known.

    Raises:
        PluginMissing: A required plugin is not among the others.
        PluginConflict: A version doesn't fit.
        PluginInvalid: A stated requirement or version can't be read.
        MissingExtra: A version is stated, and ``packaging`` is not installed.
    """
    if plugin.host_version is not None:
        if host_version is None:
            raise PluginConflict(
                plugin.name,
                f"it works with versions {plugin.host_version} of the host, and the host has not told its own: give host_version=",
            )
        _check_version(plugin, plugin.host_version, host_version)
    _check_requirements(plugin, others)


def requirement_order(plugins: Iterable[Plugin]) -> list[Plugin]:
    """Return plugins so that each stands after those among them that it requires; else in the order given.

    Raises:
        PluginConflict: Plugins require one another in a circle.
    """
    by_name = {plugin.name: plugin for plugin in plugins}
    required = {
        plugin.name: [name for name in required_names(plugin) if name in by_name] for plugin in by_name.values()
    }
    return [by_name[name] for name in _sort(required, "plugins require one another", backwards=True)]


def running_order(plugins: Iterable[Plugin]) -> list[str]:
    """Return the names of plugins in the order that their ``before`` and ``after`` ask for; else in the order given.

    Names of other plugins in ``before`` and ``after`` are ignored.

    Raises:
        PluginConflict: Plugins ask to run before one another in a circle.
    """
    plugins = list(plugins)
    earlier: dict[str, list[str]] = {plugin.name: [] for plugin in plugins}
    for plugin in plugins:
        earlier[plugin.name] += [name for name in plugin.after if name in earlier]
        for name in plugin.before:
            if name in earlier:
                earlier[name].append(plugin.name)
    return _sort(earlier, "plugins ask to run before one another")


def _sort(earlier: Mapping[str, Iterable[str]], problem: str, *, backwards: bool = False) -> list[str]:
    """Return names so that each stands after those that have to be earlier; else as given.

    Args:
        earlier: The names that have to stand before each name.
        problem: The beginning of the text about a circle.
        backwards: If true, a circle is shown from each name to an earlier one, else to a later one.
    """
    names = list(earlier)
    place = {name: index for index, name in enumerate(names)}
    sorter = TopologicalSorter(earlier)
    try:
        sorter.prepare()
    except CycleError as error:
        found: list[str] = error.args[1][:-1]  # each is earlier than the next; the first stands at the end again
        if backwards:
            found.reverse()
        start = found.index(min(found, key=place.__getitem__))
        circle = (*found[start:], *found[: start + 1])
        raise PluginConflict(circle[0], f"{problem} in a circle: {' -> '.join(circle)}", circle=circle) from None
    order: dict[str, None] = {}

    def place_after_earlier(name: str) -> None:
        if name not in order:
            for other in sorted(earlier[name], key=place.__getitem__):
                place_after_earlier(other)
            order[name] = None

    for name in names:
        place_after_earlier(name)
    return list(order)


def required_names(plugin: Plugin) -> list[str]:
    """Return the names of the plugins that a plugin requires."""
    return [re.split(r"[^A-Za-z0-9._-]", requirement.strip(), maxsplit=1)[0] for requirement in plugin.requires]


def _check_requirements(plugin: Plugin, by_name: Mapping[str, Plugin]) -> None:
    for requirement in plugin.requires:
        match = re.fullmatch(rf"({NAME})\s*([^A-Za-z0-9\s].*)?", requirement.strip())
        if match is None:
            raise PluginInvalid(plugin.name, f"it requires {requirement!r}, which is no requirement as 'audit>=1.2,<2'")
        name, versions = match.groups()
        required = by_name.get(name)
        if required is None:
            raise PluginMissing(name, f"{plugin.name!r} requires it, and it is not loaded{suggest_name(name, by_name)}")
        if versions:
            if required.version is None:
                raise PluginConflict(plugin.name, f"it requires {requirement!r}, and {name!r} states no version")
            _check_version(plugin, versions, required)


def _check_version(plugin: Plugin, versions: str, of: Plugin | str) -> None:
    """Refuse a version that is not among those that a plugin states.

    Args:
        plugin: The plugin.
        versions: Specifiers, as ``">=1.2,<2"``.
        of: The required plugin, or the version of the host.
    """
    with require_extra("silbo.plugins.order", extra="plugins", libraries=("packaging",)):
        from packaging.specifiers import InvalidSpecifier, SpecifierSet
        from packaging.version import InvalidVersion, Version
    try:
        wanted = SpecifierSet(versions)
    except InvalidSpecifier:
        raise PluginInvalid(plugin.name, f"{versions!r} states no versions as '>=1.2,<2' does (PEP 440)") from None
    version = str(of.version) if isinstance(of, Plugin) else of
    try:
        found = Version(version)
    except InvalidVersion:
        if isinstance(of, Plugin):
            raise PluginInvalid(of.name, f"its version {version!r} is none as '1.2' (PEP 440)") from None
        raise ValueError(f"host_version is a version as '2.4', not {version!r}") from None
    if not wanted.contains(found, prereleases=True):
        other = f"plugin {of.name!r}" if isinstance(of, Plugin) else "the host"
        raise PluginConflict(
            plugin.name, f"it works with versions {versions} of {other}, and that is version {version}"
        )
