"""Listener classes, and the dispatcher, in a di container."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, Protocol

import di
import pytest
from di.dependent import Dependent
from di.executors import AsyncExecutor

from silbo import AsyncEventDispatcher, Event
from silbo.containers.di import DIContainer, register_dispatcher
from silbo.errors import Unresolvable
from silbo.protocols import Container
from tests.support.container_conformance import Api, Journal, Library, Session, Telling, Welcome


def bind(container: di.Container, cls: type, call: Callable[..., Any], scope: str = "request") -> None:
    container.bind(di.bind_by_type(Dependent(call, scope=scope), cls))


class Di:
    @asynccontextmanager
    async def adapter(self, journal: Journal, session: Callable[..., Any]) -> AsyncIterator[Container]:
        container = di.Container()
        bind(container, Journal, lambda: journal, "app")
        bind(container, Api, Api, "app")
        bind(container, Session, session)
        async with container.enter_scope("app") as state:
            yield DIContainer(container, scopes=("app", "request"), state=state)

    def incomplete(self) -> Container:
        return DIContainer(di.Container())

    async def register(
        self, dispatcher: AsyncEventDispatcher | None
    ) -> tuple[AsyncEventDispatcher, Callable[[type[Any]], Awaitable[Any]]]:
        container = di.Container()
        registered = (
            register_dispatcher(container) if dispatcher is None else register_dispatcher(container, dispatcher)
        )

        async def resolve(cls: type[Any]) -> Any:
            solved = container.solve(Dependent(cls, scope="any"), scopes=["any"])
            async with container.enter_scope("any") as state:
                return await solved.execute_async(AsyncExecutor(), state)

        return registered, resolve


class TestDi(Telling):
    @pytest.fixture
    def library(self) -> Library:
        return Di()


class Handler:
    def __init__(self, session: Session) -> None:
        self.session = session

    async def handle(self, event: Any) -> None:
        event.session = self.session


async def test_a_class_needs_no_registration() -> None:
    """di makes what it can, in one scope by default, as python-cqrs uses it."""
    d = AsyncEventDispatcher(container=DIContainer(di.Container()))
    d.add_listener("x", Handler)
    assert isinstance((await d.adispatch("x", Event())).session, Session)  # type: ignore[attr-defined]


async def test_a_bind_made_later_counts() -> None:
    """A test replaces a dependency of a program that runs already, for a while."""
    container = di.Container()
    d = AsyncEventDispatcher(container=DIContainer(container))
    d.add_listener("x", Handler)
    mine = Session()

    async def session() -> Any:
        return (await d.adispatch("x", Event())).session  # type: ignore[attr-defined]

    assert await session() is not mine
    with container.bind(di.bind_by_type(Dependent(lambda: mine, scope="request"), Session)):
        assert await session() is mine
    assert await session() is not mine


class Clock(Protocol):
    def now(self) -> float: ...


class NeedsClock:
    def __init__(self, clock: Clock) -> None: ...

    async def handle(self, event: Any) -> None: ...


class NeedsAnything:
    def __init__(self, anything) -> None: ...  # type: ignore[no-untyped-def]

    async def handle(self, event: Any) -> None: ...


@pytest.mark.parametrize(
    ("cls", "problem"),
    [(NeedsClock, "Clock is abstract, and bound to nothing$"), (NeedsAnything, ".*anything")],
)
async def test_what_di_would_fail_to_make_is_named(cls: type, problem: str) -> None:
    """A protocol as much as an abstract class, and what has no annotation."""
    d = AsyncEventDispatcher(container=DIContainer(di.Container()))
    d.add_listener("x", cls)
    with pytest.raises(Unresolvable, match=f"^DIContainer can't make {cls.__name__}: {problem}"):
        await d.adispatch("x")


async def test_a_generator_that_swallows_an_error_does_not_swallow_the_dispatchs() -> None:
    """The caller must not take a failure for success."""

    def session() -> Iterator[Session]:
        try:
            yield Session()
        except LookupError:
            pass

    container = di.Container()
    bind(container, Session, session)
    d = AsyncEventDispatcher(container=DIContainer(container))
    d.add_listener("x", Handler)

    @d.listen("x", priority=1)
    async def fail(event: Any) -> None:
        raise LookupError

    with pytest.raises(LookupError):
        await d.adispatch("x", Event())


class Service:
    def __init__(self, dispatcher: AsyncEventDispatcher) -> None:
        self.dispatcher = dispatcher


class Both:
    def __init__(self, service: Service, dispatcher: AsyncEventDispatcher) -> None:
        self.service, self.dispatcher = service, dispatcher

    async def handle(self, event: Any) -> None:
        event.same = self.service.dispatcher is self.dispatcher


async def test_the_dispatcher_is_there_in_every_scope() -> None:
    """A singleton of the application and a listener of one dispatch may both ask for it."""
    container = di.Container()
    bind(container, Service, Service, "app")
    async with container.enter_scope("app") as state:
        d = AsyncEventDispatcher(container=DIContainer(container, scopes=("app", "request"), state=state))
        register_dispatcher(container, d)
        d.add_listener("x", Both)
        assert (await d.adispatch("x", Event())).same  # type: ignore[attr-defined]


async def test_a_wrong_scope_is_an_error_with_dis_own_words() -> None:
    container = di.Container()
    bind(container, Session, Session, "nowhere")
    d = AsyncEventDispatcher(container=DIContainer(container))
    d.add_listener("x", Welcome)
    with pytest.raises(Unresolvable, match="nowhere") as caught:
        await d.adispatch("x")
    assert caught.value.__cause__ is not None
