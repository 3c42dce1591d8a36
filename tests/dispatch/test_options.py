"""Listeners with options: once, timeout, concurrent, on_error; and registrations."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from typing import Any
from unittest.mock import AsyncMock

import pytest

from silbo import AsyncEventDispatcher, Event, EventName, Registration
from silbo.errors import ListenerTimeout, SilboError


class Ping(Event):
    pass


async def nothing(event: Any) -> None:
    """A listener."""


# -- registrations -------------------------------------------------------------------------------------------


async def test_a_registration_removes_itself_alone() -> None:
    """Not the other copies of the same listener; twice is fine."""
    d = AsyncEventDispatcher()
    listener = AsyncMock()
    first, _ = d.add_listener("x", listener), d.add_listener("x", listener)
    assert isinstance(first, Registration)
    first.remove()
    first.remove()
    assert d.get_listeners("x") == (listener,)
    with d.add_listener("x", listener) as place:
        assert d.get_listeners("x") == (listener, listener)
        assert isinstance(place, Registration)
    assert d.get_listeners("x") == (listener,)


async def test_registrations_leave_no_trace() -> None:
    """Names made up for one wait don't pile up."""
    d = AsyncEventDispatcher()
    for number in range(100):
        with d.add_listener(f"reply.{number}", nothing), d.add_listener(f"*.{number}", nothing):
            pass
    assert d.get_listeners() == {}


# -- wrappers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"once": True}, {"timeout": 5}, {"on_error": "collect"}, {"concurrent": True}])
def test_a_listener_with_options_is_a_wrapper_equal_to_it(options: Any) -> None:
    """So that `in`, `==` and remove_listener work with the listener itself."""
    d = AsyncEventDispatcher()
    d.add_listener("x", nothing, **options)
    (wrapper,) = d.get_listeners("x")
    assert wrapper == nothing and nothing == wrapper and wrapper.__wrapped__ is nothing and wrapper is not nothing
    assert hash(wrapper) == hash(nothing) and wrapper == d.get_listeners("x")[0] and wrapper != print
    assert (wrapper.__name__, wrapper.__doc__, repr(wrapper)) == ("nothing", "A listener.", repr(nothing))
    assert list(inspect.signature(wrapper).parameters) == ["event"]
    d.remove_listener("x", nothing)
    assert not d.has_listeners("x")


def test_without_options_the_listener_itself_is_registered() -> None:
    """Free when unused."""
    d = AsyncEventDispatcher()
    d.add_listener("x", nothing, priority=3, once=False, timeout=None, concurrent=False, on_error=None)
    assert d.get_listeners("x")[0] is nothing


async def test_a_wrapper_works_on_another_dispatcher_and_by_hand() -> None:
    """A host may copy listeners from one dispatcher to another."""
    d, other = AsyncEventDispatcher(), AsyncEventDispatcher()
    listener = AsyncMock(side_effect=LookupError)
    d.add_listener("x", listener, on_error="collect")
    (wrapper,) = d.get_listeners("x")
    other.add_listener("x", wrapper)
    with pytest.raises(ExceptionGroup):
        await other.adispatch("x", Ping())
    with pytest.raises(LookupError):
        await wrapper(Ping())


@pytest.mark.parametrize(
    ("options", "error"),
    [({"timeout": 0}, ValueError), ({"timeout": -1}, ValueError), ({"on_error": "ignore"}, TypeError)],
)
def test_wrong_options_are_refused_when_registered(options: Any, error: type[Exception]) -> None:
    """Not at the first dispatch."""
    with pytest.raises(error, match=r"timeout|on_error"):
        AsyncEventDispatcher().add_listener("x", nothing, **options)
    with pytest.raises(TypeError):
        AsyncEventDispatcher(on_error="ignore")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


# -- once ----------------------------------------------------------------------------------------------------


async def test_once_runs_once_even_under_concurrent_dispatches() -> None:
    """Also where both dispatches had looked it up before the first ran it."""
    d = AsyncEventDispatcher()
    listener = AsyncMock()
    gate = asyncio.Event()

    async def wait(event: Any) -> None:
        await gate.wait()

    d.add_listener("x", wait, priority=-1)
    d.add_listener("x", listener, once=True)
    tasks = [d.spawn("x", Ping()) for _ in range(5)]
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(*tasks)
    assert listener.await_count == 1 and d.get_listeners("x") == (wait,)


async def test_once_counts_a_run_that_failed_or_dispatched_again() -> None:
    """It is removed when it starts to run."""
    d = AsyncEventDispatcher()
    runs: list[Any] = []

    @d.listen("x", once=True)
    async def again(event: Any) -> None:
        runs.append(event)
        await d.adispatch("x", Ping())
        raise LookupError

    with pytest.raises(LookupError):
        await d.adispatch("x", Ping())
    await d.adispatch("x", Ping())
    assert len(runs) == 1


# -- timeout -------------------------------------------------------------------------------------------------


async def test_a_listener_past_its_timeout_is_cancelled() -> None:
    """The error names it and is a TimeoutError."""
    d = AsyncEventDispatcher()
    cancelled: list[bool] = []

    @d.listen("x", timeout=0.01)
    async def hang(event: Any) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    with pytest.raises(TimeoutError, match=r"hang.*0\.01 s") as caught:
        await d.adispatch("x", Ping())
    assert isinstance(caught.value, ListenerTimeout) and isinstance(caught.value, SilboError) and cancelled == [True]
    assert caught.value.listener is hang and caught.value.timeout == 0.01


@pytest.mark.parametrize("policy", ["raise", "collect", "isolate"])
async def test_a_listener_that_catches_the_cancellation_of_its_timeout_has_failed(policy: Any) -> None:
    """It returned, but its work may be half done: nobody may take the dispatch for a success."""
    errors: list[Exception] = []
    d = AsyncEventDispatcher(on_error=policy if policy != "isolate" else lambda error, *_: errors.append(error))

    @d.listen("x", timeout=0.01)
    async def tidy(event: Any) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    try:
        await d.adispatch("x", Ping())
    except ListenerTimeout as error:
        errors.append(error)
    except ExceptionGroup as group:
        errors.extend(group.exceptions)
    assert [type(error) for error in errors] == [ListenerTimeout]
    task = asyncio.current_task()
    assert task is not None and not task.cancelling()


async def test_an_error_that_a_listener_makes_of_its_cancellation_is_raised_as_it_is() -> None:
    """Its own error says more than ours."""
    d = AsyncEventDispatcher()

    @d.listen("x", timeout=0.01)
    async def translate(event: Any) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise LookupError("half done") from None

    with pytest.raises(LookupError, match="half done"):
        await d.adispatch("x", Ping())


async def test_a_listeners_own_timeout_error_is_left_as_it_is() -> None:
    """It is not ours."""
    d = AsyncEventDispatcher()
    d.add_listener("x", AsyncMock(side_effect=TimeoutError("mine")), timeout=5)
    with pytest.raises(TimeoutError, match="mine") as caught:
        await d.adispatch("x", Ping())
    assert not isinstance(caught.value, ListenerTimeout)


# -- concurrent ----------------------------------------------------------------------------------------------


async def test_concurrent_neighbours_of_equal_priority_run_together() -> None:
    """And the next priority only after all of them."""
    d = AsyncEventDispatcher()
    log: list[str] = []
    met = asyncio.Barrier(3)

    def meet(label: str) -> Any:
        async def listen(event: Any) -> None:
            await met.wait()
            log.append(label)

        return listen

    for label in "abc":
        d.add_listener("x", meet(label), concurrent=True)

    @d.listen("*", priority=1)
    async def after(event: Any) -> None:
        log.append("after")

    for _ in range(2):
        async with asyncio.timeout(5):
            await d.adispatch("x", Ping())
    assert sorted(log[:3]) == ["a", "b", "c"] and log[3] == "after" and len(log) == 8


async def test_concurrent_listeners_of_other_priorities_or_with_one_between_take_turns() -> None:
    """Only neighbours run together."""
    d = AsyncEventDispatcher()
    running, most = 0, 0

    def listener() -> Any:
        async def listen(event: Any) -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0)
            running -= 1

        return listen

    for priority, concurrent in [(0, True), (0, False), (0, True), (1, True), (2, True)]:
        d.add_listener("x", listener(), priority=priority, concurrent=concurrent)
    await d.adispatch("x", Ping())
    assert most == 1


async def test_when_a_concurrent_listener_fails_its_siblings_are_awaited() -> None:
    """Never orphaned; one error comes unwrapped, several as a group."""
    d = AsyncEventDispatcher()
    finished: list[str] = []
    error = LookupError("first")

    async def slow(event: Any) -> None:
        await asyncio.sleep(0.01)
        finished.append("slow")

    later = AsyncMock()
    d.add_listener("x", AsyncMock(side_effect=error), concurrent=True)
    d.add_listener("x", slow, concurrent=True)
    d.add_listener("x", later, priority=1)
    with pytest.raises(LookupError) as caught:
        await d.adispatch("x", Ping())
    assert caught.value is error and finished == ["slow"] and later.await_count == 0
    d.add_listener("x", AsyncMock(side_effect=KeyError("second")), concurrent=True)
    with pytest.raises(ExceptionGroup) as group:
        await d.adispatch("x", Ping())
    assert [type(one) for one in group.value.exceptions] == [LookupError, KeyError]


@pytest.mark.parametrize("isolates", ["hook", "collect"])
async def test_no_hook_swallows_the_cancellation_of_the_caller(isolates: str) -> None:
    """A listener whose clean-up fails while it is cancelled must not keep the host's task alive."""
    errors: list[Exception] = []
    started = asyncio.Event()
    d = AsyncEventDispatcher(on_error="collect" if isolates == "collect" else lambda error, *_: errors.append(error))

    @d.listen("x")
    async def spoil(event: Any) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            raise ConnectionError("close failed")

    @d.listen("y", timeout=0.001)
    async def spoil_by_its_own_limit(event: Any) -> None:
        await spoil(event)

    task = asyncio.create_task(d.adispatch("x", Ping()))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert errors == []
    try:
        await d.adispatch("y", Ping())  # nobody has cancelled the caller
    except ExceptionGroup as group:
        errors += group.exceptions
    assert [str(error) for error in errors] == ["close failed"]


async def test_cancelling_a_dispatch_cancels_its_concurrent_listeners() -> None:
    """And they have ended when it has."""
    d = AsyncEventDispatcher()
    ended: list[int] = []
    started = asyncio.Barrier(3)

    def listener(number: int) -> Any:
        async def listen(event: Any) -> None:
            try:
                await started.wait()
                await asyncio.Event().wait()
            finally:
                ended.append(number)

        return listen

    for number in range(2):
        d.add_listener("x", listener(number), concurrent=True)
    task = asyncio.create_task(d.adispatch("x", Ping()))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(ended) == [0, 1]


async def test_a_stop_by_a_concurrent_listener_counts_after_its_turn() -> None:
    """The siblings run on, the next priority does not."""
    d = AsyncEventDispatcher()
    sibling, later = AsyncMock(), AsyncMock()

    @d.listen("x", concurrent=True)
    async def stop(event: Event) -> None:
        event.stop_propagation()

    d.add_listener("x", sibling, concurrent=True)
    d.add_listener("x", later, priority=1)
    assert (await d.adispatch("x", Ping())).propagation_stopped
    assert (sibling.await_count, later.await_count) == (1, 0)


# -- on_error ------------------------------------------------------------------------------------------------


async def test_collect_runs_all_and_raises_one_group() -> None:
    """In running order; the event is usable afterwards."""
    d = AsyncEventDispatcher(on_error="collect")
    errors = [LookupError("a"), KeyError("b")]
    last = AsyncMock()
    for error in errors:
        d.add_listener("x", AsyncMock(side_effect=error))
    d.add_listener("x", last)
    event = Ping()
    for _ in range(2):
        with pytest.raises(ExceptionGroup, match="2 listeners of 'x' failed") as caught:
            await d.adispatch("x", event)
        assert list(caught.value.exceptions) == errors
    assert last.await_count == 2


async def test_collect_keeps_nested_dispatches_of_the_same_event_apart() -> None:
    """Each raises its own."""
    d = AsyncEventDispatcher(on_error="collect")
    seen: list[int] = []

    @d.listen("outer")
    async def nest(event: Any) -> None:
        with pytest.raises(ExceptionGroup) as caught:
            await d.adispatch("inner", event)
        seen.append(len(caught.value.exceptions))

    d.add_listener("outer", AsyncMock(side_effect=LookupError), priority=-1)
    d.add_listener("inner", AsyncMock(side_effect=LookupError))
    with pytest.raises(ExceptionGroup) as caught:
        await d.adispatch("outer", Ping())
    assert seen == [1] and len(caught.value.exceptions) == 1


async def test_a_callable_isolates() -> None:
    """It gets error, event and listener; the dispatch goes on and succeeds. Sync or async."""
    got: list[Any] = []

    async def later(*what: Any) -> None:
        await asyncio.sleep(0)
        got.append(what)

    for handler in (lambda *what: got.append(what), later):
        got.clear()
        d = AsyncEventDispatcher(on_error=handler)
        error, last = LookupError("x"), AsyncMock()
        failing = AsyncMock(side_effect=error)
        d.add_listener("x", failing)
        d.add_listener("x", last)
        event = Ping()
        for _ in range(2):
            await d.adispatch("x", event)
        assert got == [(error, event, failing)] * 2 and last.await_count == 2


async def test_a_listeners_own_policy_comes_before_the_dispatchers() -> None:
    """All three, each against the others."""
    got: list[Any] = []

    def isolate(*what: Any) -> None:
        got.append(what)

    failing = AsyncMock(side_effect=LookupError)
    for policies in [("raise", isolate), ("collect", isolate), (isolate, "raise"), (isolate, "collect")]:
        d = AsyncEventDispatcher(on_error=policies[0])  # type: ignore[arg-type]
        d.add_listener("x", failing, on_error=policies[1])  # type: ignore[arg-type]
        if callable(policies[1]):
            await d.adispatch("x", Ping())
        else:
            with pytest.raises(LookupError if policies[1] == "raise" else ExceptionGroup):
                await d.adispatch("x", Ping())
    assert len(got) == 2


@pytest.mark.parametrize("own", ["raise", "collect", AsyncMock()], ids=["raise", "collect", "isolate"])
@pytest.mark.parametrize("more", [{}, {"once": True}, {"timeout": 30}, {"concurrent": True}], ids=str)
async def test_a_binding_policy_holds_whatever_a_listener_asks_for(own: Any, more: Any) -> None:
    """A plugin can't end the host's dispatch, nor keep its errors from the host; and ``describe`` shows what holds."""
    got: list[Any] = []
    d = AsyncEventDispatcher(on_error=lambda error, event, listener: got.append(error), binding=True)
    error = LookupError("x")
    d.add_listener("x", AsyncMock(side_effect=error), on_error=own, **more)
    d.listen("x", on_error=own)(AsyncMock(side_effect=error))
    [with_options, without] = d.describe()
    await d.adispatch("x", Ping())
    assert got == [error, error]
    assert (with_options.options, without.options) == (more, {})


async def test_a_binding_hook_decides_which_listeners_must_succeed() -> None:
    """An error that it raises ends the dispatch."""

    async def charge(event: Event) -> None:
        raise PermissionError

    def decide(error: Exception, event: Event, listener: Any) -> None:
        if listener is charge:
            raise error

    d = AsyncEventDispatcher(on_error=decide, binding=True)
    d.add_listener("x", AsyncMock(side_effect=LookupError))
    d.add_listener("x", charge)
    d.add_listener("x", last := AsyncMock())
    with pytest.raises(PermissionError):
        await d.adispatch("x", Ping())
    last.assert_not_awaited()


async def test_an_error_that_raises_takes_the_collected_ones_along() -> None:
    """Nothing is lost."""
    d = AsyncEventDispatcher(on_error="collect")
    d.add_listener("x", AsyncMock(side_effect=LookupError))
    d.add_listener("x", AsyncMock(side_effect=KeyError), on_error="raise")
    never = AsyncMock()
    d.add_listener("x", never)
    with pytest.raises(ExceptionGroup) as caught:
        await d.adispatch("x", Ping())
    assert [type(error) for error in caught.value.exceptions] == [LookupError, KeyError] and never.await_count == 0


async def test_policies_hold_under_a_hosts_own_adispatch() -> None:
    """The options are in the listeners that it is given."""

    class Host(AsyncEventDispatcher):
        async def _adispatch(self, listeners: Any, event: Any) -> None:
            for listener in listeners:
                await listener(event)

    d = Host(on_error="collect")
    d.add_listener("x", AsyncMock(side_effect=LookupError))
    d.add_listener("x", last := AsyncMock())
    with pytest.raises(ExceptionGroup):
        await d.adispatch("x", Ping())
    assert last.await_count == 1


class Falsy:
    """A hook that is false, as a list of errors is while it is empty."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __bool__(self) -> bool:
        return False

    def __call__(self, *what: Any) -> None:
        self.calls.append(what)


async def test_a_hook_that_is_false_is_a_hook() -> None:
    """Only None stands for no hook."""
    mine, hosts = Falsy(), Falsy()
    d = AsyncEventDispatcher(on_error=hosts)
    d.add_listener("x", AsyncMock(side_effect=LookupError), on_error=mine)
    d.add_listener("x", AsyncMock(side_effect=KeyError))
    await d.adispatch("x", Ping())
    assert (len(mine.calls), len(hosts.calls)) == (1, 1)
    assert [row.options for row in d.describe("x")] == [{"on_error": mine}, {}]


async def test_an_event_class_that_is_false_is_the_class_of_its_name() -> None:
    """A metaclass may give classes a length."""

    class Empty(type):
        def __len__(cls) -> int:
            return 0

    class Left(Event, metaclass=Empty):
        pass

    assert isinstance(await AsyncEventDispatcher().adispatch(EventName("user.left", Left)), Left)
