"""What a consumer was given and has not acknowledged, and what becomes of it."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Final, TypeAlias

from silbo.brokers.redis.calls import Calls, ScriptCall
from silbo.brokers.redis.connection import Lost, Refused
from silbo.brokers.redis.scripts import ACK, BURY, COUNT, KEEP, LEAVE, Script
from silbo.errors import BrokerUnavailable
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

    Over a connection of its own: on the other one, Redis holds reads back.

    Args:
        claim_after: Seconds after which another consumer may take over what was not kept.
    """

    def __init__(self, calls: Calls, group: bytes, consumer: bytes, app: str, *, claim_after: float) -> None:
        self._calls, self._group, self._consumer, self._app = calls, group, consumer, app.encode()
        self._claim_after = claim_after
        self._since: dict[_Place, float] = {}  # when it surely was this consumer's, by the loop's clock
        self._counted: dict[_Place, int] = {}  # what was known when a count began that is not answered
        self._over: set[_Place] = set()  # done with since the last read began

    def __contains__(self, place: _Place) -> bool:
        return place in self._since

    def read(self) -> None:
        """A read begins: what was done with before, it can't bring."""
        self._over.clear()

    def take(self, delivery: Delivery, asked: float) -> bool:
        """Note that it was given, in the answer to what was asked at this time.

        False where it was done with meanwhile: over two connections, a read may overtake an acknowledgement and its
        answer come later all the same.
        """
        place = delivery.address, delivery.id
        if place in self._over:
            return False
        self._since[place] = asked
        return True

    def forget(self, deliveries: Iterable[Delivery]) -> None:
        """They are this consumer's business no more."""
        for delivery in deliveries:
            place = delivery.address, delivery.id
            self._since.pop(place, None)
            self._over.add(place)
            if self._counted:
                self._counted.pop(place, None)

    async def ack(self, deliveries: Sequence[Delivery]) -> None:
        """They are done; what was counted of them goes in the same step."""
        calls = [
            ScriptCall.of([key, attempts_key(key, self._group)], self._group, *ids)
            for key, ids in _by_key(map(_place, deliveries)).items()
        ]
        await self._run("acknowledge at", ACK, calls)
        self.forget(deliveries)

    async def keep(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """They are in work; answers with those that are another's by now."""
        now = asyncio.get_running_loop().time()
        since = now - self._claim_after
        # Nobody can have claimed what was surely ours a moment ago: where nobody has it, its group was deleted.
        sure = [place for place in map(_place, deliveries) if self._since.get(place, since) > since]
        others = [place for place in map(_place, deliveries) if self._since.get(place, since) <= since]
        lost = await self._keep(sure, b"1") | await self._keep(others, b"")
        self._since.update(dict.fromkeys(map(_place, deliveries), now))
        taken = [delivery for delivery in deliveries if _place(delivery) in lost]
        self.forget(taken)
        return taken

    async def take_back(self, key: bytes) -> None:
        """Have all of a stream in hand again, in a group that was made anew."""
        address = key.decode()
        await self._keep([place for place in self._since if place[0] == address], b"1")

    async def _keep(self, places: Sequence[_Place], take_back: bytes) -> set[_Place]:
        some = [places[first : first + KEPT_AT_ONCE] for first in range(0, len(places), KEPT_AT_ONCE)]
        batches = [batch for part in some for batch in _by_key(part).items()]
        calls = [ScriptCall.of([key], self._group, self._consumer, take_back, *ids) for key, ids in batches]
        answers = await self._run("keep deliveries at", KEEP, calls)
        return {
            (key.decode(), entry_id.decode())
            for (key, _), lost in zip(batches, answers, strict=True)
            for entry_id in lost
        }

    async def count(self, delivery: Delivery) -> int:
        """Count one attempt, and answer with all of them; a call that is repeated after an error counts once."""
        key, entry_id, place = delivery.address.encode(), delivery.id.encode(), _place(delivery)
        keys = [key, attempts_key(key, self._group)]
        if place not in self._counted:
            (self._counted[place],) = await self._run("read attempts at", COUNT, [ScriptCall.of(keys, entry_id)])
        number = b"%d" % (self._counted[place] + 1)
        call = ScriptCall.of(keys, entry_id, number, b"%d" % ATTEMPTS_FOR)
        (known,) = await self._run("count an attempt at", COUNT, [call])
        self._counted.pop(place, None)  # it may have been forgotten meanwhile
        return int(known)

    async def bury(self, delivery: Delivery, error: str, attempts: int) -> bool:
        """Make it a dead letter and acknowledge it; False where it is another's, or done."""
        key = delivery.address.encode()
        keys = [key, attempts_key(key, self._group), key + b":dead"]
        who = [self._group, self._consumer, delivery.id.encode(), b"%d" % DEAD_FOR]
        what = [delivery.raw, error.encode(errors="replace"), b"%d" % attempts, self._app]
        (buried,) = await self._run("add a dead letter at", BURY, [ScriptCall.of(keys, *who, *what)])
        self.forget([delivery])
        return bool(buried)

    async def leave(self, keys: Iterable[bytes], *, unnamed: bool) -> None:
        """Let others claim at once what is left. Where nothing is, and the name is nobody's, it goes."""
        after, name = b"%d" % (self._claim_after * 1000), b"1" if unnamed else b""
        calls = [ScriptCall.of([key], self._group, self._consumer, after, name) for key in keys]
        await self._run("take leave of", LEAVE, calls)

    async def aclose(self) -> None:
        """Close the connection."""
        await self._calls.aclose()

    async def _run(self, what: str, script: Script, calls: Sequence[ScriptCall]) -> list[Any]:
        if not calls:
            return []
        replies = await self._calls.run(script, *calls)
        for reply in replies:
            if isinstance(reply, Lost | Refused):
                raise BrokerUnavailable(f"can't {what} {self._calls.server}: {reply}") from reply
        return replies


def _place(delivery: Delivery) -> _Place:
    return delivery.address, delivery.id


def _by_key(places: Iterable[_Place]) -> dict[bytes, list[bytes]]:
    """The ids of each stream."""
    ids: dict[bytes, list[bytes]] = defaultdict(list)
    for address, entry_id in places:
        ids[address.encode()].append(entry_id.encode())
    return ids
