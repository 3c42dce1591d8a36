"""The work of a dispatcher beside its callers: spawn, drain, wait_for, aclose."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from threading import Thread
from time import sleep
from typing import Any
from unittest.mock import AsyncMock

import pytest

from silbo import LAST, AsyncEventDispatcher, Event, EventName
from silbo.dispatch.listeners import ListenerRegistry
from silbo.errors import DispatcherClosed, LoopConflict


class Ping(Event):
    number = 0


@pytest.mark.long
async def test_a_spawned_dispatch_is_held_until_it_is_done() -> None:
    """asyncio itself keeps only a weak reference to a task."""
    d = AsyncEventDispatcher()
    done: list[Any] = []

    @d.listen("x")
    async def slow(event: Any) -> None:
        gc.collect()
        await asyncio.sleep(0)
        gc.collect()
        done.append(event)

    events = [Ping() for _ in range(3)]
    for event in events:
        d.spawn("x", event)
    await d.drain(timeout=30)
    assert done == events
    assert await d.spawn("x", events[0]) is events[0]


async def test_a_failure_of_a_spawned_dispatch_is_logged_and_raised_to_who_awaits(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nothing fails in silence."""
    d = AsyncEventDispatcher()
    error = LookupError("x")
    d.add_listener("x", AsyncMock(side_effect=error))
    with caplog.at_level(logging.ERROR, "silbo"):
        task = d.spawn("x", Ping())
        with pytest.raises(LookupError):
            await task
    assert [record.exc_info[1] for record in caplog.records if record.exc_info] == [error]


async def test_an_isolating_policy_gets_the_errors_of_spawned_dispatches(caplog: pytest.LogCaptureFixture) -> None:
    """And then the task succeeds and nothing is logged."""
    got: list[Any] = []
    d = AsyncEventDispatcher(on_error=lambda *what: got.append(what))
    d.add_listener("x", AsyncMock(side_effect=LookupError))
    await d.spawn("x", Ping())
    assert len(got) == 1 and not caplog.records


async def test_drain_times_out_and_leaves_the_work_running() -> None:
    """It can be waited for again."""
    d = AsyncEventDispatcher()
    gate = asyncio.Event()

    @d.listen("x")
    async def wait(event: Any) -> None:
        await gate.wait()

    task = d.spawn("x", Ping())
    with pytest.raises(TimeoutError):
        await d.drain(timeout=0.01)
    assert not task.done()
    gate.set()
    await d.drain()
    assert task.done()


async def test_drain_waits_for_what_spawned_work_spawns() -> None:
    """To the end."""
    d = AsyncEventDispatcher()
    done: list[int] = []

    @d.listen("x")
    async def chain(event: Ping) -> None:
        await asyncio.sleep(0)
        if event.number < 5:
            again = Ping()
            again.number = event.number + 1
            d.spawn("x", again)
        done.append(event.number)

    d.spawn("x", Ping())
    await d.drain(timeout=5)
    assert done == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("how", ["directly", "in a task of its own", "in a spawned dispatch that it awaits"])
async def test_spawned_listeners_that_drain_do_not_deadlock(how: str) -> None:
    """Neither one alone, nor several at once, however deep the call."""
    d = AsyncEventDispatcher()
    done: list[Any] = []

    @d.listen("x")
    async def drains(event: Any) -> None:
        if how == "directly":
            await d.drain()
        elif how == "in a task of its own":
            await asyncio.create_task(d.drain())
        else:
            await d.spawn("inner", Ping())
        done.append(event)

    @d.listen("inner")
    async def inner(event: Any) -> None:
        await d.drain()

    async with asyncio.timeout(5):
        for _ in range(3):
            d.spawn("x", Ping())
        await d.drain()
    assert len(done) == 3


async def test_a_draining_listener_still_waits_for_the_others() -> None:
    """Only those that wait themselves are left out."""
    d = AsyncEventDispatcher()
    log: list[str] = []

    @d.listen("drains")
    async def drains(event: Any) -> None:
        await d.drain()
        log.append("drained")

    @d.listen("works")
    async def works(event: Any) -> None:
        await asyncio.sleep(0.01)
        log.append("worked")

    d.spawn("drains", Ping())
    d.spawn("works", Ping())
    await d.drain(timeout=5)
    assert log == ["worked", "drained"]


# -- wait_for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("priority", [float("inf"), LAST])
async def test_wait_for_returns_the_event_after_its_other_listeners(priority: float) -> None:
    """It runs last, and hears once."""
    d = AsyncEventDispatcher()
    waiting = asyncio.create_task(d.wait_for("x"))
    await asyncio.sleep(0)

    @d.listen("x", priority=priority)
    async def enrich(event: Ping) -> None:
        event.number = 7

    assert d.get_listeners("x")[0] == enrich
    event = await d.adispatch("x", Ping())
    assert await waiting is event and event.number == 7
    assert d.get_listeners("x") == (enrich,)


async def test_wait_for_takes_patterns_names_and_a_condition() -> None:
    """The first event for which it is true."""
    d = AsyncEventDispatcher()
    name = EventName("user.joined", Ping)
    waiting = [
        asyncio.create_task(d.wait_for("user.*", where=lambda event: event.number == 2)),
        asyncio.create_task(d.wait_for(name, where=lambda event: event.number == 3)),
    ]
    await asyncio.sleep(0)
    for number in (1, 2, 3):
        event = Ping()
        event.number = number
        await d.adispatch(name, event)
    assert [(await one).number for one in waiting] == [2, 3]
    assert not d.has_listeners()


async def test_an_error_in_the_condition_is_raised_to_the_waiter() -> None:
    """Not in the dispatch, which is somebody else's."""
    d = AsyncEventDispatcher()

    def broken(event: Any) -> bool:
        raise LookupError("broken")

    for error in (LookupError, TimeoutError):
        waiting = asyncio.create_task(d.wait_for("x", where=lambda event, error=error: _raise(error("mine"))))
        await asyncio.sleep(0)
        await d.adispatch("x", Ping())
        with pytest.raises(error, match="mine"):
            await waiting
    assert not d.has_listeners()


def _raise(error: Exception) -> bool:
    raise error


async def test_an_async_condition_is_refused() -> None:
    """Its coroutine would be true for every event."""

    async def where(event: Any) -> bool:
        return False

    with pytest.raises(TypeError, match="await"):
        await AsyncEventDispatcher().wait_for("x", where=where, timeout=30)


async def test_an_event_in_the_turn_in_which_the_time_is_over_is_returned() -> None:
    """The dispatch was heard, so it is not lost."""
    d = AsyncEventDispatcher()
    loop = asyncio.get_running_loop()
    waiting = asyncio.create_task(d.wait_for("x", timeout=0.01))
    await asyncio.sleep(0)
    event = Ping()

    def dispatch() -> None:
        with pytest.raises(StopIteration):
            d.adispatch("x", event).send(None)

    def outlast_the_limit() -> None:
        until = loop.time() + 0.02
        while loop.time() < until:
            pass
        loop.call_soon(dispatch)  # runs in the next turn, in front of the timer

    loop.call_soon(outlast_the_limit)
    assert await waiting is event


async def test_wait_for_times_out_and_can_be_cancelled() -> None:
    """Both leave no listener behind."""
    d = AsyncEventDispatcher()
    with pytest.raises(TimeoutError, match=r"no event 'x' within 0\.01 s"):
        await d.wait_for("x", timeout=0.01)
    waiting = asyncio.create_task(d.wait_for("x"))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert d.get_listeners() == {}


async def test_a_stopped_event_is_not_what_was_waited_for() -> None:
    """A listener that stops an event keeps it from everyone behind."""
    d = AsyncEventDispatcher()

    @d.listen("x")
    async def stop(event: Event) -> None:
        event.stop_propagation()

    waiting = asyncio.create_task(d.wait_for("x", timeout=0.01))
    await asyncio.sleep(0)
    await d.adispatch("x", Ping())
    with pytest.raises(TimeoutError):
        await waiting


# -- the end -------------------------------------------------------------------------------------------------


async def test_aclose_ends_waits_refuses_more_and_waits_for_spawned_work() -> None:
    """Twice is fine, and dispatching still works: shutting down is a time for events too."""
    done: list[Any] = []
    async with AsyncEventDispatcher() as d:

        @d.listen("x")
        async def slow(event: Any) -> None:
            await asyncio.sleep(0.01)
            done.append(event)

        d.spawn("x", Ping())
        waiting = asyncio.create_task(d.wait_for("y"))
        await asyncio.sleep(0)
    assert len(done) == 1
    with pytest.raises(DispatcherClosed):
        await waiting
    await d.aclose()
    with pytest.raises(DispatcherClosed, match="aclose"):
        d.spawn("x", Ping())
    with pytest.raises(DispatcherClosed):
        await d.wait_for("x")
    await d.adispatch("x", Ping())
    assert len(done) == 2


async def test_aclose_from_a_spawned_listener_does_not_deadlock() -> None:
    """A listener of app.stop may close the dispatcher."""
    d = AsyncEventDispatcher()

    @d.listen("stop")
    async def stop(event: Any) -> None:
        await d.aclose()

    async with asyncio.timeout(5):
        await d.spawn("stop", Ping())


# -- two loops -----------------------------------------------------------------------------------------------


async def in_another_loop(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine in a thread of its own, with its own loop."""
    with ThreadPoolExecutor(1) as thread:
        return await asyncio.get_running_loop().run_in_executor(thread, asyncio.run, work)


async def await_idly(task: asyncio.Task[Any], thread: Callable[[], object]) -> Any:
    """Await a task that a thread is to wake, in a loop that nothing else wakes; fail if the thread does not."""
    hung: list[int] = []
    timer = asyncio.get_running_loop().call_later(20, hung.append, 1)
    worker = Thread(target=thread)
    worker.start()
    try:
        return await task
    finally:
        timer.cancel()
        worker.join()
        assert not hung


@pytest.mark.parametrize("wrong", [False, True])
async def test_wait_for_is_woken_by_a_dispatch_in_another_loop(wrong: bool) -> None:
    """With the event, or with the error of its condition."""
    d = AsyncEventDispatcher()
    waiting = asyncio.create_task(d.wait_for("x", where=(lambda event: _raise(LookupError("x"))) if wrong else None))
    await asyncio.sleep(0)
    event = Ping()
    woken = await_idly(waiting, lambda: asyncio.run(d.adispatch("x", event)))
    if wrong:
        with pytest.raises(LookupError):
            await woken
    else:
        assert await woken is event


async def test_wait_for_is_woken_by_a_dispatch_without_a_loop() -> None:
    """A plain dispatch needs none."""
    d = AsyncEventDispatcher()
    waiting = asyncio.create_task(d.wait_for("x"))
    await asyncio.sleep(0)

    def dispatch() -> None:
        sleep(0.05)  # the waiting loop is idle by then; where it is not, the test only shows less
        with pytest.raises(StopIteration):
            d.adispatch("x", Ping()).send(None)

    assert isinstance(await await_idly(waiting, dispatch), Ping)


async def test_aclose_in_another_loop_ends_a_wait() -> None:
    """It does not leave it waiting for good."""
    d = AsyncEventDispatcher()
    waiting = asyncio.create_task(d.wait_for("x"))
    await asyncio.sleep(0)
    with pytest.raises(DispatcherClosed):
        await await_idly(waiting, lambda: asyncio.run(d.aclose()))


@pytest.mark.parametrize("call", ["drain", "aclose"])
async def test_a_drain_that_would_wait_for_another_running_loop_is_refused_at_once(call: str) -> None:
    """The error names both loops; the loop that spawned can drain."""
    d = AsyncEventDispatcher()
    go_on = asyncio.Event()

    @d.listen("x")
    async def slow(event: Any) -> None:
        await go_on.wait()

    task = d.spawn("x", Ping())
    async with asyncio.timeout(30):
        with pytest.raises(
            LoopConflict, match=r"drain\(\) was called in <.*Loop at .*>, and .* <.*Loop at .*>"
        ) as caught:
            await in_another_loop(getattr(d, call)())
    assert caught.value.other is asyncio.get_running_loop() and caught.value.loop is not caught.value.other
    go_on.set()
    await getattr(d, call)()
    assert task.done()


async def test_spawned_dispatches_of_two_loops_run_each_in_its_own() -> None:
    """Dispatches that another loop has finished, or left behind, hold up no drain."""
    d = AsyncEventDispatcher()
    loops: list[Any] = []

    @d.listen("x")
    async def note(event: Any) -> None:
        loops.append(asyncio.get_running_loop())

    async def elsewhere() -> None:
        await d.spawn("x", Ping())
        d.spawn("x", Ping())
        await d.drain(timeout=30)

    def abandon() -> None:
        loop = asyncio.new_event_loop()

        async def never_end(event: Any) -> None:
            await asyncio.Event().wait()

        async def begin() -> None:
            task: Any = d.spawn("never", Ping())
            await asyncio.sleep(0)
            task._log_destroy_pending = False  # else asyncio logs it in whichever test collects it

        d.add_listener("never", never_end)
        loop.run_until_complete(begin())
        loop.close()

    await in_another_loop(elsewhere())
    await asyncio.to_thread(abandon)
    d.spawn("x", Ping())
    await d.drain(timeout=30)
    assert len(loops) == 3 and loops[0] is loops[1] is not loops[2] is asyncio.get_running_loop()


def test_a_spawn_without_a_loop_is_an_error_and_leaves_no_coroutine() -> None:
    """Not a warning about a coroutine that nobody awaited."""
    with pytest.raises(RuntimeError, match="no running event loop"):
        AsyncEventDispatcher().spawn("x", Ping())
    gc.collect()


async def test_a_listener_that_another_thread_adds_in_the_midst_of_a_lookup_is_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The dispatch that looked up may miss it, the next does not."""
    d = AsyncEventDispatcher()
    late = AsyncMock()
    look_up = ListenerRegistry._matching

    def interrupted(self: ListenerRegistry, name: Any) -> Any:
        found = look_up(self, name)
        if not d.has_listeners():
            d.add_listener("x", late)
        return found

    monkeypatch.setattr(ListenerRegistry, "_matching", interrupted)
    await d.adispatch("x", Ping())
    await d.adispatch("x", Ping())
    assert late.await_count == 1


async def test_drain_looks_at_each_spawned_dispatch_once() -> None:
    """And not at all of them again whenever one ends: 10,000 dispatches would be 50 million looks."""
    looks = 0

    class Task(asyncio.Task[Any]):
        def add_done_callback(self, *args: Any, **options: Any) -> None:
            nonlocal looks
            looks += 1
            super().add_done_callback(*args, **options)

    d = AsyncEventDispatcher()
    turns = asyncio.Queue[None]()

    @d.listen("x")
    async def end_in_turn(event: Event) -> None:
        await turns.get()

    loop = asyncio.get_running_loop()
    loop.set_task_factory(lambda loop, work, **options: Task(work, loop=loop, **options))  # type: ignore[arg-type]
    try:
        tasks = [d.spawn("x") for _ in range(100)]
        drain = loop.create_task(d.drain())
        for number in range(100):
            turns.put_nowait(None)
            await asyncio.wait([tasks[number]])
        await asyncio.wait_for(drain, 30)
    finally:
        loop.set_task_factory(None)
    assert looks < 1000


@pytest.mark.parametrize("error", [StopIteration, StopAsyncIteration, TimeoutError, LookupError])
async def test_error_of_where_goes_to_the_waiter_and_not_to_the_dispatch(error: type[Exception]) -> None:
    """A future takes no StopIteration, as next() without a default raises it."""

    def where(event: Any) -> bool:
        raise error

    d = AsyncEventDispatcher()
    waiting = asyncio.create_task(d.wait_for("x", where=where, timeout=30))
    await asyncio.sleep(0)
    await d.adispatch("x", Ping())
    with pytest.raises(RuntimeError if error is StopIteration else error) as caught:
        await waiting
    assert error is not StopIteration or isinstance(caught.value.__cause__, StopIteration)


async def test_close_that_is_refused_in_another_loop_closes_nothing() -> None:
    """The first loop goes on with what it has spawned and waits for."""
    d = AsyncEventDispatcher()
    gate = asyncio.Event()

    @d.listen("x")
    async def hold(event: Any) -> None:
        await gate.wait()

    running = d.spawn("x", Ping())
    waiting = asyncio.create_task(d.wait_for("y", timeout=30))
    await asyncio.sleep(0)
    with pytest.raises(LoopConflict):
        await in_another_loop(d.aclose())
    gate.set()
    await running
    await d.adispatch("y", Ping())
    assert isinstance(await waiting, Ping)
    await d.spawn("x", Ping())
    await d.aclose()
