"""Processes in one Kafka group on Tansu: one joins, one leaves, and one is killed inside of its listeners, all under load."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from aiokafka import AIOKafkaProducer

from silbo.brokers.kafka import Kafka
from silbo.testing.conformance import message
from tools.tansu import TansuServer

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 60.0
PARTITIONS = 8
KEYS = 200
GAP = 0.004
"""Seconds between two messages of the load."""


class Line(NamedTuple):
    what: str
    member: str
    partition: int
    offset: int
    key: str


class Ledger:
    """What the members have begun and ended, in its order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def lines(self) -> list[Line]:
        # A line may be half written.
        rows = (row.split() for row in self.path.read_text().split("\n")[:-1])
        return [Line(what, member, int(partition), int(offset), key) for what, member, partition, offset, key in rows]

    def ends(self) -> list[Line]:
        return [line for line in self.lines() if line.what == "end"]

    def in_hand(self, member: str) -> set[tuple[int, int]]:
        places: dict[str, set[tuple[int, int]]] = {"begin": set(), "end": set()}
        for line in self.lines():
            if line.member == member and line.what != "commit":
                places[line.what].add((line.partition, line.offset))
        return places["begin"] - places["end"]

    def partitions(self, member: str, after: int = 0) -> set[int]:
        return {line.partition for line in self.lines()[after:] if line.member == member and line.what == "begin"}


@contextmanager
def member(url: str, ledger: Ledger, name: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "tests.support.kafka_member", url, str(ledger.path), name]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():
            await asyncio.sleep(0.05)


async def freeze_in_a_listener(process: subprocess.Popen[bytes], ledger: Ledger, name: str) -> set[tuple[int, int]]:
    """Stop a member where it has begun and not ended; the records that it has in hand."""
    async with asyncio.timeout(DEADLINE):
        while True:
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
            if in_hand := ledger.in_hand(name):
                return in_hand
            process.send_signal(signal.SIGCONT)
            await asyncio.sleep(0.01)


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_members_join_leave_and_are_killed_without_loss_or_inversion(tmp_path: Path) -> None:
    """What was not committed comes again, and nothing else. Each key keeps its order.

    Planned moves repeat something, too: while another member joins again, Tansu refuses some commits (ILLEGAL_GENERATION).
    """
    ledger = Ledger(tmp_path / "ledger")
    with TansuServer() as server, member(server.url, ledger, "a") as a, member(server.url, ledger, "b") as b:
        server.create_topic("events", partitions=PARTITIONS)
        async with (
            AIOKafkaProducer(bootstrap_servers=server.url, acks="all") as producer,
            Kafka(producer, app="web") as broker,
        ):
            sent, stopping = 0, False

            async def load() -> None:
                nonlocal sent
                while not stopping:
                    made = message(sent)
                    made.headers["key"] = f"k{sent % KEYS}"
                    await broker.publish(made)
                    sent += 1
                    await asyncio.sleep(GAP)

            loading = asyncio.create_task(load())
            try:
                await until(lambda: ledger.partitions("a") and ledger.partitions("b"))
                with member(server.url, ledger, "c") as c:
                    await until(lambda: len([line for line in ledger.ends() if line.member == "c"]) > 50)
                    c.send_signal(signal.SIGTERM)
                    assert await asyncio.to_thread(c.wait, DEADLINE) == 0
                    assert not ledger.in_hand("c")
                seen = len(ledger.lines())
                await until(
                    lambda: ledger.partitions("c") <= ledger.partitions("a", seen) | ledger.partitions("b", seen)
                )
                planned = count_repeated(ledger.ends())

                in_hand = await freeze_in_a_listener(a, ledger, "a")
                a.kill()
                a.wait()
                seen = len(ledger.lines())
                await until(lambda: ledger.partitions("b", seen) == set(range(PARTITIONS)))
            finally:
                stopping = True
                await loading
            await until(lambda: len({(line.partition, line.offset) for line in ledger.ends()}) >= sent)
            b.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(b.wait, DEADLINE) == 0

    assert {(line.partition, line.offset) for line in ledger.ends()} >= in_hand
    assert len({(line.partition, line.offset) for line in ledger.ends()}) == sent, "a message was lost"
    committed_by: dict[int, int] = {}
    for line in ledger.lines():
        if line.what == "commit":
            committed_by[line.partition] = max(line.offset, committed_by.get(line.partition, 0))
        else:
            assert line.offset >= committed_by.get(line.partition, 0), "committed, and handled again"
    firsts: dict[str, dict[int, None]] = {}
    for line in ledger.ends():
        firsts.setdefault(line.key, {})[line.offset] = None
    assert len(firsts) == KEYS
    assert all(list(offsets) == sorted(offsets) for offsets in firsts.values()), "a key lost its order"
    repeated = count_repeated(ledger.ends())
    print(
        f"{sent} sent, {planned} repeated by planned moves, {len(in_hand)} in hand at the kill, {repeated} repeated in all"
    )


def count_repeated(ends: list[Line]) -> int:
    return len(ends) - len({(line.partition, line.offset) for line in ends})
