"""Components that meet in a dependency-injection container and talk through its dispatcher.

The emitting service and the listener are those of the HARP proxy's page on its event dispatcher, letter for letter: they
know Whistle's types only. What is silbo's is one line, in `main`.

    python -m examples.harp_page
"""

import asyncio

import rodi
from whistle import Event, IAsyncEventDispatcher

from silbo.containers.rodi import register_dispatcher


class MyEvent(Event):
    def __init__(self, context):
        super().__init__()
        self.context = context


MY_EVENT = "my.event"


class MyEventEmittingService:
    def __init__(self, dispatcher: IAsyncEventDispatcher):
        self.dispatcher = dispatcher

    async def handle(self):
        event = await self.dispatcher.adispatch("my.event", MyEvent({"foo": "bar"}))  # noqa: F841


class MyEventListener:
    def __init__(self, dispatcher: IAsyncEventDispatcher):
        self.dispatcher = dispatcher
        self.dispatcher.add_listener(MY_EVENT, self.handle)

    async def handle(self, event: MyEvent):
        print(event.context)


async def main() -> None:
    container = rodi.Container()
    register_dispatcher(container)
    container.add_singleton(MyEventEmittingService)
    container.add_singleton(MyEventListener)

    container.resolve(MyEventListener)  # made once, it listens from now on
    await container.resolve(MyEventEmittingService).handle()


if __name__ == "__main__":
    asyncio.run(main())
