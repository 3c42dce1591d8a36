"""The dead letters of an address: of its stream, or of all its shards."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime

from silbo._checks import check_address
from silbo.brokers.redis.connection import Client
from silbo.brokers.redis.dead_letters import DeadLetter, DeadLetters, Retried
from silbo.brokers.redis.streams import DEFAULT_ADDRESS, build_stream_key
from silbo.errors import DeadLetterAmbiguous
from silbo.message import Format
from silbo.operations.redis import opened, read_shards
from silbo.shards import build_shard_address
from silbo.wire.formats import JSON

__all__ = ["AddressLetters", "open_dead_letters"]


@asynccontextmanager
async def open_dead_letters(
    client: Client,
    *,
    prefix: str = "silbo",
    stream: str = DEFAULT_ADDRESS,
    format: Format = JSON,  # noqa: A002  # the word of every broker
    timeout: float = 5.0,
) -> AsyncGenerator[AddressLetters]:
    """Open the dead letters of an address; close them at the end of the block.

    Args:
        client: The program's client.
        prefix: The broker's prefix.
        stream: The address; the number of its shards is read from Redis.
        format: The format of the broker that sent the messages.
        timeout: Seconds in which each step is answered.

    Raises:
        BrokerUnavailable: Redis can't be reached, or refuses.
    """
    async with opened(client, timeout) as connection:
        key = build_stream_key(stream, check_address(prefix, "a prefix"))
        shards = await read_shards(connection, key.encode())
    addresses = [build_shard_address(stream, shard) for shard in range(shards)] if shards > 1 else [stream]
    async with AsyncExitStack() as stack:
        parts = [
            await stack.enter_async_context(
                DeadLetters(client, prefix=prefix, stream=address, format=format, timeout=timeout)
            )
            for address in addresses
        ]
        yield AddressLetters(stream, parts)


class AddressLetters:
    """The dead letters of all shards of an address, or of a stream, by the methods of ``DeadLetters``, the oldest first.

    Args:
        address: The address.
        parts: The dead letters of each shard, or of the stream.
    """

    def __init__(self, address: str, parts: Sequence[DeadLetters]) -> None:
        self._address = address
        self._parts = parts

    async def count(self, *, group: str | None = None) -> int:
        """Return the number of dead letters, of all groups or of one."""
        return sum([await part.count(group=group) for part in self._parts])

    async def groups(self) -> Sequence[str] | None:
        """Return the names of the groups; None if there is no such stream."""
        found = [groups for part in self._parts if (groups := await part.groups()) is not None]
        return sorted({group for groups in found for group in groups}) if found else None

    async def list(
        self, *, group: str | None = None, after: str | None = None, limit: int = 100
    ) -> Sequence[DeadLetter]:
        """Return the oldest dead letters. Those of one id, in several shards, are returned together, also beyond the limit."""
        found = [letter for part in self._parts for letter in await part.list(group=group, after=after, limit=limit)]
        found.sort(key=lambda letter: _parse_id(letter.id))
        last = found[limit - 1].id if limit < len(found) else None
        return [letter for at, letter in enumerate(found) if at < limit or letter.id == last]

    async def get(self, id: str) -> DeadLetter | None:  # noqa: A002  # what it is called everywhere
        """Return one dead letter; None if there is none of this id.

        Raises:
            DeadLetterAmbiguous: several shards have one of this id.
        """
        letters = [letter for part in self._parts if (letter := await part.get(id)) is not None]
        if len(letters) > 1:
            raise DeadLetterAmbiguous(id, self._address)
        return letters[0] if letters else None

    async def retry(
        self,
        ids: Collection[str] | None = None,
        *,
        group: str | None = None,
        everybody: bool = False,
        progress: Callable[[int], object] | None = None,
    ) -> Retried:
        """Give messages back to the groups that gave them up: see ``DeadLetters.retry``.

        Raises:
            DeadLetterAmbiguous: several shards have one of these ids; nothing was done.
        """
        returned = done = 0
        failed: dict[str, str] = {}
        for part, its_ids in await self._find_parts(ids):
            before = done

            def tell(many: int, before: int = before) -> None:
                nonlocal done
                done = before + many
                if progress is not None:
                    progress(done)

            outcome = await part.retry(its_ids, group=group, everybody=everybody, progress=tell)
            returned += outcome.returned
            failed.update(outcome.failed)
        return Retried(returned, failed)

    async def purge(
        self,
        ids: Collection[str] | None = None,
        *,
        group: str | None = None,
        before: datetime | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> int:
        """Delete dead letters for good, and return their number: see ``DeadLetters.purge``.

        Raises:
            DeadLetterAmbiguous: several shards have one of these ids; nothing was done.
        """
        deleted = 0
        for part, its_ids in await self._find_parts(ids):

            def tell(many: int, before: int = deleted) -> None:
                if progress is not None:
                    progress(before + many)

            deleted += await part.purge(its_ids, group=group, before=before, progress=tell)
        return deleted

    async def read_clock(self) -> datetime:
        """Return the time of Redis's clock; in a cluster, of the first shard's node."""
        return await self._parts[0].read_clock()

    async def _find_parts(self, ids: Collection[str] | None) -> Sequence[tuple[DeadLetters, Collection[str] | None]]:
        """Return the shards with the ids that each has; an id that none has belongs to the first one, which says so."""
        if ids is None or len(self._parts) == 1:
            return [(part, ids) for part in self._parts]
        by_part: dict[DeadLetters, list[str]] = {}
        for each in dict.fromkeys(ids):
            having = [part for part in self._parts if await part.get(each) is not None]
            if len(having) > 1:
                raise DeadLetterAmbiguous(each, self._address)
            by_part.setdefault(having[0] if having else self._parts[0], []).append(each)
        return list(by_part.items())


def _parse_id(letter: str) -> tuple[int, int]:
    milliseconds, _, number = letter.partition("-")
    return int(milliseconds), int(number)
