"""The servers behind an address with 16 shards, one Redis or the nodes of a cluster: their processor time, and a backlog.

The backlog is published once, through silbo, and put aside; `fill` copies it to the shards in one call at each server. So a
round begins with full shards and consumers that have their places, and what the copy costs is not counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from redis import Redis

from silbo import AsyncEventDispatcher, Bridge, EventName, NotificationEvent
from silbo.brokers.redis import RedisStreams
from silbo.shards import spread
from tools.redis_cluster import ClusterServers, make_client
from tools.redis_server import RedisServer

__all__ = ["KEYS", "MEETING_JOINED", "PREFIX", "SHARDS", "MeetingJoined", "ShardServers", "make_streams"]

PREFIX: Final = "silbo-benchmark"
SHARDS: Final = 16
KEYS: Final = 1_000
AT_ONCE: Final = 1_000
"""Publishes of a backlog that are made at the same time."""
FILL: Final = """
local added = 0
for _, stream in ipairs(ARGV) do
    for _, entry in ipairs(redis.call('XRANGE', stream .. ':backlog', '-', '+')) do
        redis.call('XADD', stream, '*', unpack(entry[2]))
        added = added + 1
    end
end
return added
"""


@dataclass
class MeetingJoined(NotificationEvent):
    """A small notification, as they are.

    Attributes:
        user_id: The key.
        is_last: True for the last message of a shard's backlog.
    """

    user_id: int
    is_last: bool = False


MEETING_JOINED: Final = EventName("meeting.joined", MeetingJoined, key="user_id")


def make_streams(client: Any) -> RedisStreams:
    """Return a broker whose address has 16 shards."""
    return RedisStreams(client, app="web", prefix=PREFIX, shards=SHARDS)


class ShardServers:
    """Servers that run, and a connection to each.

    Args:
        servers: One Redis, or a cluster.
    """

    def __init__(self, servers: RedisServer | ClusterServers) -> None:
        self.servers: Final = servers
        nodes = servers.nodes if isinstance(servers, ClusterServers) else [servers]
        self._nodes = [Redis.from_url(node.url) for node in nodes]

    @contextmanager
    def connected(self) -> Generator[ShardServers]:
        """Close the connections at the end."""
        try:
            yield self
        finally:
            for node in self._nodes:
                node.close()

    @property
    def words(self) -> list[str]:
        """The URL, and ``--cluster`` if it is that of a cluster's node."""
        return [self.servers.url, *(["--cluster"] if isinstance(self.servers, ClusterServers) else [])]

    def client(self) -> Any:
        """Return a client as a program makes it."""
        return make_client(self.servers)

    def read_cpu(self) -> float:
        """Return the seconds of processor time that all servers have taken."""
        return sum(_add_cpu(node.info("cpu")) for node in self._nodes)

    async def publish_backlog(self, messages: int) -> int:
        """Put a backlog of about so many messages aside; return its number. Each shard's last message says that it is the last."""
        events = [MeetingJoined(number % KEYS) for number in range(messages - SHARDS)]
        of_shards = {spread(str(key), SHARDS): key for key in range(KEYS)}
        assert len(of_shards) == SHARDS
        async with self.client() as client, make_streams(client) as streams:
            dispatcher = AsyncEventDispatcher()
            dispatcher.add_subscriber(Bridge(streams))
            for first in range(0, len(events), AT_ONCE):
                some = events[first : first + AT_ONCE]
                await asyncio.gather(*(dispatcher.adispatch(MEETING_JOINED, event) for event in some))
            for key in of_shards.values():
                await dispatcher.adispatch(MEETING_JOINED, MeetingJoined(key, is_last=True))
        for node, streams_here in self._find_streams().items():
            for stream in streams_here:
                node.rename(stream, f"{stream}:backlog")
        return messages

    def fill(self) -> float:
        """Copy the backlog to the shards; return the servers' processor time as of then."""
        taken = 0.0
        for node, streams in self._find_streams().items():
            with node.pipeline(transaction=True) as together:  # no consumer's call comes between
                together.eval(FILL, 0, *streams)
                together.info("cpu")
                _, info = together.execute()
            taken += _add_cpu(info)
        return taken

    def empty(self) -> None:
        """Remove all messages from the shards."""
        for node, streams in self._find_streams().items():
            for stream in streams:
                node.xtrim(stream, maxlen=0, approximate=False)

    def _find_streams(self) -> dict[Redis, list[str]]:
        """Return the shards' streams that each server has, those of which the backlog is there among them."""
        found = {}
        for node in self._nodes:
            there = [key.decode() for key in node.scan_iter(f"{PREFIX}:{{events.*", _type="stream")]
            found[node] = sorted({key.removesuffix(":backlog") for key in there})
        return found


def _add_cpu(info: Any) -> float:
    return float(info["used_cpu_user"] + info["used_cpu_sys"])
