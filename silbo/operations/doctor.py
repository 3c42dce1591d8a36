"""An examination of Redis and the outbox: what endangers a promise of silbo's, and the line that mends it."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from math import ceil
from shlex import quote
from statistics import median
from typing import Any, Final, Literal, TypeAlias

from redis.asyncio import RedisCluster

from silbo._checks import check_seconds
from silbo.brokers.redis.calls import CallConnection, Command, ScriptCall, ask, to_mapping
from silbo.brokers.redis.connection import Client, Refused
from silbo.brokers.redis.retention import RetentionPolicy
from silbo.brokers.redis.shards import build_shard_key, build_shards_key
from silbo.brokers.redis.signs_of_life import SIGN_EVERY, build_signs_key
from silbo.brokers.redis.streams import DEFAULT_ADDRESS, build_stream_key
from silbo.errors import BrokerUnavailable, ClusterClientNeeded, StoreUnavailable, StreamMissing
from silbo.operations.failing import count_failed, find_failing
from silbo.operations.formatting import format_age, format_count, format_seconds, format_size
from silbo.operations.groups import (
    NEWER_VERSION_WAIT,
    SILENT_AFTER,
    GroupStatus,
    LeftToNewer,
    read_fields,
    read_stream_groups,
)
from silbo.operations.redis import choose_streams, find_streams, is_away, opened, read_clock, time_of_entry
from silbo.operations.retention import read_policy
from silbo.operations.scripts import READ_DEAD_ERRORS
from silbo.operations.shards import find_undrained
from silbo.outbox.rows import OutboxStore

__all__ = ["Finding", "Level", "examine"]

Level: TypeAlias = Literal["ok", "note", "danger"]
"""``danger`` endangers a promise; a ``note`` is worth knowing, or could not be looked at."""

SLOTS: Final = 16_384
"""The slots of a cluster."""
OLDEST_REDIS: Final = (6, 2)
"""silbo needs Redis 6.2."""
TORN_FILE_MENDED: Final = (9, 1, 2)
"""From this version on Valkey cuts a torn transaction off its append-only file; Redis 8.2 leaves its beginning there."""
FULL: Final = 0.9
"""From this share of ``maxmemory`` on, publishers will soon be refused."""
FILLING: Final = 0.8
"""From this share of ``maxmemory`` on, it is noted, and a ``maxmemory`` is found of which less is used."""
RATE_SPAN: Final = 60.0
"""A rate of less than 60 seconds tells nothing of a week."""
SMALLEST_MEMORY: Final = 256 << 20
"""A ``maxmemory`` of less than 256 MiB is not advised."""
NEAR: Final = 0.8
"""A group whose next message has this share of the retention behind it will soon lose messages."""
PINGS: Final = 20
"""The time of 20 calls is taken."""
SLOW: Final = 0.1
"""A call that takes more than 0.1 seconds is slow."""
CLOCKS: Final = 1.0
"""Clocks that differ by more than 1 second are noted."""
NOTICED_WITHIN: Final = 10 * SIGN_EVERY
"""Two consumers of one name that live notice each other each second; after 10 seconds without that one is gone."""
WAITING: Final = 60.0
"""A row of an outbox, or a message of a group, that waits for more than 60 seconds is no longer on its way."""
STANDS: Final = 15.0
"""A group whose oldest message in hand is more than 15 seconds old is looked at twice: perhaps it stands still."""
LOOKS_APART: Final = 1.0
"""The two looks are 1 second apart."""
HANGS: Final = 300.0
"""A listener that runs for 300 seconds holds up what is behind it."""
FED_WITHIN: Final = 60.0
"""A stream whose newest message is less than 60 seconds old gets messages now."""
NOTED_WITHIN: Final = timedelta(seconds=1)
"""A relay notes a message as sent within 1 second after its entry was added."""
NEVER: Final = datetime(1970, 1, 1, tzinfo=UTC)
"""The time of the entries of an empty stream."""
DEAD_LOOKED_AT: Final = 1_000
"""The errors of the newest 1,000 dead letters of a stream are counted."""
NAMED: Final = 5
"""A danger of several groups names 5 of them."""
LOOKED_AT: Final = 100
"""The first 100 streams under other prefixes are looked at."""
REDIS_CLI: Final = "\0redis-cli"
"""Stands in the lines that mend for ``redis-cli`` with the server's address, until they are yielded."""
STORE: Final = "\0store"
"""Stands in the same way for the options of a command of silbo that name the outbox."""
REDIS: Final = "\0at redis"
"""Stands in the same way for the options of a command of silbo that name Redis."""
BRING_BACK: Final = "bring the node back, or promote its replica: CLUSTER FAILOVER FORCE"
"""Mends that a node of a cluster is away."""
WRITES: Final = (
    ("XADD", "{key}", "*", "message", "x"),
    ("EVALSHA", "0" * 40, "1", "{key}"),
    ("XREADGROUP", "GROUP", "g", "c", "STREAMS", "{key}", ">"),
    ("XACK", "{key}", "g", "1-1"),
    ("XCLAIM", "{key}", "g", "c", "0", "1-1"),
    ("XGROUP", "CREATE", "{key}", "g", "$", "MKSTREAM"),
    ("HSET", "{key}:attempts:g", "1-1", "1"),
)
"""Commands that programs with silbo run, for a rehearsal."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One answer of the examination.

    Attributes:
        check: The matter, in a word or two.
        level: See :data:`Level`.
        text: What was found.
        mend: The line that mends it, to be run or to be written into the program; several lines are steps, or another way.
            None where nothing is wrong.
    """

    check: str
    level: Level
    text: str
    mend: str | None = None


async def examine(
    client: Client,
    *,
    store: OutboxStore | None = None,
    prefix: str = "silbo",
    stream: str | None = None,
    retain: float | None = 7 * 86400.0,
    silent_after: float = SILENT_AFTER,
    timeout: float = 5.0,  # of each step
    redis_cli: str = "redis-cli",
    redis_options: str = "",
    store_options: str = "",
) -> AsyncIterator[Finding]:
    """Examine Redis, the streams with their groups, and an outbox. Nothing is written.

    Args:
        client: The program's client, of the user that the programs have.
        store: The outbox's store, open; None examines none.
        prefix: The broker's prefix.
        stream: The stream's address; None examines all streams under the prefix.
        retain: Seconds that the programs keep entries (``RedisStreams(retain=)``), for streams without a policy beside them;
            None for ever.
        silent_after: Seconds without a sign after which a consumer counts as silent: the groups' ``claim_after``.
        timeout: Seconds in which each step is answered.
        redis_cli: The beginning of the lines that are to be run with ``redis-cli``, with the server's address.
        redis_options: Stands in the lines with commands of silbo, to name the server: `` --redis redis://localhost``.
        store_options: The same for the store.

    Raises:
        BrokerUnavailable: Redis can't be reached; the outbox has been examined all the same.
        StoreUnavailable: the store can't be used at the moment.
    """
    if retain is not None:
        check_seconds("retain", retain)

    def put_in(finding: Finding) -> Finding:
        mend = finding.mend
        for name, words in ((REDIS_CLI, redis_cli), (REDIS, redis_options), (STORE, store_options)):
            mend = mend and mend.replace(name, words)
        return replace(finding, mend=mend)

    away: BrokerUnavailable | None = None
    try:
        async for finding in _examine_redis(
            client, prefix, stream, retain, silent_after, timeout, await _weigh_unsent(store)
        ):
            yield put_in(finding)
    except BrokerUnavailable as error:
        away = error
    if store is not None:
        async for finding in _check_outbox(store, prefix):
            yield put_in(finding)
    if away is not None:
        raise away


async def _examine_redis(
    client: Client,
    prefix: str,
    stream: str | None,
    retain: float | None,
    silent_after: float,
    timeout: float,
    unsent: int,
) -> AsyncIterator[Finding]:
    async with opened(client, timeout) as connection:
        infos: dict[str, dict[str, str]] = {}
        away: set[str] = set()  # nodes, each a danger already
        if not isinstance(client, RedisCluster):
            info = infos[connection.server] = await _read_info(connection)
            async for finding in _check_server(connection, info):
                yield finding
            yield await _check_memory(connection, info, prefix, stream, retain, unsent)
        else:
            info = {}
            yield await _check_slots(connection)
            nodes = await connection.each_node()
            for node in nodes:
                async for finding in _check_node(node, infos):
                    yield finding
            away = {node.server for node in nodes} - infos.keys()
        yield await _check_rights(connection, prefix, stream)
        try:
            keys = await choose_streams(connection, prefix, stream, lambda node: away.add(node.node))
        except StreamMissing as error:
            yield _check_missing(error, info)
            keys = []
        except BrokerUnavailable as error:
            if not isinstance(client, RedisCluster):
                raise
            yield Finding("streams", "danger", str(error), BRING_BACK)
            keys = []
        left: list[GroupStatus] = []
        for key in keys:
            try:
                server = (await connection.node_of(key.encode())).server
                if server in away:
                    continue
                info = infos.get(server, info)
                async for finding in _check_stream(connection, key, info, retain, silent_after, left):
                    yield finding
            except BrokerUnavailable as error:
                if not (isinstance(client, RedisCluster) and is_away(error)):
                    raise
                yield Finding(key, "danger", f"can't be examined: {error}", BRING_BACK)
        for finding in _check_newer(left):
            yield finding
        async for finding in _check_closed(connection, prefix, keys):
            yield finding
        if keys:
            for finding in await _check_prefixes(connection, prefix, keys):
                yield finding


async def _check_closed(connection: CallConnection, prefix: str, keys: Sequence[str]) -> AsyncIterator[Finding]:
    """Yield the addresses with shards that are closed, as their number is changed or a change was given up halfway."""
    addresses = {found[1] for key in keys if (found := re.search(r":\{(.+)\.\d+\}$", key))}
    for address in sorted(addresses):
        root = build_stream_key(address, prefix).encode()
        try:
            ((shards, before),) = await ask(connection, Command(b"HMGET", build_shards_key(root), b"shards", b"was"))
            if shards != b"0":
                continue
            shard_keys = [build_shard_key(root, shard) for shard in range(int(before or 0))]
            waits = [each for key in shard_keys for each in await find_undrained(connection, key)]
        except BrokerUnavailable as error:
            if is_away(error):
                continue  # the node that is away is a danger already
            raise
        text = f"closed for a change of its {int(before or 0)} shards: publishes to it are refused"
        if waits:
            text += f"; waits for {waits[0].group} at {waits[0].stream}, {waits[0].in_hand} in hand"
        mend = f"silbo shards change{REDIS}{_of_prefix(prefix)} {quote(address)} {int(before or 0)}, which opens it as it was, or with another number"
        yield Finding(root.decode(), "danger", text, mend)


# -- the server ---------------------------------------------------------------------------------------------


async def _check_server(connection: CallConnection, info: dict[str, str]) -> AsyncIterator[Finding]:
    """Yield what is found of a server, which in a cluster is a node that serves slots."""
    yield _check_version(info)
    yield await _check_persistence(connection, info)
    if _is_not_rewritten(info):
        text = "not rewritten since Redis started: if it was killed before, its next start may double or lose messages"
        yield Finding("append-only file", "note", text, f"only after a kill or a power loss: {REDIS_CLI} BGREWRITEAOF")
    yield _check_eviction(info)
    yield _check_replication(info)
    yield await _check_latency(connection)
    yield await _check_clock(connection)


async def _check_node(node: CallConnection, infos: dict[str, dict[str, str]]) -> AsyncIterator[Finding]:
    """Yield what is found of a node that serves slots; note its INFO."""
    host, _, port = node.server.removeprefix("Redis at ").rpartition(":")
    of_node = f"{REDIS_CLI} -h {quote(host)} -p {port}"

    def name(finding: Finding) -> Finding:
        mend = finding.mend and finding.mend.replace(REDIS_CLI, of_node)
        return replace(finding, check=f"{node.server} {finding.check}", mend=mend)

    try:
        info = infos[node.server] = await _read_info(node)
        async for finding in _check_server(node, info):
            yield name(finding)
        yield name(_describe_memory(info, 0.0))
    except BrokerUnavailable as error:
        yield Finding(node.server, "danger", f"{error}; its streams are not examined", BRING_BACK)


async def _check_slots(connection: CallConnection) -> Finding:
    """Return if every slot of the cluster is served."""
    (reply,) = await _ask_or_none(connection, Command(b"CLUSTER", b"INFO"))
    if reply is None:
        return Finding("cluster", "note", "the user may not run CLUSTER INFO, so its state is unknown")
    fields = dict(line.split(":", 1) for line in reply.decode().splitlines() if ":" in line)
    if missing := SLOTS - int(fields.get("cluster_slots_ok", "0")):
        text = f"{missing:,} of {SLOTS:,} slots have no node that answers: their streams stand still"
        return Finding("cluster", "danger", text, f"{REDIS_CLI} --cluster check <host>:<port>")
    return Finding("cluster", "ok", f"{fields['cluster_size']} nodes serve all slots")


async def _read_info(connection: CallConnection) -> dict[str, str]:
    """Return the fields of INFO as text; none where the user may not ask."""
    (raw,) = await _ask_or_none(connection, Command(b"INFO"))
    lines = (raw or b"").decode(errors="replace").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line and not line.startswith("#"))


async def _ask_or_none(connection: CallConnection, *calls: Command) -> list[Any]:
    """Return the replies; None for each that Redis refuses.

    Raises:
        BrokerUnavailable: Redis can't be reached.
    """
    replies = []
    for call in calls:
        try:
            replies += await ask(connection, call)
        except BrokerUnavailable as error:
            if is_away(error) or isinstance(error, ClusterClientNeeded):
                raise
            replies.append(None)
    return replies


def _check_version(info: dict[str, str]) -> Finding:
    text = info.get("valkey_version") or info.get("redis_version")
    if not text:
        return Finding("version", "note", "the user may not run INFO, so version and persistence are unknown")
    name = "Valkey" if info.get("valkey_version") else "Redis"
    numbers = _numbers(info.get("redis_version", text))
    if numbers[:2] < OLDEST_REDIS:
        return Finding("version", "danger", f"{name} {text}: silbo needs Redis 6.2 or newer", "upgrade Redis")
    if (7, 2, 0) <= numbers <= (7, 2, 4) and name == "Redis":
        text += ": blocked reads of this version last longer than asked (7.2.5 mends it)"
        return Finding("version", "note", f"{name} {text}", "upgrade Redis to 7.2.5 or newer")
    return Finding("version", "ok", f"{name} {text}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


async def _check_persistence(connection: CallConnection, info: dict[str, str]) -> Finding:
    if not info:
        return Finding("persistence", "note", "unknown: the user may not run INFO")
    for field, what in (("aof_last_write_status", "append-only file"), ("rdb_last_bgsave_status", "snapshot")):
        if info.get(field, "ok") != "ok":
            text = f"the last write of the {what} failed: Redis refuses writes, or loses them at a restart"
            return Finding("persistence", "danger", text, "look at Redis's log, and make room on its disk")
    save, fsync = await _ask_or_none(
        connection, Command(b"CONFIG", b"GET", b"save"), Command(b"CONFIG", b"GET", b"appendfsync")
    )
    if info.get("aof_enabled") == "1":
        how = fsync[1].decode() if fsync else "everysec"
        if how == "always":
            return Finding("persistence", "ok", "every write is on disk before it is answered")
        text = f"append-only file, appendfsync {how}: a power loss loses the last seconds of what was acknowledged"
        return Finding(
            "persistence",
            "note",
            text,
            f"only after a power loss: silbo outbox replay{STORE} --since <a minute before it>",
        )
    mend = f"{REDIS_CLI} CONFIG SET appendonly yes && {REDIS_CLI} CONFIG REWRITE"
    if save is not None and save[1] == b"":
        text = "nothing is written to disk: a restart of Redis loses all messages, groups, and what is in hand"
        return Finding("persistence", "danger", text, mend)
    saved = datetime.fromtimestamp(int(info.get("rdb_last_save_time", "0")), UTC)
    text = f"snapshots only, the last one at {saved:%Y-%m-%d %H:%M:%SZ}: a crash loses all messages since then"
    return Finding("persistence", "danger", text, mend)


def _is_not_rewritten(info: dict[str, str]) -> bool:
    """Return True if the append-only file may hold what a kill has torn, of before the start."""
    if _numbers(info.get("valkey_version", "")) >= TORN_FILE_MENDED:
        return False
    if info.get("aof_enabled") != "1" or info.get("aof_rewrite_in_progress") == "1":
        return False
    return info.get("aof_last_rewrite_time_sec") == "-1"


def _check_eviction(info: dict[str, str]) -> Finding:
    policy = info.get("maxmemory_policy", "")
    mend = f"{REDIS_CLI} CONFIG SET maxmemory-policy noeviction && {REDIS_CLI} CONFIG REWRITE"
    if not policy:
        return Finding("eviction", "note", "unknown: the user may not run INFO")
    if policy.startswith("allkeys"):
        text = f"{policy}: a full Redis deletes keys, whole streams with unread messages too"
        return Finding("eviction", "danger", text, mend)
    if policy != "noeviction":
        text = f"{policy}: a full Redis deletes keys that expire: counts of attempts, and what an inbox remembers"
        return Finding("eviction", "danger", text, mend)
    return Finding("eviction", "ok", "noeviction: a full Redis refuses messages, and deletes none")


def _read_memory(info: dict[str, str]) -> tuple[int, int]:
    """Return the bytes that are used, as Redis compares them with ``maxmemory``, and the ``maxmemory``: 0 for none."""
    uncounted = int(info.get("mem_not_counted_for_evict", "0"))
    return int(info.get("used_memory", "0")) - uncounted, int(info.get("maxmemory", "0"))


async def _check_memory(
    connection: CallConnection, info: dict[str, str], prefix: str, stream: str | None, retain: float | None, unsent: int
) -> Finding:
    """Return if the server's memory is nearly full, and the ``maxmemory`` that is enough for what is kept and what waits."""
    used, most = _read_memory(info)
    if not most or used < FILLING * most:
        return _describe_memory(info, 0.0)
    wanted = float(used + unsent)
    try:
        for key in await choose_streams(connection, prefix, stream):
            policy, _ = await read_policy(connection, key.encode())
            size, in_the_end = await _weigh_stream(connection, key, policy.retain if policy else retain, policy)
            wanted += max(0.0, in_the_end - size)
    except StreamMissing:
        pass
    except BrokerUnavailable as error:
        if not isinstance(error.__cause__, Refused):
            raise
    return _describe_memory(info, wanted)


async def _weigh_stream(
    connection: CallConnection, key: str, retain: float | None, policy: RetentionPolicy | None
) -> tuple[int, float]:
    """Return the bytes of a stream, and those that it will have when its retention removes something, at the rate so far."""
    (reply,) = await ask(connection, Command(b"XINFO", b"STREAM", key.encode()))
    (size,) = await _ask_or_none(connection, Command(b"MEMORY", b"USAGE", key.encode()))
    stream, size = to_mapping(reply), size or 0
    if policy is not None and policy.max_bytes is not None:
        return size, float(policy.max_bytes)
    if retain is None or not stream["first-entry"] or (policy is not None and policy.trim == "acknowledged"):
        return size, float(size)
    first, last = (time_of_entry(stream[end][0].decode()) for end in ("first-entry", "last-entry"))
    span = (last - first).total_seconds()
    return size, size * max(1.0, retain / span) if span >= RATE_SPAN else float(size)


def _describe_memory(info: dict[str, str], wanted: float) -> Finding:
    """Return if a server's memory is nearly full; ``wanted`` are the bytes that it will need, as far as they are known."""
    used, most = _read_memory(info)
    if not used:
        return Finding("memory", "note", "unknown: the user may not run INFO")
    if not most:
        return Finding("memory", "ok", f"{format_size(used)} used; no maxmemory, so the machine's memory is the limit")
    text = f"{format_size(used)} of {format_size(most)} used"
    if used < FILLING * most:
        return Finding("memory", "ok", text)
    refused = "publishers and counts of attempts are refused"
    text += f": it is full, and {refused} now" if _is_full(info) else f": {refused} when it is full"
    enough = max(2.0 * most, wanted / FILLING, SMALLEST_MEMORY)
    size = f"{ceil(enough / SMALLEST_MEMORY) * SMALLEST_MEMORY >> 20}mb"
    other = 'RedisStreams(retain=...), shorter, or RedisStreams(trim="acknowledged")'
    machine = int(info.get("total_system_memory", "0"))
    if machine and enough > machine * FILLING:
        mend = f"{other}: this machine's {format_size(machine)} have no room for the {size} that are needed"
    else:
        mend = f"{REDIS_CLI} CONFIG SET maxmemory {size} && {REDIS_CLI} CONFIG REWRITE\nor: {other}"
    return Finding("memory", "danger" if used >= FULL * most else "note", text, mend)


def _is_full(info: dict[str, str]) -> bool:
    """Return True if Redis refuses what needs memory: it has no more, and no keys that it may delete."""
    used, most = _read_memory(info)
    return 0 < most <= used and not info.get("maxmemory_policy", "").startswith("allkeys")


def _refuses_writes(info: dict[str, str]) -> bool:
    """Return True if Redis refuses all writes at the moment: another finding says why."""
    is_written = info.get("aof_last_write_status", "ok") == info.get("rdb_last_bgsave_status", "ok") == "ok"
    return _is_full(info) or info.get("role", "master") != "master" or not is_written


def _check_missing(error: StreamMissing, info: dict[str, str]) -> Finding:
    """Return the danger that there is no stream; a note while none can be made."""
    if _refuses_writes(info):
        return Finding("streams", "note", f"{error}; while Redis refuses writes, none is made")
    return Finding("streams", "danger", str(error), "give the prefix of the programs: --prefix, or SILBO_PREFIX")


def _check_replication(info: dict[str, str]) -> Finding:
    role, replicas = info.get("role"), int(info.get("connected_slaves", "0"))
    if role is None:
        return Finding("replicas", "note", "unknown: the user may not run INFO")
    if role != "master":
        text = f"this server is a replica of {info.get('master_host')}: it refuses every write"
        return Finding("replicas", "danger", text, "give the address of the master in --redis and in the programs")
    if not replicas:
        return Finding("replicas", "note", "no replica: while this server is away, publishers wait or store")
    text = f"{replicas} connected; a fail-over may lose the last messages, for replicas follow without being waited for"
    return Finding(
        "replicas", "note", text, f"only after a fail-over: silbo outbox replay{STORE} --since <a minute before it>"
    )


async def _check_latency(connection: CallConnection) -> Finding:
    times = []
    for _ in range(PINGS):
        began_at = time.perf_counter()
        await ask(connection, Command(b"PING"))
        times.append(time.perf_counter() - began_at)
    usual, longest = median(times), max(times)
    text = f"a call takes {usual * 1000:.2g} ms, the longest of {PINGS} {longest * 1000:.2g} ms"
    return Finding("latency", "note" if usual > SLOW else "ok", text)


async def _check_clock(connection: CallConnection) -> Finding:
    before = time.time()
    theirs = (await read_clock(connection)).timestamp()
    ahead = theirs - (before + time.time()) / 2
    if abs(ahead) <= CLOCKS:
        return Finding("clocks", "ok", "this machine's and Redis's agree")
    text = f"Redis's is {abs(ahead):.3g} s {'ahead of' if ahead > 0 else 'behind'} this machine's: ages shown are wrong"
    return Finding("clocks", "note", text, "let both machines follow NTP")


async def _check_rights(connection: CallConnection, prefix: str, stream: str | None) -> Finding:
    (who,) = await _ask_or_none(connection, Command(b"ACL", b"WHOAMI"))
    if who is None:
        return Finding("rights", "note", "unknown: the user may not run ACL")
    key, refused = f"{prefix}:{{{stream or 'events'}}}", []
    for words in WRITES:
        packed = [word.format(key=key).encode() for word in words]
        try:
            ((reply),) = await ask(connection, Command(b"ACL", b"DRYRUN", who, *packed))
        except BrokerUnavailable as error:
            if not isinstance(error.__cause__, Refused):
                raise
            text = f"user {who.decode(errors='replace')}; what it may do can't be asked (ACL DRYRUN, from Redis 7 on)"
            return Finding("rights", "note", text)
        if reply != b"OK":
            refused.append(" ".join(words[:2]) if words[0] == "XGROUP" else words[0])
    name = who.decode(errors="replace")
    if refused:
        mend = f"{REDIS_CLI} ACL SETUSER {quote(name)} '~{prefix}:*' {' '.join('+' + word.lower().split()[0] for word in refused)}"
        return Finding("rights", "danger", f"user {name} may not run {', '.join(refused)} on {key}", mend)
    return Finding("rights", "ok", f"user {name} may publish and consume on {key}")


# -- streams and groups -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Stream:
    """A stream, by its key: its number of groups, if it gets messages now, how many it has, and the times of the first and the last."""

    key: str
    groups: int
    is_fed: bool
    length: int
    first_at: datetime
    last_at: datetime

    @property
    def prefix(self) -> str:
        """The first part of its key."""
        return self.key.rpartition(":{")[0]


async def _check_prefixes(connection: CallConnection, prefix: str, keys: Sequence[str]) -> Sequence[Finding]:
    """Return if senders and consumers have different prefixes; nothing where the user may not look."""
    try:
        names = await find_streams(connection, on_away=lambda _: None)
    except BrokerUnavailable as error:
        if is_away(error):
            raise
        return []
    others = [key for key in names if key.rpartition(":{")[0] != prefix]
    if not others:
        return []
    now = await read_clock(connection)
    own, elsewhere = await _look_at(connection, keys, now), await _look_at(connection, others[:LOOKED_AT], now)
    found: list[Finding] = []
    starves = any(stream.groups for stream in own) and not any(stream.is_fed for stream in own)
    unread = [stream for stream in elsewhere if stream.length and not stream.groups]
    found += [
        _describe_astray([stream for stream in unread if stream.prefix == astray], prefix, starves)
        for astray in sorted({stream.prefix for stream in unread})
    ]
    idle = [stream.key for stream in elsewhere if stream.groups and not stream.is_fed]
    for stream in own:
        if idle and stream.is_fed and not stream.groups:
            text = f"no group reads {stream.key}, and groups without new messages are at {', '.join(idle)}"
            found.append(Finding("prefixes", "danger", text, f"give the consumers --prefix {prefix}"))
    if not found:
        prefixes = ", ".join(sorted({key.rpartition(":{")[0] for key in others}))
        found.append(Finding("prefixes", "note", f"there are streams under other prefixes, too: {prefixes}"))
    return found


def _describe_astray(streams: Sequence[_Stream], prefix: str, starves: bool) -> Finding:
    """Return the danger that messages went to another prefix, where no group reads them.

    Args:
        streams: The streams under one other prefix that have messages and no group. A replay knows no stream, so all have one line:
            several would send the messages again several times.
        prefix: The prefix that was asked for.
        starves: The groups under that prefix get no messages.
    """
    keys = ", ".join(stream.key for stream in streams)
    if any(stream.is_fed for stream in streams):  # a replay of now would not end with the last of them
        text = f"{keys} {'gets' if len(streams) == 1 else 'get'} messages now, and no group reads {'it' if len(streams) == 1 else 'them'}"
        text += f"; the groups under {prefix} get none" if starves else ""
        mend = (
            f"1. restart the relay or the program that sends there, with --prefix {prefix}\n"
            f"2. a minute later, run the doctor again: it gives the line that sends the messages again"
        )
        return Finding("prefixes", "danger", text, mend)
    since = min(stream.first_at for stream in streams)
    before = max(stream.last_at for stream in streams) + NOTED_WITHIN
    count = format_count(sum(stream.length for stream in streams), "message")
    text = f"{keys} got {count} from {_to_text(since)} to {_to_text(before - NOTED_WITHIN)}, and no group read them"
    mend = (
        f"are they of another program? Then let them be. If they were meant for {prefix}, and nothing sends there any more:\n"
        f"silbo outbox replay{STORE} --since {_to_text(since)} --before {_to_text(before)}\n"
        f"then, so that nobody does it twice: {REDIS_CLI} DEL {' '.join(quote(stream.key) for stream in streams)}"
    )
    return Finding("prefixes", "danger", text, mend)


def _to_text(time: datetime) -> str:
    """Return a time as ``--since`` takes it, to the millisecond: whole seconds would take in messages that went right."""
    return f"{time:%Y-%m-%dT%H:%M:%S}.{time.microsecond // 1000:03}Z"


async def _look_at(connection: CallConnection, keys: Sequence[str], now: datetime) -> list[_Stream]:
    """Return the streams among the keys that the user may read."""
    found = []
    for key in keys:
        (reply,) = await _ask_or_none(connection, Command(b"XINFO", b"STREAM", key.encode()))
        if reply is None:
            continue
        stream = to_mapping(reply)
        first, last = stream["first-entry"], stream["last-entry"]
        first_at, last_at = (time_of_entry(entry[0].decode()) if entry else NEVER for entry in (first, last))
        found.append(
            _Stream(
                key=key,
                groups=stream["groups"],
                is_fed=(now - last_at).total_seconds() < FED_WITHIN,
                length=stream["length"],
                first_at=first_at,
                last_at=last_at,
            )
        )
    return found


async def _check_stream(
    connection: CallConnection,
    key: str,
    info: dict[str, str],
    retain: float | None,
    silent_after: float,
    left: list[GroupStatus],
) -> AsyncIterator[Finding]:
    """Yield what is found of a stream and its groups; add the groups that wait for newer consumers to ``left``."""
    try:
        policy, _ = await read_policy(connection, key.encode())
        if policy is not None:
            retain = policy.retain
        yield await _check_room(connection, key, info, retain, policy)
        if policy is not None and policy.trims:
            yield await _check_trimming(connection, key, policy)
        groups = await read_stream_groups(connection, key.encode(), silent_after)
    except BrokerUnavailable as error:
        if is_away(error):
            raise
        yield Finding(key, "danger", f"can't be read: {error.__cause__}", f"{REDIS_CLI} RENAME {quote(key)} elsewhere")
        return
    if not groups:
        mend = "start its consumers: the first one of a group makes it; or look for another prefix= in their programs"
        yield Finding(f"{key} groups", "note", "no group reads it", mend)
    left += [group for group in groups if group.newer]
    standing = await _find_standing(connection, key, groups)
    for group in groups:
        for finding in _check_group(group, retain, policy, stands=group.group in standing):
            yield finding
        if group.dead:
            yield await _check_dead(connection, key, group)
    for group in groups:
        for name in await _find_shared_names(
            connection, key.encode(), group.group.encode(), [each.name for each in group.consumers]
        ):
            text = (
                f"two live consumers have the name {name}: each gets what the other has in hand, and handles it twice"
            )
            mend = "give each process a name of its own in group(consumer=), or no name"
            yield Finding(f"{key} {group.group}", "danger", text, mend)


async def _find_standing(connection: CallConnection, key: str, groups: Sequence[GroupStatus]) -> set[str]:
    """Return the groups that were given nothing and have done nothing for a second, with old messages in hand.

    Those of which more is known are left out: that nobody reads them, that attempts failed, or that a listener hangs.
    """
    doubtful = {
        group.group
        for group in groups
        if group.oldest
        and (group.read_at - group.oldest.added_at).total_seconds() > STANDS
        and not (group.is_deserted or group.retrying or group.newer or group.hanging)
    }
    if not doubtful:
        return doubtful
    before = await _read_places(connection, key)
    await asyncio.sleep(LOOKS_APART)
    after = await _read_places(connection, key)
    return {name for name in doubtful if name in after and before.get(name) == after[name]}


async def _read_places(connection: CallConnection, key: str) -> dict[str, tuple[bytes, int]]:
    """Return how far each group is: what it was given last, and how many it has in hand. Any progress changes one of them."""
    (rows,) = await ask(connection, Command(b"XINFO", b"GROUPS", key.encode()))
    return {
        group["name"].decode(errors="backslashreplace"): (group["last-delivered-id"], group["pending"])
        for group in map(to_mapping, rows)
    }


async def _check_trimming(connection: CallConnection, key: str, policy: RetentionPolicy) -> Finding:
    """Return the policy that is kept beside a stream, and if the user may trim by it."""
    check, trim = f"{key} retention", [b"XTRIM", key.encode(), b"MINID", b"~", b"1"]
    wanted = [trim, [b"MEMORY", b"USAGE", key.encode()]] if policy.max_bytes is not None else [trim]
    (who,) = await _ask_or_none(connection, Command(b"ACL", b"WHOAMI"))
    if who is None:
        return Finding(check, "ok", str(policy))
    for words in wanted:
        (reply,) = await _ask_or_none(connection, Command(b"ACL", b"DRYRUN", who, *words))
        if reply not in (b"OK", None):
            name, right = who.decode(errors="replace"), "xtrim" if words is trim else "memory|usage"
            text = f"{policy}; user {name} may not run {words[0].decode()}, so nothing is removed by it"
            return Finding(check, "danger", text, f"{REDIS_CLI} ACL SETUSER {quote(name)} +{right}")
    return Finding(check, "ok", str(policy))


async def _check_room(
    connection: CallConnection, key: str, info: dict[str, str], retain: float | None, policy: RetentionPolicy | None
) -> Finding:
    """Return if the memory has room for what the retention keeps, at the rate so far."""
    (reply,) = await ask(connection, Command(b"XINFO", b"STREAM", key.encode()))
    (size,) = await _ask_or_none(connection, Command(b"MEMORY", b"USAGE", key.encode()))
    stream = to_mapping(reply)
    length, first, last = stream["length"], stream["first-entry"], stream["last-entry"]
    if not first:
        return Finding(key, "ok", "no messages")
    span = (time_of_entry(last[0].decode()) - time_of_entry(first[0].decode())).total_seconds()
    text = f"{format_count(length, 'message')} of {format_seconds(span)}, {format_size(size or 0)}"
    limit = int(info.get("maxmemory", "0"))
    most = limit or int(info.get("total_system_memory", "0"))
    if policy is not None and policy.max_bytes is not None:
        text += f"; max_bytes holds it at {format_size(policy.max_bytes)}"
        if most and policy.max_bytes > most:
            text += f", more than the {format_size(most)} {'of maxmemory' if limit else 'of this machine'}"
            return Finding(key, "danger", text, "a smaller --max-bytes: silbo retention set; or more memory")
        return Finding(key, "ok", text)
    if policy is not None and policy.trim == "acknowledged":
        if stream["groups"]:
            return Finding(key, "ok", f"{text}; what every group has acknowledged is removed")
        if retain is not None:
            text += f"; no group reads it, so only its {format_seconds(retain)} (retain) remove anything"
    if retain is None:
        mend = "RedisStreams(retain=7 * 86400)"
        return Finding(key, "note", f"{text}; nothing is ever removed, so the memory will be full one day", mend)
    if span >= RATE_SPAN and most and size:
        wanted = size * retain / span if span < retain else size
        if span < retain:
            text += (
                f"; at this rate it will hold {format_size(wanted)} after its {format_seconds(retain)} (retain), "
                f"of {format_size(most)} {'(maxmemory)' if limit else 'of this machine'}"
            )
        if wanted > most:
            days = most * FULL / size * span / 86400
            return Finding(
                key, "danger", text, f"RedisStreams(retain={days * 86400:.0f}), {days:.1g} days; or more memory"
            )
    return Finding(key, "ok", text)


def _check_group(
    group: GroupStatus, retain: float | None, policy: RetentionPolicy | None, *, stands: bool
) -> Sequence[Finding]:
    check = f"{group.stream} {group.group}"
    found: list[Finding] = []
    age = (group.read_at - group.waiting_since).total_seconds() if group.waiting_since else 0.0
    waits = group.lag + group.in_hand
    if group.is_deserted and waits:
        text = f"no consumer is alive, and {waits:,} message{' waits' if waits == 1 else 's wait'}"
        if policy is not None and policy.trim == "acknowledged":
            until = "for ever" if retain is None else f"until it is {format_seconds(retain)} old"
            text += f"; what is behind them stays in the stream, {until}"
        rest = "the stream stays as large as it is"
        if policy is not None and policy.trim == "acknowledged":
            rest = "what no other group waits for is removed"
        mend = (
            f"start its consumers. Only if nobody needs the group: {REDIS_CLI} XGROUP DESTROY {quote(group.stream)} {quote(group.group)} "
            f"(its {format_count(waits, 'unread message')} will never be handled, and {rest})"
        )
        found.append(Finding(check, "danger", text, mend))
    elif retain is not None and age > NEAR * retain:
        text = f"its next message is {format_seconds(age)} old, and after {format_seconds(retain)} it may be dropped"
        found.append(Finding(check, "danger", text, "start more consumers, or a longer RedisStreams(retain=...)"))
    if group.retrying and group.oldest and group.oldest.attempts:
        text = f"{group.retrying:,} in hand failed before; {group.oldest.entry}: {group.oldest.error or 'its attempt did not end'}"
        found.append(Finding(check, "note", text, None))
    if hanging := group.hanging:
        is_long = (group.read_at - hanging.since).total_seconds() >= HANGS
        text = f"{hanging.entry} is in work for {format_age(hanging.since, group.read_at)} at {hanging.where}: a listener may hang"
        mend = "its log names the listener; restart that process, and give the listener a timeout="
        found.append(Finding(check, "danger" if is_long else "note", text, mend))
    if not (group.newer or any(finding.level == "danger" for finding in found)):
        live = sum(not consumer.is_silent for consumer in group.consumers)
        text = f"lag {group.lag:,}, {group.in_hand:,} in hand, {live} consumer{'' if live == 1 else 's'} alive"
        if group.waiting_since and age > WAITING:
            text += f"; its next message has waited for {format_age(group.waiting_since, group.read_at)}"
            mend = "if that grows (silbo top): more consumers, or a greater concurrency="
            found.insert(0, Finding(check, "note", text, mend))
        elif stands and group.oldest:
            text += f"; none was done in the last second, and the oldest is {format_age(group.oldest.added_at, group.read_at)} old"
            mend = "look again, or silbo top: if none is done, a listener hangs, or its database does"
            found.insert(0, Finding(check, "note", text, mend))
        else:
            found.insert(0, Finding(check, "ok", text))
    return found


async def _check_dead(connection: CallConnection, key: str, group: GroupStatus) -> Finding:
    """Return the number of a group's dead letters, and the commonest type of error with its newest text."""
    call = ScriptCall.of(READ_DEAD_ERRORS, [f"{key}:dead".encode()], group.group.encode(), b"%d" % DEAD_LOOKED_AT)
    (errors,) = await ask(connection, call)
    text = format_count(group.dead, "dead letter")
    if errors:
        kinds = [error.partition(b":")[0] for error in errors]
        commonest, many = Counter(kinds).most_common(1)[0]
        newest = errors[kinds.index(commonest)].decode(errors="replace").partition("\n")[0]
        of_which = "" if len(errors) == group.dead else f" of the newest {len(errors):,}"
        kind, _, reason = newest.partition(": ")
        latest = f", the latest: {reason}" if reason else ""  # the texts of the others differ
        text += f", {many:,}{of_which} with {kind}{latest}" if group.dead > 1 else f": {newest}"
    return Finding(f"{group.stream} {group.group}", "note", text, _of_letters("list", group))


def _of_prefix(prefix: str) -> str:
    """Return the option that names a prefix; nothing for the default."""
    return "" if prefix == "silbo" else f" --prefix {quote(prefix)}"


def _of_letters(command: str, group: GroupStatus) -> str:
    """Return the line that runs a command of ``silbo dead`` for a group."""
    prefix, _, address = group.stream.removesuffix("}").rpartition(":{")
    of_stream = "" if address == DEFAULT_ADDRESS else f" --stream {quote(address)}"
    return f"silbo dead {command}{REDIS}{_of_prefix(prefix)}{of_stream} --group {quote(group.group)}"


def _check_newer(groups: Sequence[GroupStatus]) -> Sequence[Finding]:
    """Return the dangers that messages become dead letters because no consumer knows their version: one for each version."""
    by_version: dict[str, list[tuple[GroupStatus, LeftToNewer]]] = {}
    for group in groups:
        if group.newer:
            by_version.setdefault(group.newer.wanted, []).append((group, group.newer))
    return [_describe_newer(left) for left in by_version.values()]


def _describe_newer(left: Sequence[tuple[GroupStatus, LeftToNewer]]) -> Finding:
    group, newer = min(left, key=lambda each: each[1].since)
    now, count = group.read_at, sum(each.count for _, each in left)
    due_at = newer.since + timedelta(seconds=NEWER_VERSION_WAIT)
    due = f"in {_format_wait((due_at - now).total_seconds())}" if due_at > now else "after newer_version_wait"
    text = (
        f"{count:,} {'waits' if count == 1 else 'wait'} for {newer.wanted}, the first for "
        f"{format_age(newer.since, now)}; it becomes a dead letter {due} (newer_version_wait is 5 min by default)"
    )
    mend = "deploy the newer consumers; what is a dead letter by then:"
    if len(left) == 1:
        return Finding(f"{group.stream} {group.group}", "danger", text, f"{mend} {_of_letters('retry', group)}")
    names = sorted({each.group for each, _ in left})
    shown = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
    streams = format_count(len({each.stream for each, _ in left}), "stream")
    lines = [_of_letters("retry", each) for each, _ in left[:NAMED]]
    if len(left) > NAMED:
        lines.append("and so for the others")
    return Finding("newer versions", "danger", f"{shown} at {streams}: {text}", "\n".join([mend, *lines]))


def _format_wait(seconds: float) -> str:
    """Return a duration of less than an hour to the second: rounded to minutes, 285 s would be the whole 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


async def _find_shared_names(
    connection: CallConnection, key: bytes, group: bytes, consumers: Sequence[str]
) -> list[str]:
    """Return the names under which two consumers live: each notes it when it finds the other's sign of life."""
    now = await read_clock(connection)
    names = [b"!" + name.encode() for name in consumers]
    noticed = await read_fields(connection, build_signs_key(key, group), names)
    recent = now.timestamp() - NOTICED_WITHIN
    return [
        name[1:].decode(errors="replace") for name, at in noticed.items() if at.isdigit() and int(at) / 1000 > recent
    ]


# -- the outbox ---------------------------------------------------------------------------------------------


async def _weigh_unsent(store: OutboxStore | None) -> int:
    """Return the bytes that wait in an outbox for Redis; 0 without one, or while it can't be read."""
    if store is None:
        return 0
    try:
        status = await store.status()
    except StoreUnavailable:  # the examination of the outbox raises it
        return 0
    return status.size * status.unsent // max(1, sum(status.counts.values()))


async def _check_outbox(store: OutboxStore, prefix: str) -> AsyncIterator[Finding]:
    status = await store.status()
    now = await store.read_clock()
    waits = status.counts["pending"] + status.counts["sending"]
    age = (now - status.oldest_at).total_seconds() if status.oldest_at else 0.0
    text = format_count(waits, "row") + (" waits" if waits == 1 else " wait")
    if waits and not status.leads:
        text = f"no relay is at work, and {text}"
        yield Finding("outbox", "danger", text, f"silbo relay{STORE}{REDIS}{_of_prefix(prefix)}")
    elif waits and ((failing := await find_failing(store)) or age > WAITING):
        text += f", the oldest for {format_seconds(age)}"
        if failing:
            text += f"; attempt {count_failed(failing)} failed: {failing.error}"
        yield Finding("outbox", "danger", text, f"silbo outbox status{STORE}")
    else:
        leads = f"{len(status.leads)} of {format_count(store.partitions, 'partition')} {'is' if store.partitions == 1 else 'are'} led"
        yield Finding("outbox", "ok", f"{text}, {leads}")
    if dead := status.counts["dead"]:
        yield Finding(
            "outbox",
            "note",
            f"{format_count(dead, 'dead row')}: refused for good",
            f"silbo outbox status{STORE} --rows dead",
        )
    if (apart := abs((now - datetime.now(UTC)).total_seconds())) > CLOCKS:
        yield Finding("outbox", "note", f"its clock and this machine's differ by {apart:.3g} s", "let both follow NTP")
