"""Answers about plugins: state, limits, needs, settings' class, and what each has registered."""

from __future__ import annotations

from pathlib import Path

import pytest

from silbo.errors import AppInvalid
from silbo.operations.app import open_app
from silbo.operations.plugins import list_plugins


async def test_plugin_with_all_that_it_states_and_has(folder: Path) -> None:
    """But not the values of its settings: they may be secrets."""
    async with open_app("shop.web:opened", app_dir=str(folder)) as app:
        (plugin,) = list_plugins(app)
    assert (plugin.name, plugin.version, plugin.state, plugin.reason) == ("audit", "1.2", "on", "")
    assert plugin.settings == "shop.web.AuditSettings" and "secret" not in repr(plugin)
    assert plugin.policy.timeout == 3 and plugin.policy.budget is not None and plugin.policy.budget.failures == 2
    assert [(row.name, row.plugin) for row in plugin.listeners] == [("order.paid", "audit")]
    assert (plugin.package, plugin.requires, plugin.host_version) == ("shop", (), None)


async def test_plugin_that_is_off_says_why(folder: Path) -> None:
    async with open_app("shop.web:switched_off", app_dir=str(folder)) as app:
        (plugin,) = list_plugins(app)
    assert (plugin.state, plugin.reason, plugin.listeners[0].off) == ("off", "too slow", "too slow")


async def test_app_without_plugins_says_what_to_name(folder: Path) -> None:
    async with open_app("shop.web:dispatcher", app_dir=str(folder)) as app:
        with pytest.raises(AppInvalid, match=r"no silbo\.Plugins"):
            list_plugins(app)
