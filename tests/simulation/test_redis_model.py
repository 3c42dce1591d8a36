"""The model of Redis against Redis: the calls of simulated members, with the scripts of the product, and the replies compared."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any, NamedTuple
from uuid import uuid4

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from silbo.brokers.redis.members import FORGET_AFTER
from silbo.brokers.redis.scripts import ACK, BEAT, READ, RELEASE, RENEW, TAKE, Script
from tests.simulation.histories import make_crash, make_moves, make_storm
from tests.simulation.redis_model import Fenced, ModelRedis
from tests.simulation.world import History, World

FENCED = "fenced"


class Mutant(NamedTuple):
    """A safeguard of a script, and what stands there without it."""

    script: Script
    safeguard: str
    without: str
    history: History  # one in which that makes a difference


class RecordingRedis(ModelRedis):
    """Notes each call, with its reply."""

    def __init__(self, shards: int, lease: int) -> None:
        super().__init__(shards, lease)
        self.calls: list[tuple[str, tuple[Any, ...], Any]] = []

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name in ("add", "beat", "leave", "take", "renew", "release", "read_again", "read_new", "ack"):
            return partial(self._record, name, found)
        return found

    def _record(self, name: str, method: Any, *arguments: Any) -> Any:
        try:
            reply = method(*arguments)
        except Fenced:
            self.calls.append((name, arguments, FENCED))
            raise
        self.calls.append((name, arguments, reply))
        return reply


class ReplayedCalls:
    """The same calls on a real Redis, in one pipeline. Its scripts get the time from a key."""

    def __init__(self, redis: Redis, prefix: str, shards: int, lease: int, mutant: Mutant | None) -> None:
        self._mutant = mutant
        self._pipe = redis.pipeline(transaction=False)
        self._prefix = prefix
        self._lease = lease
        self._replies: list[int] = []  # the positions of the replies that count
        self._length = 0
        self._added: Counter[int] = Counter()
        for shard in range(shards):
            self._pipe.xgroup_create(self._stream(shard), "group", "0", mkstream=True)

    def push(self, name: str, *arguments: Any) -> None:
        getattr(self, f"_{name}")(*arguments)
        self._replies.append(len(self._pipe) - 1)

    async def run(self) -> list[Any]:
        replies = await self._pipe.execute(raise_on_error=False)
        return [replies[position] for position in self._replies]

    def _stream(self, shard: int) -> str:
        return f"{{{self._prefix}.{shard}}}"

    def _set_time(self, now: int) -> None:
        self._pipe.delete(f"{self._prefix}:now")
        self._pipe.rpush(f"{self._prefix}:now", now // 1000, now % 1000 * 1000)

    def _run(self, script: Script, keys: list[str], *arguments: Any, fenced: bool = False) -> None:
        source = script.fenced._source if fenced else script._source
        if self._mutant is not None and self._mutant.script is script:
            assert source.count(self._mutant.safeguard) == 1
            source = source.replace(self._mutant.safeguard, self._mutant.without)
        time = f"redis.call('LRANGE', '{self._prefix}:now', 0, 1)"
        self._pipe.eval(source.replace("redis.call('TIME')", time), len(keys), *keys, *arguments)

    def _run_fenced(
        self, script: Script, shard: int, keys: list[str], member: str, epoch: int, *arguments: Any
    ) -> None:
        keys = [self._stream(shard), *keys, self._lease_key(shard)]
        self._run(script, keys, *arguments, member, epoch, fenced=True)

    def _lease_key(self, shard: int) -> str:
        return f"{self._stream(shard)}:lease"

    # -- the calls, as the model's methods ----------------------------------------------------------------

    def _add(self, shard: int, entry: object) -> None:
        self._added[shard] += 1
        self._pipe.xadd(self._stream(shard), {"message": "any"}, id=_to_id(self._added[shard] - 1))

    def _beat(self, now: int, member: str) -> None:
        self._set_time(now)
        self._run(BEAT, [f"{self._prefix}:members", f"{self._prefix}:shards"], member, FORGET_AFTER * self._lease)

    def _leave(self, member: str) -> None:
        self._pipe.zrem(f"{self._prefix}:members", member)

    def _take(self, now: int, shard: int, member: str) -> None:
        self._set_time(now)
        self._run(TAKE, [self._lease_key(shard)], member, self._lease)

    def _renew(self, now: int, shard: int, member: str, epoch: int) -> None:
        self._set_time(now)
        self._run(RENEW, [self._lease_key(shard)], member, epoch, self._lease)

    def _release(self, shard: int, member: str, epoch: int) -> None:
        self._run(RELEASE, [self._lease_key(shard)], member, epoch)

    def _read_again(self, shard: int, member: str, epoch: int, after: int, count: int) -> None:
        self._run_fenced(READ, shard, [], member, epoch, "group", "leader", count, _to_id(after))

    def _read_new(self, shard: int, member: str, epoch: int, last: int, count: int) -> None:
        self._run_fenced(READ, shard, [], member, epoch, "group", "leader", count, ">", _to_id(last))

    def _ack(self, shard: int, member: str, epoch: int, ids: list[int]) -> None:
        self._run_fenced(ACK, shard, [f"{self._stream(shard)}:attempts"], member, epoch, "group", *map(_to_id, ids))


def _to_id(position: int) -> str:
    return f"{position + 1}-0"


def _to_position(entry_id: bytes) -> int:
    return int(entry_id.partition(b"-")[0]) - 1


def _as_model(name: str, reply: Any) -> Any:
    """Return a reply of Redis as the model gives it."""
    if isinstance(reply, ResponseError):
        return FENCED if str(reply).startswith("FENCED") else reply
    if name == "beat":
        flat = reply[1]
        return {member.decode(): age / 1000 for member, age in zip(flat[::2], flat[1::2], strict=True)}
    if name == "take":
        return (reply[1], 0) if reply[0] else (0, reply[1])
    if name in ("renew", "release"):
        return bool(reply)
    if name in ("read_again", "read_new"):
        last, found = reply
        return _to_position(last), [_to_position(entry_id) for entry_id, _ in found[0][1]] if found else []
    return None


async def _check(redis: Redis, prefix: str, history: History, mutant: Mutant | None = None) -> Counter[str]:
    world = World(history, RecordingRedis)
    world.run()
    prefix = f"{prefix}-{uuid4().hex[:8]}"
    model: Any = world.redis
    replayed = ReplayedCalls(redis, prefix, len(model.shards), model.lease, mutant)
    for name, arguments, _ in model.calls:
        replayed.push(name, *arguments)
    seen: Counter[str] = Counter()
    for position, ((name, arguments, expected), reply) in enumerate(
        zip(model.calls, await replayed.run(), strict=True)
    ):
        assert _as_model(name, reply) == expected, f"{history}, call {position}: {name}{arguments}"
        refused = expected is False or expected == FENCED or (name == "take" and not expected[0])
        seen[f"{name} refused" if refused else name] += 1
    for shard, at in enumerate(model.shards):
        pending = await redis.xpending_range(f"{{{prefix}.{shard}}}", "group", "-", "+", 10_000)
        assert [_to_position(row["message_id"]) for row in pending] == list(at.pending)
    return seen


@pytest.mark.every_redis
async def test_model_answers_as_redis(redis: Redis, prefix: str) -> None:
    """Each call of simulated members gets the same reply, also those that are refused."""
    seen: Counter[str] = Counter()
    for seed in range(4):
        seen += await _check(redis, prefix, make_storm(seed))
        seen += await _check(redis, prefix, make_crash(seed))
    # Else the histories would not be worth comparing.
    assert {"take refused", "renew refused", "read_new refused", "ack refused", "read_again"} <= seen.keys(), seen


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_model_answers_as_redis_in_many_histories(redis: Redis, prefix: str) -> None:
    for seed in range(1000, 1100):
        await _check(redis, prefix, make_storm(seed))


def _without(script: Script, safeguard: str, without: str, history: History, name: str) -> Any:
    return pytest.param(Mutant(script, safeguard, without, history), id=name)


@pytest.mark.parametrize(
    "mutant",
    [
        _without(READ, "lease[1] ~= member or lease[2] ~= epoch", "false", make_crash(1), "epoch of reads"),
        _without(ACK, "lease[1] ~= member or lease[2] ~= epoch", "false", make_crash(0), "epoch of acknowledgements"),
        _without(RENEW, "lease[1] ~= ARGV[1] or lease[2] ~= ARGV[2]", "false", make_crash(1), "epoch of renewals"),
        _without(RELEASE, "lease[1] ~= ARGV[1] or lease[2] ~= ARGV[2]", "false", make_storm(118), "epoch of releases"),
        _without(READ, "last ~= ARGV[5]", "false", make_storm(39), "late read"),
        _without(TAKE, "lease[1] ~= ARGV[1] and ends > now", "false", make_moves(0), "lease"),
        _without(TAKE, "math.max(tonumber(lease[2] or 0) + 1, now)", "1", make_crash(0), "growing epoch"),
        _without(TAKE, "math.max(tonumber(lease[2] or 0) + 1, now)", "now", make_storm(1), "epoch above the last"),
        _without(TAKE, "ends > now + ARGV[2]", "false", make_storm(1), "lease from before the clock was set back"),
        _without(BEAT, "age < 0", "false", make_storm(1), "beat from before the clock was set back"),
    ],
)
async def test_comparison_notices_a_script_without_its_safeguard(redis: Redis, prefix: str, mutant: Mutant) -> None:
    with pytest.raises(AssertionError, match=r"call \d+: "):
        await _check(redis, prefix, mutant.history, mutant)
