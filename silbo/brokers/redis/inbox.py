"""An inbox in Redis: the publications that a group has handled, so that a redelivery has no second effect."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from hashlib import blake2b
from typing import Final

from silbo._checks import check_address, check_count, check_seconds
from silbo._closing import AsyncCloseable
from silbo._reports import RateLimitedLog
from silbo._retry import Backoff
from silbo.brokers.redis.calls import CallConnection, ScriptCall
from silbo.brokers.redis.connection import Client, Refused, check_client
from silbo.brokers.redis.leases import is_fenced
from silbo.brokers.redis.scripts import HANDLED, REMEMBER, Script
from silbo.errors import BrokerUnavailable, ShardLost
from silbo.message import LedPublication

__all__ = ["RedisInbox"]

logger = logging.getLogger(__name__)

DIGEST: Final = 16
"""A publication is remembered by a digest of 16 bytes, however long its name is; two never meet by chance."""
RETRY_DELAYS: Final = Backoff(initial=0.05, cap=0.5)
"""The delays between two attempts to remember publications."""


class RedisInbox(AsyncCloseable):
    """Remembers the publications that each group has handled, in the sorted set ``{prefix}:inbox:{group}``.

    It makes a second effect rare, not impossible. If the process dies or Redis is lost after the listeners' effect and
    before it is remembered, a redelivery has the effect again. Only an inbox in the transaction of the effect itself
    closes that gap (:class:`silbo.stores.sqlalchemy.SQLAlchemyInbox`).

    Of a shard it remembers the newest epoch that it has seen, and answers no process that led the shard before.

    A sorted set is bounded both ways: by time through its scores, by number through its ranks. It takes up to 130 bytes
    for each publication, so 130 MB for each group that has reached the default limit. For one event loop at a time;
    leaving closes the connection::

        async with RedisInbox(client) as inbox, Consumer(dispatcher, group, inbox=inbox) as consumer:
            await consumer.run()

    Args:
        client: The program's client. silbo opens its own connection with the client's settings, and leaves the client as it is.
        prefix: The first part of every key.
        keep: Seconds that a publication is remembered. Keep it above the time in which a redelivery or a replay can come.
        limit: The most publications remembered for each group; the oldest are forgotten first.
        timeout: Seconds in which Redis answers.
    """

    checks_epochs: Final = True

    def __init__(
        self,
        client: Client,
        *,
        prefix: str = "silbo",
        keep: float = 86400.0,
        limit: int = 1_000_000,
        timeout: float = 5.0,
    ) -> None:
        self._connection = CallConnection(check_client(client), timeout, owner="RedisInbox")
        self._prefix = check_address(prefix, "a prefix")
        keep, limit = check_seconds("keep", keep), check_count("limit", limit)
        self._bounds = b"%d" % max(1, int(keep * 1000)), b"%d" % limit
        self._log = RateLimitedLog(logger)

    @asynccontextmanager
    async def handling(self, group: str, publication: str) -> AsyncGenerator[bool]:
        """Enclose the listeners of one delivery; gives True if the publication is new, False if the group has handled it.

        Leaving without an error remembers the publication: see :meth:`remember`.

        Raises:
            AddressInvalid: the group is not a valid name.
            BrokerUnavailable: on entering: Redis can't be asked; safe to repeat.
        """
        if await self.find_handled(group, [publication]):
            yield False
            return
        yield True
        await self.remember(group, [publication])

    async def find_handled(self, group: str, publications: Sequence[str]) -> list[str]:
        """Return those of the publications that the group has handled.

        Raises:
            AddressInvalid: the group is not a valid name.
            ShardLost: one of them came from a shard that another process leads by now.
            BrokerUnavailable: Redis can't be asked; safe to repeat.
        """
        call = _make_call(HANDLED, self._key(group), (), publications)
        try:
            positions: list[int] = await self._connection.run(call)
        except BrokerUnavailable as error:
            if is_fenced(error) and isinstance(lost := publications[0], LedPublication):
                raise ShardLost(lost.address, lost.epoch) from error
            raise
        return [publications[position - 1] for position in positions]

    async def remember(self, group: str, publications: Sequence[str]) -> None:
        """Remember publications that the group has handled.

        If that fails, it is logged and not raised: the effects are there, to try the deliveries again would double them, and
        to acknowledge them most likely ends them well. Those of a shard that another process leads by now are not remembered.

        Raises:
            AddressInvalid: the group is not a valid name.
        """
        call = _make_call(REMEMBER, self._key(group), self._bounds, publications)
        try:
            await self._remember(call)
        except BrokerUnavailable as error:
            by_lead: dict[object, list[str]] = {}
            for publication in publications:
                by_lead.setdefault(_find_lead(publication), []).append(publication)
            if is_fenced(error) and len(by_lead) > 1:
                for own in by_lead.values():
                    await self.remember(group, own)
                return
            self._log.write("handled in group %s, but not remembered in the inbox", error, group, group=group)

    async def aclose(self) -> None:
        """Close the connection. May be called twice."""
        await self._connection.aclose()

    def _key(self, group: str) -> bytes:
        return f"{self._prefix}:inbox:{check_address(group, 'a group')}".encode()

    async def _remember(self, call: ScriptCall) -> None:
        """Run the call, and again after a lost answer until its deadline: to remember twice does no harm."""
        loop = asyncio.get_running_loop()
        deadline = self._connection.deadline()
        attempt = 0
        while True:
            try:
                await self._connection.run(call, deadline=deadline)
            except BrokerUnavailable as error:
                attempt += 1
                delay = RETRY_DELAYS.delay(attempt) or 0
                if isinstance(error.__cause__, Refused) or loop.time() + delay >= deadline:
                    raise
                await asyncio.sleep(delay)
            else:
                return


def _find_lead(publication: str) -> tuple[str, int] | None:
    return (publication.address, publication.epoch) if isinstance(publication, LedPublication) else None


def _make_call(script: Script, key: bytes, first: Sequence[bytes], publications: Sequence[str]) -> ScriptCall:
    """Return a call about publications, which checks the epochs of the shards that they came from, if from any."""
    words = [*first, *map(_digest, publications)]
    leads = {lead for lead in map(_find_lead, publications) if lead is not None}
    if not leads:
        return ScriptCall.of(script, [key], *words)
    for address, epoch in leads:
        words += [address.encode(), b"%d" % epoch]
    return ScriptCall.of(script.led, [key], *words, b"%d" % len(leads))


def _digest(publication: str) -> bytes:
    return blake2b(publication.encode(), digest_size=DIGEST).digest()
