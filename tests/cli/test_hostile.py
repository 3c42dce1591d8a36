"""Texts that others wrote can't steer the terminal of whoever looks, whichever command shows them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from silbo import AsyncEventDispatcher, Event, Message, Outbox, Trace
from silbo.brokers.redis import RedisStreams
from silbo.event import new_id
from silbo.message import Delivery, new_publication
from silbo.stores.sqlite import SQLiteStore
from tests.support.app_files import imports_undone, write
from tests.support.command_line import Done, settle, silbo, terminal
from tests.support.redis_streams import opened, receive

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\nno danger\u202e\u2066"
"""The title of the window, a cleared screen, a C1 sequence, a line of its own, and marks that turn the direction."""

APP = f"""
from silbo import AsyncEventDispatcher, EventName

HOSTILE = {HOSTILE!r}
dispatcher = AsyncEventDispatcher(names=[EventName("order.paid", description=HOSTILE)], unknown="allow")

async def hear(event): ...

hear.__qualname__ = hear.__name__ = hear.__module__ = HOSTILE
dispatcher.add_listener("order.paid" + HOSTILE, hear)
dispatcher.add_listener("order.paid", hear)


def failing():
    raise RuntimeError(HOSTILE)
"""


@pytest.fixture
def app(tmp_path: Path) -> Iterator[tuple[str, ...]]:
    with imports_undone(tmp_path):
        write(tmp_path, {"hostile_app.py": APP})
        yield "hostile_app:dispatcher", "--app-dir", str(tmp_path)


def find_controls(text: str) -> str:
    return "".join(character for character in text if not character.isprintable() and character != "\n")


def sent(number: int) -> Message:
    name = f"order.paid{HOSTILE}"
    headers = {"publication": new_publication(), "version": "1", "key": HOSTILE}
    return Message("notification_event", name, new_id(), {"n": number, HOSTILE: HOSTILE}, headers)


async def postpone(file: Path, error: str) -> None:
    """Note a failed attempt of the rows that wait, as a relay does."""
    store = SQLiteStore(file)
    await store.open()
    try:
        lead = await store.lead(0, "test", lease=10)
        assert lead is not None
        await store.postpone(lead, [row.id for row in await store.take(lead, 10)], error=error, delay=0)
        await store.resign(lead)
    finally:
        await store.aclose()


async def test_no_command_lets_data_steer_the_terminal(
    redis: Redis, redis_url: str, prefix: str, tmp_path: Path, app: tuple[str, ...]
) -> None:
    key, file = f"{prefix}:{{events}}", tmp_path / "outbox.db"
    where = ("--redis", redis_url, "--prefix", prefix)
    event = sent(1)
    async with RedisStreams(redis, app="shop", prefix=prefix) as streams:
        async with opened(streams.group("billing", start="new")) as billing:
            await streams.publish(event, sent(2))
            first, second = (item for item in await receive(billing, 2) if isinstance(item, Delivery))
            assert await billing.bury(first, error=HOSTILE, attempts=1)
            await billing.count(second, error=HOSTILE)
            await redis.xadd(key, {"message": HOSTILE})
            letter = (await redis.xadd(f"{key}:dead", {HOSTILE: HOSTILE})).decode()
            await redis.xgroup_create(key, HOSTILE, "0")
            await redis.xreadgroup(HOSTILE, HOSTILE, {key: ">"}, count=1)
            async with Outbox(SQLiteStore(file), streams, relay=False) as outbox:
                await outbox.publish(event, sent(3))
            await settle(file, dead=1)
            await postpone(file, HOSTILE)
            program, *arguments = app
            done = dict[str, Done]()
            for command in (
                ("why", event.message_id, "--store", file, *where),
                ("groups", *where),
                ("tail", "--limit", 2, "--since", "1h", *where),
                ("doctor", "--store", file, *where),
                ("dead", "list", *where),
                ("dead", "show", letter, *where),
                ("dead", "count", "--group", HOSTILE, *where),
                ("outbox", "status", "--store", file),
                ("outbox", "status", "--rows", "dead", "--store", file),
                ("send", f"hello{HOSTILE}", "{}", *where),
                ("listeners", program, *arguments),
                ("listeners", program, f"order.paid{HOSTILE}", *arguments),
                ("listeners", program, f"order.piad{HOSTILE}", *arguments),
                ("names", program, *arguments),
                ("names", program, "order.paid", *arguments),
                ("names", program, f"order.paid{HOSTILE}", *arguments),
            ):
                done[" ".join(map(str, command[:3]))] = await silbo(*command)
            async with terminal("top", "--limit", 1, "--store", file, *where) as screen:
                assert await screen.end() == 0
    for name, each in done.items():
        assert "owned" in each.out + each.err, (name, each)
        assert not (found := find_controls(each.out + each.err)), (name, found, each)
        assert "\nno danger" not in each.out, "data makes no line"
    assert "billing" in screen.shown and not any(
        mark in screen.shown for mark in ("\x1b]", "\x07", "\x1b[2J\x9b", "\u202e")
    )


async def test_traceback_of_a_program_does_not_steer_the_terminal(app: tuple[str, ...]) -> None:
    """The text of its error may have been given to it."""
    with pytest.raises(AssertionError, match="RuntimeError") as told:  # silbo() takes a traceback for silbo's own
        await silbo("listeners", "hostile_app:failing", *app[1:])
    assert not find_controls(str(told.value)), told.value


@pytest.mark.parametrize("width", [None, 80])
async def test_waterfall_does_not_steer_the_terminal(width: int | None) -> None:
    """A trace is drawn into a terminal or a log: names, errors, events and listeners are texts."""
    d = AsyncEventDispatcher(observers=[trace := Trace(payloads=True)])

    async def fail(event: Any) -> None:
        raise ValueError(HOSTILE)

    fail.__qualname__ = HOSTILE
    d.add_listener(f"order.paid{HOSTILE}", fail)
    event = Event()
    event.note = HOSTILE  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="owned"):
        await d.adispatch(f"order.paid{HOSTILE}", event)
    drawn = trace.draw(width=width)
    assert not find_controls(drawn), drawn
    assert drawn.replace("\n        ", "").count("owned") >= 3 and "\nno danger" not in drawn
