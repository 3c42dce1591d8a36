"""Tools of the tests of the outbox and its relay: messages, a broker that fails, a reader, and waiting."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from silbo.brokers.memory import MemoryBroker
from silbo.message import Delivery, Message
from silbo.outbox.rows import OutboxStore
from silbo.protocols import Sequenced


def message(number: int, key: str | None = "a") -> Message:
    headers = {"publication": f"p-{number}"} | ({} if key is None else {"key": key})
    return Message("ecst_event", "counted", f"id-{number}", {"n": number}, headers)


class FailingBroker(MemoryBroker):
    """The broker in memory, whose next calls can be made to fail, before or after it has carried them out."""

    def __init__(self, app: str = "web") -> None:
        super().__init__(app, limit=100_000)
        self.before: deque[Exception] = deque()
        self.after: deque[Exception] = deque()
        self.away: Exception | None = None
        self.calls: list[tuple[str, int, list[int]]] = []
        self.called = asyncio.Event()
        self.closed = 0

    async def publish_sequenced(self, source: str, epoch: int, messages: Sequence[tuple[int, Message]]) -> Sequenced:
        self.calls.append((source, epoch, [sequence for sequence, _ in messages]))
        self.called.set()
        if self.away is not None:
            raise self.away
        if self.before:
            raise self.before.popleft()
        answer = await super().publish_sequenced(source, epoch, messages)
        if self.after:
            raise self.after.popleft()
        return answer

    async def wait_for_calls(self, times: int) -> None:
        """Wait until it was called this many times more."""
        many = len(self.calls) + times
        async with asyncio.timeout(20):
            while len(self.calls) < many:
                self.called.clear()
                await self.called.wait()

    async def aclose(self) -> None:
        self.closed += 1


class GroupReader:
    """Receives what a group of the broker gets, and keeps the numbers of the messages in order."""

    def __init__(self, receiver: Any) -> None:
        self._receiver = receiver
        self.numbers: list[int] = []
        self.deliveries: list[Delivery] = []

    async def until(self, many: int) -> list[int]:
        """Wait until so many messages were received; return their numbers."""
        async with asyncio.timeout(20):
            while len(self.numbers) < many:
                await self.more()
        return self.numbers

    async def more(self) -> None:
        for item in await self._receiver.receive(10_000):
            assert isinstance(item, Delivery)
            self.deliveries.append(item)
            self.numbers.append(item.message().payload["n"])
            await self._receiver.ack(item)


async def wait_until(check: Callable[[], Any]) -> None:
    """Wait until the check, or what it awaits, is true; fail after 20 s."""
    async with asyncio.timeout(20):
        while True:
            answer = check()
            if await answer if asyncio.iscoroutine(answer) else answer:
                return
            await asyncio.sleep(0.005)


async def wait_until_sent(store: OutboxStore) -> None:
    """Wait until no row of a store is pending or sending."""

    async def is_sent() -> bool:
        counts = (await store.status()).counts
        return counts["pending"] == counts["sending"] == 0

    await wait_until(is_sent)
