"""A process that places one order and is killed before its n-th statement, where a commit counts as one: ``file n``.

With 0 it is not killed, and prints how many there were.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

from sqlalchemy import event

from examples.orders.__main__ import open_database
from examples.orders.shop import PlaceOrder, shop
from silbo import Outbox
from silbo.brokers.memory import MemoryBroker
from silbo.stores.sqlalchemy import SQLAlchemyStore


async def main(file: Path, doomed: int) -> None:
    engine = await open_database(file)
    async with Outbox(SQLAlchemyStore(engine), MemoryBroker(app="shop"), relay=False) as outbox:
        mediator = shop(engine, outbox)
        count = 0

        def step(*_: Any) -> None:
            nonlocal count
            count += 1
            if count == doomed:
                os.kill(os.getpid(), signal.SIGKILL)

        event.listen(engine.sync_engine, "before_cursor_execute", step)
        event.listen(engine.sync_engine, "commit", step)
        await mediator.send(PlaceOrder(item="teapot", quantity=3))
        if doomed:
            os.kill(os.getpid(), signal.SIGKILL)
        print(count)
    await engine.dispose()


asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
