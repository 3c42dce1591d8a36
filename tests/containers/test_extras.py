"""A container whose library is not installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

_HIDING = """
import sys
import silbo.containers
class Hiding:
    def find_spec(self, name, path=None, target=None):
        if name == {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
for name in [name for name in sys.modules if name.partition(".")[0] == {hidden!r}]:
    del sys.modules[name]
sys.meta_path.insert(0, Hiding())
try:
    import silbo.containers.{module}
except ImportError as error:
    print(type(error).__name__, "|", error)
"""


def _import_without(hidden: str, module: str) -> str:
    script = [sys.executable, "-c", _HIDING.format(hidden=hidden, module=module)]
    return subprocess.run(script, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("module", ["rodi", "di", "dependency_injector", "dishka"])
def test_without_its_library_the_import_says_what_to_install(module: str) -> None:
    extra = module.replace("_", "-")
    wanted = f"silbo.containers.{module} needs a library that is not installed: pip install 'silbo[{extra}]'"
    assert _import_without(module, module) == f"MissingExtra | {wanted}"


@pytest.mark.parametrize(
    ("module", "needs"),
    [
        ("rodi", "inspect"),
        ("di", "di.executors"),
        ("dependency_injector", "configparser"),
        ("dishka", "dishka.exception_base"),
    ],
)
def test_a_broken_library_is_not_taken_for_a_missing_one(module: str, needs: str) -> None:
    """What it can't import itself is named as it is."""
    assert _import_without(needs, module) == f"ModuleNotFoundError | No module named {needs!r}"
