"""Dead letters in Redis: messages that a group has given up, to be listed, retried and deleted."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeAlias

from silbo._checks import check_address
from silbo._closing import AsyncCloseable
from silbo.brokers.redis.calls import CallConnection, ScriptCall
from silbo.brokers.redis.connection import Client, Refused, check_client
from silbo.brokers.redis.read_size import ReadSize
from silbo.brokers.redis.scripts import PURGE, RETRY
from silbo.brokers.redis.streams import DEFAULT_ADDRESS, build_stream_key
from silbo.errors import BrokerUnavailable
from silbo.message import Format, Message
from silbo.wire.formats import JSON

__all__ = ["RETRY_CONSUMER", "DeadLetter", "DeadLetters", "Retried", "is_letter_id", "parse_letter"]

UNIX_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
LAST_TIME: Final = datetime(9999, 12, 30, tzinfo=UTC)
"""The time of an entry whose id lies beyond what a datetime can hold, with a day to spare for time zones."""
LARGEST_ID: Final = (1 << 64) - 1
"""The largest milliseconds and the largest number in the id of an entry."""
DIGITS: Final = 18
"""A number with more digits was not written by silbo."""
PAGE: Final = 100
"""Dead letters are read in pages of at most 100."""
RETRY_AT_ONCE: Final = 20
"""A call retries at most 20 dead letters: each may have 1 MiB, and Redis does nothing else meanwhile."""
PURGE_AT_ONCE: Final = 100
"""A call deletes at most 100 dead letters."""
RETRY_CONSUMER: Final = b"silbo-retry"
"""The name in a group that holds what is given back, until a consumer takes it over. Nobody runs under it."""
_FAILURES: Final = {
    b"expired": "its entry is gone from the stream (retention, or a deletion): only everybody=True brings it back",
    b"no group": "its group does not exist any more",
    b"missing": "there is no such dead letter",
    b"foreign": "it was not written by silbo: it names no group and no entry",
}
_match_id = re.compile(r"(\d{1,20})-(\d{1,20})", re.ASCII).fullmatch

Progress: TypeAlias = Callable[[int], object]
"""``(done)`` is called after each step with the number of dead letters done so far."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that a group has given up.

    Attributes:
        id: The dead letter's own id.
        group: The group that has given up; other groups are not affected.
        stream: The key of the stream that the message came from.
        entry: The id of its entry in that stream, which exists as long as the stream keeps it.
        error: The error of the last attempt, as text.
        attempts: The number of attempts; 0 if the message could not be decoded.
        app: The program whose consumer gave up.
        consumer: The name of that consumer.
        time: The time when it gave up, by Redis's clock: aware, UTC.
        raw: The message as it came.
        fields: All fields of an entry that another program wrote, as text; empty for silbo's own dead letters. Such an entry
            can be read and deleted, and not be given back: it names no group or no entry.
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
    fields: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def message(self) -> Message:
        """Return the message, decoded.

        Raises:
            MessageInvalid: the bytes are not a message; that may be why it is dead.
        """
        return self.format.decode(self.raw)


@dataclass(frozen=True, slots=True)
class Retried:
    """The outcome of a retry.

    Attributes:
        returned: The number of dead letters given back to their groups.
        failed: The reasons why others were not, by id; those that exist stay dead letters.
    """

    returned: int = 0
    failed: Mapping[str, str] = field(default_factory=dict)


class DeadLetters(AsyncCloseable):
    """The dead letters of one stream, oldest first. Their key is ``prefix:{stream}:dead``; the braces belong to it.

    They are kept for 30 days. The stream may remove the entry sooner (``RedisStreams(retain=)``). Such a dead letter can be
    read, but it can't be given back to only the group that gave it up.

    Use it in one event loop at a time. Leaving the block closes the connection::

        async with DeadLetters(client) as dead:
            for letter in await dead.list(group="billing"):
                print(letter.id, letter.error)
            await dead.retry(group="billing")

    Every method raises :class:`~silbo.errors.BrokerUnavailable` if Redis can't be reached, refuses, or does not answer in
    time; it is safe to call the method again.

    Args:
        client: The program's client. silbo opens its own connection with the client's settings, and leaves the client as it is.
        prefix: The broker's prefix, the first part of every key.
        stream: The stream's address.
        format: The format of the broker that sent the messages.
        timeout: Seconds in which each step is answered. A large answer may take longer, as long as it makes progress.
    """

    def __init__(
        self,
        client: Client,
        *,
        prefix: str = "silbo",
        stream: str = DEFAULT_ADDRESS,
        format: Format = JSON,  # noqa: A002  # the word of every broker
        timeout: float = 5.0,
    ) -> None:
        self._connection = CallConnection(check_client(client), timeout, owner="DeadLetters", is_patient=True)
        self._size = ReadSize()
        self._stream = build_stream_key(stream, check_address(prefix, "a prefix")).encode()
        self._key = self._stream + b":dead"
        self._format = format

    async def count(self, *, group: str | None = None) -> int:
        """Return the number of dead letters, of all groups or of one."""
        if group is None:
            return int(await self._connection.run_command(b"XLEN", self._key))
        return sum([len(page) async for page in self._pages(group)])

    async def groups(self) -> Sequence[str] | None:
        """Return the names of the stream's groups; None if there is no such stream, perhaps for a mistaken prefix."""
        try:
            found = await self._connection.run_command(b"XINFO", b"GROUPS", self._stream)
        except BrokerUnavailable as error:
            if isinstance(error.__cause__, Refused) and "no such key" in str(error.__cause__):
                return None
            raise
        return [
            dict(zip(each[::2], each[1::2], strict=True))[b"name"].decode(errors="backslashreplace") for each in found
        ]

    async def list(
        self, *, group: str | None = None, after: str | None = None, limit: int = 100
    ) -> Sequence[DeadLetter]:
        """Return the oldest dead letters, possibly none.

        Args:
            group: Only the dead letters of this group.
            after: Only those after this id, as the last of the page before.
            limit: The most dead letters returned.

        Raises:
            ValueError: ``after`` is not the id of a dead letter.
        """
        found: list[DeadLetter] = []
        if limit > 0:
            async for page in self._pages(group, after):
                found += page
                if len(found) >= limit:
                    break
        return found[:limit]

    async def get(self, id: str) -> DeadLetter | None:  # noqa: A002  # what it is called everywhere
        """Return one dead letter; None if there is none of this id.

        Raises:
            ValueError: it is not the id of a dead letter.
        """
        (checked,) = _check_ids([id])
        rows = await self._connection.run_command(b"XRANGE", self._key, checked, checked)
        return parse_letter(rows[0], self._format) if rows else None

    async def retry(
        self,
        ids: Collection[str] | None = None,
        *,
        group: str | None = None,
        everybody: bool = False,
        progress: Progress | None = None,
    ) -> Retried:
        """Give messages back to the groups that gave them up, and to no other; their attempts count from 1 again.

        The group's consumers take them over as from a consumer that has died, when they next look for such. Each message
        is given back once, however many programs retry it at the same time.

        Args:
            ids: Only these dead letters; None takes all that there are now.
            group: Only the dead letters of this group.
            everybody: Add messages anew whose entry is gone from the stream. Then all groups get them, not only the group
                that gave up.
            progress: Called with the number of dead letters done so far.

        Raises:
            ValueError: both ``ids`` and ``group`` are given, or one of the ids is not the id of a dead letter.
        """
        if ids is not None and group is not None:
            raise ValueError("say which dead letters by their ids or by their group, not both")
        done = 0
        returned = 0
        failed: dict[str, str] = {}
        async for step in self._steps(ids, group, RETRY_AT_ONCE):
            for letter, outcome in zip(step, await self._retry(step, everybody=everybody), strict=True):
                if outcome == b"returned":
                    returned += 1
                elif outcome != b"missing" or ids is not None:  # all were asked for: another program was faster
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
        """Delete dead letters for good, and return their number.

        Args:
            ids: These dead letters; without ``ids`` give a group, a time, or both.
            group: Only the dead letters of this group.
            before: Only those that died before this time; None takes all of the group that there are now.
            progress: Called with the number of dead letters deleted so far.

        Raises:
            ValueError: the arguments choose none, or ``ids`` and something else, or an id is not one of a dead letter.
        """
        if (ids is None) == (group is None and before is None):
            raise ValueError("say which dead letters: by their ids, or of a group, or before a time")
        deleted = 0
        async for many in self._purge_steps(ids, group, before):
            deleted += many
            if progress is not None:
                progress(deleted)
        return deleted

    async def read_clock(self) -> datetime:
        """Return the time of Redis's clock, which decides when a dead letter died: aware, UTC."""
        seconds, microseconds = await self._connection.run_command(b"TIME")
        return UNIX_EPOCH + timedelta(seconds=int(seconds), microseconds=int(microseconds))

    async def aclose(self) -> None:
        """Close the connection. May be called twice."""
        await self._connection.aclose()

    # -- steps ----------------------------------------------------------------------------------------------

    async def _pages(
        self, group: str | None, after: str | None = None, last: bytes = b"+"
    ) -> AsyncIterator[Sequence[DeadLetter]]:
        begin = b"-" if after is None else b"(" + _check_ids([after])[0]
        if after is not None and _is_last(begin):
            return
        loop = asyncio.get_running_loop()
        while True:
            asked_at = loop.time()
            count = b"%d" % self._size.count(PAGE)
            rows = await self._connection.run_command(b"XRANGE", self._key, begin, last, b"COUNT", count)
            if not rows:
                return
            self._size.note(len(rows), sum(len(text) for row in rows for text in row[1]), loop.time() - asked_at)
            letters = [parse_letter(row, self._format) for row in rows]
            yield [letter for letter in letters if group in (None, letter.group)]
            begin = b"(" + rows[-1][0]
            if _is_last(begin):
                return

    async def _steps(
        self, ids: Collection[str] | None, group: str | None, step: int, last: bytes | None = None
    ) -> AsyncIterator[Sequence[bytes]]:
        if ids is not None:
            checked = _check_ids(ids)
            for at in range(0, len(checked), step):
                yield checked[at : at + step]
            return
        if last is None:  # letters that die again meanwhile are left alone
            newest = await self._connection.run_command(b"XREVRANGE", self._key, b"+", b"-", b"COUNT", b"1")
            last = bytes(newest[0][0]) if newest else b"-"
        waiting: list[bytes] = []
        async for page in self._pages(group, last=last):
            waiting += [letter.id.encode() for letter in page]
            while len(waiting) >= step:
                yield waiting[:step]
                del waiting[:step]
        if waiting:
            yield waiting

    async def _retry(self, ids: Sequence[bytes], *, everybody: bool) -> Any:
        anew = b"1" if everybody else b""
        return await self._connection.run(ScriptCall.of(RETRY, [self._stream, self._key], anew, RETRY_CONSUMER, *ids))

    async def _purge_steps(
        self, ids: Collection[str] | None, group: str | None, before: datetime | None
    ) -> AsyncIterator[int]:
        last = None if before is None else b"%d" % max(0, -((UNIX_EPOCH - before) // timedelta(milliseconds=1)) - 1)
        if last is not None and group is None:  # no need to read them
            call = ScriptCall.of(PURGE, [self._key], last, b"%d" % PURGE_AT_ONCE)
            while many := await self._connection.run(call):
                yield many
            return
        async for step in self._steps(ids, group, PURGE_AT_ONCE, last):
            yield await self._connection.run_command(b"XDEL", self._key, *step)


def is_letter_id(text: str) -> bool:
    """Return True if a text can be the id of a dead letter, as ``1700000000000-0``."""
    return (found := _match_id(text)) is not None and all(int(part) <= LARGEST_ID for part in found.groups())


def _is_last(begin: bytes) -> bool:
    """Return True if no id can come after this excluded one: Redis refuses it as a beginning."""
    return begin == b"(%d-%d" % (LARGEST_ID, LARGEST_ID)


def _check_ids(ids: Collection[str]) -> Sequence[bytes]:
    """Return the ids as bytes, each once."""
    if isinstance(ids, str):
        raise TypeError(f"ids is a list: [{ids!r}]")
    for letter in ids:
        if not is_letter_id(letter):
            raise ValueError(f"{letter!r} is not the id of a dead letter, as '1700000000000-0'")
    return [letter.encode() for letter in dict.fromkeys(ids)]


def parse_letter(row: Any, format: Format) -> DeadLetter:  # noqa: A002  # the word of every broker
    """Return a row of Redis's reply as a dead letter; what an entry of another program lacks is empty."""
    letter_id, flat = row[0].decode(), row[1]
    fields: dict[bytes, bytes] = dict(zip(flat[::2], flat[1::2], strict=True))

    def text(name: bytes) -> str:
        return fields.get(name, b"").decode(errors="replace")

    def number(name: bytes, default: int) -> int:
        value = fields.get(name, b"")
        return int(value) if value.isdigit() and len(value) <= DIGITS else default

    def readable(value: bytes) -> str:
        return value.decode(errors="backslashreplace")

    is_own = b"message" in fields and text(b"group") != "" and is_letter_id(text(b"id"))
    return DeadLetter(
        id=letter_id,
        group=text(b"group"),
        stream=text(b"stream"),
        entry=text(b"id"),
        error=text(b"error"),
        attempts=number(b"attempts", 0),
        app=text(b"app"),
        consumer=text(b"consumer"),
        time=_to_time(number(b"time", -1), int(letter_id.partition("-")[0])),
        raw=fields.get(b"message", b""),
        format=format,
        fields={} if is_own else {readable(name): readable(value) for name, value in fields.items()},
    )


def _to_time(written: int, added: int) -> datetime:
    """Return the written time, or the one at which the entry was added if that is none; in milliseconds since 1970."""
    for milliseconds in (written, added):
        if milliseconds >= 0:
            with suppress(OverflowError):
                return min(LAST_TIME, UNIX_EPOCH + timedelta(milliseconds=milliseconds))
    return LAST_TIME
