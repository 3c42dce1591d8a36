"""The tests that the how-to shows pass in a project that has its files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.snippets import snippets
from tests.testing.test_plugin import OPTIONS, no_other_plugins

__all__ = ["no_other_plugins"]

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "testing.md"


def test_the_tests_of_the_page_pass(pytester: pytest.Pytester) -> None:
    for snippet in snippets(PAGE.read_text()):
        if snippet.file is not None:
            pytester.path.joinpath(snippet.file).write_text(snippet.code)
    result = pytester.runpytest_subprocess(*OPTIONS, "-W", "error", timeout=50)
    result.assert_outcomes(passed=6)
