"""The event flow of python-cqrs: one by one or side by side, with follow-ups, and a warning for an event that nobody handles.

python -m examples.from_sources.cqrs_flow
"""

import asyncio
import logging

import di
from di.dependent import Dependent

from examples.from_sources.cqrs_shop import PlaceOrder, Warehouse, commands_mapper, events_mapper
from silbo import Mediator, bootstrap
from silbo.brokers.memory import MemoryBroker


def build(warehouse: Warehouse, at_once: int) -> Mediator:
    """Return a shop with one warehouse, whose orders are sent to other programs."""
    container = di.Container()
    container.bind(di.bind_by_type(Dependent(lambda: warehouse, scope="request"), Warehouse))
    return bootstrap(
        di_container=container,
        commands_mapper=commands_mapper,
        domain_events_mapper=events_mapper,
        message_broker=MemoryBroker("shop"),
        max_concurrent_event_handlers=at_once,
    )


async def main() -> None:
    """Place the same order twice: its events one by one, and two at a time. Then place two empty orders, which nobody handles."""
    for at_once in (1, 2):
        warehouse = Warehouse()
        items = await build(warehouse, at_once).send(PlaceOrder("o-1", ("pear", "fig", "plum")))
        print(f"{items} items, at most {warehouse.most_at_work} at once:")
        print(*warehouse.log, sep=", ")

    mediator = build(Warehouse(), 1)
    for order_id in ("o-2", "o-3"):
        await mediator.send(PlaceOrder(order_id, ()))  # the warning comes once


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s %(message)s")
    asyncio.run(main())
