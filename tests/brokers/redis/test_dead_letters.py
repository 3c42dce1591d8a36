"""Dead letters can be looked at, given back to the one group that gave them up, and deleted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from silbo.brokers.redis import DeadLetter, DeadLetters, RedisStreams
from silbo.errors import AddressInvalid, BrokerUnavailable, MessageInvalid
from silbo.message import Delivery, Origin
from silbo.wire.formats import JSON
from tests.support.redis_streams import has_connections, message, number, opened, receive, stored
from tools.redis_server import RedisServer

STREAM = "silbo:{events}"
DEAD = f"{STREAM}:dead"
ATTEMPTS = f"{STREAM}:attempts:billing"


@pytest.fixture
async def dead(streams_client: Redis) -> AsyncIterator[DeadLetters]:
    async with DeadLetters(streams_client) as letters:
        yield letters


async def bury(admin: Redis, *numbers: int, group: str = "billing") -> list[str]:
    """Messages that are in the stream and that a group has given up; their ids as dead letters."""
    letters = []
    with suppress(ResponseError):
        await admin.xgroup_create(STREAM, group, "0", mkstream=True)
    for n in numbers:
        raw = JSON.encode(message(n), Origin("web", "1"))
        entry = await admin.xadd(STREAM, {"message": raw})
        fields = {"message": raw, "group": group, "stream": STREAM, "id": entry, "error": f"ValueError: {n}"}
        fields |= {"attempts": "5", "app": "biller", "consumer": "c1", "time": entry.split(b"-")[0]}
        letters.append((await admin.xadd(DEAD, fields)).decode())
    await admin.xgroup_setid(STREAM, group, "$")
    return letters


async def numbers_of(dead: DeadLetters, **selection: str) -> list[int]:
    return [letter.message().payload["n"] for letter in await dead.list(**selection)]


async def pending(admin: Redis, group: str = "billing") -> list[int]:
    """The numbers of what a group has to handle again: what a consumer would claim, however patient it is."""
    century = 50 * 365 * 24 * 3600 * 1000
    claimed = await admin.xautoclaim(STREAM, group, "test", century)
    return [JSON.decode(fields[b"message"]).payload["n"] for _, fields in claimed[1]]


# -- with a group -------------------------------------------------------------------------------------------


@pytest.mark.every_redis
async def test_what_a_group_gave_up_comes_again_to_that_group_alone(
    admin: Redis, streams: RedisStreams, dead: DeadLetters
) -> None:
    """The others have long handled it; and its attempts count from 1."""
    billing = streams.group("billing", start="oldest", claim_after=60)
    mail = streams.group("mail", start="oldest", claim_after=60)
    async with opened(billing) as failing, opened(mail) as other:
        await streams.publish(message(1), message(2))
        await other.ack(*await receive(other, 2))
        first, second = await receive(failing, 2)
        assert isinstance(first, Delivery)
        assert await failing.count(first) == 1
        assert await failing.count(first) == 2
        assert await failing.bury(first, error="ValueError: no", attempts=2)
        await failing.ack(second)
        (letter,) = await dead.list()
        assert (letter.group, letter.stream, letter.entry) == ("billing", first.address, first.id)
        assert (letter.error, letter.attempts, letter.app, letter.raw) == ("ValueError: no", 2, "web", first.raw)
        assert (await dead.retry([letter.id])).returned == 1
        assert await dead.count() == 0
    async with opened(billing) as again, opened(mail) as other:
        (delivery,) = await receive(again, 1)
        assert isinstance(delivery, Delivery)
        assert (number(delivery), delivery.id) == (1, first.id)
        assert delivery.attempt > 1
        assert await again.count(delivery) == 1
        await streams.publish(message(3))
        assert [number(item) for item in await receive(other, 1)] == [3]


# -- look ---------------------------------------------------------------------------------------------------


@pytest.mark.every_redis
async def test_a_dead_letter_says_what_happened(admin: Redis, dead: DeadLetters) -> None:
    begin = datetime.now(UTC) - timedelta(milliseconds=1)
    first, _ = await bury(admin, 1, 2)
    letter = await dead.get(first)
    assert isinstance(letter, DeadLetter)
    assert letter == (await dead.list())[0]
    assert (letter.id, letter.group, letter.stream, letter.app) == (first, "billing", STREAM, "biller")
    assert (letter.error, letter.attempts, letter.consumer) == ("ValueError: 1", 5, "c1")
    assert begin <= letter.time <= datetime.now(UTC)
    assert letter.message().payload == {"n": 1}
    assert letter.entry == (await admin.xrange(STREAM))[0][0].decode()
    assert await dead.get("1-1") is None


async def test_the_list_comes_in_pages(admin: Redis, dead: DeadLetters) -> None:
    assert await dead.list() == []
    assert await dead.count() == 0
    for n in range(0, 250, 2):
        await bury(admin, n)
        await bury(admin, n + 1, group="mail")
    assert await dead.count() == 250
    assert await numbers_of(dead) == list(range(100))
    page = await dead.list(group="mail", limit=120)
    assert [letter.message().payload["n"] for letter in page] == list(range(1, 240, 2))
    assert await numbers_of(dead, group="mail", after=page[-1].id) == list(range(241, 250, 2))
    assert await dead.list(limit=0) == []


@pytest.mark.every_redis
async def test_groups_are_named_and_a_stream_that_is_not_there_has_none(admin: Redis, dead: DeadLetters) -> None:
    """So that whoever finds no dead letters can tell whether the names were right. Trouble is no answer."""
    assert await dead.groups() is None
    await bury(admin, 1)
    await bury(admin, 2, group="mail")
    assert await dead.groups() == ["billing", "mail"]
    await admin.xgroup_create(STREAM, b"caf\xe9", "0")  # another program's
    assert await dead.groups() == ["billing", "caf\\xe9", "mail"]
    await admin.set(STREAM, "no stream")
    with pytest.raises(BrokerUnavailable, match="WRONGTYPE"):
        await dead.groups()


async def test_what_others_wrote_can_be_seen_and_deleted(admin: Redis, dead: DeadLetters) -> None:
    await admin.xadd(
        DEAD, {"message": b"\xff", "error": b"\xff", "attempts": "many", "time": "now"}, id="1700000000000-5"
    )
    (letter,) = await dead.list()
    assert (letter.group, letter.entry, letter.attempts, letter.error) == ("", "", 0, "\ufffd")
    assert letter.time == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
    with pytest.raises(MessageInvalid):
        letter.message()
    await admin.xadd(DEAD, {"message": "x", "group": "billing", "id": "first"})
    await bury(admin, 1)
    retried = await dead.retry()
    assert retried.returned == 1
    assert len(retried.failed) == 2
    assert "not written by silbo" in retried.failed[letter.id]
    assert await dead.purge(list(retried.failed)) == 2


# -- retry --------------------------------------------------------------------------------------------------


@pytest.mark.every_redis
async def test_retry_of_some(admin: Redis, dead: DeadLetters) -> None:
    first, _, third = await bury(admin, 1, 2, 3)
    await admin.hset(ATTEMPTS, mapping={(await dead.list())[0].entry: "5", "1-1": "1"})
    done: list[int] = []
    retried = await dead.retry([third, first, first, "1-1"], progress=done.append)
    assert (retried.returned, retried.failed) == (2, {"1-1": "there is no such dead letter"})
    assert done == [3]
    assert await numbers_of(dead) == [2]
    assert await pending(admin) == [1, 3]
    assert await admin.hgetall(ATTEMPTS) == {b"1-1": b"1"}
    assert await dead.retry([]) == type(retried)()


@pytest.mark.every_redis
async def test_retry_of_all_or_of_a_group(admin: Redis, dead: DeadLetters) -> None:
    await bury(admin, *range(150))
    await bury(admin, *range(150, 155), group="mail")
    done: list[int] = []
    assert (await dead.retry(group="billing", progress=done.append)).returned == 150
    assert (done[0], done[-1]) == (20, 150)
    assert await numbers_of(dead) == list(range(150, 155))
    assert await pending(admin, "mail") == []
    assert (await dead.retry()).returned == 5
    assert await dead.count() == 0
    assert (await dead.retry()).returned == 0


async def test_retry_of_all_leaves_alone_what_dies_meanwhile(admin: Redis, dead: DeadLetters) -> None:
    """A consumer that fails at once would keep it busy for ever."""
    await bury(admin, *range(45))

    async def die_again() -> None:
        await bury(admin, 100)

    dying: list[asyncio.Task[None]] = []
    await dead.retry(progress=lambda _: dying.append(asyncio.ensure_future(die_again())))
    await asyncio.gather(*dying)
    assert len(dying) == 3
    assert await numbers_of(dead) == [100, 100, 100]


@pytest.mark.every_redis
async def test_two_who_retry_give_each_back_once(admin: Redis, streams_client: Redis, dead: DeadLetters) -> None:
    await bury(admin, *range(300))
    async with DeadLetters(streams_client) as other:
        results = await asyncio.gather(dead.retry(), other.retry())
    assert sum(result.returned for result in results) == 300
    assert [result.failed for result in results] == [{}, {}]
    assert await dead.count() == 0
    assert (await admin.xpending(STREAM, "billing"))["pending"] == 300


@pytest.mark.every_redis
async def test_entry_that_is_gone_stays_a_dead_letter(admin: Redis, dead: DeadLetters) -> None:
    """Trimmed by the retention; said so, and brought back for everybody only where that is asked for."""
    first, second = await bury(admin, 1, 2)
    entry = (await dead.list())[0].entry
    await admin.xdel(STREAM, entry)
    retried = await dead.retry()
    assert retried.returned == 1
    assert "gone from the stream" in retried.failed[first]
    assert await numbers_of(dead) == [1]
    assert await pending(admin) == [2]
    assert (await dead.retry([first, second], everybody=True)).returned == 1
    assert await stored(admin) == [2, 1]
    assert await dead.count() == 0
    assert (await admin.xpending(STREAM, "billing"))["pending"] == 1  # the new entry is any other


@pytest.mark.every_redis
async def test_everybody_adds_only_what_is_gone(admin: Redis, dead: DeadLetters) -> None:
    await bury(admin, 1)
    assert (await dead.retry(everybody=True)).returned == 1
    assert await stored(admin) == [1]
    assert await pending(admin) == [1]


@pytest.mark.every_redis
async def test_group_or_stream_that_is_gone_is_told(admin: Redis, dead: DeadLetters) -> None:
    (first,) = await bury(admin, 1)
    await admin.xgroup_destroy(STREAM, "billing")
    for _ in range(2):
        retried = await dead.retry()
        assert (retried.returned, retried.failed) == (0, {first: "its group does not exist any more"})
        await admin.delete(STREAM)
    assert await dead.count() == 1


@pytest.mark.one_server
@pytest.mark.every_redis
@pytest.mark.parametrize("everybody", [False, True])
async def test_retry_that_redis_refuses_loses_nothing(everybody: bool, admin: Redis, dead: DeadLetters) -> None:
    first, _ = await bury(admin, 1, 2)
    await admin.execute_command("REPLICAOF", "127.0.0.1", "1")
    with pytest.raises(BrokerUnavailable, match="READONLY"):
        await dead.retry(everybody=everybody)
    await admin.execute_command("REPLICAOF", "NO", "ONE")
    assert await dead.count() == 2
    await admin.delete(STREAM)
    await admin.set(STREAM, "a string")
    with pytest.raises(BrokerUnavailable, match="WRONGTYPE"):
        await dead.retry([first], everybody=everybody)
    assert await dead.count() == 2


@pytest.mark.every_redis
async def test_retry_works_above_maxmemory(admin: Redis, dead: DeadLetters) -> None:
    """It takes as much as it frees."""
    await bury(admin, 1, 2)
    await admin.xdel(STREAM, (await dead.list())[1].entry)
    await admin.config_set("maxmemory", 1)
    assert (await dead.retry(everybody=True)).returned == 2
    await admin.config_set("maxmemory", 0)
    assert await stored(admin) == [1, 2]


# -- purge --------------------------------------------------------------------------------------------------


@pytest.mark.every_redis
async def test_purge_of_some(admin: Redis, dead: DeadLetters) -> None:
    letters = await bury(admin, *range(205))
    done: list[int] = []
    assert await dead.purge([*letters[1:], letters[1], "1-1"], progress=done.append) == 204
    assert (done[0], done[-1]) == (100, 204)
    assert await numbers_of(dead) == [0]
    assert await dead.purge([]) == 0


@pytest.mark.every_redis
async def test_purge_before_a_time(admin: Redis, dead: DeadLetters) -> None:
    for n in range(350):
        await admin.xadd(DEAD, {"message": "x"}, id=f"1700000000{n:03}-7")
    middle = datetime.fromtimestamp(1_700_000_000, UTC)
    assert await dead.purge(before=middle) == 0
    assert await dead.purge(before=middle + timedelta(microseconds=1)) == 1
    done: list[int] = []
    assert await dead.purge(before=middle + timedelta(milliseconds=249), progress=done.append) == 248
    assert done == [100, 200, 248]
    assert (await dead.list())[0].id == "1700000000249-7"
    assert await dead.purge(before=datetime(1960, 1, 1, tzinfo=UTC)) == 0
    assert await dead.purge(before=datetime.now(UTC)) == 101
    assert await dead.count() == 0


@pytest.mark.every_redis
async def test_purge_of_a_group(admin: Redis, dead: DeadLetters) -> None:
    """Of this group alone, page by page; with a time, those of it that died before."""
    for n in range(250):
        await admin.xadd(DEAD, {"message": "x", "group": ("billing", "mail")[n % 2]}, id=f"1700000000{n:03}-7")
    middle = datetime.fromtimestamp(1_700_000_000, UTC) + timedelta(milliseconds=200)
    assert await dead.purge(group="nobody") == 0
    assert (await dead.count(group="billing"), await dead.count(group="nobody")) == (125, 0)
    assert await dead.purge(group="billing", before=middle) == 100
    assert [letter.id for letter in await dead.list(group="billing", limit=2)] == ["1700000000200-7", "1700000000202-7"]
    done: list[int] = []
    assert await dead.purge(group="mail", progress=done.append) == 125 and done[-1] == 125
    assert {letter.group for letter in await dead.list(limit=1000)} == {"billing"} and await dead.count() == 25
    assert await dead.purge(group="billing") == 25
    assert await dead.purge(group="billing") == 0


# -- mistakes, and a Redis that is away ----------------------------------------------------------------------


async def test_mistakes_are_told(dead: DeadLetters, streams_client: Redis) -> None:
    with pytest.raises(TypeError, match="ids is a list"):
        await dead.retry("1-1")
    with pytest.raises(ValueError, match="'5' is not the id of a dead letter"):
        await dead.retry(["1-1", "5"])
    with pytest.raises(ValueError, match="not the id"):
        await dead.get("+")
    with pytest.raises(ValueError, match="not the id"):
        await dead.list(after="x")
    with pytest.raises(ValueError, match="not both"):
        await dead.retry(["1-1"], group="billing")
    for mistake in (
        dead.purge(),
        dead.purge(["1-1"], before=datetime.now(UTC)),
        dead.purge(["1-1"], group="billing"),
    ):
        with pytest.raises(ValueError, match="by their ids, or of a group, or before a time"):
            await mistake
    with pytest.raises(AddressInvalid):
        DeadLetters(streams_client, stream="silbo:{events}")


async def test_redis_that_is_away_and_comes_back(own_redis: RedisServer, admin: Redis, streams_client: Redis) -> None:
    async with DeadLetters(streams_client, timeout=0.3) as dead:
        await bury(admin, 1)
        assert await numbers_of(dead) == [1]
        own_redis.pause()
        for call in (dead.count(), dead.list(), dead.retry(), dead.purge(before=datetime.now(UTC))):
            with pytest.raises(BrokerUnavailable, match="has not answered within 0.3 s"):
                await call
        own_redis.resume()
        assert await numbers_of(dead) == [1]
        await asyncio.to_thread(own_redis.kill)
        with pytest.raises(BrokerUnavailable, match="Redis at "):
            await dead.count()
        await asyncio.to_thread(own_redis.restart)
        assert await numbers_of(dead) == [1]
    await has_connections(admin, "streams", 0)


async def test_another_stream_and_prefix(admin: Redis) -> None:
    raw = JSON.encode(message(1), Origin("web", "1"))
    await admin.xgroup_create("shop:{orders}", "billing", "0", mkstream=True)
    entry = await admin.xadd("shop:{orders}", {"message": raw})
    await admin.xadd("shop:{orders}:dead", {"message": raw, "group": "billing", "id": entry})
    async with DeadLetters(admin, prefix="shop", stream="orders") as dead:
        assert (await dead.retry()).returned == 1
    assert (await admin.xpending("shop:{orders}", "billing"))["pending"] == 1


# -- entries of other programs ------------------------------------------------------------------------------

FOREIGN: dict[str, tuple[str, dict[str, str | bytes]]] = {
    "a time of 20 digits": ("*", {"time": "9" * 20, "group": "g"}),
    "a time beyond the year 9999": ("*", {"time": "9" * 18, "group": "g"}),
    "attempts of 5,000 digits": ("*", {"attempts": "9" * 5000, "group": "g", "message": "x"}),
    "attempts that int() refuses": ("*", {"attempts": "²".encode("latin-1"), "time": "-1"}),
    "an entry that is no id": ("*", {"group": "billing", "message": "x", "id": "1-1-1"}),
    "an entry beyond 64 bits": ("*", {"group": "billing", "message": "x", "id": f"{'9' * 20}-1"}),
    "an entry of 5,000 digits": ("*", {"group": "billing", "message": "x", "id": f"{'9' * 5000}-1"}),
    "no field of ours": ("*", {"hello": "world"}),
    "bytes": ("*", {b"\xff\x00".decode("latin-1"): b"\xfe\xff", "group": b"\xff"}),
    "the highest id of all": ("18446744073709551615-18446744073709551615", {"a": "b"}),
}


@pytest.mark.every_redis
@pytest.mark.parametrize("what", FOREIGN)
async def test_entry_of_another_program_is_shown_and_the_others_too(what: str, admin: Redis, dead: DeadLetters) -> None:
    """By list, get, count, retry and purge: as what it is, and without harm to the others."""
    (own,) = await bury(admin, 1)
    entry_id, fields = FOREIGN[what]
    foreign_id = (await admin.xadd(DEAD, fields, id=entry_id)).decode()  # type: ignore[arg-type]
    letters = await dead.list()
    assert [letter.id for letter in letters] == [own, foreign_id]
    assert [bool(letter.fields) for letter in letters] == [False, True]
    assert set(letters[1].fields) == {(name.encode().decode(errors="backslashreplace")) for name in fields}
    assert letters[1].time.astimezone(timezone(timedelta(hours=14))).year <= 9999
    assert await dead.get(foreign_id) == letters[1]
    assert await dead.count() == 2
    assert [letter.id for letter in await dead.list(group=letters[1].group)][-1:] == [foreign_id]
    retried = await dead.retry()
    assert retried.returned == 1
    assert retried.failed == {foreign_id: "it was not written by silbo: it names no group and no entry"}
    assert await dead.purge([foreign_id]) == 1
    assert await dead.count() == 0


async def test_id_beyond_64_bits_is_no_id(dead: DeadLetters) -> None:
    """Redis would refuse it, and that would look like an outage."""
    for wrong in ("18446744073709551616-0", "1-18446744073709551616", f"{'9' * 5000}-1", "\u0661-0"):
        with pytest.raises(ValueError, match="is not the id of a dead letter"):
            await dead.get(wrong)
    highest = "18446744073709551615-18446744073709551615"
    assert await dead.get(highest) is None
    assert await dead.list(after=highest) == []
