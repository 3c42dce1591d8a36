"""A Redis Cluster of one's own on loopback: some masters, and as many replicas, gone when their owner is gone.

    with ClusterServers(replicas=True) as cluster:
        client = cluster.client()               # redis.asyncio.RedisCluster
        cluster.node_of("silbo:{events}").kill()

    python -m tools.redis_cluster               # three masters in the foreground, until Ctrl-C

A cluster takes writes two seconds after its nodes have started: the nodes themselves wait that long.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Self

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio import RedisCluster
from redis.crc import key_slot
from redis.exceptions import RedisError

from tools.redis_binary import Binary
from tools.redis_server import ExternalRedis, RedisServer
from tools.server import ServerFailed, free_port, in_foreground

__all__ = ["SLOTS", "ClusterNode", "ClusterServers", "make_client"]

SLOTS: Final = 16384
BUS: Final = 10_000
"""The nodes talk to one another on a port that is so much higher."""
SECONDS: Final = 60.0
"""Seconds after which a state that has not come about won't on a busy machine either."""


class ClusterNode(RedisServer):
    """One node."""

    @property
    def port(self) -> int:
        """Its port on 127.0.0.1."""
        return self._port

    def run(self, *words: object) -> Any:
        """Run one command on this very node, and return the reply as text."""
        with Redis(port=self.port, decode_responses=True, protocol=2, socket_timeout=30) as client:
            return client.execute_command(*words)

    def _choose_port(self) -> int:
        while True:
            port = free_port()
            with socket.socket() as probe, contextlib.suppress(OSError, OverflowError):
                probe.bind(("127.0.0.1", port + BUS))
                return port


class ClusterServers:
    """The nodes of a cluster. Entering the `with` starts them; leaving ends them and drops their data.

    Args:
        masters: How many; the slots are spread over them evenly.
        replicas: True for one replica of each master.
        node_timeout: Seconds of silence after which a node counts as failed, and its replica is promoted.
        config: More directives of all nodes.
        binary: The server program; `find_binary()` by default.
    """

    def __init__(
        self,
        *,
        masters: int = 3,
        replicas: bool = False,
        node_timeout: float = 15.0,
        config: Mapping[str, str | int] | None = None,
        binary: Binary | None = None,
    ) -> None:
        directives: dict[str, str | int] = {
            "cluster-enabled": "yes",
            "cluster-node-timeout": int(node_timeout * 1000),
            "cluster-require-full-coverage": "no",  # the slots of the others go on
            "cluster-replica-validity-factor": 0,  # a replica is promoted, however old its data are
            "repl-diskless-sync-delay": 0,
        }
        directives |= config or {}
        many = 2 * masters if replicas else masters
        self.nodes: Final = [ClusterNode(port=True, config=directives, binary=binary) for _ in range(many)]
        self._masters = masters

    @property
    def name(self) -> str:
        """The words for it, as `in_foreground` prints them."""
        return f"a cluster of {len(self.nodes)} nodes, {self.nodes[0].name}"

    @property
    def url(self) -> str:
        """For `RedisCluster.from_url`: that of the first node."""
        return self.nodes[0].url.removesuffix("/0")

    def client(self, **settings: Any) -> RedisCluster:
        """A client with redis-py's defaults but for the settings, as a user would make it."""
        return RedisCluster.from_url(self.url, **settings)

    def __enter__(self) -> Self:
        try:
            with ThreadPoolExecutor(len(self.nodes)) as pool:
                list(pool.map(lambda node: node.start(), self.nodes))
            self._join()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End all nodes. May be called twice."""
        for node in self.nodes:
            node.stop()

    def _join(self) -> None:
        first, masters = self.nodes[0], self.nodes[: self._masters]
        for number, node in enumerate(masters):
            node.run("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            begin, end = (SLOTS * at // len(masters) for at in (number, number + 1))
            node.run("CLUSTER", "ADDSLOTS", *range(begin, end))  # 6.2 has no ADDSLOTSRANGE
        for node in self.nodes[1:]:
            first.run("CLUSTER", "MEET", "127.0.0.1", node.port)
        wait_for(lambda: all(self._knows_all(node) for node in self.nodes))
        for master, replica in zip(masters, self.nodes[self._masters :], strict=False):
            replica.run("CLUSTER", "REPLICATE", node_id(master))
        wait_for(self.is_complete)

    def _knows_all(self, node: ClusterNode) -> bool:
        rows = node.run("CLUSTER", "NODES").splitlines()
        return len(rows) == len(self.nodes) and not any("handshake" in row for row in rows)

    def is_complete(self) -> bool:
        """True if every node says that the cluster is up, and every replica is at its master's side."""
        for node in self.nodes:
            if "cluster_state:ok" not in node.run("CLUSTER", "INFO"):
                return False
            if sum(end + 1 - begin for begin, end, *_ in node.run("CLUSTER", "SLOTS")) != SLOTS:
                return False
        roles = [node.run("ROLE") for node in self.nodes]
        replicas = [role for role in roles if role[0] == "slave"]
        return len(replicas) == len(self.nodes) - self._masters and all(role[3] == "connected" for role in replicas)

    def count_errors(self, code: str) -> int:
        """How often the nodes have answered with this error."""
        found = [node.run("INFO", "errorstats").get(f"errorstat_{code}", {"count": 0}) for node in self.nodes]
        return sum(int(each["count"]) for each in found)

    # -- who serves a key, and changes of that ------------------------------------------------------------------

    def node_of(self, key: str | int) -> ClusterNode:
        """The node that serves a key, or a slot, as most of the nodes see it that answer."""
        slot = key if isinstance(key, int) else key_slot(key.encode())
        votes: Counter[int] = Counter()
        for node in self.nodes:
            with contextlib.suppress(RedisError, OSError):
                for begin, end, (_, port, *_), *_ in node.run("CLUSTER", "SLOTS"):
                    if begin <= slot <= end:
                        votes[port] += 1
        ((port, _),) = votes.most_common(1)
        return next(node for node in self.nodes if node.port == port)

    def find_masters(self) -> list[ClusterNode]:
        """The nodes that are masters now."""
        return [node for node in self.nodes if node.run("ROLE")[0] == "master"]

    def replica_of(self, master: ClusterNode) -> ClusterNode:
        """The replica of a master."""
        for node in self.nodes:
            role = node.run("ROLE")
            if role[0] == "slave" and role[2] == master.port:
                return node
        raise ServerFailed(f"the node at {master.port} has no replica")

    def begin_move(self, slot: int, to: ClusterNode) -> ClusterNode:
        """Open the slot for its move, and return the node that still has it: it answers ASK for keys that are gone."""
        source = self.node_of(slot)
        to.run("CLUSTER", "SETSLOT", slot, "IMPORTING", node_id(source))
        source.run("CLUSTER", "SETSLOT", slot, "MIGRATING", node_id(to))
        return source

    def move_keys(self, slot: int, source: ClusterNode, to: ClusterNode) -> None:
        """Move the keys of a slot that was opened, one after another, as a resharding does."""
        while keys := source.run("CLUSTER", "GETKEYSINSLOT", slot, 1):
            self.move_key(keys[0], source, to)

    def move_key(self, key: str, source: ClusterNode, to: ClusterNode) -> None:
        """Move one key of a slot that was opened."""
        source.run("MIGRATE", "127.0.0.1", to.port, key, 0, 30_000)

    def end_move(self, slot: int, to: ClusterNode) -> None:
        """Tell all masters of the slot's new node, the new one first."""
        for node in [to, *(node for node in self.nodes if node is not to)]:
            with contextlib.suppress(RedisError):  # a replica takes no SETSLOT, and hears of it
                node.run("CLUSTER", "SETSLOT", slot, "NODE", node_id(to))

    def move(self, slot: int, to: ClusterNode) -> None:
        """Move a slot with its keys."""
        source = self.begin_move(slot, to)
        self.move_keys(slot, source, to)
        self.end_move(slot, to)


def node_id(node: ClusterNode) -> str:
    """The name by which the others know it."""
    return str(node.run("CLUSTER", "MYID"))


def wait_for(check: Callable[[], bool]) -> None:
    """Wait until the check is true; an error counts as false."""
    deadline = time.monotonic() + SECONDS
    while True:
        error: Exception | None = None
        try:
            if check():
                return
        except (RedisError, OSError) as failed:
            error = failed
        if time.monotonic() > deadline:
            raise ServerFailed("the cluster has not come about") from error
        time.sleep(0.02)


def make_client(server: RedisServer | ExternalRedis | ClusterServers, **settings: Any) -> Any:
    """A client of a server or a cluster, with redis-py's defaults but for the settings."""
    if isinstance(server, ClusterServers):
        return server.client(**settings)
    return AsyncRedis.from_url(server.url, **settings)


def main() -> int | str:
    """Run three masters in the foreground."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.redis_cluster",
        description="Start a Redis Cluster for development, print the URL of a node, and end it with Ctrl-C.",
    )
    parser.add_argument("--replicas", action="store_true", help="and a replica of each master")
    options = parser.parse_args()
    return in_foreground(ClusterServers(replicas=options.replicas))


if __name__ == "__main__":
    sys.exit(main())
