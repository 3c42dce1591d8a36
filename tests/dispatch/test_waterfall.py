"""The waterfall of a dispatch: what each listener did, for how long, and where the time went."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass
from typing import Any

import pytest

from silbo import AsyncEventDispatcher, DomainEvent, Event, Plugins, Trace
from silbo.dispatch.observers import Call, Dispatch
from silbo.dispatch.traced import trace_dispatch
from silbo.dispatch.waterfall import draw_waterfall, find_bar


@dataclass
class Paid(DomainEvent):
    card: str = "4111"


def lines(trace: Trace) -> list[str]:
    """The lines of the last waterfall; figures, bars and places left out."""
    drawn = re.sub(r"[\d.,]+ ms(, [\d.,]+ waiting)?", "? ms", trace.draw(1, width=1000))
    drawn = re.sub(r"\[[\w.]+\] \S+:\d+", "here", drawn)
    return [re.sub(r" *[█░]+ +| {3,}", "  ", line) for line in drawn.splitlines()]


async def test_waterfall_shows_each_listener_and_its_end() -> None:
    async def check(event: Any) -> None: ...

    async def veto(event: Event) -> None:
        event.stop_propagation()

    async def fails(event: Any) -> None:
        raise LookupError("no such\norder")

    async def ship(event: Any) -> None: ...

    d = AsyncEventDispatcher(observers=[trace := Trace()])
    d.add_listener("order.paid", check)
    d.add_listener("order.paid", ship, priority=2)
    where = "test_waterfall_shows_each_listener_and_its_end"
    with d.add_listener("order.paid", veto, priority=1):
        await d.adispatch("order.paid")
    assert lines(trace) == [
        "'order.paid': stopped, ? ms",
        f"  called  {where}.check here  ? ms",
        f"  stopped by  {where}.veto here  ? ms",
        f"  not called  {where}.ship here: the event was stopped before",
    ]
    with d.add_listener("order.paid", fails, priority=1), pytest.raises(LookupError):
        await d.adispatch("order.paid")
    assert lines(trace) == [
        "'order.paid': failed, ? ms",
        f"  called  {where}.check here  ? ms",
        f"  failed  {where}.fails here  ? ms: LookupError: no such order",
        f"  not called  {where}.ship here: the dispatch failed before",
    ]
    await d.adispatch("order.payed")
    assert lines(trace) == ["'order.payed': completed, ? ms", "  nobody listens"]
    assert trace.draw().index("payed") < trace.draw().index("failed") < trace.draw().index("stopped"), "newest first"


async def test_time_is_told_apart_into_waiting_and_holding_the_loop() -> None:
    """Of a listener that waits, one that computes, and one that dispatches in its turn."""
    gate = asyncio.Event()

    async def waits(event: Any) -> None:
        await gate.wait()

    async def computes(event: Any) -> None:
        end = time.perf_counter() + 0.01
        while time.perf_counter() < end:
            pass

    async def dispatches(event: Any) -> None:
        await d.adispatch("inner")

    d = AsyncEventDispatcher(observers=[trace := Trace()])
    d.add_listener("outer", waits)
    d.add_listener("outer", computes)
    d.add_listener("outer", dispatches)
    d.add_listener("inner", computes)
    running = asyncio.create_task(d.adispatch("outer"))
    await asyncio.sleep(0)
    await computes(None)
    gate.set()
    await running
    _, outer = trace.dispatches
    waiting, computing, dispatching = outer.listeners
    assert waiting.waited is not None and 0.01 <= waiting.waited <= waiting.duration
    assert waiting.duration - waiting.waited < 0.005
    assert (computing.waited, dispatching.waited) == (0.0, 0.0) and dispatching.duration >= 0.01
    assert outer.waited == pytest.approx(waiting.waited, abs=0.002)
    for each in outer.listeners:
        begin, on_loop, waited = find_bar(each, outer)
        assert 0 <= begin <= begin + on_loop + waited <= 1
        assert (waited > on_loop) == (each is waiting)
    drawn = trace.draw(1, width=1000).splitlines()
    assert re.search(r"outer': completed, [\d.]+ ms, [\d.]+ waiting$", drawn[0])
    assert re.search(r"░.* ms, [\d.]+ waiting$", drawn[1])
    assert "█" in drawn[2] and "░" not in drawn[2] and drawn[2].endswith(" ms")
    assert drawn[1].index("░") < drawn[2].index("█") < drawn[3].index("█"), "one after another"


async def test_cancelled_wait_is_measured_and_the_listener_sees_the_cancellation() -> None:
    seen: list[str] = []
    entered = asyncio.Event()

    async def waits(event: Any) -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    d = AsyncEventDispatcher(observers=[trace := Trace()])
    d.add_listener("x", waits)
    task = asyncio.create_task(d.adispatch("x"))
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == ["cancelled"]
    [traced] = trace.dispatches
    assert traced.listeners[0].outcome == "cancelled" and (traced.listeners[0].waited or 0) > 0


def test_error_thrown_into_a_measured_listener_reaches_it() -> None:
    """As from a future that fails in a hand-written loop: the listener decides about it."""
    seen: list[str] = []

    class Waits:
        def __await__(self) -> Any:
            yield

    async def waits(event: Any) -> None:
        try:
            await Waits()
        except LookupError:
            seen.append("thrown")

    d = AsyncEventDispatcher(observers=[Trace()])
    d.add_listener("x", waits)
    running = d.adispatch("x")
    running.send(None)
    with pytest.raises(StopIteration):
        running.throw(LookupError())
    assert seen == ["thrown"]


async def test_time_is_measured_for_those_who_ask_alone() -> None:
    """An observer that does not ask pays nothing."""
    seen: list[Call | Dispatch] = []

    class Plain:
        def before_dispatch(self, dispatch: Dispatch) -> None: ...
        def before_listener(self, call: Call) -> None: ...
        def after_listener(self, call: Call) -> None:
            seen.append(call)

        def after_dispatch(self, dispatch: Dispatch) -> None:
            seen.append(dispatch)

    async def listener(event: Any) -> None:
        await asyncio.sleep(0)

    d = AsyncEventDispatcher(observers=[Plain()])
    d.add_listener("x", listener)
    await d.adispatch("x")
    assert [each.waited for each in seen] == [None, None] and all(each.began for each in seen)


async def test_waterfall_of_a_dispatch_that_runs_shows_what_has_happened_so_far() -> None:
    """No bar has a length yet, and nobody knows yet which listeners will not be called."""
    drawn: list[str] = []

    class Watches(Trace):
        def before_listener(self, call: Call) -> None:
            drawn.append(draw_waterfall(trace_dispatch(call.dispatch, [call])))

    async def first(event: Any) -> None: ...

    async def second(event: Any) -> None: ...

    d = AsyncEventDispatcher(observers=[Watches()])
    d.add_listener("x", first)
    d.add_listener("x", second)
    await d.adispatch("x")
    title, *lines = drawn[0].splitlines()
    assert title == "'x': running" and len(lines) == 1
    assert re.fullmatch(r"    running     \S+\.first \[\S+\] \S+:\d+", lines[0])


async def test_listener_that_gives_an_awaitable_is_measured() -> None:
    """Not only coroutines: an object with an async __call__ may return what it likes."""

    class Gives:
        def __await__(self) -> Any:
            return asyncio.sleep(0).__await__()

    async def given(event: Any) -> None:
        await Gives()

    d = AsyncEventDispatcher(observers=[trace := Trace()])
    d.add_listener("x", given)
    await d.adispatch("x")
    assert trace.dispatches[0].listeners[0].waited


async def test_plugin_and_refusal_are_shown() -> None:
    """A plugin that is switched off is the reason why its listener was not called."""

    def audit(view: AsyncEventDispatcher) -> None:
        @view.listen("x")
        async def note(event: Any) -> None: ...

    d = AsyncEventDispatcher(observers=[trace := Trace()])
    async with Plugins(d) as plugins:
        await plugins.load(audit)
        await d.adispatch("x")
        plugins.switch_off("audit", "for the night")
        await d.adispatch("x")
    on, off = trace.dispatches
    assert [(each.plugin, each.outcome, each.reason) for each in (*on.listeners, *off.listeners)] == [
        ("audit", "completed", None),
        ("audit", None, "off"),
    ]
    drawn = trace.draw(1, width=1000)
    assert "note [audit] " in drawn and drawn.endswith(": its plugin is switched off")


async def test_payloads_are_kept_if_the_host_says_so() -> None:
    """By default a trace holds no event, so that a waterfall can be shown to others."""
    discreet, open_ = Trace(), Trace(payloads=True)
    d = AsyncEventDispatcher(observers=[discreet, open_])
    await d.adispatch("x", Paid())
    assert "4111" not in discreet.draw() and discreet.dispatches[0].event == ""
    assert "Paid(card='4111')" in open_.draw()
    await d.adispatch("x", Paid("y" * 1000))
    assert len(open_.dispatches[-1].event) == 200
    event = Event()
    event.amount, event._secret = 250, 1
    await d.adispatch("x", event)
    assert open_.dispatches[-1].event == "Event(amount=250)", "of a class without a repr, what the host has set"


async def test_lines_are_no_wider_than_asked_for() -> None:
    """A terminal would break them anywhere; nothing of a line is lost."""
    d = AsyncEventDispatcher(observers=[trace := Trace()])

    @d.listen("order.paid")
    async def a_listener_with_a_long_name_that_goes_on_and_on(event: Any) -> None:
        await asyncio.sleep(0)
        raise LookupError("no such order " * 20)

    with pytest.raises(LookupError):
        await d.adispatch("order.paid")
    wide = trace.draw(width=1000)
    assert len(wide.splitlines()) == 2 and trace.draw(width=1) == trace.draw(width=40)
    for width in (40, 60, 100):
        drawn = trace.draw(width=width)
        assert all(len(line) <= width for line in drawn.splitlines())
        assert re.search("^    failed     ", drawn, re.MULTILINE) and "\n        " in drawn
        assert re.sub(r"[█░\s]+", "", drawn) == re.sub(r"[█░\s]+", "", wide)


async def test_number_and_unit_stay_on_one_line() -> None:
    """At every width; what is drawn has common spaces, for a search."""

    async def waits(event: Any) -> None:
        await asyncio.sleep(0.001)

    d = AsyncEventDispatcher(observers=[trace := Trace()])
    d.add_listener("order.paid", waits)
    await d.adispatch("order.paid")
    for width in range(40, 120):
        drawn = trace.draw(1, width=width)
        assert not [line for line in drawn.splitlines() if line.strip().startswith(("ms", "waiting"))], drawn
        assert len(re.findall(r"[\d.]+ ms", drawn)) == len(re.findall(r"[\d.]+ waiting", drawn)) == 2, drawn


async def test_lines_are_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    d = AsyncEventDispatcher(observers=[trace := Trace()])
    await d.adispatch("x" * 200)
    monkeypatch.setenv("COLUMNS", "60")
    assert trace.draw() == trace.draw(width=60) != trace.draw(width=100)
    monkeypatch.delenv("COLUMNS")
    assert trace.draw() == trace.draw(width=100), "the tests have no terminal"


def test_negative_number_of_dispatches_is_refused() -> None:
    assert Trace().draw(0) == ""
    with pytest.raises(ValueError, match="0 or more, not -1"):
        Trace().draw(-1)
