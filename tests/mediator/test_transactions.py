"""An outbox in the command's transaction: what of it is undone, by whom; as the page on the mediator has it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from silbo import Bridge, Outbox
from silbo.stores.sqlalchemy import SQLAlchemyStore, current_session, in_session
from tests.support.mediator import Leaves, Local, World


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    """With SQLAlchemy's recipe, for its savepoints."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'host.db'}")

    @event.listens_for(engine.sync_engine, "connect")
    def on_connect(connection: Any, _: object) -> None:
        connection.isolation_level = None

    @event.listens_for(engine.sync_engine, "begin")
    def on_begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    await SQLAlchemyStore(engine).create()
    yield engine
    await engine.dispose()


class Transaction:
    def __init__(self, engine: AsyncEngine) -> None:
        self._sessions = async_sessionmaker(engine, expire_on_commit=False)

    async def __call__(self, request: Any, handle: Callable[[Any], Awaitable[Any]]) -> Any:
        async with self._sessions.begin() as session:
            with in_session(session):
                return await handle(request)


class Nested(Transaction):
    """With a savepoint around each command within a command."""

    async def __call__(self, request: Any, handle: Callable[[Any], Awaitable[Any]]) -> Any:
        session = session_here()
        if session is None:
            return await super().__call__(request, handle)
        async with session.begin_nested():
            return await handle(request)


def session_here() -> AsyncSession | None:
    try:
        return current_session()
    except LookupError:
        return None


async def retry(request: Any, handle: Callable[[Any], Awaitable[Any]]) -> Any:
    try:
        return await handle(request)
    except LookupError:
        return await handle(request)


@pytest.mark.parametrize(("outside", "sent"), [(True, [1]), (False, [1, 1])])
async def test_a_retry_goes_outside_of_the_transaction(engine: AsyncEngine, outside: bool, sent: list[int]) -> None:
    """Inside, what the first try stored is committed with the second."""
    transaction = Transaction(engine)
    world = World(middlewares=[retry, transaction] if outside else [transaction, retry])
    tries = []

    async def fail_once() -> None:
        tries.append(1)
        if len(tries) == 1:
            raise LookupError

    async with outbox_of(world, engine):
        await world.send(Leaves(1), Local("check", then=fail_once))
    assert world.broker.got == sent and len(tries) == 2


async def test_a_command_in_a_savepoint_that_fails_and_is_caught_sends_nothing(engine: AsyncEngine) -> None:
    """The messages that the outer transaction has stored, before and after, are sent."""
    world = World(middlewares=[Nested(engine)])

    async def fail() -> None:
        raise LookupError

    async def within() -> None:
        await world.also(Leaves("before"))
        with pytest.raises(LookupError):
            await world.also(Leaves("lost"), Local("check", then=fail))
        await world.also(Leaves("after"))

    async with outbox_of(world, engine):
        await world.send(Leaves("outer"), then=within)
    assert world.broker.got == ["before", "after", "outer"]


def outbox_of(world: World, engine: AsyncEngine) -> Outbox:
    """On the world's dispatcher; what is in it when it is left has been sent."""
    outbox = Outbox(SQLAlchemyStore(engine), world.broker)
    world.dispatcher.add_subscriber(Bridge(outbox))
    return outbox
