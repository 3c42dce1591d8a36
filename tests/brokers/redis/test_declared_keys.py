"""Every key that a script uses is declared: else a cluster refuses the script while a slot moves, and so may a proxy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import pytest
from redis.asyncio import Redis

from silbo.brokers.redis import scripts as brokers
from silbo.brokers.redis.calls import CallConnection, ScriptCall
from silbo.brokers.redis.connection import Refused
from silbo.brokers.redis.scripts import Script
from silbo.operations import scripts as operations
from tools.redis_server import RedisServer

pytestmark = pytest.mark.every_redis

ATTEMPTS, DEAD, GIVEN, LEASE, MEMBERS, OFFERED, OUTBOX, RETENTION, SHARDS, SIGNS = (
    f"s:{name}"
    for name in ("attempts:g", "dead", "given", "lease", "members", "offered", "outbox", "retention", "shards", "signs")
)
POLICY = "retain=1000 trim=acknowledged keep_at_least=0 max_messages=4 max_bytes=1"
CALLS: Final[dict[str, tuple[Sequence[str], Sequence[object]]]] = {
    "CREATE": (["s", GIVEN], ["h", "$"]),
    "ADD": (["empty"], ["1000", "", "m"]),
    "ADD_SEQUENCED": (["empty2", "empty2:outbox"], ["1000", "source", 1, "", 1, "m"]),
    "PUBLISH": ([], ["channel", "m"]),
    "LOOK": (["s", GIVEN, RETENTION], ["g", 1000]),
    "COUNT": (["s", ATTEMPTS], ["1-1", 2, 60_000, "ValueError"]),
    "COUNTS": ([ATTEMPTS], ["1-1"]),
    "OFFER": (["s", OFFERED], ["g", "c", 1000, 60_000, "1-1"]),
    "READ_OFFERED": ([OFFERED], ["1-1"]),
    "KEEP": (["s"], ["g", "c", "", "1-1", "1-1"]),
    "REDATE": (["s"], ["g", "-"]),
    "CLAIM": (["s", ATTEMPTS], ["g", "d", 0, "0-0", 1]),
    "ADOPT": (["s", ATTEMPTS], ["g", "e", 0, "0-0", 9]),
    "READ": (["s"], ["g", "e", 1, ">"]),
    "BURY": (["s", ATTEMPTS, DEAD, OFFERED], ["g", "e", "1-1", 60_000, "m", "ValueError", 2, "web", "host:7:ab"]),
    "COUNT_DEAD": ([DEAD], ["-", 100]),
    "READ_DEAD_ERRORS": ([DEAD], ["g", 100]),
    "RETRY": (["s", DEAD], ["1", "silbo-retry", "LETTER", "9-9"]),
    "PURGE": ([DEAD], ["9999999999999", 100]),
    "ACK": (["s", ATTEMPTS], ["g", "2-1"]),
    "SIGN": ([SIGNS], ["c", "me", "", 60_000]),
    "LEAVE": (["s", GIVEN, SIGNS], ["g", "e", 1000, 1, "me"]),
    "TIDY": (["s", SIGNS], ["g", "e", -1]),
    "COUNT_AFTER": (["s"], ["0-0", 100]),
    "FIND": (["s"], ["XRANGE", "-", "+", 100, "m"]),
    "FIND_IN": (["s"], ["m", "2-1"]),
    "REWIND": (["s", GIVEN], ["g", "2-1", 0, "c"]),
    "SET_POLICY": ([RETENTION], [POLICY]),
    "TRIM": (["s", GIVEN, RETENTION], [POLICY, 0]),
    "FIX_SHARDS": (["awaited:shards", "awaited"], [4]),
    "GIVE_WAY": (["awaited"], []),
    "BEAT": ([MEMBERS, SHARDS], ["me", 60_000]),
    "TAKE": ([LEASE], ["me", 3000]),
    "RENEW": ([LEASE], ["me", 1, 3000]),
    "RELEASE": ([LEASE], ["me", 1]),
    "HANDLED": (["s:inbox"], ["p"]),
    "REMEMBER": (["s:inbox"], [60_000, 100, "p"]),
}
"""The keys and the arguments of a call of each script, in an order in which each finds something to do."""
SCRIPTS: Final[dict[str, Script]] = {
    name: getattr(module, name)
    for module in (brokers, operations)
    for name in module.__all__
    if isinstance(getattr(module, name), Script)
}


def keys_of(words: Sequence[str]) -> Sequence[str]:
    """The keys of a command that a script ran."""
    name = words[0].upper()
    if name in ("TIME", "PUBLISH"):
        return []
    if name == "XREADGROUP":
        return [words[words.index("STREAMS") + 1]]
    return [words[2]] if name in ("XINFO", "XGROUP", "MEMORY") else [words[1]]


async def test_keys_that_scripts_use_are_declared(own_redis: RedisServer, admin: Redis) -> None:
    """As Redis sees it, command by command."""
    assert CALLS.keys() == SCRIPTS.keys()
    for entry in range(1, 7):
        await admin.xadd("s", {"message": "m"}, id=f"{entry}-1")
    await admin.xgroup_create("s", "g", "0")
    await admin.xgroup_create("awaited", "g", "0", mkstream=True)
    await admin.xreadgroup("g", "c", {"s": ">"}, count=3)
    undeclared: dict[str, set[str]] = {}
    calls = CallConnection(admin, 30.0)
    async with Redis.from_url(own_redis.url).monitor() as monitor:
        for name, (keys, arguments) in CALLS.items():
            if name == "RETRY":
                ((letter, _),) = await admin.xrange(DEAD)
                arguments = [letter.decode() if each == "LETTER" else each for each in arguments]
            call = ScriptCall.of(
                SCRIPTS[name], [key.encode() for key in keys], *(f"{each}".encode() for each in arguments)
            )
            (reply,) = await calls.run_all(call)
            assert not isinstance(reply, Refused), (name, reply)
            await admin.echo(f"after-{name}")
            used: set[str] = set()
            while (line := await monitor.next_command())["command"] != f"ECHO after-{name}":
                if line["client_type"] == "lua":
                    used.update(keys_of(line["command"].split(" ")))
            assert used or name == "PUBLISH", name
            if unknown := used - {key.decode() for key in call.keys}:
                undeclared[name] = unknown
    await calls.aclose()
    assert undeclared == {}


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_keys_in_the_texts_of_scripts_are_declared_ones(name: str) -> None:
    """Also in the branches that the other test does not reach: a key is one of KEYS, or is given to a function as such."""
    for script in (SCRIPTS[name], SCRIPTS[name].fenced, SCRIPTS[name].led):
        text = script.pack_call([], b"", 0, by_source=True).decode()
        used = re.findall(
            r"redis\.p?call\(\s*(?:'(\w+)'|ARGV\[1\])(?:, '(?:GROUPS|STREAM|CONSUMERS|CREATE|SETID|DELCONSUMER|DESTROY|USAGE)')?,?\s*([^,)\n]*)",
            text,
        )
        for command, key in used:
            if command in ("TIME", "PUBLISH"):
                continue
            if command == "XREADGROUP":
                assert "'STREAMS', KEYS[1]" in text
                continue
            assert re.fullmatch(r"KEYS\[\d\]|key|table\.remove\(KEYS|declared\[.*", key), (command, key)
        for given in re.findall(r"(?:find_group|count_of)\(([^,]+), ", text):
            assert given in ("KEYS[1]", "KEYS[2]", "key"), given
        assert re.findall(r"local key = (.*)", text) in ([], ["KEYS[#KEYS]"])
