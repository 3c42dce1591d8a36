"""The core paths whose instructions are counted, each beside the loop that one would write by hand.

    python -m benchmarks.paths LAYOUT [NAME ...]

Started by `benchmarks.instructions` under callgrind, which writes a count whenever `getloadavg` is called: before and after
each contender. The names are printed, one line each, in the order of the counts.

Nothing here depends on time or on waiting: the event loop's clock stands still while there is work, and jumps to the next
timer when there is none. LAYOUT is a number; another one gives other memory addresses.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    # Before silbo is imported: CPython looks attributes up in a cache whose places depend on addresses.
    _padding = [f"padding {number}" * (1 + number % 5) for number in range(701 * int(sys.argv[1]))]

import asyncio
import gc
import os
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from itertools import count
from selectors import DefaultSelector
from typing import Any, NamedTuple, TypeVar
from uuid import UUID, uuid4

import msgspec

from silbo import (
    AsyncEventDispatcher,
    Bridge,
    Budget,
    Consumer,
    Delivery,
    Dispatch,
    ECSTEvent,
    Event,
    EventName,
    Mediator,
    Message,
    NotificationEvent,
    Origin,
    Outbox,
    Plugin,
    Plugins,
    Policy,
    Request,
    RequestHandler,
    RequestMap,
    receive,
)
from silbo.brokers._sender import OutgoingMessage, Sender, mark_all_sent
from silbo.brokers.memory import MemoryBroker
from silbo.stores.memory import MemoryStore
from silbo.wire.formats import JSON

Contender = Callable[[int], Awaitable[object]]
"""Does its work so many times."""

T = TypeVar("T")


class Path(NamedTuple):
    """One path.

    Attributes:
        times: How often the work is done while it is counted; without effect on the ratio, but for its noise.
        contenders: Gives silbo's contender and the one by hand.
    """

    times: int
    contenders: Callable[[], tuple[Contender, Contender]]


PATHS: dict[str, Path] = {}


def path(name: str, *, times: int) -> Callable[[Callable[[], tuple[Contender, Contender]]], object]:
    """Add a path under a name."""

    def add(contenders: Callable[[], tuple[Contender, Contender]]) -> object:
        PATHS[name] = Path(times, contenders)
        return contenders

    return add


# -- dispatch -----------------------------------------------------------------------------------------------

NAME = "meeting.joined"


class Joined(Event):
    """An event without data."""


class Told(NotificationEvent):
    """A notification without data."""


class Handler:
    """A listener class."""

    async def handle(self, event: object) -> None:
        """Do nothing."""


class Thing:
    """The event of who has no library."""

    stopped = False


async def listener(event: object) -> None:
    """Does nothing: what is counted is the way to it."""


def dispatching(dispatcher: AsyncEventDispatcher) -> Contender:
    """silbo's contender: a new event for each dispatch."""

    async def run(times: int) -> None:
        for _ in range(times):
            await dispatcher.adispatch(NAME, Joined())

    return run


def dispatch_to(many: int) -> tuple[Contender, Contender]:
    """A dispatch to so many listeners; by hand, a loop of awaits."""
    dispatcher, listeners = AsyncEventDispatcher(), [listener] * many
    for one in listeners:
        dispatcher.add_listener(NAME, one)
    dispatcher.add_listener("user.*", listener)  # there, and not concerned
    dispatcher.add_listener("user.left", listener, timeout=5, on_error="collect")

    async def by_hand(times: int) -> None:
        for _ in range(times):
            event = Thing()
            for one in listeners:
                await one(event)

    return dispatching(dispatcher), by_hand


path("dispatch, no listener", times=1000)(lambda: dispatch_to(0))
path("dispatch, 1 listener", times=1000)(lambda: dispatch_to(1))
path("dispatch, 10 listeners", times=500)(lambda: dispatch_to(10))


@path("dispatch, 1 listener of a pattern", times=1000)
def dispatch_pattern() -> tuple[Contender, Contender]:
    """By hand, the pattern is matched at each dispatch."""
    dispatcher = AsyncEventDispatcher()
    dispatcher.add_listener("meeting.*", listener)

    async def by_hand(times: int) -> None:
        for _ in range(times):
            event = Thing()
            if NAME.startswith("meeting."):
                await listener(event)

    return dispatching(dispatcher), by_hand


@path("dispatch, a name seen first", times=200)
def dispatch_new_name() -> tuple[Contender, Contender]:
    """Names are dynamic here, as those with an id in them; each comes once."""
    dispatcher, numbers = AsyncEventDispatcher(), count()
    patterns = ("meeting.*.joined", "meeting.**", "user.*", "room.*.left")
    for pattern in patterns:
        dispatcher.add_listener(pattern, listener)
    dispatcher.add_listener("user.left", listener)

    async def ours(times: int) -> None:
        for _ in range(times):
            await dispatcher.adispatch(f"meeting.{next(numbers)}.joined", Joined())

    async def by_hand(times: int) -> None:
        for _ in range(times):
            event, name = Thing(), f"meeting.{next(numbers)}.joined"
            for pattern in patterns:
                if fnmatchcase(name, pattern):
                    await listener(event)

    return ours, by_hand


@path("dispatch, stopped by the first of 10", times=1000)
def dispatch_stopped() -> tuple[Contender, Contender]:
    """The nine behind it do not run."""
    dispatcher = AsyncEventDispatcher()

    async def stops(event: Joined) -> None:
        event.stop_propagation()

    async def stops_by_hand(event: Thing) -> None:
        event.stopped = True

    dispatcher.add_listener(NAME, stops)
    listeners: list[Callable[[Any], Awaitable[None]]] = [stops_by_hand, *[listener] * 9]
    for _ in range(9):
        dispatcher.add_listener(NAME, listener)

    async def by_hand(times: int) -> None:
        for _ in range(times):
            event = Thing()
            for one in listeners:
                await one(event)
                if event.stopped:
                    break

    return dispatching(dispatcher), by_hand


@path("dispatch, a listener that runs once", times=100)
def dispatch_once() -> tuple[Contender, Contender]:
    """Its registration is counted, too."""
    dispatcher, listeners = AsyncEventDispatcher(), [listener]
    dispatcher.add_listener(NAME, listener)

    async def other(event: object) -> None:
        pass

    async def ours(times: int) -> None:
        for _ in range(times):
            dispatcher.add_listener(NAME, other, once=True)
            await dispatcher.adispatch(NAME, Joined())

    async def by_hand(times: int) -> None:
        for _ in range(times):
            listeners.append(other)
            event = Thing()
            for one in tuple(listeners):
                if one is other:
                    listeners.remove(one)
                await one(event)

    return ours, by_hand


@path("dispatch, a listener with a timeout", times=200)
def dispatch_timeout() -> tuple[Contender, Contender]:
    """It is not reached."""
    dispatcher = AsyncEventDispatcher()
    dispatcher.add_listener(NAME, listener, timeout=5)

    async def by_hand(times: int) -> None:
        for _ in range(times):
            event = Thing()
            async with asyncio.timeout(5):
                await listener(event)

    return dispatching(dispatcher), by_hand


@path("dispatch, 1 listener of a plugin", times=500)
def dispatch_plugin() -> tuple[Contender, Contender]:
    """With a time limit, a budget and isolation; by hand is here silbo's dispatch to a listener of the host."""
    dispatcher, other = AsyncEventDispatcher(), AsyncEventDispatcher()
    budget = Budget(loop_time=0.5, failures=20)
    policy = Policy(timeout=5, on_failure="ignore", report_after=1, budget=budget)
    plugins = Plugins(dispatcher, policy=policy, slow_after=None)
    plugin = Plugin(lambda view: view.add_listener(NAME, listener), name="plugin")
    other.add_listener(NAME, listener)
    dispatch = dispatching(dispatcher)

    async def run(times: int) -> None:
        if plugin.name not in plugins:  # in the first call, which is not counted
            await plugins.load(plugin)
        await dispatch(times)

    return run, dispatching(other)


@path("dispatch, a declared name", times=500)
def dispatch_declared() -> tuple[Contender, Contender]:
    """The class of the event is checked; by hand is here silbo's dispatch on a dispatcher that declares nothing."""
    dispatcher = AsyncEventDispatcher(names=[EventName(NAME, Joined)], unknown="error")
    other = AsyncEventDispatcher()
    for one in (dispatcher, other):
        one.add_listener(NAME, listener)
    return dispatching(dispatcher), dispatching(other)


@path("dispatch, a listener whose error is isolated", times=400)
def dispatch_isolated() -> tuple[Contender, Contender]:
    """It fails each time, and the one behind it runs."""
    dispatcher = AsyncEventDispatcher()
    errors: list[Exception] = []

    async def fails(event: object) -> None:
        raise ValueError

    def note(error: Exception, event: object, of: object) -> None:
        errors.append(error)

    dispatcher.add_listener(NAME, fails, on_error=note)
    dispatcher.add_listener(NAME, listener)

    async def by_hand(times: int) -> None:
        for _ in range(times):
            event = Thing()
            try:
                await fails(event)
            except Exception as error:  # noqa: BLE001  # what is isolated
                note(error, event, fails)
            await listener(event)

    return dispatching(dispatcher), by_hand


class Counting:
    """An observer that counts the dispatches."""

    dispatches = 0

    def before_dispatch(self, dispatch: Dispatch) -> None:
        """One more."""
        self.dispatches += 1

    def after_dispatch(self, dispatch: Dispatch) -> None:
        """Nothing to do."""

    def before_listener(self, call: object) -> None:
        """Nothing to do."""

    def after_listener(self, call: object) -> None:
        """Nothing to do."""


@path("dispatch, 1 listener and an observer", times=100)
def dispatch_observed() -> tuple[Contender, Contender]:
    """By hand, the same four calls."""
    observer: Any = Counting()
    dispatcher = AsyncEventDispatcher(observers=[observer])
    dispatcher.add_listener(NAME, listener)

    async def by_hand(times: int) -> None:
        for _ in range(times):
            event = Thing()
            observer.before_dispatch(event)
            observer.before_listener(listener)
            await listener(event)
            observer.after_listener(listener)
            observer.after_dispatch(event)

    return dispatching(dispatcher), by_hand


@path("dispatch, a notification to 10 listeners", times=500)
def dispatch_notification() -> tuple[Contender, Contender]:
    """It gets its time; by hand is here a plain event."""
    dispatcher = AsyncEventDispatcher()
    for _ in range(10):
        dispatcher.add_listener(NAME, listener)

    async def ours(times: int) -> None:
        for _ in range(times):
            await dispatcher.adispatch(NAME, Told())

    return ours, dispatching(dispatcher)


@path("dispatch, 2,000 names in turn", times=2000)
def dispatch_many_names() -> tuple[Contender, Contender]:
    """By hand is here one name."""
    dispatcher, names = AsyncEventDispatcher(), [f"meeting.{number}" for number in range(2000)]
    for name in [*names, NAME]:
        dispatcher.add_listener(name, listener)

    async def ours(times: int) -> None:
        for name in names:
            await dispatcher.adispatch(name, Joined())

    return ours, dispatching(dispatcher)


@path("dispatch, after a change elsewhere", times=200)
def dispatch_changed() -> tuple[Contender, Contender]:
    """The change is counted, too: a listener is added under another name, and removed."""
    dispatcher, listeners, others = AsyncEventDispatcher(), [listener], list[object]()
    dispatcher.add_listener(NAME, listener)

    async def ours(times: int) -> None:
        for _ in range(times):
            dispatcher.add_listener("room.opened", listener)
            dispatcher.remove_listener("room.opened", listener)
            await dispatcher.adispatch(NAME, Joined())

    async def by_hand(times: int) -> None:
        for _ in range(times):
            others.append(listener)
            others.remove(listener)
            event = Thing()
            for one in listeners:
                await one(event)

    return ours, by_hand


@path("dispatch, 10 listener classes", times=100)
def dispatch_classes() -> tuple[Contender, Contender]:
    """By hand, a scope is opened, and each class is resolved in it."""
    container, classes = Classes(), [type(f"Handler{number}", (Handler,), {}) for number in range(10)]
    dispatcher = AsyncEventDispatcher(container=container)
    for cls in classes:
        dispatcher.add_listener(NAME, cls)

    async def by_hand(times: int) -> None:
        for _ in range(times):
            event = Thing()
            async with container.scope() as scope:
                for cls in classes:
                    handler = await scope.resolve(cls)
                    await handler.handle(event)

    return dispatching(dispatcher), by_hand


@path("a listener is registered", times=500)
def register() -> tuple[Contender, Contender]:
    """Under one of 10 names, without options."""
    names = [f"meeting.{number}" for number in range(10)]

    async def ours(times: int) -> None:
        dispatcher = AsyncEventDispatcher()
        for number in range(times):
            dispatcher.add_listener(names[number % 10], listener)

    async def by_hand(times: int) -> None:
        listeners: dict[str, list[object]] = {}
        for number in range(times):
            listeners.setdefault(names[number % 10], []).append(listener)

    return ours, by_hand


@path("spawn", times=400)
def spawn() -> tuple[Contender, Contender]:
    """100 tasks at a time, and a wait for them."""
    dispatcher = AsyncEventDispatcher()
    dispatcher.add_listener(NAME, listener)
    tasks: set[asyncio.Task[None]] = set()

    async def ours(times: int) -> None:
        for _ in range(times // 100):
            for _ in range(100):
                _ = dispatcher.spawn(NAME, Joined())  # drain waits for it
            await dispatcher.drain()

    async def by_hand(times: int) -> None:
        for _ in range(times // 100):
            for _ in range(100):
                task = asyncio.create_task(listener(Thing()))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.wait(tasks)

    return ours, by_hand


# -- events, messages, bytes --------------------------------------------------------------------------------


@dataclass
class MeetingJoined(NotificationEvent):
    """A small notification, as they are."""

    meeting_id: int
    user_id: int


@dataclass
class Address:
    """A part of a state."""

    street: str
    city: str


@dataclass
class UserChanged(ECSTEvent):
    """A state with parts."""

    user_id: UUID
    since: datetime
    addresses: list[Address] = field(default_factory=list)
    settings: dict[str, int] = field(default_factory=dict)


MEETING_JOINED = EventName("meeting.joined", MeetingJoined, key="meeting_id")
USER_CHANGED = EventName("user.changed", UserChanged)
USER_ID = uuid4()
SINCE = datetime.now(UTC)
INSTANCE = uuid4().hex
PUBLICATIONS = count(1)


class Nowhere:
    """A publisher that has everything at once."""

    app = "web"

    async def publish(self, *messages: object) -> None:
        """Nothing to do."""

    async def aclose(self) -> None:
        """Nothing to do."""


def text(when: datetime) -> str:
    """A time as it is in JSON."""
    return when.isoformat().replace("+00:00", "Z")


def envelope(kind: str, name: str, key: str | None, payload: dict[str, object]) -> dict[str, Any]:
    """A message as a dict, as one would make it by hand."""
    event_id = str(uuid4())
    headers = {"publication": f"{INSTANCE}-{next(PUBLICATIONS)}", "version": "1"}
    if key is not None:
        headers["key"] = key
    return {
        "message_type": kind,
        "message_name": name,
        "message_id": event_id,
        "payload": {"event_id": event_id, "event_timestamp": text(datetime.now(UTC)), **payload},
        "headers": headers,
    }


def joined(number: int) -> dict[str, Any]:
    """The message of a :class:`MeetingJoined`."""
    return envelope("notification_event", "meeting.joined", str(number), {"meeting_id": number, "user_id": 17})


def message(number: int) -> Message:
    """The same, as silbo has it."""
    made = joined(number)
    return Message(
        made["message_type"], made["message_name"], made["message_id"], made["payload"], headers=made["headers"]
    )


def written(number: int) -> bytes:
    """The same, as a broker has it."""
    made = joined(number)
    return msgspec.json.encode({**made, "headers": {"app": "web", "instance": INSTANCE, **made["headers"]}})


@path("bridge, a notification as a message", times=200)
def bridge_notification() -> tuple[Contender, Contender]:
    """To a publisher that does nothing."""
    publisher, dispatcher = Nowhere(), AsyncEventDispatcher()
    dispatcher.add_subscriber(Bridge(publisher))

    async def ours(times: int) -> None:
        for number in range(times):
            await dispatcher.adispatch(MEETING_JOINED, MeetingJoined(number, 17))

    async def by_hand(times: int) -> None:
        for number in range(times):
            await publisher.publish(joined(number))

    return ours, by_hand


@path("bridge, a state as a message", times=100)
def bridge_state() -> tuple[Contender, Contender]:
    """To a publisher that does nothing; the state has parts."""
    publisher, dispatcher = Nowhere(), AsyncEventDispatcher()
    dispatcher.add_subscriber(Bridge(publisher))
    addresses = [Address("Calle Real 1", "San Sebastián"), Address("Calle Real 2", "Agulo")]

    async def ours(times: int) -> None:
        for number in range(times):
            event = UserChanged(USER_ID, SINCE, addresses, {"number": number})
            await dispatcher.adispatch(USER_CHANGED, event)

    async def by_hand(times: int) -> None:
        for number in range(times):
            payload: dict[str, object] = {
                "user_id": str(USER_ID),
                "since": text(SINCE),
                "addresses": [{"street": one.street, "city": one.city} for one in addresses],
                "settings": {"number": number},
            }
            await publisher.publish(envelope("ecst_event", "user.changed", None, payload))

    return ours, by_hand


async def wire_format() -> Any:
    """silbo's own format, as deliveries have it."""
    broker = MemoryBroker("web")
    receiver = await broker.group("format", start="new").open()
    await broker.publish(message(0))
    [delivery] = await receiver.receive(1)
    assert isinstance(delivery, Delivery)
    return delivery.format


@path("message to bytes", times=400)
def message_to_bytes() -> tuple[Contender, Contender]:
    """As a broker does before it sends."""
    sent, by_hand_sent, origin = message(17), joined(17), Origin("web", INSTANCE)

    async def ours(times: int) -> None:
        encode = (await wire_format()).encode
        for _ in range(times):
            encode(sent, origin)

    async def by_hand(times: int) -> None:
        encode = msgspec.json.Encoder().encode
        for _ in range(times):
            encode({**by_hand_sent, "headers": {"app": "web", "instance": INSTANCE, **by_hand_sent["headers"]}})

    return ours, by_hand


def rebuild(raw: bytes) -> MeetingJoined:
    """The event in these bytes, as one would read it by hand."""
    payload = msgspec.json.decode(raw)["payload"]
    event = MeetingJoined(payload["meeting_id"], payload["user_id"])
    event.event_id = UUID(payload["event_id"])
    event.event_timestamp = datetime.fromisoformat(payload["event_timestamp"])
    return event


@path("bytes to a listener", times=100)
def bytes_to_listener() -> tuple[Contender, Contender]:
    """Through `receive`: decoded, rebuilt as its class, dispatched."""
    dispatcher, raw = AsyncEventDispatcher(), written(17)
    dispatcher.add_listener(MEETING_JOINED, listener)

    async def ours(times: int) -> None:
        for _ in range(times):
            await receive(dispatcher, raw, events=[MEETING_JOINED])

    async def by_hand(times: int) -> None:
        for _ in range(times):
            await listener(rebuild(raw))

    return ours, by_hand


# -- brokers and consumers ----------------------------------------------------------------------------------


@path("memory broker, publish to a group", times=200)
def memory_publish() -> tuple[Contender, Contender]:
    """By hand, bytes in a deque."""
    sent, by_hand_sent = message(17), joined(17)

    async def ours(times: int) -> None:
        broker = MemoryBroker("web")
        await broker.group("group", start="new").open()
        for _ in range(times):
            await broker.publish(sent)

    async def by_hand(times: int) -> None:
        queue: deque[bytes] = deque()
        for _ in range(times):
            queue.append(msgspec.json.encode(by_hand_sent))

    return ours, by_hand


def consume(concurrency: int) -> tuple[Contender, Contender]:
    """From a memory broker to a listener, acknowledged; the messages have eight keys.

    By hand, a queue for each worker, and a list of what is done.
    """
    broker, groups, most = MemoryBroker("web"), count(), 1000
    raws = [written(number % 8) for number in range(most)]
    messages = [message(number % 8) for number in range(most)]
    published = False

    async def ours(times: int) -> None:
        nonlocal published
        assert times <= most
        if not published:
            await broker.publish(*messages)
            published = True
        dispatcher, done = AsyncEventDispatcher(), 0

        async def stops(event: MeetingJoined) -> None:
            nonlocal done
            await listener(event)
            done += 1
            if done == times:
                consumer.stop()

        dispatcher.add_listener(MEETING_JOINED, stops)
        group = broker.group(f"group-{next(groups)}", start="oldest")
        consumer = Consumer(dispatcher, group, events=[MEETING_JOINED], own="handle", concurrency=concurrency)
        async with consumer:
            await consumer.run()
        assert done >= times

    async def by_hand(times: int) -> None:
        queues: list[asyncio.Queue[bytes | None]] = [asyncio.Queue() for _ in range(concurrency)]
        done: list[bytes] = []

        async def work(queue: asyncio.Queue[bytes | None]) -> None:
            while (raw := await queue.get()) is not None:
                await listener(rebuild(raw))
                done.append(raw)

        for number, raw in enumerate(raws[:times]):
            queues[number % concurrency].put_nowait(raw)
        for queue in queues:
            queue.put_nowait(None)
        async with asyncio.TaskGroup() as group:
            for queue in queues:
                group.create_task(work(queue))
        assert len(done) == times

    return ours, by_hand


path("consumer, one at a time", times=200)(lambda: consume(1))
path("consumer, four at a time over keys", times=200)(lambda: consume(4))


# -- sender -------------------------------------------------------------------------------------------------


@path("sender, a hundred publish at once", times=400)
def coalesced() -> tuple[Contender, Contender]:
    """To a broker that has everything in the next turn of the loop. By hand, a list of bytes and futures, sent as one."""
    sent, by_hand_sent = message(17), joined(17)

    async def send(address: str, messages: Sequence[OutgoingMessage]) -> None:
        await asyncio.sleep(0)
        mark_all_sent(messages)

    def at_once(publish: Callable[[], Awaitable[object]]) -> Contender:
        async def run(times: int) -> None:
            async def publisher() -> None:
                for _ in range(times // 100):
                    await publish()

            async with asyncio.TaskGroup() as group:
                for _ in range(100):
                    group.create_task(publisher())

        return run

    async def ours(times: int) -> None:
        sender = Sender("broker", send, lambda one: JSON.encode(one, Origin("web", INSTANCE)), timeout=5)
        await at_once(lambda: sender.publish((sent,)))(times)

    waiting: list[tuple[bytes, asyncio.Future[None]]] = []
    tasks: set[asyncio.Task[None]] = set()

    async def flush() -> None:
        while waiting:
            batch = waiting.copy()
            waiting.clear()
            await asyncio.sleep(0)
            for _, answered in batch:
                answered.set_result(None)
        tasks.clear()

    async def publish_by_hand() -> None:
        loop = asyncio.get_running_loop()
        answered = loop.create_future()
        if not tasks:
            tasks.add(loop.create_task(flush()))
        waiting.append((msgspec.json.encode(by_hand_sent), answered))
        await answered

    return ours, at_once(publish_by_hand)


# -- outbox -------------------------------------------------------------------------------------------------


@path("outbox, store", times=200)
def outbox_store() -> tuple[Contender, Contender]:
    """By hand, bytes in a list."""
    sent, by_hand_sent = message(17), joined(17)

    async def ours(times: int) -> None:
        async with Outbox(MemoryStore(clock=float), Nowhere(), relay=False) as outbox:
            for _ in range(times):
                await outbox.publish(sent)

    async def by_hand(times: int) -> None:
        rows: list[tuple[int, bytes]] = []
        for number in range(times):
            rows.append((number, msgspec.json.encode(by_hand_sent)))  # noqa: PERF401  # one after another

    return ours, by_hand


@path("outbox, store and relay", times=100)
def outbox_relay() -> tuple[Contender, Contender]:
    """To a publisher that does nothing. By hand, a task that takes what waits."""
    sent, by_hand_sent, publisher = message(17), joined(17), Nowhere()

    async def ours(times: int) -> None:
        async with Outbox(MemoryStore(clock=float), publisher) as outbox:
            for _ in range(times):
                await outbox.publish(sent)

    async def by_hand(times: int) -> None:
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()

        async def relay() -> None:
            while (raw := await queue.get()) is not None:
                await publisher.publish(msgspec.json.decode(raw))

        async with asyncio.TaskGroup() as group:
            group.create_task(relay())
            for _ in range(times):
                await queue.put(msgspec.json.encode(by_hand_sent))
            await queue.put(None)

    return ours, by_hand


# -- mediator -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JoinMeeting(Request[int]):
    """A command."""

    meeting_id: int


class JoinMeetingHandler(RequestHandler[JoinMeeting, int]):
    """Collects one event."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    @property
    def events(self) -> list[Event]:
        """What it has collected."""
        return self._events

    async def handle(self, request: JoinMeeting) -> int:
        """Collect it."""
        self._events.append(MeetingJoined(request.meeting_id, 17))
        return request.meeting_id


class Classes:
    """The smallest container: it calls the class. It is its own scope."""

    @asynccontextmanager
    async def scope(self) -> AsyncGenerator[Classes]:
        """Nothing to open or close."""
        yield self

    async def resolve(self, cls: type[T], /) -> T:
        """A new object."""
        return cls()


@path("mediator, send", times=50)
def mediator_send() -> tuple[Contender, Contender]:
    """A command with one event, which has a listener."""
    dispatcher, requests, container = AsyncEventDispatcher(), RequestMap(), Classes()
    dispatcher.add_listener(MEETING_JOINED, listener)
    requests.bind(JoinMeeting, JoinMeetingHandler)
    mediator = Mediator(request_map=requests, dispatcher=dispatcher, container=container)
    handlers = {JoinMeeting: JoinMeetingHandler}

    async def ours(times: int) -> None:
        for number in range(times):
            await mediator.send(JoinMeeting(number))

    async def by_hand(times: int) -> None:
        for number in range(times):
            request = JoinMeeting(number)
            async with container.scope() as scope:
                handler = await scope.resolve(handlers[type(request)])
                await handler.handle(request)
                for event in handler.events:
                    await listener(event)

    return ours, by_hand


# -- the process that is counted ----------------------------------------------------------------------------


class Selector(DefaultSelector):
    """Waits for no timer: the clock jumps to it."""

    clock = 0.0

    def select(self, timeout: float | None = None) -> Any:
        """What is ready now; only where no timer is set it waits."""
        if timeout is not None:
            self.clock += max(0.0, timeout)
            timeout = 0
        return super().select(timeout)


class Loop(asyncio.SelectorEventLoop):
    """An event loop whose clock stands still while there is work: so no batch and no timeout depends on the machine."""

    def __init__(self) -> None:
        self._selector_with_clock = Selector()
        super().__init__(self._selector_with_clock)

    def time(self) -> float:
        """Seconds since the loop was made, by that clock."""
        return self._selector_with_clock.clock


async def count_instructions(names: Iterator[str]) -> None:
    """Run the contenders of each path, with a dump before and after each."""
    for name in names:
        path = PATHS[name]
        contenders = path.contenders()
        for contender in contenders:
            await contender(path.times // 4)  # caches, specialised bytecode
        for contender in contenders:
            gc.collect()
            gc.freeze()
            os.getloadavg()
            await contender(path.times)
            os.getloadavg()
        print(name, flush=True)


if __name__ == "__main__":
    gc.disable()
    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(count_instructions(iter(sys.argv[2:] or PATHS)))
