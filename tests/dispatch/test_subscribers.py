"""Subscribers, and describe()."""

from __future__ import annotations

from functools import partial, partialmethod, wraps
from typing import Any
from unittest.mock import AsyncMock

import pytest

import silbo
from silbo import LAST, AsyncEventDispatcher, Event, on


class Greeter:
    def __init__(self) -> None:
        self.log: list[str] = []

    @on("user.left", priority=5)
    @on("user.joined")
    async def greet(self, event: Any) -> None:
        self.log.append(f"greet {event.name}")

    @on("user.*", priority=-1, once=True)
    async def first(self, event: Any) -> None:
        self.log.append("first")

    async def no_listener(self, event: Any) -> None: ...


class Louder(Greeter):
    @on("user.shouted")
    async def shout(self, event: Any) -> None:
        self.log.append("shout")

    async def first(self, event: Any) -> None: ...


async def test_the_on_methods_of_a_subscriber_are_listeners() -> None:
    """Under every name they are marked with, with their options."""
    d = AsyncEventDispatcher()
    greeter = Greeter()
    d.add_subscriber(greeter)
    for name in ("user.joined", "user.left"):
        await d.adispatch(name, Event())
    assert greeter.log == ["first", "greet user.joined", "greet user.left"]
    assert [(row.name, row.priority) for row in d.describe()] == [("user.left", 5), ("user.joined", 0)]


async def test_a_subclass_inherits_listeners_and_drops_those_it_overrides_unmarked() -> None:
    """An override says for itself whether it listens."""
    d = AsyncEventDispatcher()
    louder = Louder()
    d.add_subscriber(louder)
    for name in ("user.joined", "user.shouted"):
        await d.adispatch(name, Event())
    assert louder.log == ["greet user.joined", "shout"]


async def test_a_subscriber_is_removed_whole() -> None:
    """By the object or by the registration; others of its class stay."""
    d = AsyncEventDispatcher()
    one, two = Greeter(), Greeter()
    d.add_subscriber(one)
    place = d.add_subscriber(two)
    d.remove_subscriber(one)
    await d.adispatch("user.joined", Event())
    assert (one.log, len(two.log)) == ([], 2)
    place.remove()
    place.remove()
    assert not d.has_listeners()
    with pytest.raises(ValueError, match="no subscriber"):
        d.remove_subscriber(two)


def test_mistakes_are_refused() -> None:
    """A subscriber without listeners, a sync method, an unknown option."""
    d = AsyncEventDispatcher()
    with pytest.raises(TypeError, match="@silbo.on"):
        d.add_subscriber(object())
    with pytest.raises(TypeError, match="async def"):
        on("x")(lambda self, event: None)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]

    class Wrong:
        @on("x", onse=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
        async def listen(self, event: Any) -> None: ...

    with pytest.raises(TypeError, match="onse"):
        d.add_subscriber(Wrong())


def test_properties_are_not_run_to_find_listeners() -> None:
    """Looking for marks has no effects."""

    class Careful:
        @property
        def expensive(self) -> int:
            raise AssertionError("run")

        @on("x")
        async def listen(self, event: Any) -> None: ...

    AsyncEventDispatcher().add_subscriber(Careful())


def tracing(method: Any) -> Any:
    """Wrap a method as hosts' decorators do."""

    @wraps(method)
    async def run(*args: Any) -> Any:
        return await method(*args)

    return run


class Bound:
    """A descriptor that keeps the function, but not its attributes."""

    def __init__(self, function: Any) -> None:
        self.__wrapped__ = function

    def __get__(self, instance: Any, owner: type) -> Any:
        return self.__wrapped__.__get__(instance, owner)


async def test_a_mark_is_found_above_and_below_other_decorators() -> None:
    """Each listener is heard once for each of its marks."""
    heard: list[tuple[str, str]] = []
    below: Any = on  # to type checkers it takes async callables only

    class Plugin:
        @classmethod
        @on("class.inner")
        async def class_inner(cls, event: Any) -> None:
            heard.append((event.name, cls.__name__))

        @below("class.outer")
        @classmethod
        async def class_outer(cls, event: Any) -> None:
            heard.append((event.name, cls.__name__))

        @staticmethod
        @on("static.inner")
        async def static_inner(event: Any) -> None:
            heard.append((event.name, "static"))

        @below("static.outer")
        @staticmethod
        async def static_outer(event: Any) -> None:
            heard.append((event.name, "static"))

        @on("wrapped.outer")
        @tracing
        @on("wrapped.inner")
        async def wrapped(self, event: Any) -> None:
            heard.append((event.name, "wrapped"))

        @Bound
        @on("bound")
        async def bound(self, event: Any) -> None:
            heard.append((event.name, "bound"))

        @classmethod
        @tracing
        @on("deep")
        async def deep(cls, event: Any) -> None:
            heard.append((event.name, cls.__name__))

        async def add(self, label: str, event: Any) -> None:
            heard.append((event.name, label))

        partial_outer = below("partial.outer")(partialmethod(add, "partial"))
        partial_inner = partialmethod(below("partial.inner")(tracing(add)), "partial")

    d = AsyncEventDispatcher()
    d.add_subscriber(Plugin())
    for row in d.describe():
        await d.adispatch(str(row.name), Event())
    assert heard == [
        ("class.inner", "Plugin"),
        ("class.outer", "Plugin"),
        ("static.inner", "static"),
        ("static.outer", "static"),
        ("wrapped.outer", "wrapped"),
        ("wrapped.inner", "wrapped"),
        ("bound", "bound"),
        ("deep", "Plugin"),
        ("partial.outer", "partial"),
        ("partial.inner", "partial"),
    ]


def test_attributes_that_are_no_listeners_are_not_touched() -> None:
    """A lazy setting or a proxy of a request may raise any error, or answer to every name."""

    class Proxy:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(f"{name} outside of a request")

        @property
        def __wrapped__(self) -> Any:
            raise RuntimeError("outside of a request")

    class Anything:
        def __getattr__(self, name: str) -> Any:
            return self

    class Lazy:
        def __get__(self, instance: Any, owner: type) -> Any:
            raise RuntimeError("not configured")

    class Plugin:
        request = Proxy()
        anything = Anything()
        settings = Lazy()
        cls = Proxy

        @on("x")
        async def listen(self, event: Any) -> None: ...

    d = AsyncEventDispatcher()
    d.add_subscriber(Plugin())
    assert [row.name for row in d.describe()] == ["x"]


def test_a_mark_without_a_name_is_refused() -> None:
    """``@on`` alone would leave a function that nobody hears."""
    mark: Any = on
    with pytest.raises(TypeError, match="name first"):

        @mark
        async def listen(self: Any, event: Any) -> None: ...

    with pytest.raises(TypeError, match="None is not an event name"):
        mark(None)


# -- describe ------------------------------------------------------------------------------------------------


async def listener(event: Any) -> None: ...


class Calls:
    async def __call__(self, event: Any) -> None: ...


def test_describe_shows_what_runs_in_running_order() -> None:
    """Patterns included, with where each listener comes from."""
    d = AsyncEventDispatcher()
    d.add_listener("**", Calls(), priority=LAST)
    d.add_listener("user.joined", partial(listener), timeout=2, once=True)
    d.add_subscriber(Louder())
    rows = d.describe("user.joined")
    assert [(row.name, row.priority) for row in rows] == [("user.joined", 0), ("user.joined", 0), ("**", LAST)]
    here = __file__
    line = listener.__code__.co_firstlineno
    assert rows[0].plugin == __name__ and rows[0].defined_at == f"{here}:{line}"
    assert rows[0].options == {"once": True, "timeout": 2} and rows[1].options == {}
    assert rows[1].defined_at == f"{here}:{Greeter.greet.__code__.co_firstlineno}"
    assert rows[2].defined_at == f"{here}:{Calls.__call__.__code__.co_firstlineno}"
    assert len(d.describe()) == 5 and isinstance(rows[0], silbo.ListenerRow)


def test_describe_takes_listeners_without_code() -> None:
    """A mock has no place in a file."""
    d = AsyncEventDispatcher()
    d.add_listener("x", AsyncMock())
    (row,) = d.describe("x")
    assert row.listener is d.get_listeners("x")[0]


async def test_subscriber_that_is_refused_leaves_no_listener_behind() -> None:
    """Else it would be heard, more often with each try, and could not be removed."""

    class Plugin:
        @on("a")
        async def first(self, event: Event) -> None:
            raise AssertionError("heard")

        @on("b", timeout=0)
        async def second(self, event: Event) -> None: ...

    d = AsyncEventDispatcher()
    for _ in range(2):
        with pytest.raises(ValueError, match="timeout is seconds, more than 0"):
            d.add_subscriber(Plugin())
    assert not d.has_listeners()
    await d.adispatch("a")
