"""A client of Sentinel's: the master changes, and publishers and consumers go along."""

from __future__ import annotations

from pathlib import Path

import pytest
from redis.asyncio import Redis

from silbo.brokers.redis import RedisStreams
from silbo.errors import BrokerUnavailable, Gap
from tests.support.redis_sentinel import port_of, sentinel
from tests.support.redis_streams import eventually, message, number, opened, receive, stored
from tools.redis_server import RedisServer


@pytest.mark.long
@pytest.mark.timeout(90)
async def test_demoted_master_is_left_for_the_new_one(tmp_path: Path) -> None:
    """A READONLY is told to its callers, as not sent; the next publish and the next read find the new master."""
    with RedisServer(port=True) as old, RedisServer(port=True) as new:
        async with Redis.from_url(old.url) as old_admin, Redis.from_url(new.url) as new_admin:
            await new_admin.execute_command("REPLICAOF", "127.0.0.1", port_of(old))

            async def is_in_sync() -> bool:
                return (await new_admin.info("replication"))["master_link_status"] == "up"

            await eventually(is_in_sync, 20)
            async with sentinel(old, tmp_path) as manager, manager.master_for("main") as client:
                async with RedisStreams(client, app="web") as streams:
                    async with opened(streams.group("billing", start="oldest")) as receiver:
                        await streams.publish(message(1))
                        assert [number(item) for item in await receive(receiver, 1)] == [1]
                        (control,) = manager.sentinels
                        # It says no until it has looked at the replica well enough.
                        await eventually(lambda: control.execute_command("SENTINEL", "FAILOVER", "main"), 30)

                        async def is_known() -> bool:
                            return (await manager.discover_master("main"))[1] == port_of(new)

                        await eventually(is_known, 30)
                        for admin in (old_admin, new_admin):  # the election has cut their connections
                            await admin.connection_pool.disconnect()
                        await old_admin.execute_command("REPLICAOF", "127.0.0.1", port_of(new))  # sentinel takes 10 s
                        with pytest.raises(BrokerUnavailable, match="READONLY"):
                            await streams.publish(message(2))
                        await streams.publish(message(3))
                        assert await stored(new_admin) == [1, 3]
                        items: list[int] = []

                        async def is_read() -> bool:
                            found = await receiver.receive(10)
                            items.extend(number(item) for item in found if not isinstance(item, Gap))
                            return 3 in items

                        await eventually(is_read, 10)
