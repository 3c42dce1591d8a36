"""Middlewares, of both styles."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from silbo import Bridge, LoggingMiddleware, Middleware
from tests.support.mediator import Do, Leaves, Local, World, fail

Log = list[str]


def around(log: Log, name: str) -> Callable[..., Any]:
    async def middleware(request: Do, handle: Any) -> Any:
        log.append(f"{name} begins")
        response = await handle(request)
        log.append(f"{name} ends with {response}")
        return f"{name}({response})"

    return middleware


class Pair:
    """The older style."""

    def __init__(self, log: Log, name: str) -> None:
        self.log, self.name = log, name

    async def process_request(self, request: Do) -> None:
        self.log.append(f"{self.name} before {type(request).__name__}")

    async def process_response(self, response: object) -> Any:
        self.log.append(f"{self.name} after {response}")
        return "ignored"


class DerivedPair(Pair, Middleware):
    pass


async def test_the_first_is_the_outermost() -> None:
    log: Log = []
    world = World(middlewares=[around(log, "a"), Pair(log, "p"), around(log, "b"), DerivedPair(log, "q")])

    async def handles() -> None:
        log.append("handler")

    assert await world.send(then=handles) == "a(b(done))"
    assert log == [
        "a begins",
        "p before Do",
        "b begins",
        "q before Do",
        "handler",
        "q after done",
        "b ends with done",
        "p after b(done)",
        "a ends with b(done)",
    ]


async def test_the_events_are_inside() -> None:
    """So that a transaction that a middleware commits has their effects in it."""
    seen: list[object] = []
    world = World()

    async def look(request: Do, handle: Any) -> Any:
        response = await handle(request)
        seen.extend(world.heard)
        return response

    world = World(middlewares=[look])
    await world.send(Local(1, [Local(2)]))
    assert seen == [1, 2]


async def test_it_may_change_the_request_and_answer_in_the_handlers_place() -> None:
    async def more(request: Do, handle: Any) -> Any:
        return await handle(replace(request, events=[*request.events, Local("more")]))

    async def cached(request: Do, handle: Any) -> Any:
        return "cached" if request.events else await handle(request)

    world = World(middlewares=[more])
    await world.send(Local(1))
    assert world.heard == [1, "more"]
    world = World(middlewares=[cached])
    assert await world.send(Local(1)) == "cached" and world.container.scopes == [] and world.heard == []
    assert await world.send() == "done"


async def test_it_may_try_again() -> None:
    """The events that the first try collected are gone, whether the handler failed or one of its events."""

    async def twice(request: Do, handle: Any) -> Any:
        try:
            return await handle(request)
        except LookupError:
            return await handle(request)

    world = World(middlewares=[twice])
    world.dispatcher.add_subscriber(Bridge(world.broker))
    tries: list[int] = []

    async def once_failing() -> None:
        tries.append(1)
        if len(tries) == 1:
            raise LookupError

    await world.send(Leaves("a"), Local(1, then=once_failing), Local(2))
    assert world.heard == [1, 1, 2] and world.broker.got == ["a"]


async def test_it_may_run_the_handler_in_another_task() -> None:
    """As ``asyncio.wait_for`` does on Python 3.11: it is the same command."""

    async def limit(request: Do, handle: Any) -> Any:
        response = await asyncio.create_task(handle(request))
        assert world.broker.got == []
        return response

    class Opens:
        async def __call__(self, request: Do, handle: Any) -> Any:
            return await handle(request)

    world = World(middlewares=[Opens, limit])
    world.dispatcher.add_subscriber(Bridge(world.broker))
    await world.send(Leaves(1), Local(2))
    assert world.broker.got == [1] and len(world.container.scopes) == 1


async def test_one_that_calls_the_handler_when_all_is_over_does_not_get_the_closed_scope() -> None:
    """It is a unit of work of its own then."""
    over = asyncio.Event()
    tasks: list[asyncio.Task[Any]] = []

    async def later(request: Do, handle: Any) -> Any:
        await over.wait()
        return await handle(request)

    async def twice(request: Do, handle: Any) -> Any:
        tasks.append(asyncio.create_task(later(request, handle)))
        return await handle(request)

    world = World(middlewares=[twice])
    await world.send(Local(1))
    over.set()
    assert await tasks[0] == "done"
    assert world.heard == [1, 1] and len(world.container.scopes) == 2 and world.container.scopes[1].closed


async def test_a_class_is_made_by_the_container_in_the_scope_of_the_command() -> None:
    """So it may share what is scoped, as a session, with the handler."""
    made: list[object] = []

    class Transaction:
        async def __call__(self, request: Do, handle: Any) -> Any:
            made.append(self)
            return await handle(request)

    class Before:
        async def process_request(self, request: Do) -> None:
            made.append(self)

    world = World(middlewares=[Transaction, Before])
    for _ in range(2):
        await world.send()
    assert [type(one) for one in made] == [Transaction, Before] * 2 and made[0] is not made[2]
    assert made[0] is world.container.scopes[0].made[Transaction]


@pytest.mark.parametrize("hook", ["process_request", "process_response"])
@pytest.mark.parametrize("base", [object, Middleware])
@pytest.mark.parametrize("as_class", [False, True])
def test_a_hook_without_self_is_refused_with_the_line_to_write(base: type, hook: str, as_class: bool) -> None:
    """As on Diator's page, where it fails at the first request."""

    async def without_self(request: object) -> None: ...

    cls = type("SomeMiddleware", (base,), {hook: without_self})
    what = hook.removeprefix("process_")
    text = rf"^SomeMiddleware\.{hook} can't be called with the {what} alone: write 'async def {hook}\(self, {what}\)'$"
    with pytest.raises(TypeError, match=text):
        World(middlewares=[cls if as_class else cls()])


async def test_static_and_class_methods_will_do() -> None:
    log: Log = []

    class Static:
        @staticmethod
        async def process_request(request: Do) -> None:
            log.append("static")

        @classmethod
        async def process_response(cls, response: object) -> None:
            log.append("class")

    await World(middlewares=[Static()]).send()
    assert log == ["static", "class"]


async def test_nothing_is_processed_after_a_failure() -> None:
    log: Log = []
    with pytest.raises(LookupError):
        await World(middlewares=[Pair(log, "p")]).send(then=fail)
    assert log == ["p before Do"]


async def test_one_that_does_nothing() -> None:
    assert await World(middlewares=[Middleware()]).send() == "done"


class SyncPair:
    def process_request(self, request: Do) -> None: ...


class SyncAround:
    def __call__(self, request: Do, handle: Any) -> Any: ...


@pytest.mark.parametrize("wrong", [object(), SyncPair(), SyncAround(), SyncPair, print, "logging", None])
def test_what_cannot_be_called_is_refused_when_the_mediator_is_made(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"^a middleware is an async callable \(request, handle\), or"):
        World(middlewares=[wrong])


async def test_one_that_does_not_await_the_handler_is_an_error() -> None:
    """The handler has not run, and the caller would get a coroutine for an answer."""

    async def forgets(request: Do, handle: Any) -> Any:
        return handle(request)

    world = World(middlewares=[Middleware(), forgets, Middleware()])
    with pytest.raises(
        TypeError, match=r"forgets.* returned a coroutine that nobody awaited: write 'return await handle\("
    ):
        await world.send(Local(1))
    assert world.heard == []


async def test_logging_tells_what_and_how_long_but_not_what_is_in_it(caplog: pytest.LogCaptureFixture) -> None:
    """A failure is logged as a warning; a cancellation is no failure."""
    caplog.set_level(logging.DEBUG)
    world = World(middlewares=[LoggingMiddleware()])
    await world.send(Local("secret"))
    with pytest.raises(LookupError):
        await world.send(then=fail)
    begun = asyncio.Event()

    async def hang() -> None:
        begun.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(world.send(then=hang))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    begins = ("DEBUG", "request begins: Do")
    lines = [(record.levelname, re.sub(r" \d+\.\d ms", " ... ms", record.getMessage())) for record in caplog.records]
    assert lines == [
        begins,
        ("DEBUG", "request done: Do in ... ms"),
        begins,
        ("WARNING", "request failed: Do in ... ms: LookupError"),
        begins,
        ("DEBUG", "request ended: Do in ... ms: CancelledError"),
    ]
    done = caplog.records[1]
    assert f" in {vars(done)['seconds'] * 1000:.1f} ms" in done.getMessage()
    assert "secret" not in caplog.text and not any(record.exc_info for record in caplog.records)


async def test_logging_to_a_logger_and_level_of_ones_own(caplog: pytest.LogCaptureFixture) -> None:
    """No failure below a warning, and none below the others."""
    for level, failed in ((logging.INFO, "WARNING"), (logging.ERROR, "ERROR")):
        caplog.clear()
        caplog.set_level(logging.INFO)
        world = World(middlewares=[LoggingMiddleware(logging.getLogger("mine"), level=level)])
        await world.send()
        with pytest.raises(LookupError):
            await world.send(then=fail)
        name = logging.getLevelName(level)
        assert [record.levelname for record in caplog.records] == [name, name, name, failed]
        assert {record.name for record in caplog.records} == {"mine"}
