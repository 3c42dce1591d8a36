"""The express lane of a consumer does what the long way does, only sooner.

The same random history goes through a consumer as it is, and through one whose lane is closed. ``SILBO_LANE_EXAMPLES`` sets how
many histories are tried.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, NamedTuple
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from silbo import AsyncEventDispatcher, Consumer, DomainEvent, ECSTEvent, EventName
from silbo._retry import Backoff
from silbo.brokers import memory
from silbo.brokers.memory import MemoryBroker
from silbo.brokers.redis import DeadLetters, RedisStreams
from silbo.consumer.express_lane import ExpressLane
from silbo.message import Delivery, Origin
from silbo.protocols import Subscription
from silbo.wire.encode import to_message
from silbo.wire.formats import JSON
from tests.support.consumer import USER_JOINED, Heard, Running, Scripted, delivery
from tests.support.consumer import Consumer as QuickConsumer
from tests.support.redis_at import redis_at

EXAMPLES = int(os.environ.get("SILBO_LANE_EXAMPLES", "25"))
EVERYTHING = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
DOINGS = [
    "nothing", "fails", "fails after a wait", "stops", "waits", "dispatches", "dispatches on", "cancels itself", "is cancelled",
    "is isolated", "has a limit",
]  # fmt: skip
"""The doings of a listener."""
KINDS = ["task"] * 12 + ["malformed", "unknown", "newer", "own", "unheard", "misfit", "refused", "odd"]
"""The kinds of messages."""


@dataclass
class Task(ECSTEvent):
    number: int
    key: str | None
    doing: str
    fails: int = 0  # so often

    def __post_init__(self) -> None:
        if self.doing == "refused":
            raise ValueError("not with these values")


class Inner(DomainEvent):
    pass


TASK, ONCE, UNHEARD = NAMES = [EventName(name, Task) for name in ("task", "task.once", "unheard")]
KEYED = [EventName(str(name), Task, key="key") for name in NAMES]

seen: ContextVar[tuple[int, ...]] = ContextVar("seen", default=())


@dataclass(frozen=True)
class Sent:
    """A message of a history."""

    number: int
    kind: str
    key: str | None
    doing: str
    fails: int
    once: bool

    @property
    def order(self) -> str | int:
        """The key within which it has its order; its number if there is none."""
        return self.number if self.key is None else "once" if self.once else self.key

    def encode(self) -> bytes:
        """Return its bytes."""
        name = UNHEARD if self.kind == "unheard" else ONCE if self.once else TASK
        if self.kind == "unknown":
            name = EventName("other", Task)
        doing = "refused" if self.kind == "refused" else self.doing
        event = Task(self.number, self.key, "nothing", self.fails)
        event.doing = doing
        key = None if self.key is None else str(self.order)
        message = to_message(event, name=str(name), kind="ecst", key=key)
        raw = JSON.encode(message, Origin("app" if self.kind == "own" else "other", "there"))
        if self.kind == "newer":
            return raw.replace(b'"version":"1"', b'"version":"2"')
        if self.kind == "misfit":
            return raw.replace(b'"number":', b'"number":"x","was":')
        if self.kind == "odd":  # for the long way, which accepts it
            return raw.replace(b'"number":', b'"more":[1],"number":')
        return raw[:-3] if self.kind == "malformed" else raw


sent_of = st.builds(
    Sent,
    number=st.just(0),
    kind=st.sampled_from(KINDS),
    key=st.sampled_from(["a", "b", "c", None]),
    doing=st.sampled_from(DOINGS),
    fails=st.sampled_from([0, 0, 1, 2, 99]),
    once=st.sampled_from([False, False, False, True]),
)
histories = st.lists(sent_of, min_size=1, max_size=14).map(
    lambda sents: [Sent(**{**asdict(sent), "number": number}) for number, sent in enumerate(sents)]
)


class Journal:
    """The listeners of one consumer, and what they have seen."""

    def __init__(self) -> None:
        self.lines: list[tuple[Any, ...]] = []
        self._failed: dict[int, int] = {}
        self.dispatcher = AsyncEventDispatcher()
        add = self.dispatcher.add_listener
        for name in (TASK, ONCE, EventName("other")):
            add(name, self.first, priority=-1)
            add(name, self.isolated, on_error=lambda error, event, listener: None)
            add(name, self.last, priority=1)
        add(ONCE, self.once, once=True)
        add("inner", self.inner)
        add("again", self.inner)

    def note(self, who: str, event: Any) -> None:
        number = getattr(event, "number", None)
        origin = getattr(event, "origin", None)
        self.lines.append((who, number, str(event.name), origin, seen.get(), type(event).__name__))

    async def first(self, event: Any) -> None:
        self.note("first", event)
        assert asyncio.current_task() is not None
        if type(event) is Task:
            seen.set((*seen.get(), event.number))
            await self.do(event)

    async def do(self, event: Task) -> None:
        if event.doing in ("waits", "fails after a wait", "has a limit"):
            async with asyncio.timeout(30):
                for _ in range(event.number % 3 + 1):
                    await asyncio.sleep(0)
        if event.doing == "dispatches":
            await self.dispatcher.adispatch("inner", Inner())
        if event.doing == "dispatches on":
            await self.dispatcher.adispatch("again", event)
        if event.doing == "stops":
            event.stop_propagation()
        if event.doing in ("cancels itself", "is cancelled"):
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            if event.doing == "is cancelled" and self.fails(event):
                await asyncio.sleep(0)
        if event.doing in ("fails", "fails after a wait") and self.fails(event):
            raise ValueError(f"{event.number} fails")

    async def isolated(self, event: Any) -> None:
        self.note("isolated", event)
        if type(event) is Task and event.doing == "is isolated" and self.fails(event):
            raise KeyError(event.number)

    async def last(self, event: Any) -> None:
        self.note("last", event)

    async def once(self, event: Any) -> None:
        self.note("once", event)

    async def inner(self, event: Any) -> None:
        self.note("inner", event)

    def fails(self, event: Task) -> bool:
        so_far = self._failed[event.number] = self._failed.get(event.number, 0) + 1
        return so_far <= event.fails

    def by_key(self, history: Sequence[Sent]) -> dict[Any, list[tuple[Any, ...]]]:
        """The lines of each key: they alone have an order once a delivery has failed. Where there is no key, of each message."""
        found: dict[Any, list[tuple[Any, ...]]] = {}
        for line in self.lines:
            found.setdefault(None if line[1] is None else history[line[1]].order, []).append(line)
        return found


class Played(NamedTuple):
    """The visible effects of a consumer that has handled a history."""

    lines: dict[Any, list[tuple[Any, ...]]]
    errors: list[tuple[int, str]]
    stats: dict[str, int]
    once_left: int
    dead: list[tuple[int, str, int]]


async def play(
    raws: Sequence[bytes],
    history: Sequence[Sent],
    subscription: Subscription,
    find_dead: Callable[[], Awaitable[list[tuple[bytes, str, int]]]],
    *,
    concurrency: int = 1,
    listener_timeout: float | None = None,
) -> Played:
    """Let a consumer handle a history."""
    journal, number_of = Journal(), {raw: number for number, raw in enumerate(raws)}
    errors: list[tuple[int, str]] = []
    consumer = Consumer(
        journal.dispatcher,
        subscription,
        events=KEYED if concurrency > 1 else NAMES,
        own="skip",
        concurrency=concurrency,
        max_attempts=3,
        backoff=Backoff(initial=0.0005, cap=0.001),
        newer_version_wait=0,
        listener_timeout=listener_timeout,
        on_error=lambda error, about: errors.append((number_of[about.raw], type(error).__name__)),
    )
    stats = consumer.stats
    async with asyncio.timeout(60), Running(consumer):  # type: ignore[arg-type]
        while stats.handled + stats.unheard + stats.skipped + stats.dead < len(history):
            await asyncio.sleep(0.001)
    once = [one for one in journal.dispatcher.get_listeners(ONCE) if one == journal.once]
    dead = [(number_of[raw], error, attempts) for raw, error, attempts in await find_dead()]
    return Played(journal.by_key(history), sorted(errors), asdict(stats), len(once), sorted(dead))


def close_lane(patch: pytest.MonkeyPatch) -> None:
    """Let every delivery go the long way."""
    patch.setattr(ExpressLane, "_is_open", lambda self: False)


async def play_at_memory(raws: Sequence[bytes], history: Sequence[Sent], **options: Any) -> Played:
    """Play at a memory broker, where all is acknowledged or dead at the end."""
    broker = MemoryBroker("app")
    group = broker.group("group", start="new")
    await (await group.open()).aclose()
    broker._append([Delivery(raw, "events", JSON) for raw in raws])  # also bytes that no publish sends
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "RECEIVE_WAIT", 0.002)  # a stop waits for a receive
        played = await play(raws, history, group, lambda: find_dead(broker), **options)
    assert not any(map(len, broker._backlogs.values()))
    return played


async def find_dead(broker: MemoryBroker) -> list[tuple[bytes, str, int]]:
    return [(letter.delivery.raw, letter.error, letter.attempts) for letter in broker.dead]


def make_pairs() -> list[Sent]:
    """A history in which each doing follows each, over no key."""
    doings = [doing for pair in product(DOINGS, DOINGS) for doing in pair]
    return [Sent(number, "task", None, doing, number % 2, number % 7 == 0) for number, doing in enumerate(doings)]


@EVERYTHING
@example(history=make_pairs(), concurrency=1, listener_timeout=None)
@given(history=histories, concurrency=st.sampled_from([1, 3]), listener_timeout=st.sampled_from([None, 30.0]))
def test_both_ways_have_the_same_effect(history: list[Sent], concurrency: int, listener_timeout: float | None) -> None:
    """Calls in their order, with the context that they see, errors, counts, acknowledgements and dead letters."""
    raws = [sent.encode() for sent in history]
    options = {"concurrency": concurrency, "listener_timeout": listener_timeout}
    by_lane = asyncio.run(play_at_memory(raws, history, **options))
    with pytest.MonkeyPatch.context() as patch:
        close_lane(patch)
        the_long_way = asyncio.run(play_at_memory(raws, history, **options))
    assert by_lane == the_long_way


async def test_both_ways_have_the_same_effect_at_redis(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One history with all kinds and doings: Redis gives out batches itself."""
    history = [
        Sent(number, kind, key=("a", "b", None)[number % 3], doing=doing, fails=number % 4, once=not number % 5)
        for number, (kind, doing) in enumerate([(kind, doing) for kind in dict.fromkeys(KINDS) for doing in DOINGS])
    ]
    raws = [sent.encode() for sent in history]
    found = []
    async with redis_at(redis_url) as client:
        for closed in (False, True):
            if closed:
                close_lane(monkeypatch)
            prefix = f"lane-{uuid4().hex[:8]}"
            async with (
                RedisStreams(client, app="app", prefix=prefix) as streams,
                DeadLetters(client, prefix=prefix) as letters,
            ):

                async def find_letters(letters: DeadLetters = letters) -> list[tuple[bytes, str, int]]:
                    return [(one.raw, one.error, one.attempts) for one in await letters.list(limit=1000)]

                group = streams.group("group", start="oldest")
                for raw in raws:
                    await client.xadd(f"{prefix}:{{events}}", {"message": raw})
                found.append(await play(raws, history, group, find_letters))
                (row,) = await client.xinfo_groups(f"{prefix}:{{events}}")
                assert row["pending"] == 0
    assert found[0] == found[1]


async def test_plain_deliveries_take_the_lane(
    d: AsyncEventDispatcher, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the comparisons above would compare the long way with itself."""
    left: list[object] = []
    leave = ExpressLane._leave
    monkeypatch.setattr(ExpressLane, "_leave", lambda self, *rest: left.append(rest) or leave(self, *rest))
    subscription = Scripted([delivery(number, key="a") for number in range(50)])
    async with Running(QuickConsumer(d, subscription, events=[USER_JOINED])):
        await subscription.until_acked(50)
    assert (len(heard.ids), left) == (50, [])


async def test_single_delivery_waits_for_a_batch_before_it(d: AsyncEventDispatcher, heard: Heard) -> None:
    """The keys of a batch are looked at in its turn; a redelivery of one of them came later all the same."""
    batch = [delivery(number, key="a") for number in (1, 2)]
    again = delivery(3, key="a", attempt=2)
    subscription = Scripted([*batch, again, delivery(4, key="a")])
    async with Running(QuickConsumer(d, subscription, events=[USER_JOINED], concurrency=2)):
        await subscription.until_acked(4)
    assert heard.ids == [1, 2, 3, 4]


async def test_delivery_of_a_batch_that_another_consumer_has_is_not_begun(d: AsyncEventDispatcher) -> None:
    """It was taken over while a listener of one before it ran long."""
    begun, kept, heard = asyncio.Event(), asyncio.Event(), Heard()

    class Losing(Scripted):
        keep_every = 0.02

        async def keep(self, *deliveries: Delivery) -> Collection[Delivery]:
            if begun.is_set():
                kept.set()
                return [one for one in deliveries if one.id == "2"]
            return ()

    @d.listen("user.joined")
    async def slow(event: Any) -> None:
        begun.set()
        if event.user_id == 1:
            await kept.wait()
        await heard.hear(event)

    subscription = Losing([delivery(number) for number in (1, 2, 3)])
    consumer = QuickConsumer(d, subscription, events=[USER_JOINED])
    async with Running(consumer):
        await subscription.until_acked(2)
    assert (heard.ids, subscription.acked, consumer.stats.lost) == ([1, 3], ["1", "3"], 1)


async def test_lane_waits_while_it_is_in_doubt_who_has_the_batch(d: AsyncEventDispatcher) -> None:
    """A listener held the loop for long: another consumer may have taken over what is behind."""
    heard = Heard()

    class Losing(Scripted):
        keep_every = 0.02

        async def keep(self, *deliveries: Delivery) -> Collection[Delivery]:
            for _ in range(20):
                await asyncio.sleep(0)
            return [one for one in deliveries if one.id == "2"] if heard.events else ()

    @d.listen("user.joined")
    async def holds(event: Any) -> None:
        await heard.hear(event)
        if event.user_id == 1:
            time.sleep(3 * Losing.keep_every)

    subscription = Losing([delivery(number) for number in (1, 2, 3)])
    consumer = QuickConsumer(d, subscription, events=[USER_JOINED])
    async with Running(consumer):
        await subscription.until_acked(2)
    assert (heard.ids, subscription.acked, consumer.stats.lost) == ([1, 3], ["1", "3"], 1)


async def test_channels_leave_nothing_behind(
    d: AsyncEventDispatcher, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be one for each user, and no end of them."""
    lanes: list[ExpressLane] = []
    is_open = ExpressLane._is_open
    monkeypatch.setattr(ExpressLane, "_is_open", lambda self: lanes.append(self) or is_open(self))
    plain = delivery(1, kept=False)
    subscription = Scripted([replace(plain, address=f"silbo:user-{number}") for number in range(10)])
    async with Running(QuickConsumer(d, subscription, events=[USER_JOINED])):
        await heard.until(10)
    assert lanes[0]._acks._in_hand == {}
