"""The rows of `make bench` over shards: a backlog that is copied whole, and drains of which no message is missing."""

from __future__ import annotations

import json

import pytest
from redis import Redis

from benchmarks import run
from benchmarks.over_shards import BY_THE_CLOCK
from benchmarks.registry import SCENARIOS
from benchmarks.shard_consumers import open_consumers
from benchmarks.shard_servers import PREFIX, SHARDS, ShardServers
from benchmarks.worker import run as run_scenario
from tools.redis_server import RedisServer

MESSAGES = 200


def stream(shard: int) -> str:
    return f"{PREFIX}:{{events.{shard}}}"


async def test_every_round_begins_with_the_same_backlog() -> None:
    """The last entry of each shard says that it is the last, and no other does."""
    with (
        RedisServer(port=True) as server,
        ShardServers(server).connected() as servers,
        Redis.from_url(server.url) as one,
    ):
        await servers.publish_backlog(MESSAGES)
        for _ in range(2):
            before = servers.read_cpu()
            assert servers.fill() > before
            shards = [one.xrange(stream(shard)) for shard in range(SHARDS)]
            assert sum(map(len, shards)) == MESSAGES
            for entries in shards:
                marks = [json.loads(fields[b"message"])["payload"]["is_last"] for _, fields in entries]
                assert marks == [False] * (len(entries) - 1) + [True]
            servers.empty()
            assert not any(one.xlen(stream(shard)) for shard in range(SHARDS))


@pytest.mark.long
async def test_drain_of_which_a_message_is_missing_fails() -> None:
    """Two processes share the shards, and handle the backlog again and again; then one of its messages goes."""
    with (
        RedisServer(port=True) as server,
        ShardServers(server).connected() as servers,
        Redis.from_url(server.url) as one,
    ):
        async with open_consumers(servers, MESSAGES, 2) as consumers:
            await consumers.settle()
            for _ in range(2):
                drain = await consumers.drain()
                assert min(drain) > 0
            backlog = f"{stream(0)}:backlog"
            one.xdel(backlog, one.xrange(backlog, count=1)[0][0])
            with pytest.raises(RuntimeError, match="199 messages were handled of 200"):
                await consumers.drain()


@pytest.mark.long
@pytest.mark.parametrize("name", ["publish over 1, 2, 3 cluster nodes", "consume over 1, 2, 3 cluster nodes"])
async def test_row_names_the_processor_time_of_each(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    await run_scenario(SCENARIOS[name], 2, 0.01)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["missing"] == {}
    for result in last["results"]:
        of = result["percentiles"]
        assert list(of) == ["of silbo", "of Redis", BY_THE_CLOCK]
        assert result["each"] == pytest.approx(of["of silbo"] + of["of Redis"])  # a median of two is their mean


def test_head_says_of_which_second_a_speed_is() -> None:
    rows = [("cpu seconds", True), ("seconds", True), ("seconds", False)]
    heads = [run.head_figures({"measures": measures, "more_is_better": more}) for measures, more in rows]
    assert heads == ["per CPU second", "speed", "each"]
