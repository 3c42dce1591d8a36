"""The other libraries that call listeners in one process, each used as its own documentation shows.

Each function gives a contender: a new event for each dispatch, to so many listeners that do nothing, and the wait for
them. What a library calls an event, a signal, a hook or a handler differs; notes say where it does less or more.
"""

from __future__ import annotations

from typing import Any

from benchmarks.timing import Contender

__all__ = ["NOTES", "PEERS"]

NAME = "meeting.joined"

NOTES = {
    "aiosignal": "one frozen list of receivers, without names or priorities",
    "bubus": "a queue, a history and an event model between the caller and the handlers",
    "diator": "handlers are classes, made by rodi at each dispatch",
    "Django": "`asend` runs the receivers in a task group",
    "pluggy": "hooks give coroutines, which the caller awaits: pluggy itself awaits nothing",
    "psygnal": "plain functions: its asynchronous callbacks are queued, and nothing waits for them",
    "pyee": "each listener runs in a task, awaited with `wait_for_complete`",
    "python-cqrs": "handlers are classes, made by di at each dispatch, and run beside one another",
}
"""Notes on a peer, for readers of the table."""


class Happened:
    """The event of a library that has none of its own."""

    __slots__ = ()


async def listener(event: object) -> None:
    """Does nothing: what is measured is the way to it."""


def make_aiosignal(count: int) -> Contender:
    """`Signal.send`."""
    from aiosignal import Signal

    signal: Signal[Happened] = Signal(owner=None)
    for _ in range(count):
        signal.append(listener)
    signal.freeze()

    async def run(times: int) -> None:
        for _ in range(times):
            await signal.send(Happened())

    return run


def make_blinker(count: int) -> Contender:
    """`send_async`; each listener is a function of its own, for a signal takes each once."""
    from blinker import Namespace

    signal = Namespace().signal(NAME)
    receivers = [_new_receiver() for _ in range(count)]  # held here: blinker holds them weakly
    for receiver in receivers:
        signal.connect(receiver)

    async def run(times: int) -> None:
        for _ in range(times):
            await signal.send_async(Happened())

    run.receivers = receivers  # type: ignore[attr-defined]
    return run


def _new_receiver() -> Any:
    async def receiver(sender: object, **data: object) -> None:
        """Does nothing."""

    return receiver


def make_pluggy(count: int) -> Contender:
    """A hook of coroutine functions, whose results are awaited one after another."""
    import pluggy

    spec, implementation = pluggy.HookspecMarker("bench"), pluggy.HookimplMarker("bench")

    class Spec:
        @spec
        def joined(self, event: object) -> Any:
            """The hook."""

    class Plugin:
        @implementation
        async def joined(self, event: object) -> None:
            """Does nothing."""

    manager = pluggy.PluginManager("bench")
    manager.add_hookspecs(Spec)
    for _ in range(count):
        manager.register(Plugin())
    hook = manager.hook

    async def run(times: int) -> None:
        for _ in range(times):
            for coroutine in hook.joined(event=Happened()):
                await coroutine

    return run


def make_pyee(count: int) -> Contender:
    """`AsyncIOEventEmitter.emit`, and the wait for its tasks."""
    from pyee.asyncio import AsyncIOEventEmitter

    emitter = AsyncIOEventEmitter()
    for _ in range(count):
        emitter.add_listener(NAME, _new_listener())

    async def run(times: int) -> None:
        for _ in range(times):
            emitter.emit(NAME, Happened())
            await emitter.wait_for_complete()

    return run


def _new_listener() -> Any:
    async def new(event: object) -> None:
        """Does nothing."""

    return new


def make_psygnal(count: int) -> Contender:
    """`SignalInstance.emit` to functions."""
    from psygnal import Signal

    class Meeting:
        joined = Signal(object)

    meeting = Meeting()
    listeners = [_new_function() for _ in range(count)]
    for one in listeners:
        meeting.joined.connect(one)

    async def run(times: int) -> None:
        for _ in range(times):
            meeting.joined.emit(Happened())

    run.listeners = listeners  # type: ignore[attr-defined]
    return run


def _new_function() -> Any:
    def function(event: object) -> None:
        """Does nothing."""

    return function


def make_django(count: int) -> Contender:
    """`Signal.asend`."""
    from django.conf import settings
    from django.dispatch import Signal

    if not settings.configured:
        settings.configure()
    signal = Signal()
    receivers = [_new_receiver() for _ in range(count)]  # held here: Django holds them weakly
    for receiver in receivers:
        signal.connect(receiver)

    async def run(times: int) -> None:
        for _ in range(times):
            await signal.asend(sender=None, event=Happened())

    run.receivers = receivers  # type: ignore[attr-defined]
    return run


def make_bubus(count: int) -> Contender:
    """`await bus.dispatch(event)`."""
    import os

    os.environ.setdefault("BUBUS_LOGGING_LEVEL", "CRITICAL")
    from bubus import BaseEvent, EventBus

    class MeetingJoined(BaseEvent[None]):
        """An event without data."""

    bus: Any = None
    handlers = [_new_handler(MeetingJoined, number) for number in range(count)]

    async def run(times: int) -> None:
        nonlocal bus
        if bus is None:
            bus = EventBus(name="bench", max_history_size=50)
            for handler in handlers:
                bus.on(MeetingJoined, handler)
        for _ in range(times):
            await bus.dispatch(MeetingJoined())

    return run


def _new_handler(event_class: type, number: int) -> Any:
    async def handler(event: Any) -> None:
        """Does nothing."""

    handler.__annotations__["event"] = event_class
    handler.__name__ = f"handler_{number}"  # bubus keeps the results by name
    return handler


def make_diator(count: int) -> Contender:
    """`EventEmitter.emit` of a domain event."""
    from dataclasses import dataclass

    import rodi
    from diator.container.rodi import RodiContainer
    from diator.events import DomainEvent, EventEmitter, EventMap

    @dataclass(frozen=True, kw_only=True)
    class MeetingJoined(DomainEvent):
        """An event without data."""

    external, events = rodi.Container(), EventMap()
    for number in range(count):
        handler = type(f"Handler{number}", (), {"handle": _handle})
        external.register(handler)
        events.bind(MeetingJoined, handler)
    container = RodiContainer()
    container.attach_external_container(external)
    emitter = EventEmitter(events, container)

    async def run(times: int) -> None:
        for _ in range(times):
            await emitter.emit(MeetingJoined())

    return run


async def _handle(self: object, event: object) -> None:
    """Does nothing."""


def make_cqrs(count: int) -> Contender:
    """`EventEmitter.emit` of a domain event."""
    import cqrs
    import di
    from cqrs.container.di import DIContainer

    class MeetingJoined(cqrs.DomainEvent, frozen=True):
        """An event without data."""

    external, events = di.Container(), cqrs.EventMap()
    for number in range(count):
        handler = type(f"Handler{number}", (cqrs.EventHandler,), {"handle": _handle, "events": ()})
        events.bind(MeetingJoined, handler)
    container = DIContainer()
    container.attach_external_container(external)
    emitter = cqrs.EventEmitter(events, container)

    async def run(times: int) -> None:
        for _ in range(times):
            await emitter.emit(MeetingJoined())

    return run


PEERS = {
    "aiosignal": make_aiosignal,
    "blinker": make_blinker,
    "pluggy": make_pluggy,
    "pyee": make_pyee,
    "psygnal": make_psygnal,
    "Django": make_django,
    "bubus": make_bubus,
    "diator": make_diator,
    "python-cqrs": make_cqrs,
}
"""By name; whistle stands in `benchmarks.dispatch`."""
