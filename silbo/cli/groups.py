"""``silbo groups``: its arguments, and showing the groups of streams."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, Final

from silbo.cli.arguments import (
    Commands,
    UsageError,
    add_command,
    add_json_option,
    add_redis_options,
    parse_address,
    parse_positive_seconds,
)
from silbo.cli.away import AwayNodes
from silbo.cli.connect import make_redis
from silbo.cli.output import print_json, print_line, print_note
from silbo.cli.rich_output import print_table
from silbo.operations.formatting import format_age, format_count
from silbo.operations.groups import SILENT_AFTER, ConsumerStatus, GroupStatus, describe_desertion, read_groups

__all__ = ["add_silent_option", "add_to", "describe_trouble", "format_consumers", "group_to_fields"]

GROUPS: Final = ("stream", "group", "lag", "in hand", "retrying", "dead letters", "consumers", "oldest in hand")
CONSUMERS: Final = ("stream", "group", "host", "pid", "consumer", "in hand", "last sign")

EPILOG = """\
lag           messages that the group was not given yet
in hand       messages that its consumers were given and have not acknowledged
retrying      those of them for which an attempt has failed
dead letters  messages that it gave up: `silbo dead list --group GROUP` says why

A consumer gives a sign at least every 10 seconds (a third of its claim_after); after 30 seconds
of silence (claim_after) the group's other consumers take over what it has in hand. A stream that
does not exist is an error.

examples:
  silbo groups --redis redis://localhost
  silbo groups orders --prefix shop
  silbo groups --json | jq -c 'select(.lag > 1000) | [.group, .lag]'
"""


def add_to(commands: Commands) -> None:
    """Add ``silbo groups`` to the commands."""
    parser = add_command(
        commands, "groups", "how far each group is, and who its consumers are", epilog=EPILOG, run=show_groups
    )
    parser.add_argument(
        "stream",
        metavar="STREAM",
        nargs="?",
        type=parse_address,
        help="a stream's address, as events or orders (all streams under the prefix)",
    )
    add_redis_options(parser)
    parser.add_argument(
        "--stream", dest="named", type=parse_address, help="the same as STREAM, as other commands have it"
    )
    add_silent_option(parser)
    add_json_option(parser, "one JSON object for each group")


def add_silent_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--silent-after``: when a consumer counts as silent."""
    parser.add_argument(
        "--silent-after",
        metavar="TIME",
        type=parse_positive_seconds,
        default=SILENT_AFTER,
        help="a consumer without a sign for so long is silent; the claim_after of the groups (30s)",
    )


def _choose_stream(options: argparse.Namespace) -> str | None:
    if options.stream and options.named and options.stream != options.named:
        raise UsageError(f"which stream? {options.stream}, or --stream {options.named}: give one of them")
    chosen: str | None = options.stream or options.named
    return chosen


async def show_groups(options: argparse.Namespace) -> int:
    """Print the groups of a stream, or of all."""
    away = AwayNodes()
    async with make_redis(options) as client:
        groups = await read_groups(
            client,
            prefix=options.prefix,
            stream=_choose_stream(options),
            silent_after=options.silent_after,
            on_away=away,
        )
    if options.json:
        for group in groups:
            print_json(group_to_fields(group))
    elif groups:
        _print_groups(groups)
    if not groups:
        print_note("no groups: no consumer has been there yet")
    return away.show(as_json=options.json)


def group_to_fields(group: GroupStatus) -> dict[str, Any]:
    """Return the fields of a group, for JSON."""
    oldest, newer, hanging = group.oldest, group.newer, group.hanging
    return {
        "stream": group.stream,
        "group": group.group,
        "lag": group.lag,
        "lag_is_at_least": group.lag_is_at_least,
        "waiting_since": group.waiting_since,
        "in_hand": group.in_hand,
        "oldest": oldest
        and {
            "entry": oldest.entry,
            "added_at": oldest.added_at,
            "consumer": oldest.consumer,
            "kept_at": oldest.kept_at,
            "attempts": oldest.attempts,
            "error": oldest.error,
        },
        "retrying": group.retrying,
        "newer": newer
        and {
            "count": newer.count,
            "entry": newer.entry,
            "since": newer.since,
            "event": newer.name,
            "version": newer.version,
        },
        "hanging": hanging
        and {
            "entry": hanging.entry,
            "since": hanging.since,
            "consumer": hanging.consumer,
            "host": hanging.process and hanging.process.host,
            "pid": hanging.process and hanging.process.pid,
        },
        "dead": group.dead,
        "deserted": group.is_deserted,
        "consumers": [_consumer_to_fields(consumer) for consumer in group.consumers],
    }


def _consumer_to_fields(consumer: ConsumerStatus) -> dict[str, Any]:
    host, pid = consumer.process or (None, None)
    return {
        "consumer": consumer.name,
        "host": host,
        "pid": pid,
        "in_hand": consumer.in_hand,
        "seen_at": consumer.seen_at,
        "silent": consumer.is_silent,
        "epoch": consumer.epoch,
        "name_taken_twice": [{"host": host, "pid": pid} for host, pid in consumer.name_taken_twice],
    }


def _print_groups(groups: Sequence[GroupStatus]) -> None:
    numbers = ["lag", "in hand", "retrying", "dead letters", "consumers", "pid"]
    print_table(GROUPS, map(_to_cells, groups), numbers=numbers)
    consumers = [(group, consumer) for group in groups for consumer in group.consumers]
    if consumers:
        print_line("")
        print_table(CONSUMERS, [_to_consumer_cells(*each) for each in consumers], numbers=numbers)
    for group, consumer in consumers:
        if consumer.name_taken_twice:
            print_line(_warn_of_twins(group, consumer))
    for remark in filter(None, map(describe_trouble, groups)):
        print_line(remark)


def _warn_of_twins(group: GroupStatus, consumer: ConsumerStatus) -> str:
    who = " and ".join(f"{host}, pid {pid}" for host, pid in consumer.name_taken_twice)
    return (
        f"{group.group} at {group.stream}: two live consumers have the name {consumer.name}, at {who}: messages are handled "
        "twice; give each process a name of its own in group(consumer=), or no name"
    )


def _to_cells(group: GroupStatus) -> Sequence[object]:
    """Return the values of GROUPS."""
    lag = f"{group.lag:,}{' or more' if group.lag_is_at_least else ''}"
    if group.waiting_since is not None and group.lag:
        lag += f", for {format_age(group.waiting_since, group.read_at)}"
    oldest = group.oldest and f"{group.oldest.entry}, {format_age(group.oldest.added_at, group.read_at)}"
    if group.oldest and group.oldest.attempts:
        oldest = f"{oldest}, {format_count(group.oldest.attempts, 'attempt')}"
    consumers = format_consumers(group)
    return group.stream, group.group, lag, f"{group.in_hand:,}", group.retrying, group.dead, consumers, oldest


def format_consumers(group: GroupStatus) -> str:
    """Return the number of a group's live consumers: ``3``; or ``2 of 3`` if one is silent."""
    live = sum(not consumer.is_silent for consumer in group.consumers)
    return f"{live} of {len(group.consumers)}" if live < len(group.consumers) else str(live)


def _to_consumer_cells(group: GroupStatus, consumer: ConsumerStatus) -> Sequence[object]:
    """Return the values of CONSUMERS."""
    host, pid = consumer.process or (None, None)
    sign = f"{format_age(consumer.seen_at, group.read_at)} ago{', silent' if consumer.is_silent else ''}"
    return group.stream, group.group, host, pid, consumer.name, f"{consumer.in_hand:,}", sign


def describe_trouble(group: GroupStatus) -> str | None:
    """Return a line about a group that stands still, or whose oldest message fails; None for one that is well."""
    if group.is_deserted and (group.lag or group.in_hand):
        waits = format_count(group.lag + group.in_hand, "message")
        return f"{group.group} at {group.stream}: {describe_desertion(group)}, and {waits} {'waits' if waits[:2] == '1 ' else 'wait'}"
    if group.newer:
        waits = format_count(group.newer.count, "message")
        age = format_age(group.newer.since, group.read_at)
        return f"{group.group} at {group.stream}: {waits} in hand {'waits' if group.newer.count == 1 else 'wait'} for {group.newer.wanted}, the first for {age}; it becomes a dead letter after its consumer's newer_version_wait: deploy the newer consumers"
    if hanging := group.hanging:
        age = format_age(hanging.since, group.read_at)
        return f"{group.group} at {group.stream}: {hanging.entry} is in work for {age} at {hanging.where}: does a listener hang? Its log names the listener"
    if group.oldest and group.oldest.error:
        oldest = group.oldest
        tried = format_count(oldest.attempts, "attempt")
        return f"{group.group} at {group.stream}: {oldest.entry} at {oldest.consumer}, {tried}, the last failed: {oldest.error}"
    return None
