"""`silbo dead` on what a real group gave up."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from redis.asyncio import Redis

from chaos.faketime import wound
from silbo._process import find_process
from silbo.brokers.redis import RedisStreams
from silbo.message import Delivery, Message
from silbo.protocols import Receiver
from silbo.shards import place
from tests.support.command_line import SILBO, Done, Run, message, silbo, terminal
from tests.support.faketime import require_faketime
from tests.support.redis_streams import opened, receive


class Dead:
    """The command line on one stream, and groups that give up what they receive."""

    def __init__(self, redis: Redis, url: str, prefix: str) -> None:
        self.redis, self.prefix, self.stream = redis, prefix, f"{prefix}:{{events}}"
        self.where = ("--redis", url, "--prefix", prefix)

    async def __call__(self, name: str, *arguments: object) -> Done:
        return await silbo("dead", name, *self.where, *arguments)

    async def bury(self, group: str, many: int, *, raw: bytes | None = None) -> list[str]:
        """Publish, receive as this group, and give up; the ids of the dead letters."""
        async with RedisStreams(self.redis, app="shop", prefix=self.prefix) as streams:
            receiver: Receiver = await streams.group(group, start="new").open()
            try:
                if raw is None:
                    await streams.publish(*(message(number) for number in range(many)))
                else:
                    await self.redis.xadd(self.stream, {"message": raw})
                received: list[Any] = []
                async with asyncio.timeout(10):
                    while len(received) < many:
                        received += await receiver.receive(many)
                for delivery in received:
                    assert isinstance(delivery, Delivery)
                    assert await receiver.bury(delivery, error="ValueError: no such order", attempts=5)
            finally:
                await receiver.aclose()
        return (await self.ids())[-many:]

    async def ids(self) -> list[str]:
        entries: Any = await self.redis.xrange(f"{self.stream}:dead")
        return [entry.decode() for entry, _ in entries]

    async def pending(self, group: str) -> int:
        return int((await self.redis.xpending(self.stream, group))["pending"])


@pytest.fixture
def dead(redis: Redis, redis_url: str, prefix: str) -> Dead:
    return Dead(redis, redis_url, prefix)


async def test_dead_letters_are_listed(dead: Dead) -> None:
    """Oldest first, page by page, of one group or all; the same for people and for programs."""
    billing, mail = await dead.bury("billing", 3), await dead.bury("mail", 1)
    await dead.redis.xgroup_create(dead.stream, "search", "$")
    table, every, page, rest, one, none, program = await asyncio.gather(
        dead("list"),
        dead("list", "--json"),
        dead("list", "--json", "--limit", 2),
        dead("list", "--json", "--after", billing[1]),
        dead("list", "--json", "--group", "mail"),
        dead("list", "--group", "search"),
        dead("list", "--group", "search", "--json"),
    )
    assert [line.split()[:3] for line in table.out.splitlines()[2:]] == [
        *([letter, "billing", "order.paid"] for letter in billing),
        [mail[0], "mail", "order.paid"],
    ]
    assert [letter["id"] for letter in every.objects] == billing + mail
    assert [letter["id"] for letter in page.objects] == billing[:2] and f"--after {billing[1]}" in page.err
    assert [letter["id"] for letter in rest.objects] == [billing[2], *mail] and rest.err == ""
    assert one.object["id"] == mail[0]
    assert (none.code, none.out, none.err) == (program.code, program.out, program.err) == (0, "", "no dead letters\n")


async def test_mistaken_name_does_not_look_as_if_nothing_were_wrong(dead: Dead) -> None:
    """An alarm that rests on this command must not be fooled by a typing error: exit code 1, and a line that says why."""
    await dead.bury("billing", 1)
    commands = (
        ("list",),
        ("list", "--json"),
        ("count",),
        ("show", "1-1"),
        ("retry", "--all", "--yes"),
        ("purge", "1-1", "--yes"),
    )
    done = await asyncio.gather(*(dead(*command, "--stream", "nosuch") for command in commands))
    for each in done:
        assert each.code == 1 and f"silbo: there is no stream {dead.prefix}:{{nosuch}}: " in each.err
        assert "or Redis refuses writes: silbo doctor tells" in each.err
    assert (done[0].out, done[1].out, done[2].out) == ("", "", "")
    of_nobody = (("list", "--json"), ("count",), ("retry", "--yes"), ("purge", "--yes"))
    for each in await asyncio.gather(*(dead(*command, "--group", "nosuch") for command in of_nobody)):
        assert (each.code, each.err) == (1, f"silbo: there is no group nosuch at the stream {dead.stream}\n")


async def test_dead_letters_are_counted(dead: Dead) -> None:
    """Of all groups or of one, and without anything of their messages: an alarm's answer goes into logs."""
    await dead.redis.xgroup_create(dead.stream, "search", "$", mkstream=True)
    none = await dead("count")
    assert (none.code, none.out, none.err) == (0, "0\n", "")
    await dead.bury("billing", 2)
    await dead.bury("mail", 1)
    text, program, mail = await asyncio.gather(
        dead("count"), dead("count", "--json"), dead("count", "--group", "mail", "--json")
    )
    assert (text.code, text.out) == (0, "3\n") and program.object == {"dead": 3} and mail.object == {"dead": 1}


async def test_dead_letters_of_a_group_and_a_stream_that_are_gone_are_listed(dead: Dead) -> None:
    (letter,) = await dead.bury("billing", 1)
    await dead.redis.delete(dead.stream)
    done = await dead("list", "--group", "billing", "--json")
    assert (done.code, done.object["id"], done.err) == (0, letter, "")


async def test_dead_letter_is_shown_with_its_message(dead: Dead) -> None:
    (letter,) = await dead.bury("billing", 1)
    text, program, missing = await asyncio.gather(
        dead("show", letter), dead("show", letter, "--json"), dead("show", "1-1", "--json")
    )
    shown = program.object
    assert (shown["id"], shown["group"], shown["attempts"]) == (letter, "billing", 5)
    assert (shown["stream"], shown["error"]) == (dead.stream, "ValueError: no such order")
    assert shown["message"]["payload"] == {"number": 0} and shown["raw"] is None
    assert "ValueError: no such order" in text.out and '"number": 0' in text.out
    assert (missing.code, missing.out) == (1, "") and "1-1" in missing.err


async def test_malformed_message_is_shown_as_it_came(dead: Dead) -> None:
    (letter,) = await dead.bury("billing", 1, raw=b'{"not": \xff\x1b[31m')
    text, program, table = await asyncio.gather(dead("show", letter), dead("show", letter, "--json"), dead("list"))
    assert program.object["message"] is None and program.object["raw"] == '{"not": \\xff\x1b[31m'
    assert r"\x1b[31m" in text.out and "\x1b" not in text.out and letter in table.out


async def test_retry_gives_it_back_to_its_group_alone(dead: Dead) -> None:
    first, second = await dead.bury("billing", 2)
    (other,) = await dead.bury("mail", 1)
    done = await dead("retry", first)
    assert (done.code, done.out) == (0, "1 dead letter given back\n")
    assert await dead.ids() == [second, other]
    assert (await dead.pending("billing"), await dead.pending("mail")) == (1, 0)
    group = await dead("retry", "--group", "mail", "--yes", "--json")
    assert group.object == {"returned": 1, "failed": {}} and await dead.ids() == [second]
    rest = await dead("retry", "--all", "--yes", "--json")
    assert rest.object == {"returned": 1, "failed": {}} and await dead.pending("billing") == 2


async def test_what_cannot_be_retried_stays_and_says_why(dead: Dead) -> None:
    """An entry that is gone from the stream comes back with --everybody only, for it comes back to all."""
    letters = await dead.bury("billing", 2)
    gone = (await dead("show", letters[0], "--json")).object["entry"]
    await dead.redis.xdel(dead.stream, gone)
    done = await dead("retry", *letters, "9-9", "--json")
    assert done.code == 1 and done.object["returned"] == 1 and set(done.object["failed"]) == {letters[0], "9-9"}
    assert f"{letters[0]}: its entry is gone" in done.err and "9-9: there is no such" in done.err
    assert await dead.ids() == [letters[0]]
    refused = await dead("retry", letters[0], "--everybody")
    assert refused.code == 2 and "every group" in refused.err
    before = await dead.redis.xlen(dead.stream)
    anew = await dead("retry", letters[0], "--everybody", "--yes", "--json")
    assert anew.object["returned"] == 1 and await dead.redis.xlen(dead.stream) == before + 1


async def test_dead_letters_are_purged(dead: Dead) -> None:
    letters = await dead.bury("billing", 4)
    for arguments in ([letters[0]], ["--before", "now"]):
        refused = await dead("purge", *arguments)
        assert refused.code == 2 and "--yes" in refused.err
    one = await dead("purge", letters[0], letters[0], "1-1", "--yes", "--json")
    assert (one.code, one.object) == (1, {"purged": 1}) and "1 of the 2 are no dead letters" in one.err
    young = await dead("purge", "--before", "1h", "--yes")
    assert (young.code, young.out) == (0, "0 dead letters deleted\n") and await dead.ids() == letters[1:]
    rest = await dead("purge", "--before", "now", "--yes", "--json")
    assert rest.object == {"purged": 3} and await dead.ids() == []


async def test_it_asks_and_shows_progress_at_a_terminal(dead: Dead) -> None:
    await dead.bury("billing", 3)
    await dead.bury("mail", 1)
    for typed, code, left, *which in (("n\n", 1, 4, "--all"), ("y\n", 0, 1, "--group", "billing")):
        async with terminal("dead", "retry", *which, *dead.where) as screen:
            of = "4 dead letters" if which == ["--all"] else "3 dead letters of billing"
            await screen.until(f"Give {of} back to the group? [y/N]")
            screen.type(typed)
            assert await screen.end() == code, screen.shown
        assert len(await dead.ids()) == left
    assert "3/3" in screen.shown


async def test_duration_counts_back_from_the_clock_of_redis(dead: Dead) -> None:
    """This machine's clock may differ."""
    require_faketime()
    await dead.bury("billing", 1)
    for clock, before, purged in (("+1h", "30m", 0), ("-1h", "now", 1)):
        arguments = ("dead", "purge", *dead.where, "--before", before, "--yes", "--json")
        done = await silbo(*arguments, env=wound(clock), command=SILBO)
        assert done.object == {"purged": purged}


async def test_dead_letters_of_one_group_are_purged(dead: Dead) -> None:
    await dead.bury("billing", 2)
    (mail,) = await dead.bury("mail", 1)
    refused = await dead("purge", "--group", "billing", "--before", "2026-03-07")
    assert refused.code == 2 and "all dead letters of billing from before 2026-03-07 00:00:00Z" in refused.err
    young = await dead("purge", "--group", "billing", "--before", "1h", "--yes")
    assert (young.code, young.out) == (0, "0 dead letters deleted\n")
    done = await dead("purge", "--group", "billing", "--yes", "--json")
    assert (done.code, done.object) == (0, {"purged": 2}) and await dead.ids() == [mail]


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["retry"], "--all"),
        (["retry", "1-1", "--all"], "--all"),
        (["retry", "--group", "billing", "--all"], "--all"),
        (["retry", "first"], "1700000000000-0"),
        (["purge"], "--before"),
        (["purge", "1-1", "--before", "now"], "--before"),
        (["purge", "1-1", "--group", "billing"], "--group"),
        (["show"], "ID"),
        (["list", "--limit", "0"], "whole number"),
        (["list", "--stream", "{events}"], "{events}"),
    ],
)
def test_wrong_command_exits_with_2(arguments: list[str], hint: str, run: Run) -> None:
    done = run("dead", *arguments, "--redis", "redis://localhost:1")
    assert (done.code, done.out) == (2, "") and hint in done.err.splitlines()[-1]


async def test_redis_that_is_away_is_an_error_of_one_line() -> None:
    for url, name in (("redis://127.0.0.1:1/0", "127.0.0.1:1"), ("unix:///nowhere/redis.sock", "/nowhere/redis.sock")):
        done = await silbo("dead", "list", env={"SILBO_REDIS_URL": url})
        assert (done.code, done.out, len(done.err.splitlines())) == (1, "", 1)
        assert name in done.err and "can't be reached" in done.err and "sent" not in done.err


async def test_entry_of_another_program_is_listed_shown_and_purged(dead: Dead) -> None:
    """As what it is; control characters in it do not reach the terminal, and the others are listed as ever."""
    (own,) = await dead.bury("billing", 1)
    added: Any = await dead.redis.xadd(f"{dead.stream}:dead", {"hello": "wor\x1bld", "time": "9" * 20})
    foreign = added.decode()
    listed, as_json, shown, retried = [
        await dead(*arguments)
        for arguments in (
            ("list",),
            ("list", "--json"),
            ("show", foreign),
            ("retry", foreign),
        )
    ]
    assert own in listed.out
    assert "no dead letter of silbo's" in " ".join(listed.out.split())
    rows = [json.loads(line) for line in as_json.out.splitlines()]
    assert [row["id"] for row in rows] == [own, foreign]
    assert [row["fields"] for row in rows] == [None, {"hello": "wor\x1bld", "time": "9" * 20}]
    assert "field     hello: wor\\x1bld" in shown.out
    assert (retried.code, "it was not written by silbo" in retried.err) == (1, True)
    assert (await dead("purge", foreign, "--yes")).code == 0
    assert await dead.ids() == [own]


async def test_letters_of_all_shards_are_those_of_the_address(redis: Redis, redis_url: str, prefix: str) -> None:
    """The user knows `orders`, and not on which shard a key is; so does an alarm that counts."""
    where = ("--stream", "orders", "--redis", redis_url, "--prefix", prefix)
    async with RedisStreams(redis, app="shop", prefix=prefix) as streams:
        group = streams.group("billing", start="oldest", streams=["orders"], shards=4)
        async with opened(group) as receiver:
            await streams.publish(*(place(keyed(number), "orders", 4) for number in range(8)))
            items = [item for item in await receive(receiver, 8) if isinstance(item, Delivery)]
            for item in items:
                assert await receiver.bury(item, error="ValueError: no", attempts=1)
    counted = await silbo("dead", "count", *where)
    assert (counted.code, counted.out) == (0, "8\n"), counted
    listed = await silbo("dead", "list", *where, "--json")
    letters = listed.objects
    assert len({letter["stream"] for letter in letters}) > 1
    assert [letter["id"] for letter in letters] == sorted(letter["id"] for letter in letters)
    processes = [find_process(letter["consumer"]) for letter in letters]
    assert all(process and process.pid == os.getpid() for process in processes), letters
    ids = Counter(letter["id"] for letter in letters)
    one = next(letter for letter in reversed(letters) if ids[letter["id"]] == 1)["id"]
    shown = await silbo("dead", "show", one, *where, "--json")
    assert shown.object["id"] == one
    assert (await silbo("dead", "retry", one, *where)).code == 0
    assert (await silbo("dead", "show", one, *where)).code == 1
    assert (await silbo("dead", "purge", "--before", "now", "--yes", *where)).out == "7 dead letters deleted\n"
    misspelt = await silbo("dead", "count", *where[2:], "--stream", "ordres")
    assert misspelt.code == 1 and "there is no stream" in misspelt.err


async def test_id_that_several_shards_have_is_refused(redis: Redis, redis_url: str, prefix: str) -> None:
    """Another message than the one that was meant would be deleted for good."""
    await redis.hset(f"{prefix}:{{orders}}:shards", "shards", "2")  # type: ignore[misc]  # redis-py has no types there
    for shard in (0, 1):
        await redis.xadd(f"{prefix}:{{orders.{shard}}}:dead", {"message": b"x"}, id="7-0")
    where = ("--redis", redis_url, "--prefix", prefix, "--yes")
    done = await silbo("dead", "purge", "7-0", "--stream", "orders", *where)
    assert done.code == 1 and "orders.0" in done.err, done
    assert (await silbo("dead", "purge", "7-0", "--stream", "orders.1", *where)).code == 0
    assert (await silbo("dead", "purge", "7-0", "--stream", "orders", *where)).code == 0


def keyed(number: int) -> Message:
    made = message(number)
    return replace(made, headers={**made.headers, "key": str(number)})
