"""A unit of work that is over is gone: a task that it began, which begins another, and so on, keeps nothing of it."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any, TypeAlias

import pytest
import rodi

from silbo import AsyncEventDispatcher, Event, EventMap, Mediator, Request, RequestMap
from silbo.containers.rodi import RodiContainer, register_dispatcher
from silbo.dispatch import tasks as background
from silbo.work import unit_of_work as unit

LINKS = 200
CONTEXT: list[ContextVar[Any]] = [unit._units, background._lineage]


class Tick(Request[None]): ...


class Session:
    """Scoped."""


class Chain:
    """``begin`` has to begin the next link. ``deepest``: the most that a link found in its context; ``alive``: what the last one found of all."""

    def __init__(self) -> None:
        self.links, self.deepest, self.over = 0, 0, asyncio.Event()
        self.scoped: list[weakref.ref[object]] = []
        self.alive = 0
        self.begin: Callable[[], object] = lambda: None

    def link(self, handler: object, session: Session) -> None:
        self.scoped += [weakref.ref(handler), weakref.ref(session)]
        self.deepest = max(self.deepest, sum(len(one.get()) for one in CONTEXT))
        self.links += 1
        if self.links == LINKS:
            gc.collect()
            self.alive = sum(ref() is not None for ref in self.scoped)
            self.over.set()
        else:
            self.begin()


class Handler:
    def __init__(self, chain: Chain, session: Session) -> None:
        self._chain, self._session = chain, session

    @property
    def events(self) -> list[Event]:
        return []

    async def handle(self, _: Any) -> None:
        self._chain.link(self, self._session)


Start: TypeAlias = Callable[[rodi.Container, Chain], Awaitable[object]]


async def with_commands(container: rodi.Container, chain: Chain) -> None:
    requests, tasks = RequestMap(), set[asyncio.Task[None]]()
    requests.bind(Tick, Handler)
    dispatcher = AsyncEventDispatcher(container=RodiContainer(container))
    mediator = Mediator(request_map=requests, dispatcher=dispatcher, event_map=EventMap())

    def begin() -> None:
        task = asyncio.create_task(mediator.send(Tick()))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    chain.begin = begin
    await mediator.send(Tick())


async def with_dispatches(container: rodi.Container, chain: Chain) -> None:
    dispatcher = register_dispatcher(container)
    dispatcher.add_listener("tick", Handler)
    chain.begin = lambda: dispatcher.spawn("tick")
    await dispatcher.adispatch("tick")


@pytest.mark.parametrize("start", [with_commands, with_dispatches])
async def test_a_chain_of_tasks_keeps_nothing_of_the_links_that_are_over(start: Start) -> None:
    chain, container = Chain(), rodi.Container()
    container.add_instance(chain)
    container.add_scoped(Session)
    container.register(Handler)
    await start(container, chain)
    async with asyncio.timeout(30):
        await chain.over.wait()
    assert chain.links == LINKS and chain.deepest <= 8
    assert chain.alive <= 8  # handler and session of the last links, which are just ending
