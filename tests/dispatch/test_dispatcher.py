"""The dispatcher: what Whistle promises, what is mended on purpose, and what hosts override."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import os
import subprocess
import sys
import textwrap
import tracemalloc
from functools import partial
from typing import Any
from unittest.mock import AsyncMock, patch

import attrs
import msgspec
import pydantic
import pytest
import whistle

import silbo
from silbo import FIRST, LAST, AsyncEventDispatcher, Event, EventName
from silbo.dispatch import listeners
from silbo.errors import EnvelopeConflict, NameInvalid, NotAnEvent


class Ping(Event):
    pass


def recorder(log: list[Any], name: Any = None) -> Any:
    async def listen(event: Any) -> None:
        log.append(name if name is not None else event)

    return listen


# -- Whistle's contract --------------------------------------------------------------------------------------


def test_it_is_a_whistle_dispatcher_and_its_event_a_whistle_event() -> None:
    """A host typed against Whistle, or registering under its type, works unchanged."""
    assert isinstance(AsyncEventDispatcher(), whistle.AsyncEventDispatcher)
    assert issubclass(Event, whistle.Event)
    assert silbo.IAsyncEventDispatcher is whistle.IAsyncEventDispatcher


async def test_priorities_run_lowest_first_and_ties_in_order_of_registration() -> None:
    """Any number is a priority; FIRST and LAST lie beyond infinity."""
    log: list[str] = []
    d = AsyncEventDispatcher()
    inf = float("inf")
    for label, priority in [("l", LAST), ("+", inf), ("0", 0), ("z", 0.0), ("b", 2**80), ("-", -inf), ("f", FIRST)]:
        d.add_listener("x", recorder(log, label), priority=priority)
    await d.adispatch("x")
    assert "".join(log) == "f-0zb+l"


@pytest.mark.parametrize("priority", ["1", None, float("nan"), 1j, [], object()])
def test_a_priority_that_cannot_be_ordered_is_refused_when_registered(priority: Any) -> None:
    """Whistle fails at a later dispatch, far from the mistake."""
    d = AsyncEventDispatcher()
    with pytest.raises(TypeError, match="priority"):
        d.add_listener("x", AsyncMock(), priority=priority)
    assert not d.has_listeners()


def test_edges_order_against_every_number_on_a_stock_whistle_too() -> None:
    """A bridge on a stock Whistle dispatcher can be added with LAST."""
    inf = float("inf")
    assert sorted([LAST, inf, 0, FIRST, -inf])[0] is FIRST
    assert sorted([LAST, inf, 0, FIRST, -inf])[-1] is LAST
    assert inf != LAST and -inf != FIRST and LAST >= inf >= FIRST and FIRST <= -inf <= LAST
    assert (repr(FIRST), repr(LAST)) == ("FIRST", "LAST")
    d = whistle.AsyncEventDispatcher()
    last, infinite = AsyncMock(), AsyncMock()
    d.add_listener("x", last, priority=LAST)
    d.add_listener("x", infinite, priority=inf)
    assert d.get_listeners("x") == (infinite, last)


async def test_every_kind_of_async_callable_is_a_listener() -> None:
    """Mocks, partials, bound, static and class methods as in Whistle; objects with an async ``__call__`` besides."""
    log: list[Any] = []

    class Host:
        async def method(self, event: Any) -> None:
            log.append("method")

        @staticmethod
        async def static(event: Any) -> None:
            log.append("static")

        @classmethod
        async def cls(cls, event: Any) -> None:
            log.append("cls")

        async def __call__(self, event: Any) -> None:
            log.append("call")

    async def with_extra(extra: str, event: Any) -> None:
        log.append(extra)

    d = AsyncEventDispatcher()
    mock = AsyncMock()
    for listener in (mock, Host().method, Host.static, Host.cls, Host(), partial(with_extra, "partial")):
        d.add_listener("x", listener)
    d.add_listener("x", partial(Host()))
    event = await d.adispatch("x")
    mock.assert_awaited_once_with(event)
    assert log == ["method", "static", "cls", "call", "partial", "call"]


@pytest.mark.parametrize("wrong", [lambda event: None, print, Ping, None, "name", int])
def test_what_is_not_async_is_refused_by_add_listener_and_by_listen(wrong: Any) -> None:
    """Whistle's listen() takes a sync function, which then fails at the dispatch."""
    d = AsyncEventDispatcher()
    with pytest.raises(TypeError, match="async def"):
        d.add_listener("x", wrong)
    with pytest.raises(TypeError, match="async def"):
        d.listen("x")(wrong)


def test_sync_dispatch_is_not_implemented() -> None:
    """As in Whistle: an async dispatcher has no dispatch()."""
    with pytest.raises(NotImplementedError):
        AsyncEventDispatcher().dispatch("x")


async def test_any_hashable_is_a_name_and_unhashables_are_type_errors() -> None:
    """Enum members, tuples and numbers name events as well as strings do."""
    d = AsyncEventDispatcher()
    for name in [1, ("a", 1), frozenset("a"), b"x", Ping, ""]:
        log: list[Any] = []
        d.add_listener(name, recorder(log))
        event = await d.adispatch(name, Ping())
        assert log == [event] and event.name == name
    with pytest.raises(TypeError):
        await d.adispatch([])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def test_listeners_are_looked_up_when_the_dispatch_starts_to_run() -> None:
    """Not when the coroutine is made."""
    log: list[Any] = []
    d = AsyncEventDispatcher()
    coroutine = d.adispatch("x", Ping())
    d.add_listener("x", recorder(log))
    event = await coroutine
    assert log == [event]


async def test_a_dispatch_never_suspends_by_itself() -> None:
    """It runs in the caller's task and context; nobody else gets a turn."""
    others: list[str] = []
    loop = asyncio.get_running_loop()
    d = AsyncEventDispatcher()
    tasks: list[Any] = []

    async def here(event: Any) -> None:
        tasks.append(asyncio.current_task())

    d.add_listener("x", here)
    d.add_listener("*", here, timeout=5)
    loop.call_soon(others.append, "turn")
    await d.adispatch("x", Ping())
    await d.adispatch("x", Ping())
    assert others == [] and set(tasks) == {asyncio.current_task()}


async def test_the_first_error_goes_to_the_caller_unwrapped_and_later_listeners_do_not_run() -> None:
    """The same object, with the listener's traceback."""
    log: list[Any] = []
    error = LookupError("x")
    d = AsyncEventDispatcher()
    d.add_listener("x", AsyncMock(side_effect=error))
    d.add_listener("x", recorder(log))
    for _ in range(2):
        with pytest.raises(LookupError) as caught:
            await d.adispatch("x", Ping())
        assert caught.value is error
    assert log == []


async def test_falsy_events_are_events() -> None:
    """Only None means that none was given."""

    class Falsy(Event):
        def __bool__(self) -> bool:
            return False

        def __len__(self) -> int:
            return 0

    event = Falsy()
    assert await AsyncEventDispatcher().adispatch("x", event) is event


async def test_without_an_event_a_new_one_is_made_of_the_names_class() -> None:
    """A plain event for a plain name."""
    d = AsyncEventDispatcher()
    assert type(await d.adispatch("x")) is Event
    assert type(await d.adispatch(EventName("x", Ping))) is Ping


async def test_one_dispatcher_serves_several_loops_one_after_another() -> None:
    """No loop affinity, spawned work included."""
    log: list[Any] = []
    d = AsyncEventDispatcher()
    d.add_listener("x", recorder(log))

    async def once() -> None:
        await d.adispatch("x", Ping())
        d.spawn("x", Ping())
        await d.drain()

    await asyncio.to_thread(lambda: [asyncio.run(once()) for _ in range(3)])
    assert len(log) == 6


# -- mended --------------------------------------------------------------------------------------------------


async def test_a_stopped_event_dispatched_again_reaches_everyone() -> None:
    """Stop belongs to one dispatch (python-whistle/whistle#18)."""
    log: list[Any] = []
    d = AsyncEventDispatcher()

    @d.listen("stop")
    async def stop(event: Event) -> None:
        event.stop_propagation()

    for name in ("stop", "go"):
        for label in "12":
            d.add_listener(name, recorder(log, name + label))
    event = await d.adispatch("stop", Ping())
    assert event.propagation_stopped and log == []
    assert not (await d.adispatch("go", event)).propagation_stopped
    assert log == ["go1", "go2"] and event.name == "go"


@pytest.mark.parametrize("event_class", [Ping, silbo.NotificationEvent, type("Foreign", (whistle.Event,), {})])
@pytest.mark.parametrize("inner_listeners", [0, 1])
async def test_a_nested_dispatch_of_the_same_object_leaves_the_outer_marks(
    event_class: Any, inner_listeners: int
) -> None:
    """Name, dispatcher and stop of the outer dispatch are as they were, whether the inner one was stopped or failed."""
    seen: list[Any] = []
    outer, inner = AsyncEventDispatcher(), AsyncEventDispatcher()

    @outer.listen("outer")
    async def nest(event: Any) -> None:
        await inner.adispatch("inner", event)
        seen.append((event.name, event.dispatcher is outer, event.propagation_stopped))
        with pytest.raises(LookupError):
            await inner.adispatch("fail", event)
        seen.append((event.name, event.dispatcher is outer, event.propagation_stopped))
        event.stop_propagation()
        await outer.adispatch("silent", event)
        seen.append((event.name, event.dispatcher is outer, event.propagation_stopped))

    for _ in range(inner_listeners):

        @inner.listen("inner")
        async def stop(event: Any) -> None:
            seen.append((event.name, event.dispatcher is inner))
            event.stop_propagation()

    inner.add_listener("fail", AsyncMock(side_effect=LookupError))
    outer.add_listener("outer", recorder(seen, "never"), priority=1)
    for _ in range(2):
        seen.clear()
        event = await outer.adispatch("outer", event_class())
        expected = [("outer", True, False), ("outer", True, False), ("outer", True, True)]
        assert seen == [("inner", True)] * inner_listeners + expected
        assert event.propagation_stopped and event.name == "outer"


async def test_has_listeners_is_false_again_after_the_last_removal() -> None:
    """And counts patterns, so that the guard `if d.has_listeners(n)` never starves a bridge."""
    d = AsyncEventDispatcher()
    listener = AsyncMock()
    d.add_listener("x", listener)
    d.remove_listener("x", listener)
    assert not d.has_listeners() and not d.has_listeners("x") and d.get_listeners() == {"x": ()}
    d.remove_listener("x", listener)  # a known name, an unknown listener: silent
    with pytest.raises(ValueError, match="no listener was ever registered"):
        d.remove_listener("y", listener)
    d.add_listener("**", listener)
    assert d.has_listeners() and d.has_listeners("anything") and d.get_listeners("anything") == (listener,)


async def test_name_stays_known_after_its_last_listener_has_run_once_or_was_removed() -> None:
    """Whoever cleans up with remove_listener need not know if the listener has run."""
    d = AsyncEventDispatcher()
    d.add_listener("x", once := AsyncMock(), once=True)
    await d.adispatch("x")
    d.remove_listener("x", once)
    d.add_listener("y.*", listener := AsyncMock()).remove()
    d.remove_listener("y.*", listener)
    assert d.get_listeners() == {}
    with pytest.raises(ValueError, match="no listener was ever registered"):
        d.remove_listener("z", listener)


@pytest.mark.long
async def test_names_made_for_requests_are_forgotten_and_their_removal_stays_silent() -> None:
    """A bounded memory can't say of a name that it was never known, once it has forgotten some."""
    d = AsyncEventDispatcher()
    for number in range(3_000):
        d.add_listener(f"request.{number}", listener := AsyncMock()).remove()
    tracemalloc.start()
    for number in range(3_000, 6_000):
        d.add_listener(f"request.{number}", listener).remove()
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 50_000
    d.remove_listener("request.0", listener)


FROZEN = [
    dataclasses.make_dataclass("Data", [("x", int)], bases=(Event,), frozen=True),
    dataclasses.make_dataclass("Slots", [("x", int)], bases=(Event,), frozen=True, slots=True),
    attrs.make_class("Attrs", {"x": attrs.field(type=int)}, bases=(Event,), frozen=True),
    type(msgspec.Struct)("Struct", (Event, msgspec.Struct), {"__annotations__": {"x": int}}, frozen=True),
    pydantic.create_model("Model", __base__=(Event, pydantic.BaseModel), x=(int, ...)),  # type: ignore[call-overload]
    dataclasses.make_dataclass("Foreign", [("x", int)], frozen=True),
]
FROZEN[4].model_config["frozen"] = True  # type: ignore[attr-defined]


@pytest.mark.parametrize("cls", FROZEN, ids=lambda cls: cls.__name__)
async def test_frozen_events_are_dispatched_and_stopped(cls: Any) -> None:
    """The marks go into the instance's ``__dict__``, past any freeze."""
    log: list[Any] = []
    d = AsyncEventDispatcher()

    @d.listen("x")
    async def stop(event: Any) -> None:
        log.append((event.name, event.dispatcher is d, event.x))
        if isinstance(event, Event):
            event.stop_propagation()
        else:
            event.__dict__["propagation_stopped"] = True

    d.add_listener("x", recorder(log, "never"))
    event = cls(x=1)
    for _ in range(2):
        await d.adispatch("x", event)
    assert log == [("x", True, 1)] * 2 and event.propagation_stopped and event == event


async def test_a_frozen_event_can_stop_itself() -> None:
    """`stop_propagation` too goes past the freeze."""

    @dataclasses.dataclass(frozen=True)
    class Frozen(Event):
        x: int = 0

    log: list[Any] = []
    d = AsyncEventDispatcher()

    @d.listen("x")
    async def stop(event: Frozen) -> None:
        event.stop_propagation()

    d.add_listener("x", recorder(log))
    assert (await d.adispatch("x", Frozen())).propagation_stopped and log == []


async def test_an_object_without_room_for_the_marks_is_refused() -> None:
    """The error says what to derive from; Whistle's is an AttributeError of the object."""
    d = AsyncEventDispatcher()
    for event in (1, "text", msgspec.defstruct("Struct", ["x"])(x=1)):
        with pytest.raises(NotAnEvent, match="silbo.Event"):
            await d.adispatch("x", event)


async def test_foreign_events_are_written_as_whistle_writes_them() -> None:
    """Through their own setters and slots."""

    class Slotted:
        __slots__ = ("dispatcher", "name", "propagation_stopped")

    class Setter(whistle.Event):
        seen: list[str] = []  # noqa: RUF012

        @property  # type: ignore[override]
        def name(self) -> str:
            return self._name

        @name.setter
        def name(self, value: str) -> None:
            self._name = value.upper()

    d = AsyncEventDispatcher()
    slotted: Any = await d.adispatch("x", Slotted())
    assert (slotted.name, slotted.dispatcher, slotted.propagation_stopped) == ("x", d, False)
    assert (await d.adispatch("x", Setter())).name == "X"


async def test_a_silbo_event_with_a_property_in_the_marks_way_is_dispatched() -> None:
    """Read-only on purpose: the class keeps what it says."""

    class Fixed(Event):
        @property
        def name(self) -> str:  # type: ignore[override]
            return "fixed"

    log: list[Any] = []
    d = AsyncEventDispatcher()
    d.add_listener("x", recorder(log))
    for _ in range(2):
        assert (await d.adispatch("x", Fixed())).name == "fixed"
    assert len(log) == 2


async def test_an_event_with_an_answer_to_every_attribute_is_dispatched() -> None:
    """``__getattr__`` is not taken for the marks of a dispatch, before the first one and after it."""

    class Answering(Event):
        def __getattr__(self, attribute: str) -> Any:
            if attribute == "user":
                return "ada"
            raise KeyError(attribute)

    log: list[Any] = []
    d = AsyncEventDispatcher()
    d.add_listener("x", recorder(log))
    for _ in range(3):
        event = await d.adispatch("x", Answering())
        assert (event.name, event.user, event.propagation_stopped) == ("x", "ada", False)
    assert len(log) == 3


async def test_stop_of_a_class_of_the_hosts_own_is_heeded() -> None:
    """Whistle's attribute, declared again as a mere attribute; it was shadowed there, too."""

    class Own(Event):
        propagation_stopped = False

    log: list[Any] = []
    d = AsyncEventDispatcher()
    d.add_listener("method", AsyncMock(side_effect=Event.stop_propagation))
    d.add_listener("assigned", AsyncMock(side_effect=lambda event: setattr(event, "propagation_stopped", True)))
    for name in ("method", "assigned"):
        d.add_listener(name, recorder(log))
        for _ in range(2):
            assert (await d.adispatch(name, Own())).propagation_stopped
    assert log == []


@pytest.mark.parametrize("field", ["name", "dispatcher", "propagation_stopped", "origin"])
async def test_a_payload_field_under_an_envelope_name_is_refused_when_first_used(field: str) -> None:
    """On Whistle it loses its value without a word."""
    d = AsyncEventDispatcher()
    classes = [
        dataclasses.make_dataclass("Data", [(field, str)], bases=(Event,)),
        dataclasses.make_dataclass("Foreign", [(field, str)]),
        dataclasses.make_dataclass("Whistle", [(field, str)], bases=(whistle.Event,)),
        attrs.make_class("Attrs", {field: attrs.field(type=str)}, bases=(silbo.ECSTEvent,)),
        type(msgspec.Struct)("Struct", (Event, msgspec.Struct), {"__annotations__": {field: str}}),
    ]
    for cls in classes:
        for _ in range(2):
            with pytest.raises(EnvelopeConflict, match=f"'wire': '{field}'"):
                await d.adispatch("x", cls(**{field: "value"}))


async def test_an_envelope_of_the_hosts_own_may_declare_those_names() -> None:
    """A class that implements Whistle's IEvent by itself is an envelope, not a payload."""

    @dataclasses.dataclass
    class Own:
        name: str = ""
        propagation_stopped: bool = False
        dispatcher: Any = None

        def stop_propagation(self) -> None:
            self.propagation_stopped = True

    assert (await AsyncEventDispatcher().adispatch("x", Own())).name == "x"


async def test_slips_are_refused_with_what_was_meant() -> None:
    """On Whistle they register nothing, or write on the class itself."""
    d = AsyncEventDispatcher()
    slips: Any = d
    with pytest.raises(TypeError, match=r"Ping\(\.\.\.\)"):
        await slips.adispatch("x", Ping)
    assert Ping.name is None
    with pytest.raises(TypeError, match=r"'user\.joined', Ping\(\.\.\.\)"):
        await slips.adispatch(Ping())
    with pytest.raises(TypeError, match="takes a name first"):

        @slips.listen
        async def forgot_the_name(event: Any) -> None: ...

    with pytest.raises(TypeError, match="list of observers"):
        AsyncEventDispatcher(observers=silbo.Trace())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no observer"):
        AsyncEventDispatcher(observers=[silbo.Trace])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="event class"):
        EventName("x", "Ping")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Subscriber\(\)"):
        d.add_subscriber(type("Subscriber", (), {"hear": silbo.on("x")(_nothing)}))


async def test_names_with_an_asterisk_cannot_be_dispatched() -> None:
    """They are patterns."""
    d = AsyncEventDispatcher()
    for name in ("user.*", "**", "a*"):
        with pytest.raises(NameInvalid, match="pattern"):
            await d.adispatch(name, Ping())


async def test_cancellation_passes_through_and_leaves_the_event_usable() -> None:
    """Whatever the policy; the event is not taken to be in a dispatch afterwards."""
    for policy in ("raise", "collect", lambda *_: None):
        d = AsyncEventDispatcher(on_error=policy)  # type: ignore[arg-type]
        started = asyncio.Event()

        async def wait(event: Any, started: asyncio.Event = started) -> None:
            started.set()
            await asyncio.Event().wait()

        d.add_listener("x", wait)
        event = Ping()
        task = asyncio.create_task(d.adispatch("x", event))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        d.remove_listener("x", wait)
        assert await d.adispatch("y", event) is event and event.name == "y"


@pytest.mark.long
def test_names_without_end_under_one_pattern_leave_memory_flat() -> None:
    """Names can be dynamic: what is cached by name is bounded. In a process of its own, for coverage is slow."""
    code = """
        import asyncio, tracemalloc
        from silbo import AsyncEventDispatcher, Event
        from silbo.dispatch import listeners

        listeners.CACHED_NAMES = 1024

        async def listener(event): ...

        async def main():
            d = AsyncEventDispatcher()
            d.add_listener("user.*.seen", listener)
            event = Event()
            for number in range(20_000):
                await d.adispatch(f"user.{number}.seen", event)
            tracemalloc.start()
            for number in range(20_000, 22_000):
                await d.adispatch(f"user.{number}.seen", event)
            before, _ = tracemalloc.get_traced_memory()
            for number in range(22_000, 62_000):
                await d.adispatch(f"user.{number}.seen", event)
            after, _ = tracemalloc.get_traced_memory()
            print(after - before)

        asyncio.run(main())
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    program = [sys.executable, "-c", textwrap.dedent(code)]
    out = subprocess.run(program, env=environment, capture_output=True, text=True, check=True).stdout
    assert int(out) < 500_000, f"{out} bytes more after 40,000 further names"


async def _nothing(event: Any) -> None:
    pass


# -- hosts that override -------------------------------------------------------------------------------------


class Host(AsyncEventDispatcher):
    """With Whistle's signatures, as a host has them that was written before silbo."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[Any] = []

    def add_listener(self, event_id: Any, listener: Any, /, *, priority: int = 0) -> None:
        self.log.append(("add", event_id))
        super().add_listener(event_id, listener, priority=priority)

    async def adispatch(self, event_id: Any, event: Any = None, /) -> Any:
        self.log.append(("dispatch", event_id))
        return await super().adispatch(event_id, event)

    async def _adispatch(self, listeners: Any, event: Any) -> None:
        for listener in listeners:
            self.log.append(("run", listener.__name__))
            await listener(event)
            if event.propagation_stopped:
                break

    def get_listeners(self, event_id: Any = None, /) -> Any:
        self.log.append(("get", event_id))
        return super().get_listeners(event_id)


async def test_a_hosts_overrides_are_called_for_every_listener_and_dispatch() -> None:
    """Also by listen, subscribers, wait_for and spawn, which pass only the options that were given."""

    class Subscriber:
        @silbo.on("x")
        async def method(self, event: Any) -> None: ...

    d = Host()

    @d.listen("x")
    async def function(event: Any) -> None: ...

    d.add_subscriber(Subscriber())
    assert d.log == [("add", "x")] * 2
    d.log.clear()
    waiting = asyncio.create_task(d.wait_for("x"))
    await asyncio.sleep(0)
    await d.spawn("x", Ping())
    await waiting
    runs = [("run", "function"), ("run", "method"), ("run", "hear")]
    assert d.log == [("add", "x"), ("dispatch", "x"), ("get", "x"), *runs]
    d.log.clear()
    for _ in range(2):
        await d.adispatch("x", Ping())
    assert d.log == [("dispatch", "x"), ("get", "x"), *runs[:2]] * 2


async def test_what_a_hosts_get_listeners_returns_is_what_runs() -> None:
    """A list, a generator, with listeners of its own."""
    log: list[Any] = []

    class Adding(AsyncEventDispatcher):
        def get_listeners(self, event_id: Any = None, /) -> Any:
            yield from super().get_listeners(event_id)
            yield recorder(log, "added")

    d = Adding()
    d.add_listener("x", recorder(log, "own"))
    for _ in range(2):
        await d.adispatch("x", Ping())
    assert log == ["own", "added"] * 2


async def test_a_method_replaced_on_the_instance_is_used_and_given_back() -> None:
    """As mock.patch.object does it, also for names that were dispatched before."""
    log: list[Any] = []
    d = AsyncEventDispatcher()
    d.add_listener("x", recorder(log))
    await d.adispatch("x", Ping())
    with patch.object(d, "_adispatch", AsyncMock()) as replaced:
        await d.adispatch("x", Ping())
        await d.adispatch("x", Ping())
    assert replaced.await_count == 2 and len(log) == 1
    with patch.object(d, "get_listeners", return_value=()) as looked:
        await d.adispatch("x", Ping())
    assert looked.call_count == 1 and len(log) == 1
    await d.adispatch("x", Ping())
    assert len(log) == 2
    assert d._ready, "adispatch does not run its listeners directly again"


async def test_a_change_is_heard_by_the_next_dispatch_of_each_name_that_it_concerns() -> None:
    """Listeners of a name and of a pattern, added and removed, among names that were dispatched before and equal ones."""
    log: list[Any] = []
    d = AsyncEventDispatcher()

    async def ran(*names: Any) -> list[list[Any]]:
        found = []
        for name in names:
            log.clear()
            await d.adispatch(name, Ping())
            found.append(list(log))
        return found

    assert await ran("a.b", "a.c", 1) == [[], [], []]
    on_name = d.add_listener("a.b", recorder(log, "name"))
    assert await ran("a.b", "a.c", True) == [["name"], [], []]
    on_pattern = d.add_listener("a.*", recorder(log, "pattern"))
    d.add_listener(True, recorder(log, "one"))
    assert await ran("a.b", "a.c", 1, 1.0) == [["name", "pattern"], ["pattern"], ["one"], ["one"]]
    on_name.remove()
    assert await ran("a.b", "a.c", 1) == [["pattern"], ["pattern"], ["one"]]
    on_pattern.remove()
    assert await ran("a.b", "a.c", 1) == [[], [], ["one"]]


async def test_names_with_listeners_stay_ready_beside_names_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many names have listeners of their own, none of them is looked up again at each dispatch."""
    monkeypatch.setattr(listeners, "CACHED_NAMES", 32)
    d = AsyncEventDispatcher()
    d.add_listener("**", AsyncMock())
    names = [f"name.{number}" for number in range(100)]
    for name in names:
        d.add_listener(name, AsyncMock())
    await d.adispatch("first", Ping())
    for name in names:
        await d.adispatch(name, Ping())
    assert d._ready.keys() >= set(names)
    for number in range(1_000):
        await d.adispatch(f"request.{number}", Ping())
    assert len(d._ready) <= 32 + len(names) + 1


class Joined(str, enum.Enum):  # noqa: UP042  # the text of a StrEnum's member is its value
    USER = "user.joined"


@pytest.mark.parametrize("pattern", ["user.*", "**", "user.**", "*.joined"])
async def test_member_of_a_str_enum_is_heard_by_patterns_for_its_value(pattern: str) -> None:
    """Whichever of the two equal names comes first."""
    for first, second in ((Joined.USER, "user.joined"), ("user.joined", Joined.USER)):
        d = AsyncEventDispatcher()
        d.add_listener(pattern, heard := AsyncMock())
        assert d.has_listeners(first)
        await d.adispatch(first)
        await d.adispatch(second)
        assert heard.await_count == 2


def test_removed_pattern_is_matched_no_more() -> None:
    """Its name stays known, as in Whistle; each dispatch of a new name would cost more than the last otherwise."""
    d = AsyncEventDispatcher()
    for number in range(3):
        d.add_listener(f"tenant{number}.**", noted := AsyncMock())
        d.remove_listener(f"tenant{number}.**", noted)
        d.remove_listener(f"tenant{number}.**", noted)
    assert not d._listeners._patterns
    d.add_listener("tenant1.**", again := AsyncMock())
    assert d.get_listeners("tenant1.x") == (again,)
