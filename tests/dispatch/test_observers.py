"""Observers, and the trace."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import Any
from unittest.mock import AsyncMock

import pytest

from silbo import AsyncEventDispatcher, Bridge, Call, Dispatch, Event, Trace
from silbo.brokers.memory import MemoryBroker
from silbo.errors import DeliveryGivenUp, ListenerTimeout
from silbo.message import Delivery
from tests.support.consumer import handle_one


class Ping(Event):
    pass


class Recorder:
    def __init__(self) -> None:
        self.log: list[Any] = []

    def before_dispatch(self, dispatch: Dispatch) -> None:
        self.log.append(("before", dispatch.name, dispatch.outcome, len(dispatch.listeners)))

    def after_dispatch(self, dispatch: Dispatch) -> None:
        assert dispatch.duration > 0
        self.log.append(("after", dispatch.name, dispatch.outcome, dispatch.error))

    def before_listener(self, call: Call) -> None:
        self.log.append(("call", call.listener, call.outcome))

    def after_listener(self, call: Call) -> None:
        assert call.duration > 0
        self.log.append(("called", call.listener, call.outcome, call.error))


async def test_an_observer_sees_dispatches_and_listeners_with_outcome_and_duration() -> None:
    """Also of names that nobody hears, and by the second dispatch."""
    seen = Recorder()
    d = AsyncEventDispatcher(observers=[seen])
    first, error = AsyncMock(), LookupError("x")
    failing = AsyncMock(side_effect=error)
    d.add_listener("x", first)
    for _ in range(2):
        seen.log.clear()
        await d.adispatch("x", Ping())
        assert seen.log == [
            ("before", "x", "running", 1),
            ("call", first, "running"),
            ("called", first, "completed", None),
            ("after", "x", "completed", None),
        ]
    seen.log.clear()
    await d.adispatch("nobody")
    assert seen.log == [("before", "nobody", "running", 0), ("after", "nobody", "completed", None)]
    d.add_listener("x", failing, priority=-1)
    seen.log.clear()
    with pytest.raises(LookupError):
        await d.adispatch("x", Ping())
    assert seen.log[2:] == [("called", failing, "failed", error), ("after", "x", "failed", error)]


async def test_an_isolated_or_collected_error_is_seen_at_the_listener() -> None:
    """The dispatch completes under isolation, and fails with the group under collect."""
    for policy, outcome in [("collect", "failed"), (lambda *_: None, "completed")]:
        seen = Recorder()
        error = LookupError("x")
        d = AsyncEventDispatcher(observers=[seen], on_error=policy)  # type: ignore[arg-type]
        listener = AsyncMock(side_effect=error)
        d.add_listener("x", listener)
        if outcome == "failed":
            with pytest.raises(ExceptionGroup) as caught:
                await d.adispatch("x", Ping())
            assert seen.log[-1] == ("after", "x", "failed", caught.value)
        else:
            await d.adispatch("x", Ping())
        assert ("called", listener, "failed", error) in seen.log and seen.log[-1][2] == outcome


async def test_options_and_overrides_work_under_observation() -> None:
    """Concurrent neighbours still run together; a host's _adispatch still gets its listeners."""
    seen = Recorder()
    names: list[str] = []

    class Host(AsyncEventDispatcher):
        async def _adispatch(self, listeners: Any, event: Any) -> None:
            names.extend(listener.__name__ for listener in listeners)
            await super()._adispatch(listeners, event)

    d = Host(observers=[seen])
    met = asyncio.Barrier(2)

    for _ in range(2):

        @d.listen("x", concurrent=True)
        async def meet(event: Any) -> None:
            await met.wait()

    async def last(event: Any) -> None: ...

    d.add_listener("x", last, once=True, priority=1)
    async with asyncio.timeout(5):
        await d.adispatch("x", Ping())
        await d.adispatch("x", Ping())
    assert names == ["meet", "meet", "last", "meet", "meet"]
    assert [entry[0] for entry in seen.log].count("called") == 5
    assert d.get_listeners("x") == (*d.get_listeners("x"),)


async def test_an_observer_that_fails_is_logged_and_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Watching must not break what is watched."""

    class Broken(Recorder):
        def before_dispatch(self, dispatch: Dispatch) -> None:
            raise LookupError("broken")

        def after_listener(self, call: Call) -> None:
            raise LookupError("broken")

    log = Recorder()
    d = AsyncEventDispatcher(observers=[Broken(), log])
    d.add_listener("x", listener := AsyncMock())
    with caplog.at_level(logging.ERROR, "silbo"):
        await d.adispatch("x", Ping())
    assert listener.await_count == 1 and len(log.log) == 4
    assert [record.message for record in caplog.records] == ["observer failed"] * 2


async def test_a_cancelled_listener_and_dispatch_are_seen_as_such() -> None:
    """Not as failed."""
    trace = Trace()
    d = AsyncEventDispatcher(observers=[trace])
    started = asyncio.Event()

    @d.listen("x")
    async def wait(event: Any) -> None:
        started.set()
        await asyncio.Event().wait()

    async def later(event: Any) -> None: ...

    d.add_listener("x", later)
    task = asyncio.create_task(d.adispatch("x", Ping()))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (traced,) = trace.dispatches
    assert traced.outcome == "cancelled" and traced.called == ((wait, "cancelled"),)
    assert traced.not_called == ((later, "cancelled"),)


@pytest.mark.parametrize("options", [{}, {"concurrent": True}, {"once": True}, {"on_error": "collect"}])
@pytest.mark.parametrize("catches", [False, True])
async def test_a_time_limit_is_seen_as_a_failure(options: Any, catches: bool) -> None:
    """A listener that is too slow is not a caller that went away."""
    seen = Recorder()
    d = AsyncEventDispatcher(observers=[seen])

    async def hang(event: Any) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if not catches:
                raise

    d.add_listener("x", hang, timeout=0.01, **options)
    with pytest.raises((ListenerTimeout, ExceptionGroup)):
        await d.adispatch("x", Ping())
    _, _, (hook, listener, outcome, error), (*_, dispatch, _) = seen.log
    assert (hook, listener, outcome, dispatch) == ("called", hang, "failed", "failed")
    assert isinstance(error, ListenerTimeout) and error.listener is hang


async def test_a_cancellation_of_a_listener_with_a_time_limit_is_seen_as_one() -> None:
    """The limit has not passed."""
    seen = Recorder()
    d = AsyncEventDispatcher(observers=[seen])
    started = asyncio.Event()

    @d.listen("x", timeout=60)
    async def wait(event: Any) -> None:
        started.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(d.adispatch("x", Ping()))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [entry[2] for entry in seen.log[-2:]] == ["cancelled", "cancelled"]


@pytest.mark.parametrize("hook", ["before_dispatch", "after_dispatch", "before_listener", "after_listener"])
@pytest.mark.parametrize("how", ["method", "instance", "partial", "mock"])
def test_an_observer_with_an_async_method_is_refused(hook: str, how: str) -> None:
    """Nobody would await it, so it would never run."""

    async def observe(*_: Any) -> None: ...

    observer = Recorder()
    match how:
        case "method":
            observer = type("Async", (Recorder,), {hook: observe})()
        case "instance":
            setattr(observer, hook, observe)
        case "partial":
            setattr(observer, hook, partial(observe, 1))
        case _:
            setattr(observer, hook, AsyncMock())
    with pytest.raises(TypeError, match=f"{hook} of .* is async"):
        AsyncEventDispatcher(observers=[Recorder(), observer])


# -- the trace -----------------------------------------------------------------------------------------------


async def test_a_trace_tells_who_was_called_and_who_was_not_and_why() -> None:
    """Stopped, failed, spent, skipped."""
    trace = Trace()
    d = AsyncEventDispatcher(observers=[trace])

    async def quiet(event: Any) -> None: ...

    async def stops(event: Event) -> None:
        event.stop_propagation()

    async def fails(event: Any) -> None:
        raise LookupError

    d.add_listener("stop", stops)
    d.add_listener("fail", fails)
    for name in ("stop", "fail", "fine"):
        d.add_listener(name, quiet, priority=1)
    await d.adispatch("stop", Ping())
    with pytest.raises(LookupError):
        await d.adispatch("fail", Ping())
    await d.adispatch("fine", Ping())
    stopped, failed, fine = trace.dispatches
    assert (stopped.name, stopped.outcome, stopped.called) == ("stop", "stopped", ((stops, "stopped"),))
    assert stopped.not_called == ((quiet, "stopped"),) and stopped.duration > 0
    assert (failed.outcome, failed.called, failed.not_called) == (
        "failed",
        ((fails, "failed"),),
        ((quiet, "failed"),),
    )
    assert (fine.outcome, fine.called, fine.not_called) == ("completed", ((quiet, "completed"),), ())


async def test_a_trace_tells_a_spent_listener_from_one_that_a_host_skipped() -> None:
    """Neither stopped nor failed, and still not called."""
    trace = Trace()

    class Skipping(AsyncEventDispatcher):
        async def _adispatch(self, listeners: Any, event: Any) -> None:
            await super()._adispatch([one for one in listeners if one != skipped], event)

    d = Skipping(observers=[trace])
    gate = asyncio.Event()

    async def skipped(event: Any) -> None: ...

    async def waits(event: Any) -> None:
        await gate.wait()

    async def once(event: Any) -> None: ...

    d.add_listener("x", skipped)
    d.add_listener("x", waits)
    d.add_listener("x", once, once=True)
    tasks = [d.spawn("x", Ping()), d.spawn("x", Ping())]
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(*tasks)
    assert [traced.not_called for traced in trace.dispatches] == [
        ((skipped, "skipped"),),
        ((skipped, "skipped"), (once, "spent")),
    ]


async def test_a_trace_compares_no_listeners() -> None:
    """Thousands of concurrent listeners end in any order; comparing each with all others would take seconds."""

    class Listens:
        def __init__(self, turns: int) -> None:
            self.turns = turns

        async def __call__(self, event: Event) -> None:
            for _ in range(self.turns):
                await asyncio.sleep(0)
            if self.turns == 7:
                event.stop_propagation()

        def __eq__(self, other: object) -> bool:
            raise AssertionError("compared")

        __hash__ = None  # type: ignore[assignment]

    d = AsyncEventDispatcher(observers=[trace := Trace()])
    listeners = [Listens(turns) for turns in (9, 7, 8)]
    for listener in listeners:
        d.add_listener("x", listener, concurrent=True)
    d.add_listener("x", last := Listens(0), priority=1)
    await d.adispatch("x")
    [traced] = trace.dispatches
    assert [listener.turns for listener, _ in traced.called] == [9, 7, 8]
    assert [(id(listener), why) for listener, why in traced.not_called] == [(id(last), "stopped")]


async def test_a_trace_keeps_totals() -> None:
    """Calls by listener, names nobody hears, listeners never called; the last dispatches only up to a limit."""
    trace = Trace(limit=2)
    d = AsyncEventDispatcher(observers=[trace])
    often, seldom, never = AsyncMock(), AsyncMock(), AsyncMock()
    d.add_listener("x", often)
    d.add_listener("x", seldom, once=True)
    d.add_listener("*.never", never)
    for _ in range(3):
        await d.adispatch("x", Ping())
    for name in ("nobody", "nobody", "no.body"):
        await d.adispatch(name, Ping())
    assert trace.calls == [(often, 3), (seldom, 1)]
    assert trace.unheard == {"nobody": 2, "no.body": 1}
    assert [row.listener for row in trace.never_called(d)] == [never]
    assert len(trace.dispatches) == 2


async def test_a_trace_counts_so_many_names_and_listeners_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program can make new ones without end; those that are counted already go on."""
    monkeypatch.setattr("silbo.dispatch.trace.REMEMBERED", 2)
    trace = Trace()
    d = AsyncEventDispatcher(observers=[trace])
    listeners = [AsyncMock() for _ in range(3)]
    for number, listener in enumerate(listeners):
        d.add_listener(f"heard.{number}", listener)
        for _ in range(2):
            await d.adispatch(f"heard.{number}")
            await d.adispatch(f"unheard.{number}")
    assert trace.unheard == {"unheard.0": 2, "unheard.1": 2}
    assert trace.calls == [(listeners[0], 2), (listeners[1], 2)]


async def test_a_listener_of_every_name_does_not_hide_a_name_that_nobody_hears() -> None:
    """A bridge, on ``**`` or on a name, and a log on ``**`` hear a misspelt name, too."""
    trace = Trace()
    d = AsyncEventDispatcher(observers=[trace])

    async def log(event: Any) -> None: ...

    async def hear(event: Any) -> None: ...

    bridge = Bridge(MemoryBroker(app="web"))
    d.add_subscriber(bridge)
    d.add_listener("**", log, timeout=5)
    d.add_listener("named", bridge.forward, on_error="raise")
    d.add_listener("user.joined", hear)
    d.add_listener("order.*", hear, once=True)
    d.add_listener("logged.by.name", log)
    for name in ("user.joined", "user.joned", "order.paid", "ordr.paid", "named", "logged.by.name", 7):
        await d.adispatch(name, Ping())
    assert trace.unheard == {"user.joned": 1, "ordr.paid": 1, "named": 1, 7: 1}


async def test_a_name_is_heard_from_the_moment_somebody_listens() -> None:
    """And no longer when nobody does."""
    trace = Trace()
    d = AsyncEventDispatcher(observers=[trace])
    d.add_listener("**", AsyncMock())
    await d.adispatch("x", Ping())
    with d.add_listener("x", AsyncMock()):
        await d.adispatch("x", Ping())
        assert trace.unheard == {"x": 1}
    await d.adispatch("x", Ping())
    assert trace.unheard == {"x": 2}


async def test_a_listener_that_only_a_hosts_get_listeners_gives_counts_as_hearing() -> None:
    """The registry knows nothing of it."""
    trace = Trace()
    extra = AsyncMock()

    class Host(AsyncEventDispatcher):
        def get_listeners(self, name: Any = None, /) -> Any:
            return iter((*super().get_listeners(name), extra))

    d = Host(observers=[trace])
    d.add_listener("**", AsyncMock())
    await d.adispatch("x", Ping())
    assert trace.unheard == {} and extra.await_count == 1


async def test_a_dispatcher_in_use_can_be_observed_for_a_while() -> None:
    """Also by names whose listeners were kept ready, and twice at once; then it is as it was."""
    d, before = AsyncEventDispatcher(), Recorder()
    d.add_listener("x", AsyncMock())
    await d.adispatch("x", Ping())
    seen = d.observe(before)
    again = d.observe(other := Recorder())
    await d.adispatch("x", Ping())
    seen.remove()
    seen.remove()
    await d.adispatch("x", Ping())
    again.remove()
    await d.adispatch("x", Ping())
    assert (len(before.log), len(other.log)) == (4, 8)
    assert d._observers == ()
    await d.adispatch("x", Ping())
    assert d._ready, "adispatch does not run its listeners directly again"


async def test_an_observer_that_is_given_again_is_called_once_and_stays() -> None:
    """Each registration ends itself alone, in any order; what the constructor was given stays."""
    trace, recorder = Trace(), Recorder()
    d = AsyncEventDispatcher(observers=[trace])
    with d.observe(trace), d.observe(Trace()) as other_registration:
        await d.adispatch("a")
        other_registration.remove()
    first, second = d.observe(recorder), d.observe(recorder)
    await d.adispatch("b")
    first.remove()
    first.remove()
    await d.adispatch("c")
    second.remove()
    await d.adispatch("d")
    assert [dispatch.name for dispatch in trace.dispatches] == ["a", "b", "c", "d"]
    assert len(recorder.log) == 4, "each dispatch once, b and c"


async def test_a_dispatch_keeps_the_observers_that_it_began_with() -> None:
    d, seen = AsyncEventDispatcher(), Recorder()

    @d.listen("x")
    async def observe(_: Event) -> None:
        d.observe(seen)

    await d.adispatch("x")
    assert seen.log == []


def test_an_object_that_is_no_observer_is_refused_later_too() -> None:
    with pytest.raises(TypeError, match="no observer"):
        AsyncEventDispatcher().observe(object())  # type: ignore[arg-type]


async def test_an_observer_hears_of_dead_letters_if_it_has_a_method_for_them(caplog: pytest.LogCaptureFixture) -> None:
    """Before the hook does, whatever the hook does; an observer without the method is not asked."""

    class Undertaker(Recorder):
        def after_dead_letter(self, delivery: Delivery, error: DeliveryGivenUp) -> None:
            self.dead = delivery.id, error.name, error.group, error.attempts, error.problem

    d = AsyncEventDispatcher(observers=[Recorder(), seen := Undertaker()])
    d.add_listener("user.joined", AsyncMock(side_effect=LookupError("no such plan")))
    _, subscription, _ = await handle_one(d, max_attempts=1)
    assert seen.dead == ("1", "user.joined", "billing", 1, "LookupError: no such plan")
    assert subscription.buried == [("1", "LookupError: no such plan", 1)]
    assert "observer failed" not in caplog.text


async def test_an_observer_that_fails_at_a_dead_letter_does_not_stop_the_consumer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Failing(Recorder):
        def after_dead_letter(self, delivery: Delivery, error: DeliveryGivenUp) -> None:
            raise LookupError("no metrics")

    d = AsyncEventDispatcher(observers=[Failing()])
    d.add_listener("user.joined", AsyncMock(side_effect=LookupError))
    _, _, errors = await handle_one(d, max_attempts=1)
    assert isinstance(errors[-1], DeliveryGivenUp)
    [record] = [record for record in caplog.records if record.message == "observer failed"]
    assert record.hook == "after_dead_letter"  # type: ignore[attr-defined]
