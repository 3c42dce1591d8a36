"""A host written against Whistle alone. The test runs it as it is, and once more with silbo's dispatcher class in place of
Whistle's: nothing else changes."""

import asyncio
import functools

import rodi
from whistle import AsyncEventDispatcher, Event, IAsyncEventDispatcher


class LoggingDispatcher(AsyncEventDispatcher):
    """A host's own dispatcher: it logs what is registered, what is dispatched and each listener that runs."""

    def __init__(self):
        super().__init__()
        self.dispatched = 0

    def add_listener(self, event_id, listener, /, *, priority=0):
        print(f"+ {event_id} {label(listener)} priority={priority}")
        super().add_listener(event_id, listener, priority=priority)

    async def adispatch(self, event_id, event=None, /):
        self.dispatched += 1
        print(f"> {event_id} {type(event).__name__}")
        try:
            return await super().adispatch(event_id, event)
        finally:
            print(f"< {event_id}")

    async def _adispatch(self, listeners, event):
        for listener in listeners:
            print(f"  {event.name} -> {label(listener)}")
            await listener(event)
            if event.propagation_stopped:
                print(f"  {event.name} stopped by {label(listener)}")
                break


class MeetingEvent(Event):
    def __init__(self, meeting_id, user_id):
        super().__init__()
        self.meeting_id, self.user_id, self.notes = meeting_id, user_id, []


class Meetings:
    def __init__(self, dispatcher: IAsyncEventDispatcher):
        self.dispatcher = dispatcher

    async def join(self, meeting_id, user_id):
        return await self.dispatcher.adispatch("meeting.joined", MeetingEvent(meeting_id, user_id))


class Moderation:
    def __init__(self, dispatcher: IAsyncEventDispatcher):
        dispatcher.add_listener("meeting.joined", self.refuse_banned, priority=-10)

    async def refuse_banned(self, event):
        if event.user_id == 13:
            event.stop_propagation()


class Audit:
    def __init__(self, dispatcher: IAsyncEventDispatcher):
        self.dispatcher = dispatcher
        dispatcher.add_listener("meeting.joined", self.note, priority=10)
        dispatcher.add_listener("audit.noted", functools.partial(confirm, "by audit"))

    async def note(self, event):
        event.notes.append("audited")
        inner = await event.dispatcher.adispatch("audit.noted")
        print(
            f"  noted: {inner.confirmed}, in {inner.name} of the same dispatcher: {inner.dispatcher is self.dispatcher}"
        )


async def confirm(how, event):
    event.confirmed = how


async def greet(event):
    event.notes.append(f"hello {event.user_id}")


async def greet_twice(event):
    event.notes.append("hello again")
    event.dispatcher.remove_listener("meeting.joined", greet_twice)


async def fail(event):
    raise LookupError(f"no meeting {event.meeting_id}")


def label(listener):
    return getattr(listener, "__qualname__", None) or f"partial of {listener.func.__qualname__}"


async def main():
    dispatcher = LoggingDispatcher()
    container = rodi.Container()
    container.add_instance(dispatcher, IAsyncEventDispatcher)
    for component in (Meetings, Moderation, Audit):
        container.add_singleton(component)
        container.resolve(component)
    meetings = container.resolve(Meetings)

    dispatcher.add_listener("meeting.joined", greet)
    dispatcher.add_listener("meeting.joined", greet_twice)
    dispatcher.add_listener("meeting.left", greet, priority=5)
    print([label(listener) for listener in dispatcher.get_listeners("meeting.joined")])
    print(
        sorted(dispatcher.get_listeners()), dispatcher.has_listeners("meeting.left"), dispatcher.has_listeners("other")
    )

    for user_id in (7, 13, 8):
        event = await meetings.join(1, user_id)
        print(event.notes, event.name, event.propagation_stopped, event.dispatcher is dispatcher)

    dispatcher.add_listener("meeting.joined", fail, priority=1)
    try:
        await meetings.join(2, 9)
    except LookupError as error:
        print(repr(error))
    dispatcher.remove_listener("meeting.joined", fail)

    await dispatcher.adispatch("nobody.hears")
    event = await dispatcher.adispatch("meeting.left", MeetingEvent(1, 7))
    print(event.notes)
    for refused in (
        lambda: dispatcher.remove_listener("never.seen", greet),
        lambda: dispatcher.add_listener("x", label),
    ):
        try:
            refused()
        except (TypeError, ValueError) as error:
            print(type(error).__name__)
    print(dispatcher.dispatched, isinstance(dispatcher, AsyncEventDispatcher))


if __name__ == "__main__":
    asyncio.run(main())
