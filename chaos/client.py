"""The client of a program: of one Redis, or of a cluster."""

from __future__ import annotations

from typing import Final

from redis.asyncio import Redis, RedisCluster

__all__ = ["CLUSTER", "make_client"]

CLUSTER: Final = "cluster://"
"""A URL that begins so is that of a cluster's node."""


def make_client(url: str) -> Redis | RedisCluster:
    """Return the client of a URL."""
    if url.startswith(CLUSTER):
        return RedisCluster.from_url(url.replace(CLUSTER, "redis://"))
    return Redis.from_url(url)
