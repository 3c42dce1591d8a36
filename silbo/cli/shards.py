"""``silbo shards change``: its arguments, and carrying it out."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Final

from silbo.cli.arguments import (
    Commands,
    UsageError,
    add_command,
    add_command_group,
    add_json_option,
    add_redis_options,
    make_count_parser,
    parse_address,
)
from silbo.cli.confirmation import add_yes_option, confirm
from silbo.cli.connect import make_redis
from silbo.cli.output import print_note, print_outcome
from silbo.operations.shards import Undrained, change_shards, read_sharding
from silbo.shards import check_shards

__all__ = ["add_to"]

TELL_EVERY: Final = 5.0
"""Seconds between two lines about what is waited for."""

SHARDS: Final = """\
An address with shards has several streams, silbo:{orders.0} and so on. Each key has one of them.
"""
CHANGE: Final = """\
From the first moment on publishes to the address are refused (an outbox keeps them), until all groups have handled
what is on the present shards. Then the consumers share out the new ones by themselves.
A command that is stopped leaves the address closed: call it again, or with the former number, which opens it.

examples:
  silbo shards change orders 32 --redis redis://localhost
  silbo shards change orders 32 --yes --json
"""


def add_to(silbo: Commands) -> None:
    """Add ``silbo shards`` and its command."""
    commands = add_command_group(silbo, "shards", "the shards of an address: change their number", epilog=SHARDS)
    parser = add_command(commands, "change", "change the number of shards", epilog=CHANGE, run=run_change)
    parser.add_argument("address", metavar="ADDRESS", type=parse_address, help="as orders")
    parser.add_argument("shards", metavar="N", type=make_count_parser(2), help="the new number")
    add_redis_options(parser)
    add_yes_option(parser)
    add_json_option(parser, "a JSON object when it is done")


async def run_change(options: argparse.Namespace) -> int:
    """Change the number of shards of an address, if the user agrees."""
    address, shards = options.address, options.shards
    try:
        check_shards(shards)
    except ValueError as error:
        raise UsageError(str(error)) from None
    async with make_redis(options) as client:
        state = await read_sharding(client, address, prefix=options.prefix)
        former = state.shards if state is not None else 0
        if state is not None and state.is_closed:
            question = f"Go on with the change of {address!r}, which is closed, from {former} to {shards} shards?"
        else:
            question = f"Change {address!r} from {former} to {shards} shards? Meanwhile publishes to it are refused."
        if former and not confirm(question, yes=options.yes):
            return 1
        try:
            await change_shards(client, address, shards, prefix=options.prefix, on_wait=_make_teller())
        except asyncio.CancelledError:
            print_note(
                f"{address!r} stays closed, and publishes to it are refused: call it again, or silbo shards change {address} {former},"
                " which opens it as it was"
            )
            raise
    text = f"{address!r} has {shards} shards; it had {former}. Deploy the publishers with the new number"
    print_outcome({"address": address, "shards": shards, "before": former}, text, as_json=options.json)
    return 0


def _make_teller() -> Callable[[Sequence[Undrained]], None]:
    """Return a function that says what is waited for, at once and every few seconds."""
    next_at = 0.0

    def tell(undrained: Sequence[Undrained]) -> None:
        nonlocal next_at
        if (now := time.monotonic()) >= next_at:
            next_at = now + TELL_EVERY
            first = undrained[0]
            more = f", and {len(undrained) - 1} more" if len(undrained) > 1 else ""
            print_note(f"waiting for {first.group} at {first.stream}, {first.in_hand} in hand{more}")

    return tell
