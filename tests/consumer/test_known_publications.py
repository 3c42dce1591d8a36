"""An inbox that is asked and told of many publications at once gives the promise of one that is entered for each."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from silbo import AsyncEventDispatcher
from silbo.brokers.redis import RedisInbox
from silbo.consumer import known_publications as module
from silbo.consumer.known_publications import find_batch_inbox
from silbo.errors import MessageInvalid, StoreUnavailable
from silbo.message import Delivery, Origin
from silbo.protocols import BatchInbox, Inbox
from silbo.wire.encode import to_message
from silbo.wire.formats import JSON
from tests.support.consumer import USER_JOINED, Consumer, Heard, Running, Scripted, UserJoined
from tests.support.consumer import delivery as keyless


class Single:
    """An inbox that is entered for each delivery.

    Attributes:
        seen: Publications that it remembers.
        away: Calls that fail.
    """

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.away = 0

    def answer(self) -> None:
        if self.away:
            self.away -= 1
            raise StoreUnavailable("locked")

    @asynccontextmanager
    async def handling(self, group: str, publication: str) -> AsyncIterator[bool]:
        self.answer()
        yield publication not in self.seen
        self.seen.add(publication)


class Batched(Single):
    """One that is asked in batches, and can be slow.

    Attributes:
        asked: The publications of each call.
        told: The publications of each call.
        may_remember: Until it is set, nothing is remembered.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[list[str]] = []
        self.told: list[list[str]] = []
        self.may_remember = asyncio.Event()
        self.may_remember.set()

    @asynccontextmanager
    async def handling(self, group: str, publication: str) -> AsyncIterator[bool]:
        raise AssertionError("it is asked in batches")
        yield

    async def find_handled(self, group: str, publications: Sequence[str]) -> list[str]:
        self.asked.append(list(publications))
        await asyncio.sleep(0)
        self.answer()
        return [publication for publication in publications if publication in self.seen]

    async def remember(self, group: str, publications: Sequence[str]) -> None:
        await self.may_remember.wait()
        self.told.append(list(publications))
        self.seen.update(publications)


def delivery(number: int, *, key: str = "", attempt: int = 1) -> Delivery:
    """With a key of its own, so that it may take the express lane."""
    return keyless(number, key=key or str(number), attempt=attempt)


def publication_of(item: Delivery) -> str:
    return item.message().headers["publication"]


def again(item: Delivery, entry_id: str, attempt: int = 1) -> Delivery:
    """The same publication in another entry, as after a replay."""
    return Delivery(item.raw, item.address, JSON, entry_id, attempt)


@pytest.fixture
def inbox() -> Batched:
    return Batched()


# -- asked and told in batches --------------------------------------------------------------------------------


async def test_what_nobody_has_heard_is_not_remembered(d: AsyncEventDispatcher, inbox: Batched) -> None:
    """Also of a batch in which its only listener has gone: or a replay, once somebody listens again, would lose it."""
    heard: list[int] = []

    async def listener(event: UserJoined) -> None:
        heard.append(event.user_id)
        if len(heard) == 3:
            d.remove_listener(USER_JOINED, listener)

    d.add_listener(USER_JOINED, listener)
    subscription = Scripted([delivery(number) for number in range(8)])
    consumer = Consumer(d, subscription, events=[USER_JOINED], inbox=inbox)
    async with Running(consumer):
        await subscription.until_acked(8)
    assert (heard, consumer.stats.handled, consumer.stats.unheard) == ([0, 1, 2], 3, 5)
    assert len(inbox.seen) == 3


async def test_a_batch_is_one_question(d: AsyncEventDispatcher, heard: Heard, inbox: Batched) -> None:
    """And is remembered in few calls, however fast its listeners are."""
    items = [delivery(n) for n in range(100)]
    inbox.seen.add(publication_of(items[7]))
    subscription = Scripted(items)
    consumer = Consumer(d, subscription, events=[USER_JOINED], inbox=inbox)
    async with Running(consumer):
        await subscription.until_acked(100)
    assert inbox.asked == [[publication_of(item) for item in items]]
    assert len(inbox.told) < 10
    assert inbox.seen == {publication_of(item) for item in items}
    assert heard.ids == [n for n in range(100) if n != 7]
    assert (consumer.stats.handled, consumer.stats.duplicates) == (99, 1)


async def test_nothing_is_acknowledged_before_it_is_remembered(d: AsyncEventDispatcher) -> None:
    """Of those that go together, of one that waits for something, and of one that was given out before."""

    @d.listen("user.joined")
    async def wait_for_some(event: UserJoined) -> None:
        if event.user_id % 2:
            await asyncio.sleep(0)

    class Slow(Batched):
        async def remember(self, group: str, publications: Sequence[str]) -> None:
            for _ in range(100):
                await asyncio.sleep(0)
            await super().remember(group, publications)

    class Watching(Scripted):
        async def ack(self, *deliveries: Delivery) -> None:
            early.extend(item for item in deliveries if publication_of(item) not in inbox.seen)
            await super().ack(*deliveries)

    inbox = Slow()
    early: list[Delivery] = []
    subscription = Watching([*map(delivery, range(6)), delivery(6, attempt=2)])
    async with Running(Consumer(d, subscription, events=[USER_JOINED], inbox=inbox)):
        await subscription.until_acked(7)
    assert early == []


async def test_what_is_handled_is_remembered_before_its_batch_is_done(
    d: AsyncEventDispatcher, inbox: Batched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed has forgotten those of the last moment, not all that it had not acknowledged."""
    monkeypatch.setattr("silbo.consumer.acknowledgements.ACK_WITHIN", 60.0)
    items = [delivery(1), delivery(2)]

    @d.listen("user.joined")
    async def wait_for_the_first(event: UserJoined) -> None:
        if event.user_id == 2:
            async with asyncio.timeout(30):
                while not inbox.told:
                    await asyncio.sleep(0)

    subscription = Scripted(items)
    async with Running(Consumer(d, subscription, events=[USER_JOINED], inbox=inbox)):
        await subscription.until_acked(2)
    assert inbox.told == [[publication_of(item)] for item in items]


async def test_what_is_handled_at_the_end_is_remembered(d: AsyncEventDispatcher, heard: Heard, inbox: Batched) -> None:
    """Also if the run is cancelled: what was not acknowledged comes again."""
    inbox.may_remember.clear()
    subscription = Scripted([delivery(1), delivery(2)])
    async with Consumer(d, subscription, events=[USER_JOINED], inbox=inbox) as consumer:
        running = asyncio.create_task(consumer.run())
        await heard.until(2)
        running.cancel()
        inbox.may_remember.set()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert len(inbox.seen) == 2
    assert subscription.acked == ["1", "2"]


async def test_what_can_not_be_remembered_is_logged_and_acknowledged(
    d: AsyncEventDispatcher, heard: Heard, caplog: pytest.LogCaptureFixture
) -> None:
    """Its listeners have run: to try it again would double their effects."""

    class Full(Batched):
        async def remember(self, group: str, publications: Sequence[str]) -> None:
            raise StoreUnavailable("no room")

    subscription = Scripted([delivery(1), delivery(2)], [delivery(3)])
    with caplog.at_level(logging.WARNING):
        async with Running(Consumer(d, subscription, events=[USER_JOINED], inbox=Full())):
            await subscription.until_acked(3)
    assert heard.ids == [1, 2, 3]
    assert "handled, but not remembered in the inbox: no room" in caplog.text


# -- the same publication twice -------------------------------------------------------------------------------


@pytest.mark.parametrize("remembered", [False, True])
async def test_publication_twice_in_a_batch_is_heard_once(
    d: AsyncEventDispatcher, heard: Heard, inbox: Batched, remembered: bool
) -> None:
    """Both are new when they are asked about; the first is remembered before the second comes, or not yet."""
    first = delivery(1)

    @d.listen("user.joined")
    async def wait_between(event: UserJoined) -> None:
        if event.user_id == 2 and remembered:
            async with asyncio.timeout(20):
                while not inbox.told:
                    await asyncio.sleep(0)

    if not remembered:
        inbox.may_remember.clear()
    subscription = Scripted([first, delivery(2), again(first, "3")])
    consumer = Consumer(d, subscription, events=[USER_JOINED], inbox=inbox)
    async with Running(consumer):
        await subscription.empty.wait()
        await heard.until(2)
        inbox.may_remember.set()
        await subscription.until_acked(3)
    assert heard.ids == [1, 2]
    assert (consumer.stats.handled, consumer.stats.duplicates) == (2, 1)


async def test_answer_that_came_while_the_first_was_handled_does_not_count(
    d: AsyncEventDispatcher, heard: Heard, inbox: Batched
) -> None:
    """The second was asked about before the first was remembered, and comes after that."""
    first, asking = delivery(1), asyncio.Event()

    @d.listen("user.joined")
    async def wait_for_the_question(event: UserJoined) -> None:
        if event.user_id == 1:
            await asking.wait()

    class Slow(Batched):
        async def find_handled(self, group: str, publications: Sequence[str]) -> list[str]:
            answer = await super().find_handled(group, publications)
            if len(self.asked) == 2:
                asking.set()
                await heard.until(1)
                for _ in range(100):  # handled, but an answer is under way
                    await asyncio.sleep(0)
            return answer

    inbox = Slow()
    subscription = Scripted([first], [again(first, "2")])
    consumer = Consumer(d, subscription, events=[USER_JOINED], inbox=inbox)
    async with Running(consumer):
        await subscription.until_acked(2)
    assert heard.ids == [1]
    assert consumer.stats.duplicates == 1


async def test_old_answer_is_asked_for_again(
    d: AsyncEventDispatcher, heard: Heard, inbox: Batched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may have handled the publication while this one waited for its turn."""
    monkeypatch.setattr(module, "ANSWER_HOLDS", 0.0)
    second = delivery(2)

    @d.listen("user.joined")
    async def let_another_handle_the_second(event: UserJoined) -> None:
        inbox.seen.add(publication_of(second))

    subscription = Scripted([delivery(1), second])
    consumer = Consumer(d, subscription, events=[USER_JOINED], inbox=inbox)
    async with Running(consumer):
        await subscription.until_acked(2)
    assert heard.ids == [1]
    assert consumer.stats.duplicates == 1


async def test_answers_that_nobody_uses_are_forgotten(
    d: AsyncEventDispatcher, heard: Heard, inbox: Batched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of messages that are skipped, or that another consumer has taken over."""
    monkeypatch.setattr(module, "ANSWER_HOLDS", -1.0)
    raws = [
        JSON.encode(to_message(UserJoined(n), name="user.joined", kind="ecst"), Origin("own", "x")) for n in range(90)
    ]
    own = [Delivery(raw, "events", JSON, str(n)) for n, raw in enumerate(raws)]
    subscription = Scripted(*[own[n : n + 10] for n in range(0, 90, 10)])
    subscription.app = "own"
    consumer = Consumer(d, subscription, events=[USER_JOINED], own="skip", inbox=inbox)
    async with Running(consumer):
        await subscription.until_acked(90)
        known = consumer._run_state.known  # nothing else shows the memory
        assert known is not None and len(known._answers) <= 10
    assert consumer.stats.skipped == 90 and heard.ids == []


# -- failures -------------------------------------------------------------------------------------------------


async def test_failed_attempt_is_asked_about_again(d: AsyncEventDispatcher, inbox: Batched) -> None:
    attempts: list[int] = []

    @d.listen("user.joined")
    async def fail_once(event: UserJoined) -> None:
        attempts.append(event.user_id)
        if attempts == [1]:
            raise ValueError("no")

    item = delivery(1)
    subscription = Scripted([item])
    async with Running(Consumer(d, subscription, events=[USER_JOINED], inbox=inbox, on_error=lambda *_: None)):
        await subscription.until_acked(1)
    assert attempts == [1, 1]
    assert inbox.asked == [[publication_of(item)]] * 2
    assert inbox.told == [[publication_of(item)]]


async def test_inbox_that_is_away_is_waited_for_and_costs_no_attempt(
    d: AsyncEventDispatcher, heard: Heard, inbox: Batched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is away each delivery is asked about by itself, and again in batches when it is back."""
    monkeypatch.setattr("silbo.consumer.attempts.INBOX_RETRY", 0.01)
    inbox.away = 7
    first = [delivery(1, key="a"), delivery(2, key="a")]
    later = [delivery(3, key="a"), delivery(4, key="a")]
    subscription = Scripted(first, later)
    consumer = Consumer(d, subscription, events=[USER_JOINED], inbox=inbox, max_attempts=2)
    async with Running(consumer):
        await subscription.until_acked(4)
        subscription.batches.append([delivery(5), delivery(6)])
        await subscription.until_acked(6)
    assert heard.ids == [1, 2, 3, 4, 5, 6]
    assert (consumer.stats.failed, dict(subscription.attempts)) == (0, {})
    assert [len(asked) for asked in inbox.asked] == [2, *[1] * 10, 2]


async def test_stop_does_not_wait_for_an_inbox_that_does_not_answer(d: AsyncEventDispatcher, heard: Heard) -> None:
    """The messages that the inbox was asked about come again."""
    asked = asyncio.Event()

    class Silent(Batched):
        async def find_handled(self, group: str, publications: Sequence[str]) -> list[str]:
            asked.set()
            return await asyncio.Future[list[str]]()

    subscription = Scripted([delivery(1), delivery(2)])
    async with Running(Consumer(d, subscription, events=[USER_JOINED], inbox=Silent(), drain=0.1)) as consumer:
        await asked.wait()
        consumer.stop()
    assert (heard.ids, subscription.acked) == ([], [])


async def test_publication_that_can_never_be_stored_is_the_only_dead_letter_of_its_batch(
    d: AsyncEventDispatcher, heard: Heard
) -> None:
    items = [delivery(n) for n in range(1, 4)]

    class Refusing(Batched):
        async def find_handled(self, group: str, publications: Sequence[str]) -> list[str]:
            if publication_of(items[1]) in publications:
                raise MessageInvalid("refused")
            return await super().find_handled(group, publications)

    subscription = Scripted(items)
    consumer = Consumer(d, subscription, events=[USER_JOINED], inbox=Refusing(), on_error=lambda *_: None)
    async with Running(consumer):
        await subscription.until_acked(3)
    assert heard.ids == [1, 3]
    assert [(entry_id, attempts) for entry_id, _, attempts in subscription.buried] == [("2", 0)]


async def test_unheard_is_neither_asked_about_nor_remembered(heard: Heard, inbox: Batched) -> None:
    """Until somebody listens: then that listener's effect is remembered, though nothing has been read since."""
    only = AsyncEventDispatcher()
    only.add_listener("user.left", heard.hear)

    class Adding(Scripted):
        async def receive(self, limit: int) -> Any:
            items = await super().receive(limit)
            if items and items[0].id == "2":
                asyncio.get_running_loop().call_soon(only.add_listener, "user.joined", heard.hear)
            return items

    subscription = Adding([delivery(1)], [delivery(2), delivery(3)])
    consumer = Consumer(only, subscription, events=[USER_JOINED], inbox=inbox)
    async with Running(consumer):
        await subscription.until_acked(3)
    assert heard.ids == [2, 3]
    assert len([publication for asked in inbox.asked for publication in asked]) == 2
    assert (len(inbox.seen), consumer.stats.unheard, consumer.stats.handled) == (2, 1, 2)


# -- which inboxes --------------------------------------------------------------------------------------------


class Overriding(Batched):
    @asynccontextmanager
    async def handling(self, group: str, publication: str) -> AsyncIterator[bool]:
        yield publication not in self.seen


class OverridingAll(Overriding):
    async def find_handled(self, group: str, publications: Sequence[str]) -> list[str]:
        return []

    async def remember(self, group: str, publications: Sequence[str]) -> None: ...


class Half(Single):
    async def find_handled(self, group: str, publications: Sequence[str]) -> list[str]:
        return []


def test_inboxes_that_are_asked_in_batches() -> None:
    """A subclass that overrides ``handling`` alone does not lose its override."""
    asked: list[tuple[Inbox | None, bool]] = [
        (Batched(), True),
        (OverridingAll(), True),
        (Overriding(), False),
        (Single(), False),
        (Half(), False),
        (None, False),
    ]
    assert [find_batch_inbox(inbox) is not None for inbox, _ in asked] == [expected for _, expected in asked]
    inbox: BatchInbox = RedisInbox(Redis())
    assert find_batch_inbox(inbox) is inbox


# -- the two ways are one -------------------------------------------------------------------------------------

ITEMS = st.lists(
    st.tuples(
        st.integers(0, 5),  # the publication
        st.sampled_from(["at once", "waits", "fails once", "fails"]),
        st.sampled_from([1, 1, 1, 2]),  # the attempt
    ),
    min_size=1,
    max_size=12,
)


async def play(inbox: Single, items: list[tuple[int, str, int]], reads: int, concurrency: int) -> dict[str, Any]:
    """Return what a consumer with this inbox makes of the deliveries."""
    dispatcher = AsyncEventDispatcher()
    acts: dict[int, str] = {}
    effects: Counter[int] = Counter()
    failures: Counter[int] = Counter()
    raws: dict[int, bytes] = {}
    for number, act, _ in items:
        acts.setdefault(number, act)
        if number not in raws:
            message = to_message(UserJoined(number), name="user.joined", kind="ecst", key=str(number))
            raws[number] = JSON.encode(message, Origin("other", "x"))

    @dispatcher.listen("user.joined")
    async def act_out(event: UserJoined) -> None:
        act = acts[event.user_id]
        if act == "waits":
            await asyncio.sleep(0)
        elif act == "fails" or (act == "fails once" and not failures[event.user_id]):
            failures[event.user_id] += 1
            raise ValueError("no")
        effects[event.user_id] += 1

    deliveries = [
        Delivery(raws[number], "events", JSON, str(place), attempt) for place, (number, _, attempt) in enumerate(items)
    ]
    size = -(-len(deliveries) // reads)
    subscription = Scripted(*[deliveries[n : n + size] for n in range(0, len(deliveries), size)])
    consumer = Consumer(
        dispatcher,
        subscription,
        events=[USER_JOINED],
        inbox=inbox,
        concurrency=concurrency,
        max_attempts=2,
        on_error=lambda *_: None,
    )
    async with Running(consumer):
        await subscription.until_acked(len(deliveries))
    stats = consumer.stats
    return {
        "effects": effects,
        "failures": failures,
        "acknowledged": sorted(subscription.acked),
        "dead": sorted(subscription.buried),
        "counts": (stats.handled, stats.duplicates, stats.failed, stats.retried, stats.dead),
        "remembered": len(inbox.seen),
    }


@given(ITEMS, st.integers(1, 4), st.sampled_from([1, 3]), st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_batches_change_nothing(items: list[tuple[int, str, int]], reads: int, concurrency: int, away: int) -> None:
    """Of random deliveries, some of them of one publication, some failing, given out before, or while the inbox is away."""

    async def compare() -> None:
        results = []
        for inbox in (Single(), Batched()):
            inbox.away = away
            results.append(await play(inbox, items, reads, concurrency))
        assert results[0] == results[1]
        assert all(many == 1 for many in results[1]["effects"].values())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("silbo.consumer.attempts.INBOX_RETRY", 0.001)
        asyncio.run(compare())
