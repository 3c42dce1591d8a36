"""Dispatches from other threads, and from code without an event loop."""

from __future__ import annotations

import asyncio
import contextvars
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import AsyncMock

import pytest
import whistle

from silbo import AsyncEventDispatcher, Bridge, Event, EventName, Portal, run_sync
from silbo.brokers.memory import MemoryBroker
from silbo.dispatch import sync_callers
from silbo.errors import EventMismatch, ListenerTimeout, LoopBlocked, NameUnknownWarning, PortalClosed

SECONDS = 30.0


@dataclass
class UserJoined(Event):
    user_id: int


USER_JOINED = EventName("user.joined", UserJoined)


class LoopThread:
    """An event loop in a thread of its own, with a dispatcher; its portal is for the thread of the test."""

    def __init__(self, dispatcher: AsyncEventDispatcher) -> None:
        self.dispatcher = dispatcher
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        self.portal = asyncio.run_coroutine_threadsafe(self._make_portal(), self.loop).result(SECONDS)

    async def _make_portal(self) -> Portal:
        return self.dispatcher.portal()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.get_loop().run_forever()

    def stop(self) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()


@contextmanager
def loop_thread(**options: Any) -> Iterator[LoopThread]:
    running = LoopThread(AsyncEventDispatcher(**options))
    try:
        yield running
    finally:
        running.stop()


class Hung:
    """A listener that waits for ever, and notes its cancellation."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.cancelled = threading.Event()

    async def __call__(self, event: Any) -> None:
        self.begun.set()
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


# -- a portal ------------------------------------------------------------------------------------------------


def test_listeners_run_in_the_loop_and_the_thread_gets_the_event() -> None:
    """With the context variables of the thread: a request id of the caller is in the listeners' log lines."""
    request: contextvars.ContextVar[str] = contextvars.ContextVar("request")
    seen: list[Any] = []

    async def listen(event: UserJoined) -> None:
        seen.append((threading.current_thread(), request.get()))
        event.user_id += 1

    with loop_thread() as running:
        running.dispatcher.add_listener(USER_JOINED, listen)
        request.set("r1")
        event = UserJoined(1)
        assert running.portal.dispatch(USER_JOINED, event, timeout=SECONDS) is event
        assert event.user_id == 2
        assert seen == [(running.thread, "r1")]
        assert type(running.portal.dispatch("app.started")) is Event


def test_the_error_of_a_listener_is_raised_in_the_thread() -> None:
    """A listener's own time limit is its error, not that of the wait."""
    with loop_thread() as running:
        running.dispatcher.add_listener("x", AsyncMock(side_effect=LookupError("no such user")))
        with pytest.raises(LookupError, match="no such user"):
            running.portal.dispatch("x")
        running.dispatcher.add_listener("late", Hung(), timeout=0.001)
        with pytest.raises(ListenerTimeout):
            running.portal.dispatch("late", timeout=SECONDS)
        running.dispatcher.add_listener("timeout", AsyncMock(side_effect=TimeoutError("of its own")))
        with pytest.raises(TimeoutError, match="of its own"):
            running.portal.dispatch("timeout")


def test_any_number_of_threads_may_dispatch_at_once() -> None:
    with loop_thread() as running:
        running.dispatcher.add_listener("x", heard := AsyncMock())
        threads = [threading.Thread(target=running.portal.dispatch, args=("x",)) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
        assert heard.await_count == 20


async def test_a_portal_is_refused_where_a_loop_runs() -> None:
    """In its own loop the call would wait for itself; another loop would stand still."""
    d = AsyncEventDispatcher()
    with pytest.raises(LoopBlocked, match="await dispatcher.adispatch"):
        d.portal().dispatch("x")
    with loop_thread() as running:
        with pytest.raises(LoopBlocked, match=r"await asyncio.to_thread\(portal.dispatch, name, event\)"):
            running.portal.dispatch("x")
        assert type(await asyncio.to_thread(running.portal.dispatch, "x")) is Event


def test_past_its_time_the_dispatch_is_cancelled() -> None:
    hung = Hung()
    with loop_thread() as running:
        running.dispatcher.add_listener("x", hung)
        with pytest.raises(TimeoutError, match="'x' took longer than 0.01 s, and was cancelled"):
            running.portal.dispatch("x", timeout=0.01)
        assert hung.cancelled.wait(SECONDS)
        with pytest.raises(ValueError, match="timeout"):
            running.portal.dispatch("x", timeout=0)


def test_a_dispatch_that_ends_in_the_last_moment_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was not cancelled, so it is no timeout."""
    looks: list[int] = []

    async def until_let_go(event: Event) -> None:
        await let_go.wait()

    async def settle() -> None:
        let_go.set()
        for _ in range(5):
            await asyncio.sleep(0)

    def late() -> float:
        looks.append(1)
        if len(looks) == 3:  # the time is over
            asyncio.run_coroutine_threadsafe(settle(), running.loop).result(SECONDS)
        return float(len(looks))

    with loop_thread() as running:
        let_go = asyncio.Event()
        running.dispatcher.add_listener("x", until_let_go)
        monkeypatch.setattr(sync_callers, "monotonic", late)
        event = Event()
        assert running.portal.dispatch("x", event, timeout=1.5) is event
    assert len(looks) >= 3


def test_ctrl_c_ends_the_wait_and_the_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    hung = Hung()
    waits = threading.Event()

    def note_the_wait() -> float:
        waits.set()
        return 0.0

    monkeypatch.setattr(sync_callers, "monotonic", note_the_wait)
    main = threading.main_thread().ident
    assert main is not None
    with loop_thread() as running:

        async def interrupt(event: Event) -> None:
            await asyncio.to_thread(waits.wait, SECONDS)
            signal.pthread_kill(main, signal.SIGINT)
            await hung(event)

        running.dispatcher.add_listener("x", interrupt)
        with pytest.raises(KeyboardInterrupt):
            running.portal.dispatch("x", timeout=SECONDS)
        assert hung.cancelled.wait(SECONDS)


def test_after_the_loops_end_nothing_is_dispatched() -> None:
    with loop_thread() as running:
        running.dispatcher.add_listener("x", heard := AsyncMock())
    with pytest.raises(PortalClosed, match="nothing was dispatched, for its event loop is closed") as caught:
        running.portal.dispatch("x")
    assert caught.value.name == "x"
    heard.assert_not_awaited()


def test_a_loop_that_stands_still_is_told_at_once() -> None:
    """It would be waited for without end."""
    loop = asyncio.new_event_loop()

    async def make_portal() -> Portal:
        return AsyncEventDispatcher().portal()

    portal = loop.run_until_complete(make_portal())
    with pytest.raises(PortalClosed, match="stands still"):
        portal.dispatch("x")
    loop.close()


def test_a_loop_that_ends_meanwhile_is_told_to_the_thread_that_waits() -> None:
    """asyncio.run() cancels at its end what it finds."""
    hung = Hung()
    d = AsyncEventDispatcher()
    d.add_listener("x", hung)
    errors: list[Exception] = []

    def call(portal: Portal) -> None:
        try:
            portal.dispatch("x")
        except PortalClosed as error:
            errors.append(error)

    async def main() -> threading.Thread:
        thread = threading.Thread(target=call, args=(d.portal(),))
        thread.start()
        while not hung.begun.is_set():
            await asyncio.sleep(0)
        return thread

    asyncio.run(main()).join(SECONDS)
    assert "cancelled in its event loop" in str(errors)


@pytest.mark.parametrize("close", [True, False])
def test_a_loop_that_ends_without_a_word_is_noticed(close: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has cancelled nothing, so nobody answers."""
    monkeypatch.setattr(sync_callers, "LOOK_EVERY", 0.001)
    loop = asyncio.new_event_loop()
    d = AsyncEventDispatcher()

    async def end(event: Event) -> None:
        loop.stop()
        await asyncio.get_running_loop().create_future()

    d.add_listener("x", end)

    async def make_portal() -> Portal:
        return d.portal()

    portal = loop.run_until_complete(make_portal())
    ended = threading.Event()

    def run() -> None:
        loop.run_forever()
        if close:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(loop, "call_exception_handler", lambda context: None)
            loop.close()
        ended.set()

    thread = threading.Thread(target=run)
    thread.start()
    loop_runs = threading.Event()
    loop.call_soon_threadsafe(loop_runs.set)
    assert loop_runs.wait(SECONDS)
    with pytest.raises(PortalClosed, match="some listeners may have run"):
        portal.dispatch("x")
    assert ended.wait(SECONDS)
    thread.join(SECONDS)
    if not close:  # end what was left
        loop.run_until_complete(asyncio.sleep(0))
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def test_a_forked_process_has_no_loop_of_its_parent() -> None:
    """A server that forks its workers after the start would wait for ever."""
    program = """
import asyncio, os, sys
from silbo import AsyncEventDispatcher
from silbo.errors import PortalClosed

async def main():
    portal = AsyncEventDispatcher().portal()
    if child := os.fork():
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    try:
        portal.dispatch("x")
    except PortalClosed as error:
        os._exit(0 if "forked" in str(error) else 3)
    os._exit(4)

asyncio.run(main())
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=SECONDS, check=False).returncode == 0


def test_a_portal_is_made_in_the_loop() -> None:
    with pytest.raises(RuntimeError, match=r"called in the event loop.*silbo.run_sync"):
        AsyncEventDispatcher().portal()


def test_declared_names_hold_in_the_thread_at_its_line() -> None:
    """In the loop, nobody's line could be named."""
    with loop_thread(names=[USER_JOINED]) as running:
        with pytest.warns(NameUnknownWarning, match="did you mean 'user.joined'") as caught:
            running.portal.dispatch("user.joind")
        assert [warning.filename for warning in caught] == [__file__]
        with pytest.raises(EventMismatch):
            running.portal.dispatch("user.joined", Event())


# -- without a loop ------------------------------------------------------------------------------------------


def test_run_sync_dispatches_where_no_loop_runs() -> None:
    d = AsyncEventDispatcher()
    d.add_listener(USER_JOINED, heard := AsyncMock())
    event = UserJoined(1)
    assert run_sync(d, USER_JOINED, event) is event
    heard.assert_awaited_once_with(event)
    assert type(run_sync(d, "app.started")) is Event
    d.add_listener("x", AsyncMock(side_effect=LookupError))
    with pytest.raises(LookupError):
        run_sync(d, "x")


@pytest.mark.parametrize("error", [None, LookupError])
def test_run_sync_waits_for_what_listeners_spawn(error: type[Exception] | None) -> None:
    """The end of the loop would cancel it; also where the dispatch has failed."""
    d = AsyncEventDispatcher()
    done: list[str] = []

    async def work(event: Event) -> None:
        await asyncio.sleep(0)
        if event.name == "first":
            d.spawn("second")
        done.append(event.name)

    async def spawn(event: Event) -> None:
        d.spawn("first")
        if error is not None:
            raise error

    d.add_listener("first", work)
    d.add_listener("second", work)
    d.add_listener("x", spawn)
    if error is None:
        run_sync(d, "x")
    else:
        with pytest.raises(error):
            run_sync(d, "x")
    assert done == ["first", "second"]


def test_run_sync_does_not_wait_for_other_loops() -> None:
    """The dispatch is done, and an error about the wait would say that it is not."""
    with loop_thread() as running:
        running.dispatcher.add_listener("x", Hung())

        async def spawn() -> None:
            running.dispatcher.spawn("x")

        asyncio.run_coroutine_threadsafe(spawn(), running.loop).result(SECONDS)
        run_sync(running.dispatcher, "y")

        async def cancel() -> None:
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        asyncio.run_coroutine_threadsafe(cancel(), running.loop).result(SECONDS)


async def test_run_sync_is_refused_where_a_loop_runs() -> None:
    with pytest.raises(LoopBlocked, match=r"run_sync\(\) was called .* Write: await dispatcher.adispatch"):
        run_sync(AsyncEventDispatcher(), "x")


def test_run_sync_takes_a_dispatcher_of_whistles() -> None:
    d = whistle.AsyncEventDispatcher()
    d.add_listener("x", heard := AsyncMock())
    run_sync(d, "x", Event())
    heard.assert_awaited_once()


def test_run_sync_after_run_sync_may_use_one_broker() -> None:
    """A broker is taken over by the next loop."""
    d = AsyncEventDispatcher()
    d.add_subscriber(Bridge(MemoryBroker("shop")))
    for _ in range(2):
        run_sync(d, "x")


def test_dispatch_says_what_to_write() -> None:
    """Whistle's method for sync dispatchers stays a refusal."""
    with pytest.raises(NotImplementedError, match=r"await dispatcher\.adispatch.*portal\.dispatch.*silbo\.run_sync"):
        AsyncEventDispatcher().dispatch("x")
