"""The session that a task works in, for those who are called without it: the bridge, listeners."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import TypeVar

from sqlalchemy.ext.asyncio import AsyncSession

__all__ = ["current_session", "in_session", "session_in_turn", "session_or_none"]

S = TypeVar("S", bound=AsyncSession)


class _Within:
    """A session, whether its block still runs (a task that outlives it has a copy of the variable), and whose turn it is."""

    def __init__(self, session: AsyncSession) -> None:
        self.session, self.running = session, True
        self.turn = asyncio.Lock()


_within: ContextVar[_Within | None] = ContextVar("silbo_session", default=None)


@contextmanager
def in_session(session: S) -> Generator[S]:
    """Let an outbox on the session's database store in the session's transaction, whoever publishes.

    As in::

        async with sessions.begin() as session:
            with in_session(session):
                session.add(order)
                await dispatcher.adispatch(ORDER_PAID, OrderPaid(order.id))

    So what is dispatched is stored when the session commits, together with everything else, and not at all when it rolls
    back. The block commits nothing itself. Outside of any such block a publish commits a transaction of its own.

    It holds for what the block calls and awaits, and for the tasks that it starts, until it ends. A session can do one
    thing at a time: let no task use it beside another, nor a ``Bridge(wait=False)``.
    """
    outer, within = _within.get(), _Within(session)
    _within.set(within)
    try:
        yield session
    finally:
        within.running = False
        _within.set(outer)  # not by its token, for a block may end in another context than it began in


def session_or_none() -> AsyncSession | None:
    """The session of the innermost block that runs."""
    within = _running()
    return None if within is None else within.session


@asynccontextmanager
async def session_in_turn() -> AsyncGenerator[AsyncSession | None]:
    """The same, for one at a time: events that are handled side by side may leave at the same time."""
    within = _running()
    if within is None:
        yield None
    else:
        async with within.turn:
            yield within.session


def _running() -> _Within | None:
    within = _within.get()
    return within if within is not None and within.running else None


def current_session() -> AsyncSession:
    """The session of the :func:`in_session` block around the caller; in a listener, the one of its consumer's inbox.

    Raises:
        LookupError: there is none.
    """
    session = session_or_none()
    if session is None:
        raise LookupError(
            "no session here: dispatch within in_session(session), or give the consumer inbox=SQLAlchemyInbox(...)"
        )
    return session
