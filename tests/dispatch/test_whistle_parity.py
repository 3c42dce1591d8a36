"""silbo beside Whistle itself, over random programs: what is not mended on purpose is the same."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Literal

import whistle
from hypothesis import given, settings
from hypothesis import strategies as st

import silbo
from tests.support.simple_container import SimpleContainer

NAMES = ("a", "a.b", 7)
LISTENERS = 4
EVENTS = 2
DEPTH = 3


@dataclass(frozen=True)
class Add:
    name: Any
    listener: int
    priority: float
    how: Literal["add_listener", "listen"] = "add_listener"


@dataclass(frozen=True)
class Remove:
    name: Any
    listener: int


@dataclass(frozen=True)
class Dispatch:
    name: Any
    event: int | None  # None: no event; -1: the one that the listener was given


@dataclass(frozen=True)
class Stop:
    pass


@dataclass(frozen=True)
class Raise:
    pass


@dataclass(frozen=True)
class Pause:
    pass


Step = Add | Remove | Dispatch | Stop | Raise | Pause

names = st.sampled_from(NAMES)
listeners = st.integers(0, LISTENERS - 1)
priorities = st.one_of(st.integers(-3, 3), st.sampled_from([0.5, -0.0, 2**70, float("inf"), float("-inf"), True]))
adds = st.builds(Add, names, listeners, priorities, st.sampled_from(["add_listener", "listen"]))
changes = st.one_of(adds, st.builds(Remove, names, listeners))
nested = st.builds(Dispatch, names, st.one_of(st.none(), st.just(-1), st.integers(-1, EVENTS - 1)))
dispatches = st.builds(Dispatch, names, st.one_of(st.none(), st.integers(0, EVENTS - 1)))
steps = st.one_of(changes, nested, nested, st.builds(Stop), st.builds(Raise), st.builds(Pause))


@dataclass(frozen=True)
class Program:
    scripts: list[list[Step]]  # what each listener does when it runs, a step a run
    main: list[Step]


programs = st.builds(
    lambda scripts, first, then: Program(scripts, first + then),
    st.lists(st.lists(steps, min_size=1, max_size=3), min_size=LISTENERS, max_size=LISTENERS),
    st.lists(adds, min_size=3, max_size=6),
    st.lists(st.one_of(dispatches, dispatches, changes), min_size=2, max_size=8),
)


class Failure(Exception):
    pass


class Run:
    """Interprets a program on one dispatcher and writes down everything that can be seen."""

    def __init__(
        self, program: Program, dispatcher: Any, event_class: type, *, fresh: bool, as_classes: bool = False
    ) -> None:
        self.program, self.dispatcher, self.event_class, self.fresh = program, dispatcher, event_class, fresh
        self.log: list[object] = []
        self.events = [event_class() for _ in range(EVENTS)]
        self.depth = 0
        functions = [self.listener(index) for index in range(LISTENERS)]
        self.functions = [listener_class(function) if as_classes else function for function in functions]

    def listener(self, index: int) -> Any:
        script = iter(self.program.scripts[index])

        async def run(event: Any) -> None:
            self.log.append(("run", index, event.name, event.dispatcher is self.dispatcher, self.number(event)))
            step = next(script, None)
            if isinstance(step, Stop):
                event.stop_propagation()
            elif isinstance(step, Raise):
                raise Failure(index)
            elif step is not None:
                await self.step(step, event)
            self.log.append(("ran", index, event.name, event.propagation_stopped))

        return run

    def number(self, event: Any) -> int:
        return next((i for i, known in enumerate(self.events) if known is event), -1)

    async def step(self, step: Step, current: Any = None) -> None:
        try:
            match step:
                case Add(name, listener, priority, "listen"):
                    self.dispatcher.listen(name, priority=priority)(self.functions[listener])
                case Add(name, listener, priority):
                    self.dispatcher.add_listener(name, self.functions[listener], priority=priority)
                case Remove(name, listener):
                    self.dispatcher.remove_listener(name, self.functions[listener])
                case Dispatch(name, number):
                    await self.dispatch(name, number, current)
                case Pause():
                    await asyncio.sleep(0)
        except ValueError:
            self.log.append("ValueError")
        self.look()

    async def dispatch(self, name: Any, number: int | None, current: Any) -> None:
        if self.depth >= DEPTH:
            return
        self.depth += 1
        if number is None:
            event = None
        elif self.fresh:
            event = self.event_class()
        else:
            event = self.events[number] if number >= 0 or current is None else current
        try:
            answer = await self.dispatcher.adispatch(name, event)
            assert event is None or answer is event
            self.log.append(("answer", answer.name, answer.propagation_stopped, answer.dispatcher is self.dispatcher))
        except Failure as error:
            self.log.append(("raised", error.args))
            if self.depth > 1:
                raise
        finally:
            self.depth -= 1

    def look(self) -> None:
        known = {function: index for index, function in enumerate(self.functions)}
        for name in NAMES:
            self.log.append((name, [known[one] for one in self.dispatcher.get_listeners(name)]))
            self.log.append((name, self.dispatcher.has_listeners(name)))
        everything = self.dispatcher.get_listeners()
        self.log.append({name: [known[one] for one in found] for name, found in everything.items()})

    async def main(self) -> list[object]:
        for step in self.program.main:
            await self.step(step)
        return self.log


class MendedWhistle(whistle.AsyncEventDispatcher):
    """Whistle with the one thing mended that programs on shared events can't avoid: name and stop per dispatch."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[int] = []

    async def adispatch(self, event_id: Any, event: Any = None, /) -> Any:
        event = whistle.Event() if event is None else event
        before = (event.name, event.dispatcher, event.propagation_stopped)
        nested = id(event) in self.inside
        event.propagation_stopped = False
        self.inside.append(id(event))
        try:
            return await super().adispatch(event_id, event)
        finally:
            self.inside.pop()
            if nested:
                event.name, event.dispatcher, event.propagation_stopped = before


class LoggingSilbo(silbo.AsyncEventDispatcher):
    """Overriding takes the other way through silbo's dispatch: it must not differ either."""

    async def _adispatch(self, listeners: Any, event: Any) -> None:
        await super()._adispatch(listeners, event)


def listener_class(function: Any) -> type:
    """A class whose objects do what a listener does."""

    class Handler:
        async def handle(self, event: Any) -> None:
            await function(event)

    return Handler


class Unseeing:
    """An observer that does nothing."""

    def before_dispatch(self, dispatch: object) -> None: ...
    def after_dispatch(self, dispatch: object) -> None: ...
    def before_listener(self, call: object) -> None: ...
    def after_listener(self, call: object) -> None: ...


def logs(
    program: Program, dispatcher: Any, event_class: type, *, fresh: bool, as_classes: bool = False
) -> list[object]:
    return asyncio.run(Run(program, dispatcher, event_class, fresh=fresh, as_classes=as_classes).main())


def log_all_ways(program: Program, *, fresh: bool) -> list[list[object]]:
    """The results of a program with silbo: directly, in its long way, under observation, and with listener classes."""
    observed, resolving = {"observers": [Unseeing()]}, {"container": SimpleContainer()}
    return [
        logs(program, silbo.AsyncEventDispatcher(), SilboEvent, fresh=fresh),
        logs(program, silbo.AsyncEventDispatcher(), WhistleEvent, fresh=fresh),
        logs(program, silbo.AsyncEventDispatcher(), Notification, fresh=fresh),
        logs(program, LoggingSilbo(), SilboEvent, fresh=fresh),
        logs(program, silbo.AsyncEventDispatcher(**observed), SilboEvent, fresh=fresh),
        logs(program, LoggingSilbo(**observed), SilboEvent, fresh=fresh),
        logs(program, silbo.AsyncEventDispatcher(**resolving), SilboEvent, fresh=fresh, as_classes=True),
        logs(program, LoggingSilbo(**resolving), SilboEvent, fresh=fresh, as_classes=True),
    ]


class WhistleEvent(whistle.Event):
    pass


class SilboEvent(silbo.Event):
    pass


class Notification(silbo.NotificationEvent):
    pass


@settings(deadline=None, max_examples=100)
@given(programs)
def test_same_as_whistle_with_a_fresh_event_for_each_dispatch(program: Program) -> None:
    """Add, remove, dispatch, stop, raise, nested dispatch and changes during a dispatch: nothing differs."""
    expected = logs(program, whistle.AsyncEventDispatcher(), WhistleEvent, fresh=True)
    for found in log_all_ways(program, fresh=True):
        assert found == expected


@settings(deadline=None, max_examples=100)
@given(programs)
def test_same_as_whistle_when_events_are_dispatched_again_but_for_stop_and_name(program: Program) -> None:
    """Shared events, dispatched again and from inside of their own dispatch: only name and stop are mended."""
    expected = logs(program, MendedWhistle(), WhistleEvent, fresh=False)
    for found in log_all_ways(program, fresh=False):
        assert found == expected
