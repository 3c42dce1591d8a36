"""One member of a Kafka group, as a process: ``URL LEDGER NAME``.

It writes a line before and after the work of each listener, and when Kafka has confirmed an offset.

All members append to one file, so its lines are in the order in which things happened.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Any

from confluent_kafka import Message

from examples.kafka_group import KafkaGroup
from silbo import AsyncEventDispatcher, receive

WORK = 0.01
"""Seconds that a listener takes."""


class Member(KafkaGroup):
    """A member that tells what it has committed."""

    def __init__(self, *arguments: Any, ledger: int, name: str) -> None:
        super().__init__(*arguments)
        self._ledger, self._name = ledger, name

    async def _commit(self, consumer: Any, lanes: Any) -> None:
        before = {place: lane.committed for place, lane in lanes.items()}
        await super()._commit(consumer, lanes)
        for (topic, partition), lane in lanes.items():
            if lane.committed != before[topic, partition]:
                os.write(self._ledger, f"commit {self._name} {partition} {lane.committed} -\n".encode())


async def main(url: str, path: str, name: str) -> None:
    ledger = os.open(path, os.O_WRONLY | os.O_APPEND)
    dispatcher = AsyncEventDispatcher()

    @dispatcher.listen("conformance.checked")
    async def work(event: Any) -> None:
        await asyncio.sleep(WORK)

    async def handle(record: Message) -> None:
        line = f"{name} {record.partition()} {record.offset()} {(record.key() or b'').decode()}"
        os.write(ledger, f"begin {line}\n".encode())
        await receive(dispatcher, record.value())
        os.write(ledger, f"end {line}\n".encode())

    async def park(record: Message, error: Exception) -> None:
        raise error

    settings = {
        "bootstrap.servers": url,
        "group.id": "billing",
        "session.timeout.ms": 6000,
        "heartbeat.interval.ms": 500,
    }
    group = Member(settings, ["events"], handle, park, ledger=ledger, name=name)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, group.stop)
    await group.run()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
