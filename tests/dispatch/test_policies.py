"""Policies of names and of plugins: time, failures, and the event as it was."""

from __future__ import annotations

import asyncio
import inspect
import logging
import sys
from dataclasses import dataclass, field
from typing import Any

import attrs
import msgspec
import pydantic
import pytest

import silbo
from silbo import LAST, AsyncEventDispatcher, Bridge, Budget, ECSTEvent, Event, EventName, Policy, Refusal
from silbo.brokers.memory import MemoryBroker
from silbo.dispatch.on_loop import OnLoop
from silbo.dispatch.owner import Owner
from silbo.errors import ListenerTimeout, NameInvalid, PluginOff
from silbo.message import Message
from silbo.policy import combine_policies


@dataclass
class Joining(Event):
    user: str = "ada"
    tags: list[str] = field(default_factory=list)


class Told:
    """The reports about a plugin."""

    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.errors: list[Exception | None] = []

    def __call__(self, kind: str, text: str, /, *, listener: object, error: Exception | None) -> None:
        self.kinds.append(kind)
        self.errors.append(error)


def owner_of(dispatcher: AsyncEventDispatcher, policy: Policy | None, told: Told | None = None) -> Owner:
    place = dispatcher._listeners.next_place()
    return Owner("audit", policy=policy, place=place, on_loop=OnLoop(), report=told or Told())


def add_as(owner: Owner, dispatcher: AsyncEventDispatcher, name: Any, listener: Any, **options: Any) -> None:
    with dispatcher._listeners.adding_for(owner):
        dispatcher.add_listener(name, listener, **options)


async def fail(event: Any) -> None:
    event.user = "half"
    event.added = True
    raise ValueError("no")


async def hang(event: Any) -> None:
    event.user = "half"
    await asyncio.Event().wait()


# -- a plugin's policy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", ["raise", "collect", None])
async def test_a_plugins_policy_outvotes_its_own_option(own: Any) -> None:
    """The host decides: a plugin that asks for its errors to be raised is isolated all the same."""
    dispatcher, told = AsyncEventDispatcher(), Told()
    owner = owner_of(dispatcher, Policy(on_failure="ignore"), told)
    add_as(owner, dispatcher, "joining", fail, on_error=own)
    event = await dispatcher.adispatch("joining", Joining())
    assert (event.user, vars(event).get("added")) == ("ada", None)
    assert told.kinds == ["failed"]
    assert any("audit" in note and "fail" in note for note in told.errors[0].__notes__)  # type: ignore[union-attr]


async def test_collected_failures_of_a_plugin_reach_the_caller_named() -> None:
    """Collected: the others run on an event without the half-made change, then the error is raised and names the plugin."""
    dispatcher = AsyncEventDispatcher()
    seen: list[str] = []

    async def look(event: Joining) -> None:
        seen.append(event.user)

    add_as(owner_of(dispatcher, Policy(on_failure="collect")), dispatcher, "joining", fail)
    dispatcher.add_listener("joining", look)
    with pytest.raises(ExceptionGroup) as caught:
        await dispatcher.adispatch("joining", Joining())
    assert seen == ["ada"]
    assert "plugin 'audit'" in caught.value.exceptions[0].__notes__[0]


async def test_a_raising_policy_leaves_the_event_as_it_is() -> None:
    """The dispatch does not go on, so nothing is put back; the error is the listener's own, with a note."""
    dispatcher = AsyncEventDispatcher(on_error=lambda error, event, listener: None)
    event = Joining()
    add_as(owner_of(dispatcher, Policy(on_failure="raise")), dispatcher, "joining", fail)
    with pytest.raises(ValueError, match="no") as caught:
        await dispatcher.adispatch("joining", event)
    assert event.user == "half"
    assert len(caught.value.__notes__) == 1


async def test_the_hosts_own_listeners_and_its_bridge_are_under_no_plugins_policy() -> None:
    """A plugin's policy isolates the plugin alone."""
    dispatcher = AsyncEventDispatcher()
    add_as(owner_of(dispatcher, Policy(on_failure="ignore")), dispatcher, "joining", fail)
    dispatcher.add_listener("joining", fail)
    with pytest.raises(ValueError, match="no") as caught:
        await dispatcher.adispatch("joining", Joining())
    assert not hasattr(caught.value, "__notes__")


async def test_ignored_failures_go_to_the_hosts_hook_if_it_has_one() -> None:
    """One place for a host's errors: its ``on_error``, sync or async."""
    heard: list[str] = []

    async def hook(error: Exception, event: Any, listener: Any) -> None:
        heard.append(f"{error} of {listener.__name__}, event {event.user}")

    dispatcher, told = AsyncEventDispatcher(on_error=hook), Told()
    add_as(owner_of(dispatcher, Policy(on_failure="ignore"), told), dispatcher, "joining", fail)
    await dispatcher.adispatch("joining", Joining())
    assert heard == ["no of fail, event ada"]
    assert told.kinds == []


@pytest.mark.parametrize(("own", "policy", "limit"), [(0.01, 60, 0.01), (60, 0.01, 0.01), (None, 0.01, 0.01)])
async def test_the_shortest_time_limit_counts(own: float | None, policy: float, limit: float) -> None:
    """A plugin can shorten the host's limit, and can't lengthen it."""
    dispatcher, told = AsyncEventDispatcher(), Told()
    add_as(owner_of(dispatcher, Policy(timeout=policy, on_failure="ignore"), told), dispatcher, "j", hang, timeout=own)
    event = await dispatcher.adispatch("j", Joining())
    assert event.user == "ada"
    (error,) = told.errors
    assert isinstance(error, ListenerTimeout)
    assert (error.timeout, error.listener) == (limit, hang)


async def test_a_listener_that_swallows_its_time_limit_has_failed() -> None:
    """A listener that catches the cancellation and returns may have done half of its work: its change is undone."""
    dispatcher, told = AsyncEventDispatcher(), Told()

    async def swallow(event: Joining) -> None:
        event.user = "half"
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return

    add_as(owner_of(dispatcher, Policy(timeout=0.01, on_failure="ignore"), told), dispatcher, "j", swallow)
    assert (await dispatcher.adispatch("j", Joining())).user == "ada"
    assert isinstance(told.errors[0], ListenerTimeout)


async def test_a_cancelled_dispatch_is_cancelled_inside_of_the_plugin() -> None:
    """A cancellation is the caller's: it passes through the plugin's code, and no policy takes it for a failure."""
    dispatcher, told = AsyncEventDispatcher(), Told()
    owner = owner_of(dispatcher, Policy(timeout=60, on_failure="ignore"), told)
    started, cleaned = asyncio.Event(), asyncio.Event()

    async def wait(event: Joining) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.set()

    add_as(owner, dispatcher, "j", wait)
    task = asyncio.create_task(dispatcher.adispatch("j", Joining()))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cleaned.is_set()
    assert told.kinds == []
    assert not owner.runs


async def test_what_a_listener_awaits_gives_it_its_value_and_its_errors() -> None:
    """A listener is run by hand: futures, values and errors reach it as in any task."""
    dispatcher = AsyncEventDispatcher()
    got: list[Any] = []

    async def use(event: Joining) -> None:
        loop = asyncio.get_running_loop()
        answer = loop.create_future()
        loop.call_soon(answer.set_result, 7)
        got.append(await answer)
        broken = loop.create_future()
        loop.call_soon(broken.set_exception, OSError("down"))
        try:
            await broken
        except OSError as error:
            got.append(str(error))
        got.append(await asyncio.gather(asyncio.sleep(0, "a"), asyncio.sleep(0, "b")))
        async with asyncio.timeout(60):
            await asyncio.sleep(0)

    add_as(owner_of(dispatcher, Policy(timeout=60, on_failure="raise")), dispatcher, "j", use)
    await dispatcher.adispatch("j", Joining())
    assert got == [7, "down", ["a", "b"]]


async def test_a_listener_may_return_another_awaitable_than_a_coroutine() -> None:
    """As a decorator does that marks its function as async, and the functions of a compiler."""
    dispatcher, told = AsyncEventDispatcher(), Told()

    def start(event: Joining) -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(fail(event))

    if sys.version_info >= (3, 12):
        inspect.markcoroutinefunction(start)
    else:
        start._is_coroutine = asyncio.coroutines._is_coroutine  # type: ignore[attr-defined]
    add_as(owner_of(dispatcher, Policy(on_failure="ignore"), told), dispatcher, "joining", start)
    event = await dispatcher.adispatch("joining", Joining())
    assert (event.user, told.kinds) == ("ada", ["failed"])


async def test_a_listener_that_ignores_its_time_limit_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can end a coroutine that swallows its cancellation; the host is told who it is."""
    monkeypatch.setattr("silbo.dispatch.policy_listener.HEEDS_WITHIN", 0.01)
    dispatcher, told = AsyncEventDispatcher(), Told()

    async def ignore(event: Joining) -> None:
        while not told.kinds:
            try:
                await asyncio.sleep(0.005)
            except asyncio.CancelledError:
                pass

    add_as(owner_of(dispatcher, Policy(timeout=0.01, on_failure="ignore"), told), dispatcher, "j", ignore)
    await dispatcher.adispatch("j", Joining())
    assert told.kinds == ["long", "failed"]


async def test_the_hosts_constant_comes_before_a_plugins() -> None:
    """A plugin that makes a constant of its own can neither weaken the host's policy nor break its dispatches."""
    dispatcher = AsyncEventDispatcher()
    theirs = EventName("deal", Joining, policy=Policy(on_failure="ignore"))
    ours = EventName("deal", Joining, policy=Policy(on_failure="refuse"))
    owner = owner_of(dispatcher, Policy(on_failure="ignore"))
    add_as(owner, dispatcher, theirs, fail)
    assert (await dispatcher.adispatch(ours, Joining())).refusal is not None
    with pytest.raises(NameInvalid, match="policy"):
        add_as(owner, dispatcher, theirs, fail)


async def test_a_long_listener_is_reported_once() -> None:
    """``report_after`` names a listener that goes on for long, once, and lets it run."""
    dispatcher, told = AsyncEventDispatcher(), Told()
    reported = asyncio.Event()

    def tell(kind: str, text: str, /, *, listener: object, error: Exception | None) -> None:
        told(kind, text, listener=listener, error=error)
        assert "wait" in text
        assert __file__ in text
        reported.set()

    async def wait(event: Joining) -> None:
        await reported.wait()
        event.user = "done"

    owner = Owner("audit", policy=Policy(report_after=0.01), place=0, on_loop=OnLoop(), report=tell)
    add_as(owner, dispatcher, "j", wait)
    assert (await dispatcher.adispatch("j", Joining())).user == "done"
    reported.clear()
    later = asyncio.get_running_loop().call_later(0.1, reported.set)
    await dispatcher.adispatch("j", Joining())
    later.cancel()
    assert told.kinds == ["long"]


@pytest.mark.parametrize("on_failure", ["ignore", "refuse", "collect"])
async def test_no_policy_swallows_the_cancellation_of_the_caller(on_failure: Any) -> None:
    """A plugin whose clean-up fails while it is cancelled must not keep the host's task alive."""
    dispatcher = AsyncEventDispatcher()
    started = asyncio.Event()

    async def spoil(event: Any) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            raise ConnectionError("close failed")

    add_as(owner_of(dispatcher, Policy(on_failure=on_failure, timeout=60)), dispatcher, "j", spoil)
    task = asyncio.create_task(dispatcher.adispatch("j", Joining()))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await dispatcher.adispatch("j", Joining())


async def test_a_cancellation_of_the_plugins_own_is_its_failure() -> None:
    """A listener that awaits a task which was cancelled has failed; nobody has cancelled the host."""
    dispatcher, told = AsyncEventDispatcher(), Told()

    async def await_cancelled(event: Any) -> None:
        task = asyncio.create_task(asyncio.Event().wait())
        asyncio.get_running_loop().call_soon(task.cancel)
        await task

    add_as(owner_of(dispatcher, Policy(on_failure="ignore"), told), dispatcher, "j", await_cancelled)
    await dispatcher.adispatch("j", Joining())
    (error,) = told.errors
    assert isinstance(error, RuntimeError)
    assert isinstance(error.__cause__, asyncio.CancelledError)


async def test_a_cancellation_that_was_asked_for_before_reaches_the_caller() -> None:
    """A task that cancels itself, and dispatches before its next wait, is cancelled inside of the plugin's listener."""
    dispatcher, told = AsyncEventDispatcher(), Told()

    async def wait(event: Any) -> None:
        await asyncio.sleep(0)

    add_as(owner_of(dispatcher, Policy(on_failure="ignore"), told), dispatcher, "j", wait)

    async def cancel_and_dispatch() -> None:
        asyncio.current_task().cancel()  # type: ignore[union-attr]
        await dispatcher.adispatch("j", Joining())

    task = asyncio.create_task(cancel_and_dispatch())
    with pytest.raises(asyncio.CancelledError):
        await task
    assert told.kinds == []


@pytest.mark.parametrize("whose", ["name", "plugin"])
async def test_collecting_is_not_outvoted_by_a_callable(whose: str) -> None:
    """Under "collect", neither the plugin's own hook nor a binding one of the dispatcher swallows the error."""

    def swallow(error: Exception, event: Any, listener: Any) -> None: ...

    collect = Policy(on_failure="collect")
    dispatcher = AsyncEventDispatcher(on_error=swallow, binding=True)
    name = EventName("j", Joining, policy=collect if whose == "name" else None)
    add_as(owner_of(dispatcher, collect if whose == "plugin" else None), dispatcher, name, fail, on_error=swallow)
    with pytest.raises(ExceptionGroup):
        await dispatcher.adispatch(name, Joining())


# -- the event as it was ------------------------------------------------------------------------------------


@attrs.define(slots=False)
class AttrsEvent(Event):
    user: str = "ada"


class StructEvent(msgspec.Struct, Event, dict=True):  # type: ignore[misc]
    user: str = "ada"


class ModelEvent(pydantic.BaseModel, Event):
    model_config = pydantic.ConfigDict(extra="allow")
    user: str = "ada"


class PlainEvent(Event):
    def __init__(self) -> None:
        self.user = "ada"


class Foreign:
    def __init__(self) -> None:
        self.user = "ada"
        self.propagation_stopped = False

    def stop_propagation(self) -> None:
        self.propagation_stopped = True


class Slotted:
    __slots__ = ("dispatcher", "left", "name", "propagation_stopped", "user")

    def __init__(self) -> None:
        self.user = "ada"
        self.propagation_stopped = False


@pytest.mark.parametrize("cls", [Joining, AttrsEvent, StructEvent, ModelEvent, PlainEvent, Foreign])
async def test_a_failed_plugin_leaves_no_half_made_change(cls: Any) -> None:
    """Changed, added and deleted attributes are as they were before, for every kind of class."""
    dispatcher = AsyncEventDispatcher()
    seen: list[Any] = []

    async def spoil(event: Any) -> None:
        event.other = 1
        event.stop_propagation()
        del event.user
        raise OSError

    async def look(event: Any) -> None:
        seen.append((event.user, hasattr(event, "other"), event.propagation_stopped, event.name))

    add_as(owner_of(dispatcher, Policy(on_failure="ignore")), dispatcher, "j", spoil)
    dispatcher.add_listener("j", look)
    await dispatcher.adispatch("j", cls())
    assert seen == [("ada", False, False, "j")]


async def test_slots_are_put_back_too() -> None:
    """An event without a ``__dict__``: its slots are as they were, set or unset."""
    dispatcher = AsyncEventDispatcher()

    async def spoil(event: Slotted) -> None:
        event.left = 1  # type: ignore[attr-defined]
        del event.user
        raise OSError

    add_as(owner_of(dispatcher, Policy(on_failure="ignore")), dispatcher, "j", spoil)
    event: Any = Slotted()
    await dispatcher.adispatch("j", event)
    assert event.user == "ada"
    assert not hasattr(event, "left")


async def test_an_id_that_a_failed_plugin_has_read_stays() -> None:
    """The plugin may have sent the id somewhere: the same event must not get another one."""
    dispatcher = AsyncEventDispatcher()
    seen: list[Any] = []

    class Paid(silbo.NotificationEvent):
        pass

    async def send(event: Paid) -> None:
        seen.append(event.event_id)
        raise OSError

    add_as(owner_of(dispatcher, Policy(on_failure="ignore")), dispatcher, "paid", send)
    event = await dispatcher.adispatch("paid", Paid())
    assert event.event_id == seen[0]


# -- a name's policy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dispatched", ["constant", "text"])
async def test_a_failed_plugin_refuses_where_the_name_decides(dispatched: str) -> None:
    """A name that decides something fails closed: the event is stopped and says why, whatever the plugin's policy."""
    may_join = EventName("may.join", Joining, policy=Policy(on_failure="refuse"))
    dispatcher, told = AsyncEventDispatcher(), Told()
    ran: list[str] = []

    async def later(event: Joining) -> None:
        ran.append("later")

    add_as(owner_of(dispatcher, Policy(on_failure="ignore"), told), dispatcher, may_join, fail)
    dispatcher.add_listener("may.*", later)
    event = Joining()
    await dispatcher.adispatch(may_join if dispatched == "constant" else "may.join", event)
    assert event.propagation_stopped
    assert isinstance(event.refusal, Refusal)
    assert (event.refusal.plugin, event.refusal.listener, str(event.refusal.error)) == ("audit", fail, "no")
    assert "audit" in str(event.refusal)
    assert (event.user, ran, told.kinds) == ("ada", [], ["failed"])
    await dispatcher.adispatch("other", event)  # a refusal belongs to one dispatch
    assert event.refusal is None


@pytest.mark.parametrize("fails_itself", [False, True])
async def test_a_refusal_of_the_same_event_inside_of_its_dispatch_is_not_lost(fails_itself: bool) -> None:
    """A listener that asks with the event at hand must not take a refusal for a yes, nor does the rest of the outer dispatch."""
    may_join = EventName("may.join", Joining, policy=Policy(on_failure="refuse"))
    dispatcher = AsyncEventDispatcher()
    asked: list[object] = []
    ran: list[str] = []
    owner = owner_of(dispatcher, Policy(on_failure="ignore"))

    async def ask(event: Joining) -> None:
        await dispatcher.adispatch(may_join, event)
        asked.append(event.refusal)
        if fails_itself:
            raise ValueError("afterwards")

    async def later(event: Joining) -> None:
        ran.append("later")

    add_as(owner, dispatcher, may_join, fail)
    add_as(owner, dispatcher, "joined", ask)
    dispatcher.add_listener("joined", later)
    event = await dispatcher.adispatch("joined", Joining())
    assert isinstance(asked[0], Refusal)
    assert event.refusal is asked[0]
    assert (event.name, ran) == ("joined", [])


@pytest.mark.parametrize("whose", ["plugin", "host"])
async def test_the_bridge_runs_after_every_listener_that_may_refuse(whose: str) -> None:
    """An event that is refused does not leave, whatever priority the listener has that fails, and whenever it was added."""

    @dataclass
    class Asked(ECSTEvent):
        user: str = "ada"

    class Sends(MemoryBroker):
        async def publish(self, *messages: Message) -> None:
            sent.extend(messages)

    may_join = EventName("may.join", Asked, policy=Policy(on_failure="refuse"))
    dispatcher = AsyncEventDispatcher()
    sent: list[Message] = []
    dispatcher.add_subscriber(Bridge(Sends()))
    if whose == "plugin":
        add_as(owner_of(dispatcher, None), dispatcher, may_join, fail, priority=LAST)
    else:
        dispatcher.add_listener(may_join, fail, priority=LAST)
    event = await dispatcher.adispatch(may_join, Asked())
    assert event.refusal is not None
    assert sent == []


async def test_a_wait_for_hears_an_event_after_the_bridge() -> None:
    """So what it returns has been sent, also if the bridge was added later, or a plugin waits."""
    dispatcher = AsyncEventDispatcher()
    waits = asyncio.create_task(dispatcher.wait_for("joined"))
    await asyncio.sleep(0)
    bridge = Bridge(MemoryBroker(app="web"))
    dispatcher.add_subscriber(bridge)
    dispatcher.add_listener("joined", hang, priority=LAST)
    hanging, forward, _ = dispatcher.get_listeners("joined")
    assert (hanging, forward) == (hang, bridge.forward)
    waits.cancel()


async def test_a_neighbour_that_stops_the_event_leaves_the_refusal() -> None:
    """Two listeners run at once: one has failed, the other stops the event. The event still says why it was refused."""
    may_join = EventName("may.join", Joining, policy=Policy(on_failure="refuse"))
    dispatcher = AsyncEventDispatcher()

    async def stop(event: Joining) -> None:
        await asyncio.sleep(0)
        event.stop_propagation()

    add_as(owner_of(dispatcher, None), dispatcher, may_join, fail, concurrent=True)
    dispatcher.add_listener(may_join, stop, concurrent=True)
    event = await dispatcher.adispatch(may_join, Joining())
    assert event.refusal is not None
    assert str(event.refusal) == "plugin 'audit': ValueError: no"


def test_a_refusal_has_a_text_though_its_error_has_none() -> None:
    class BadError(Exception):
        def __str__(self) -> str:
            raise TypeError("no text")

    assert str(Refusal(plugin="audit", listener=fail, error=BadError())) == "plugin 'audit': BadError: (it has no text)"


@pytest.mark.parametrize("pattern", ["may.*", "**", "may.join"])
async def test_a_names_policy_holds_for_listeners_of_patterns(pattern: str) -> None:
    """The policy is that of the dispatched name, whichever pattern the listener is registered for."""
    may_join = EventName("may.join", Joining, policy=Policy(timeout=0.01, on_failure="refuse"))
    dispatcher = AsyncEventDispatcher()
    dispatcher.add_listener(pattern, hang)
    event = await dispatcher.adispatch(may_join, Joining())
    assert isinstance(event.refusal.error, ListenerTimeout)  # type: ignore[union-attr]
    assert event.refusal.plugin is None  # type: ignore[union-attr]


async def test_a_policy_holds_after_the_plain_text_was_dispatched() -> None:
    """The constant is met by a dispatch, also where the text's listeners are ready already, and where it was made later."""
    dispatcher = AsyncEventDispatcher()
    add_as(owner_of(dispatcher, Policy(on_failure="ignore")), dispatcher, "late.join", fail)
    await dispatcher.adispatch("late.join", Joining())
    await dispatcher.adispatch("late.join", Joining())
    late = EventName("late.join", Joining, policy=Policy(on_failure="refuse"))
    await dispatcher.adispatch("late.join", Joining())
    assert (await dispatcher.adispatch(late, Joining())).refusal is not None
    assert (await dispatcher.adispatch("late.join", Joining())).refusal is not None


async def test_a_once_listener_runs_once_under_several_policies() -> None:
    """A registration is one, under however many names with policies of their own it is heard."""
    one = EventName("a.one", Joining, policy=Policy(timeout=1))
    two = EventName("a.two", Joining, policy=Policy(timeout=2))
    dispatcher = AsyncEventDispatcher()
    ran: list[str] = []

    async def hear(event: Joining) -> None:
        ran.append(str(event.name))

    dispatcher.add_listener("a.*", hear, once=True)
    for name in (one, two, one, "a.three"):
        await dispatcher.adispatch(name, Joining())
    assert ran == ["a.one"]


async def test_a_plugin_that_is_off_is_passed_over_and_refuses_where_the_name_decides() -> None:
    """Switched off, a plugin neither runs nor lets pass what it would have had to decide."""
    may_join = EventName("may.join", Joining, policy=Policy(on_failure="refuse"))
    dispatcher, told = AsyncEventDispatcher(), Told()
    owner = owner_of(dispatcher, Policy(on_failure="ignore"), told)
    ran: list[str] = []

    async def hear(event: Joining) -> None:
        ran.append(str(event.name))

    add_as(owner, dispatcher, "**", hear)
    owner.switch_off("by hand")
    assert not (await dispatcher.adispatch("joining", Joining())).propagation_stopped
    event = await dispatcher.adispatch(may_join, Joining())
    assert isinstance(event.refusal.error, PluginOff)  # type: ignore[union-attr]
    owner.switch_on()
    await dispatcher.adispatch(may_join, Joining())
    assert (ran, told.kinds) == (["may.join"], ["switched off", "switched on"])


async def test_observers_see_the_error_and_the_plugin() -> None:
    """An observer sees the failure of a plugin that the policy hides, and a time limit as one."""
    calls: list[tuple[str, str, str]] = []

    class Watch:
        def before_dispatch(self, dispatch: Any) -> None: ...
        def after_dispatch(self, dispatch: Any) -> None: ...
        def before_listener(self, call: Any) -> None: ...
        def after_listener(self, call: Any) -> None:
            calls.append((call.plugin, call.outcome, type(call.error).__name__))

    dispatcher = AsyncEventDispatcher(observers=[Watch()])
    owner = owner_of(dispatcher, Policy(timeout=0.01, on_failure="ignore"))
    add_as(owner, dispatcher, "j", fail)
    add_as(owner, dispatcher, "j", hang)
    await dispatcher.adispatch("j", Joining())
    assert calls == [("audit", "failed", "ValueError"), ("audit", "failed", "ListenerTimeout")]


# -- budgets ------------------------------------------------------------------------------------------------


async def test_a_failure_is_told_before_the_end_that_it_brings() -> None:
    dispatcher, told = AsyncEventDispatcher(), Told()
    add_as(owner_of(dispatcher, Policy(on_failure="ignore", budget=Budget(failures=0)), told), dispatcher, "j", fail)
    await dispatcher.adispatch("j", Joining())
    assert told.kinds == ["failed", "switched off"]


async def test_a_plugin_that_fails_too_often_is_switched_off() -> None:
    """One report, and its listeners rest until it is switched on."""
    dispatcher, told = AsyncEventDispatcher(), Told()
    policy = Policy(on_failure="ignore", budget=Budget(failures=2, pause=None))
    owner = owner_of(dispatcher, policy, told)
    add_as(owner, dispatcher, "j", fail)
    for _ in range(6):
        await dispatcher.adispatch("j", Joining())
    assert told.kinds == ["failed", "failed", "failed", "switched off"]
    owner.switch_on()
    await dispatcher.adispatch("j", Joining())
    assert told.kinds[4:] == ["switched on", "failed"]


async def test_a_paused_plugin_is_back_by_itself() -> None:
    """After its pause a plugin runs again, with a new budget."""
    dispatcher, told = AsyncEventDispatcher(), Told()
    policy = Policy(on_failure="ignore", budget=Budget(failures=0, pause=0.01))
    owner = owner_of(dispatcher, policy, told)
    add_as(owner, dispatcher, "j", fail)
    await dispatcher.adispatch("j", Joining())
    async with asyncio.timeout(60):
        while "switched on" not in told.kinds:
            await dispatcher.adispatch("j", Joining())
            await asyncio.sleep(0)
    assert told.kinds[:3] == ["failed", "switched off", "switched on"]


async def test_a_plugin_that_holds_the_loop_too_long_is_switched_off() -> None:
    """Time on the loop counts, also behind a wait; time that the plugin waits does not."""
    dispatcher, told = AsyncEventDispatcher(), Told()
    policy = Policy(on_failure="ignore", budget=Budget(loop_time=0.05, pause=None))
    owner = owner_of(dispatcher, policy, told)

    async def busy(event: Any) -> None:
        await asyncio.sleep(0)
        until = asyncio.get_running_loop().time() + 0.06
        while asyncio.get_running_loop().time() < until:
            pass

    async def patient(event: Any) -> None:
        await asyncio.sleep(0.06)

    add_as(owner, dispatcher, "patient", patient)
    add_as(owner, dispatcher, "busy", busy)
    await dispatcher.adispatch("patient", Joining())
    assert told.kinds == []
    await dispatcher.adispatch("busy", Joining())
    assert told.kinds == ["switched off"]


async def test_a_plugin_does_not_pay_for_another_inside_of_its_listener() -> None:
    """A listener dispatches, and another plugin's listener holds the loop: the other is the one at fault."""
    dispatcher, told, other_told = AsyncEventDispatcher(), Told(), Told()
    policy = Policy(on_failure="ignore", budget=Budget(loop_time=0.05, pause=None))
    on_loop = OnLoop()
    outer = Owner("outer", policy=policy, place=0, on_loop=on_loop, report=told)
    inner = Owner("inner", policy=policy, place=1, on_loop=on_loop, report=other_told)

    async def nest(event: Any) -> None:
        await dispatcher.adispatch("inner", Joining())

    async def busy(event: Any) -> None:
        until = asyncio.get_running_loop().time() + 0.06
        while asyncio.get_running_loop().time() < until:
            pass

    add_as(outer, dispatcher, "outer", nest)
    add_as(inner, dispatcher, "inner", busy)
    await dispatcher.adispatch("outer", Joining())
    assert (told.kinds, other_told.kinds) == ([], ["switched off"])


# -- what a policy is ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: Policy(timeout=0),
        lambda: Policy(on_failure="swallow"),  # type: ignore[arg-type]
        lambda: Policy(report_after=-1),
        lambda: Budget(loop_time=2),
        lambda: Budget(failures=-1),
        lambda: Budget(pause=0),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(make: Any) -> None:
    """A wrong limit is an error where it is written."""
    with pytest.raises(ValueError):  # each has a text of its own
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Policy(timeout="2"),  # type: ignore[arg-type]
        lambda: Policy(report_after=True),
        lambda: Budget(loop_time="0.5"),  # type: ignore[arg-type]
        lambda: Budget(failures=2.5),  # type: ignore[arg-type]
        lambda: Budget(threads="4"),  # type: ignore[arg-type]
    ],
)
def test_a_limit_that_is_no_number_is_refused(make: Any) -> None:
    """The error names the option and the value, not an operator."""
    with pytest.raises(TypeError, match=r"is a (whole )?number.*, not "):
        make()


def test_a_name_takes_a_policy_without_a_budget() -> None:
    """A budget is a plugin's."""
    for wrong in (Policy(budget=Budget()), "refuse"):
        with pytest.raises(TypeError, match=r"silbo\.Policy"):
            EventName("j", policy=wrong)  # type: ignore[arg-type]


async def test_one_name_has_one_policy() -> None:
    """Two constants of one name with different policies: the second is refused where it is first used."""
    dispatcher = AsyncEventDispatcher()
    dispatcher.add_listener(EventName("j", Joining, policy=Policy(timeout=1)), fail)
    with pytest.raises(NameInvalid, match="policy"):
        dispatcher.add_listener(EventName("j", Joining, policy=Policy(timeout=2)), fail)


def test_policies_combine_to_the_shorter_times_and_the_names_effect() -> None:
    """The table of the docs: times are the shorter ones, the name's effect comes before the plugin's."""
    name, plugin = Policy(timeout=2, on_failure="refuse"), Policy(timeout=5, on_failure="ignore", report_after=1)
    assert combine_policies(name, plugin) == Policy(timeout=2, on_failure="refuse", report_after=1)
    assert combine_policies(Policy(), plugin) == plugin
    assert combine_policies(None, plugin) is plugin
    assert combine_policies(name, None) is name


async def test_failures_of_the_host_under_a_names_policy_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A name may isolate the host's own listeners; what nobody hears is logged."""
    dispatcher = AsyncEventDispatcher()
    name = EventName("j", Joining, policy=Policy(on_failure="ignore"))
    dispatcher.add_listener(name, fail)
    with caplog.at_level(logging.ERROR):
        assert (await dispatcher.adispatch(name, Joining())).user == "ada"
    assert "listener failed" in caplog.text
