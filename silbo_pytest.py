"""The pytest plugin of silbo: the fixture ``silbo_events``.

It stands beside the package, for pytest imports it in every run of every project in whose environment silbo is: the package is
imported only when a test asks for the fixture.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from silbo.testing import EventRecorder

__all__ = ["silbo_events"]


@pytest.fixture
def silbo_events() -> Generator[EventRecorder]:
    """Record what the dispatchers, bridges and consumers that it watches do; see silbo.testing.EventRecorder."""
    from silbo.testing import EventRecorder

    recorder = EventRecorder()
    try:
        yield recorder
    finally:
        recorder.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what was recorded in the report of a failed test, unless the failure itself shows it."""
    report = yield
    if report.failed and (recorder := getattr(item, "funcargs", {}).get("silbo_events")) is not None:
        drawn = recorder.draw()
        if call.excinfo is None or drawn not in str(call.excinfo.value):
            report.sections.append(("silbo_events", drawn))
    return report
