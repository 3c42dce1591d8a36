"""An inbox in Redis: what a group has handled, so that a redelivery has no second effect."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from hashlib import blake2b
from typing import Final

from redis.asyncio import Redis

from silbo._checks import check_address, check_count, check_seconds
from silbo._closing import AsyncCloseable
from silbo._reports import RateLimitedLog
from silbo._retry import Backoff
from silbo.brokers.redis.calls import Calls, ScriptCall
from silbo.brokers.redis.connection import Refused, check_client
from silbo.brokers.redis.scripts import REMEMBER
from silbo.errors import BrokerUnavailable

__all__ = ["RedisInbox"]

logger = logging.getLogger(__name__)

DIGEST: Final = 16
"""Bytes that stand for a publication: always as many, whatever a message calls it; two never meet by chance."""
AGAIN: Final = Backoff(initial=0.05, cap=0.5)


class RedisInbox(AsyncCloseable):
    """Remembers what each group has handled, in the sorted set ``{prefix}:inbox:{group}``, for one event loop at a time.

    It makes a second effect rare, not impossible: a process that dies, or a Redis that is lost, between the listeners'
    effect and its being remembered leaves the one without the other. Only an inbox in the transaction of the effect
    itself closes that gap (:class:`silbo.stores.sqlalchemy.SQLAlchemyInbox`).

    A sorted set is bounded both ways: by time through its scores, by number through its ranks. It takes up to 130 bytes
    for each publication, so 130 MB for each group that has reached the default limit. Leaving closes the connection::

        async with RedisInbox(client) as inbox, Consumer(dispatcher, group, inbox=inbox) as consumer:
            await consumer.run()

    Args:
        client: The program's own. silbo opens a connection of its own from its settings and leaves it as it is.
        prefix: The first part of every key.
        keep: Seconds that a publication is remembered; longer than a redelivery can take, or a replay reaches back.
        limit: Most publications remembered for each group; the oldest are forgotten first.
        timeout: Seconds in which Redis answers.
    """

    def __init__(
        self,
        client: Redis,
        *,
        prefix: str = "silbo",
        keep: float = 86400.0,
        limit: int = 1_000_000,
        timeout: float = 5.0,
    ) -> None:
        self._calls = Calls(check_client(client), check_seconds("timeout", timeout))
        self._prefix = check_address(prefix, "a prefix")
        keep, limit = check_seconds("keep", keep), check_count("limit", limit)
        self._bounds = b"%d" % max(1, int(keep * 1000)), b"%d" % limit
        self._log = RateLimitedLog(logger)

    @asynccontextmanager
    async def handling(self, group: str, publication: str) -> AsyncGenerator[bool]:
        """Around the listeners of one delivery: True where the publication is new, False where it was handled.

        Leaving without an error remembers it. Where that fails, it is logged and no error: the effect is there, and to
        try the delivery again would double it, while to acknowledge it is likely to end it well.

        Raises:
            BrokerUnavailable: on entering: Redis can't be asked; try again later.
        """
        key = f"{self._prefix}:inbox:{check_address(group, 'a group')}".encode()
        name = blake2b(publication.encode(), digest_size=DIGEST).digest()
        if await self._calls.ask(b"ZSCORE", key, name) is not None:
            yield False
            return
        yield True
        try:
            await self._remember(ScriptCall.of([key], name, *self._bounds))
        except BrokerUnavailable as error:
            self._log.write("handled in group %s, but not remembered in the inbox", error, group, group=group)

    async def aclose(self) -> None:
        """Close the connection. May be called twice."""
        await self._calls.aclose()

    async def _remember(self, call: ScriptCall) -> None:
        """Once more after a lost answer, until the time is over: remembered twice is remembered."""
        loop = asyncio.get_running_loop()
        until = self._calls.deadline()
        attempt = 0
        while True:
            try:
                await self._calls.call(REMEMBER, call, deadline=until)
            except BrokerUnavailable as error:
                attempt += 1
                delay = AGAIN.delay(attempt) or 0
                if isinstance(error.__cause__, Refused) or loop.time() + delay >= until:
                    raise
                await asyncio.sleep(delay)
            else:
                return
