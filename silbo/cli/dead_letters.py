"""``silbo dead list | count | show | retry | purge``: their arguments, and carrying them out."""

from __future__ import annotations

import argparse
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final
from uuid import UUID

from silbo.brokers.redis import DeadLetter
from silbo.brokers.redis.dead_letters import is_letter_id
from silbo.brokers.redis.streams import build_stream_key
from silbo.cli.arguments import (
    FORMATS,
    Commands,
    UsageError,
    add_command,
    add_command_group,
    add_format_option,
    add_json_option,
    add_redis_options,
    find_moment,
    make_count_parser,
    parse_address,
    parse_time,
)
from silbo.cli.confirmation import add_yes_option, confirm
from silbo.cli.connect import make_redis
from silbo.cli.output import print_as_it_is, print_json, print_line, print_note, print_outcome
from silbo.cli.rich_output import print_table, show_progress
from silbo.errors import MessageInvalid, StreamMissing
from silbo.message import Message
from silbo.operations.dead_letters import AddressLetters, open_dead_letters
from silbo.operations.formatting import explain_missing, format_count, format_time, message_to_fields

__all__ = ["add_to"]

COLUMNS: Final = ("id", "group", "event", "time", "attempts", "error")
PAGE: Final = 100
"""Dead letters that are read with one call."""


@asynccontextmanager
async def _open_dead_letters(options: argparse.Namespace) -> AsyncGenerator[AddressLetters]:
    """Open the dead letters of the address that the options name."""
    async with (
        make_redis(options) as client,
        open_dead_letters(client, prefix=options.prefix, stream=options.stream, format=FORMATS[options.format]) as dead,
    ):
        yield dead


async def _report_unknown_name(dead: AddressLetters, options: argparse.Namespace, group: str | None = None) -> bool:
    """Tell the user if the stream or group does not exist. Return True if so.

    Called when nothing was found: a mistaken name must not look as if there were no dead letters.
    """
    groups = await dead.groups()
    stream = build_stream_key(options.stream, options.prefix)
    if groups is None:
        print_note(f"silbo: {StreamMissing(stream)}")
    elif group is not None and group not in groups:
        print_note(f"silbo: there is no group {group} at the stream {stream}")
    else:
        return False
    return True


async def list_letters(options: argparse.Namespace) -> int:
    """Print the oldest dead letters."""
    last = None
    async with _open_dead_letters(options) as dead:
        letters = _read_letters(dead, options.group, options.after, options.limit)
        if options.json:
            async for letter in letters:
                print_json(_to_fields(letter))
                last = letter.id
        elif found := [letter async for letter in letters]:
            cells = [_to_cells(letter) for letter in found]
            print_table(COLUMNS, cells, numbers=["attempts"])
            last = found[-1].id
        if last is None:
            if await _report_unknown_name(dead, options, options.group):
                return 1
            print_note("no dead letters")
        elif await dead.list(group=options.group, after=last, limit=1):
            print_note(f"there are more: --after {last}, or a greater --limit")
    return 0


async def _read_letters(
    dead: AddressLetters, group: str | None, after: str | None, limit: int
) -> AsyncGenerator[DeadLetter]:
    """Yield at most ``limit`` dead letters, read in pages."""
    while limit and (page := await dead.list(group=group, after=after, limit=min(limit, PAGE))):
        for letter in page:
            yield letter
        after, limit = page[-1].id, max(0, limit - len(page))


async def count_letters(options: argparse.Namespace) -> int:
    """Print the number of dead letters, and nothing of their messages: for an alarm."""
    async with _open_dead_letters(options) as dead:
        number = await dead.count(group=options.group)
        if not number and await _report_unknown_name(dead, options, options.group):
            return 1
    print_outcome({"dead": number}, str(number), as_json=options.json)
    return 0


async def show_letter(options: argparse.Namespace) -> int:
    """Print one dead letter with its message."""
    async with _open_dead_letters(options) as dead:
        letter = await dead.get(options.id)
        if letter is None:
            if not await _report_unknown_name(dead, options):
                print_note(f"silbo: there is no dead letter {options.id}")
            return 1
    fields = _to_fields(letter)
    if options.json:
        print_json(fields)
        return 0
    for name, value in fields.items():
        if name == "time":
            print_line(f"{name:9} {format_time(letter.time)}")
        elif name == "message" and value:
            print_as_it_is(json.dumps(value, indent=2))
        elif name == "fields":
            for field, text in letter.fields.items():
                print_line(f"{'field':9} {field}: {text}")
        elif value is not None:
            print_line(f"{name:9} {value}")
    return 0


def _to_fields(letter: DeadLetter) -> dict[str, Any]:
    message = _decode_message(letter)
    return {
        "id": letter.id,
        "group": letter.group,
        "stream": letter.stream,
        "entry": letter.entry,
        "error": _describe_error(letter),
        "attempts": letter.attempts,
        "app": letter.app,
        "consumer": letter.consumer,
        "time": letter.time,
        "message": message and message_to_fields(message),
        "raw": None if message else letter.raw.decode(errors="backslashreplace"),
        "fields": dict(letter.fields) or None,
    }


def _describe_error(letter: DeadLetter) -> str:
    """Return the letter's error; for an entry that another program wrote, that fact."""
    return f"no dead letter of silbo's: it has the fields {', '.join(letter.fields)}" if letter.fields else letter.error


def _decode_message(letter: DeadLetter) -> Message | None:
    """Return the letter's message; None if it is malformed."""
    try:
        return letter.message()
    except MessageInvalid:
        return None


def _to_cells(letter: DeadLetter) -> Sequence[object]:
    """Return the values of COLUMNS."""
    message = _decode_message(letter)
    name = message.message_name if message else None
    return letter.id, letter.group, name, format_time(letter.time), letter.attempts, _describe_error(letter)


DEAD = """\
A dead letter was sent, and a group gave it up. A dead row was never sent: `silbo outbox` has those.
"""
LIST = """\
A stream or group that does not exist is an error: a wrong name must not look like an empty list.

examples:
  silbo dead list --redis redis://localhost
  silbo dead list --group billing --json | jq -r '[.id, .error] | @tsv'
"""
COUNT = """\
For an alarm: prints nothing of the messages. A stream or group that does not exist is an error.

examples:
  test "$(silbo dead count)" = 0 || echo 'wake somebody'
  silbo dead count --group billing --json
"""
SHOW = """\
examples:
  silbo dead show 1700000000000-0
"""
RETRY = """\
A message goes back to the group that gave it up, and to no other. The group's consumers take it over
when they next look for such messages, and its attempts count from 1 again. If the stream does not
have the message's entry any more, the message can only be added anew, for every group: --everybody.

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


def add_to(silbo: Commands) -> None:
    """Add ``silbo dead`` and its commands."""
    commands = add_command_group(silbo, "dead", "messages that a group gave up: look, retry, delete", epilog=DEAD)
    parser = add_command(commands, "list", "dead letters, the oldest first", epilog=LIST, run=list_letters)
    _add_stream_options(parser)
    parser.add_argument("--group", type=parse_address, help="only those of this group")
    parser.add_argument("--limit", type=make_count_parser(1), default=50, help="how many at most (50)")
    parser.add_argument("--after", metavar="ID", type=_parse_id, help="those after this id")
    add_json_option(parser, "one JSON object for each dead letter")

    parser = add_command(commands, "count", "how many dead letters there are", epilog=COUNT, run=count_letters)
    _add_stream_options(parser)
    parser.add_argument("--group", type=parse_address, help="only those of this group")
    add_json_option(parser)

    parser = add_command(commands, "show", "all of one dead letter, its message too", epilog=SHOW, run=show_letter)
    _add_stream_options(parser)
    parser.add_argument("id", metavar="ID", type=_parse_id, help="of a dead letter")
    add_json_option(parser)

    parser = add_command(commands, "retry", "give dead letters back to their groups", epilog=RETRY, run=retry_letters)
    _add_stream_options(parser)
    parser.add_argument("ids", metavar="ID", type=_parse_id, nargs="*", help="of a dead letter")
    parser.add_argument("--group", type=parse_address, help="all of this group's dead letters")
    parser.add_argument("--all", action="store_true", help="all dead letters")
    parser.add_argument(
        "--everybody",
        action="store_true",
        help="where the entry is gone from the stream, add it anew: all groups hear it",
    )
    add_yes_option(parser)
    add_json_option(parser)

    parser = add_command(commands, "purge", "delete dead letters for good", epilog=PURGE, run=purge_letters)
    _add_stream_options(parser)
    parser.add_argument("ids", metavar="ID", type=_parse_id, nargs="*", help="of a dead letter")
    parser.add_argument("--group", type=parse_address, help="those of this group; all of them without --before")
    parser.add_argument("--before", metavar="TIME", type=parse_time, help="those from before then: 30d, or now for all")
    add_yes_option(parser)
    add_json_option(parser)


def _add_stream_options(parser: argparse.ArgumentParser) -> None:
    add_redis_options(parser)
    parser.add_argument(
        "--stream", type=parse_address, default="events", help="the stream's address; with shards, of all (events)"
    )
    add_format_option(parser)


def _parse_id(text: str) -> str:
    if is_letter_id(text):
        return text
    try:
        UUID(text)
    except ValueError:
        hint = "as 1700000000000-0"
    else:
        hint = f"it is an event's; silbo why {text} tells its dead letters"
    raise argparse.ArgumentTypeError(f"{text!r} is no id of a dead letter: {hint}")


# -- to mend ------------------------------------------------------------------------------------------------


async def retry_letters(options: argparse.Namespace) -> int:
    """Give messages back to their groups: by id, of one group, or all."""
    if [bool(options.ids), bool(options.group), options.all].count(True) != 1:
        raise UsageError("which dead letters? Give their ids, --group or --all")
    async with _open_dead_letters(options) as dead:
        total = len(options.ids) or await dead.count(group=options.group)
        what = format_count(total, "dead letter") + (f" of {options.group}" if options.group else "")
        to = (
            "to their groups, or, where their entries are gone, to every group" if options.everybody else "to the group"
        )
        if not (options.ids and not options.everybody) and not confirm(f"Give {what} back {to}?", yes=options.yes):
            return 1
        with show_progress("retry", total) as update:
            outcome = await dead.retry(
                options.ids or None, group=options.group, everybody=options.everybody, progress=update
            )
        is_unknown = not outcome.returned and await _report_unknown_name(dead, options, options.group)
    fields = {"returned": outcome.returned, "failed": outcome.failed}
    print_outcome(fields, f"{format_count(outcome.returned, 'dead letter')} given back", as_json=options.json)
    for letter, why in outcome.failed.items():
        print_note(f"silbo: {letter}: {why}")
    return 1 if outcome.failed or is_unknown else 0


async def purge_letters(options: argparse.Namespace) -> int:
    """Delete dead letters: by id; or of one group, or before a time, or both."""
    if bool(options.ids) == bool(options.group or options.before is not None):
        raise UsageError("which dead letters? Give their ids, or --group, or --before")
    ids = list(dict.fromkeys(options.ids))
    what = format_count(len(ids), "dead letter") if ids else "all dead letters"
    what += f" of {options.group}" if options.group else ""
    async with _open_dead_letters(options) as dead:
        before = None
        if options.before is not None:
            before = find_moment(options.before, await dead.read_clock())
            what += f" from before {format_time(before)}"
        if not confirm(f"Delete {what} for good?", yes=options.yes):
            return 1
        with show_progress("purge", len(ids) or None) as update:
            done = await dead.purge(ids or None, group=options.group, before=before, progress=update)
        is_unknown = not done and await _report_unknown_name(dead, options, options.group)
    print_outcome({"purged": done}, f"{format_count(done, 'dead letter')} deleted", as_json=options.json)
    if done < len(ids) and not is_unknown:
        print_note(f"silbo: {explain_missing(ids, done, 'dead letter')}")
    return 1 if done < len(ids) or is_unknown else 0
