"""A relay in a process of its own; its ledger has what it reports: the class of each error, and how often."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chaos.client import make_client
from chaos.events import APP
from chaos.ledger import Ledger
from chaos.worker import ready, serve
from silbo import Relay
from silbo.brokers.redis import RedisStreams
from silbo.stores.sqlite import SQLiteStore


@dataclass(frozen=True)
class Settings:
    """Of which store, to where."""

    url: str
    store: str
    ledger: str
    lease: float = 1.0
    timeout: float = 5.0
    strays: bool = False
    """True if the hook for errors leaves a cancellation on the task that calls it."""


async def main(settings: Settings, stopping: asyncio.Event) -> dict[str, Any]:
    ledger = Ledger(Path(settings.ledger))

    async def report(error: Exception, what: Any) -> None:
        await ledger.write(type(error).__name__)
        if settings.strays and (task := asyncio.current_task()):
            task.cancel()  # and not one await afterwards

    async with make_client(settings.url) as client:
        streams = RedisStreams(client, app=APP, timeout=settings.timeout)
        async with Relay(SQLiteStore(settings.store), streams, lease=settings.lease, on_error=report) as relay:
            running = asyncio.create_task(relay.run())
            ready()
            await asyncio.wait([running, asyncio.create_task(stopping.wait())], return_when=asyncio.FIRST_COMPLETED)
            relay.stop()
            await running
    await ledger.close()
    return asdict(relay.stats)


if __name__ == "__main__":
    serve(Settings, main)
