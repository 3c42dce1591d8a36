"""``silbo tail``: its arguments, and showing messages as they come."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from datetime import UTC
from typing import Any, Final

from silbo._control_characters import escape_controls
from silbo.brokers.redis.dead_letters import is_letter_id
from silbo.cli.arguments import (
    FORMATS,
    Commands,
    Time,
    UsageError,
    add_command,
    add_format_option,
    add_json_option,
    add_redis_options,
    add_stream_option,
    make_count_parser,
    parse_time,
)
from silbo.cli.connect import find_redis_moment, make_redis
from silbo.cli.output import print_as_it_is, print_json, print_note
from silbo.errors import BrokerUnavailable, Gap, NameInvalid
from silbo.names import compile_pattern
from silbo.operations.formatting import message_to_fields
from silbo.operations.tail import SeenMessage, follow_pubsub, follow_streams, has_values

__all__ = ["add_to"]

DIM: Final = "2"
"""The style of everything that is not the message itself, at a terminal."""
COLOURS: Final = ("36", "33", "32", "35", "34", "31")
"""The colours of event names, as terminals number them; each name keeps its own."""

EPILOG = """\
Runs until Ctrl-C. It reads beside the groups and takes nothing from them. Without --since it begins
with what comes next.

examples:
  silbo tail
  silbo tail 'order.*' --where order=7 --since 1h
  silbo tail --stream orders --since 1772875562588-0 --limit 10 --json
  silbo tail 'user.**' --pubsub
"""


def add_to(commands: Commands) -> None:
    """Add ``silbo tail`` to the commands."""
    parser = add_command(commands, "tail", "messages as they come", epilog=EPILOG, run=show_messages)
    parser.add_argument(
        "pattern",
        metavar="PATTERN",
        nargs="?",
        default="**",
        type=_parse_pattern,
        help="an event name or a pattern: user.joined, 'user.*', 'user.**' (all)",
    )
    add_redis_options(parser)
    add_stream_option(parser)
    parser.add_argument("--pubsub", action="store_true", help="messages of Pub/Sub in place of streams")
    parser.add_argument(
        "--since",
        metavar="TIME|ID",
        type=_parse_since,
        help="first those from a time on (2026-03-07T09:26Z, 1h), or after an entry's id",
    )
    parser.add_argument(
        "--where",
        metavar="FIELD=VALUE",
        type=_parse_condition,
        action="append",
        default=[],
        help="only messages with this value in their payload: user_id=7, order.state=paid; may be given again",
    )
    parser.add_argument("--limit", type=make_count_parser(1), help="end after so many messages")
    add_format_option(parser)
    add_json_option(parser, "one JSON object for each message")


def _parse_pattern(text: str) -> str:
    try:
        compile_pattern(text)
    except NameInvalid as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _parse_since(text: str) -> Time | str:
    return text if is_letter_id(text) else parse_time(text)


def _parse_condition(text: str) -> tuple[Sequence[str], str]:
    path, is_there, value = text.partition("=")
    if not (path and is_there):
        raise argparse.ArgumentTypeError(f"{text!r} is no condition: write user_id=7, or order.state=paid")
    return tuple(path.split(".")), value


async def show_messages(options: argparse.Namespace) -> int:
    """Print messages until Ctrl-C, or so many as were asked for."""
    if options.pubsub and (options.since or options.stream):
        raise UsageError("Pub/Sub keeps nothing and has no streams: leave out --since and --stream")
    wanted, left = dict(options.where), options.limit
    format = FORMATS[options.format]  # noqa: A001  # the word of every broker
    async with make_redis(options) as client:
        if options.pubsub:
            following = follow_pubsub(
                client, options.pattern, prefix=options.prefix, format=format, on_outage=_tell, on_gap=_tell
            )
        else:
            since = options.since
            if since is not None and not isinstance(since, str):
                since = await find_redis_moment(client, since)
            following = follow_streams(
                client,
                options.pattern,
                prefix=options.prefix,
                stream=options.stream,
                since=since,
                format=format,
                on_outage=_tell,
            )
        async with aclosing(following):
            async for seen in following:
                if wanted and not has_values(seen.message, wanted):
                    continue
                print_json(_to_fields(seen)) if options.json else _print_message(seen)
                left = None if left is None else left - 1
                if left == 0:
                    break
    return 0


def _tell(trouble: BrokerUnavailable | Gap) -> None:
    print_note(f"silbo: {trouble}")


def _to_fields(seen: SeenMessage) -> Mapping[str, Any]:
    return {
        "address": seen.address,
        "entry": seen.entry,
        "at": seen.at,
        "message": seen.message and message_to_fields(seen.message),
        "raw": None if seen.message else seen.raw.decode(errors="backslashreplace"),
    }


def _print_message(seen: SeenMessage) -> None:
    when = f"{seen.at.astimezone(UTC):%Y-%m-%d %H:%M:%S}.{seen.at.microsecond // 1000:03}Z"
    where = f"{when} {seen.address}{f' {seen.entry}' if seen.entry else ''}"
    if seen.message is None:
        name, rest = "(no message)", seen.raw.decode(errors="backslashreplace")
    else:
        name, rest = seen.message.message_name, json.dumps(seen.message.payload, ensure_ascii=False)
        rest = f"{rest} id={seen.message.message_id}"
        if seen.message.key is not None:
            rest += f" key={seen.message.key}"
    where, name, rest = map(escape_controls, (where, name, rest))
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        colour = COLOURS[sum(name.encode()) % len(COLOURS)]
        where, name = f"\x1b[{DIM}m{where}\x1b[0m", f"\x1b[{colour}m{name}\x1b[0m"
    print_as_it_is(f"{where} {name} {rest}")
