"""The current session of a task: for the bridge and for listeners, which get no session as an argument."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import TypeVar

from sqlalchemy.ext.asyncio import AsyncSession

__all__ = ["current_session", "find_session", "in_session", "lock_session"]

S = TypeVar("S", bound=AsyncSession)


class _Block:
    """One :func:`in_session` block.

    Attributes:
        session: Its session.
        is_running: False after its end. A task that outlives the block still has the block in its context.
        in_use: Held by the task that uses the session at the moment.
    """

    def __init__(self, session: AsyncSession) -> None:
        self.session = session
        self.is_running = True
        self.in_use = asyncio.Lock()


_current: ContextVar[_Block | None] = ContextVar("silbo_session", default=None)


@contextmanager
def in_session(session: S) -> Generator[S]:
    """Let an outbox on the session's database store every publish in the session's transaction.

    Example::

        async with sessions.begin() as session:
            with in_session(session):
                session.add(order)
                await dispatcher.adispatch(ORDER_PAID, OrderPaid(order.id))

    The messages are stored when the session commits, together with its other changes, and not at all if it rolls back. The
    block commits nothing itself. Outside of any such block a publish commits a transaction of its own.

    The block holds for the functions that it calls and awaits, and for the tasks that it starts, until it ends. A session
    can do one thing at a time: let no two tasks use it at once, and use no ``Bridge(wait=False)`` with it.
    """
    outer = _current.get()
    block = _Block(session)
    _current.set(block)
    try:
        yield session
    finally:
        block.is_running = False
        _current.set(outer)  # not by its token: a block may end in another context than it began in


def find_session() -> AsyncSession | None:
    """Return the session of the innermost block that still runs; None if there is none."""
    block = _find_block()
    return None if block is None else block.session


@asynccontextmanager
async def lock_session() -> AsyncGenerator[AsyncSession | None]:
    """Give the session of the innermost block to one task at a time; None if there is no block.

    Events that are handled side by side may be published at the same time.
    """
    block = _find_block()
    if block is None:
        yield None
    else:
        async with block.in_use:
            yield block.session


def _find_block() -> _Block | None:
    block = _current.get()
    return block if block is not None and block.is_running else None


def current_session() -> AsyncSession:
    """Return the session of the :func:`in_session` block around the caller; in a listener, of its consumer's inbox.

    Raises:
        LookupError: there is neither.
    """
    session = find_session()
    if session is None:
        raise LookupError(
            "no session here: dispatch within in_session(session), or give the consumer inbox=SQLAlchemyInbox(...)"
        )
    return session
