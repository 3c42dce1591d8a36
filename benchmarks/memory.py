"""A Redis of 20 MB takes 1,000 messages a second for half an hour: retention by need.

    python -m benchmarks.memory [--seconds 1800] [--rate 1000] [--maxmemory 20mb] [--trim age] [--json FILE]

One program publishes through `RedisStreams(trim="acknowledged")` and consumes in two groups, and Redis has `maxmemory` and `noeviction`. The
publisher waits while more than 5,000 messages are not handled yet, as on a machine that has no time for them, and makes up for it. Every 10 seconds a line says how much memory Redis uses and how many entries the stream has. At the end each message is
counted: none may be refused, none may be lost, none may come twice. With `--trim age` the memory is full after a minute, and the
publishes are refused: that is what would happen without.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, process_time
from typing import Any

from redis.asyncio import Redis

from benchmarks.run import describe_setting
from silbo import AsyncEventDispatcher, Consumer, EventName, Message, NotificationEvent
from silbo.brokers.redis import RedisStreams
from silbo.errors import BrokerUnavailable, DeliveryUnknown
from silbo.event import new_id
from silbo.message import new_publication
from tools.redis_server import RedisServer

KEY = "silbo:{events}"
GROUPS = ("billing", "mail")
TICK = 0.01
"""The publisher sends every 10 milliseconds what is due."""
LOOK_EVERY = 10.0
BEHIND = 5_000
"""While more messages than these are not handled by all groups, the publisher waits: the memory is for what is acknowledged."""
NOTE = "x" * 100


@dataclass
class Happened(NotificationEvent):
    number: int
    note: str


HAPPENED = EventName("memory.happened", Happened)


@dataclass
class Look:
    """The state of Redis at one moment."""

    seconds: float
    memory: int
    entries: int


@dataclass
class Outcome:
    """The findings of a run.

    Attributes:
        sent: Messages that were published.
        refused: Calls that Redis refused.
        heard: For each group how often each number was heard.
        looks: One every ten seconds.
        handled: For each group the calls of its listener.
        waited: Seconds for which the publisher waited for the groups.
    """

    sent: int = 0
    refused: int = 0
    heard: dict[str, array[int]] = field(default_factory=dict)
    looks: list[Look] = field(default_factory=list)
    handled: dict[str, int] = field(default_factory=dict)
    waited: float = 0.0


def build_message(number: int) -> Message:
    return Message(
        "notification_event",
        "memory.happened",
        new_id(),
        {"number": number, "note": NOTE},
        {"publication": new_publication(), "version": "1"},
    )


async def publish(streams: RedisStreams, outcome: Outcome, rate: float, seconds: float) -> None:
    begun = monotonic()
    while (passed := monotonic() - begun) < seconds:
        if outcome.sent - min(outcome.handled.values()) > BEHIND:
            outcome.waited += TICK
            await asyncio.sleep(TICK)
            continue
        due = int(passed * rate) - outcome.sent - outcome.refused
        if due > 0:
            batch = [build_message(outcome.sent + offset) for offset in range(min(due, 500))]
            try:
                await streams.publish(*batch)
                outcome.sent += len(batch)
            except (BrokerUnavailable, DeliveryUnknown) as error:
                if not outcome.refused:
                    print(f"{passed:7.0f} s  {error}", flush=True)
                outcome.refused += len(batch)
        await asyncio.sleep(TICK)


async def consume(url: str, group: str, outcome: Outcome) -> None:
    heard = outcome.heard[group]
    dispatcher = AsyncEventDispatcher()

    async def hear(event: Happened) -> None:
        if event.number >= len(heard):
            heard.extend([0] * (event.number + 1 - len(heard)))
        heard[event.number] += 1
        outcome.handled[group] += 1

    dispatcher.add_listener(HAPPENED, hear)
    async with Redis.from_url(url) as client, RedisStreams(client, app=group) as streams:
        async with Consumer(dispatcher, streams.group(group, start="oldest"), events=[HAPPENED]) as consumer:
            await consumer.run()


async def look(admin: Redis, outcome: Outcome) -> None:
    begun = monotonic()
    while True:
        memory = await admin.info("memory")
        used = memory["used_memory"] - memory.get("mem_not_counted_for_evict", 0)
        one = Look(monotonic() - begun, used, await admin.xlen(KEY))
        outcome.looks.append(one)
        print(
            f"{one.seconds:7.0f} s  {one.memory / 1e6:6.2f} MB  {one.entries:7,} entries  {outcome.sent:9,} sent",
            flush=True,
        )
        await asyncio.sleep(LOOK_EVERY)


def summarise(outcome: Outcome, seconds: float, cpu: float) -> dict[str, Any]:
    looks = outcome.looks[1:] or outcome.looks
    third = max(1, len(looks) // 3)

    def average(some: Sequence[Look]) -> float:
        return round(sum(look.memory for look in some) / len(some) / 1e6, 2)

    return {
        "seconds": round(seconds),
        "sent": outcome.sent,
        "refused": outcome.refused,
        "publisher_waited_seconds": round(outcome.waited, 1),
        "lost": {group: outcome.sent - sum(map(bool, heard)) for group, heard in outcome.heard.items()},
        "doubled": {group: sum(many > 1 for many in heard) for group, heard in outcome.heard.items()},
        "memory_first_third_mb": average(looks[:third]),
        "memory_last_third_mb": average(looks[-third:]),
        "memory_most_mb": round(max(look.memory for look in looks) / 1e6, 2),
        "entries_most": max(look.entries for look in looks),
        "cpu_share_of_program": round(cpu / seconds, 3),
    }


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    outcome = Outcome(heard={group: array("I") for group in GROUPS}, handled=dict.fromkeys(GROUPS, 0))
    with RedisServer(config={"maxmemory": options.maxmemory, "maxmemory-policy": "noeviction"}) as server:
        async with Redis.from_url(server.url) as client:
            streams = RedisStreams(client, app="shop", trim=options.trim)
            async with streams:
                await asyncio.gather(*[client.xgroup_create(KEY, group, "0", mkstream=True) for group in GROUPS])
                tasks = [asyncio.ensure_future(consume(server.url, group, outcome)) for group in GROUPS]
                tasks.append(asyncio.ensure_future(look(client, outcome)))
                begun, cpu = monotonic(), process_time()
                await publish(streams, outcome, options.rate, options.seconds)
                for _ in range(300):  # half a minute for what is in hand
                    if all(sum(map(bool, heard)) >= outcome.sent for heard in outcome.heard.values()):
                        break
                    await asyncio.sleep(0.1)
                found = summarise(outcome, monotonic() - begun, process_time() - cpu)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            return {**describe_setting(), "server": str(server.binary), **found}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--rate", type=float, default=1000.0, help="messages a second")
    parser.add_argument("--maxmemory", default="20mb")
    parser.add_argument("--trim", choices=("acknowledged", "age"), default="acknowledged")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    found = asyncio.run(measure(options))
    print(json.dumps(found, indent=2))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return int(bool(found["refused"] or any(found["lost"].values()) or any(found["doubled"].values())))


if __name__ == "__main__":
    sys.exit(main())
