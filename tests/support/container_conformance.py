"""The tests that every container adapter must pass, with the real library.

A library's own tests derive from :class:`Conformance` and give the fixture ``library``; where the library closes what was
made in a scope, from :class:`Closing` too; where it tells what it closes of an error, from :class:`Telling`.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import pytest
import whistle

import silbo
from silbo import AsyncEventDispatcher, Event
from silbo.errors import Unresolvable
from silbo.protocols import Container


class Session:
    """Scoped."""

    def __init__(self) -> None:
        self.owner: int | None = None
        self.closed = False


@dataclass
class Journal:
    """A singleton that the test gives."""

    opened: list[Session] = field(default_factory=list)
    closed: list[Session] = field(default_factory=list)
    told: list[BaseException] = field(default_factory=list)
    handled: list[tuple[str, Session, Api]] = field(default_factory=list)
    fail_closing: bool = False

    def open(self) -> Session:
        self.opened.append(Session())
        return self.opened[-1]

    def close(self, session: Session) -> None:
        session.closed = True
        self.closed.append(session)
        if self.fail_closing:
            raise OSError("commit failed")


class Api:
    """A singleton that the container makes, with a dependency of its own."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal


def sync_session(journal: Journal) -> Iterator[Session]:
    session = journal.open()
    try:
        error = yield session  # type: ignore[misc]  # dishka sends it
        journal.told += [error] if error else []
    except BaseException as error:  # di throws it
        journal.told.append(error)
        raise
    finally:
        journal.close(session)


async def async_session(journal: Journal) -> AsyncIterator[Session]:
    await asyncio.sleep(0)
    session = journal.open()
    try:
        error = yield session  # type: ignore[misc]
        journal.told += [error] if error else []
    except BaseException as error:
        journal.told.append(error)
        raise
    finally:
        await asyncio.sleep(0)
        journal.close(session)


class Ping(Event):
    def __init__(self, number: int = 0, then: Callable[[], Awaitable[object]] | None = None) -> None:
        self.number, self.then = number, then
        self.heard_by: object = None


class Welcome:
    def __init__(self, session: Session, api: Api) -> None:
        self.session, self.api = session, api

    async def handle(self, event: Ping) -> None:
        assert not self.session.closed
        assert self.session.owner in (None, event.number)
        self.session.owner = event.number
        self.api.journal.handled.append((type(self).__name__, self.session, self.api))
        if event.then is not None:
            await event.then()


class Audit(Welcome):
    pass


class Emitter:
    def __init__(self, dispatcher: whistle.IAsyncEventDispatcher) -> None:
        self.dispatcher = dispatcher


class Plugin:
    def __init__(self, dispatcher: silbo.AsyncEventDispatcher) -> None:
        self.dispatcher = dispatcher

    async def handle(self, event: Ping) -> None:
        event.heard_by = self.dispatcher


class Old:
    def __init__(self, dispatcher: whistle.AsyncEventDispatcher) -> None:
        self.dispatcher = dispatcher


class Missing(ABC):
    @abstractmethod
    def answer(self) -> int: ...


class Incomplete:
    def __init__(self, missing: Missing) -> None: ...

    async def handle(self, event: Ping) -> None: ...


class Explosive:
    def __init__(self, api: Api) -> None:
        raise TypeError("in the constructor")

    async def handle(self, event: Ping) -> None: ...


class HostDispatcher(AsyncEventDispatcher):
    pass


class Library(Protocol):
    """One library, filled with the classes above."""

    def adapter(self, journal: Journal, session: Callable[..., Any]) -> AbstractAsyncContextManager[Container]:
        """With Api once, Session for each scope; Welcome, Audit and Explosive as in the library's own examples."""

    def incomplete(self) -> Container:
        """With Incomplete, which misses something."""

    async def register(
        self, dispatcher: AsyncEventDispatcher | None
    ) -> tuple[AsyncEventDispatcher, Callable[[type[Any]], Awaitable[Any]]]:
        """A container with a dispatcher, and Emitter, Plugin and Old; and how a host resolves a type in it."""


class Conformance:
    """What every library can do."""

    @pytest.fixture
    def library(self) -> Library:
        raise NotImplementedError

    @pytest.fixture(params=["sync", "async"])
    def session(self, request: pytest.FixtureRequest) -> Callable[..., Any]:
        return sync_session if request.param == "sync" else async_session

    @pytest.fixture
    def journal(self) -> Journal:
        return Journal()

    @pytest.fixture
    async def dispatcher(
        self, library: Library, journal: Journal, session: Callable[..., Any]
    ) -> AsyncIterator[AsyncEventDispatcher]:
        async with library.adapter(journal, session) as container, AsyncEventDispatcher(container=container) as d:
            yield d

    async def test_a_class_is_resolved_with_its_dependencies(
        self, dispatcher: AsyncEventDispatcher, journal: Journal
    ) -> None:
        dispatcher.add_listener("ping", Welcome)
        await dispatcher.adispatch("ping", Ping())
        [(name, session, api)] = journal.handled
        assert (name, type(session), type(api), api.journal) == ("Welcome", Session, Api, journal)

    async def test_one_dispatch_shares_what_is_scoped_and_the_next_has_its_own(
        self, dispatcher: AsyncEventDispatcher, journal: Journal
    ) -> None:
        """One dispatch, one unit of work."""
        dispatcher.add_listener("ping", Welcome)
        dispatcher.add_listener("ping", Audit)
        for number in (1, 2):
            await dispatcher.adispatch("ping", Ping(number))
        first, beside, second, beside_second = (session for _, session, _ in journal.handled)
        assert first is beside and second is beside_second and first is not second

    async def test_the_whole_program_shares_a_singleton(
        self, dispatcher: AsyncEventDispatcher, journal: Journal
    ) -> None:
        dispatcher.add_listener("ping", Welcome)
        await asyncio.gather(*(dispatcher.adispatch("ping", Ping(number)) for number in range(3)))
        assert len({api for _, _, api in journal.handled}) == 1

    async def test_a_nested_dispatch_is_in_the_same_scope(
        self, dispatcher: AsyncEventDispatcher, journal: Journal
    ) -> None:
        """Also where a plain listener makes it, before a class was needed."""
        dispatcher.add_listener("inner", Audit)

        @dispatcher.listen("ping", priority=-1)
        async def first(event: Ping) -> None:
            await dispatcher.adispatch("inner", Ping())

        dispatcher.add_listener("ping", Welcome)
        await dispatcher.adispatch("ping", Ping(then=lambda: dispatcher.adispatch("inner", Ping())))
        assert [name for name, _, _ in journal.handled] == ["Audit", "Welcome", "Audit"]
        assert len({session for _, session, _ in journal.handled}) == 1

    async def test_a_spawned_dispatch_has_a_scope_of_its_own(
        self, dispatcher: AsyncEventDispatcher, journal: Journal
    ) -> None:
        """It may outlive the one that it was spawned from; so may any task."""
        dispatcher.add_listener("inner", Audit)
        dispatcher.add_listener("ping", Welcome)

        async def spawn_and_wait() -> None:
            await dispatcher.spawn("inner", Ping(2))
            await asyncio.create_task(dispatcher.adispatch("inner", Ping(3)))

        await dispatcher.adispatch("ping", Ping(1, spawn_and_wait))
        assert [session.owner for _, session, _ in journal.handled] == [1, 2, 3]

    async def test_concurrent_dispatches_do_not_mix_their_scopes(
        self, dispatcher: AsyncEventDispatcher, journal: Journal
    ) -> None:
        dispatcher.add_listener("ping", Welcome)
        dispatcher.add_listener("ping", Audit)
        all_there = asyncio.Barrier(5)
        await asyncio.gather(*(dispatcher.adispatch("ping", Ping(n, all_there.wait)) for n in range(5)))
        assert sorted(session.owner for _, session, _ in journal.handled if session.owner is not None) == [
            *(0, 0, 1, 1, 2, 2, 3, 3, 4, 4)
        ]
        assert len({session for _, session, _ in journal.handled}) == 5

    async def test_concurrent_listeners_share_the_scope_of_their_dispatch(
        self, dispatcher: AsyncEventDispatcher, journal: Journal
    ) -> None:
        """Also where both of them are the first to need it."""
        dispatcher.add_listener("inner", Audit)
        for cls in (Welcome, Audit):
            dispatcher.add_listener("ping", cls, concurrent=True)
        await dispatcher.adispatch("ping", Ping(then=lambda: dispatcher.adispatch("inner", Ping())))
        assert len(journal.handled) == 4 and len({session for _, session, _ in journal.handled}) == 1

    async def test_a_missing_dependency_is_named(self, library: Library) -> None:
        """With the class that was asked for, and the container."""
        container = library.incomplete()
        dispatcher = AsyncEventDispatcher(container=container)
        dispatcher.add_listener("ping", Incomplete)
        with pytest.raises(Unresolvable, match=r"(?i)Container can't make Incomplete: .*missing") as caught:
            await dispatcher.adispatch("ping", Ping())
        assert caught.value.cls is Incomplete and caught.value.container is container
        assert str(caught.value).startswith(type(container).__name__)

    async def test_what_a_constructor_raises_comes_out_as_it_is(self, dispatcher: AsyncEventDispatcher) -> None:
        """It is the host's own error, perhaps one to be tried again."""
        dispatcher.add_listener("ping", Explosive)
        with pytest.raises(TypeError, match="^in the constructor$"):
            await dispatcher.adispatch("ping", Ping())

    @pytest.mark.parametrize("own", [None, HostDispatcher()], ids=["made", "given"])
    async def test_everybody_gets_the_one_dispatcher(self, library: Library, own: AsyncEventDispatcher | None) -> None:
        """Whatever type they ask for."""
        dispatcher, resolve = await library.register(own)
        assert own is None or dispatcher is own
        asked: list[Any] = [silbo.AsyncEventDispatcher, whistle.IAsyncEventDispatcher, whistle.AsyncEventDispatcher]
        for cls in [*asked, *([] if own is None else [HostDispatcher])]:
            assert await resolve(cls) is await resolve(cls) is dispatcher
        for component in (Emitter, Plugin, Old):
            assert (await resolve(component)).dispatcher is dispatcher

    async def test_a_dispatcher_made_by_the_container_makes_its_listeners_with_it(self, library: Library) -> None:
        dispatcher, _ = await library.register(None)
        dispatcher.add_listener("ping", Plugin)
        event = await dispatcher.adispatch("ping", Ping())
        assert event.heard_by is dispatcher

    async def test_only_a_dispatcher_of_silbo_is_registered(self, library: Library) -> None:
        stock: Any = whistle.AsyncEventDispatcher()
        with pytest.raises(TypeError, match=r"an object of silbo\.AsyncEventDispatcher, not <whistle"):
            await library.register(stock)


class Closing(Conformance):
    """What is scoped is closed when its dispatch ends."""

    async def test_closed_at_the_end_of_the_outermost_dispatch(
        self, dispatcher: AsyncEventDispatcher, journal: Journal
    ) -> None:
        """Not before: a later listener needs it."""
        dispatcher.add_listener("inner", Audit)
        dispatcher.add_listener("ping", Welcome)
        dispatcher.add_listener("ping", Audit, priority=1)
        await dispatcher.adispatch("ping", Ping(then=lambda: dispatcher.adispatch("inner", Ping())))
        assert len(journal.handled) == 4  # each of which found it open
        assert journal.closed == journal.opened == [journal.handled[0][1]]

    async def test_opened_only_when_a_class_is_reached(
        self, dispatcher: AsyncEventDispatcher, journal: Journal
    ) -> None:
        @dispatcher.listen("ping", priority=-1)
        async def stop(event: Ping) -> None:
            event.stop_propagation()

        dispatcher.add_listener("ping", Welcome)
        await dispatcher.adispatch("ping", Ping())
        assert journal == Journal()

    async def test_closed_when_a_listener_fails(self, dispatcher: AsyncEventDispatcher, journal: Journal) -> None:
        dispatcher.add_listener("ping", Welcome)

        @dispatcher.listen("ping", priority=1)
        async def fail(event: Ping) -> None:
            raise LookupError("listener")

        with pytest.raises(LookupError, match="^listener$"):
            await dispatcher.adispatch("ping", Ping())
        assert len(journal.opened) == 1 and journal.closed == journal.opened

    async def test_closed_when_the_dispatch_is_cancelled(
        self, dispatcher: AsyncEventDispatcher, journal: Journal
    ) -> None:
        """And the cancellation goes on."""
        dispatcher.add_listener("ping", Welcome)
        inside = asyncio.Event()

        async def hang() -> None:
            inside.set()
            await asyncio.Event().wait()

        task = asyncio.create_task(dispatcher.adispatch("ping", Ping(then=hang)))
        await inside.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled() and len(journal.opened) == 1 and journal.closed == journal.opened

    async def test_each_of_many_dispatches_closes_its_own(
        self, dispatcher: AsyncEventDispatcher, journal: Journal
    ) -> None:
        """In the order they end, while others go on."""
        dispatcher.add_listener("ping", Welcome)
        gates = [asyncio.Event() for _ in range(3)]
        tasks = [asyncio.create_task(dispatcher.adispatch("ping", Ping(n, gates[n].wait))) for n in range(3)]
        for n in (1, 0, 2):
            gates[n].set()
            await tasks[n]
            assert journal.closed[-1].owner == n
        assert len(journal.closed) == len(journal.opened) == 3

    async def test_an_error_of_the_closing_is_the_dispatchs(
        self, dispatcher: AsyncEventDispatcher, journal: Journal
    ) -> None:
        """A commit that fails must not look like success."""
        journal.fail_closing = True
        dispatcher.add_listener("ping", Welcome)
        with pytest.raises(Exception) as caught:  # dishka puts them into a group
            await dispatcher.adispatch("ping", Ping())
        assert "commit failed" in _all(caught.value)

    async def test_an_error_of_the_closing_does_not_hide_the_one_before(
        self, dispatcher: AsyncEventDispatcher, journal: Journal, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It is logged."""
        journal.fail_closing = True
        dispatcher.add_listener("ping", Welcome)

        async def fail() -> None:
            raise LookupError("listener")

        with pytest.raises(LookupError, match="^listener$"):
            await dispatcher.adispatch("ping", Ping(then=fail))
        [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert record.exc_info is not None and "commit failed" in _all(record.exc_info[1])

    async def test_nor_does_it_hide_a_cancellation(
        self, dispatcher: AsyncEventDispatcher, journal: Journal, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Who cancelled it waits for that."""
        journal.fail_closing = True
        dispatcher.add_listener("ping", Welcome)

        async def cancel() -> None:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(0)

        task = asyncio.create_task(dispatcher.adispatch("ping", Ping(then=cancel)))
        await asyncio.wait([task])
        assert task.cancelled() and len(caplog.records) == 1


class Telling(Closing):
    """What is closed learns how the dispatch ended: whether to commit."""

    async def test_told_of_the_error(
        self, dispatcher: AsyncEventDispatcher, journal: Journal, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Which it may raise again."""
        dispatcher.add_listener("ping", Welcome)
        error = LookupError("listener")

        async def fail() -> None:
            raise error

        with pytest.raises(LookupError):
            await dispatcher.adispatch("ping", Ping(then=fail))
        await dispatcher.adispatch("ping", Ping())
        assert journal.told == [error] and not caplog.records

    async def test_told_of_what_was_collected(self, dispatcher: AsyncEventDispatcher, journal: Journal) -> None:
        """The dispatch fails with it, so the work is not to be committed."""
        dispatcher.add_listener("ping", Welcome, on_error="collect")

        async def fail() -> None:
            raise LookupError

        with pytest.raises(ExceptionGroup) as caught:
            await dispatcher.adispatch("ping", Ping(then=fail))
        assert journal.told == [caught.value]

    async def test_not_told_of_an_error_that_was_isolated(
        self, dispatcher: AsyncEventDispatcher, journal: Journal
    ) -> None:
        """The dispatch succeeds."""
        dispatcher.add_listener("ping", Welcome, on_error=lambda error, event, listener: None)

        async def fail() -> None:
            raise LookupError

        await dispatcher.adispatch("ping", Ping(then=fail))
        assert journal.told == [] and len(journal.closed) == 1

    async def test_told_of_a_cancellation(self, dispatcher: AsyncEventDispatcher, journal: Journal) -> None:
        dispatcher.add_listener("ping", Welcome)

        async def cancel() -> None:
            raise asyncio.CancelledError

        with pytest.raises(asyncio.CancelledError):
            await dispatcher.adispatch("ping", Ping(then=cancel))
        assert [type(error) for error in journal.told] == [asyncio.CancelledError]


def _all(error: BaseException | None) -> str:
    if isinstance(error, BaseExceptionGroup):
        return " ".join(_all(one) for one in error.exceptions)
    return str(error)
