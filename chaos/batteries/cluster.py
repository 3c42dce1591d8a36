"""A Redis Cluster under load: slots move, replicas are promoted, masters are killed and frozen; an outbox stands in front.

Moving slots and promoting a replica in good order lose nothing. A master that is killed or frozen takes its last messages with it, as
far as its replica does not have them: that is the roll-back of the promise table. So what is lost has to be of those moments, and
a replay of the outbox brings it.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from functools import partial
from uuid import UUID

from redis.crc import key_slot

from chaos.batteries.storm import Progress
from chaos.check import Entry, check_effects, check_handled, entries, given, unfinished
from chaos.client import CLUSTER, make_client
from chaos.events import APP, CHARGED, STREAM
from chaos.stage import Stage
from silbo import Outbox
from silbo.brokers.redis import RedisStreams
from silbo.stores.sqlite import SQLiteStore
from tools.redis_cluster import ClusterNode, ClusterServers, wait_for

CHARGES = "charges"
"""The address of the events that have effects in a database."""
STREAMS = {STREAM: "readers", f"silbo:{{{CHARGES}}}": "effects"}
"""The streams, in different slots, and a group that reads each."""
EACH = 2
"""Relays, and consumers."""
CUTS = 20
"""Times that all connections are cut, in one round."""
BEFORE, AFTER = 10.0, 5.0
"""Seconds before a master was struck, and after its replica was promoted, in which events were given that may be lost."""


async def cluster(
    stage: Stage,
    *,
    rounds: int = 4,
    rate: float = 500.0,
    flow: int = 1_000,
    within: float = 240.0,
) -> None:
    """See above; a round is one fault of each kind, to a stream's node that chance chooses."""
    servers = stage.cluster()
    url, store, effects = servers.url.replace("redis://", CLUSTER), str(stage.folder / "outbox.db"), "effects.db"
    began = datetime.now(UTC)
    consumers = [
        await stage.start(
            f"consumer-{number}",
            "consumer",
            url=url,
            ledger=str(stage.ledger(f"consumer-{number}")),
            effects=str(stage.folder / effects),
            charges=CHARGES,
        )
        for number in range(EACH)
    ]
    relays = [
        await stage.start(
            f"relay-{number}", "relay", url=url, store=store, ledger=str(stage.ledger(f"relay-{number}")), lease=1.0
        )
        for number in range(EACH)
    ]
    producer = await stage.start(
        "producer",
        "producer",
        name="p",
        url=url,
        ledger=str(stage.ledger("producer")),
        lanes=50,
        each=1_000_000,
        rate=rate,
        store=store,
        charges=2,
        charges_to=CHARGES,
    )
    handled = Progress([stage.ledger(one.name) for one in consumers])
    counted = Progress([stage.ledger("producer")])
    faults = Faults(stage, servers)

    await producer.ready()

    async with make_client(url) as client, RedisStreams(client, app=APP) as streams:
        async with Outbox(SQLiteStore(store, create=False), streams, relay=False) as outbox:

            async def flows() -> None:
                wanted = handled() + flow
                await stage.until("events are handled", lambda: handled() >= wanted, within)
                await stage.until("relays keep up", keeps_up, within)

            async def keeps_up() -> bool:
                return (await outbox.status()).unsent < 2 * rate

            async def is_settled() -> bool:
                if (await outbox.status()).unsent:
                    return False
                return not any([await unfinished(client, group, stream) for stream, group in STREAMS.items()])

            async with stage.saying(lambda: f"{counted()} given, {handled()} handled; {faults}"):
                await flows()
                for _ in range(rounds):
                    for fault in stage.random.sample(faults.kinds, len(faults.kinds)):
                        await fault(stage.random.choice(list(STREAMS)))
                        await flows()
            await producer.stop()
            await stage.settled("all events sent and handled", is_settled, within)
            safe = given([stage.ledger("producer")])
            _check(stage, safe, [await entries(url, stream) for stream in STREAMS], faults)
            stage.note("replayed", await outbox.replay(since=began))
            await stage.settled("all replayed events sent and handled", is_settled, within)
    for worker in [*relays, *consumers]:
        await worker.stop()
    found = [entry for stream in STREAMS for entry in await entries(url, stream)]
    stage.zero("lost after the replay", len(safe.keys() - {entry.event for entry in found}))
    charged = {entry.event for entry in found if entry.name == str(CHARGED)}
    check_handled(stage, {entry.event for entry in found} - charged, [stage.ledger(one.name) for one in consumers])
    check_effects(stage, charged, stage.folder / effects)


def _check(stage: Stage, safe: dict[str, tuple[str, int]], streams: list[list[Entry]], faults: Faults) -> None:
    """Before the replay: nothing is doubled or out of order; what is lost was given when a master was struck."""
    for name, many in faults.done.items():
        stage.note(name, many)
    found = [entry for stream in streams for entry in stream]
    lost = safe.keys() - {entry.event for entry in found}
    stage.note("given", len(safe))
    stage.note("lost with a master", len(lost))
    stage.zero("lost beyond that", sum(not faults.has_struck_at(_given_at(event)) for event in lost))
    publications = Counter(entry.publication for entry in found)
    stage.zero("duplicates", sum(publications.values()) - len(publications))
    last: dict[str, int] = {}
    inversions = 0
    for entry in found:  # a lane's events are all in one stream
        inversions += entry.number < last.get(entry.lane, 0)
        last[entry.lane] = entry.number
    stage.zero("inversions", inversions)


def _given_at(event: str) -> float:
    """The time when an event was made: a version 7 UUID begins with it."""
    return (UUID(event).int >> 80) / 1000


class Faults:
    """The faults of the nodes, one after another: each ends with a whole cluster."""

    def __init__(self, stage: Stage, servers: ClusterServers) -> None:
        self._stage, self._servers = stage, servers
        self._struck: list[tuple[float, float]] = []
        self.done: dict[str, int] = {}
        self.kinds: list[Callable[[str], Awaitable[None]]] = [
            self.move,
            self.promote,
            self.cut,
            partial(self._strike, "masters killed", ClusterNode.kill, ClusterNode.restart),
            partial(self._strike, "masters frozen", ClusterNode.pause, ClusterNode.resume),
        ]

    def __str__(self) -> str:
        return ", ".join(f"{many} {name}" for name, many in self.done.items())

    def has_struck_at(self, moment: float) -> bool:
        """True if a master was struck at about this time."""
        return any(begin - BEFORE <= moment <= end + AFTER for begin, end in self._struck)

    async def move(self, stream: str) -> None:
        """Move the stream's slot to another master, key by key."""
        slot = key_slot(stream.encode())
        masters = [node for node in self._servers.nodes if node.run("ROLE")[0] == "master"]
        source = self._servers.node_of(slot)
        target = self._stage.random.choice([node for node in masters if node is not source])
        await asyncio.to_thread(self._servers.begin_move, slot, target)
        while keys := await asyncio.to_thread(source.run, "CLUSTER", "GETKEYSINSLOT", slot, 1):
            await asyncio.to_thread(self._servers.move_key, keys[0], source, target)
            await asyncio.sleep(self._stage.random.uniform(0.0, 0.1))
        await asyncio.sleep(self._stage.random.uniform(0.0, 0.5))
        await asyncio.to_thread(self._servers.end_move, slot, target)
        self._note("slots moved")

    async def promote(self, stream: str) -> None:
        """Let the replica take over in good order."""
        replica = self._servers.replica_of(self._servers.node_of(stream))
        replica.run("CLUSTER", "FAILOVER")
        await asyncio.to_thread(wait_for, lambda: replica.run("ROLE")[0] == "master")
        await asyncio.to_thread(wait_for, self._servers.is_complete)
        self._note("replicas promoted")

    async def cut(self, stream: str) -> None:
        """Cut all connections of the clients, so that replies are lost."""
        for _ in range(CUTS):
            for node in self._servers.nodes:
                await asyncio.to_thread(node.run, "CLIENT", "KILL", "TYPE", "normal")
            await asyncio.sleep(self._stage.random.uniform(0.0, 0.2))
        self._note("rounds of connections cut")

    async def _strike(
        self, name: str, strike: Callable[[ClusterNode], None], mend: Callable[[ClusterNode], None], stream: str
    ) -> None:
        master = self._servers.node_of(stream)
        replica = self._servers.replica_of(master)
        began = time.time()
        await asyncio.to_thread(strike, master)
        await asyncio.to_thread(wait_for, lambda: replica.run("ROLE")[0] == "master")
        self._struck.append((began, time.time()))
        await asyncio.sleep(self._stage.random.uniform(0.0, 1.0))
        await asyncio.to_thread(mend, master)
        await asyncio.to_thread(wait_for, self._servers.is_complete)
        self._note(name)

    def _note(self, name: str) -> None:
        self.done[name] = self.done.get(name, 0) + 1
