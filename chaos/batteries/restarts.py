"""Redis back from its append-only file, with a count of what a group has read that is too low: no figure stays wrong, and
nobody is told of entries that were missed."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from redis.asyncio import Redis

from chaos.check import check_groups, check_handled, given, unfinished
from chaos.events import STREAM
from chaos.stage import Stage
from tools.redis_server import RedisServer

EACH: Final = 2
LANES: Final = 20
WITHIN: Final = 120.0
GROUP: Final = "readers"
MISCOUNT: Final = """
for _, row in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local group = {}
  for n = 1, #row, 2 do group[row[n]] = row[n + 1] end
  if group['name'] == ARGV[1] and group['entries-read'] then
    local read = math.floor(group['entries-read'] / 2)
    redis.call('XGROUP', 'SETID', KEYS[1], ARGV[1], group['last-delivered-id'], 'ENTRIESREAD', read)
    return read
  end
end
return -1
"""
"""Lower a group's count, as Redis 7.0 and 7.2 do when they replay XREADGROUP."""


async def restarts(stage: Stage, *, rounds: int = 6, events: int = 1_000) -> None:
    """See above; after every other restart all entries are gone before the next comes, as after a quiet week."""
    server = stage.redis()
    consumers = [
        await stage.start(
            f"consumer-{number}", "consumer", url=server.url, ledger=str(stage.ledger(f"consumer-{number}"))
        )
        for number in range(EACH)
    ]
    for consumer in consumers:
        await consumer.ready()
    miscounted = 0
    for number in range(rounds):
        await _give(stage, server, f"producer-{number}", events // LANES)
        await asyncio.to_thread(server.restart)
        async with Redis.from_url(server.url) as client:
            miscounted += await client.eval(MISCOUNT, 1, STREAM, GROUP) >= 0
            if number % 2 == 0:
                await client.xtrim(STREAM, maxlen=0, approximate=False)
        stage.say(f"{number + 1} of {rounds} restarts")
    await _give(stage, server, "producer-last", 2)

    async def right() -> bool:
        async with Redis.from_url(server.url) as client:
            return (await _figures(client)) in ("", "0 behind, all read")

    await stage.settled("the group's figures are right", right, WITHIN)
    async with Redis.from_url(server.url) as client:
        figures = await _figures(client)
    for consumer in consumers:
        await consumer.stop()
    ledgers = [stage.ledger(f"producer-{number}") for number in (*range(rounds), "last")]
    stage.note("restarts", rounds)
    stage.note("counts made too low", miscounted)
    stage.must("figures of the group:", figures, figures in ("", "0 behind, all read"), "0 behind, all read")
    stage.zero("gaps reported", sum(consumer.figures["gaps"] for consumer in consumers))
    check_handled(stage, given(ledgers), [stage.ledger(consumer.name) for consumer in consumers])
    await check_groups(stage, server.url)
    await _miss(stage, server)


async def _give(stage: Stage, server: RedisServer, name: str, each: int) -> None:
    """Give events, and wait until the group has handled them."""
    producer = await stage.start(
        name, "producer", name=name, url=server.url, ledger=str(stage.ledger(name)), lanes=LANES, each=each
    )
    await producer.wait(WITHIN)

    async def finished() -> bool:
        async with Redis.from_url(server.url) as client:
            return not await unfinished(client, GROUP)

    await stage.until("all events handled", finished, WITHIN)


async def _figures(client: Any) -> str:
    """Return what Redis says of the group; nothing if it does not count."""
    stream = await client.xinfo_stream(STREAM)
    [group] = [group for group in await client.xinfo_groups(STREAM) if group["name"].decode() == GROUP]
    if "entries-read" not in group:
        return ""
    read = "all read" if group["entries-read"] == stream["entries-added"] else f"{group['entries-read']} read"
    return f"{group['lag']} behind, {read}"


async def _miss(stage: Stage, server: RedisServer) -> None:
    """A group that has missed something is told, once."""
    producer = await stage.start(
        "missed", "producer", name="m", url=server.url, ledger=str(stage.ledger("missed")), lanes=LANES, each=1
    )
    await producer.wait(WITHIN)
    async with Redis.from_url(server.url) as client:
        await client.xtrim(STREAM, maxlen=0, approximate=False)
    consumer = await stage.start("consumer-late", "consumer", url=server.url, ledger=str(stage.ledger("consumer-late")))
    await _give(stage, server, "producer-after", 1)
    await consumer.stop()
    if await _counts(server):
        stage.same("gaps reported where there was one", consumer.figures["gaps"], 1)


async def _counts(server: RedisServer) -> bool:
    async with Redis.from_url(server.url) as client:
        return bool(await _figures(client))
