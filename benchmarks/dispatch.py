"""Scenarios of a dispatcher: silbo, Whistle, and code by hand.

    python -m benchmarks.run --help

silbo runs with everything present but unused: the dispatcher of a scenario also has a pattern that does not match, and
listeners with options under other names. Every dispatch gets an event of its own, as hosts do it, unless the scenario says
otherwise.
"""

from __future__ import annotations

import gc
import random
import tracemalloc
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from itertools import count
from typing import Any, TypeVar

import whistle

import silbo
from benchmarks.scenario import Scenario, Target
from benchmarks.timing import Contender, Measured

__all__ = ["SCENARIOS", "contenders"]

T = TypeVar("T")

NAME = "meeting.joined"

Contenders = dict[str, Contender]


class WhistleEvent(whistle.Event):
    """The payload is the host's; none is needed here."""


class SilboEvent(silbo.Event):
    """The same on silbo."""


class EventByHand(silbo.Event):
    """The same for code by hand: CPython gives an object room for the attributes of the first 30 objects of its class."""


class Notification(silbo.NotificationEvent):
    """The same, with an id and a time."""


async def listener(event: Any) -> None:
    """Does nothing: what is measured is the way to it."""


def whistle_dispatcher(many: int) -> whistle.AsyncEventDispatcher:
    """Whistle with so many listeners."""
    dispatcher = whistle.AsyncEventDispatcher()
    for number in range(many):
        dispatcher.add_listener(NAME, listener, priority=number % 3)
    return dispatcher


def silbo_dispatcher(many: int, **options: Any) -> silbo.AsyncEventDispatcher:
    """silbo with so many listeners, and with everything else that does not concern them."""
    dispatcher = silbo.AsyncEventDispatcher(**options)
    for number in range(many):
        dispatcher.add_listener(NAME, listener, priority=number % 3)
    dispatcher.add_listener("user.*", listener)
    dispatcher.add_listener("user.left", listener, once=True, timeout=5, on_error="collect")
    dispatcher.add_listener("user.left", listener, concurrent=True)
    return dispatcher


def dispatching(dispatcher: Any, new_event: Callable[[], Any], name: str = NAME) -> Contender:
    """Dispatch a new event each time."""

    async def run(times: int) -> None:
        for _ in range(times):
            await dispatcher.adispatch(name, new_event())

    return run


# -- scenarios ----------------------------------------------------------------------------------------------


def contenders(many: int, *, fresh: bool) -> Contenders:
    """A dispatch to so many listeners."""
    by_hand, our_event, their_event = [listener] * many, SilboEvent(), WhistleEvent()

    async def loop(event: Any) -> None:
        for one in by_hand:
            await one(event)

    async def run_loop(times: int) -> None:
        for _ in range(times):
            await loop(EventByHand() if fresh else our_event)

    return {
        "loop of awaits": run_loop,
        "silbo": dispatching(silbo_dispatcher(many), SilboEvent if fresh else lambda: our_event),
        "whistle": dispatching(whistle_dispatcher(many), WhistleEvent if fresh else lambda: their_event),
    }


def notification() -> Contenders:
    """A notification to 10 listeners, which gets its time, beside a plain event."""
    dispatcher = silbo_dispatcher(10)
    return {"a plain event": dispatching(dispatcher, SilboEvent), "silbo": dispatching(dispatcher, Notification)}


def random_names(many: int, *, of_pattern: bool = False) -> Contenders:
    """Names at random, each with one listener, registered for the name or for a pattern; beside 10 names."""

    def over(dispatcher: Any, new_event: Callable[[], Any], many: int) -> Contender:
        names = [f"meeting.{number}.joined" for number in range(many)]
        if of_pattern:
            dispatcher.add_listener("meeting.*.joined", listener)
        else:
            for name in names:
                dispatcher.add_listener(name, listener)
        chosen = random.Random(1).choices(names, k=20_000)
        at = count()

        async def run(times: int) -> None:
            first = next(at) * times
            for number in range(first, first + times):
                await dispatcher.adispatch(chosen[number % 20_000], new_event())

        return run

    both = {
        "10 names": over(silbo_dispatcher(0), SilboEvent, 10),
        "silbo": over(silbo_dispatcher(0), SilboEvent, many),
    }
    return both if of_pattern else {**both, "whistle": over(whistle.AsyncEventDispatcher(), WhistleEvent, many)}


def new_names() -> Contenders:
    """Names that come for the first time, each with an id in it. Nobody listens to them."""

    def over(dispatcher: Any, new_event: Callable[[], Any]) -> Contender:
        numbers = count()

        async def run(times: int) -> None:
            for _ in range(times):
                await dispatcher.adispatch(f"meeting.{next(numbers)}.joined", new_event())

        return run

    return {
        "whistle": over(whistle_dispatcher(1), WhistleEvent),
        "silbo": over(silbo_dispatcher(1), SilboEvent),
    }


def first_dispatch() -> Contenders:
    """The first dispatch of a name that has a listener of its own."""

    def over(new_dispatcher: Callable[[], Any], new_event: Callable[[], Any]) -> Contender:
        names = [f"meeting.{number}" for number in range(100)]

        async def run(times: int) -> None:
            for _ in range(0, times, 100):
                dispatcher = new_dispatcher()
                for name in names:
                    dispatcher.add_listener(name, listener)
                for name in names:
                    await dispatcher.adispatch(name, new_event())

        return run

    return {
        "whistle": over(whistle.AsyncEventDispatcher, WhistleEvent),
        "silbo": over(silbo.AsyncEventDispatcher, SilboEvent),
    }


def change_elsewhere() -> Contenders:
    """A dispatch after a listener was added and removed under another name: the time of the change is in it."""

    def over(dispatcher: Any, new_event: Callable[[], Any]) -> Contender:
        async def run(times: int) -> None:
            for _ in range(times):
                dispatcher.add_listener("room.opened", listener)
                dispatcher.remove_listener("room.opened", listener)
                await dispatcher.adispatch(NAME, new_event())

        return run

    return {
        "whistle": over(whistle_dispatcher(1), WhistleEvent),
        "silbo": over(silbo_dispatcher(1), SilboEvent),
    }


class NoOp:
    """An observer that does nothing."""

    def before_dispatch(self, dispatch: Any) -> None:
        """Do nothing."""

    def after_dispatch(self, dispatch: Any) -> None:
        """Do nothing."""

    def before_listener(self, call: Any) -> None:
        """Do nothing."""

    def after_listener(self, call: Any) -> None:
        """Do nothing."""


def observed() -> Contenders:
    """10 listeners under an observer; by hand, the same hooks are called with the same objects."""
    observer, listeners = NoOp(), (listener,) * 10

    async def loop(event: Any) -> None:
        dispatched = silbo.Dispatch(name=NAME, event=event, listeners=listeners)
        observer.before_dispatch(dispatched)
        for one in listeners:
            call = silbo.Call(dispatch=dispatched, listener=one)
            observer.before_listener(call)
            await one(event)
            observer.after_listener(call)
        observer.after_dispatch(dispatched)

    async def by_hand(times: int) -> None:
        for _ in range(times):
            await loop(EventByHand())

    return {"by hand": by_hand, "silbo": dispatching(silbo_dispatcher(10, observers=[observer]), SilboEvent)}


class Classes:
    """The smallest container: it calls the class. It is its own scope."""

    @asynccontextmanager
    async def scope(self) -> AsyncGenerator[Classes]:
        """Nothing to open or close."""
        yield self

    async def resolve(self, cls: type[T], /) -> T:
        """A new object."""
        return cls()


class Handler:
    """A listener class."""

    async def handle(self, event: object) -> None:
        """Do nothing."""


def listener_classes() -> Contenders:
    """10 listener classes; by hand, a scope is opened, and each class is resolved in it."""
    container = Classes()
    classes = [type(f"Handler{number}", (Handler,), {}) for number in range(10)]
    dispatcher = silbo_dispatcher(0, container=container)
    for cls in classes:
        dispatcher.add_listener(NAME, cls)

    async def loop(event: Any) -> None:
        async with container.scope() as scope:
            for cls in classes:
                handler = await scope.resolve(cls)
                await handler.handle(event)

    async def by_hand(times: int) -> None:
        for _ in range(times):
            await loop(EventByHand())

    return {"by hand": by_hand, "silbo": dispatching(dispatcher, SilboEvent)}


def new_listeners(many: int) -> list[Any]:
    """Make listeners that do nothing, each another function."""

    def new_listener() -> Any:
        async def listener(event: object) -> None:
            pass

        return listener

    return [new_listener() for _ in range(many)]


REGISTERED = 10_000
"""The listeners of `registration` and `memory`."""


def registration(names: int) -> Contenders:
    """Registrations of many listeners, under so many names."""
    texts = [f"meeting.{number}" for number in range(names)]
    listeners = new_listeners(REGISTERED)

    def over(new_dispatcher: Callable[[], Any]) -> Contender:
        async def run(times: int) -> None:
            for number in range(times):
                if number % REGISTERED == 0:
                    dispatcher = new_dispatcher()
                dispatcher.add_listener(texts[number % names], listeners[number % REGISTERED])

        return run

    return {"whistle": over(whistle.AsyncEventDispatcher), "silbo": over(silbo.AsyncEventDispatcher)}


def memory(names: int) -> Contenders:
    """The bytes of a registered listener, under so many names, beside a goal of 250. The registrations are not kept."""
    texts = [f"meeting.{number}" for number in range(names)]
    listeners = new_listeners(REGISTERED)

    def over(new_dispatcher: Callable[[], Any]) -> Contender:
        async def run(times: int) -> Measured:
            dispatcher = new_dispatcher()
            gc.collect()
            tracemalloc.start()
            for number, one in enumerate(listeners):
                dispatcher.add_listener(texts[number % names], one)
            gc.collect()
            size, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            return Measured(size / REGISTERED)

        return run

    async def goal(times: int) -> Measured:
        return Measured(250)

    return {
        "250 bytes": goal,
        "silbo": over(silbo.AsyncEventDispatcher),
        "whistle": over(whistle.AsyncEventDispatcher),
    }


# -- the rows of the table ----------------------------------------------------------------------------------


def row(
    name: str, contenders: Callable[[], Contenders], reference: str, target: Target | None = None, **options: Any
) -> Scenario:
    """Make a scenario; the target is silbo's ratio to the reference."""

    @asynccontextmanager
    async def opened() -> AsyncGenerator[Contenders]:
        yield contenders()

    open_: Callable[[], AbstractAsyncContextManager[Contenders]] = opened
    return Scenario(
        name=name,
        group="dispatch",
        open=open_,
        reference=reference,
        targets={} if target is None else {reference: target},
        **{"unit": "dispatches", "measures": "cpu seconds", **options},
    )


BY_HAND = "by hand"
FEW = "10 names"

SCENARIOS = [
    row("notification, 10 listeners", notification, "a plain event", {"3.11": 1.1, "3.12": 1.25}),
    row("2,000 names at random", partial(random_names, 2_000), FEW, 1.5),
    row("10,000 names at random", partial(random_names, 10_000), FEW, 1.5),
    row("2,000 names of a pattern", partial(random_names, 2_000, of_pattern=True), FEW, 1.5, in_bench=False),
    row("10,000 names of a pattern", partial(random_names, 10_000, of_pattern=True), FEW, 1.5, in_bench=False),
    row("a name seen first", new_names, "whistle", 4.0),
    row("first dispatch of a registered name", first_dispatch, "whistle", in_bench=False, times=1_000),
    row("a change elsewhere, and a dispatch", change_elsewhere, "whistle", 3.0),
    row("one no-op observer, 10 listeners", observed, BY_HAND, 3.0),
    row("10 listener classes", listener_classes, BY_HAND, 2.0),
    *(
        row(
            f"registration of 10,000, {text}",
            partial(registration, names),
            "whistle",
            1.5,
            times=REGISTERED,
            unit="registrations",
        )
        for text, names in (("one name", 1), ("1,000 names", 1_000), ("a name each", REGISTERED))
    ),
    *(
        row(
            f"memory of a listener, {text}",
            partial(memory, names),
            "250 bytes",
            1.0,
            times=1,
            rounds=3,
            unit="bytes",
            measures="bytes",
        )
        for text, names in (("one name", 1), ("1,000 names", 1_000), ("a name each", REGISTERED))
    ),
]
