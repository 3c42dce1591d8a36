"""``silbo rewind``: its arguments, and giving a group its messages again."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from silbo.cli.arguments import (
    Commands,
    add_command,
    add_json_option,
    add_redis_options,
    add_stream_option,
    parse_address,
    parse_time,
)
from silbo.cli.confirmation import add_yes_option, confirm
from silbo.cli.connect import find_redis_moment, make_redis
from silbo.cli.groups import add_silent_option
from silbo.cli.output import print_note, print_outcome
from silbo.operations.formatting import format_count, format_time
from silbo.operations.rewind import find_rewinds, rewind_group

__all__ = ["add_to"]

EPILOG = """\
The group's next consumers are given again what was added since TIME and the stream still has; other
groups are not affected. While a consumer of the group lives, nothing is done: stop them first. A RedisInbox
or a SQLAlchemyInbox skips the messages that it remembers, so only the others are handled again.

Exit code 1 if nothing comes again.

examples:
  silbo rewind billing --since 2h
  silbo rewind billing --since 2026-03-07T09:00Z --stream orders --yes
"""


def add_to(commands: Commands) -> None:
    """Add ``silbo rewind`` to the commands."""
    parser = add_command(commands, "rewind", "give one group its messages again", epilog=EPILOG, run=rewind)
    parser.add_argument("group", metavar="GROUP", type=parse_address, help="the group")
    parser.add_argument(
        "--since", metavar="TIME", type=parse_time, required=True, help="2026-03-07T09:26Z, or 1h for an hour ago"
    )
    add_redis_options(parser)
    add_stream_option(parser)
    add_silent_option(parser)
    add_yes_option(parser)
    add_json_option(parser, "one JSON object for each stream")


async def rewind(options: argparse.Namespace) -> int:
    """Give a group its messages again, if the user agrees."""
    group: str = options.group
    async with make_redis(options) as client:
        since = await find_redis_moment(client, options.since)
        found = await find_rewinds(
            client,
            group,
            since,
            prefix=options.prefix,
            stream=options.stream,
            silent_after=options.silent_after,
        )
        if not found:
            print_note(f"silbo: nothing comes again: {group} was given no message since {format_time(since)}")
            return 1
        total = format_count(sum(each.messages for each in found), "message")
        what = f"Give {group} {total} again, all since {format_time(since)}?"
        if not confirm(f"{what} An inbox skips those that it remembers.", yes=options.yes):
            return 1
        await rewind_group(client, found, silent_after=options.silent_after)
    for each in found:
        count = format_count(each.messages, "message")
        text = f"{group} at {each.stream}: {count} again, from {each.first} on"
        print_outcome(asdict(each), text, as_json=options.json)
    return 0
