"""The client of a program that a test starts: of one server, or, where the test runs on a cluster, of that."""

from __future__ import annotations

import os
from typing import Any

from redis.asyncio import Redis, RedisCluster


def redis_at(url: str) -> Any:
    return (RedisCluster if os.environ.get("SILBO_CLUSTER") else Redis).from_url(url)
