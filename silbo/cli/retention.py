"""``silbo retention show | set``: their arguments, and carrying them out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, Final, get_args

from silbo.brokers.redis.connection import Client
from silbo.brokers.redis.retention import WEEK, RetentionPolicy, Trim
from silbo.cli.arguments import (
    Commands,
    UsageError,
    add_command,
    add_command_group,
    add_json_option,
    add_redis_options,
    add_stream_option,
    make_count_parser,
    parse_address,
    parse_retention,
    parse_seconds,
    parse_size,
)
from silbo.cli.away import AwayNodes
from silbo.cli.confirmation import add_yes_option, confirm
from silbo.cli.connect import make_redis
from silbo.cli.output import print_json, print_outcome
from silbo.cli.rich_output import print_table
from silbo.errors import StreamMissing
from silbo.operations.formatting import format_size
from silbo.operations.retention import StreamRetention, read_retentions, set_retention

__all__ = ["add_to"]

COLUMNS: Final = ("stream", "policy", "before", "messages", "memory")

RETENTION = """\
The policy is kept beside each stream, and holds for all programs. A program that states another one, in
RedisStreams(retain=, trim=, ...), can't publish there.
"""
SHOW = """\
examples:
  silbo retention show --redis redis://localhost
  silbo retention show --stream orders --json
"""
SET = """\
Sets the whole policy: what is not said is as without it. Programs that run go by the new policy within ten
seconds; those that state the one before may go on, and be started again. So first set it, then change
the programs, and do so before the next change.

examples:
  silbo retention set --trim acknowledged --retain 7d --keep-at-least 10m
  silbo retention set --stream orders --retain 1d --max-bytes 500mb
  silbo retention set --stream invoices --retain 30d --new
"""


def add_to(silbo: Commands) -> None:
    """Add ``silbo retention`` and its commands."""
    commands = add_command_group(silbo, "retention", "how long streams keep messages: look, change", epilog=RETENTION)
    parser = add_command(commands, "show", "the policy of each stream, and its size", epilog=SHOW, run=show_policies)
    add_redis_options(parser)
    add_stream_option(parser)
    add_json_option(parser, "one JSON object for each stream")

    parser = add_command(commands, "set", "change the policy of a stream", epilog=SET, run=set_policy)
    add_redis_options(parser)
    parser.add_argument(
        "--stream", type=parse_address, default="events", help="the stream's address; with shards, of all (events)"
    )
    parser.add_argument(
        "--retain", metavar="TIME", type=parse_retention, default=WEEK, help="what is older goes, or forever (7d)"
    )
    parser.add_argument(
        "--trim",
        choices=get_args(Trim),
        default="age",
        help="acknowledged: also what all groups have acknowledged (age)",
    )
    parser.add_argument(
        "--keep-at-least",
        metavar="TIME",
        type=parse_seconds,
        default=0.0,
        help="keep what is acknowledged so long (0s)",
    )
    parser.add_argument("--max-bytes", metavar="SIZE", type=parse_size, help="the most memory, as 500mb (any)")
    parser.add_argument("--max-messages", metavar="N", type=make_count_parser(1), help="the most messages (any)")
    parser.add_argument(
        "--new", action="store_true", help="the stream may not exist yet: it has the policy from the first on"
    )
    add_yes_option(parser)
    add_json_option(parser, "one JSON object for each stream")


async def show_policies(options: argparse.Namespace) -> int:
    """Print the policy of each stream."""
    away = AwayNodes()
    async with make_redis(options) as client:
        found = await read_retentions(client, prefix=options.prefix, stream=options.stream, on_away=away)
    if options.json:
        for each in found:
            print_json(_to_fields(each))
    else:
        print_table(COLUMNS, map(_to_cells, found), numbers=["messages", "memory"])
    return away.show(as_json=options.json)


async def set_policy(options: argparse.Namespace) -> int:
    """Change the policy of a stream, if the user agrees."""
    try:
        policy = RetentionPolicy(
            retain=options.retain,
            trim=options.trim,
            keep_at_least=options.keep_at_least,
            max_bytes=options.max_bytes,
            max_messages=options.max_messages,
        )
    except ValueError as error:
        raise UsageError(str(error)) from None
    address = f"{options.prefix}:{{{options.stream}}}"
    async with make_redis(options) as client:
        kept = {str(each.policy) for each in await _read_kept(client, options) if each.policy}
        before = f" It was {' and '.join(sorted(kept))}." if kept else ""
        question = f"Keep the messages of {address} by {policy}?{before} What it does not keep is deleted."
        if not confirm(question, yes=options.yes):
            return 1
        found = await set_retention(client, policy, prefix=options.prefix, stream=options.stream)
    for each in found:
        fields = {"stream": each.stream, "policy": _policy_to_fields(policy), "before": _policy_to_fields(each.policy)}
        before = "there was none" if each.policy is None else f"it was {each.policy}"
        print_outcome(fields, f"{each.stream}: {policy} ({before})", as_json=options.json)
    return 0


async def _read_kept(client: Client, options: argparse.Namespace) -> Sequence[StreamRetention]:
    """Return the stream, or its shards, as they are; nothing of one that is said to be new.

    Raises:
        StreamMissing: there is no such stream, and it is not said to be new.
    """
    try:
        return await read_retentions(client, prefix=options.prefix, stream=options.stream)
    except StreamMissing:
        if options.new:
            return ()
        raise


def _to_fields(found: StreamRetention) -> dict[str, Any]:
    return {
        "stream": found.stream,
        "policy": _policy_to_fields(found.policy),
        "before": _policy_to_fields(found.before),
        "messages": found.messages,
        "size": found.size,
    }


def _policy_to_fields(policy: RetentionPolicy | None) -> dict[str, Any] | None:
    if policy is None:
        return None
    return {
        "retain": policy.retain,
        "trim": policy.trim,
        "keep_at_least": policy.keep_at_least,
        "max_bytes": policy.max_bytes,
        "max_messages": policy.max_messages,
    }


def _to_cells(found: StreamRetention) -> tuple[object, ...]:
    """Return the values of COLUMNS."""
    size = None if found.size is None else format_size(found.size)
    policy = found.policy or "none: by each program's retain"
    return found.stream, str(policy), found.before and str(found.before), f"{found.messages:,}", size
