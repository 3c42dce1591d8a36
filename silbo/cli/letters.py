"""``silbo dead list | count | show``: to look at dead letters."""

from __future__ import annotations

import argparse
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, Final

from silbo.brokers.redis import DeadLetter, DeadLetters
from silbo.brokers.redis.address import stream_key
from silbo.cli.arguments import FORMATS
from silbo.cli.connect import redis_at
from silbo.cli.output import message_fields, object_line, printable, say, table, time, write
from silbo.errors import MessageInvalid
from silbo.message import Message

__all__ = ["count_all", "mistaken", "opened", "show", "show_all"]

COLUMNS: Final = ("id", "group", "event", "time", "attempts", "error")
PAGE: Final = 100
"""Dead letters that are read at a time."""


@asynccontextmanager
async def opened(options: argparse.Namespace) -> AsyncGenerator[DeadLetters]:
    """The dead letters that the arguments name."""
    async with (
        redis_at(options.redis) as client,
        DeadLetters(client, prefix=options.prefix, stream=options.stream, format=FORMATS[options.format]) as dead,
    ):
        yield dead


async def mistaken(dead: DeadLetters, options: argparse.Namespace, group: str | None = None) -> bool:
    """Whether nothing was found for a name that is none, and not because nothing is wrong. Says so."""
    groups = await dead.groups()
    stream = stream_key(options.stream, options.prefix)
    if groups is None:
        say(f"silbo: there is no stream {stream}")
    elif group is not None and group not in groups:
        say(f"silbo: there is no group {group} at the stream {stream}")
    else:
        return False
    return True


async def show_all(options: argparse.Namespace) -> int:
    """The oldest."""
    last = None
    async with opened(options) as dead:
        letters = _letters(dead, options.group, options.after, options.limit)
        if options.json:
            async for letter in letters:
                object_line(_fields(letter))
                last = letter.id
        elif found := [letter async for letter in letters]:
            cells = [(x.id, x.group, _name(x), time(x.time), x.attempts, x.error) for x in found]
            table(COLUMNS, cells, numbers=["attempts"])
            last = found[-1].id
        if last is None:
            if await mistaken(dead, options, options.group):
                return 1
            say("no dead letters")
        elif await dead.list(group=options.group, after=last, limit=1):
            say(f"there are more: --after {last}, or a greater --limit")
    return 0


async def _letters(dead: DeadLetters, group: str | None, after: str | None, limit: int) -> AsyncGenerator[DeadLetter]:
    """At most ``limit``, of which few are in memory at a time."""
    while limit and (page := await dead.list(group=group, after=after, limit=min(limit, PAGE))):
        for letter in page:
            yield letter
        after, limit = page[-1].id, limit - len(page)


async def count_all(options: argparse.Namespace) -> int:
    """How many there are, for an alarm: nothing of their messages."""
    async with opened(options) as dead:
        number = await dead.count(group=options.group)
        if not number and await mistaken(dead, options, options.group):
            return 1
    if options.json:
        object_line({"dead": number})
    else:
        write(str(number))
    return 0


async def show(options: argparse.Namespace) -> int:
    """One of them."""
    async with opened(options) as dead:
        letter = await dead.get(options.id)
        if letter is None:
            if not await mistaken(dead, options):
                say(f"silbo: there is no dead letter {options.id}")
            return 1
    fields = _fields(letter)
    if options.json:
        object_line(fields)
        return 0
    for name, value in fields.items():
        if name == "time":
            write(f"{name:9} {time(letter.time)}")
        elif name == "message" and value:
            write(json.dumps(value, indent=2))
        elif value is not None:
            write(f"{name:9} {printable(str(value))}")
    return 0


def _fields(letter: DeadLetter) -> dict[str, Any]:
    message = _message(letter)
    return {
        "id": letter.id,
        "group": letter.group,
        "stream": letter.stream,
        "entry": letter.entry,
        "error": letter.error,
        "attempts": letter.attempts,
        "app": letter.app,
        "consumer": letter.consumer,
        "time": letter.time,
        "message": message and message_fields(message),
        "raw": None if message else letter.raw.decode(errors="backslashreplace"),
    }


def _message(letter: DeadLetter) -> Message | None:
    """None where it is malformed."""
    try:
        return letter.message()
    except MessageInvalid:
        return None


def _name(letter: DeadLetter) -> str | None:
    message = _message(letter)
    return message.message_name if message else None
