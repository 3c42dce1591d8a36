"""Dead letters in Redis: messages that a group has given up, to look at, to retry and to delete."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeAlias

from redis.asyncio import Redis

from silbo._checks import check_address
from silbo._closing import AsyncCloseable
from silbo.brokers.redis.calls import Calls, ScriptCall
from silbo.brokers.redis.connection import Refused, check_client
from silbo.brokers.redis.scripts import PURGE, RETRY
from silbo.brokers.redis.streams import DEFAULT, stream_key
from silbo.errors import BrokerUnavailable
from silbo.message import Format, Message
from silbo.wire.formats import JSON

__all__ = ["EPOCH", "DeadLetter", "DeadLetters", "Retried", "read"]

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that a group has given up.

    Attributes:
        id: Its own.
        group: Which has given up; other groups are not affected.
        stream: The key of the stream that it came from.
        entry: What its id was there, and is, as long as the stream keeps it.
        error: Why the last attempt failed.
        attempts: How many there were; 0 where it was malformed.
        app: The program whose consumer gave up.
        consumer: Which one.
        time: When, by Redis's clock: aware, UTC.
        raw: The message as it came.
    """

    id: str
    group: str
    stream: str
    entry: str
    error: str
    attempts: int
    app: str
    consumer: str
    time: datetime
    raw: bytes
    format: Format = field(default=JSON, repr=False, compare=False)

    def message(self) -> Message:
        """Decode it.

        Raises:
            MessageInvalid: the bytes are no message; it may be dead for that.
        """
        return self.format.decode(self.raw)


def read(row: Any, format: Format) -> DeadLetter:  # noqa: A002  # the word of every broker
    """An entry of the stream, as Redis answers with it; what somebody else wrote there has empty fields."""
    letter_id, flat = row[0].decode(), row[1]
    fields: dict[bytes, bytes] = dict(zip(flat[::2], flat[1::2], strict=True))

    def text(name: bytes) -> str:
        return fields.get(name, b"").decode(errors="replace")

    def number(name: bytes, default: int) -> int:
        return int(fields[name]) if fields.get(name, b"").isdigit() else default

    died = number(b"time", int(letter_id.partition("-")[0]))
    return DeadLetter(
        id=letter_id,
        group=text(b"group"),
        stream=text(b"stream"),
        entry=text(b"id"),
        error=text(b"error"),
        attempts=number(b"attempts", 0),
        app=text(b"app"),
        consumer=text(b"consumer"),
        time=EPOCH + timedelta(milliseconds=died),
        raw=fields.get(b"message", b""),
        format=format,
    )


PAGE: Final = 100
RETRY_STEP: Final = 20
"""Dead letters in one call: each may be of 1 MiB, and Redis does nothing else meanwhile."""
PURGE_STEP: Final = 100
_FAILURES: Final = {
    b"expired": "its entry is gone from the stream (retention, or a deletion): only everybody=True brings it back",
    b"no group": "its group does not exist any more",
    b"missing": "there is no such dead letter",
    b"foreign": "it was not written by silbo: it names no group and no entry",
}
_is_id = re.compile(r"\d+-\d+", re.ASCII).fullmatch

Progress: TypeAlias = Callable[[int], object]
"""Is told now and then how many have been done so far."""


@dataclass(frozen=True, slots=True)
class Retried:
    """What became of dead letters that were to be retried.

    Attributes:
        returned: How many were given back.
        failed: Why not, by id; those that exist stay dead letters.
    """

    returned: int = 0
    failed: Mapping[str, str] = field(default_factory=dict)


class DeadLetters(AsyncCloseable):
    """The dead letters of one stream, ``{prefix}:{stream}:dead`` with the braces, oldest first.

    They are kept for 30 days, by which time the stream may have forgotten the entry itself (``retain``); such a one can
    be looked at, but not given back to its group alone.

    For one event loop at a time; leaving closes the connection::

        async with DeadLetters(client) as dead:
            for letter in await dead.list(group="billing"):
                print(letter.id, letter.error)
            await dead.retry(group="billing")

    Every method raises :class:`~silbo.errors.BrokerUnavailable` when Redis can't be reached, refuses, or does not answer
    in time; it is safe to call it again.

    Args:
        client: The program's own. silbo opens a connection of its own from its settings and leaves it as it is.
        prefix: The first part of every key, as the broker has it.
        stream: The stream's address.
        format: The broker's.
        timeout: Seconds in which each step is answered.
    """

    def __init__(
        self,
        client: Redis,
        *,
        prefix: str = "silbo",
        stream: str = DEFAULT,
        format: Format = JSON,  # noqa: A002  # the word of every broker
        timeout: float = 5.0,
    ) -> None:
        self._calls = Calls(check_client(client), timeout)
        self._stream = stream_key(stream, check_address(prefix, "a prefix"))
        self._key, self._format = f"{self._stream}:dead".encode(), format

    async def count(self, *, group: str | None = None) -> int:
        """How many there are, of all groups or of this one."""
        if group is None:
            return int(await self._calls.ask(b"XLEN", self._key))
        return sum([len(page) async for page in self._pages(group)])

    async def groups(self) -> Sequence[str] | None:
        """The groups of the stream; None where there is no such stream, which may be a mistaken prefix."""
        try:
            found = await self._calls.ask(b"XINFO", b"GROUPS", self._stream.encode())
        except BrokerUnavailable as error:
            if isinstance(error.__cause__, Refused) and "no such key" in str(error.__cause__):
                return None
            raise
        return [dict(zip(each[::2], each[1::2], strict=True))[b"name"].decode() for each in found]

    async def list(
        self, *, group: str | None = None, after: str | None = None, limit: int = 100
    ) -> Sequence[DeadLetter]:
        """The oldest ones.

        Args:
            group: Only this one's.
            after: Only those after this id, as the last of the page before.
            limit: At most so many.
        """
        found: list[DeadLetter] = []
        if limit > 0:
            async for page in self._pages(group, after):
                found += page
                if len(found) >= limit:
                    break
        return found[:limit]

    async def get(self, id: str) -> DeadLetter | None:  # noqa: A002  # what it is called everywhere
        """One of them; None where there is none of this id."""
        (checked,) = _checked([id])
        rows = await self._calls.ask(b"XRANGE", self._key, checked, checked)
        return read(rows[0], self._format) if rows else None

    async def retry(
        self,
        ids: Collection[str] | None = None,
        *,
        group: str | None = None,
        everybody: bool = False,
        progress: Progress | None = None,
    ) -> Retried:
        """Give messages back to the groups that gave them up, and to no other; their attempts count from 1 again.

        The group's consumers take them over as from a consumer that has died, at the next of their looks. Each is
        given back once, however many retry it at the same time.

        Args:
            ids: Only these; None takes all that there are now.
            group: Only this one's, of all that there are.
            everybody: Add those anew whose entry is gone from the stream. All groups hear them then, not only the one
                that gave up.
            progress: Is told how many have been done so far.
        """
        if ids is not None and group is not None:
            raise ValueError("say which dead letters by their ids or by their group, not both")
        done, returned, failed = 0, 0, dict[str, str]()
        async for step in self._steps(ids, group, RETRY_STEP):
            for letter, outcome in zip(step, await self._retry(step, everybody=everybody), strict=True):
                if outcome == b"returned":
                    returned += 1
                elif outcome != b"missing" or ids is not None:  # of all: somebody else was faster
                    failed[letter.decode()] = _FAILURES[outcome]
            done += len(step)
            if progress is not None:
                progress(done)
        return Retried(returned, failed)

    async def purge(
        self,
        ids: Collection[str] | None = None,
        *,
        group: str | None = None,
        before: datetime | None = None,
        progress: Progress | None = None,
    ) -> int:
        """Delete for good; how many.

        Args:
            ids: These; without them there is a group or a time, or both.
            group: Only this one's.
            before: Those that died before this time; without it all of the group that there are now.
            progress: Is told how many have been deleted so far.
        """
        if (ids is None) == (group is None and before is None):
            raise ValueError("say which dead letters: by their ids, or of a group, or before a time")
        deleted = 0
        async for many in self._purged(ids, group, before):
            deleted += many
            if progress is not None:
                progress(deleted)
        return deleted

    async def aclose(self) -> None:
        """Close the connection. May be called twice."""
        await self._calls.aclose()

    # -- steps ----------------------------------------------------------------------------------------------

    async def _pages(
        self, group: str | None, after: str | None = None, last: bytes = b"+"
    ) -> AsyncIterator[Sequence[DeadLetter]]:
        begin = b"-" if after is None else b"(" + _checked([after])[0]
        while rows := await self._calls.ask(b"XRANGE", self._key, begin, last, b"COUNT", b"%d" % PAGE):
            letters = [read(row, self._format) for row in rows]
            yield [letter for letter in letters if group in (None, letter.group)]
            begin = b"(" + rows[-1][0]

    async def _steps(
        self, ids: Collection[str] | None, group: str | None, step: int, last: bytes | None = None
    ) -> AsyncIterator[Sequence[bytes]]:
        if ids is not None:
            checked = _checked(ids)
            for at in range(0, len(checked), step):
                yield checked[at : at + step]
            return
        if last is None:  # those that die again meanwhile are left alone
            newest = await self._calls.ask(b"XREVRANGE", self._key, b"+", b"-", b"COUNT", b"1")
            last = bytes(newest[0][0]) if newest else b"-"
        async for page in self._pages(group, last=last):
            for at in range(0, len(page), step):
                yield [letter.id.encode() for letter in page[at : at + step]]

    async def _retry(self, ids: Sequence[bytes], *, everybody: bool) -> Any:
        anew = b"1" if everybody else b""
        return await self._calls.call(RETRY, ScriptCall.of([self._stream.encode(), self._key], anew, *ids))

    async def _purged(
        self, ids: Collection[str] | None, group: str | None, before: datetime | None
    ) -> AsyncIterator[int]:
        last = None if before is None else b"%d" % max(0, -((EPOCH - before) // timedelta(milliseconds=1)) - 1)
        if last is not None and group is None:  # without reading them
            call = ScriptCall.of([self._key], last, b"%d" % PURGE_STEP)
            while many := await self._calls.call(PURGE, call):
                yield many
            return
        async for step in self._steps(ids, group, PURGE_STEP, last):
            yield await self._calls.ask(b"XDEL", self._key, *step)


def _checked(ids: Collection[str]) -> Sequence[bytes]:
    """The ids, each once, as bytes."""
    if isinstance(ids, str):
        raise TypeError(f"ids is a list: [{ids!r}]")
    for letter in ids:
        if not _is_id(letter):
            raise ValueError(f"{letter!r} is not the id of a dead letter, as '1700000000000-0'")
    return [letter.encode() for letter in dict.fromkeys(ids)]
