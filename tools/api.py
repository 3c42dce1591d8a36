"""The public API as text, a line for each name with its signature: of ``silbo``, and of what docs/reference describes.

    python -m tools.api          print it
    python -m tools.api --write  write it to tests/docs/api.txt, as that of the version in silbo/__init__.py

`make release` asks for the second, which wants that version at the top of CHANGELOG.md. From then on tests/docs/test_api.py is red when a name goes, or its signature changes,
until CHANGELOG.md names it.
"""

from __future__ import annotations

import enum
import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, get_origin

import silbo

ROOT: Final = Path(__file__).resolve().parent.parent
RECORD: Final = ROOT / "tests" / "docs" / "api.txt"

DIRECTIVE: Final = re.compile(
    r"^\.\. auto(module|class|function|exception|data):: (silbo[\w.]*)\n((?:   :.*\n)*)", re.MULTILINE
)


def main(*options: str) -> int:
    lines = list_api()
    if options == ("--write",):
        heading = re.search(r"^## (.*)$", ROOT.joinpath("CHANGELOG.md").read_text(), re.MULTILINE)
        if heading is None or not heading[1].startswith(f"{silbo.__version__} - "):
            print(
                f"{RECORD.name} stays the public API of the last release: CHANGELOG.md does not begin with {silbo.__version__}"
            )
            return 1
        RECORD.write_text(
            "\n".join([f"# The public API of silbo {silbo.__version__}. Written by `make api`.", *lines, ""])
        )
        print(f"{len(lines)} names, in {RECORD.relative_to(ROOT)}")
    elif options:
        print(__doc__)
        return 2
    else:
        print(*lines, sep="\n")
    return 0


def list_api() -> list[str]:
    """Return the lines, ``name signature``, sorted."""
    places = {f"silbo.{name}" for name in silbo.__all__}
    for page in ROOT.joinpath("docs", "reference").glob("*.md"):
        for kind, place, options in DIRECTIVE.findall(page.read_text()):
            places.update([place] if kind != "module" else _list_members(place, options))
    lines: dict[str, str] = {}
    for place in places:
        for name, value in _list_parts(place):
            lines[name] = _describe(value)
    return sorted(f"{name} {text}".rstrip() for name, text in lines.items())


def find_unannounced(released: Sequence[str], now: Sequence[str], news: str) -> list[str]:
    """Return the names that are gone or have another signature, and that the news don't name.

    A name is named where its last part stands in backticks: `` `Consumer.run` ``, `` `run()` ``. The name of a class that is gone
    stands for its attributes.
    """
    said = {word for code in re.findall(r"`([^`]+)`", news) for word in re.findall(r"\w+", code)}
    kept = {line.partition(" ")[0] for line in now}
    changed = {line.partition(" ")[0] for line in set(released) - set(now)}

    def is_said(name: str) -> bool:
        owner, _, last = name.rpartition(".")
        return last in said or (owner in changed and owner not in kept and is_said(owner))

    return sorted(name for name in changed if not is_said(name))


def _list_members(module: str, options: str) -> list[str]:
    named = re.search(r":members: (.+)", options)
    names = named[1].split(", ") if named else importlib.import_module(module).__all__
    return [f"{module}.{name}" for name in names]


def _list_parts(place: str) -> Iterator[tuple[str, Any]]:
    """Yield a public object, and if it is a class of silbo's its public attributes."""
    module, name = _split(place)
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    yield place, value
    if not inspect.isclass(value) or not value.__module__.startswith("silbo"):
        return
    found = dict[str, Any]()
    for base in reversed(value.__mro__):
        if base.__module__.startswith("silbo"):
            found.update(dict.fromkeys(vars(base).get("__annotations__", {})))
            found.update(vars(base))
    for attribute, member in found.items():
        if not attribute.startswith("_"):
            yield f"{place}.{attribute}", member


def _split(place: str) -> tuple[Any, str]:
    parts = place.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            return importlib.import_module(".".join(parts[:length])), ".".join(parts[length:])
        except ModuleNotFoundError:
            continue
    raise LookupError(place)


def _describe(value: Any) -> str:
    """Return a signature without its annotations: a type that is told more exactly breaks nobody."""
    if isinstance(value, classmethod | staticmethod):
        value = value.__func__
    if isinstance(value, property):
        return "property"
    if inspect.isclass(value) and issubclass(value, enum.Enum):
        return "enum"
    if not callable(value) or get_origin(value) is not None:  # Pythons describe Callable[...] differently
        return ""
    try:
        signature = inspect.signature(value)
    except (ValueError, TypeError):
        return "callable"
    parameters = [
        each.replace(annotation=inspect.Parameter.empty, default=_plain(each.default))
        for each in signature.parameters.values()
    ]
    text = str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))
    return f"async {text}" if inspect.iscoroutinefunction(value) else text


class _Text(str):
    """Text that is shown as it is in a signature."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _plain(default: Any) -> Any:
    """Return a default whose text is the same in each process and on each Python."""
    if default is inspect.Parameter.empty or isinstance(default, bool | int | float | str | bytes | None):
        return default
    if isinstance(default, tuple) and not default:
        return default
    return _Text("...")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
