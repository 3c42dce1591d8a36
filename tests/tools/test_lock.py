"""requirements/ pins everything that pyproject.toml asks for, and names no place where it comes from."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tools.lock import FOLDER, read_all_pins, read_pins

PROJECT: dict[str, Any] = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())
GROUPS: dict[str, list[Any]] = PROJECT["dependency-groups"]
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
FILES = sorted(FOLDER.glob("*.txt"))


def asked(group: str) -> list[Requirement]:
    """What a group asks for itself, without the groups that it includes."""
    return [Requirement(entry) for entry in GROUPS[group] if isinstance(entry, str)]


def pinned(part: str) -> dict[str, str]:
    found = [Requirement(pin.partition(" \\")[0]) for pin in read_all_pins(FOLDER / f"{part}.txt")]
    return {requirement.name: str(requirement.specifier).removeprefix("==") for requirement in found}


def test_each_group_has_its_file() -> None:
    assert {file.stem for file in FILES} == {*GROUPS, "silbo", "oldest"}


@pytest.mark.parametrize("part", ["silbo", *GROUPS])
def test_what_pyproject_asks_for_is_pinned_within_its_bounds(part: str) -> None:
    """Where this fails, pyproject.toml was changed without `make lock`."""
    wanted = [] if part in {"build", "lock", "redis"} else [*map(Requirement, PROJECT["project"]["dependencies"])]
    if part in GROUPS:
        wanted += asked(part)
    if part in {"demo", "test", "services", "check", "docs", "dev"}:
        wanted += [Requirement(entry) for extra in EXTRAS.values() for entry in extra]
    pins = pinned(part)
    for requirement in wanted:
        assert requirement.name in pins, requirement
        assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_oldest_is_each_lower_bound_that_pyproject_states() -> None:
    pins = pinned("oldest")
    wanted = [
        *map(Requirement, PROJECT["project"]["dependencies"]),
        *(Requirement(entry) for extra in EXTRAS.values() for entry in extra),
        *asked("demo"),
        *asked("test"),
    ]
    for requirement in wanted:
        lowest = {specifier.version for specifier in requirement.specifier if specifier.operator == ">="}
        assert any(re.fullmatch(rf"{re.escape(bound)}(\.0)*", pins[requirement.name]) for bound in lowest), requirement


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_pin_is_exact_and_has_hashes(file: Path) -> None:
    for pin in read_pins(file):
        first, *hashes = pin.splitlines()
        assert re.match(r"[a-z0-9-]+==[0-9][0-9a-z.]*( ; .*)? \\$", first), first
        assert hashes and all(re.match(r"    --hash=sha256:[0-9a-f]{64}( \\)?$", line) for line in hashes), pin


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_no_file_names_an_index_or_a_path(file: Path) -> None:
    text = file.read_text().removeprefix("# Written by `make lock` from pyproject.toml. Do not edit.\n")
    assert not re.search(r"https?:|file:|//|index|--find-links|@|^/", text, re.MULTILINE)
    assert not re.search(r"(?<!^-r )\b[a-z]+/", text)
