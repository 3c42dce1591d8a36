"""Hooks into a running system, as HARP's page on Whistle describes them.

python -m examples.from_sources.harp
"""

import asyncio

import rodi

from examples.from_sources.harp_events import MY_EVENT, MyEvent
from silbo import AsyncEventDispatcher, Event, IAsyncEventDispatcher
from silbo.containers.rodi import register_dispatcher


async def symbolic_name(dispatcher: IAsyncEventDispatcher) -> None:
    """An event can be a string and nothing else."""

    async def hear(event: Event) -> None:
        print("heard", event.name)

    dispatcher.add_listener("system.ready", hear)
    await dispatcher.adispatch("system.ready")


async def mutable_envelope(dispatcher: IAsyncEventDispatcher) -> None:
    """Whoever dispatches gets the envelope back, with what the listeners have made of it."""

    async def my_listener(event: MyEvent) -> None:
        print("my_listener has", event.context)
        event.context["foo"] = "changed"

    dispatcher.add_listener(MY_EVENT, my_listener)
    event = await dispatcher.adispatch("my.event", MyEvent({"foo": "bar"}))  # the constant is that string
    print("the caller has", event.context)


class MyEventListener:
    """Registers itself with the dispatcher that its container has."""

    def __init__(self, dispatcher: IAsyncEventDispatcher) -> None:
        dispatcher.add_listener(MY_EVENT, self.handle)

    async def handle(self, event: MyEvent) -> None:
        print("MyEventListener has", event.context)


class Audit:
    """Given to the dispatcher as a class; the container makes one for each event."""

    async def handle(self, event: MyEvent) -> None:
        print("Audit has", event.context)


class MyEventEmittingService:
    """Knows the type that it asks for, and nobody who listens."""

    def __init__(self, dispatcher: IAsyncEventDispatcher) -> None:
        self._dispatcher = dispatcher

    async def handle(self) -> None:
        await self._dispatcher.adispatch(MY_EVENT, MyEvent({"foo": "bar"}))


async def container_wide_dispatcher() -> None:
    """Components that have never heard of each other meet at the container's dispatcher."""
    container = rodi.Container()
    dispatcher = register_dispatcher(container)
    for component in (MyEventListener, MyEventEmittingService):
        container.add_singleton(component)
    container.register(Audit)

    dispatcher.add_listener(MY_EVENT, Audit, priority=1)
    container.resolve(MyEventListener)  # from here on it listens
    await container.resolve(MyEventEmittingService).handle()


async def main() -> None:
    """All of the page."""
    await symbolic_name(AsyncEventDispatcher())
    await mutable_envelope(AsyncEventDispatcher())
    await container_wide_dispatcher()


if __name__ == "__main__":
    asyncio.run(main())
