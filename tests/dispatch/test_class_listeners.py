"""Listeners given as classes: registered, run with options, and the scopes that their objects live in."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest

import silbo
from silbo import AsyncEventDispatcher, Event, Trace
from silbo.containers.rodi import RodiContainer
from silbo.errors import ContainerMissing, ListenerTimeout, SilboError, Unresolvable
from silbo.protocols import Container
from silbo.work.unit_of_work import unit_of_work
from tests.support.simple_container import SimpleContainer, SimpleScope


class Ping(Event):
    def __init__(self, then: Callable[[], Awaitable[object]] | None = None) -> None:
        self.then = then
        self.heard: list[object] = []


class Hears:
    async def handle(self, event: Ping) -> None:
        event.heard.append(self)
        if event.then is not None:
            await event.then()


class AlsoHears(Hears):
    pass


class Called:
    async def __call__(self, event: Ping) -> None:
        event.heard.append(self)


@pytest.fixture
def container() -> SimpleContainer:
    return SimpleContainer()


@pytest.fixture
def d(container: SimpleContainer) -> AsyncEventDispatcher:
    return AsyncEventDispatcher(container=container)


# -- registered ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Hears, Called])
async def test_a_class_is_made_when_a_dispatch_reaches_it(
    d: AsyncEventDispatcher, container: SimpleContainer, cls: type[Any]
) -> None:
    """Not when it is registered."""
    d.add_listener("x", cls)
    assert container.scopes == []
    event = await d.adispatch("x", Ping())
    assert [type(one) for one in event.heard] == [cls] and container.asked == [cls]


async def test_listen_decorates_a_class_and_leaves_it_as_it_is(d: AsyncEventDispatcher) -> None:
    @d.listen("x.*", priority=3)
    class Local(Hears):
        pass

    assert isinstance(Local, type)
    assert type((await d.adispatch("x.y", Ping())).heard[0]) is Local
    [row] = d.describe("x.y")
    assert (row.listener, row.priority) == (Local, 3)


async def test_handle_goes_before_call(d: AsyncEventDispatcher) -> None:
    class Two(Called):
        async def handle(self, event: Ping) -> None:
            event.heard.append("handle")

    class SyncHandle(Called):
        def handle(self, event: Ping) -> None: ...

    d.add_listener("x", Two)
    d.add_listener("x", SyncHandle)
    first, second = (await d.adispatch("x", Ping())).heard
    assert first == "handle" and isinstance(second, SyncHandle)


class Sync:
    def handle(self, event: Ping) -> None: ...


@pytest.mark.parametrize("cls", [Sync, object, type, Event, int])
@pytest.mark.parametrize("container", [None, SimpleContainer()], ids=["none", "container"])
def test_a_class_that_cannot_handle_is_refused_when_registered(cls: Any, container: Container | None) -> None:
    """Not at the first dispatch."""
    d = AsyncEventDispatcher(container=container)
    for register in (partial(d.add_listener, "x", cls), partial(d.listen("x"), cls)):
        with pytest.raises(TypeError, match=f"^{cls.__name__} is a class without an async handle"):
            register()
    assert d.get_listeners() == {}


def test_without_a_container_a_class_is_refused_with_what_to_do() -> None:
    with pytest.raises(ContainerMissing, match=r"^Hears is a class.*container=\.\.\.\).*: Hears\(\.\.\.\)$") as caught:
        AsyncEventDispatcher().add_listener("x", Hears)
    assert isinstance(caught.value, SilboError) and isinstance(caught.value, TypeError)


def test_listen_without_a_name_is_refused_for_a_class_too(d: AsyncEventDispatcher) -> None:
    with pytest.raises(TypeError, match="takes a name first"):
        d.listen(Hears)
    d.listen(Ping)  # any hashable is a name


def test_a_container_that_is_no_adapter_is_refused() -> None:
    import dishka
    import rodi

    for wrong in (rodi.Container(), dishka.make_async_container(), RodiContainer, "container"):
        with pytest.raises(TypeError, match=r"an adapter from silbo\.containers"):
            AsyncEventDispatcher(container=wrong)  # type: ignore[arg-type]


def test_get_listeners_gives_what_equals_the_class(d: AsyncEventDispatcher) -> None:
    for options in ({}, {"once": True}, {"timeout": 5}, {"on_error": "collect"}):
        place = d.add_listener("x", Hears, **options)  # type: ignore[arg-type]
        [listener] = d.get_listeners("x")
        assert listener == Hears and listener != AlsoHears and hash(listener) == hash(Hears)
        assert listener.__wrapped__ is Hears and listener.__name__ == "Hears" and repr(listener) == repr(Hears)
        assert Hears in d.get_listeners("x") and d.has_listeners("x")
        place.remove()
        assert not d.has_listeners("x")


def test_remove_listener_takes_every_copy(d: AsyncEventDispatcher) -> None:
    for options in ({}, {"once": True}):
        d.add_listener("x", Hears, **options)  # type: ignore[arg-type]
    d.add_listener("x", AlsoHears)
    d.remove_listener("x", Hears)
    assert d.get_listeners("x") == (AlsoHears,)


def test_describe_shows_the_class_and_where_it_handles(d: AsyncEventDispatcher) -> None:
    d.add_listener("x", Hears, once=True)
    d.add_listener("x", Called, priority=1)
    hears, called = d.describe("x")
    assert (hears.listener, hears.options, hears.plugin) == (Hears, {"once": True}, __name__)
    assert hears.defined_at == f"{__file__}:{Hears.handle.__code__.co_firstlineno}"
    assert called.defined_at == f"{__file__}:{Called.__call__.__code__.co_firstlineno}"


# -- run -------------------------------------------------------------------------------------------------------


async def test_classes_and_functions_run_in_one_order_and_may_stop(d: AsyncEventDispatcher) -> None:
    @d.listen("x", priority=1)
    async def stop(event: Ping) -> None:
        event.heard.append("stop")
        event.stop_propagation()

    d.add_listener("x", AlsoHears, priority=2)
    d.add_listener("x", Hears, priority=-1)
    hears, stopped = (await d.adispatch("x", Ping())).heard
    assert type(hears) is Hears and stopped == "stop"


@pytest.mark.parametrize("options", [{}, {"timeout": 5}, {"on_error": print}], ids=str)
async def test_every_dispatch_has_its_scope(d: AsyncEventDispatcher, container: SimpleContainer, options: Any) -> None:
    """Nothing is kept ready that would go without."""
    for _ in range(2):
        d.add_listener("x", Hears, **options)
    for _ in range(3):
        first, second = (await d.adispatch("x", Ping())).heard
        assert first is second
    assert len(container.scopes) == 3 and all(scope.closed for scope in container.scopes)


async def test_nothing_stays_in_the_context(d: AsyncEventDispatcher) -> None:
    """A task that dispatches for ever does not grow."""
    d.add_listener("x", Hears)
    await d.adispatch("x", Ping())
    before = dict(contextvars.copy_context())
    await d.adispatch("x", Ping())
    with pytest.raises(LookupError):
        await d.adispatch("x", Ping(partial(_raise, LookupError())))
    assert dict(contextvars.copy_context()) == before


async def _raise(error: Exception) -> None:
    raise error


async def test_once(d: AsyncEventDispatcher) -> None:
    d.add_listener("x", Hears, once=True)
    assert [len((await d.adispatch("x", Ping())).heard) for _ in range(2)] == [1, 0]


async def test_timeout_covers_making_and_handling(d: AsyncEventDispatcher, container: SimpleContainer) -> None:
    async def hang() -> None:
        await asyncio.Event().wait()

    container.factories[AlsoHears] = hang
    d.add_listener("x", Hears, timeout=0.01)
    d.add_listener("y", AlsoHears, timeout=0.01)
    for event in (Ping(hang), None):
        with pytest.raises(ListenerTimeout) as caught:
            await d.adispatch("x" if event else "y", event)
        assert caught.value.listener is (Hears if event else AlsoHears)
    assert all(scope.closed for scope in container.scopes)


async def test_on_error_gets_the_class_and_covers_making_it(
    d: AsyncEventDispatcher, container: SimpleContainer
) -> None:
    def cannot() -> None:
        raise Unresolvable(AlsoHears, container, "no such thing")

    container.factories[AlsoHears] = cannot
    failed: list[Any] = []
    d.add_listener("x", AlsoHears, on_error=lambda error, event, listener: failed.append((str(error), listener)))
    d.add_listener("x", Hears)
    assert len((await d.adispatch("x", Ping())).heard) == 1
    assert failed == [("SimpleContainer can't make AlsoHears: no such thing", AlsoHears)]


async def test_observers_see_the_class(container: SimpleContainer) -> None:
    d = AsyncEventDispatcher(container=container, observers=[trace := Trace()])
    for options in ({}, {"timeout": 5}):
        d.add_listener("x", Hears, **options)  # type: ignore[arg-type]
    d.add_listener("y", AlsoHears, once=True)
    await d.adispatch("x", Ping())
    assert trace.dispatches[0].called == ((Hears, "completed"), (Hears, "completed"))
    assert trace.calls == [(Hears, 2)] and [row.listener for row in trace.never_called(d)] == [AlsoHears]
    assert len(container.scopes) == 1


async def test_a_host_that_runs_listeners_in_its_own_way_is_in_the_scope(container: SimpleContainer) -> None:
    class Host(AsyncEventDispatcher):
        def get_listeners(self, name: Any = None, /) -> Any:
            return iter(super().get_listeners(name))

        async def _adispatch(self, listeners: Any, event: Any, /) -> None:
            for listener in listeners:
                await listener(event)

    d = Host(container=container)
    d.add_listener("x", Hears)
    d.add_listener("x", AlsoHears)
    assert len((await d.adispatch("x", Ping())).heard) == 2
    assert len(container.scopes) == 1 and container.scopes[0].closed


async def test_run_by_hand_or_on_another_dispatcher_it_has_a_scope_for_itself(
    d: AsyncEventDispatcher, container: SimpleContainer
) -> None:
    d.add_listener("x", Hears, timeout=5)
    [listener] = d.get_listeners("x")
    await listener(Ping())
    other = AsyncEventDispatcher()
    other.add_listener("x", listener)
    event = await other.adispatch("x", Ping())
    assert len(event.heard) == 1 and len(container.scopes) == 2 and all(scope.closed for scope in container.scopes)


# -- scopes ----------------------------------------------------------------------------------------------------


async def test_a_dispatch_that_reaches_no_class_opens_none(d: AsyncEventDispatcher, container: SimpleContainer) -> None:
    d.add_listener("x", Hears)

    @d.listen("x", priority=-1)
    async def stop(event: Ping) -> None:
        event.stop_propagation()

    @d.listen("y")
    async def plain(event: Ping) -> None: ...

    await d.adispatch("x", Ping())
    await d.adispatch("y", Ping())
    assert container.scopes == []


async def test_two_containers_have_scopes_of_their_own(container: SimpleContainer) -> None:
    """And each is shared below the other."""
    other = SimpleContainer()
    a, b = AsyncEventDispatcher(container=container), AsyncEventDispatcher(container=other)
    a.add_listener("x", Hears)
    b.add_listener("x", Hears)
    a.add_listener("end", AlsoHears)
    await a.adispatch("x", Ping(lambda: b.adispatch("x", Ping(lambda: a.adispatch("end", Ping())))))
    assert container.asked == [Hears, AlsoHears] and len(container.scopes) == 1
    assert other.asked == [Hears] and len(other.scopes) == 1


async def test_two_dispatchers_of_one_container_share_its_scope(container: SimpleContainer) -> None:
    a, b = AsyncEventDispatcher(container=container), AsyncEventDispatcher(container=container)
    a.add_listener("x", Hears)
    b.add_listener("x", Hears)
    inner = Ping()
    outer = await a.adispatch("x", Ping(lambda: b.adispatch("x", inner)))
    assert outer.heard == inner.heard and len(container.scopes) == 1


async def test_a_unit_of_work_spans_the_dispatches_in_it(d: AsyncEventDispatcher, container: SimpleContainer) -> None:
    """As a command has it, with the events of its handler."""
    d.add_listener("x", Hears)
    async with unit_of_work(container) as unit:
        handler = await unit.resolve(Hears)
        event = await d.adispatch("x", Ping())
        assert event.heard == [handler] and not container.scopes[0].closed
    assert len(container.scopes) == 1 and container.scopes[0].closed


async def test_a_task_that_outlives_its_dispatch_never_gets_the_closed_scope(
    d: AsyncEventDispatcher, container: SimpleContainer
) -> None:
    """The context is copied into a task, and the scope with it."""
    d.add_listener("x", Hears)
    for _ in range(2):
        d.add_listener("x", Hears, priority=1, concurrent=True)
    tasks: list[asyncio.Task[Ping]] = []
    over = asyncio.Event()

    async def later() -> Ping:
        await over.wait()
        return await d.adispatch("x", Ping())

    async def leave() -> None:
        if not tasks:
            tasks.append(asyncio.create_task(later()))

    first = await d.adispatch("x", Ping(leave))
    over.set()
    second = await tasks[0]
    assert first.heard == [first.heard[0]] * 3 and second.heard == [second.heard[0]] * 3
    assert first.heard[0] is not second.heard[0]
    assert len(container.scopes) == 2 and all(scope.closed for scope in container.scopes)


async def test_nor_do_its_concurrent_listeners(d: AsyncEventDispatcher, container: SimpleContainer) -> None:
    d.add_listener("x", Hears)
    late: list[Ping] = []
    tasks: list[asyncio.Task[Event]] = []

    async def dispatching(event: Event) -> None:
        late.append(await d.adispatch("x", Ping()))

    for _ in range(2):
        d.add_listener("later", dispatching, concurrent=True)

    async def leave() -> None:
        tasks.append(d.spawn("later"))

    first = await d.adispatch("x", Ping(leave))
    await tasks[0]
    assert len({*first.heard, *late[0].heard, *late[1].heard}) == 3 == len(container.scopes)


async def test_a_context_kept_by_hand_never_gives_the_closed_scope(
    d: AsyncEventDispatcher, container: SimpleContainer
) -> None:
    """The same task, in a context from the middle of its dispatch."""
    d.add_listener("x", Hears)
    kept: list[contextvars.Context] = []

    async def keep() -> None:
        kept.append(contextvars.copy_context())

    first = await d.adispatch("x", Ping(keep))
    work: Any = d.adispatch("x", second := Ping())
    with pytest.raises(StopIteration):
        kept[0].run(work.send, None)
    assert second.heard != first.heard and len(container.scopes) == 2


async def test_a_task_has_its_own_while_the_dispatch_runs(d: AsyncEventDispatcher, container: SimpleContainer) -> None:
    """A scoped object is rarely safe to use from two tasks at once."""
    d.add_listener("x", Hears)
    inner = [Ping(), Ping()]

    async def beside() -> None:
        await asyncio.gather(*(d.adispatch("x", event) for event in inner))

    outer = await d.adispatch("x", Ping(beside))
    assert len({*outer.heard, *inner[0].heard, *inner[1].heard}) == 3 == len(container.scopes)


async def test_concurrent_listeners_share_and_so_do_their_dispatches(
    d: AsyncEventDispatcher, container: SimpleContainer
) -> None:
    inner = Ping()
    d.add_listener("inner", Hears)
    d.add_listener("x", AlsoHears)

    @d.listen("x", priority=1, concurrent=True)
    async def first(event: Ping) -> None:
        await d.adispatch("inner", inner)

    d.add_listener("x", Hears, priority=1, concurrent=True)
    outer = await d.adispatch("x", Ping())
    assert inner.heard[0] in outer.heard and len(container.scopes) == 1
    assert container.scopes[0].closed


async def test_concurrent_listeners_do_not_make_the_same_object_twice(
    d: AsyncEventDispatcher, container: SimpleContainer
) -> None:
    """One asks while the other's is being made."""
    made: list[Hears] = []

    async def slowly() -> Hears:
        made.append(Hears())
        await asyncio.sleep(0)
        return made[-1]

    container.factories[Hears] = slowly
    for _ in range(3):
        d.add_listener("x", Hears, concurrent=True)
    event = await d.adispatch("x", Ping())
    assert event.heard == made * 3 and len(made) == 1 == len(container.scopes)


async def test_dispatches_of_concurrent_listeners_do_not_make_the_same_object_twice(
    d: AsyncEventDispatcher, container: SimpleContainer
) -> None:
    """The scope is open already, and each dispatch runs its listeners without a wrapper."""
    made: list[Hears] = []

    async def slowly() -> Hears:
        made.append(Hears())
        await asyncio.sleep(0)
        return made[-1]

    container.factories[Hears] = slowly
    events = [Ping(), Ping()]
    d.add_listener("inner", Hears)
    d.add_listener("x", AlsoHears)
    for event in events:

        async def dispatch(_: Ping, event: Ping = event) -> None:
            await d.adispatch("inner", event)

        d.add_listener("x", dispatch, priority=1, concurrent=True)
    await d.adispatch("x", Ping())
    assert [event.heard for event in events] == [made, made] and len(made) == 1


async def test_cancelled_concurrent_listeners_leave_nothing_behind(
    d: AsyncEventDispatcher, container: SimpleContainer
) -> None:
    """Cancelled before they began: no coroutine that was never awaited."""
    for _ in range(2):
        d.add_listener("x", Hears, concurrent=True)

    @d.listen("x", priority=-1)
    async def cancel(event: Ping) -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().call_soon(task.cancel)

    task = asyncio.create_task(d.adispatch("x", event := Ping()))
    await asyncio.wait([task])
    assert task.cancelled() and event.heard == []


async def test_a_factory_may_dispatch_what_needs_the_scope(d: AsyncEventDispatcher, container: SimpleContainer) -> None:
    """It does not wait for itself."""

    async def dispatching() -> Hears:
        await d.adispatch("made", Ping())
        return Hears()

    container.factories[Hears] = dispatching
    d.add_listener("made", AlsoHears)
    d.add_listener("x", Hears)
    async with asyncio.timeout(5):
        await d.adispatch("x", Ping())
    assert container.asked == [Hears, AlsoHears] and len(container.scopes) == 1


async def test_what_is_dispatched_while_closing_has_a_scope_of_its_own(
    d: AsyncEventDispatcher, container: SimpleContainer
) -> None:
    d.add_listener("x", Hears)
    d.add_listener("closing", AlsoHears)

    async def dispatch() -> None:
        container.closing = None
        await d.adispatch("closing", Ping())

    container.closing = dispatch
    await d.adispatch("x", Ping())
    assert [list(scope.made) for scope in container.scopes] == [[Hears], [AlsoHears]]
    assert all(scope.closed for scope in container.scopes)


async def test_a_scope_that_cannot_be_opened_fails_the_listener(
    d: AsyncEventDispatcher, container: SimpleContainer
) -> None:
    """And the next dispatch tries again."""
    opens, container.scope = container.scope, _no_scope  # type: ignore[method-assign]
    d.add_listener("x", Hears)
    with pytest.raises(ConnectionError):
        await d.adispatch("x", Ping())
    container.scope = opens  # type: ignore[method-assign]
    assert len((await d.adispatch("x", Ping())).heard) == 1


@asynccontextmanager
async def _no_scope() -> AsyncGenerator[SimpleScope]:
    raise ConnectionError
    yield


async def test_no_error_reaches_the_scope_where_on_error_isolates(
    d: AsyncEventDispatcher, container: SimpleContainer
) -> None:
    async def fail() -> None:
        raise LookupError

    d.add_listener("x", Hears, on_error=lambda *_: None)
    await d.adispatch("x", Ping(fail))
    d.add_listener("y", Hears)
    with pytest.raises(LookupError) as caught:
        await d.adispatch("y", Ping(fail))
    assert [scope.error for scope in container.scopes] == [None, caught.value]


async def test_a_scope_that_raises_the_same_error_again_says_nothing_new(caplog: pytest.LogCaptureFixture) -> None:
    class Stubborn:
        def scope(self) -> Any:
            return self

        async def __aenter__(self) -> SimpleScope:
            return SimpleScope(SimpleContainer())

        async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
            if error is not None:
                raise error

    d = AsyncEventDispatcher(container=Stubborn())
    d.add_listener("x", Hears)
    error = LookupError()
    with pytest.raises(LookupError) as caught:
        await d.adispatch("x", Ping(partial(_raise, error)))
    assert caught.value is error and not caplog.records


def test_the_protocols_are_silbos_own() -> None:
    assert isinstance(SimpleContainer(), Container) and isinstance(RodiContainer.__new__(RodiContainer), Container)
    assert silbo.protocols.Scope.__module__ == "silbo.protocols"
