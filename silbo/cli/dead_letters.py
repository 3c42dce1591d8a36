"""``silbo dead list | count | show | retry | purge``: their arguments, and those that mend."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, Final

from silbo.brokers.redis import DeadLetter, DeadLetters
from silbo.brokers.redis.streams import build_stream_key
from silbo.cli.arguments import (
    FORMATS,
    Commands,
    UsageError,
    address,
    command,
    count,
    format_option,
    json_option,
    moment,
    redis_options,
    yes_option,
)
from silbo.cli.connect import redis_at
from silbo.cli.output import (
    confirmed,
    many,
    message_fields,
    not_there,
    object_line,
    printable,
    say,
    time,
    write,
)
from silbo.cli.rich_output import print_table, show_progress
from silbo.errors import MessageInvalid
from silbo.message import Message

__all__ = ["add_to", "count_all", "mistaken", "opened", "show", "show_all"]

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
    stream = build_stream_key(options.stream, options.prefix)
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
            print_table(COLUMNS, cells, numbers=["attempts"])
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


LIST = """\
A stream or a group that is not there is an error: a mistaken name must not look as if nothing were wrong.

examples:
  silbo dead list --redis redis://localhost
  silbo dead list --group billing --json | jq -r '[.id, .error] | @tsv'
"""
COUNT = """\
For an alarm: nothing of their messages. A stream or a group that is not there is an error.

examples:
  test "$(silbo dead count)" = 0 || echo 'wake somebody'
  silbo dead count --group billing --json
"""
SHOW = """\
examples:
  silbo dead show 1700000000000-0
"""
RETRY = """\
The message goes back to the group that gave it up, and to no other; its consumers take it over at
their next look, and its attempts count from 1 again. One whose entry is gone from the stream can
only be added anew, for every group: --everybody.

examples:
  silbo dead retry 1700000000000-0
  silbo dead retry --group billing --yes
  silbo dead retry --all --everybody --yes
"""
PURGE = """\
examples:
  silbo dead purge 1700000000000-0 --yes
  silbo dead purge --before 30d --yes
  silbo dead purge --group billing --before 7d
"""

_is_id = re.compile(r"\d+-\d+", re.ASCII).fullmatch


def add_to(commands: Commands) -> None:
    """Tell the parser."""
    parser = command(commands, "list", "the oldest dead letters", epilog=LIST, run=show_all)
    _where(parser)
    parser.add_argument("--group", type=address, help="only this group's")
    parser.add_argument("--limit", type=count(1), default=50, help="how many at most (50)")
    parser.add_argument("--after", metavar="ID", type=_id, help="those after this one")
    json_option(parser, "one JSON object for each")

    parser = command(commands, "count", "how many dead letters there are", epilog=COUNT, run=count_all)
    _where(parser)
    parser.add_argument("--group", type=address, help="only this group's")
    json_option(parser)

    parser = command(commands, "show", "all of one dead letter, its message too", epilog=SHOW, run=show)
    _where(parser)
    parser.add_argument("id", metavar="ID", type=_id)
    json_option(parser)

    parser = command(commands, "retry", "give messages back to their groups", epilog=RETRY, run=retry)
    _where(parser)
    parser.add_argument("ids", metavar="ID", type=_id, nargs="*")
    parser.add_argument("--group", type=address, help="all of this group")
    parser.add_argument("--all", action="store_true", help="all there are")
    parser.add_argument(
        "--everybody",
        action="store_true",
        help="where the entry is gone from the stream, add it anew: all groups hear it",
    )
    yes_option(parser)
    json_option(parser)

    parser = command(commands, "purge", "delete dead letters for good", epilog=PURGE, run=purge)
    _where(parser)
    parser.add_argument("ids", metavar="ID", type=_id, nargs="*")
    parser.add_argument("--group", type=address, help="of this group; all of them without --before")
    parser.add_argument("--before", metavar="TIME", type=moment, help="that died before then: 30d, or now for all")
    yes_option(parser)
    json_option(parser)


def _where(parser: argparse.ArgumentParser) -> None:
    redis_options(parser)
    parser.add_argument("--stream", type=address, default="events", help="the stream's address (events)")
    format_option(parser)


def _id(text: str) -> str:
    if _is_id(text):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is no id of a dead letter, as 1700000000000-0")


# -- to mend ------------------------------------------------------------------------------------------------


async def retry(options: argparse.Namespace) -> int:
    """By id, of one group, or all."""
    if [bool(options.ids), bool(options.group), options.all].count(True) != 1:
        raise UsageError("which dead letters? Give their ids, --group or --all")
    async with opened(options) as dead:
        total = len(options.ids) or (await dead.count() if options.all else None)
        what = f"the dead letters of {options.group}" if total is None else many(total, "dead letter")
        to = (
            "to their groups, or, where their entries are gone, to every group" if options.everybody else "to the group"
        )
        if not (options.ids and not options.everybody) and not confirmed(f"Give {what} back {to}?", yes=options.yes):
            return 1
        with show_progress("retry", total) as update:
            outcome = await dead.retry(
                options.ids or None, group=options.group, everybody=options.everybody, progress=update
            )
        wrong = not outcome.returned and await mistaken(dead, options, options.group)
    if options.json:
        object_line({"returned": outcome.returned, "failed": outcome.failed})
    else:
        write(f"{many(outcome.returned, 'dead letter')} given back")
    for letter, why in outcome.failed.items():
        say(f"silbo: {letter}: {why}")
    return 1 if outcome.failed or wrong else 0


async def purge(options: argparse.Namespace) -> int:
    """By id; or of one group, or before a time, or both."""
    if bool(options.ids) == bool(options.group or options.before):
        raise UsageError("which dead letters? Give their ids, or --group, or --before")
    ids = list(dict.fromkeys(options.ids))
    what = many(len(ids), "dead letter") if ids else "all dead letters"
    what += f" of {options.group}" if options.group else ""
    what += f" from before {time(options.before)}" if options.before else ""
    if not confirmed(f"Delete {what} for good?", yes=options.yes):
        return 1
    async with opened(options) as dead:
        with show_progress("purge", len(ids) or None) as update:
            done = await dead.purge(ids or None, group=options.group, before=options.before, progress=update)
        wrong = not done and await mistaken(dead, options, options.group)
    if options.json:
        object_line({"purged": done})
    else:
        write(f"{many(done, 'dead letter')} deleted")
    if done < len(ids) and not wrong:
        say(f"silbo: {not_there(ids, done, 'dead letter')}")
    return 1 if done < len(ids) or wrong else 0
