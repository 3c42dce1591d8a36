"""``silbo why``: its arguments, and showing the whereabouts of one event."""

from __future__ import annotations

import argparse
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

from silbo._process import find_process
from silbo.brokers.redis.dead_letters import RETRY_CONSUMER, is_letter_id
from silbo.cli.arguments import (
    FORMATS,
    Commands,
    add_command,
    add_format_option,
    add_json_option,
    add_redis_options,
    add_store_option,
    add_stream_option,
    parse_time,
)
from silbo.cli.away import AwayNodes, away_to_fields, show_away
from silbo.cli.connect import find_redis_moment, make_redis, open_store
from silbo.cli.output import print_json, print_line, print_note
from silbo.cli.rich_output import print_table, show_progress
from silbo.operations.formatting import format_age, format_count, format_time, process_to_fields
from silbo.operations.why import FoundEntry, PlaceInGroup, Whereabouts, find_event, find_event_id, time_of_event
from silbo.outbox.rows import OutboxStore, Row

__all__ = ["add_to"]

COLUMNS: Final = ("where", "is", "since", "with", "attempts", "error")

EPILOG = """\
Looks into the outbox (with --store), the streams, their groups and their dead letters. An id that
silbo made begins with its time, and so is found at once; for another one the stream is searched
from its end, some seconds for a million messages: --since shortens that. The id of an entry or of
a dead letter, as `silbo doctor`, `silbo groups`, `silbo dead list` and the log show it, does as well.

waiting       the group was not given it yet
in hand       a consumer of the group has it: it waits its turn, its listeners run, or an attempt
              failed and the next one is due
dead letter   the group gave it up: `silbo dead show ID` has its message
acknowledged  the group is done with it; or the group is younger than the message

waits for a newer version
              no consumer of the group knows its version, or that of one of its key before it

examples:
  silbo why 01976c3e-5f0a-7c4e-8f14-46d3a8aa17b3 --store outbox.db --redis redis://localhost
  silbo why 01976c3e-5f0a-7c4e-8f14-46d3a8aa17b3 --prefix shop --json
  silbo why 1772875562588-0
"""


def add_to(commands: Commands) -> None:
    """Add ``silbo why`` to the commands."""
    parser = add_command(
        commands, "why", "where an event is, or what became of it, by its id", epilog=EPILOG, run=show_whereabouts
    )
    parser.add_argument(
        "event_id",
        metavar="ID",
        type=_parse_id,
        help="the event's event_id, a UUID; or an entry's id, as 1700000000000-0",
    )
    add_store_option(parser)
    add_redis_options(parser)
    add_stream_option(parser)
    parser.add_argument(
        "--since", metavar="TIME", type=parse_time, help="search streams from then on: 2026-03-07T09:26Z, or 1h"
    )
    add_format_option(parser)
    add_json_option(parser)


def _parse_id(text: str) -> str:
    if is_letter_id(text):
        return text
    try:
        return str(UUID(text))
    except ValueError:
        problem = f"{text!r} is no id of an event: a UUID, as 01976c3e-5f0a-7c4e-8f14-46d3a8aa17b3; or of an entry: 1700000000000-0"
        raise argparse.ArgumentTypeError(problem) from None


async def show_whereabouts(options: argparse.Namespace) -> int:
    """Print where an event is."""
    away = AwayNodes()
    async with (
        make_redis(options) as client,
        _open_store_or_none(options.store) as store,
    ):
        event_id: str | None = options.event_id
        if is_letter_id(options.event_id):
            event_id = await find_event_id(
                client,
                options.event_id,
                prefix=options.prefix,
                stream=options.stream,
                format=FORMATS[options.format],
                on_away=away,
            )
        if event_id is None:
            print_note(f"silbo: no stream and no dead letters have an entry {options.event_id} that can be read")
            _ = away.show(as_json=options.json)
            return 1
        with show_progress("search") as update:
            found = await find_event(
                client,
                event_id,
                store=store,
                prefix=options.prefix,
                stream=options.stream,
                format=FORMATS[options.format],
                since=None if options.since is None else await find_redis_moment(client, options.since),
                progress=update,
            )
    if options.json:
        print_json(_to_fields(found))
    elif found.is_found:
        _print_whereabouts(found)
    if not found.is_found:
        print_note(_explain_nothing(found, asked_outbox=bool(options.store)))
    code = show_away(found.away)
    return code if found.is_found else 1


@asynccontextmanager
async def _open_store_or_none(url: str | None) -> AsyncGenerator[OutboxStore | None]:
    """Open the store of a URL; None without one."""
    if not url:
        yield None
        return
    async with open_store(url) as store:
        yield store


def _explain_nothing(found: Whereabouts, *, asked_outbox: bool) -> str:
    began_at = time_of_event(found.event_id)
    age = f", which was made {format_age(began_at, _now(found))} ago, {format_time(began_at)}," if began_at else ""
    outbox = "is in no outbox that was asked, " if asked_outbox else "may be in an outbox (--store asks it), "
    many = format_count(found.searched, "entry").replace("entrys", "entries")
    span = (
        f"since {format_time(found.searched_since)}" if found.searched_since else "from the newest back to the oldest"
    )
    where = f"the {many} of {', '.join(found.streams)} {span}"
    return (
        f"silbo: {found.event_id}{age} {outbox}and is not among {where}: "
        "it was not sent, or the retention removed it; or it went to another prefix"
    )


def _print_whereabouts(found: Whereabouts) -> None:
    names = {row.message.message_name for row in found.rows} | {entry.name for entry in found.entries}
    began_at = time_of_event(found.event_id)
    print_line(f"{found.event_id} {', '.join(sorted(filter(None, names)))}".rstrip())
    if began_at is not None:
        print_line(f"made {format_time(began_at)}, {format_age(began_at, _now(found))} ago")
    print_line("")
    cells: list[Sequence[object]] = [_row_to_cells(row) for row in found.rows]
    shown = set()
    for entry in found.entries:
        cells.append((entry.stream, entry.entry, format_time(entry.added_at), None, None, None))
        for place in entry.groups:
            cells.append(_place_to_cells(place, _now(found)))
            shown.add(place.letter)
    for letter in found.letters:
        if letter.id not in shown:
            where = f"{letter.stream}, group {letter.group}"  # whose entry is gone
            cells.append(
                (
                    where,
                    f"dead letter {letter.id}",
                    format_time(letter.time),
                    _describe(letter.consumer),
                    letter.attempts,
                    letter.error,
                )
            )
    print_table(COLUMNS, cells, numbers=["attempts"])


def _now(found: Whereabouts) -> datetime:
    """Return the time at which it was read; by this machine's clock where Redis was not asked."""
    return found.read_at or datetime.now(UTC)


def _row_to_cells(row: Row) -> Sequence[object]:
    by = _describe(row.owner) if row.owner else None
    return f"outbox, row {row.id}", row.state, format_time(row.state_at), by, row.attempts, row.error


def _place_to_cells(place: PlaceInGroup, now: datetime) -> Sequence[object]:
    where = f"  group {place.group}"
    if place.state == "in hand":
        if place.consumer == RETRY_CONSUMER.decode():
            return where, "given back", None, "the next consumer", place.attempts, place.error
        if place.hanging_since:
            age = f"in work for {format_age(place.hanging_since, now)}: a listener may hang"
            return where, "in hand", age, _describe(place.consumer or ""), place.attempts, place.error
        sign = f"last sign {format_age(place.kept_at, now)} ago" if place.kept_at else ""
        return where, "in hand", sign, _describe(place.consumer or ""), place.attempts, place.error
    if place.state == "newer" and place.left_at:
        since = f"{format_time(place.left_at)}, {format_age(place.left_at, now)} ago"
        return where, "waits for a newer version", since, "a newer consumer", None, None
    if place.state == "dead":
        return where, f"dead letter {place.letter}", None, _describe(place.consumer or ""), place.attempts, place.error
    if place.state == "waiting":
        return where, f"waiting behind {place.behind:,}" if place.behind else "waiting", None, None, None, None
    return where, "acknowledged", None, None, None, None


def _describe(name: str) -> str:
    """Return the host and the pid in the name of a consumer or a relay; the name where it tells none."""
    process = find_process(name)
    return f"{process.host}, pid {process.pid}" if process else name


# -- for programs -------------------------------------------------------------------------------------------


def _to_fields(found: Whereabouts) -> dict[str, Any]:
    return {
        "event_id": found.event_id,
        "made_at": time_of_event(found.event_id),
        "outbox": [
            {
                "row": row.id,
                "state": row.state,
                "since": row.state_at,
                "attempts": row.attempts,
                "error": row.error,
                "owner": row.owner,
                "next_attempt_at": row.next_attempt_at,
            }
            for row in found.rows
        ],
        "entries": [_entry_to_fields(entry) for entry in found.entries],
        "dead": [
            {
                "id": letter.id,
                "group": letter.group,
                "stream": letter.stream,
                "entry": letter.entry,
                "error": letter.error,
                "attempts": letter.attempts,
                "consumer": letter.consumer,
                "time": letter.time,
            }
            for letter in found.letters
        ],
        "searched": {"streams": found.streams, "entries": found.searched, "since": found.searched_since},
        "away": away_to_fields(found.away),
    }


def _entry_to_fields(entry: FoundEntry) -> dict[str, Any]:
    return {
        "stream": entry.stream,
        "entry": entry.entry,
        "added_at": entry.added_at,
        "event": entry.name,
        "groups": [
            {
                "group": place.group,
                "state": place.state,
                "consumer": place.consumer,
                **process_to_fields(place.consumer or ""),
                "kept_at": place.kept_at,
                "attempts": place.attempts,
                "error": place.error,
                "letter": place.letter,
                "left_at": place.left_at,
                "hanging_since": place.hanging_since,
                "behind": place.behind,
            }
            for place in entry.groups
        ],
    }
