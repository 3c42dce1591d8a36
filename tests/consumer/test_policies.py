"""Error policies and deliveries: whatever isolates a listener, what failed is tried again, and is no dead letter too early."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import silbo
from silbo import AsyncEventDispatcher, Event, receive
from silbo.brokers.memory import MemoryBroker
from silbo.message import Origin
from silbo.wire.formats import JSON
from tests.support.consumer import (
    USER_JOINED,
    Consumer,
    UserJoined,
    handle_one,
    joined,
)


def ignore(error: Exception, event: object, listener: object) -> None:
    """A policy that says nothing."""


async def ignore_later(error: Exception, event: object, listener: object) -> None:
    await asyncio.sleep(0)


POLICIES: list[Any] = ["raise", "collect", ignore, ignore_later]


@pytest.mark.parametrize("binding", [True, False])
@pytest.mark.parametrize("of_listener", [None, *POLICIES])
@pytest.mark.parametrize("of_dispatcher", POLICIES)
async def test_failure_is_a_failed_attempt_under_every_policy(
    of_dispatcher: Any, of_listener: Any, binding: bool
) -> None:
    """The row "a consumer's delivery": tried again, then a dead letter, and never handled."""
    d = AsyncEventDispatcher(on_error=of_dispatcher, binding=binding)

    async def fail(event: Any) -> None:
        raise ConnectionError("database is away")

    d.add_listener("user.joined", fail, on_error=of_listener)
    consumer, subscription, _ = await handle_one(d)
    assert (consumer.stats.handled, consumer.stats.failed, consumer.stats.dead) == (0, 3, 1)
    (dead,) = subscription.buried
    assert "database is away" in dead[1] or "1 listeners of" in dead[1]


@pytest.mark.parametrize(
    "options",
    [{"priority": -1}, {"concurrent": True}, {"once": True}, {"timeout": 30}],
    ids=lambda options: next(iter(options)),
)
async def test_isolation_still_lets_the_other_listeners_run(options: dict[str, Any]) -> None:
    """In each attempt: that is what the host has isolated its plugins for."""
    d = AsyncEventDispatcher(on_error=ignore)
    ran: list[str] = []

    async def fail(event: Any) -> None:
        ran.append("fail")
        raise ValueError("plugin")

    async def other(event: Any) -> None:
        ran.append("other")

    d.add_listener("user.joined", fail, **options)
    d.add_listener("user.joined", other, concurrent=options.get("concurrent", False), priority=1)
    consumer, _, _ = await handle_one(d, max_attempts=2)
    assert ran == ["fail", "other"] * 2
    assert (consumer.stats.failed, consumer.stats.dead) == (2, 1)


async def test_all_errors_of_isolated_listeners_are_told() -> None:
    """One error as it is; several, and one that ends the dispatch, as a group."""
    d = AsyncEventDispatcher(on_error=ignore)

    async def first(event: Any) -> None:
        raise ValueError("first")

    async def second(event: Any) -> None:
        raise KeyError("second")

    d.add_listener("user.joined", first)
    _, _, errors = await handle_one(d, max_attempts=1)
    assert isinstance(errors[0], ValueError)
    d.add_listener("user.joined", second)
    _, _, errors = await handle_one(d, max_attempts=1)
    assert [type(error) for error in errors[0].exceptions] == [ValueError, KeyError]
    d.remove_listener("user.joined", second)
    d.add_listener("user.joined", second, on_error="raise")
    _, _, errors = await handle_one(d, max_attempts=1)
    assert [type(error) for error in errors[0].exceptions] == [ValueError, KeyError]


async def test_isolated_error_of_an_observed_listener_fails_the_delivery_too() -> None:
    d = AsyncEventDispatcher(on_error=ignore, observers=[silbo.Trace()])

    async def fail(event: Any) -> None:
        raise ValueError("no")

    d.add_listener("user.joined", fail)
    consumer, _, _ = await handle_one(d, max_attempts=1)
    assert (consumer.stats.handled, consumer.stats.dead) == (0, 1)


async def test_event_that_a_listener_dispatches_keeps_its_isolation() -> None:
    """Only the listeners of what was received decide about it; so does what is spawned, of the same event too."""
    d = AsyncEventDispatcher(on_error=ignore)
    ran: list[str] = []

    async def fail(event: Any) -> None:
        ran.append(event.name)
        raise ValueError("of another event")

    async def listener(event: Any) -> None:
        await d.adispatch("invoice.made", Event())
        await d.spawn("user.seen", event)

    d.add_listener("invoice.made", fail)
    d.add_listener("user.seen", fail)
    d.add_listener("user.joined", listener)
    consumer, _, errors = await handle_one(d)
    assert ran == ["invoice.made", "user.seen"]
    assert (consumer.stats.handled, errors) == (1, [])


@pytest.mark.parametrize("timeout", [None, 30.0])
async def test_received_event_that_a_listener_dispatches_on_keeps_its_isolation(timeout: float | None) -> None:
    """Under another name it is another dispatch, although the event is the same; under its own the failure counts."""
    d = AsyncEventDispatcher(on_error=ignore)
    ran: list[str] = []

    async def fail(event: Any) -> None:
        ran.append(event.name)
        raise ValueError("of the audit")

    async def listener(event: Any) -> None:
        await d.adispatch("audit", event)

    d.add_listener("audit", fail)
    d.add_listener("user.joined", listener)
    consumer, _, errors = await handle_one(d, listener_timeout=timeout)
    assert (ran, consumer.stats.handled, errors) == (["audit"], 1, [])
    d.add_listener("user.joined", fail, priority=1)
    consumer, _, _ = await handle_one(d, listener_timeout=timeout)
    assert (consumer.stats.handled, consumer.stats.failed) == (0, 3)


class RememberingInbox:
    def __init__(self) -> None:
        self.kept = 0

    @asynccontextmanager
    async def handling(self, group: str, publication: str) -> AsyncIterator[bool]:
        yield True
        self.kept += 1

    async def aclose(self) -> None:
        pass


async def test_inbox_does_not_remember_an_isolated_failure() -> None:
    """Else the next attempt would be taken for a duplicate."""
    d = AsyncEventDispatcher(on_error=ignore)
    calls = 0

    async def fail_once(event: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise ValueError("once")

    d.add_listener("user.joined", fail_once)
    inbox = RememberingInbox()
    consumer, _, _ = await handle_one(d, inbox=inbox)
    assert (calls, inbox.kept) == (2, 1)
    assert (consumer.stats.failed, consumer.stats.handled, consumer.stats.duplicates) == (1, 1, 0)


async def test_receive_raises_what_was_isolated() -> None:
    """Whoever acknowledges after receive() must learn of it; later dispatches of the program are isolated as before."""
    d = AsyncEventDispatcher(on_error=ignore)

    async def fail(event: Any) -> None:
        raise ValueError("isolated")

    d.add_listener("user.joined", fail)
    raw = JSON.encode(joined(1), Origin("other", "x"))
    with pytest.raises(ValueError, match="isolated"):
        await receive(d, raw, events=[USER_JOINED])
    await d.adispatch(USER_JOINED, UserJoined(1))


def test_page_says_of_every_policy_that_the_delivery_is_tried_again() -> None:
    """The one table: each policy has its row, and none ends in an acknowledgement."""
    page = Path(silbo.__file__).parents[1].joinpath("docs/howto/errors.md").read_text()
    header, _, *rows = re.findall(r"^\| .*the policy that applies[^\n]*$(?:\n\|[^\n]*$)+", page, re.MULTILINE)[
        0
    ].splitlines()
    column = [cell.strip() for cell in header.split("|")].index("a consumer's delivery")
    cells = {row.split("|")[1].strip(): row.split("|")[column].strip() for row in rows}
    assert cells.keys() == {'`"raise"`', '`"collect"`', "a callable"}
    assert set(cells.values()) == {"has failed: tried again"}


# -- give_up_on ------------------------------------------------------------------------


class NoSuchOrder(LookupError):
    pass


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (NoSuchOrder("7"), 1),
        (ExceptionGroup("two", [KeyError("a"), ExceptionGroup("in", [NoSuchOrder("b")])]), 1),
        (ExceptionGroup("two", [KeyError("a"), ConnectionError("b")]), 3),
        (ConnectionError("away"), 3),
    ],
    ids=["derived", "group of such", "group with another", "another"],
)
async def test_error_that_trying_again_can_t_help_is_a_dead_letter_at_once(
    error: Exception, attempts: int, d: AsyncEventDispatcher
) -> None:
    """Of a group all have to be such errors: one that may pass is worth another attempt."""

    async def fail(event: Any) -> None:
        raise error

    d.add_listener("user.joined", fail)
    consumer, subscription, _ = await handle_one(d, give_up_on=(LookupError,))
    assert (consumer.stats.failed, consumer.stats.dead) == (attempts, 1)
    assert [number for _, _, number in subscription.buried] == [attempts]


async def test_isolated_errors_can_t_be_helped_either() -> None:
    d = AsyncEventDispatcher(on_error=ignore)

    async def fail(event: Any) -> None:
        raise LookupError("no such order")

    d.add_listener("user.joined", fail)
    d.add_listener("user.joined", fail)
    consumer, _, _ = await handle_one(d, give_up_on=[LookupError])
    assert (consumer.stats.failed, consumer.stats.dead) == (1, 1)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"give_up_on": ValueError}, TypeError, "tuple of classes of exceptions"),
        ({"give_up_on": ("ValueError",)}, TypeError, "tuple of classes of exceptions"),
        ({"give_up_on": (asyncio.CancelledError,)}, TypeError, "tuple of classes of exceptions"),
        ({"listener_timeout": 0}, ValueError, "listener_timeout"),
        ({"slow_after": 0}, ValueError, "slow_after"),
    ],
)
def test_impossible_options_are_refused(
    options: dict[str, Any], error: type[Exception], text: str, broker: MemoryBroker, d: AsyncEventDispatcher
) -> None:
    with pytest.raises(error, match=text):
        Consumer(d, broker.group("billing", start="new"), **options)


def test_listener_timeout_needs_a_dispatcher_of_silbo_s(broker: MemoryBroker) -> None:
    """Another one's listeners run out of its reach."""

    class Foreign:
        async def adispatch(self, name: Any, event: Any = None) -> Any: ...

    foreign: Any = Foreign()
    with pytest.raises(TypeError, match="one of silbo's dispatchers"):
        Consumer(foreign, broker.group("billing", start="new"), listener_timeout=1)
