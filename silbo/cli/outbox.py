"""``silbo outbox status | retry | replay | purge``."""

from __future__ import annotations

import argparse
from collections.abc import AsyncGenerator, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from silbo.cli.arguments import (
    Commands,
    UsageError,
    command,
    count,
    json_option,
    moment,
    store_option,
    yes_option,
)
from silbo.cli.connect import opened_store
from silbo.cli.output import (
    ago,
    confirmed,
    many,
    message_fields,
    not_there,
    object_line,
    printable,
    say,
    size,
    time,
    write,
)
from silbo.cli.rich_output import print_table, show_progress
from silbo.outbox.outbox import STEP, repeat_step
from silbo.outbox.rows import STATES, OutboxStatus, OutboxStore, Row, State

__all__ = ["add_to"]

COLUMNS: Final = ("id", "event", "key", "since", "attempts", "error")
PAGE: Final = 1000
"""Rows that are read at a time."""

STATUS = """\
examples:
  silbo outbox status --store outbox.db
  silbo outbox status --rows dead                   the rows that were refused, and why
  silbo outbox status --rows pending --json | jq .error
"""
RETRY = """\
Rows are dead that were refused for good: too large, or not writable in the format. Retried
rows are sent after what waits already.

examples:
  silbo outbox retry 17 18
  silbo outbox retry --all --yes
"""
REPLAY = """\
For a Redis that came back from an older state. What it still has comes a second time, which
an inbox recognises. Only what is still kept (silbo relay --retain) can be sent again.

examples:
  silbo outbox replay --since 2h
  silbo outbox replay --since 2026-03-07T09:00Z --before 2026-03-07T09:30Z --yes
"""
PURGE = """\
examples:
  silbo outbox purge dead --before 7d
  silbo outbox purge sent --before now --yes
"""


def add_to(commands: Commands) -> None:
    """Tell the parser."""
    parser = command(commands, "status", "rows in each state, who leads, what fails", epilog=STATUS, run=status)
    store_option(parser)
    parser.add_argument("--rows", metavar="STATE", choices=STATES, help=f"list rows instead: {', '.join(STATES)}")
    parser.add_argument("--limit", type=count(1), default=50, help="how many rows at most (50)")
    parser.add_argument("--after", metavar="ID", type=count(0), default=0, help="rows with greater ids than this one")
    json_option(parser, "one JSON object, with --rows one for each row,")

    parser = command(commands, "retry", "send dead rows again", epilog=RETRY, run=retry)
    store_option(parser)
    parser.add_argument("rows", metavar="ID", type=count(0), nargs="*", help="of a dead row")
    parser.add_argument("--all", action="store_true", help="all dead rows")
    _changes(parser)

    parser = command(commands, "replay", "send again what was sent from a time on", epilog=REPLAY, run=replay)
    store_option(parser)
    parser.add_argument(
        "--since", metavar="TIME", type=moment, required=True, help="2026-03-07T09:26Z, or 1h for an hour ago"
    )
    parser.add_argument("--before", metavar="TIME", type=moment, help="what was sent from then on is left alone (now)")
    _changes(parser)

    parser = command(commands, "purge", "delete rows that were sent, or are dead", epilog=PURGE, run=purge)
    store_option(parser)
    parser.add_argument("state", choices=["sent", "dead"])
    parser.add_argument(
        "--before",
        metavar="TIME",
        type=moment,
        required=True,
        help="in that state since before then: 7d, or now for all",
    )
    _changes(parser)


def _changes(parser: argparse.ArgumentParser) -> None:
    yes_option(parser)
    json_option(parser)


# -- to look ------------------------------------------------------------------------------------------------


async def status(options: argparse.Namespace) -> int:
    """What there is: figures, or rows."""
    async with opened_store(options.store) as store:
        if options.rows:
            await _show_rows(store, options)
            return 0
        now = await store.status()
        failing = await _first_failing(store)
        if options.json:
            object_line(_status(store, now) | {"failing": failing and _failing(failing)})
        else:
            _show(store, now, failing)
    return 0


async def _first_failing(store: OutboxStore) -> Row | None:
    """What holds back the rows behind it, if anything; also while it is tried again."""
    for state in ("sending", "pending"):
        for row in await store.rows(state, limit=1):
            if row.error and _failed(row):
                return row
    return None


def _failed(row: Row) -> int:
    """How many attempts are known to have failed."""
    return row.attempts - (row.state == "sending")


def _status(store: OutboxStore, now: OutboxStatus) -> dict[str, Any]:
    return {
        "id": store.id,
        "rows": {state: now.counts[state] for state in STATES},
        "size": now.size,
        "oldest_at": now.oldest_at,
        "oldest_sent_at": now.oldest_sent_at,
        "next_attempt_at": now.next_attempt_at,
        "partitions": store.partitions,
        "leads": [
            {"partition": lead.partition, "owner": lead.owner, "epoch": lead.epoch, "until": lead.until}
            for lead in now.leads.values()
        ],
    }


def _show(store: OutboxStore, now: OutboxStatus, failing: Row | None) -> None:
    print_table(["state", "rows"], [(state, f"{now.counts[state]:,}") for state in STATES], numbers=["rows"])
    leads = [(number, now.leads.get(number)) for number in range(store.partitions)]
    rows = [
        (number, lead.owner, lead.epoch, f"in {ago(lead.until)}") if lead else (number, "nobody", None, None)
        for number, lead in leads
    ]
    write("")
    print_table(["partition", "led by", "epoch", "lease ends"], rows, numbers=["partition", "epoch"])
    write(f"\n{size(now.size)} count for the quota")
    if now.oldest_at:
        write(f"the oldest row that waits was stored {ago(now.oldest_at)} ago, {time(now.oldest_at)}")
        if not now.leads:
            write("no relay is at work: start one with `silbo relay`, or the program that owns the outbox")
    if now.oldest_sent_at:
        write(f"a replay reaches back {ago(now.oldest_sent_at)}, to {time(now.oldest_sent_at)}")
    if failing:
        what = f"row {failing.id}, {failing.message.message_name}, attempt {_failed(failing)} failed"
        write(printable(f"{what}: {failing.error}"))
    if now.counts["dead"]:
        write("dead rows were refused for good: `silbo outbox status --rows dead` says why")


async def _show_rows(store: OutboxStore, options: argparse.Namespace) -> None:
    rows = _rows(store, options.rows, options.after, options.limit)
    last = 0
    if options.json:
        async for row in rows:
            object_line(_row(row))
            last = row.id
    elif found := [row async for row in rows]:
        print_table(COLUMNS, map(_cells, found), numbers=["id", "attempts"])
        last = found[-1].id
    else:
        say(f"no {options.rows} rows")
    if last and await store.rows(options.rows, after=last, limit=1):
        say(f"there are more: --after {last}, or a greater --limit")


async def _rows(store: OutboxStore, state: State, after: int, limit: int) -> AsyncGenerator[Row]:
    """At most ``limit``, of which few are in memory at a time."""
    while limit and (page := await store.rows(state, after=after, limit=min(limit, PAGE))):
        for row in page:
            yield row
        after, limit = page[-1].id, limit - len(page)


def _cells(row: Row) -> Sequence[object]:
    return row.id, row.message.message_name, row.message.key, time(row.state_at), row.attempts, row.error


def _failing(row: Row) -> dict[str, Any]:
    """Without the payload: the status of an outbox goes into logs."""
    return {"event": row.message.message_name} | {name: value for name, value in _row(row).items() if name != "message"}


def _row(row: Row) -> dict[str, Any]:
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
        "message": message_fields(row.message),
    }


# -- to mend ------------------------------------------------------------------------------------------------


async def retry(options: argparse.Namespace) -> int:
    """Dead rows, by id or all."""
    if options.all == bool(options.rows):
        raise UsageError("which rows? Give their ids, or --all")
    async with opened_store(options.store) as store:
        if options.all:
            dead = (await store.status()).counts["dead"]
            if dead and not confirmed(f"Send {many(dead, 'dead row')} again?", yes=options.yes):
                return 1
        wanted = None if options.all else dict.fromkeys(options.rows)
        done = await store.retry(wanted)
    _done(options, "retried", done, f"{many(done, 'row')} will be sent again")
    if wanted is not None and done < len(wanted):
        say(f"silbo: {not_there(options.rows, done, 'dead row')}")
        return 1
    return 0


async def replay(options: argparse.Namespace) -> int:
    """What was sent from a time on."""
    before = options.before or datetime.now(UTC)
    if options.since >= before:
        raise UsageError(f"--since {time(options.since)} is not before {time(before)}")
    async with opened_store(options.store) as store:
        now = await store.status()
        sent = now.counts["sent"]
        if now.oldest_sent_at is None:
            say("silbo: nothing that was sent is kept")
        elif options.since < now.oldest_sent_at:
            say(f"silbo: what was sent before {time(now.oldest_sent_at)} is not kept any more, if there was any")
        what = f"Send again what was sent from {time(options.since)} to {time(before)}, of {sent:,} rows that are kept?"
        if not confirmed(what, yes=options.yes):
            return 1
        with show_progress("replay") as update:
            done = await repeat_step(lambda: store.replay(since=options.since, before=before, limit=STEP), update)
    _done(options, "replayed", done, f"{many(done, 'row')} will be sent again")
    return 0


async def purge(options: argparse.Namespace) -> int:
    """What has been sent, or dead, since before a time."""
    async with opened_store(options.store) as store:
        what = f"Delete what has been {options.state} since before {time(options.before)}?"
        if not confirmed(what, yes=options.yes):
            return 1
        with show_progress("purge") as update:
            done = await repeat_step(lambda: store.purge(options.state, before=options.before, limit=STEP), update)
    _done(options, "purged", done, f"{many(done, 'row')} deleted")
    return 0


def _done(options: argparse.Namespace, field: str, number: int, text: str) -> None:
    if options.json:
        object_line({field: number})
    else:
        write(text)
