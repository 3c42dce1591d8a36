"""Plugins found through entry points of installed distributions, each in a Python of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from silbo.plugins.entry_points import find_plugins

_SCRIPT = """
import json, sys
from silbo.plugins.entry_points import find_plugins
rows = [
    {
        "name": each.name,
        "plugin": each.plugin and [each.plugin.name, each.plugin.version, each.plugin.package],
        "error": each.error and [type(each.error).__name__, str(each.error), type(each.error.__cause__).__name__],
        "distribution": each.distribution,
    }
    for each in find_plugins("shop.plugins", allow=json.loads(sys.argv[1]))
]
print(json.dumps([rows, [name for name in sys.modules if name.startswith("acme")]]))
"""

PLUGIN = "from silbo import Plugin\ndef setup(view): ...\nplugin = Plugin(setup, name={name!r}, version={version!r})\n"
FUNCTION = "def setup(view): ...\n"


def install(folder: Path, name: str, version: str, entries: dict[str, str], **modules: str) -> None:
    """Lay out a distribution as an installer does.

    Args:
        folder: A folder for ``sys.path``.
        name: The name of the distribution.
        version: Its version.
        entries: The entry points of the group.
        modules: The text of each of its modules.
    """
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    info.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"{entry} = {value}" for entry, value in entries.items()]
    info.joinpath("entry_points.txt").write_text("\n".join(["[shop.plugins]", *lines, ""]))
    for module, text in modules.items():
        folder.joinpath(f"{module}.py").write_text(text)


def find(allow: list[str], *folders: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return what was found, and the modules of plugins that were imported."""
    path = os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", _SCRIPT, json.dumps(allow)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    rows, modules = json.loads(done.stdout)
    return rows, modules


def test_only_allowed_plugins_are_imported(tmp_path: Path) -> None:
    """The others may be broken, slow or hostile: their code does not run."""
    install(tmp_path, "acme-audit", "1.2", {"audit": "acme_audit:setup"}, acme_audit=FUNCTION)
    install(tmp_path, "acme-other", "1", {"other": "acme_other:setup"}, acme_other="raise SystemExit('imported')")
    rows, modules = find(["audit"], tmp_path)
    assert rows == [
        {"name": "audit", "plugin": ["audit", "1.2", "acme_audit"], "error": None, "distribution": "acme-audit"}
    ]
    assert modules == ["acme_audit"]
    assert find([], tmp_path) == ([], [])


def test_records_come_in_the_order_of_the_list(tmp_path: Path) -> None:
    install(tmp_path, "acme-a", "1", {"a": "acme_a:setup", "b": "acme_a:setup"}, acme_a=FUNCTION)
    rows, _ = find(["b", "a", "b"], tmp_path)
    assert [row["name"] for row in rows] == ["b", "a"]


def test_version_that_a_plugin_states_comes_before_its_distribution(tmp_path: Path) -> None:
    install(
        tmp_path,
        "acme-both",
        "1.2",
        {"stated": "acme_stated:plugin", "default": "acme_default:plugin"},
        acme_stated=PLUGIN.format(name="stated", version="7.1"),
        acme_default=PLUGIN.format(name="default", version=None),
    )
    rows, _ = find(["stated", "default"], tmp_path)
    assert [row["plugin"] for row in rows] == [["stated", "7.1", "acme_stated"], ["default", "1.2", "acme_default"]]


BROKEN = {
    "acme_broken": ("import acme_absent", "ModuleNotFoundError", "No module named 'acme_absent'"),
    "acme_syntax": ("def setup(", "SyntaxError", "acme_syntax.py"),
    "acme_exit": ("raise SystemExit('not on this machine')", "SystemExit", "not on this machine"),
    "acme_empty": ("", "AttributeError", "setup"),
    "acme_value": ("setup = 42", "NoneType", "42 is no plugin: a plugin is a function"),
}


def test_broken_plugins_are_reported_and_stop_no_other(tmp_path: Path) -> None:
    modules = {module: text for module, (text, _, _) in BROKEN.items()}
    entries = {module: f"{module}:setup" for module in modules} | {"acme_good": "acme_good:setup"}
    install(tmp_path, "acme-many", "1.2", entries, acme_good=FUNCTION, **modules)
    rows, _ = find([*BROKEN, "acme_good"], tmp_path)
    assert rows[-1]["plugin"] == ["acme_good", "1.2", "acme_good"]
    for row, (module, (_, cause, text)) in zip(rows, BROKEN.items(), strict=False):
        assert row["plugin"] is None
        assert row["error"][::2] == ["PluginInvalid", cause]
        assert row["error"][1].startswith(f"plugin {module!r}: ")
        assert text in row["error"][1]
        assert row["distribution"] == "acme-many"
        if cause != "NoneType":
            assert f"{module}:setup of acme-many 1.2 can't be imported: {cause}" in row["error"][1]


def test_name_that_nobody_offers_is_answered_with_the_nearest(tmp_path: Path) -> None:
    install(tmp_path, "acme-audit", "1.2", {"audit": "acme_audit:setup"}, acme_audit=FUNCTION)
    (row,), modules = find(["adit"], tmp_path)
    assert row["error"][:2] == [
        "PluginMissing",
        "plugin 'adit': no installed distribution offers it in the group 'shop.plugins' of entry points; did you mean 'audit'?",
    ]
    assert modules == []


def test_name_that_two_distributions_offer_is_an_error_that_names_both(tmp_path: Path) -> None:
    """To take the first would load another plugin after the next installation."""
    install(tmp_path, "acme-audit", "1.2", {"audit": "acme_audit:setup"}, acme_audit=FUNCTION)
    install(tmp_path, "acme-second", "3", {"audit": "acme_second:setup"}, acme_second=FUNCTION)
    (row,), modules = find(["audit"], tmp_path)
    kind, text, _ = row["error"]
    assert kind == "PluginConflict"
    assert "acme-audit 1.2 (acme_audit:setup)" in text
    assert "acme-second 3 (acme_second:setup)" in text
    assert modules == []


def test_distribution_that_hides_another_version_of_itself_is_one(tmp_path: Path) -> None:
    """As after ``pip install --user`` of a newer version: Python imports the first of the path."""
    for version in ("2", "1"):
        install(tmp_path / version, "acme-audit", version, {"audit": "acme_audit:setup"}, acme_audit=FUNCTION)
    (row,), _ = find(["audit"], tmp_path / "2", tmp_path / "1")
    assert row["plugin"] == ["audit", "2", "acme_audit"]


def test_plugin_without_a_name_gets_that_of_its_entry_point(tmp_path: Path) -> None:
    """``Plugin(setup)`` states no name; a function alone gets the name of the entry point, and so does this."""
    text = "from silbo import Plugin\ndef setup(dispatcher): ...\nplugin = Plugin(setup)\n"
    install(tmp_path, "acme-audit", "1", {"audit": "acme_audit:plugin"}, acme_audit=text)
    (row,), _ = find(["audit"], tmp_path)
    assert row["plugin"][0] == "audit"


def test_plugin_under_another_name_is_an_error(tmp_path: Path) -> None:
    """The host allows one name, and other plugins require the other: settings and order would be lost without a word."""
    install(
        tmp_path, "acme-audit", "1", {"audit": "acme_audit:plugin"}, acme_audit=PLUGIN.format(name="log", version="1")
    )
    (row,), _ = find(["audit"], tmp_path)
    assert row["error"][:2] == [
        "PluginInvalid",
        "plugin 'audit': acme_audit:plugin of acme-audit 1 is the plugin 'log'; its entry point and Plugin(name=) have to be the same",
    ]


def test_one_name_in_place_of_a_list_is_refused() -> None:
    with pytest.raises(TypeError, match="allow is a list"):
        find_plugins("shop.plugins", allow="audit")
