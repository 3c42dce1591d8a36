"""The pytest plugin, as a project that uses silbo gets it: in a run of its own."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPTIONS = (
    *("-p", "silbo_pytest"),  # by name, for where silbo is not installed anew since it has the entry point
    *("-p", "pytest_asyncio.plugin"),
    *("-p", "no:cacheprovider"),
    *("-o", "asyncio_mode=auto"),
    *("-o", "asyncio_default_fixture_loop_scope=function"),
)


@pytest.fixture(autouse=True)
def no_other_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """These libraries take longer to load than the tests to run."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


SHOP = """
import sys

from silbo import AsyncEventDispatcher, Event, EventName

ORDER_PAID = EventName("order.paid")
dispatcher = AsyncEventDispatcher()

@dispatcher.listen(ORDER_PAID, priority=-1)
async def check(event):
    if getattr(event, "veto", False):
        event.stop_propagation()

@dispatcher.listen(ORDER_PAID)
async def ship(event):
    if getattr(event, "fails", False):
        raise LookupError("no such order")
    await dispatcher.adispatch("order.shipped")

@dispatcher.listen(ORDER_PAID, priority=1)
async def thank(event): ...
"""


def run(pytester: pytest.Pytester, test: str) -> pytest.RunResult:
    pytester.makepyfile(shop=SHOP)
    pytester.makepyfile(test_shop=f"from shop import *\n{test}")
    return pytester.runpytest_subprocess(*OPTIONS, timeout=50)


def test_failure_draws_each_dispatch_with_its_listeners(pytester: pytest.Pytester) -> None:
    """Called, stopped by, failed, not called and why; with plugin, file and line; and what a listener dispatched.

    In the text of a failed assertion of the recorder, and for other failures in a section of their report.
    """
    result = run(
        pytester,
        """
async def test_asserts(silbo_events):
    silbo_events.watch(dispatcher)
    silbo_events.mute(thank)
    await dispatcher.adispatch(ORDER_PAID)
    event = Event()
    event.veto = True
    await dispatcher.adispatch(ORDER_PAID, event)
    event = Event()
    event.fails = True
    try:
        await dispatcher.adispatch(ORDER_PAID, event)
    except LookupError:
        pass
    silbo_events.assert_dispatched(ORDER_PAID, number=7)

async def test_fails(silbo_events):
    silbo_events.watch(dispatcher)
    await dispatcher.adispatch("order.payed")
    assert silbo_events.dispatched(ORDER_PAID)

async def test_passes(silbo_events):
    silbo_events.watch(dispatcher)
    await dispatcher.adispatch(ORDER_PAID)
    assert silbo_events.assert_dispatched(ORDER_PAID).name == "order.paid"

async def test_watches_nothing(silbo_events):
    assert dispatcher._observers == ()
    silbo_events.assert_dispatched(ORDER_PAID)

def test_fails_without_the_fixture():
    assert 0
""",
    )
    result.assert_outcomes(failed=4, passed=1)
    result.stdout.fnmatch_lines(
        [
            "E * AssertionError: nothing was dispatched: order.paid with number=7; it has no 'number'; known: 'veto', 'fails'",
            "E * Recorded:",
            "E * 1 dispatched 'order.paid' Event(): completed, *ms",
            "E *     called * █* check [[]shop[]] shop.py:8 *ms",
            "E *     called * ship [[]shop[]] shop.py:13 *ms",
            "E *     not called * thank [[]shop[]] shop.py:19: muted by the test",
            "E * 2 dispatched 'order.shipped' Event() (by ship, a listener of 'order.paid'): completed*",
            "E *     nobody listens",
            "E * 3 dispatched 'order.paid' Event(veto=True): stopped*",
            "E *     stopped by * check *",
            "E *     not called * ship *: the event was stopped before",
            "E * 4 dispatched 'order.paid' Event(fails=True): failed*",
            "E *     called * check *",
            "E *     failed * ship *: LookupError: no such order",
            "E *     not called * thank *",
            "test_shop.py:16: AssertionError",
            "*- silbo_events -*",
            "Recorded:",
            "  1 dispatched 'order.payed' *",
            "* nobody listens",
            "E * Nothing was recorded: watch() a dispatcher first.",
        ]
    )
    assert result.stdout.str().count("- silbo_events -") == 1


def test_run_that_does_not_use_the_fixture_does_not_import_silbo(pytester: pytest.Pytester) -> None:
    """So it costs nothing, and a coverage that begins later than plugins are loaded sees all of silbo's lines."""
    pytester.makepyfile(
        """
        import sys

        def test_other():
            assert "silbo_pytest" in sys.modules
            assert not [name for name in sys.modules if name.partition(".")[0] in ("silbo", "whistle", "msgspec", "redis")]

        def test_fixture(silbo_events):
            assert "silbo.testing" in sys.modules
            assert "redis" not in sys.modules
        """
    )
    pytester.runpytest_subprocess(*OPTIONS, timeout=50).assert_outcomes(passed=2)


def test_entry_point_names_the_module() -> None:
    """Under the module's own name: so a run that names it as well, with -p, has it once."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"silbo_pytest": "silbo_pytest"}
    assert Path(sys.modules["silbo_pytest"].__file__ or "").parent == ROOT
