"""A consumer whose listener is done when its ledger has the line: `lane number event_id`."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from random import random
from typing import Any, Final

from chaos.client import make_client
from chaos.events import APP, CHARGED, COUNTED, Counted
from chaos.ledger import Ledger
from chaos.worker import ready, serve
from silbo import AsyncEventDispatcher, Backoff, Consumer, EventName
from silbo.brokers.redis import RedisStreams
from silbo.errors import BrokerUnavailable


@dataclass(frozen=True)
class Settings:
    """What to hear, and what to be like.

    Attributes:
        name: Of the consumer in its group; empty for another in each process.
        claim_after: Seconds of silence after which another consumer takes over.
        slow: Seconds that a slow listener takes.
        slow_one_in: How many of them are.
        effects: A database in which a second group with an inbox has its effects; empty for no such group.
        charges: The address that the second group reads; empty for the same stream.
        flaky: One event in so many fails at its first attempt.
        strays: One event in so many has its listener do to its task what no listener should.
    """

    url: str
    ledger: str
    group: str = "readers"
    name: str = ""
    claim_after: float = 2.0
    concurrency: int = 64
    max_attempts: int = 5
    slow: float = 0.0
    slow_one_in: int = 1
    flaky: int = 0
    strays: int = 0
    effects: str = ""
    charges: str = ""


def _cancel_own_task() -> None:
    task = asyncio.current_task()
    assert task
    task.cancel()


async def _time_out() -> None:
    """As async_timeout before 4.0.3 does: the task is cancelled, the cancellation caught, and never taken back."""
    task = asyncio.current_task()
    assert task
    timer = asyncio.get_running_loop().call_later(0.001, task.cancel)
    try:
        await asyncio.sleep(3600.0)
    except asyncio.CancelledError:
        pass
    finally:
        timer.cancel()


async def _swallow() -> None:
    """As code that catches too much."""
    for _ in range(3):
        _cancel_own_task()
        try:
            await asyncio.sleep(0)
        except BaseException:  # noqa: BLE001
            pass


BEFORE: Final = {"old time limit": _time_out, "swallowed cancellations": _swallow}
STRAYS: Final = (*BEFORE, "its own cancellation", "cancelled by others")
"""The things that a listener does to its task; the event is handled all the same."""


class Listener:
    """Hears what comes, and is as its settings say."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.ledger = Ledger(Path(settings.ledger))
        self._failed: Counter[tuple[str, int]] = Counter()
        self.strays: Counter[str] = Counter()

    async def __call__(self, event: Counted) -> None:
        if event.fate == "kills":
            os.kill(os.getpid(), signal.SIGKILL)
        if event.fate == "fails":
            raise ValueError("it always fails")
        if self._settings.slow and random() * self._settings.slow_one_in < 1.0:
            await asyncio.sleep(self._settings.slow)
        if self._settings.flaky and event.number % self._settings.flaky == 0:
            self._failed[event.lane, event.number] += 1
            if self._failed[event.lane, event.number] == 1:
                raise ValueError("it fails at first")
        stray = STRAYS[self.strays.total() % len(STRAYS)] if self._is_stray(event) else None
        if stray in BEFORE:
            self.strays[stray] += 1
            await BEFORE[stray]()
        elif stray == "cancelled by others" and not self._failed[event.lane, event.number]:
            self._failed[event.lane, event.number] += 1
            self.strays[stray] += 1
            raise asyncio.CancelledError
        await self.ledger.write(f"{event.lane} {event.number} {event.event_id}")
        if stray == "its own cancellation":
            self.strays[stray] += 1
            _cancel_own_task()  # and not one await afterwards

    def _is_stray(self, event: Counted) -> bool:
        return bool(self._settings.strays) and event.number % self._settings.strays == 0


async def main(settings: Settings, stopping: asyncio.Event) -> dict[str, Any]:
    listener = Listener(settings)
    errors: Counter[str] = Counter()

    def report(error: Exception, delivery: Any) -> None:
        errors[type(error).__name__] += 1

    async with AsyncExitStack() as stack:
        client = make_client(settings.url)
        stack.push_async_callback(client.aclose)
        streams = await stack.enter_async_context(RedisStreams(client, app=f"{APP}-reader"))

        async def consume(
            group: str, events: list[EventName[Counted]], heard: Any, address: str = "", **more: Any
        ) -> Consumer:
            dispatcher = AsyncEventDispatcher()
            for name in events:
                dispatcher.add_listener(name, heard)
            subscription = streams.group(
                group,
                start="oldest",
                consumer=settings.name or None,
                streams=[address] if address else None,
                claim_after=settings.claim_after,
            )
            while True:  # a Redis that is away at the start is for a supervisor: here is one
                consumer = Consumer(
                    dispatcher,
                    subscription,
                    events=events,
                    max_attempts=settings.max_attempts,
                    backoff=Backoff(initial=0.05, cap=0.2),
                    on_error=report,
                    **more,
                )
                try:
                    return await stack.enter_async_context(consumer)
                except BrokerUnavailable:
                    await asyncio.sleep(0.1)

        consumers = [await consume(settings.group, [COUNTED, CHARGED], listener, concurrency=settings.concurrency)]
        if settings.effects:
            from chaos.effects import Effects  # not every Python that plays here has SQLAlchemy

            effects = await stack.enter_async_context(Effects(settings.effects))
            consumers.append(await consume("effects", [CHARGED], effects.have, settings.charges, inbox=effects.inbox))
        ready()
        running = [asyncio.create_task(consumer.run()) for consumer in consumers]
        await asyncio.wait([*running, asyncio.create_task(stopping.wait())], return_when=asyncio.FIRST_COMPLETED)
        for consumer in consumers:
            consumer.stop()
        await asyncio.gather(*running)
    await listener.ledger.close()
    return asdict(consumers[0].stats) | {"errors": errors, "strays": listener.strays}


if __name__ == "__main__":
    serve(Settings, main)
