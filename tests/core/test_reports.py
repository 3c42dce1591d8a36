"""Lines that are few and leave nothing out."""

from __future__ import annotations

import asyncio
import logging
import time
from types import SimpleNamespace
from typing import Any

import pytest

from silbo._reports import ErrorReporter, Outage, RateLimitedLog, describe_error
from silbo.errors import BrokerUnavailable, ShardsMismatch, StoreUnavailable

logger = logging.getLogger("silbo.tests.reporting")


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("silbo._reports.time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def texts(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records]


def test_line_of_each_sort_a_second_and_what_is_withheld_is_counted(clock: Clock, caplog: Any) -> None:
    log = RateLimitedLog(logger)
    for number in range(3):
        log.write("%s failed", ValueError(number), number)
    log.write("%s is dead", None, 1)
    clock.now += 1.0
    log.write("%s failed", ValueError(3), 3)
    assert texts(caplog) == ["0 failed: ValueError: 0", "1 is dead", "3 failed: ValueError: 3 (and 2 more like it)"]
    assert [record.withheld for record in caplog.records] == [0, 0, 2]


def test_what_was_withheld_is_written_at_the_end(caplog: Any) -> None:
    log = RateLimitedLog(logger)
    for number in range(3):
        log.write("%s failed", None, number)
    log.flush()
    log.flush()
    assert texts(caplog) == ["0 failed", "2 failed (and 1 more like it)"]


async def test_last_line_comes_by_itself_when_its_time_is_over(caplog: Any) -> None:
    log = RateLimitedLog(logger, every=0.05)
    for number in range(3):
        log.write("%s failed", None, number)
    async with asyncio.timeout(10):
        while len(caplog.records) < 2:
            await asyncio.sleep(0.01)
    assert texts(caplog) == ["0 failed", "2 failed (and 1 more like it)"]


def test_loop_that_ended_before_does_not_keep_the_next_one_from_it(caplog: Any) -> None:
    log = RateLimitedLog(logger, every=0.3)

    async def burst() -> None:
        log.write("failed")
        log.write("failed")

    async def again() -> None:
        await burst()
        async with asyncio.timeout(10):
            while len(caplog.records) < 3:
                await asyncio.sleep(0.01)

    asyncio.run(burst())
    time.sleep(0.35)
    asyncio.run(again())
    assert texts(caplog) == ["failed", "failed (and 1 more like it)", "failed"]


def test_traceback_is_written_unless_silbo_foresaw_the_error(caplog: Any) -> None:
    log = RateLimitedLog(logger, every=0.0)
    log.write("a", BrokerUnavailable("Redis is\naway"))
    log.write("b", ValueError("x\ny"))
    log.write("c", ValueError())
    assert texts(caplog) == ["a: Redis is away", "b: ValueError: x y", "c: ValueError"]
    assert [record.exc_info is None for record in caplog.records] == [True, False, False]
    assert len(describe_error(ValueError("x" * 10_000))) < 2_100


def test_outage_is_told_at_its_beginning_once_a_minute_and_at_its_end(clock: Clock, caplog: Any) -> None:
    outage = Outage(logger, "broker", group="billing")
    outage.answered("read")
    for _ in range(130):
        outage.failed("read", BrokerUnavailable("Redis is away"))
        clock.now += 1.0
    outage.answered("read")
    outage.answered("read")
    away = "broker unavailable, trying again: Redis is away"
    assert texts(caplog) == [away, away, away, "broker back after 130 s"]
    assert [record.__dict__.get("withheld") for record in caplog.records] == [0, 59, 59, None]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    assert all(record.group == "billing" and record.exc_info is None for record in caplog.records)


def test_outage_is_over_when_all_who_noticed_it_have_an_answer(clock: Clock, caplog: Any) -> None:
    outage = Outage(logger, "broker")
    for by in ("read", "ack"):
        outage.failed(by, BrokerUnavailable("no"))
    outage.answered("read")
    assert len(caplog.records) == 1
    clock.now += 2.5
    outage.answered("ack")
    assert texts(caplog)[1:] == ["broker back after 2.5 s"]


def test_next_outage_is_told_anew_but_not_more_than_once_a_second(clock: Clock, caplog: Any) -> None:
    outage = Outage(logger, "broker")
    for _ in range(10):
        outage.failed("read", BrokerUnavailable("no"))
        clock.now += 0.25
        outage.answered("read")
        clock.now += 0.25
    assert len(caplog.records) == 10  # five outages, with their ends
    assert caplog.records[-2].withheld == 1


def test_outage_that_nobody_foresaw_has_its_traceback(caplog: Any) -> None:
    Outage(logger, "relay", "failed").failed(0, ZeroDivisionError("defect"))
    assert texts(caplog) == ["relay failed, trying again: ZeroDivisionError: defect"]
    assert caplog.records[0].exc_info


def test_watched_call_is_noticed_by_how_it_ends(caplog: Any) -> None:
    """An error that is no outage is none of its business."""
    outage = Outage(logger, "store")
    with pytest.raises(StoreUnavailable), outage.watched("add"):
        raise StoreUnavailable("full")
    with pytest.raises(ZeroDivisionError), outage.watched("add"):
        raise ZeroDivisionError
    assert len(caplog.records) == 1
    with outage.watched("add"):
        pass
    assert len(caplog.records) == 2


async def test_hook_gets_every_failure_of_an_outage_and_the_log_none(caplog: Any) -> None:
    told: list[Any] = []
    report = ErrorReporter(lambda error, what: told.append((error, what)), logger)
    outage, error = Outage(logger, "broker"), BrokerUnavailable("no")
    for _ in range(3):
        await report.report_outage(outage, 0, error)
    outage.answered(0)
    assert (told, caplog.records) == ([(error, None)] * 3, [])


def test_hook_is_something_to_call() -> None:
    with pytest.raises(TypeError, match="on_error is a function, sync or async, or None for the log, not 'log'"):
        ErrorReporter("log", logger)  # type: ignore[arg-type]


@pytest.mark.parametrize(("fixed", "state"), [(4, "refuses, and somebody has to act"), (0, "unavailable")])
def test_number_of_shards_that_differs_is_told_as_work_for_a_person(
    fixed: int, state: str, caplog: pytest.LogCaptureFixture
) -> None:
    """While the number is being changed it passes by itself."""
    Outage(logging.getLogger("silbo"), "broker").failed(1, ShardsMismatch("orders", fixed=fixed, wanted=8))
    assert f"broker {state}, trying again: " in caplog.text
