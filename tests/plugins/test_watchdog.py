"""The watchdog: a listener that holds the event loop is named, and nothing else is."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest

from silbo import AsyncEventDispatcher, Event, PluginReport, Plugins, PluginView
from silbo.dispatch.on_loop import OnLoop
from silbo.plugins import watchdog as watchdog_module
from silbo.plugins.watchdog import Blocked, Watchdog
from tests.support.plugin_listener import run_as
from tests.support.simple_container import SimpleContainer

SLOW_AFTER = 0.1


class Reports(list[Blocked]):
    """The reports of a watchdog. A listener can hold the loop until there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.some = threading.Event()

    def __call__(self, blocked: Blocked) -> None:
        self.append(blocked)
        self.some.set()

    @property
    def plugins(self) -> list[str]:
        return [blocked.plugin for blocked in self]


@contextmanager
def watched(
    on_loop: OnLoop, report: Callable[[Blocked], object], *, slow_after: float = SLOW_AFTER
) -> Iterator[Watchdog]:
    watchdog = Watchdog(on_loop, slow_after=slow_after, report=report)
    watchdog.start()
    try:
        yield watchdog
    finally:
        watchdog.close()


def line_of(function: Callable[..., object], text: str) -> str:
    lines, first = inspect.getsourcelines(function)
    (number,) = (first + index for index, line in enumerate(lines) if text in line)
    return f"{__file__}:{number}"


# -- named --------------------------------------------------------------------------------------------------


async def test_listener_is_named_with_its_line_and_stack_while_it_blocks() -> None:
    on_loop, reports = OnLoop(), Reports()

    def helper() -> None:
        assert reports.some.wait(30)

    async def blocks(_event: object) -> None:
        await asyncio.sleep(0)
        helper()  # here

    with watched(on_loop, reports):
        await run_as("audit", on_loop, blocks)
    (blocked,) = reports
    assert blocked.plugin == "audit"
    assert blocked.listener is blocks
    assert blocked.now_at == line_of(blocks, "# here")
    assert blocked.duration >= SLOW_AFTER
    seconds = f"{blocked.duration:.3g}"
    defined_at = line_of(blocks, "async def")
    assert str(blocked) == (
        f"{blocks.__qualname__} ({defined_at}) holds the event loop, for {seconds} s by now; it is at {blocked.now_at}"
    )
    assert blocked.stack.index("helper()  # here") < blocked.stack.index("reports.some.wait(30)")
    assert "adispatch" not in blocked.stack  # the dispatch is no part of it


async def test_python_code_that_never_waits_is_named_while_it_runs() -> None:
    on_loop, reports = OnLoop(), Reports()

    async def spins(_event: object) -> None:
        until = time.monotonic() + 30
        while not reports and time.monotonic() < until:
            pass

    with watched(on_loop, reports):
        await run_as("audit", on_loop, spins)
    (blocked,) = reports
    assert blocked.now_at in {line_of(spins, "while not"), line_of(spins, "pass")}


async def test_call_that_keeps_the_gil_is_named_when_it_has_returned() -> None:
    """The thread sees nothing meanwhile: that the process has used the processor says that it did not stand still."""
    on_loop, reports = OnLoop(), Reports()

    async def computes(_event: object) -> None:
        sum(range(10_000_000))

    until = time.monotonic() + 30
    while not reports and time.monotonic() < until:
        with watched(on_loop, reports):
            await run_as("audit", on_loop, computes)
    (blocked,) = reports
    assert blocked.plugin == "audit"
    assert blocked.listener is computes
    assert blocked.now_at in {"", line_of(computes, "sum(")}
    assert blocked.duration >= SLOW_AFTER


async def test_only_the_innermost_part_of_a_deep_stack_is_told() -> None:
    on_loop, reports = OnLoop(), Reports()

    async def blocks(_event: object) -> None:
        descend(100)

    def descend(levels: int) -> None:
        if levels:
            (lambda: descend(levels - 1))()
        else:
            assert reports.some.wait(30)

    with watched(on_loop, reports):
        await run_as("audit", on_loop, blocks)
    (blocked,) = reports
    assert blocked.now_at == line_of(blocks, "descend(100)")
    assert blocked.stack.count("File ") == 50
    assert "reports.some.wait(30)" in blocked.stack


async def test_each_step_is_reported_once() -> None:
    on_loop, reports = OnLoop(), Reports()

    async def blocks(_event: object) -> None:
        for _ in range(2):
            assert reports.some.wait(30)
            time.sleep(2 * SLOW_AFTER)  # several looks more
            reports.some.clear()
            await asyncio.sleep(0)

    with watched(on_loop, reports):
        await run_as("audit", on_loop, blocks)
    assert reports.plugins == ["audit", "audit"]


async def test_innermost_listener_is_named_while_it_blocks() -> None:
    on_loop, reports = OnLoop(), Reports()

    async def inner(_event: object) -> None:
        assert reports.some.wait(30)

    async def outer(_event: object) -> None:
        await run_as("inner", on_loop, inner)

    with watched(on_loop, reports):
        await run_as("outer", on_loop, outer)
    assert reports.plugins == ["inner"]


async def test_outer_listener_is_named_for_its_own_part() -> None:
    on_loop, reports = OnLoop(), Reports()

    async def inner(_event: object) -> None:
        assert reports.some.wait(30)
        reports.some.clear()

    async def outer(_event: object) -> None:
        await run_as("inner", on_loop, inner)
        assert reports.some.wait(30)

    with watched(on_loop, reports):
        await run_as("outer", on_loop, outer)
    assert reports.plugins == ["inner", "outer"]


async def test_outer_listener_is_reported_once_though_an_inner_one_follows() -> None:
    on_loop, reports = OnLoop(), Reports()

    async def inner(_event: object) -> None:
        time.sleep(4 * SLOW_AFTER)

    async def outer(_event: object) -> None:
        assert reports.some.wait(30)
        await run_as("inner", on_loop, inner)

    with watched(on_loop, reports):
        await run_as("outer", on_loop, outer)
    assert reports.plugins == ["outer", "inner"]


async def test_handler_class_is_named_by_its_own_line() -> None:
    on_loop, reports = OnLoop(), Reports()

    class Blocks:
        async def handle(self, _event: object) -> None:
            assert reports.some.wait(30)

    with watched(on_loop, reports):
        await run_as("audit", on_loop, Blocks, container=SimpleContainer())
    (blocked,) = reports
    assert blocked.now_at == line_of(Blocks.handle, "reports.some.wait")
    assert blocked.stack.count("File ") == 3  # the method, and wait() of an Event and of its Condition


# -- not named ----------------------------------------------------------------------------------------------


async def test_short_steps_do_not_add_up() -> None:
    on_loop, reports = OnLoop(), Reports()

    async def shares(_event: object) -> None:
        until = time.monotonic() + 0.6
        while time.monotonic() < until:
            await asyncio.sleep(0)

    with watched(on_loop, reports, slow_after=0.5):
        await run_as("audit", on_loop, shares)
    assert reports == []


async def test_wait_is_no_block_and_the_code_of_the_host_is_no_plugin() -> None:
    on_loop, reports = OnLoop(), Reports()

    async def waits(_event: object) -> None:
        await asyncio.sleep(0)

    with watched(on_loop, reports):
        task = asyncio.create_task(run_as("audit", on_loop, waits))
        await asyncio.sleep(0)
        time.sleep(3 * SLOW_AFTER)  # the host's own block
        await task
    assert reports == []


async def test_listener_is_not_charged_for_short_ones_inside_of_it() -> None:
    on_loop, reports = OnLoop(), Reports()
    watchdog = Watchdog(on_loop, slow_after=SLOW_AFTER, report=reports)
    on_loop.on_slow = watchdog._note_slow
    short = 0.7 * SLOW_AFTER

    async def inner(_event: object) -> None:
        time.sleep(short)

    async def outer(_event: object) -> None:
        for _ in range(3):
            await run_as("inner", on_loop, inner)
        time.sleep(SLOW_AFTER)

    began = time.perf_counter()
    await run_as("outer", on_loop, outer)
    took = time.perf_counter() - began
    watchdog._judge_ended()
    assert reports.plugins[-1] == "outer"
    assert reports[-1].duration <= took - 3 * short


async def test_step_that_ends_while_its_stack_is_read_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stack may be that of the next step; the time of the one that has ended is judged afterwards."""
    on_loop, reports = OnLoop(), Reports()
    watchdog = Watchdog(on_loop, slow_after=SLOW_AFTER, report=reports)
    describe = watchdog_module._describe

    def describe_late(frames: list[FrameType]) -> tuple[str, str]:
        on_loop.since = time.perf_counter()
        return describe(frames)

    async def blocks(_event: object) -> None:
        on_loop.since -= SLOW_AFTER
        watchdog._look()
        monkeypatch.setattr(watchdog_module, "_describe", describe_late)
        on_loop.since -= SLOW_AFTER
        watchdog._look()

    await run_as("audit", on_loop, blocks)
    assert reports.plugins == ["audit"]


async def test_mark_that_another_loop_left_behind_blames_nobody() -> None:
    """The loops of two threads share the mark. One puts back the other's listener, which has ended meanwhile."""
    on_loop, reports = OnLoop(), Reports()
    first_runs, second_runs, first_has_ended = (threading.Event() for _ in range(3))

    async def first(_event: object) -> None:
        first_runs.set()
        assert second_runs.wait(30)

    async def second(_event: object) -> None:
        second_runs.set()
        assert first_has_ended.wait(30)

    def run_second() -> None:
        assert first_runs.wait(30)
        asyncio.run(run_as("second", on_loop, second))

    thread = threading.Thread(target=run_second)
    thread.start()
    await run_as("first", on_loop, first)
    first_has_ended.set()
    thread.join()
    assert on_loop.listener.owner.name == "first"
    assert on_loop.coroutine is not None
    on_loop.since -= 30
    Watchdog(on_loop, slow_after=SLOW_AFTER, report=reports)._look()
    assert reports == []


def start(scenario: str, *options: str, **pipes: Any) -> subprocess.Popen[str]:
    command = [sys.executable, *options, "-m", "tests.support.blocked_process", scenario]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0, **pipes)


def output(process: subprocess.Popen[str], stdin: str | None = None) -> list[str]:
    try:
        printed, _ = process.communicate(stdin, timeout=30)
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)  # with the child of a fork
            process.wait()
    assert process.returncode == 0
    return printed.splitlines()


@pytest.mark.long
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no SIGSTOP on this platform")
def test_process_that_stood_still_is_no_fault_of_a_plugin() -> None:
    """It is stopped twice in one step, between two steps, and in a step after another plugin has blocked."""
    process = start("stops")
    for _ in range(4):
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        time.sleep(0.35)
        process.send_signal(signal.SIGCONT)
    assert output(process) == ["inner blocks", "control blocks"]


@pytest.mark.parametrize(
    ("gap", "used", "counts"),
    [
        (10, 9, 9),  # a call kept the GIL
        (10, 3, 3),  # the same on a busy machine
        (10, 1, 0),  # the process stood still; before that it had some threads on processors
        (0.9, 0.2, 0.5),  # the machine is busy, and this thread had to wait
        (0.4, 0, 0.4),  # it waited as long as it should
    ],
)
def test_gap_between_two_looks_counts_as_far_as_the_process_ran(gap: float, used: float, counts: float) -> None:
    watchdog = Watchdog(OnLoop(), slow_after=1.0, report=Reports())
    watchdog._mark_alive()
    watchdog._alive_at -= gap
    watchdog._used -= used
    began = watchdog._alive_at
    watchdog._note_gap()
    assert watchdog._held(began, watchdog._alive_at) == pytest.approx(counts, abs=0.1)


@pytest.mark.long
def test_debugger_is_no_fault_of_a_plugin() -> None:
    process = start("is_debugged", stdin=subprocess.PIPE)
    printed = "".join(output(process, "import time; time.sleep(0.4)\ncontinue\n"))
    assert "debugged block" not in printed
    assert printed.endswith("(Pdb) (Pdb) control blocks")


def test_listener_that_blocks_in_a_debugged_program_is_named() -> None:
    process = start("does_nothing", "-m", "pdb", "-c", "continue", stdin=subprocess.PIPE)
    assert "control blocks" in output(process, "quit\n")


# -- reports ------------------------------------------------------------------------------------------------


async def test_failing_hook_is_logged_and_called_again(caplog: pytest.LogCaptureFixture) -> None:
    on_loop, reports = OnLoop(), Reports()

    def fails(blocked: Blocked) -> None:
        reports(blocked)
        raise RuntimeError("no")

    async def blocks(_event: object) -> None:
        reports.some.clear()
        assert reports.some.wait(30)

    with watched(on_loop, fails):
        for _ in range(2):
            await run_as("audit", on_loop, blocks)
    assert reports.plugins == ["audit", "audit"]
    assert [record.message for record in caplog.records] == ["a blocked event loop could not be reported"] * 2


async def test_slow_hook_does_not_hide_a_block() -> None:
    """The thread looks at nothing while it reports; that is no sign of a process that stood still."""
    on_loop, reports = OnLoop(), Reports()
    goes_on = threading.Event()

    def holds(blocked: Blocked) -> None:
        reports(blocked)
        assert goes_on.wait(30)

    async def first(_event: object) -> None:
        assert reports.some.wait(30)

    async def second(_event: object) -> None:
        time.sleep(4 * SLOW_AFTER)

    with watched(on_loop, holds):
        await run_as("first", on_loop, first)
        await run_as("second", on_loop, second)
        goes_on.set()
    assert reports.plugins == ["first", "second"]


async def test_reported_listener_does_not_stay_alive() -> None:
    on_loop, reports = OnLoop(), Reports()

    async def blocks(_event: object) -> None:
        assert reports.some.wait(30)
        time.sleep(SLOW_AFTER / 2)

    with watched(on_loop, reports):
        await run_as("audit", on_loop, blocks)
        listener = weakref.ref(blocks)
        del blocks
        reports.clear()
        until = time.monotonic() + 30
        while listener() is not None and time.monotonic() < until:
            gc.collect()
            await asyncio.sleep(0.01)
        assert listener() is None


# -- the plugins of a host --------------------------------------------------------------------------------


async def test_host_is_told_which_plugin_blocks_while_it_does() -> None:
    dispatcher = AsyncEventDispatcher()
    told: list[PluginReport] = []
    is_told = threading.Event()

    def report(about: PluginReport) -> None:
        told.append(about)
        is_told.set()

    async def blocks(_event: object) -> None:
        assert is_told.wait(30)

    def audit(view: PluginView) -> None:
        view.add_listener("checked", blocks)

    async with Plugins(dispatcher, slow_after=SLOW_AFTER, report=report) as plugins:
        assert watchdog_threads() == []
        await plugins.load(audit)
        assert len(watchdog_threads()) == 1
        await dispatcher.adispatch("checked")
    assert watchdog_threads() == []
    (blocked,) = told
    assert (blocked.kind, blocked.plugin, blocked.listener) == ("blocked", "audit", blocks)
    assert line_of(blocks, "async def") in blocked.text
    assert "is_told.wait(30)" in blocked.stack


@pytest.mark.parametrize("through", ["view", "event.dispatcher"])
@pytest.mark.parametrize("whose", ["the host's", "another Plugins'"])
async def test_plugin_that_dispatches_is_not_charged_for_what_others_do(through: str, whose: str) -> None:
    """The host's own listener blocks, or one under another watchdog, in a dispatch of the plugin's."""
    dispatcher = AsyncEventDispatcher()
    told: list[str] = []

    async def blocks(_event: object) -> None:
        await asyncio.sleep(0)
        time.sleep(6 * SLOW_AFTER)

    def innocent(view: PluginView) -> None:
        async def asks(event: Event) -> None:
            answer: Any = await (view if through == "view" else event.dispatcher).adispatch("asked")
            assert answer.name == "asked"

        view.add_listener("checked", asks)

    async with (
        Plugins(dispatcher, slow_after=None) as others,
        Plugins(dispatcher, slow_after=SLOW_AFTER, report=lambda report: told.append(report.plugin)) as plugins,
    ):
        if whose == "the host's":
            dispatcher.add_listener("asked", blocks)
        else:
            await others.load(lambda view: view.add_listener("asked", blocks), name="guilty")
        scope = await plugins.load(innocent)
        await dispatcher.adispatch("checked")
        if through == "view":
            assert scope.owner.held < SLOW_AFTER  # its budget is not charged either
    assert told == []


async def test_plugins_without_a_limit_have_no_thread() -> None:
    async with Plugins(AsyncEventDispatcher(), slow_after=None) as plugins:
        await plugins.load(lambda view: None, name="audit")
        assert watchdog_threads() == []


# -- the thread ---------------------------------------------------------------------------------------------


def watchdog_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "silbo-watchdog"]


def test_thread_runs_from_start_to_close() -> None:
    on_loop = OnLoop()
    watchdog = Watchdog(on_loop, slow_after=SLOW_AFTER, report=Reports())
    assert watchdog_threads() == []
    watchdog.start()
    watchdog.start()
    assert len(watchdog_threads()) == 1
    watchdog.close()
    watchdog.close()
    assert watchdog_threads() == []
    watchdog.start()
    assert len(watchdog_threads()) == 1
    watchdog.close()


async def test_nothing_is_noted_before_start_and_after_close() -> None:
    on_loop, reports = OnLoop(), Reports()
    watchdog = Watchdog(on_loop, slow_after=SLOW_AFTER, report=reports)

    async def blocks(_event: object) -> None:
        time.sleep(SLOW_AFTER)

    await run_as("before", on_loop, blocks)
    watchdog.start()
    watchdog.close()
    await run_as("after", on_loop, blocks)
    watchdog.start()
    watchdog.close()
    assert reports == []


async def test_hook_may_close_the_watchdog(caplog: pytest.LogCaptureFixture) -> None:
    on_loop, reports = OnLoop(), Reports()

    def closes(blocked: Blocked) -> None:
        watchdog.close()
        reports(blocked)

    async def blocks(_event: object) -> None:
        assert reports.some.wait(30)

    with watched(on_loop, closes) as watchdog:
        (thread,) = watchdog_threads()
        await run_as("audit", on_loop, blocks)
        thread.join(30)
    assert watchdog_threads() == []
    assert caplog.records == []


async def test_close_does_not_wait_long_for_a_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    on_loop, reports = OnLoop(), Reports()
    ends = threading.Event()
    monkeypatch.setattr(watchdog_module, "ENDS_WITHIN", 0.1)

    def hangs(blocked: Blocked) -> None:
        reports(blocked)
        assert ends.wait(30)

    async def blocks(_event: object) -> None:
        assert reports.some.wait(30)

    with watched(on_loop, hangs):
        await run_as("audit", on_loop, blocks)
    (thread,) = watchdog_threads()
    ends.set()
    thread.join(30)


def test_end_of_the_program_waits_for_a_report() -> None:
    assert output(start("leaves_a_report_unfinished")) == ["told"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_forked_child_starts_a_watchdog_of_its_own() -> None:
    assert output(start("forks")) == ["child blocks", "control blocks"]


@pytest.mark.parametrize("slow_after", [0, -1, float("inf"), float("nan")])
def test_slow_after_is_seconds(slow_after: float) -> None:
    with pytest.raises(ValueError, match="slow_after"):
        Watchdog(OnLoop(), slow_after=slow_after, report=Reports())
