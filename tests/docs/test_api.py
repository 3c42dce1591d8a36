"""The public API is that of the last release, but for what the changelog names."""

from __future__ import annotations

from pathlib import Path

import pytest

import silbo
from silbo import Backoff
from tools import api
from tools.api import RECORD, ROOT, find_unannounced, list_api


def test_a_public_name_goes_or_changes_only_with_a_line_in_the_changelog() -> None:
    """A user who reads the changelog before an update is not surprised."""
    head, *released = RECORD.read_text().splitlines()
    version = head.split()[6].rstrip(".")  # "# The public API of silbo 0.1.0. ..."
    news = ROOT.joinpath("CHANGELOG.md").read_text().partition(f"\n## {version}")[0]
    assert find_unannounced(released, list_api(), news) == [], "say it in CHANGELOG.md, with the way on"


def test_record_is_only_written_for_a_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two releases it would forget what users have, and no change would be told to them."""
    monkeypatch.setattr(api, "ROOT", tmp_path)
    monkeypatch.setattr(api, "RECORD", tmp_path / "api.txt")
    log = tmp_path / "CHANGELOG.md"
    log.write_text(f"# Changelog\n\n## Unreleased\n\n## {silbo.__version__} - 2026-11-30\n")
    assert api.main("--write") == 1 and not api.RECORD.exists()
    log.write_text(f"# Changelog\n\n## {silbo.__version__} - 2026-11-30\n")
    assert api.main("--write") == 0 and "silbo.Consumer.run async (self)" in api.RECORD.read_text()


RELEASED = ["silbo.Thing (a, *, b=1)", "silbo.Thing.close async (self)", "silbo.Thing.size property"]


@pytest.mark.parametrize(
    ("now", "news", "unannounced"),
    [
        (RELEASED, "", []),
        ([*RELEASED, "silbo.Other"], "", []),
        (RELEASED[:2], "", ["silbo.Thing.size"]),
        (RELEASED[:2], "- `Thing.size` is gone: use `len()`.", []),
        (RELEASED[:2], "- `Thing.sizes` is new.", ["silbo.Thing.size"]),
        (["silbo.Thing (a, *, b=2)", *RELEASED[1:]], "", ["silbo.Thing"]),
        (["silbo.Thing (a, *, b=2)", *RELEASED[1:]], "- `Thing(b=)` is 2 by default.", []),
        (["silbo.Thing (a, *, b=1)", "silbo.Thing.close (self)", RELEASED[2]], "", ["silbo.Thing.close"]),
        ([], "- `Thing` is gone.", []),
    ],
    ids=[
        "same",
        "new",
        "gone",
        "gone, said",
        "another is named",
        "default",
        "default, said",
        "no longer async",
        "class gone",
    ],
)
def test_what_is_gone_or_changed_is_found(now: list[str], news: str, unannounced: list[str]) -> None:
    assert find_unannounced(RELEASED, now, news) == unannounced


def test_the_list_has_names_parameters_and_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = list_api()
    assert "silbo.Backoff (*, initial=0.1, factor=2.0, cap=30.0, jitter=0.5, attempts=None)" in lines
    assert "silbo.AsyncEventDispatcher.aclose async (self)" in lines
    assert "silbo.Consumer.in_hand property" in lines

    def delay(self: Backoff, attempt: int, more: int) -> None: ...

    monkeypatch.setattr(Backoff, "delay", delay)
    assert set(lines) - set(list_api()) == {"silbo.Backoff.delay (self, attempt)"}
