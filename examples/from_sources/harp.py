"""Hooks into a running system, as HARP's page on Whistle describes them.

python -m examples.from_sources.harp
"""

import asyncio

import rodi

from examples.from_sources.harp_events import MY_EVENT, MyEvent
from silbo import AsyncEventDispatcher, Event, IAsyncEventDispatcher
from silbo.containers.rodi import register_dispatcher


async def symbolic_name(dispatcher: IAsyncEventDispatcher) -> None:
    """Dispatch an event that is only a string."""

    async def hear(event: Event) -> None:
        print("heard", event.name)

    dispatcher.add_listener("system.ready", hear)
    await dispatcher.adispatch("system.ready")


async def mutable_envelope(dispatcher: IAsyncEventDispatcher) -> None:
    """Dispatch an event and get it back, with the changes of its listeners."""

    async def my_listener(event: MyEvent) -> None:
        print("my_listener has", event.context)
        event.context["foo"] = "changed"

    dispatcher.add_listener(MY_EVENT, my_listener)
    event = await dispatcher.adispatch("my.event", MyEvent({"foo": "bar"}))  # the constant is that string
    print("the caller has", event.context)


class MyEventListener:
    """A listener that registers itself with the container's dispatcher."""

    def __init__(self, dispatcher: IAsyncEventDispatcher) -> None:
        dispatcher.add_listener(MY_EVENT, self.handle)

    async def handle(self, event: MyEvent) -> None:
        print("MyEventListener has", event.context)


class Audit:
    """A listener given as a class; the container makes one object for each event."""

    async def handle(self, event: MyEvent) -> None:
        print("Audit has", event.context)


class MyEventEmittingService:
    """A service that dispatches. It knows the type of the dispatcher, and no listener."""

    def __init__(self, dispatcher: IAsyncEventDispatcher) -> None:
        self._dispatcher = dispatcher

    async def handle(self) -> None:
        await self._dispatcher.adispatch(MY_EVENT, MyEvent({"foo": "bar"}))


async def container_wide_dispatcher() -> None:
    """Let components that do not know each other use the container's dispatcher."""
    container = rodi.Container()
    dispatcher = register_dispatcher(container)
    for component in (MyEventListener, MyEventEmittingService):
        container.add_singleton(component)
    container.register(Audit)

    dispatcher.add_listener(MY_EVENT, Audit, priority=1)
    container.resolve(MyEventListener)  # from now on it listens
    await container.resolve(MyEventEmittingService).handle()


async def main() -> None:
    """Run everything that the page shows."""
    await symbolic_name(AsyncEventDispatcher())
    await mutable_envelope(AsyncEventDispatcher())
    await container_wide_dispatcher()


if __name__ == "__main__":
    asyncio.run(main())
