"""``silbo top``: its arguments, and a screen of figures that is drawn again and again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import TYPE_CHECKING, Any, Final

from silbo._checks import require_extra
from silbo._control_characters import escape_controls
from silbo.cli.arguments import (
    Commands,
    UsageError,
    add_command,
    add_json_option,
    add_redis_options,
    add_store_option,
    add_stream_option,
    make_count_parser,
    parse_positive_seconds,
)
from silbo.cli.away import away_to_fields
from silbo.cli.connect import make_redis, open_store
from silbo.cli.groups import add_silent_option, describe_trouble, format_consumers, group_to_fields
from silbo.cli.output import print_json
from silbo.operations.formatting import format_age, format_count, format_time
from silbo.operations.groups import GroupStatus
from silbo.operations.top import GroupFigures, Snapshot, watch
from silbo.outbox.rows import STATES

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

__all__ = ["add_to"]

COLUMNS: Final = (
    "stream",
    "group",
    "added/s",
    "done/s",
    "lag",
    "for",
    "in hand",
    "retry",
    "dead",
    "cons.",
)
"""The titles of the columns."""
DROPPED: Final = (
    "stream",
    "retry",
    "for",
    "added/s",
    "done/s",
    "cons.",
    "dead",
    "in hand",
)
"""The columns that a narrow terminal does without, the least needed first."""
GROUP_WIDTH: Final = 20
"""Characters of a group's name that are shown at least: many have the first twelve in common."""
BETWEEN: Final = 3
"""Spaces between two columns."""
TABLE_HEAD: Final = 2
"""Lines above the first row of the table."""

EPILOG = """\
added/s  messages that were added to the stream
done/s   messages that the group has acknowledged or given up
for      the age of the oldest message that the group was not given yet
retry    messages in hand for which an attempt has failed
dead     the group's dead letters
cons.    its consumers that live, "1 of 2" if one is silent

Red is a group that stands still: no consumer lives, or a listener hangs. Yellow: it has dead letters
or retries. The last line has the worst.

A narrow terminal leaves out columns, a low one groups: those without a live consumer come first then.

Runs until Ctrl-C.

examples:
  silbo top
  silbo top --prefix shop --store outbox.db --every 5s
  silbo top --limit 10 --json
"""


def add_to(commands: Commands) -> None:
    """Add ``silbo top`` to the commands."""
    parser = add_command(
        commands, "top", "rates, lag, in hand, retries, dead letters, the outbox: live", epilog=EPILOG, run=show_figures
    )
    add_redis_options(parser)
    add_store_option(parser)
    add_stream_option(parser)
    parser.add_argument(
        "--every", metavar="TIME", type=parse_positive_seconds, default=2.0, help="the time between two looks (2s)"
    )
    parser.add_argument("--limit", type=make_count_parser(1), help="end after so many looks")
    add_silent_option(parser)
    add_json_option(parser, "one JSON object for each look")


async def show_figures(options: argparse.Namespace) -> int:
    """Show the figures until Ctrl-C, or so many times as were asked for."""
    if not (options.json or sys.stdout.isatty()):
        raise UsageError("a live screen needs a terminal; --json does not")
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(make_redis(options))
        store = await stack.enter_async_context(open_store(options.store)) if options.store else None
        snapshots = await stack.enter_async_context(
            aclosing(
                watch(
                    client,
                    store=store,
                    prefix=options.prefix,
                    stream=options.stream,
                    every=options.every,
                    silent_after=options.silent_after,
                )
            )
        )
        if options.json:
            await _print_snapshots(snapshots, options.limit)
        else:
            await _draw_snapshots(snapshots, options.limit)
    return 0


async def _print_snapshots(snapshots: AsyncGenerator[Snapshot], limit: int | None) -> None:
    async for snapshot in snapshots:
        print_json(_to_fields(snapshot))
        limit = None if limit is None else limit - 1
        if limit == 0:
            return


async def _draw_snapshots(snapshots: AsyncGenerator[Snapshot], limit: int | None) -> None:
    with require_extra("a live screen (--json is none)", extra="cli", libraries=("rich",)):
        from rich.live import Live

    with Live(auto_refresh=False, screen=limit is None) as live:
        async for snapshot in snapshots:
            live.update(_draw(snapshot, live.console), refresh=True)
            limit = None if limit is None else limit - 1
            if limit == 0:
                return


def _draw(snapshot: Snapshot, console: Console) -> RenderableType:
    """Return the screen of a snapshot: as many groups as fit, those without a live consumer first if they are too many."""
    from rich.console import Group
    from rich.text import Text

    head = Text(f"silbo top  {format_time(snapshot.at)}", style="bold")
    foot = [Text(escape_controls(line), style=_style_outbox(snapshot)) for line in _describe_outbox(snapshot)]
    if snapshot.error:
        foot.append(Text(escape_controls(f"the figures are old: {snapshot.error}"), style="red"))
    foot += [Text(escape_controls(str(node)), style="red") for node in snapshot.away]
    if snapshot.missing:
        foot.append(Text(escape_controls(snapshot.missing), style="red"))
    if worst := _find_worst(snapshot):
        foot.append(Text(escape_controls(worst), style="red"))
    room = console.height - TABLE_HEAD - sum(len(text.wrap(console, console.width)) for text in (head, *foot))
    groups = list(snapshot.groups)
    if len(groups) > room:
        groups.sort(key=lambda figures: not figures.status.is_deserted)
        shown = max(1, room - 1)
        foot.insert(0, Text(f"and {format_count(len(groups) - shown, 'more group')}"))
        groups = groups[:shown]
    return Group(head, _make_table(groups, console), *foot)


def _make_table(groups: Sequence[GroupFigures], console: Console) -> Table:
    """Return the table with the columns that fit. The names of groups alone are cut."""
    from rich.box import SIMPLE_HEAD
    from rich.cells import cell_len, set_cell_size
    from rich.table import Table
    from rich.text import Text

    rows: list[dict[str, str]] = [
        dict(zip(COLUMNS, (escape_controls(str(cell)) for cell in _to_cells(figures)), strict=True))
        for figures in groups
    ]
    widths = {title: max(cell_len(text) for text in [title, *(row[title] for row in rows)]) for title in COLUMNS}
    left, room = list(COLUMNS), 0
    for dropped in ("", *DROPPED):
        left = [title for title in left if title != dropped]
        room = console.width - sum(BETWEEN + widths[title] for title in left if title != "group") - BETWEEN + 1
        if room >= min(GROUP_WIDTH, widths["group"]):
            break
    for row in rows:
        if cell_len(row["group"]) > room:
            row["group"] = f"{set_cell_size(row['group'], room - 1)}…"
    table = Table(box=SIMPLE_HEAD, show_edge=False, header_style="bold")
    for title in left:
        table.add_column(title, justify="left" if title in ("stream", "group") else "right", no_wrap=True)
    for figures, row in zip(groups, rows, strict=True):
        table.add_row(*(Text(row[title]) for title in left), style=_style_group(figures.status))
    return table


def _style_group(status: GroupStatus) -> str | None:
    """Return red for a group that stands still, yellow for one whose messages fail."""
    if status.is_deserted or status.is_stuck:
        return "red"
    return "yellow" if status.dead or status.retrying else None


def _style_outbox(snapshot: Snapshot) -> str:
    """Return red for an outbox with dead rows, whose last attempt failed, or with messages that wait and no relay."""
    outbox = snapshot.outbox
    is_bad = outbox is not None and (
        outbox.counts["dead"] or (outbox.unsent and not outbox.leads) or snapshot.outbox_error
    )
    return "red" if is_bad else ""


def _find_worst(snapshot: Snapshot) -> str | None:
    """Return a line about the group that stands still with most messages; None if all go on."""
    groups = [each.status for each in snapshot.groups if _style_group(each.status) == "red"]
    waiting = [group for group in groups if group.lag or group.in_hand]
    return describe_trouble(max(waiting, key=lambda group: group.lag + group.in_hand)) if waiting else None


def _to_cells(figures: GroupFigures) -> Sequence[object]:
    """Return the values of COLUMNS."""
    status = figures.status
    return (
        status.stream,
        status.group,
        "" if figures.added_rate is None else f"{figures.added_rate:,.0f}",
        "" if figures.done_rate is None else f"{figures.done_rate:,.0f}",
        f"{status.lag:,}{'+' if status.lag_is_at_least else ''}",
        format_age(status.waiting_since, status.read_at) if status.waiting_since and status.lag else "",
        f"{status.in_hand:,}",
        f"{status.retrying:,}",
        f"{status.dead:,}",
        format_consumers(status),
    )


def _describe_outbox(snapshot: Snapshot) -> Sequence[str]:
    """Return the lines about the outbox; none without one."""
    if snapshot.outbox is None or snapshot.outbox_at is None:
        return []
    counts = ", ".join(f"{snapshot.outbox.counts[state]:,} {state}" for state in STATES) + " rows"
    oldest = snapshot.outbox.oldest_at
    age = f"; the oldest waits for {format_age(oldest, snapshot.outbox_at)}" if oldest else ""
    relays = "" if snapshot.outbox.leads else "NO RELAY; "
    error = f"; the last attempt failed: {snapshot.outbox_error}" if snapshot.outbox_error else ""
    return [f"outbox: {relays}{counts}{age}{error}"]


def _to_fields(snapshot: Snapshot) -> Mapping[str, Any]:
    outbox = snapshot.outbox
    return {
        "at": snapshot.at,
        "groups": [
            {"added_rate": each.added_rate, "done_rate": each.done_rate, **group_to_fields(each.status)}
            for each in snapshot.groups
        ],
        "outbox": outbox
        and {
            "rows": {state: outbox.counts[state] for state in STATES},
            "oldest_at": outbox.oldest_at,
            "partitions_led": len(outbox.leads),
            "last_error": snapshot.outbox_error,
        },
        "error": snapshot.error,
        "missing": snapshot.missing,
        "away": away_to_fields(snapshot.away),
    }
