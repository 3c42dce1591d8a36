"""The nodes of a Redis Cluster: which of them serves a key, and connections to them."""

from __future__ import annotations

import asyncio
import random
from typing import Any, Final, TypeAlias
from weakref import WeakKeyDictionary

from redis.asyncio import RedisCluster
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from silbo.brokers.redis.connection import Client, Connection, Lost, Refused, connect, open_connection

__all__ = ["Address", "ClusterNodes", "connect_to", "doubt_node", "nodes_of"]

Address: TypeAlias = "tuple[str, int]"
"""The host and the port of a node."""

ASK_WITHIN: Final = 1.0
"""A node that does not tell the slots within 1 second is passed over: it may be frozen. A node that was in trouble is waited
for no longer either when it is connected to again: others may wait behind it."""
LAST_WITHIN: Final = 5.0
"""The last node to ask, often the only one that is known, is waited for up to 5 seconds: it may be far away or busy."""
# Settings of the cluster client that no connection takes, and the function with which it reads from replicas.
_DROPPED: Final = frozenset({"connection_class", "max_connections", "redis_connect_func", "response_callbacks"})


class ClusterNodes:
    """The nodes of a cluster, by the slots that they serve.

    Only the settings of the program's client are used: the client opens nothing, and stays as it is. The slots are asked
    for when a key is looked for first, and again when a node that serves it was in trouble.

    Args:
        client: The program's client.
    """

    def __init__(self, client: RedisCluster) -> None:
        settings = client.connection_kwargs
        self._connection_class = settings["connection_class"]
        self._settings: dict[str, Any] = {name: value for name, value in settings.items() if name not in _DROPPED}
        self._first: list[Address] = [(node.host, int(node.port)) for node in client.startup_nodes]
        self._remap = client.nodes_manager.remap_host_port
        self._served_by: list[Address | None] = []  # by slot
        self._known: list[Address] = []  # masters and replicas
        self._doubted: set[Address] = set()  # were in trouble since the slots were asked for
        self._silent: set[Address] = set()  # were in trouble since they were last connected to

    def is_known(self, address: Address) -> bool:
        """Return True if the node was one of the cluster when the slots were asked for last."""
        return address in self._known

    @property
    def masters(self) -> list[Address]:
        """The nodes that serve slots, as far as they are known."""
        return [address for address in dict.fromkeys(self._served_by) if address is not None]

    async def find(self, key: bytes) -> Address:
        """Return the node that serves the key.

        Raises:
            Lost: no node could be asked; safe to repeat.
            Refused: CLUSTERDOWN if none serves the key now; else wrong credentials, or it is no cluster: repeating does not
                help.
        """
        slot = key_slot(key)
        address = self._served_by[slot] if self._served_by else None
        if address is None or address in self._doubted:
            await self.refresh()
            address = self._served_by[slot]
        if address is None:
            raise Refused(f"CLUSTERDOWN no node serves the slot {slot}")
        return address

    async def find_any(self) -> Address:
        """Return one of the nodes that serve slots, by chance, and rather one that was not in trouble.

        Raises:
            Lost: no node could be asked; safe to repeat.
            Refused: as in :meth:`find`.
        """
        if not self._served_by or self._doubted:
            await self.refresh()
        masters = self.masters
        if not masters:
            raise Refused("CLUSTERDOWN no node serves a slot")
        return random.choice([address for address in masters if address not in self._silent] or masters)

    async def connect(self, address: Address) -> Connection:
        """Return a new connection to a node: see :func:`~silbo.brokers.redis.connection.connect`."""
        host, port = address
        settings = self._settings | {"host": host, "port": port}
        try:
            async with asyncio.timeout(ASK_WITHIN if address in self._silent else None):
                connection = await open_connection(self._connection_class, settings, is_node=True)
        except TimeoutError:
            self.doubt(address)
            raise Lost(f"{host}:{port} has not answered for long") from None
        except BaseException:  # also a caller's time limit: a frozen node
            self.doubt(address)
            raise
        self._silent.discard(address)
        return connection

    def doubt(self, address: Address) -> None:
        """Note that the node was in trouble: another one may serve its slots by now."""
        self._doubted.add(address)
        self._silent.add(address)

    def doubt_key(self, key: bytes) -> None:
        """Note that the node that serves the key was in trouble."""
        if self._served_by and (address := self._served_by[key_slot(key)]) is not None:
            self.doubt(address)

    def follow(self, refusal: Refused, answered_by: Address) -> Address | None:
        """Return the node to which a MOVED or ASK leads; None if the answer does not name it. Note a slot that has moved."""
        code, slot, where = str(refusal).split(" ")[:3]
        host, _, port = where.rpartition(":")
        if host == "?":
            self.doubt(answered_by)
            return None
        address = self._address(host, int(port), answered_by)
        if code == "MOVED" and self._served_by:
            self._served_by[int(slot)] = address
        return address

    async def refresh(self) -> None:
        """Ask for the slots: the nodes that are known, in an order by chance, until one answers.

        Raises:
            Lost: none answered; safe to repeat.
            Refused: wrong credentials, or it is no cluster; repeating does not help.
        """
        nodes = list(dict.fromkeys(random.sample(self._known, len(self._known)) + self._first))
        nodes.sort(key=self._doubted.__contains__)
        trouble = ""
        for address in nodes:
            within = LAST_WITHIN if address == nodes[-1] else ASK_WITHIN
            try:
                async with asyncio.timeout(within):
                    self._note_slots(await self._ask(address), address)
                return
            except (Lost, TimeoutError) as error:
                trouble = f"{address[0]}:{address[1]}: {str(error) or 'no answer'}"
        raise Lost(f"no node of the cluster answers ({trouble})")

    async def _ask(self, address: Address) -> Any:
        connection = await self.connect(address)
        try:
            return await connection.execute(b"CLUSTER", b"SLOTS")
        finally:
            await connection.drop()

    def _note_slots(self, rows: Any, answered_by: Address) -> None:
        served_by: list[Address | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        known: list[Address] = []
        for begin, end, *nodes in rows:
            addresses = [self._address((host or b"").decode(), port, answered_by) for host, port, *_ in nodes]
            known += addresses
            served_by[begin : end + 1] = addresses[:1] * (end + 1 - begin)
        self._served_by = served_by
        self._known = list(dict.fromkeys(known))
        self._doubted.clear()

    def _address(self, host: str, port: int, answered_by: Address) -> Address:
        """Return where a node is reached; a node that does not know its own host means the one that it was reached at."""
        host, port = self._remap(host if host not in ("", "?") else answered_by[0], port)
        return host, port


_NODES: WeakKeyDictionary[RedisCluster, ClusterNodes] = WeakKeyDictionary()


def nodes_of(client: RedisCluster) -> ClusterNodes:
    """Return the nodes of the client's cluster; all parts of a program learn together that a slot has moved."""
    nodes = _NODES.get(client)
    if nodes is None:
        nodes = _NODES[client] = ClusterNodes(client)
    return nodes


def doubt_node(client: Client, key: bytes) -> None:
    """Note that a connection of :func:`connect_to` was in trouble: the next one may lead to another node."""
    if isinstance(client, RedisCluster):
        nodes_of(client).doubt_key(key)


async def connect_to(client: Client, key: bytes | None) -> Connection:
    """Return a new connection to the client's server; in a cluster, to the node that serves the key now, or to any without one.

    When the slot moves or the node becomes a replica, commands on this connection get MOVED or ASK: connect again.

    Raises:
        Lost: there is no connection; safe to repeat, and then another node may be the one.
        Refused: wrong credentials, or no such database; repeating does not help.
    """
    if not isinstance(client, RedisCluster):
        return await connect(client)
    nodes = nodes_of(client)
    return await nodes.connect(await nodes.find_any() if key is None else await nodes.find(key))
