"""Extension points: the names that a host declares, and the answers to all others."""

from __future__ import annotations

import asyncio
import enum
import sys
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest.mock import AsyncMock

import pytest

from silbo import (
    AsyncEventDispatcher,
    Bridge,
    Consumer,
    Event,
    EventName,
    Message,
    NotificationEvent,
    Plugins,
    Policy,
    Trace,
    on,
    receive,
)
from silbo.brokers.memory import MemoryBroker
from silbo.dispatch import extension_points
from silbo.errors import EventMismatch, EventMissing, NameInvalid, NameUnknown, NameUnknownWarning
from silbo.message import Origin
from silbo.wire.formats import JSON
from tests.support.consumer import Running


@dataclass
class UserJoined(NotificationEvent):
    user_id: int


class UserLeft(NotificationEvent):
    pass


class Kicked(UserLeft):
    pass


USER_JOINED = EventName("user.joined", UserJoined)
USER_LEFT = EventName("user.left", UserLeft)
APP_STARTED = EventName("app.started")
OLD = EventName("user.added", deprecated="use user.joined")
NAMES = [USER_JOINED, USER_LEFT, APP_STARTED, OLD]


def strict(**options: Any) -> AsyncEventDispatcher:
    return AsyncEventDispatcher(names=NAMES, unknown="error", **options)


async def hear(event: Any) -> None: ...


def line() -> int:
    return sys._getframe(1).f_lineno


# -- which names ---------------------------------------------------------------------------------------------


def test_names_of_a_module_are_its_constants_imported_ones_too() -> None:
    """A host may gather its extension points in one module."""
    module = ModuleType("shop.events")
    vars(module).update(A=USER_JOINED, _B=APP_STARTED, other="user.moved", again=USER_JOINED)
    assert AsyncEventDispatcher(names=module).names == (USER_JOINED, APP_STARTED)
    assert AsyncEventDispatcher(names=[OLD, module, USER_JOINED]).names == (OLD, USER_JOINED, APP_STARTED)
    assert AsyncEventDispatcher().names == ()


@pytest.mark.parametrize("wrong", [["user.joined"], USER_JOINED, "user.joined", 3, [None]])
def test_a_plain_text_declares_nothing(wrong: Any) -> None:
    with pytest.raises(TypeError, match="EventName"):
        AsyncEventDispatcher(names=wrong)


def test_mistakes_in_the_declaration_are_refused() -> None:
    """A module without names, one version with two classes, a strictness that nothing is held to."""
    with pytest.raises(ValueError, match=r"shop\.nothing has no EventName"):
        AsyncEventDispatcher(names=ModuleType("shop.nothing"))
    with pytest.raises(ValueError, match="version 1 of 'user.joined' is declared twice"):
        AsyncEventDispatcher(names=[USER_JOINED, EventName("user.joined", UserLeft)])
    with pytest.raises(ValueError, match="needs names="):
        AsyncEventDispatcher(unknown="error")
    with pytest.raises(ValueError, match='unknown is "allow", "warn" or "error"'):
        AsyncEventDispatcher(names=[], unknown="no")  # type: ignore[arg-type]


def test_the_policy_of_a_declared_name_holds_for_its_plain_text() -> None:
    """Nobody has to use the constant first."""
    d = AsyncEventDispatcher(names=[EventName("user.joined", policy=Policy(timeout=3))])
    with pytest.raises(NameInvalid, match="policy"):
        d.add_listener(EventName("user.joined", policy=Policy(timeout=5)), hear)


# -- unknown names -------------------------------------------------------------------------------------------


class Plugin:
    @on("user.joined")
    async def fine(self, event: Any) -> None: ...

    @on("user.joind")
    async def misspelt(self, event: Any) -> None: ...


async def test_an_unknown_name_is_refused_wherever_it_is_used_and_the_right_one_is_said() -> None:
    """With the plugin, its file and line, and nothing is left registered."""
    d = strict()
    with pytest.raises(NameUnknown, match=r"'user.joind' is not declared: did you mean 'user.joined'\?") as caught:
        d.add_listener("user.joind", hear)
    added_at = f"{__file__}:{line() - 1}"
    assert (caught.value.name, caught.value.similar) == ("user.joind", "user.joined")
    assert (caught.value.plugin, caught.value.place) == (__name__, added_at)
    assert f"used by {__name__}, {added_at}" in str(caught.value)
    with pytest.raises(NameUnknown) as listened:
        d.listen("user.joind")(hear)
    assert listened.value.place == f"{__file__}:{line() - 1}"
    with pytest.raises(NameUnknown) as subscribed:
        d.add_subscriber(Plugin())
    assert subscribed.value.place == f"{__file__}:{Plugin.misspelt.__code__.co_firstlineno}"  # the line of its @on
    with pytest.raises(NameUnknown) as waited:
        await d.wait_for("user.joind", timeout=30)
    assert waited.value.plugin == __name__ and waited.value.place.startswith(f"{__file__}:")
    assert not d.has_listeners()
    for _ in range(2):
        with pytest.raises(NameUnknown) as dispatched:
            await d.adispatch("user.joind", UserJoined(1))
        assert dispatched.value.plugin == __name__
    with pytest.raises(NameUnknown):
        d.spawn("user.joind", UserJoined(1))
    with pytest.raises(NameUnknown, match="'zzz' is not declared: declare it in names="):
        await d.adispatch("zzz")
    with pytest.raises(NameUnknown):
        await d.adispatch(("user", "joined"))  # any hashable is a name
    await d.aclose()


async def test_the_line_of_a_misspelling_is_the_plugins_also_through_a_hosts_own_method() -> None:
    class HostDispatcher(AsyncEventDispatcher):
        def add_listener(self, name: Any, listener: Any, /, **options: Any) -> Any:
            return super().add_listener(name, listener, **options)

    at: list[int] = []

    def setup(view: AsyncEventDispatcher) -> None:
        at.append(line() + 1)
        view.add_listener("user.joind", hear)

    async with Plugins(HostDispatcher(names=NAMES, unknown="error")) as plugins:
        with pytest.raises(NameUnknown) as caught:
            await plugins.load(setup)
    assert (caught.value.plugin, caught.value.place) == ("setup", f"{__file__}:{at[0]}")


@pytest.mark.parametrize(
    ("pattern", "similar"),
    [
        ("usr.*", "user.*"),
        ("*.joind", "*.joined"),
        ("usr.**", "user.**"),
        ("**.joind", "user.joined"),
        ("zzz.*.*.*", None),
    ],
)
def test_a_pattern_that_matches_nothing_declared_is_refused(pattern: str, similar: str | None) -> None:
    d = strict()
    with pytest.raises(NameUnknown, match="matches no declared name") as caught:
        d.add_listener(pattern, hear)
    assert caught.value.similar == similar


def test_patterns_that_match_something_declared_are_known() -> None:
    """``**`` matches everything, also where nothing is declared: a bridge listens to it."""
    d = strict()
    for pattern in ("user.*", "**", "*.started", "app.**"):
        d.add_listener(pattern, hear)
    AsyncEventDispatcher(names=[], unknown="error").add_subscriber(Bridge(MemoryBroker("shop")))


class Text(enum.StrEnum):
    JOINED = "user.joined"


async def test_declared_names_are_known_in_every_form() -> None:
    d = strict()
    for name in ("user.joined", USER_JOINED, EventName("user.joined"), Text.JOINED):
        with d.add_listener(name, heard := AsyncMock()):
            event = await d.adispatch(name, UserJoined(1))
            assert await d.spawn(name, event) is event
            assert heard.await_count == 2


async def test_a_warning_names_the_callers_line_and_comes_once_for_each_plugin() -> None:
    """Under ``unknown="warn"``, which is the default, all goes on. No name that is made anew each time is kept for ever."""
    d = AsyncEventDispatcher(names=NAMES)
    with pytest.warns(NameUnknownWarning, match=r"'user.joind' is not declared: did you mean") as registered:
        d.add_listener("user.joind", heard := AsyncMock())
    assert registered[0].filename == __file__
    with pytest.warns(NameUnknownWarning, match="used by ") as dispatched:
        await d.adispatch("user.jined")
    assert dispatched[0].filename == __file__ and f"used by {__name__}" in str(dispatched[0].message)
    await d.adispatch("user.jined")
    with pytest.warns(NameUnknownWarning) as spawned:
        await d.spawn("user.jond")
    assert [warning.filename for warning in spawned] == [__file__]
    with pytest.warns(NameUnknownWarning):
        await d.adispatch("user.joind")
    heard.assert_awaited_once()


async def test_warnings_of_names_without_end_have_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python keeps each text that it has warned of."""
    monkeypatch.setattr(extension_points, "MOST_TOLD", 10)
    d = AsyncEventDispatcher(names=NAMES)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(30):
            await d.adispatch(f"room.{number}")
    assert len(caught) == 10


async def test_unknown_names_may_be_allowed() -> None:
    """Then only the classes count."""
    d = AsyncEventDispatcher(names=NAMES, unknown="allow")
    d.add_listener("user.joind", heard := AsyncMock())
    d.add_listener("usr.*", hear)
    await d.adispatch("user.joind")
    heard.assert_awaited_once()
    with pytest.raises(EventMismatch):
        await d.adispatch("user.joined", UserLeft())


# -- classes -------------------------------------------------------------------------------------------------


class Overridden(AsyncEventDispatcher):
    async def _adispatch(self, listeners: Any, event: Any, /) -> None:
        await super()._adispatch(listeners, event)


@pytest.mark.parametrize("cls", [AsyncEventDispatcher, Overridden])
@pytest.mark.parametrize("listeners", [0, 1, 3])
async def test_an_event_of_another_class_is_refused_on_every_way(
    cls: type[AsyncEventDispatcher], listeners: int
) -> None:
    """At the first dispatch of a name and at later ones, with and without listeners, by constant and by text."""
    d = cls(names=NAMES, unknown="error")
    mocks = [AsyncMock() for _ in range(listeners)]
    for mock in mocks:
        d.add_listener("user.left", mock)
    wrong: Any = UserJoined(1)
    for _ in range(3):
        for name in ("user.left", USER_LEFT, EventName("user.left", UserJoined)):
            with pytest.raises(EventMismatch, match=r"events of 'user.left' are UserLeft, not UserJoined") as caught:
                await d.adispatch(name, wrong)
        assert (caught.value.expected, caught.value.event) == ((UserLeft,), UserJoined)
        for right in (UserLeft(), Kicked(), Kicked()):
            assert await d.adispatch("user.left", right) is right
    with pytest.raises(EventMismatch):
        d.spawn("user.left", wrong)
    assert [mock.await_count for mock in mocks] == [9] * listeners
    assert d.get_listeners("user.left") == tuple(mocks)


async def test_an_event_of_another_class_is_refused_beside_observers_and_before_them() -> None:
    d = strict(observers=[trace := Trace()])
    with pytest.raises(EventMismatch):
        await d.adispatch("user.left", UserJoined(1))
    assert not trace.unheard
    await d.adispatch("user.left", UserLeft())
    assert trace.unheard == {"user.left": 1}


async def test_a_class_given_in_place_of_an_event_is_said_to_be_one() -> None:
    with pytest.raises(TypeError, match="is a class; dispatch an object"):
        await strict().adispatch("user.left", UserLeft)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def test_a_name_without_a_class_takes_any_event() -> None:
    d = strict()
    for event in (Event(), UserJoined(1)):
        assert await d.adispatch("app.started", event) is event


async def test_versions_of_a_name_may_have_a_class_each() -> None:
    """A consumer rebuilds an old message as the old class."""
    new = EventName("user.joined", UserLeft, version=2)
    d = AsyncEventDispatcher(names=[USER_JOINED, new], unknown="error")
    for event in (UserLeft(), UserJoined(1)):
        assert await d.adispatch("user.joined", event) is event
    assert type(await d.adispatch("user.joined")) is UserLeft
    with pytest.raises(EventMismatch, match="are UserJoined or UserLeft, not Event"):
        await d.adispatch("user.joined", Event())


async def test_a_dispatch_without_an_event_makes_one_of_the_declared_class() -> None:
    d = strict()
    assert type(await d.adispatch("user.left")) is UserLeft
    assert type(await d.adispatch("app.started")) is Event


@pytest.mark.parametrize("name", ["user.joined", USER_JOINED])
async def test_a_class_that_needs_arguments_is_not_made_without(name: Any) -> None:
    """The error names the class; an undeclared EventName has it too."""
    with pytest.raises(
        EventMissing, match=r"'user.joined' was dispatched without an event, and UserJoined\(\)"
    ) as caught:
        await strict().adispatch(name)
    assert isinstance(caught.value.__cause__, TypeError)
    with pytest.raises(EventMissing):
        await AsyncEventDispatcher().adispatch(USER_JOINED)


async def test_a_listener_of_a_declared_name_may_still_stop_and_fail() -> None:
    """On the direct path the first listener is called by the check."""
    d = strict()

    async def stop(event: Any) -> None:
        event.stop_propagation()

    d.add_listener("user.left", stop)
    d.add_listener("user.left", late := AsyncMock())
    for _ in range(3):
        assert (await d.adispatch("user.left")).propagation_stopped
    late.assert_not_awaited()
    d.add_listener("user.left", AsyncMock(side_effect=LookupError), priority=-1)
    for _ in range(3):
        with pytest.raises(LookupError):
            await d.adispatch("user.left")


# -- deprecated names ----------------------------------------------------------------------------------------


async def test_a_deprecated_name_warns_also_where_it_is_plain_text() -> None:
    """With the plugin that listens or dispatches, its file and line."""
    d = strict()
    for name in ("user.added", OLD):
        d = strict()
        with pytest.warns(DeprecationWarning, match=r"user.added is deprecated: use user.joined") as caught:
            d.add_listener(name, hear)
        assert [warning.filename for warning in caught] == [__file__]
        assert f"used by {__name__}, {__file__}:{line() - 2}" in str(caught[0].message)
        d = strict()
        with pytest.warns(DeprecationWarning, match="use user.joined") as caught:
            await d.adispatch(name)
        assert [warning.filename for warning in caught] == [__file__]
        assert f"used by {__name__}, {__file__}:" in str(caught[0].message)
        d = strict()
        with pytest.warns(DeprecationWarning, match="use user.joined") as caught:
            await d.spawn(name)
        assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("made", ["before", "after"])
async def test_a_dispatch_of_the_plain_text_hides_no_warning_of_the_constant(made: str) -> None:
    """If nothing is declared, only the constant knows of its deprecation."""
    d = AsyncEventDispatcher()
    text = f"user.renamed.{made}"
    names = [EventName(text, deprecated="use user.joined")] if made == "before" else []
    await d.adispatch(text)
    name = names[0] if names else EventName(text, deprecated="use user.joined")
    with pytest.warns(DeprecationWarning, match="use user.joined"):
        await d.adispatch(name)


async def test_each_plugin_that_dispatches_a_deprecated_name_is_told() -> None:
    """Not only the first."""
    d = strict()
    code = "async def dispatch(d):\n    await d.adispatch('user.added')\n"
    for plugin in ("shop.one", "shop.two"):
        namespace: dict[str, Any] = {"__name__": plugin}
        exec(compile(code, f"{plugin}.py", "exec"), namespace)
        with pytest.warns(DeprecationWarning, match=f"used by {plugin}, {plugin}.py:2") as caught:
            await namespace["dispatch"](d)
        assert caught[0].filename == f"{plugin}.py"
        await namespace["dispatch"](d)


# -- names from outside --------------------------------------------------------------------------------------


def test_a_consumer_of_an_undeclared_name_is_refused_when_it_is_made() -> None:
    """Not with the first message; and so is a name with another class, whose every event would be refused."""
    group = MemoryBroker("shop").group("billing", start="new")
    other = EventName("user.joind", UserJoined)
    with pytest.raises(NameUnknown, match="did you mean 'user.joined'"):
        Consumer(strict(), group, events=[USER_JOINED, other])
    with pytest.warns(NameUnknownWarning):
        Consumer(AsyncEventDispatcher(names=NAMES), group, events=[other])
    with pytest.raises(EventMismatch, match="are UserLeft, not UserJoined"):
        Consumer(strict(), group, events=[EventName("user.left", UserJoined)])
    Consumer(strict(), group, events=[USER_JOINED, EventName("user.left", Kicked), APP_STARTED])


async def test_a_consumed_event_of_an_undeclared_name_is_no_mistake_of_this_program() -> None:
    """Other programs have names of their own: a listener for ``**`` hears them, and none becomes a dead letter."""
    d = strict(on_error="raise")
    heard: list[str] = []
    all_heard = asyncio.Event()

    async def hear_all(event: Any) -> None:
        heard.append(event.name)
        if len(heard) == 3:
            all_heard.set()

    d.add_listener("**", hear_all)
    broker = MemoryBroker("shop")
    out = AsyncEventDispatcher()
    out.add_subscriber(Bridge(broker))
    consumer = Consumer(d, broker.group("billing", start="oldest"), events=[USER_JOINED], own="handle", max_attempts=1)
    for _ in range(2):
        await out.adispatch("order.paid", UserJoined(1))
    await out.adispatch("user.left", UserLeft())  # declared, and not in events: it comes as a plain notification
    async with Running(consumer):
        await asyncio.wait_for(all_heard.wait(), 30)
    assert heard == ["order.paid", "order.paid", "user.left"]
    assert consumer.stats.failed == 0
    with pytest.raises(NameUnknown):  # and here it is one
        await d.adispatch("order.paid", UserJoined(1))


async def test_a_received_event_of_another_class_is_refused_where_a_listener_would_hear_it() -> None:
    """The error says to name it in ``events=``."""
    d = strict()
    message = JSON.encode(await _message(), Origin("shop", "1"))
    for _ in range(2):
        await receive(d, message)  # nobody hears it
    d.add_listener("user.*", heard := AsyncMock())
    for _ in range(2):
        with pytest.raises(EventMismatch, match="name it in events="):
            await receive(d, message)
        await receive(d, message, events=[USER_JOINED])
    assert [type(call.args[0]) for call in heard.await_args_list] == [UserJoined, UserJoined]


class Kept:
    """A publisher that keeps what it is given."""

    app = "shop"

    def __init__(self) -> None:
        self.messages: list[Message] = []

    async def publish(self, *messages: Message) -> None:
        self.messages += messages

    async def aclose(self) -> None: ...


async def _message() -> Message:
    d = AsyncEventDispatcher()
    d.add_subscriber(Bridge(kept := Kept()))
    await d.adispatch(USER_JOINED, UserJoined(1))
    (message,) = kept.messages
    return message


async def test_a_constant_of_another_class_is_refused_to_listen_with() -> None:
    """A plugin that makes its own constant of a declared name would get events of a class that it does not expect."""

    class Base(Event):
        pass

    class Ordering(Base):
        pass

    class Served(Event):
        pass

    dispatcher = AsyncEventDispatcher(names=[EventName("order.done", Ordering)], unknown="error")

    async def hear(event: Any) -> None: ...

    with pytest.raises(EventMismatch, match=r"Ordering, not .*Served"):
        dispatcher.add_listener(EventName("order.done", Served), hear)
    dispatcher.add_listener(EventName("order.done", Base), hear)  # an Ordering is one
    dispatcher.add_listener(EventName("order.done"), hear)
