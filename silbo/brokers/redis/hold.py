"""What a consumer was given and has not acknowledged, and what becomes of it."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Final, TypeAlias

from silbo.brokers.redis.connection import Connection
from silbo.brokers.redis.group_scripts import ACK, BURY, COUNT, KEEP, call
from silbo.message import Delivery

__all__ = ["Hold", "attempts_key"]

KEPT_AT_ONCE: Final = 100
"""Deliveries that one call keeps: Redis does nothing else meanwhile."""
ATTEMPTS_FOR: Final = 7 * 24 * 3600 * 1000
"""Milliseconds after the last count in which a group's attempts are forgotten."""
DEAD_FOR: Final = 30 * 24 * 3600 * 1000
"""Milliseconds that dead letters are kept."""

_Place: TypeAlias = tuple[str, str]
"""Address and id."""


def attempts_key(key: bytes, group: bytes) -> bytes:
    """Of the hash that counts the attempts of a stream's entries, in one group."""
    return b"%b:attempts:%b" % (key, group)


class Hold:
    """The deliveries that one consumer has handed out, until they are done, dead or another's.

    Args:
        claim_after: Seconds after which another consumer may take over what was not kept.
    """

    def __init__(self, group: bytes, consumer: bytes, app: str, *, claim_after: float) -> None:
        self._group, self._consumer, self._app, self._claim_after = group, consumer, app.encode(), claim_after
        self._since: dict[_Place, float] = {}  # when it surely was this consumer's, by the loop's clock
        self._counted: dict[_Place, int] = {}  # what was known when a count began that is not answered

    def __contains__(self, place: _Place) -> bool:
        return place in self._since

    def take(self, delivery: Delivery, asked: float) -> None:
        """Note that it was given, in the answer to what was asked at this time."""
        self._since[_place(delivery)] = asked

    def forget(self, deliveries: Iterable[Delivery]) -> None:
        """They are this consumer's business no more."""
        for delivery in deliveries:
            self._since.pop(_place(delivery), None)
            self._counted.pop(_place(delivery), None)

    async def ack(self, connection: Connection, deliveries: Sequence[Delivery]) -> None:
        """They are done; what was counted of them goes in the same step."""
        for key, ids in _by_key(map(_place, deliveries)).items():
            await call(connection, ACK, [key, attempts_key(key, self._group)], self._group, *ids)
        self.forget(deliveries)

    async def keep(self, connection: Connection, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """They are in work; answers with those that are another's by now."""
        now = asyncio.get_running_loop().time()
        since = now - self._claim_after
        # Nobody can have claimed what was surely ours a moment ago: where nobody has it, its group was deleted.
        sure = [place for place in map(_place, deliveries) if self._since.get(place, since) > since]
        others = [place for place in map(_place, deliveries) if self._since.get(place, since) <= since]
        lost = await self._keep(connection, sure, b"1") | await self._keep(connection, others, b"")
        self._since.update(dict.fromkeys(map(_place, deliveries), now))
        taken = [delivery for delivery in deliveries if _place(delivery) in lost]
        self.forget(taken)
        return taken

    async def take_back(self, connection: Connection, key: bytes) -> None:
        """Have all of a stream in hand again, in a group that was made anew."""
        address = key.decode()
        await self._keep(connection, [place for place in self._since if place[0] == address], b"1")

    async def _keep(self, connection: Connection, places: Sequence[_Place], take_back: bytes) -> set[_Place]:
        lost: set[_Place] = set()
        for first in range(0, len(places), KEPT_AT_ONCE):
            for key, ids in _by_key(places[first : first + KEPT_AT_ONCE]).items():
                answer: list[bytes] = await call(connection, KEEP, [key], self._group, self._consumer, take_back, *ids)
                lost |= {(key.decode(), entry_id.decode()) for entry_id in answer}
        return lost

    async def count(self, connection: Connection, delivery: Delivery) -> int:
        """Count one attempt, and answer with all of them; a call that is repeated after an error counts once."""
        key, entry_id, place = delivery.address.encode(), delivery.id.encode(), _place(delivery)
        attempts = attempts_key(key, self._group)
        if place not in self._counted:
            self._counted[place] = int(await connection.ask(b"HGET", attempts, entry_id) or 0)
        number = b"%d" % (self._counted[place] + 1)
        known: Any = await call(connection, COUNT, [key, attempts], entry_id, number, b"%d" % ATTEMPTS_FOR)
        del self._counted[place]
        return int(known)

    async def bury(self, connection: Connection, delivery: Delivery, error: str, attempts: int) -> bool:
        """Make it a dead letter and acknowledge it; False where it is another's, or done."""
        key = delivery.address.encode()
        keys = [key, attempts_key(key, self._group), key + b":dead"]
        who = [self._group, self._consumer, delivery.id.encode(), b"%d" % DEAD_FOR]
        what = [delivery.raw, error.encode(errors="replace"), b"%d" % attempts, self._app]
        buried: Any = await call(connection, BURY, keys, *who, *what)
        self.forget([delivery])
        return bool(buried)


def _place(delivery: Delivery) -> _Place:
    return delivery.address, delivery.id


def _by_key(places: Iterable[_Place]) -> dict[bytes, list[bytes]]:
    """The ids of each stream."""
    ids: dict[bytes, list[bytes]] = defaultdict(list)
    for address, entry_id in places:
        ids[address.encode()].append(entry_id.encode())
    return ids
