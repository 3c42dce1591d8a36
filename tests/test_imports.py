"""Who may import what: the part of the arrows in setup.cfg that import-linter has no words for."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import silbo
from tests.support.source import parse_source

PACKAGE = Path(silbo.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# Beyond the standard library and silbo itself. The first entry that a path starts with counts.
ALLOWED: dict[str, set[str]] = {
    "wire": {"msgspec"},
    "outbox/rows": {"msgspec"},
    "brokers/azure": {"azure"},
    "brokers/kafka": {"aiokafka"},
    "brokers/memory": set(),
    "brokers/rabbitmq": {"aio_pika", "aiormq"},
    "brokers/redis/incoming": {"hiredis", "redis"},
    "brokers/redis": {"redis"},
    "cli": {"opentelemetry", "prometheus_client", "redis", "rich", "sqlalchemy"},
    "containers/rodi": {"rodi"},
    "containers/dishka": {"dishka"},
    "containers/di": {"di"},
    "containers/dependency_injector": {"dependency_injector"},
    "instrumentation": {"opentelemetry"},
    "operations": {"redis"},
    "plugins": {"msgspec", "packaging"},
    "stores/sqlalchemy": {"sqlalchemy"},
    "testing": set(),
    "web": {"redis"},
    "": {"whistle"},
}


def imported(module: Path) -> Iterator[str]:
    """Top-level packages that a file imports anywhere, inside functions and under TYPE_CHECKING too."""
    tree = parse_source(module.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            # Every type checker brings typing_extensions; at run time it is not there.
            node.body = [inner for inner in node.body if getattr(inner, "module", "") != "typing_extensions"]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import"
            yield str(node.module).partition(".")[0]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(PACKAGE)))
def test_module_imports_only_what_its_place_allows(module: Path) -> None:
    place = module.relative_to(PACKAGE).with_suffix("").as_posix()
    allowed = next(names for start, names in ALLOWED.items() if place.startswith(start))
    assert set(imported(module)) - sys.stdlib_module_names - {"silbo"} <= allowed


def test_import_loads_nothing_but_silbo_whistle_and_msgspec() -> None:
    """A program that only dispatches does not pay for Redis."""
    # What msgspec and whistle themselves find and load, as typing_extensions, is not ours.
    code = (
        "import sys, msgspec, whistle; msgspec.convert(1, int); old = set(sys.modules); import silbo; "
        "print('silbo', *{m.partition('.')[0] for m in set(sys.modules) - old})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = {name for name in out.split() if name not in sys.stdlib_module_names}
    assert loaded == {"silbo"}
