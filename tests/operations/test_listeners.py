"""Answers about listeners: what runs for a name, in order, and if it is meant for the name."""

from __future__ import annotations

from typing import Any

from silbo import FIRST, AsyncEventDispatcher, Bridge, EventName, Plugins
from silbo.brokers.memory import MemoryBroker
from silbo.operations.listeners import find_listeners, list_listeners

ORDER_PAID = EventName("order.paid")


async def early(event: Any) -> None: ...
async def late(event: Any) -> None: ...
def collect(error: Exception, event: Any, listener: Any) -> None: ...


class Audit:
    async def __call__(self, event: Any) -> None: ...


async def test_listeners_of_a_name_in_running_order() -> None:
    dispatcher = AsyncEventDispatcher()
    dispatcher.add_listener("**", late, priority=7)
    dispatcher.add_listener(ORDER_PAID, Audit(), timeout=2.5, on_error=collect)
    dispatcher.add_listener("order.*", early, priority=FIRST, once=True)
    found = find_listeners(dispatcher, "order.paid")
    assert [(row.name, row.listener, row.priority, row.is_meant) for row in found.listeners] == [
        ("order.*", "early", "FIRST", True),
        ("order.paid", "Audit.__call__", 0.0, True),
        ("**", "late", 7.0, False),
    ]
    assert [row.options for row in found.listeners] == [{"once": True}, {"timeout": 2.5, "on_error": "collect"}, {}]
    assert found.listeners[0].place.startswith(f"{__file__}:") and found.listeners[0].plugin == __name__
    assert found.is_heard and not found.is_declared and found.similar is None


async def test_name_that_only_a_bridge_hears_is_not_heard() -> None:
    """As a misspelt one; the similar name that somebody hears is the hint."""
    dispatcher = AsyncEventDispatcher()
    dispatcher.add_subscriber(Bridge(MemoryBroker(app="shop")))
    dispatcher.add_listener("order.payed", early)
    found = find_listeners(dispatcher, "order.paid")
    assert [row.listener for row in found.listeners] == ["Bridge.forward"]
    assert not found.is_heard and found.similar == "order.payed"


async def test_undeclared_name_has_a_similar_one_that_is_declared() -> None:
    dispatcher = AsyncEventDispatcher(names=[ORDER_PAID], unknown="allow")
    dispatcher.add_listener("order.payed", early)
    dispatcher.add_listener(ORDER_PAID, early)
    assert find_listeners(dispatcher, "order.payed").similar == "order.paid"
    declared = find_listeners(dispatcher, "order.paid")
    assert declared.is_declared and declared.similar is None


async def test_declared_name_is_similar_to_no_other_declared_one() -> None:
    """Names of one family are much alike: only one that has listeners and is declared nowhere can be its misspelling."""
    one, two = EventName("order.sent.1"), EventName("order.sent.2")
    dispatcher = AsyncEventDispatcher(names=[one, two], unknown="allow")
    dispatcher.add_listener(two, early)
    assert find_listeners(dispatcher, "order.sent.1").similar is None
    dispatcher.add_listener("order.send.1", early)
    assert find_listeners(dispatcher, "order.sent.1").similar == "order.send.1"


async def test_listener_of_a_plugin_that_is_off_does_not_count() -> None:
    def plugin(dispatcher: AsyncEventDispatcher) -> None:
        dispatcher.add_listener(ORDER_PAID, early)

    dispatcher = AsyncEventDispatcher()
    async with Plugins(dispatcher, slow_after=None) as plugins:
        await plugins.load(plugin)
        assert find_listeners(dispatcher, "order.paid").is_heard
        plugins.switch_off("plugin", "too slow")
        found = find_listeners(dispatcher, "order.paid")
        assert [row.off for row in found.listeners] == ["too slow"] and not found.is_heard
        dispatcher.add_listener(ORDER_PAID, late)
        assert [row.off for row in list_listeners(dispatcher)] == ["too slow", ""]


async def test_all_listeners_by_name_or_those_of_a_pattern() -> None:
    dispatcher = AsyncEventDispatcher()
    for name in ("user.joined", "order.*", "order.paid", ("a", "tuple")):
        dispatcher.add_listener(name, early)
    assert [row.name for row in list_listeners(dispatcher)] == [
        "('a', 'tuple')",
        "order.*",
        "order.paid",
        "user.joined",
    ]
    assert [row.name for row in list_listeners(dispatcher, "order.**")] == ["order.*", "order.paid"]
    assert [row.name for row in list_listeners(dispatcher, "order.*")] == ["order.*", "order.paid"]
