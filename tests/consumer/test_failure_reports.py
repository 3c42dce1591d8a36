"""What an operator reads: which message, in which group, how often, and what follows; a dead letter above all."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any

import pytest

from silbo import AsyncEventDispatcher
from silbo._retry import Backoff
from silbo.errors import BrokerUnavailable, DeliveryGivenUp, Gap
from silbo.message import Delivery
from tests.support.consumer import (
    USER_JOINED,
    Consumer,
    Heard,
    Running,
    Scripted,
    UserJoined,
    delivery,
)


def lines(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[Any]:
    return [record for record in caplog.records if record.levelno == level]


def fails(d: AsyncEventDispatcher) -> None:
    @d.listen("user.joined")
    async def fail(event: UserJoined) -> None:
        raise ValueError(f"user {event.user_id} is cursed")


async def test_failed_attempt_says_which_of_how_many_and_when_the_next_one_is(
    d: AsyncEventDispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    """In the text, for the usual formatter shows nothing else; and in the record, for those that do."""
    fails(d)
    subscription = Scripted([delivery(1)])
    consumer = Consumer(
        d, subscription, events=[USER_JOINED], max_attempts=2, backoff=Backoff(initial=1.2, cap=1.2, jitter=0)
    )
    async with Running(consumer):
        await subscription.until_acked(1)
    first, last = lines(caplog)
    assert first.message == (
        "user.joined 1 in group billing: attempt 1 of 2 failed, again in 1.2 s: ValueError: user 1 is cursed"
    )
    assert last.message == (
        "user.joined 1 in group billing: attempt 2 of 2 failed, the last one: ValueError: user 1 is cursed"
    )
    assert (first.event_name, first.group, first.delivery_id) == ("user.joined", "billing", "1")
    assert (first.address, first.attempt, first.max_attempts, first.withheld) == ("events", 1, 2, 0)
    assert first.msg == last.msg  # who groups lines by their template has one group
    assert "in fail" in logging.Formatter().format(first), "the traceback leads to the listener"


async def test_delay_that_is_told_is_the_one_that_is_waited(d: AsyncEventDispatcher, caplog: Any) -> None:
    """It is left to chance, and drawn once."""
    ran: list[float] = []

    @d.listen("user.joined")
    async def fail(event: Any) -> None:
        ran.append(asyncio.get_running_loop().time())
        raise ValueError("no")

    subscription = Scripted([delivery(1)])
    consumer = Consumer(d, subscription, max_attempts=2, backoff=Backoff(initial=0.6, cap=0.6, jitter=0.9))
    async with Running(consumer):
        await subscription.until_acked(1)
    told = float(re.findall(r"again in (.*) s:", lines(caplog)[0].message)[0])
    assert ran[1] - ran[0] == pytest.approx(told, abs=0.15)


async def test_dead_letter_is_an_error_in_the_log_whether_there_is_a_hook_or_not(
    d: AsyncEventDispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody looks at it again unless he is told; the hook gets an error of its own, with the last one behind it."""
    fails(d)
    errors: list[Any] = []
    subscription = Scripted([delivery(7)])
    consumer = Consumer(
        d,
        subscription,
        events=[USER_JOINED],
        max_attempts=2,
        on_error=lambda error, what: errors.append((error, what)),
    )
    async with Running(consumer):
        await subscription.until_acked(1)
    *failures, (given_up, what) = errors
    assert [type(error) for error, _ in failures] == [ValueError, ValueError]
    assert isinstance(given_up, DeliveryGivenUp)
    assert (given_up.name, given_up.group, given_up.delivery_id) == ("user.joined", "billing", "7")
    assert (given_up.attempts, given_up.problem) == (2, "ValueError: user 7 is cursed")
    assert given_up.__cause__ is failures[1][0]
    assert (what.id, what.attempt) == ("7", 2)
    (line,) = lines(caplog, logging.ERROR)
    assert line.message == (
        "dead letter: user.joined 7 in group billing: given up after 2 attempts: ValueError: user 7 is cursed"
    )
    assert (line.group, line.delivery_id, line.attempts) == ("billing", "7", 2)
    assert lines(caplog) == []


async def test_dead_letter_that_was_not_added_is_not_told(d: AsyncEventDispatcher, caplog: Any) -> None:
    """Another consumer has it: it may yet end well."""

    class Taken(Scripted):
        async def bury(self, delivery: Delivery, *, error: str, attempts: int) -> bool:
            await super().bury(delivery, error=error, attempts=attempts)
            return False

    fails(d)
    subscription = Taken([delivery(1)])
    async with Running(Consumer(d, subscription, events=[USER_JOINED], max_attempts=1)):
        await subscription.until_acked(1)
    assert lines(caplog, logging.ERROR) == []
    assert len(lines(caplog)) == 1


async def test_flood_of_dead_letters_is_counted_and_no_one_is_left_out(
    d: AsyncEventDispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    """A thousand poisonous messages are some lines, apart from those of the failures; together they tell of all."""
    fails(d)
    many = 1000
    subscription = Scripted(*[[delivery(10 * n + k) for k in range(10)] for n in range(many // 10)])
    async with Running(Consumer(d, subscription, events=[USER_JOINED], max_attempts=1)) as consumer:
        await subscription.until_acked(many)
    assert consumer.stats.dead == many
    for level in (logging.ERROR, logging.WARNING):
        told = lines(caplog, level)
        assert 2 <= len(told) <= 20
        assert sum(1 + line.withheld for line in told) == many


async def test_last_of_a_burst_is_told_a_second_later(d: AsyncEventDispatcher, caplog: Any) -> None:
    """Two dead letters in one second, and then no more: each has its line."""
    fails(d)
    subscription = Scripted([delivery(1), delivery(2)])
    async with Running(Consumer(d, subscription, events=[USER_JOINED], max_attempts=1)):
        await subscription.until_acked(2)
        async with asyncio.timeout(10):
            while len(lines(caplog, logging.ERROR)) < 2:
                await asyncio.sleep(0.05)
    assert [line.delivery_id for line in lines(caplog, logging.ERROR)] == ["1", "2"]
    first, second = lines(caplog, logging.ERROR)
    assert 0.9 < second.created - first.created < 5


async def test_what_can_not_be_tried_again_says_so(d: AsyncEventDispatcher, caplog: pytest.LogCaptureFixture) -> None:
    """Pub/Sub keeps nothing."""
    fails(d)
    heard = Heard()
    d.add_listener("user.joined", heard.hear, priority=-1)
    subscription = Scripted([Gap("events", "cut off", count=3), delivery(1, kept=False)])
    subscription.name = ""
    async with Running(Consumer(d, subscription, events=[USER_JOINED])):
        await heard.until(1)
    gap, failure = [line.message for line in lines(caplog)]
    assert gap == "gap: events: 3 messages may have been missed: cut off"
    assert failure == "user.joined from events: failed, and is not tried again: ValueError: user 1 is cursed"


async def test_failure_at_the_stop_is_left_to_the_others(d: AsyncEventDispatcher, caplog: Any) -> None:
    """It is not said to come again here."""
    begun, release = asyncio.Event(), asyncio.Event()

    @d.listen("user.joined")
    async def fail(event: Any) -> None:
        begun.set()
        await release.wait()
        raise ValueError("no")

    consumer = Consumer(d, Scripted([delivery(1)]))
    async with Running(consumer):
        await begun.wait()
        consumer.stop()
        release.set()
    (line,) = lines(caplog)
    assert "attempt 1 of 5 failed, left to the group's other consumers: " in line.message


async def test_error_without_a_text_of_its_own_is_a_failure_like_any_other(
    d: AsyncEventDispatcher, caplog: Any
) -> None:
    """A defect in an error's own ``__str__`` must not end the consumer."""

    class Broken(Exception):
        def __str__(self) -> str:
            raise ZeroDivisionError

    @d.listen("user.joined")
    async def fail(event: Any) -> None:
        raise Broken

    subscription = Scripted([delivery(1)])
    async with Running(Consumer(d, subscription, max_attempts=1)):
        await subscription.until_acked(1)
    assert subscription.buried == [("1", "Broken", 1)]
    (line,) = lines(caplog, logging.ERROR)
    assert line.message.endswith("given up after 1 attempt: Broken: (it has no text)")


async def test_name_from_the_wire_makes_no_lines_of_its_own(d: AsyncEventDispatcher, caplog: Any) -> None:
    """Whoever may publish could write an operator's log else."""
    raw = delivery(1).raw.replace(b'"user.joined"', b'"user.*\\nERROR all is lost"')
    subscription = Scripted([delivery(1, raw=raw)])
    async with Running(Consumer(d, subscription)):
        await subscription.until_acked(1)
    assert len(caplog.records) == 2
    assert all("\n" not in record.message for record in caplog.records)


async def test_outage_is_one_line_however_many_calls_notice_it(d: AsyncEventDispatcher, caplog: Any) -> None:
    """Reading, acknowledging and counting fail together; it is over when all of them have had their answer."""

    class Away(Scripted):
        acks = 3

        async def ack(self, *deliveries: Delivery) -> None:
            if self.acks:
                self.acks -= 1
                raise BrokerUnavailable("can't acknowledge")
            await super().ack(*deliveries)

    outage = [BrokerUnavailable("can't read") for _ in range(3)]
    subscription = Away([delivery(1)], *outage, [delivery(2)])
    heard = Heard()
    d.add_subscriber(heard)
    async with Running(Consumer(d, subscription, events=[USER_JOINED])):
        await subscription.until_acked(2)
    away, back = lines(caplog)
    assert away.message.startswith("broker unavailable, trying again: can't ")
    assert re.fullmatch(r"broker back after [\d.]+ s", back.message)
    assert (away.group, back.group) == ("billing", "billing")
    assert away.exc_info is None
