"""Running the consumers of a program until they are stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from silbo.consumer.consumer import Consumer

__all__ = ["run_consumers"]


async def run_consumers(consumers: Sequence[Consumer]) -> None:
    """Run consumers side by side until all of them have been stopped. If one fails, the others are stopped.

    A consumer that is not entered waits for a broker that is unavailable. A cancellation leaves at once; the deliveries in hand
    come again.

    Raises:
        ExceptionGroup: Several consumers have failed.
        Exception: The error of the one that failed.
    """
    errors: list[Exception] = []

    async def run(consumer: Consumer) -> None:
        try:
            await consumer.run()
        except Exception as error:  # noqa: BLE001  # raised when the others have ended
            errors.append(error)
            for other in consumers:
                other.stop()

    async with asyncio.TaskGroup() as tasks:
        for consumer in consumers:
            _ = tasks.create_task(run(consumer))
    if len(errors) > 1:
        raise ExceptionGroup("several consumers have failed", errors)
    if errors:
        raise errors[0]
