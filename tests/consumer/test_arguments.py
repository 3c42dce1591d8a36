"""What a consumer is not made of is said when it is made, in a line that says what belongs there."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from redis.asyncio import Redis

from silbo import AsyncEventDispatcher, Backoff, Consumer
from silbo.brokers.redis import RedisInbox, RedisStreams
from tests.support.consumer import Scripted


@pytest.mark.parametrize(
    ("wrong", "error", "told"),
    [
        ({"inbox": Redis()}, TypeError, r"inbox is an Inbox, as RedisInbox\(client\) or .*, not <redis"),
        ({"inbox": RedisInbox}, TypeError, r"inbox is an Inbox, as RedisInbox\(client\) or .*, not <class"),
        ({"on_error": "log"}, TypeError, "on_error is a function, sync or async, or None for the log, not 'log'"),
        ({"drain": "10"}, TypeError, "drain is a number of seconds, not '10'"),
        ({"drain": timedelta(seconds=1)}, TypeError, "drain is a number of seconds, not datetime"),
        ({"drain": -1}, ValueError, "drain is seconds, 0 or more, not -1"),
        ({"concurrency": "20"}, TypeError, "concurrency is a whole number, not '20'"),
        ({"concurrency": True}, TypeError, "concurrency is a whole number, not True"),
        ({"concurrency": 0}, ValueError, "concurrency is 1 or more, not 0"),
        ({"max_attempts": 2.5}, TypeError, "max_attempts is a whole number, not 2.5"),
        ({"max_attempts": 0}, ValueError, "max_attempts is 1 or more, not 0"),
        ({"backoff": 5}, TypeError, r"backoff is a Backoff\(initial=..., factor=..., cap=...\), not 5"),
    ],
)
def test_option_that_is_something_else(wrong: dict[str, Any], error: type[Exception], told: str) -> None:
    """It must not come out message by message: that costs each of them its attempts."""
    with pytest.raises(error, match=told):
        Consumer(AsyncEventDispatcher(), Scripted(), **wrong)


def test_dispatcher_and_subscription_in_the_other_order() -> None:
    wrong: Any = Scripted()
    with pytest.raises(TypeError, match="takes a dispatcher and a subscription"):
        Consumer(wrong, wrong)


def test_classes_in_place_of_objects() -> None:
    """They have the methods, and no self."""
    wrong: Any
    for wrong in ((AsyncEventDispatcher, Scripted()), (AsyncEventDispatcher(), Scripted)):
        with pytest.raises(TypeError, match=r"takes a dispatcher and a subscription, not .*<class"):
            Consumer(*wrong)


@pytest.mark.parametrize(
    ("wrong", "error", "told"),
    [
        ({"keep": "1d"}, TypeError, "keep is a number of seconds, not '1d'"),
        ({"keep": 0}, ValueError, "keep is seconds, more than 0, not 0"),
        ({"limit": "many"}, TypeError, "limit is a whole number, not 'many'"),
        ({"limit": 0}, ValueError, "limit is 1 or more, not 0"),
        ({"timeout": None}, TypeError, "timeout is a number of seconds, not None"),
    ],
)
def test_inbox_in_redis_that_is_made_of_something_else(wrong: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        RedisInbox(Redis(), **wrong)


def test_time_after_which_a_group_claims_is_seconds() -> None:
    wrong: Any = "30"
    with pytest.raises(TypeError, match="claim_after is a number of seconds, not '30'"):
        RedisStreams(Redis(), app="web").group("billing", start="new", claim_after=wrong)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"initial": "1"}, "initial is a number of seconds, not '1'"),
        ({"cap": timedelta(seconds=30)}, "cap is a number of seconds, not datetime"),
        ({"factor": "2"}, "factor is a number, not '2'"),
        ({"jitter": None}, "jitter is a number, not None"),
        ({"attempts": "5"}, "attempts is a whole number, not '5'"),
    ],
)
def test_backoff_that_is_made_of_something_else(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(TypeError, match=told):
        Backoff(**wrong)
