"""Plain functions as listeners, in threads of their own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import gc
import logging
import subprocess
import sys
import threading
import weakref
from typing import Any
from unittest.mock import AsyncMock

import pytest

from silbo import AsyncEventDispatcher, Event, EventName, in_thread, on, run_sync
from silbo.dispatch import in_thread as module
from silbo.dispatch.in_thread import ThreadPool
from silbo.errors import ListenerTimeout
from tests.support.simple_container import SimpleContainer

SECONDS = 30.0
NAME = EventName("user.joined")


@pytest.fixture
def d() -> AsyncEventDispatcher:
    return AsyncEventDispatcher()


class Blocking:
    """A function that blocks until it is let go."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.let_go = threading.Event()
        self.calls = 0
        self.threads: list[threading.Thread] = []

    def __call__(self, event: Any) -> None:
        self.calls += 1
        self.threads.append(threading.current_thread())
        self.begun.release()
        assert self.let_go.wait(SECONDS)

    async def until_begun(self, times: int = 1) -> None:
        for _ in range(times):
            assert await asyncio.to_thread(self.begun.acquire, timeout=SECONDS)


# -- a run ---------------------------------------------------------------------------------------------------


async def test_a_function_runs_in_a_thread_of_its_own_and_the_loop_goes_on(d: AsyncEventDispatcher) -> None:
    """Not in the loop's own pool, whose threads look up the names of hosts; and the dispatch waits for it."""
    blocking = Blocking()
    d.add_listener(NAME, in_thread(blocking))
    d.add_listener(NAME, after := AsyncMock())
    dispatching = asyncio.create_task(d.adispatch(NAME))
    await blocking.until_begun()
    after.assert_not_awaited()
    blocking.let_go.set()
    await dispatching
    after.assert_awaited_once()
    assert blocking.threads[0].name == "silbo in_thread Blocking"


async def test_a_function_may_change_and_stop_the_event(d: AsyncEventDispatcher) -> None:
    def enrich(event: Any) -> None:
        event.plan = "pro"
        event.stop_propagation()

    d.add_listener(NAME, in_thread(enrich))
    d.add_listener(NAME, late := AsyncMock())
    event: Any = await d.adispatch(NAME)
    assert (event.plan, event.propagation_stopped) == ("pro", True)
    late.assert_not_awaited()


async def test_a_function_sees_a_copy_of_the_context_variables(d: AsyncEventDispatcher) -> None:
    request: contextvars.ContextVar[str] = contextvars.ContextVar("request")
    seen: list[str] = []

    def read(event: Event) -> None:
        seen.append(request.get())
        request.set("changed")

    d.add_listener(NAME, in_thread(read))
    for value in ("r1", "r2"):
        request.set(value)
        await d.adispatch(NAME)
        assert request.get() == value
    assert seen == ["r1", "r2"]


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (LookupError("no"), LookupError),
        (StopIteration(1), RuntimeError),  # as from every coroutine
        (concurrent.futures.CancelledError(), concurrent.futures.CancelledError),  # and not the cancellation of a task
        (SystemExit(3), SystemExit),
    ],
)
async def test_the_error_of_a_function_is_the_listeners(raised: BaseException, expected: type[BaseException]) -> None:
    def fail(event: Event) -> None:
        raise raised

    with pytest.raises(expected):
        async with asyncio.timeout(SECONDS):
            await in_thread(fail)(Event())


async def test_a_coroutine_that_nobody_awaits_is_an_error(d: AsyncEventDispatcher) -> None:
    async def work() -> None: ...

    d.add_listener(NAME, in_thread(lambda event: work()))
    with pytest.raises(TypeError, match="nobody awaits"):
        await d.adispatch(NAME)


async def test_a_function_may_dispatch_through_a_portal(d: AsyncEventDispatcher) -> None:
    portal = d.portal()
    d.add_listener(NAME, in_thread(lambda event: portal.dispatch("inner", timeout=SECONDS)))
    d.add_listener("inner", heard := AsyncMock())
    await d.adispatch(NAME)
    heard.assert_awaited_once()


# -- its bounds ----------------------------------------------------------------------------------------------


async def test_no_more_threads_than_allowed_run_at_once(d: AsyncEventDispatcher) -> None:
    blocking = Blocking()
    d.add_listener(NAME, in_thread(blocking, max_threads=2))
    async with asyncio.TaskGroup() as tasks:
        for _ in range(6):
            tasks.create_task(d.adispatch(NAME))
        await blocking.until_begun(2)
        assert not blocking.begun.acquire(blocking=False)
        blocking.let_go.set()
    assert blocking.calls == 6 and len(set(blocking.threads)) == 2


async def test_runs_that_wait_for_a_thread_begin_in_the_order_in_which_they_came() -> None:
    order: list[int] = []
    blocking = Blocking()

    def note(number: int) -> None:
        order.append(number)
        blocking(number)

    listener = in_thread(note, max_threads=1)
    async with asyncio.TaskGroup() as tasks:
        for number in range(6):
            tasks.create_task(listener(number))
        await blocking.until_begun()
        blocking.let_go.set()
    assert order == list(range(6))


async def test_after_its_time_limit_the_dispatch_goes_on_and_the_thread_still_counts(
    d: AsyncEventDispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing can end the thread. The next run waits for it."""
    blocking = Blocking()
    listener = in_thread(blocking, max_threads=1)
    d.add_listener(NAME, listener, timeout=0.01)
    for _ in range(2):
        with pytest.raises(ListenerTimeout, match="in_thread"):
            await d.adispatch(NAME)
    assert blocking.calls == 1
    blocking.let_go.set()
    await listener(Event())
    assert blocking.calls == 2
    assert not caplog.records, "the late end of the first run has no effect"


async def test_a_run_that_was_cancelled_before_it_began_never_begins() -> None:
    blocking = Blocking()
    listener = in_thread(blocking, max_threads=1)
    first = asyncio.create_task(listener(Event()))
    await blocking.until_begun()
    second = asyncio.create_task(listener(event := Event()))
    gone = weakref.ref(event)
    del event
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.wait([second])
    del second
    gc.collect()
    assert gone() is None, "a hung thread would let all runs after it pile up"
    blocking.let_go.set()
    await first
    await listener(Event())
    assert blocking.calls == 2


async def test_a_long_wait_for_a_thread_is_a_warning_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "REPORT_AFTER", 0.0)
    blocking = Blocking()
    listener = in_thread(blocking, max_threads=1)
    runs = [asyncio.create_task(listener(Event()))]
    await blocking.until_begun()
    runs += [asyncio.create_task(listener(Event())) for _ in range(3)]
    await asyncio.to_thread(int)
    blocking.let_go.set()
    await asyncio.gather(*runs)
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.getMessage() == (
        "listener waits for a free thread: Blocking has waited for a free thread for 0 s; in the 1 threads: Blocking"
    )
    assert (record.__dict__["listener"], record.__dict__["threads"]) == ("Blocking", 1)


async def test_a_run_that_has_begun_waits_no_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A long run is no warning about threads."""
    monkeypatch.setattr(module, "REPORT_AFTER", 0.001)
    short, long = Blocking(), Blocking()
    pool = ThreadPool(1)

    def let_the_long_one_begin() -> None:
        """Hold the loop meanwhile, so that the timer of the report comes after it."""
        short.let_go.set()
        assert long.begun.acquire(timeout=SECONDS)

    first = asyncio.create_task(in_thread(short).with_pool(pool)(Event()))
    await short.until_begun()
    second = asyncio.create_task(in_thread(long).with_pool(pool)(Event()))
    asyncio.get_running_loop().call_soon(let_the_long_one_begin)
    await first
    await asyncio.sleep(0.002)  # behind the timer
    long.let_go.set()
    await second
    assert not caplog.records


async def test_a_thread_is_used_again_and_keeps_no_event_alive() -> None:
    pool = ThreadPool(1, idle_for=1000.0)
    threads: list[threading.Thread] = []
    listener = in_thread(lambda event: threads.append(threading.current_thread())).with_pool(pool)
    for _ in range(2):
        gone = threading.Event()
        weakref.finalize(event := Event(), gone.set)
        await listener(event)
        del event
        assert await asyncio.to_thread(gone.wait, SECONDS)
    assert threads[0] is threads[1]
    pool.close()


async def test_an_idle_thread_ends_and_a_closed_pool_keeps_none() -> None:
    """A plugin that is unloaded leaves no thread behind."""
    short = ThreadPool(2, idle_for=0.001)
    thread: Any = await short.run(threading.current_thread)
    await asyncio.to_thread(thread.join, SECONDS)
    assert not thread.is_alive() and short.threads == 0

    pool = ThreadPool(2, idle_for=1000.0)
    for _ in range(2):  # before and after
        thread = await pool.run(threading.current_thread)
        pool.close()
        await asyncio.to_thread(thread.join, SECONDS)
        assert not thread.is_alive() and pool.threads == 0


async def test_a_system_without_a_thread_to_give_is_an_error_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """And counts no thread."""

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    pool = ThreadPool(1)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start"):
            await pool.run(int)
    assert await pool.run(int) == 0


def run_program(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_hung_thread_holds_up_no_end_of_the_program() -> None:
    """An executor's threads are waited for at exit, for ever."""
    out = run_program("""
import asyncio, threading
from silbo import AsyncEventDispatcher, in_thread
from silbo.errors import ListenerTimeout

d = AsyncEventDispatcher()
d.add_listener("x", in_thread(lambda event: threading.Event().wait()), timeout=0.01)
try:
    asyncio.run(d.adispatch("x"))
except ListenerTimeout:
    print("late")
""")
    assert out == "late\n"


def test_a_forked_process_has_threads_of_its_own() -> None:
    """It has none of its parent's, however many those were."""
    out = run_program("""
import os, sys
from silbo import AsyncEventDispatcher, in_thread, run_sync

d = AsyncEventDispatcher()
d.add_listener("x", in_thread(lambda event: print(event.name, flush=True), max_threads=1))
run_sync(d, "x")
if child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
run_sync(d, "x")
""")
    assert out == "x\nx\n"


def test_a_function_that_ends_after_the_loop_disturbs_nobody(d: AsyncEventDispatcher) -> None:
    blocking = Blocking()
    d.add_listener(NAME, in_thread(blocking), timeout=0.01)
    with pytest.raises(ListenerTimeout):
        run_sync(d, NAME)
    blocking.let_go.set()  # pytest makes an error of what a thread raises
    run_sync(d, "other")


# -- forms ---------------------------------------------------------------------------------------------------


class Subscriber:
    def __init__(self) -> None:
        self.heard: list[str] = []

    @on("user.joined")
    @in_thread
    def joined(self, event: Event) -> None:
        self.heard.append(event.name)

    @on("user.left")
    @in_thread(max_threads=1)
    def left(self, event: Event) -> None:
        self.heard.append(event.name)

    @on("user.moved")
    @in_thread
    @staticmethod
    def moved(event: Any) -> None:
        event.moved = True


async def test_methods_of_a_subscriber_may_be_in_threads(d: AsyncEventDispatcher) -> None:
    one, other = Subscriber(), Subscriber()
    d.add_subscriber(one)
    for name in ("user.joined", "user.left", "user.moved"):
        event: Any = await d.adispatch(name)
    assert event.moved
    assert (one.heard, other.heard) == (["user.joined", "user.left"], [])
    assert one.joined == one.joined and hash(one.joined) == hash(one.joined)
    assert one.joined != other.joined and one.joined != one.left
    d.remove_listener("user.joined", one.joined)
    assert not d.has_listeners("user.joined")
    d.remove_subscriber(one)
    assert not d.has_listeners()


async def test_a_handler_class_may_handle_in_a_thread() -> None:
    seen: list[Any] = []

    class Handler:
        @in_thread
        def handle(self, event: Event) -> None:
            seen.append((type(self), threading.current_thread() is threading.main_thread()))

    d = AsyncEventDispatcher(container=SimpleContainer())
    d.add_listener(NAME, Handler)
    await d.adispatch(NAME)
    assert seen == [(Handler, False)]


async def test_a_decorated_function_is_the_listener_and_can_be_found(d: AsyncEventDispatcher) -> None:
    @d.listen(NAME)
    @in_thread
    def write(event: Event) -> None:
        """Write a row."""

    (row,) = d.describe(NAME)
    assert (row.plugin, row.defined_at) == (__name__, f"{__file__}:{write.__wrapped__.__code__.co_firstlineno}")
    assert (write.__name__, write.__doc__) == ("write", "Write a row.")
    assert "write" in repr(write)
    d.remove_listener(NAME, write)
    assert not d.has_listeners()


async def test_several_listeners_may_share_a_pool() -> None:
    """So that a plugin can be bounded as a whole. Each is equal to what it was before."""
    first, second = Blocking(), Blocking()
    pool = ThreadPool(1)
    one, other = (in_thread(each).with_pool(pool) for each in (first, second))
    assert one == in_thread(first) and one != other
    running = asyncio.create_task(one(Event()))
    await first.until_begun()
    waiting = asyncio.create_task(other(Event()))
    await asyncio.to_thread(int)
    assert second.calls == 0
    first.let_go.set()
    second.let_go.set()
    await asyncio.gather(running, waiting)
    assert first.threads == second.threads


async def test_a_listener_keeps_its_own_limit_in_a_pool_that_is_shared() -> None:
    """One that may run once at a time, for what it uses is no good in two threads, does so in a plugin, too."""
    once, other = Blocking(), Blocking()
    pool = ThreadPool(3)
    limited = in_thread(once, max_threads=1).with_pool(pool)
    runs = [asyncio.create_task(limited(Event())) for _ in range(3)]
    await once.until_begun()
    runs.append(asyncio.create_task(in_thread(other).with_pool(pool)(Event())))
    await other.until_begun()  # what waits for its own limit holds up nobody else
    runs[1].cancel()
    await asyncio.wait([runs[1]])
    assert once.calls == 1
    once.let_go.set()
    other.let_go.set()
    await asyncio.gather(*runs, return_exceptions=True)
    assert once.calls == 2
    await limited(Event())
    async with asyncio.timeout(SECONDS):
        while pool.busy():
            await asyncio.sleep(0)
    assert not pool._claims
    assert not pool._begun
    pool.close()


async def test_threads_that_wait_for_one_another_are_told(
    monkeypatch: pytest.MonkeyPatch, d: AsyncEventDispatcher
) -> None:
    """All threads wait for a dispatch whose listener waits for a thread: nothing else names such a hang."""
    monkeypatch.setattr(module, "REPORT_AFTER", 0.05)
    told: asyncio.Queue[str] = asyncio.Queue()
    pool = ThreadPool(2, report=told.put_nowait)
    portal = d.portal()

    def ask(event: Event) -> None:
        portal.dispatch("inner", timeout=SECONDS)

    d.add_listener("outer", in_thread(ask).with_pool(pool))
    d.add_listener("inner", in_thread(lambda event: None).with_pool(pool))
    runs = [asyncio.create_task(d.adispatch("outer")) for _ in range(2)]
    async with asyncio.timeout(SECONDS):
        text = await told.get()
    assert "in the 2 threads: " in text
    assert ".ask; 2 of them wait for a dispatch through a portal" in text
    pool.max_threads = 3  # type: ignore[misc]
    await in_thread(lambda event: None).with_pool(pool)(Event())
    await asyncio.gather(*runs)
    pool.close()


async def work(event: Any) -> None: ...


@pytest.mark.parametrize(
    ("wrong", "says"), [(work, "needs no in_thread"), (Event, "plain function"), (3, "plain function")]
)
def test_what_is_no_plain_function_is_refused(wrong: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        in_thread(wrong)


def test_threads_are_counted_from_one() -> None:
    with pytest.raises(ValueError, match="max_threads"):
        in_thread(print, max_threads=0)


def test_a_sync_function_stays_an_error_that_says_how(d: AsyncEventDispatcher) -> None:
    with pytest.raises(TypeError, match=r"silbo\.in_thread\(function\)"):
        d.add_listener(NAME, print)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="@in_thread below @on"):
        on(NAME)(print)  # type: ignore[type-var]
