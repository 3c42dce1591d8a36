"""`silbo retention`: the policy of streams is shown, and changed while programs run."""

from __future__ import annotations

import pytest
from redis.asyncio import Redis

from silbo.brokers.redis import RedisStreams
from silbo.errors import RetentionConflict
from silbo.operations.doctor import examine
from tests.support.command_line import Run, message, silbo
from tests.support.redis_streams import opened, receive

pytestmark = pytest.mark.every_redis


async def test_policy_is_changed_as_the_error_says(redis: Redis, redis_url: str, prefix: str) -> None:
    """First the stream's, then the programs': those that state the one before go on, and a new program is not refused."""
    where = ("--redis", redis_url, "--prefix", prefix)
    async with RedisStreams(redis, app="shop", prefix=prefix, retain=60) as old:
        await old.publish(message(0))
        async with RedisStreams(redis, app="shop", prefix=prefix, trim="acknowledged", keep_at_least=9) as new:
            with pytest.raises(RetentionConflict, match="silbo retention set"):
                await new.publish(message(1))
            asked = await silbo("retention", "set", "--trim", "acknowledged", *where)
            assert asked.code == 2 and "What it does not keep is deleted" in asked.err
            done = await silbo(
                "retention", "set", "--trim", "acknowledged", "--keep-at-least", "9s", *where, "--yes", "--json"
            )
            assert done.code == 0, done.err
            assert (done.object["policy"]["trim"], done.object["before"]["retain"]) == ("acknowledged", 60.0)
            await new.publish(message(1))
            await old.publish(message(2))
    shown = await silbo("retention", "show", *where)
    assert "trim='acknowledged', keep_at_least=9" in shown.out and "retain=60, trim='age'" in shown.out
    program = await silbo("retention", "show", *where, "--json")
    assert (program.object["messages"], program.object["policy"]["max_bytes"]) == (3, None)


async def test_policy_may_be_there_before_the_first_message_and_for_each_shard(
    redis: Redis, redis_url: str, prefix: str
) -> None:
    """So a relay, which states none, follows it from the beginning."""
    where = ("--redis", redis_url, "--prefix", prefix, "--yes")
    one = await silbo("retention", "set", "--max-messages", "5", "--max-bytes", "2mb", "--new", *where)
    assert one.code == 0 and "max_bytes=2097152, max_messages=5 (there was none)" in one.out, one.err
    async with RedisStreams(redis, app="shop", prefix=prefix) as relay:
        await relay.publish_sequenced("box/0", 1, [(n, message(n)) for n in range(1, 10)])
        async with opened(relay.group("billing", start="oldest")) as receiver:  # a consumer trims as well
            assert len(await receive(receiver, 5)) == 5
    assert await redis.xlen(f"{prefix}:{{events}}") == 5
    async with RedisStreams(redis, app="shop", prefix=prefix + "s", shards=2) as streams:
        await streams.publish(message(0))
        where = ("--redis", redis_url, "--prefix", prefix + "s", "--yes")
        both = await silbo("retention", "set", "--retain", "1h", *where, "--json")
    assert [each["stream"] for each in both.objects] == [f"{prefix}s:{{events.0}}", f"{prefix}s:{{events.1}}"], both.err


async def test_doctor_reads_the_policy(redis: Redis, prefix: str) -> None:
    """A cap that memory has no room for is a danger; what the groups acknowledge needs no room for a week."""
    key = f"{prefix}:{{events}}"

    async def find() -> tuple[str, str]:
        found = {each.check: each async for each in examine(redis, prefix=prefix)}
        return found[key].level, found[key].text

    for number in range(100):
        await redis.xadd(key, {"message": "x" * 1000}, id=f"{1_000_000 + number * 1000}-0")
    assert "after its 7 days (retain)" in (await find())[1]
    await redis.hset(f"{key}:retention", "policy", "retain=3600000 trim=age keep_at_least=0")
    assert "after its 60 min (retain)" in (await find())[1]
    await redis.hset(f"{key}:retention", "policy", "retain=604800000 trim=acknowledged keep_at_least=0")
    assert "no group reads it, so only its 7 days (retain) remove anything" in (await find())[1]
    await redis.xgroup_create(key, "billing", "$")
    level, text = await find()
    assert level == "ok" and text.endswith("what every group has acknowledged is removed"), text
    await redis.hset(f"{key}:retention", "policy", "retain=604800000 trim=age keep_at_least=0 max_bytes=200000")
    level, text = await find()
    assert level == "ok" and text.endswith("max_bytes holds it at 195.3 KiB"), text
    await redis.hset(f"{key}:retention", "policy", f"retain=604800000 trim=age keep_at_least=0 max_bytes={1 << 60}")
    assert (await find())[0] == "danger"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--trim", "age", "--keep-at-least", "1m"], "keep_at_least is for trim='acknowledged'"),
        (["--max-bytes", "2x"], "is no size: write 500mb"),
        (["--max-messages", "0"], "no whole number from 1 on"),
    ],
)
def test_policy_that_makes_no_sense_is_refused(run: Run, words: list[str], why: str) -> None:
    refused = run("retention", "set", "--redis", "redis://localhost:1", "--yes", *words)
    assert refused.code == 2 and why in refused.err


@pytest.mark.one_server
async def test_doctor_tells_if_the_user_may_not_trim(redis: Redis, redis_url: str, prefix: str) -> None:
    """Redis can be asked from 7 on."""
    if int((await redis.info("server"))["redis_version"].split(".")[0]) < 7:
        return
    await redis.xadd(f"{prefix}:{{events}}", {"message": "{}"})
    await redis.hset(f"{prefix}:{{events}}:retention", "policy", "retain=604800000 trim=acknowledged keep_at_least=0")
    user = f"user-{prefix}"
    await redis.acl_setuser(user, enabled=True, nopass=True, keys=["*"], commands=["+@all", "-xtrim"])
    try:
        async with Redis.from_url(redis_url, username=user, password="any") as client:
            found = {each.check: each async for each in examine(client, prefix=prefix)}
    finally:
        await redis.acl_deluser(user)
    told = found[f"{prefix}:{{events}} retention"]
    assert told.level == "danger" and told.mend == f"redis-cli ACL SETUSER {user} +xtrim"


async def test_policy_is_not_kept_beside_a_stream_that_is_misspelt(redis: Redis, redis_url: str, prefix: str) -> None:
    """Nobody would notice: the messages would go on by the policy of before. One that is to come is said to be new."""
    words = (
        "retention",
        "set",
        "--retain",
        "1h",
        "--stream",
        "ordres",
        "--yes",
        "--redis",
        redis_url,
        "--prefix",
        prefix,
    )
    done = await silbo(*words)
    assert done.code == 1 and "there is no stream" in done.err, done
    assert not await redis.exists(f"{prefix}:{{ordres}}:retention")
    assert (await silbo(*words, "--new")).code == 0
    assert await redis.exists(f"{prefix}:{{ordres}}:retention")
