"""``silbo outbox status | retry | replay | purge``: their arguments, and carrying them out."""

from __future__ import annotations

import argparse
from collections.abc import AsyncGenerator, Sequence
from datetime import datetime
from typing import Any, Final

from silbo._process import find_process
from silbo.cli.arguments import (
    Commands,
    UsageError,
    add_command,
    add_command_group,
    add_json_option,
    add_store_option,
    find_moment,
    make_count_parser,
    parse_time,
)
from silbo.cli.confirmation import add_yes_option, confirm
from silbo.cli.connect import open_store
from silbo.cli.output import print_json, print_line, print_note, print_outcome
from silbo.cli.rich_output import print_table, show_progress
from silbo.operations.failing import count_failed, find_failing
from silbo.operations.formatting import (
    explain_missing,
    format_age,
    format_count,
    format_size,
    format_time,
    message_to_fields,
    process_to_fields,
)
from silbo.outbox.outbox import STEP, repeat_step, retry_in_steps
from silbo.outbox.rows import STATES, Lead, OutboxStatus, OutboxStore, Row, State

__all__ = ["add_to"]

COLUMNS: Final = ("id", "event", "key", "since", "attempts", "error")
PAGE: Final = 1000
"""Rows that are read with one call."""

OUTBOX = """\
A dead row was never sent: the broker refused it for good. A dead letter was sent, and a group gave it up:
`silbo dead` has those.
"""
STATUS = """\
examples:
  silbo outbox status --store outbox.db
  silbo outbox status --rows dead                   the rows that were refused, and why
  silbo outbox status --rows pending --json | jq .error
"""
RETRY = """\
A row is dead if its message was refused for good: too large, or not writable in the format.
Retried rows are sent after the rows that wait already.

examples:
  silbo outbox retry 17 18
  silbo outbox retry --all --yes
"""
REPLAY = """\
For a Redis that came back from an older state. Messages that it still has come a second time; an
inbox recognises them. Only rows that are still kept (silbo relay --keep-sent) can be sent again.

examples:
  silbo outbox replay --since 2h
  silbo outbox replay --since 2026-03-07T09:00Z --before 2026-03-07T09:30Z --yes
"""
PURGE = """\
examples:
  silbo outbox purge dead --before 7d
  silbo outbox purge sent --before now --yes
"""


def add_to(silbo: Commands) -> None:
    """Add ``silbo outbox`` and its commands."""
    commands = add_command_group(
        silbo, "outbox", "what an outbox has stored, sent or could not send: look, mend", epilog=OUTBOX
    )
    parser = add_command(
        commands, "status", "rows in each state, who leads, what fails", epilog=STATUS, run=show_status
    )
    add_store_option(parser)
    parser.add_argument("--rows", metavar="STATE", choices=STATES, help=f"list rows instead: {', '.join(STATES)}")
    parser.add_argument("--limit", type=make_count_parser(1), default=50, help="how many rows at most (50)")
    parser.add_argument("--after", metavar="ID", type=make_count_parser(0), default=0, help="those after this id")
    add_json_option(parser, "one JSON object, with --rows one for each row")

    parser = add_command(commands, "retry", "send dead rows again", epilog=RETRY, run=retry_rows)
    add_store_option(parser)
    parser.add_argument("rows", metavar="ID", type=make_count_parser(0), nargs="*", help="of a dead row")
    parser.add_argument("--all", action="store_true", help="all dead rows")
    _add_answer_options(parser)

    parser = add_command(
        commands, "replay", "send again the rows that were sent from a time on", epilog=REPLAY, run=replay_rows
    )
    add_store_option(parser)
    parser.add_argument(
        "--since", metavar="TIME", type=parse_time, required=True, help="2026-03-07T09:26Z, or 1h for an hour ago"
    )
    parser.add_argument(
        "--before", metavar="TIME", type=parse_time, help="rows that were sent from then on are not sent again (now)"
    )
    _add_answer_options(parser)

    parser = add_command(commands, "purge", "delete rows that were sent, or are dead", epilog=PURGE, run=purge_rows)
    add_store_option(parser)
    parser.add_argument("state", choices=["sent", "dead"])
    parser.add_argument(
        "--before",
        metavar="TIME",
        type=parse_time,
        required=True,
        help="in that state since before then: 7d, or now for all",
    )
    _add_answer_options(parser)


def _add_answer_options(parser: argparse.ArgumentParser) -> None:
    add_yes_option(parser)
    add_json_option(parser)


# -- to look ------------------------------------------------------------------------------------------------


async def show_status(options: argparse.Namespace) -> int:
    """Print the figures of the outbox; with ``--rows`` its rows in a state."""
    async with open_store(options.store) as store:
        if options.rows:
            await _print_rows(store, options)
            return 0
        now = await store.status()
        failing = await find_failing(store)
        if options.json:
            print_json(_status_to_fields(store, now) | {"failing": failing and _failing_to_fields(failing)})
        else:
            _print_status(store, now, failing, await store.read_clock())
    return 0


def _status_to_fields(store: OutboxStore, now: OutboxStatus) -> dict[str, Any]:
    return {
        "id": store.id,
        "rows": {state: now.counts[state] for state in STATES},
        "estimated": [state for state in STATES if state in now.estimated],
        "size": now.size,
        "oldest_at": now.oldest_at,
        "oldest_sent_at": now.oldest_sent_at,
        "next_attempt_at": now.next_attempt_at,
        "partitions": store.partitions,
        "leads": [
            {"partition": lead.partition, "owner": lead.owner, **process_to_fields(lead.owner)}
            | {"epoch": lead.epoch, "until": lead.until}
            for lead in now.leads.values()
        ],
    }


def _print_status(store: OutboxStore, now: OutboxStatus, failing: Row | None, clock: datetime) -> None:
    about = {state: "about " if state in now.estimated else "" for state in STATES}
    print_table(
        ["state", "rows"], [(state, f"{about[state]}{now.counts[state]:,}") for state in STATES], numbers=["rows"]
    )
    leads = [(number, now.leads.get(number)) for number in range(store.partitions)]
    rows = [
        (number, *_describe_leader(lead), lead.epoch, f"in {format_age(lead.until, clock)}")
        if lead
        else (number, "nobody", None, None, None)
        for number, lead in leads
    ]
    print_line("")
    print_table(["partition", "led by", "pid", "epoch", "lease ends"], rows, numbers=["partition", "pid", "epoch"])
    print_line("")
    print_line(f"{format_size(now.size)} count for the quota")
    if now.oldest_at:
        print_line(
            f"the oldest row that waits was stored {format_age(now.oldest_at, clock)} ago, {format_time(now.oldest_at)}"
        )
        if not now.leads:
            print_line("no relay is at work: start one with `silbo relay`, or the program that owns the outbox")
    if now.oldest_sent_at:
        print_line(
            f"a replay reaches back {format_age(now.oldest_sent_at, clock)}, to {format_time(now.oldest_sent_at)}"
        )
    if failing:
        what = f"row {failing.id}, {failing.message.message_name}, attempt {count_failed(failing)} failed"
        print_line(f"{what}: {failing.error}")
    if now.counts["dead"]:
        print_line("dead rows were refused for good: `silbo outbox status --rows dead` says why")


def _describe_leader(lead: Lead) -> tuple[str, int | None]:
    """Return the leader's host and pid; its name where that does not tell them."""
    return find_process(lead.owner) or (lead.owner, None)


async def _print_rows(store: OutboxStore, options: argparse.Namespace) -> None:
    rows = _read_rows(store, options.rows, options.after, options.limit)
    last = 0
    if options.json:
        async for row in rows:
            print_json(_row_to_fields(row))
            last = row.id
    elif found := [row async for row in rows]:
        print_table(COLUMNS, map(_to_cells, found), numbers=["id", "attempts"])
        last = found[-1].id
    else:
        print_note(f"no {options.rows} rows")
    if last and await store.rows(options.rows, after=last, limit=1):
        print_note(f"there are more: --after {last}, or a greater --limit")


async def _read_rows(store: OutboxStore, state: State, after: int, limit: int) -> AsyncGenerator[Row]:
    """Yield at most ``limit`` rows, read in pages."""
    while limit and (page := await store.rows(state, after=after, limit=min(limit, PAGE))):
        for row in page:
            yield row
        after, limit = page[-1].id, limit - len(page)


def _to_cells(row: Row) -> Sequence[object]:
    """Return the values of COLUMNS."""
    return row.id, row.message.message_name, row.message.key, format_time(row.state_at), row.attempts, row.error


def _failing_to_fields(row: Row) -> dict[str, Any]:
    """Return the fields of a row without its message: the status of an outbox goes into logs."""
    return {"event": row.message.message_name} | {
        name: value for name, value in _row_to_fields(row).items() if name != "message"
    }


def _row_to_fields(row: Row) -> dict[str, Any]:
    return {
        "id": row.id,
        "partition": row.partition,
        "state": row.state,
        "attempts": row.attempts,
        "error": row.error,
        "sequence": row.sequence,
        "owner": row.owner,
        "epoch": row.epoch,
        "stored_at": row.stored_at,
        "state_at": row.state_at,
        "next_attempt_at": row.next_attempt_at,
        "message": message_to_fields(row.message),
    }


# -- to mend ------------------------------------------------------------------------------------------------


async def retry_rows(options: argparse.Namespace) -> int:
    """Send dead rows again, by id or all."""
    if options.all == bool(options.rows):
        raise UsageError("which rows? Give their ids, or --all")
    async with open_store(options.store) as store:
        if options.all:
            dead = (await store.status()).counts["dead"]
            if dead and not confirm(f"Send {format_count(dead, 'dead row')} again?", yes=options.yes):
                return 1
        wanted = None if options.all else dict.fromkeys(options.rows)
        with show_progress("retry") as update:
            done = await retry_in_steps(store, wanted, update)
    print_outcome({"retried": done}, f"{format_count(done, 'row')} will be sent again", as_json=options.json)
    if wanted is not None and done < len(wanted):
        print_note(f"silbo: {explain_missing(options.rows, done, 'dead row')}")
        return 1
    return 0


async def replay_rows(options: argparse.Namespace) -> int:
    """Send again the rows that were sent from a time on."""
    async with open_store(options.store) as store:
        clock = await store.read_clock()
        since = find_moment(options.since, clock)
        before = clock if options.before is None else min(clock, find_moment(options.before, clock))
        if since >= before:
            raise UsageError(f"--since {format_time(since)} is not before {format_time(before)}")
        now = await store.status()
        sent = now.counts["sent"]
        if now.oldest_sent_at is None:
            print_note("silbo: nothing that was sent is kept")
        elif since < now.oldest_sent_at:
            print_note(
                f"silbo: what was sent before {format_time(now.oldest_sent_at)} is not kept any more, if there was any"
            )
        what = f"Send again what was sent from {format_time(since)} to {format_time(before)}, of {sent:,} rows that are kept?"
        if not confirm(what, yes=options.yes):
            return 1
        with show_progress("replay") as update:
            done = await repeat_step(lambda: store.replay(since=since, before=before, limit=STEP), update)
    print_outcome({"replayed": done}, f"{format_count(done, 'row')} will be sent again", as_json=options.json)
    return 0


async def purge_rows(options: argparse.Namespace) -> int:
    """Delete the rows that have been sent, or dead, since before a time."""
    async with open_store(options.store) as store:
        before = find_moment(options.before, await store.read_clock())
        what = f"Delete what has been {options.state} since before {format_time(before)}?"
        if not confirm(what, yes=options.yes):
            return 1
        with show_progress("purge") as update:
            done = await repeat_step(lambda: store.purge(options.state, before=before, limit=STEP), update)
    print_outcome({"purged": done}, f"{format_count(done, 'row')} deleted", as_json=options.json)
    return 0
