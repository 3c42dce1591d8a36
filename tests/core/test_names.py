"""Event names, and patterns over them."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import re
import time
from collections.abc import Callable
from enum import Enum
from typing import Any, ClassVar
from unittest.mock import AsyncMock
from weakref import ref

import attrs
import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from silbo import AsyncEventDispatcher, ECSTEvent, Event, EventName, Route, Trace, on
from silbo.bridge import Routes
from silbo.errors import KeyUnknown, NameInvalid
from silbo.names import MAX_NAME_LENGTH, compile_pattern, has_name, is_pattern, name_of, version_of


class Joined(Event):
    pass


JOINED = EventName("user.joined", Joined, key="user_id", version=2, description="somebody came", deprecated="use x")


def test_an_event_name_is_a_string_that_knows_more() -> None:
    """It equals, hashes and prints as the string."""
    name: Any = JOINED
    assert isinstance(name, str) and name == "user.joined" and {name: 1}["user.joined"] == 1
    assert type(str(name)) is str and f"{name}" == "user.joined"
    assert (JOINED.cls, JOINED.key, JOINED.version) == (Joined, "user_id", 2)
    assert (JOINED.description, JOINED.deprecated) == ("somebody came", "use x")
    plain = EventName("app.started")
    assert (plain.cls, plain.key, plain.version, plain.description, plain.deprecated) == (None, None, 1, "", None)
    assert EventName("x", cls=Joined).cls is Joined and EventName[Joined]("x", Joined) == "x"


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda name: pickle.loads(pickle.dumps(name))])
def test_an_event_name_survives_copies_and_pickles(again: Any) -> None:
    """With all that it knows."""
    name = again(JOINED)
    assert type(name) is EventName and (name, name.cls, name.key, name.version) == (JOINED, Joined, "user_id", 2)
    assert (name.description, name.deprecated) == ("somebody came", "use x")


@pytest.mark.parametrize("name", [None, 7, b"user.joined", Joined])
def test_an_event_name_is_made_of_a_text(name: Any) -> None:
    """``str()`` would make a name of anything, ``'None'`` as well."""
    with pytest.raises(TypeError, match="text"):
        EventName(name)


def test_an_event_name_of_an_enums_member_is_its_value() -> None:
    """Not ``Names.JOINED``."""

    class Names(str, Enum):  # noqa: UP042  # its str() is not its value
        JOINED = "user.joined"

    assert str(EventName(Names.JOINED)) == "user.joined"


@pytest.mark.parametrize("observers", [(), (Trace(),)])
async def test_none_is_not_a_name(observers: Any) -> None:
    """None would mean all names where one name is meant; the event keeps its marks."""
    d: Any = AsyncEventDispatcher(observers=observers)
    listener, event = AsyncMock(), Event()
    d.add_listener("x", listener)
    for use in (d.adispatch, d.spawn, d.wait_for):
        with pytest.raises(TypeError, match="None is not an event name"):
            await (use(None) if use == d.wait_for else use(None, event))
    for register in (lambda: d.add_listener(None, listener), lambda: d.listen(None)):
        with pytest.raises(TypeError, match="None is not an event name"):
            register()
    wrong: Any = None
    with pytest.raises(TypeError, match="pattern"):
        Route(wrong)
    assert "dispatcher" not in vars(event) and listener.await_count == 0
    assert d.get_listeners(None) == {"x": (listener,)} and d.has_listeners(None)  # as in Whistle: without a name


def test_an_event_name_is_no_pattern() -> None:
    """It names one event."""
    with pytest.raises(NameInvalid, match="no '\\*'"):
        EventName("user.*")


async def test_a_deprecated_name_warns_when_registered_and_when_dispatched() -> None:
    """With what to use instead, at the user's line."""
    d = AsyncEventDispatcher()
    with pytest.warns(DeprecationWarning, match=r"user\.joined is deprecated: use x") as caught:
        d.add_listener(JOINED, AsyncMock())
    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="use x") as listened:
        d.listen(JOINED)(AsyncMock())
    with pytest.warns(DeprecationWarning, match="use x") as dispatched:
        await d.adispatch(JOINED, Joined())
    assert listened[0].filename == dispatched[0].filename == __file__
    d.add_listener("user.joined", AsyncMock())


@pytest.mark.parametrize(
    ("pattern", "heard", "not_heard"),
    [
        ("user.*", ["user.joined", "user."], ["user", "user.a.b", "users.joined", ".user.x"]),
        ("*", ["user", ""], ["user.joined"]),
        ("**", ["user", "", "a.b.c", "a..b", "a\nb"], []),
        ("user.**", ["user", "user.a", "user.a.b"], ["users", "x.user"]),
        ("**.joined", ["joined", "user.joined", "a.b.joined"], ["joined.x", "unjoined"]),
        ("a.**.z", ["a.z", "a.b.z", "a.b.c.z"], ["a", "z", "a.b"]),
        ("a.*.z", ["a.b.z"], ["a.z", "a.b.c.z"]),
        ("**.**", ["", "a", "a.b"], []),
        ("a+.*", ["a+.b"], ["aa.b"]),
    ],
)
async def test_patterns_hear_whole_segments(pattern: str, heard: list[str], not_heard: list[str]) -> None:
    """``*`` is one segment, ``**`` any number; other characters mean themselves."""
    d = AsyncEventDispatcher()
    listener = AsyncMock()
    d.add_listener(pattern, listener)
    for name in heard + not_heard:
        await d.adispatch(name, Event())
    assert [call.args[0].name for call in listener.await_args_list] == heard
    assert [name for name in heard + not_heard if d.has_listeners(name)] == heard


@given(st.lists(st.sampled_from(["a", "b", "*", "**"]), max_size=5), st.lists(st.sampled_from("abc"), max_size=5))
def test_matching_equals_its_definition(pattern: list[str], name: list[str]) -> None:
    """Against the plainest matcher there is."""

    def matches(pattern: list[str], name: list[str]) -> bool:
        if not pattern:
            return not name
        if pattern[0] == "**":
            return matches(pattern[1:], name) or (bool(name) and matches(pattern, name[1:]))
        return bool(name) and pattern[0] in ("*", name[0]) and matches(pattern[1:], name[1:])

    if pattern and name:
        found = compile_pattern(".".join(pattern)).fullmatch(".".join(name) + ".")
        assert (found is not None) == matches(pattern, name)


@pytest.mark.parametrize("pattern", ["**.user.**.**.joined", "user.**.*.user.**.left"])
def test_matching_takes_time_in_proportion_to_the_name(pattern: str) -> None:
    """Several ``**`` try no part of a name again and again: in quadratic time this would take a minute."""
    began = time.monotonic()
    assert not compile_pattern(pattern).fullmatch("user." * 50_000 + "x.")
    assert time.monotonic() - began < 30


LONGEST = "user." + "x" * (MAX_NAME_LENGTH - 5)


@pytest.mark.parametrize(
    "use",
    [
        lambda d, name: EventName(name),
        lambda d, name: d.add_listener(name, AsyncMock()),
        lambda d, name: d.add_listener(f"{name[:-2]}.*", AsyncMock()),
        lambda d, name: d.listen(name)(AsyncMock()),
        lambda d, name: on(name)(AsyncMock()),
        lambda d, name: d.adispatch(name),
        lambda d, name: d.adispatch(name.encode()),
        lambda d, name: d.spawn(name),
        lambda d, name: d.wait_for(name, timeout=0.01),
        lambda d, name: Route(name),
    ],
    ids=["EventName", "listener", "pattern", "listen", "on", "adispatch", "bytes", "spawn", "wait_for", "Route"],
)
async def test_a_name_of_more_than_a_thousand_characters_is_refused(use: Callable[[Any, str], Any]) -> None:
    """Everywhere, with its beginning and its length; one of a thousand is a name."""

    async def run(name: str) -> None:
        answer = use(AsyncEventDispatcher(), name)
        if hasattr(answer, "__await__"):
            try:
                await answer
            except TimeoutError:
                assert use.__code__.co_names[0] == "wait_for"

    await run(LONGEST)
    with pytest.raises(NameInvalid, match=r"^\S*user\.x{40,60}\S*: 1001 characters, more than 1000") as caught:
        await run(LONGEST + "x")
    assert len(str(caught.value)) < 250


class Text(str):
    """A str that tells if it is kept."""

    __slots__ = ("__weakref__",)


@pytest.mark.parametrize(
    ("ask", "answer"),
    [
        (AsyncEventDispatcher.has_listeners, False),
        (AsyncEventDispatcher.get_listeners, ()),
        (None, Route("**")),
    ],
    ids=["has_listeners", "get_listeners", "Routes"],
)
def test_a_name_that_is_too_long_is_not_kept(ask: Any, answer: object) -> None:
    """A host may ask for a name that came from outside; nobody can hear it."""
    d = AsyncEventDispatcher()
    d.add_listener("**", AsyncMock())
    routes = Routes([Route("**")])
    name = Text(LONGEST + "x")
    weak = ref(name)
    assert (ask(d, name) if ask else routes.match(name)) == answer
    del name
    gc.collect()
    assert weak() is None and not routes._cache


@pytest.mark.parametrize("pattern", ["user.jo*", "*x", "a.***", "a**"])
def test_an_asterisk_in_part_of_a_segment_is_refused_when_registered(pattern: str) -> None:
    """With what was probably meant."""
    with pytest.raises(NameInvalid, match=re.escape("whole segment")):
        AsyncEventDispatcher().add_listener(pattern, AsyncMock())


async def test_patterns_and_names_share_one_running_order() -> None:
    """By priority, then by registration, wherever it was registered."""
    log: list[str] = []

    def listener(label: str) -> Any:
        async def listen(event: Event) -> None:
            log.append(label)

        return listen

    d = AsyncEventDispatcher()
    for label, name, priority in [
        ("c", "**", 1),
        ("a", "user.*", 0),
        ("d", "user.joined", 1),
        ("b", "*.joined", 0),
        ("e", "**", 1),
    ]:
        d.add_listener(name, listener(label), priority=priority)
    await d.adispatch("user.joined", Event())
    assert "".join(log) == "abcde"


async def test_a_pattern_added_later_hears_names_already_dispatched() -> None:
    """Listeners that are cached by name are looked up anew after every change."""
    d = AsyncEventDispatcher()
    first, second = AsyncMock(), AsyncMock()
    await d.adispatch("user.joined", Event())
    place = d.add_listener("user.*", first)
    await d.adispatch("user.joined", Event())
    d.add_listener("**", second)
    await d.adispatch("user.joined", Event())
    place.remove()
    await d.adispatch("user.joined", Event())
    assert (first.await_count, second.await_count) == (2, 2)


async def test_patterns_hear_strings_only() -> None:
    """Any hashable is a name, but only strings have segments."""
    d = AsyncEventDispatcher()
    d.add_listener("**", AsyncMock())
    for name in (1, ("a", "b"), b"x"):
        assert not d.has_listeners(name)
        assert d.get_listeners(name) == ()


def test_a_pattern_is_removed_under_its_own_name() -> None:
    """And get_listeners shows it there."""
    d = AsyncEventDispatcher()
    listener = AsyncMock()
    d.add_listener("user.*", listener)
    assert d.get_listeners("user.*") == (listener,) and d.get_listeners() == {"user.*": (listener,)}
    d.remove_listener("user.*", listener)
    assert not d.has_listeners("user.joined") and not d.has_listeners()


def test_is_pattern() -> None:
    """Only strings are."""
    assert is_pattern("a.*") and not is_pattern("a") and not is_pattern(("*",))


# -- the names of a class ------------------------------------------------------------------------------------


def test_names_that_a_program_makes_and_drops_are_freed() -> None:
    """A name for each tenant costs no more than the first."""

    class Seen(Event):
        pass

    kept = EventName("tenant.kept", Seen)
    for tenant in range(100):
        dropped = ref(EventName(f"tenant.{tenant}", Seen))
        assert dropped() is None
    assert name_of(Seen) is kept and has_name(Seen, "tenant.kept") and not has_name(Seen, "tenant.1")


def test_a_name_that_was_made_twice_lives_as_long_as_one_of_them() -> None:
    """Whichever was made first."""

    class Seen(Event):
        pass

    first, second = EventName("seen", Seen), EventName("seen", Seen)
    assert name_of(Seen) is first
    del first
    assert name_of(Seen) is second
    third = EventName("seen", Seen)
    del second
    assert name_of(Seen) is third
    del third
    assert name_of(Seen) == "Seen"


def test_a_class_with_many_names_copies_and_shows_few() -> None:
    """A class extends the record of its names, and never makes it anew; an error names some of them."""

    class Seen(Event):
        pass

    kept = [EventName("tenant.0", Seen)]
    held = vars(Seen)["__silbo_names__"]
    kept += [EventName(f"tenant.{tenant}", Seen) for tenant in range(1, 1000)]
    assert vars(Seen)["__silbo_names__"] is held
    with pytest.raises(NameInvalid, match=r"'tenant.0'.*\.\.\.") as caught:
        name_of(Seen)
    assert len(str(caught.value)) < 500


def test_names_of_equal_classes_are_their_own() -> None:
    """A subclass has its own names, and a class is freed with its names."""

    class Seen(Event):
        pass

    class Sub(Seen):
        pass

    kept = EventName("seen", Seen)
    assert name_of(Sub) == "Sub" and name_of(Seen) is kept
    weak = ref(Sub)
    name = EventName("sub", Sub)
    assert name_of(Sub) is name
    del Sub, name
    gc.collect()
    assert weak() is None


# -- versions -----------------------------------------------------------------------------------------------


def add(payload: dict[str, Any]) -> dict[str, Any]:
    return payload | {"added": True}


async def later(payload: dict[str, Any]) -> dict[str, Any]:
    return payload


class Later:
    async def __call__(self, payload: dict[str, Any]) -> dict[str, Any]:
        return payload


def test_upcast_is_kept_in_order_and_is_nobodys_to_change() -> None:
    """A copy: what the host does to its dict afterwards has not been checked."""
    given: dict[int, Any] = {2: dict, 1: add}  # a class is a function of one payload, too
    name = EventName("x", Joined, version=3, upcast=given)
    given[7] = None
    assert dict(name.upcast) == {1: add, 2: dict} and list(name.upcast) == [1, 2]
    with pytest.raises(TypeError):
        name.upcast[1] = dict  # type: ignore[index]
    assert dict(EventName("x", Joined, version=3, upcast={2: add}).upcast) == {2: add}  # it may begin late
    for none in ({}, None):
        assert not EventName("x", Joined, version=3, upcast=none).upcast
    again = pickle.loads(pickle.dumps(name))
    assert dict(again.upcast) == dict(name.upcast) and again.version == 3
    assert dict(copy.copy(name).upcast) == dict(name.upcast)


@pytest.mark.parametrize(
    ("upcast", "text"),
    [
        ({1: add}, "'x' has a hole: no function for version 2"),
        ({1: add, 2: add, 4: add}, "4 is not a version before 4"),
        ({1: add, 3: add}, "'x' has a hole: no function for version 2"),
        ({0: add, 1: add, 2: add, 3: add}, "0 is not a version before 4"),
        ({-1: add}, "-1 is not a version before 4"),
        ({9: add}, "9 is not a version before 4"),
    ],
)
def test_upcast_with_a_hole_or_a_key_out_of_range_is_refused(upcast: Any, text: str) -> None:
    """When the name is made, and not by the first old message."""
    with pytest.raises(ValueError, match=re.escape(text)):
        EventName("x", Joined, version=4, upcast=upcast)


@pytest.mark.parametrize(
    "upcast",
    [
        [add],
        add,
        {"1": add},
        {True: add},
        {1.0: add},
        {1: "add"},
        {1: None},
        {1: lambda *_, payload: payload},
        {1: lambda payload, more: payload},
        {1: lambda: None},
        {1: later},
        {1: Later()},
    ],
)
def test_upcast_that_is_no_dict_of_functions_of_one_payload_is_refused(upcast: Any) -> None:
    """An async function would return a coroutine for a payload."""
    with pytest.raises(TypeError, match="upcast of 'x'"):
        EventName("x", Joined, version=2, upcast=upcast)


@pytest.mark.parametrize(
    ("version", "error"), [("2", TypeError), (True, TypeError), (1.0, TypeError), (0, ValueError), (10**18, ValueError)]
)
def test_version_is_a_whole_number_from_1(version: Any, error: type[Exception]) -> None:
    """It is compared on the other side."""
    with pytest.raises(error, match="the version of 'x'"):
        EventName("x", Joined, version=version)
    assert EventName("x", Joined, version=10**18 - 1).version == 10**18 - 1


def test_name_of_a_class_with_two_versions_is_the_newest() -> None:
    """A mediator dispatches under it, and objects of the class are as it is now."""

    class Changed(Event):
        pass

    names = [EventName("c", Changed, version=2), EventName("c", Changed), EventName("c", Changed, version=2)]
    assert name_of(Changed) is names[0]
    assert (version_of(Changed, "c"), version_of(Changed, "d"), version_of(Event, "c")) == (2, 1, 1)


# -- routing keys -------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Ordered(ECSTEvent):
    order: int
    amount: int = 0

    note: ClassVar[str] = ""

    def __post_init__(self) -> None:
        self.region = "north"

    @property
    def tenant(self) -> int:
        return self.order // 100

    def describe(self) -> str:
        return "an order"


class Cleared(Ordered):
    """Not decorated: it has the fields of its base."""

    area: str


@attrs.define
class OrderedAttrs(Event):
    order: int


class OrderedStruct(msgspec.Struct):
    order: int


class OrderedModel(pydantic.BaseModel):
    order: int
    _secret = pydantic.PrivateAttr(0)

    @pydantic.computed_field  # type: ignore[prop-decorator]
    @property
    def tenant(self) -> int:
        return 1


class OrderedOpen(pydantic.BaseModel, extra="allow"):
    order: int


@dataclasses.dataclass
class OrderedLazy(Event):
    order: int

    def __getattr__(self, name: str) -> int:
        return 0


@pytest.mark.parametrize("cls", [Ordered, Cleared, OrderedAttrs, OrderedStruct, OrderedModel])
def test_misspelt_key_is_refused_with_the_attribute_that_may_be_meant(cls: Any) -> None:
    """It would be found out by dead letters, or by a refused dispatch."""
    with pytest.raises(
        KeyUnknown, match=r"'order.paid': \w+ has no attribute 'ordr'.*; did you mean 'order'\?"
    ) as caught:
        EventName("order.paid", cls, key="ordr")
    assert (caught.value.cls, caught.value.key, caught.value.similar) == (cls, "ordr", "order")
    with pytest.raises(KeyUnknown, match=r"its fields are order"):
        EventName("order.paid", cls, key="zzz")
    with pytest.raises(KeyUnknown, match="did you mean 'order'"):
        Route(EventName("order.paid", cls), key="odrer")


@pytest.mark.parametrize(
    ("cls", "key"),
    [
        *((Ordered, key) for key in ("order", "tenant", "describe", "region", "note", "event_id", "name")),
        (Cleared, "area"),
        (OrderedModel, "tenant"),
        (OrderedModel, "_secret"),
        (OrderedOpen, "anything"),
        (OrderedLazy, "anything"),
        (Joined, "anything"),
        (Ordered, lambda event: event.ordr),
        (None, "anything"),
    ],
)
def test_key_that_an_object_may_have_is_taken(cls: Any, key: Any) -> None:
    """Fields, properties, methods, what a method sets, and everything of a class whose attributes can't be known."""
    assert EventName("order.paid", cls, key=key).key is key
    Route(EventName("order.paid", cls), key=key)
