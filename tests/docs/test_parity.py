"""The page of what the sources show: each row has a program and tests that are there, and each program a row."""

from __future__ import annotations

import re
from pathlib import Path

from tests.examples import test_from_sources

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ROOT / "examples" / "from_sources"


PAGE = ROOT / "docs" / "reference" / "parity.md"


def rows() -> list[tuple[str, list[str], list[str]]]:
    """What is shown, the programs, or pages in their place, and the tests; of both tables."""
    text = PAGE.read_text().partition("<!-- parity -->")[2].partition("<!-- /parity -->")[0]
    lines = [line.strip("|").split("|") for line in text.splitlines() if re.match(r"\| \S", line)]
    found = [
        (shown.strip(), re.findall(r"`(.+?)`|\]\((.+?)\)", by), re.findall(r"`(.+?)`", proved))
        for shown, by, proved in lines
    ]
    return [(shown, [program or page for program, page in by], tests) for shown, by, tests in found if shown]


def test_each_row_names_programs_and_tests_that_exist() -> None:
    """A test that is renamed or taken away takes its row with it."""
    found = rows()
    assert len(found) > 35
    assert len({shown for shown, _, _ in found}) == len(found)
    for shown, programs, tests in found:
        assert programs, shown
        assert tests, shown
        for program in programs:
            is_page = program.endswith(".md")
            assert (PAGE.parent / program if is_page else PROGRAMS / f"{program}.py").is_file(), program
        for name in tests:
            file, _, test = name.partition("::")
            assert f"def {test}(" in ROOT.joinpath("tests", file).read_text(), name


def test_each_program_has_a_row_and_is_run_by_a_test() -> None:
    named = {program for _, programs, _ in rows() for program in programs if not program.endswith(".md")}
    assert named == {path.stem for path in PROGRAMS.glob("*.py")} - {"__init__"}
    tests = (
        Path(test_from_sources.__file__).read_text() + ROOT.joinpath("tests/services/test_from_sources.py").read_text()
    )
    for path in PROGRAMS.glob("*.py"):
        if "__main__" in path.read_text():
            assert f'"{path.stem}"' in tests, f"nothing runs {path.name}"
