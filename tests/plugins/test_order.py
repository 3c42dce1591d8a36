"""The order in which plugins are loaded and run, and the versions that they ask for."""

from __future__ import annotations

import subprocess
import sys
from itertools import permutations
from typing import Any

import pytest

from silbo.errors import PluginConflict, PluginInvalid, PluginMissing
from silbo.plugins.order import load_order, running_order
from silbo.plugins.plugin import Plugin


def setup(view: object) -> None: ...


def plugin(name: str, **stated: Any) -> Plugin:
    return Plugin(setup, name=name, **stated)


def names(plugins: list[Plugin]) -> list[str]:
    return [each.name for each in plugins]


# -- load order ---------------------------------------------------------------------------------------------


def test_order_given_is_kept() -> None:
    plugins = [plugin(name) for name in ["zebra", "apple", "mango"]]
    assert load_order(plugins) == plugins
    assert running_order(plugins) == ["zebra", "apple", "mango"]


def test_required_plugin_is_loaded_first() -> None:
    a, b, c = plugin("a", requires=["c"]), plugin("b", requires=["a"]), plugin("c")
    for given in permutations((a, b, c)):
        assert names(load_order(given)) == ["c", "a", "b"]


def test_plugins_without_a_constraint_stay_where_they_were_given() -> None:
    """A plugin that others need moves to the front of them, and nothing else moves."""
    a, b, c, d = plugin("a"), plugin("b", requires=["a"]), plugin("c"), plugin("d", requires=["a"])
    assert names(load_order([a, b, c, d])) == ["a", "b", "c", "d"]
    assert names(load_order([b, c, a, d])) == ["a", "b", "c", "d"]
    assert running_order([a, plugin("b", after=["a"]), c]) == ["a", "b", "c"]


def test_required_plugins_keep_the_order_given() -> None:
    """The order in which a plugin lists them says nothing."""
    assert names(load_order([plugin("x", requires=["b", "a"]), plugin("a"), plugin("b")])) == ["a", "b", "x"]


def test_missing_plugin_is_an_error_that_names_both() -> None:
    with pytest.raises(PluginMissing) as raised:
        load_order([plugin("audit"), plugin("billing", requires=["adit"])])
    assert str(raised.value) == "plugin 'adit': 'billing' requires it, and it is not loaded; did you mean 'audit'?"
    assert (raised.value.plugin, isinstance(raised.value, LookupError)) == ("adit", True)


def test_two_plugins_of_one_name_are_refused() -> None:
    with pytest.raises(PluginConflict, match="two plugins have this name") as raised:
        load_order([plugin("audit"), plugin("audit", version="2")])
    assert raised.value.plugin == "audit"


@pytest.mark.parametrize(
    ("requirement", "version"),
    [
        ("audit", None),
        ("audit>=1.2", "1.2"),
        ("audit >=1.2, <2", "1.10"),
        ("audit==1.*", "1.9.post1"),
        ("audit>=1.2", "1.3.dev1"),  # a development version that is installed counts
        (" audit ~= 1.2 ", "1.4"),
    ],
)
def test_version_that_fits(requirement: str, version: str | None) -> None:
    assert names(load_order([plugin("x", requires=[requirement]), plugin("audit", version=version)])) == ["audit", "x"]


@pytest.mark.parametrize("version", ["1.1", "2", "2.0rc1", "1.2.dev1"])
def test_wrong_version_is_an_error_that_names_both(version: str) -> None:
    with pytest.raises(PluginConflict) as raised:
        load_order([plugin("billing", requires=["audit>=1.2,<2"]), plugin("audit", version=version)])
    assert str(raised.value) == (
        f"plugin 'billing': it works with versions >=1.2,<2 of plugin 'audit', and that is version {version}"
    )


def test_requirement_of_a_version_that_is_not_stated_is_an_error() -> None:
    with pytest.raises(PluginConflict, match=r"'billing': it requires 'audit>=1', and 'audit' states no version"):
        load_order([plugin("billing", requires=["audit>=1"]), plugin("audit")])


def test_host_version_is_checked() -> None:
    audit = plugin("audit", host_version=">=2,<3")
    assert load_order([audit], host_version="2.4") == [audit]
    with pytest.raises(PluginConflict, match=r"versions >=2,<3 of the host, and that is version 3\.1"):
        load_order([audit], host_version="3.1")


def test_host_version_that_nobody_told_is_an_error() -> None:
    """A check that can't be made is not taken for passed."""
    with pytest.raises(PluginConflict, match="the host has not told its own: give host_version="):
        load_order([plugin("audit", host_version=">=2")])
    assert load_order([plugin("audit")])


@pytest.mark.parametrize(
    "requirement", ["", ">=1", "audit[extra]>=1", "audit>1<2", "audit one", "audit; python_version<'4'"]
)
def test_requirement_that_can_not_be_read_is_an_error(requirement: str) -> None:
    with pytest.raises(PluginInvalid, match="plugin 'billing': ") as raised:
        load_order([plugin("billing", requires=[requirement]), plugin("audit", version="1")])
    assert "'audit>=1.2,<2'" in str(raised.value) or "'>=1.2,<2'" in str(raised.value)


def test_version_that_can_not_be_read_is_an_error_of_its_owner() -> None:
    with pytest.raises(PluginInvalid, match="plugin 'audit': its version 'one' is none"):
        load_order([plugin("billing", requires=["audit>=1"]), plugin("audit", version="one")])
    with pytest.raises(ValueError, match="host_version is a version as '2.4', not 'two'"):
        load_order([plugin("audit", host_version=">=2")], host_version="two")


def test_circle_of_requirements_is_shown() -> None:
    a, b, c, d = (plugin(n, requires=[r]) for n, r in ("ab", "bc", "ca", "da"))
    for given in ([a, b, c, d], [a, c, b, d], [d, a, c, b]):
        with pytest.raises(PluginConflict) as raised:
            load_order(given)
        assert str(raised.value) == "plugin 'a': plugins require one another in a circle: a -> b -> c -> a"
        assert raised.value.circle == ("a", "b", "c", "a")


def test_plugin_that_requires_itself_is_a_circle() -> None:
    with pytest.raises(PluginConflict, match="a -> a"):
        load_order([plugin("a", requires=["a"])])


_WITHOUT_PACKAGING = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name == "packaging":
            raise ModuleNotFoundError("No module named 'packaging'", name="packaging")
sys.meta_path.insert(0, Hidden())
from silbo.plugins.order import load_order
from silbo.plugins.plugin import Plugin
def setup(view): ...
audit = Plugin(setup, name="audit", version="1")
print([each.name for each in load_order([Plugin(setup, name="b", requires=["audit"]), audit])])
try:
    load_order([Plugin(setup, name="b", requires=["audit>=1"]), audit])
except ImportError as error:
    print(type(error).__name__, error)
"""


def test_packaging_is_needed_only_where_a_version_is_asked_for() -> None:
    done = subprocess.run([sys.executable, "-c", _WITHOUT_PACKAGING], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "['audit', 'b']",
        "MissingExtra silbo.plugins.order needs a library that is not installed: pip install 'silbo[plugins]'",
    ]


# -- running order ------------------------------------------------------------------------------------------


def test_running_order_follows_before_and_after() -> None:
    plugins = [plugin("a", after=["b"]), plugin("b"), plugin("c", before=["b"])]
    assert running_order(plugins) == ["c", "b", "a"]


def test_plugins_that_are_not_loaded_are_ignored() -> None:
    assert running_order([plugin("a", after=["x"]), plugin("b", before=["y"])]) == ["a", "b"]


def test_order_said_on_both_sides_is_no_circle() -> None:
    assert running_order([plugin("a", after=["b"]), plugin("b", before=["a"])]) == ["b", "a"]


def test_circle_of_before_and_after_is_shown() -> None:
    plugins = [plugin("x"), plugin("b", before=["c"]), plugin("a", before=["b"]), plugin("c", before=["a"])]
    with pytest.raises(PluginConflict) as raised:
        running_order(plugins)
    assert raised.value.circle == ("b", "c", "a", "b")
    assert str(raised.value) == "plugin 'b': plugins ask to run before one another in a circle: b -> c -> a -> b"
