"""The number of shards of an address: fixed in Redis, beside the stream without shards and beside each shard."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import TypeAlias

from silbo.brokers.redis.calls import CallConnection, Command, ScriptCall, ask
from silbo.brokers.redis.connection import Lost, Refused
from silbo.brokers.redis.in_hand import build_given_key
from silbo.brokers.redis.retention import build_retention_key, build_trim
from silbo.brokers.redis.scripts import CREATE, FIX_SHARDS, GIVE_WAY
from silbo.errors import BrokerUnavailable, ShardAddressed, ShardsMismatch
from silbo.message import Message

__all__ = ["FixedShards", "build_shard_key", "build_shards_key", "find_shards", "is_like_a_shard", "to_mismatch"]

_Shards: TypeAlias = tuple[str, int]
"""An address and its number of shards, as a program says it."""


def build_shards_key(key: bytes) -> bytes:
    """Return the key of the hash with the number of shards, beside a shard or beside the stream without shards."""
    return b"%b:shards" % key


def build_shard_key(key: bytes, shard: int) -> bytes:
    """Return the key of a shard of the address that has this key without shards: ``silbo:{orders.3}`` of ``silbo:{orders}``."""
    return b"%b.%d}" % (key[:-1], shard)


def find_shards(message: Message, default: str) -> _Shards:
    """Return the address of a message, without its shard, and the number of shards that it says; 0 for none."""
    address = message.to or default
    return (address.rpartition(".")[0], message.shards) if message.shards else (address, 0)


def is_like_a_shard(address: str | None) -> bool:
    """Return True if an address may be a shard of another one: it ends as ``orders.3`` does."""
    return address is not None and address[-1:].isdecimal() and address.rpartition(".")[2].isdecimal()


def to_mismatch(key: bytes, said: int, refusal: Refused) -> ShardsMismatch | None:
    """Return the error of a script's answer ``SHARDS`` about a stream, with the number that was said; None for other answers."""
    fixed = str(refusal).partition(" ")[2]
    if refusal.code != "SHARDS" or not fixed.isdigit():
        return None
    address = key.decode().partition("{")[2].partition("}")[0]
    return ShardsMismatch(address.rpartition(".")[0] if said else address, fixed=int(fixed), wanted=said or 1)


class FixedShards:
    """Fixes the numbers of shards in Redis before anything is added, and finds programs that say another one.

    The scripts that add messages check the number beside the shard. So it is fixed first in one place, where only one number can
    win, and then beside each shard.

    Args:
        connection: Runs the calls.
        build_key: Returns the key that an address's stream has without shards.
    """

    def __init__(self, connection: CallConnection, build_key: Callable[[str], bytes]) -> None:
        self._connection = connection
        self._build_key = build_key
        self._fixed: dict[str, int] = {}  # by address
        self.mismatches: dict[_Shards, ShardsMismatch] = {}  # found by the last attempt

    @property
    def knows_any(self) -> bool:
        """True if an address is known to have shards."""
        return bool(self._fixed)

    def forget(self, addresses: Iterable[str]) -> None:
        """Look again before the next message: Redis may have lost its data, or the number may be another by now."""
        for address in addresses:
            self._fixed.pop(address, None)

    async def explain(self, said: Collection[_Shards], error: BrokerUnavailable) -> None:
        """Raise the reason of an error if it is another number of shards than what was said; look again before the next message.

        Raises:
            ShardsMismatch: another number is fixed.
            ShardAddressed: an address is a shard of another one.
        """
        self.forget(address for address, _ in said)
        for address, shards in said:
            if (address, shards) in self.mismatches:
                raise self.mismatches[address, shards] from error
            if shards:
                try:
                    await self.fix(address, shards)
                except ShardsMismatch as mismatch:
                    raise mismatch from error
                except BrokerUnavailable:
                    pass  # the first error tells more
            else:
                await self.refuse_shard(address)
            if not shards and (fixed := await self.read(address)):
                raise ShardsMismatch(address, fixed=fixed, wanted=1) from error

    async def fix(self, address: str, shards: int) -> None:
        """Fix the number of an address, unless that is done.

        Raises:
            ShardsMismatch: another number is fixed.
            BrokerUnavailable: Redis did not answer, or refused; safe to repeat.
        """
        if self._fixed.get(address) == shards:
            return
        self.mismatches.pop((address, shards), None)
        try:
            await self.refuse_shard(address)
        except ShardAddressed as error:
            raise BrokerUnavailable(f"{error}; not sent") from error
        root = self._build_key(address)
        keys = [build_shard_key(root, shard) for shard in range(shards)]
        number = b"%d" % shards
        groups = await self._check(address, shards, [ScriptCall.of(FIX_SHARDS, [build_shards_key(root), root], number)])
        calls = [ScriptCall.of(FIX_SHARDS, [build_shards_key(key)], number) for key in keys]
        await self._check(address, shards, calls)
        if groups:
            made = [
                ScriptCall.of(CREATE, [key, build_given_key(key)], name, after)
                for key in keys
                for name, after in zip(groups[::2], groups[1::2], strict=True)
            ]
            await ask(self._connection, *made)
            await ask(self._connection, ScriptCall.of(GIVE_WAY, [root]))
        # A policy that was set before there were shards lies beside the stream without shards. TRIM keeps one that a shard has.
        (policy,) = await self._connection.run_all(Command(b"HGET", build_retention_key(root), b"policy"))
        if isinstance(policy, bytes):
            await ask(self._connection, *[build_trim(key, policy) for key in keys])
        self._fixed[address] = shards

    async def follow(self, address: str, said: int) -> int:
        """Return the number that is fixed for an address, whichever is said; fix the one that is said if there is none.

        Without a number that is said, 0 if none is known.

        Raises:
            ShardsMismatch: the number is being changed, or the address is a stream without shards.
            BrokerUnavailable: Redis did not answer, or refused; safe to repeat.
        """
        known = self._fixed.get(address, 0)
        if known or not said:
            return known
        try:
            await self.fix(address, said)
        except ShardsMismatch as mismatch:
            self.mismatches.pop((address, said), None)
            if mismatch.fixed < 2:
                raise
            await self.fix(address, mismatch.fixed)
            return mismatch.fixed
        return said

    async def read(self, address: str) -> int:
        """Return the number of an address's shards: the number of before while it is being changed; 0 if there is none.

        Raises:
            BrokerUnavailable: Redis did not answer, or refused.
        """
        key = build_shards_key(self._build_key(address))
        fixed, before = await self._connection.run(Command(b"HMGET", key, b"shards", b"was"))
        return int(fixed or 0) or int(before or 0)

    async def refuse_shard(self, address: str) -> None:
        """Refuse an address that is one of another address's shards.

        Raises:
            ShardAddressed: it is.
            BrokerUnavailable: Redis did not answer, or refused.
        """
        whole, _, shard = address.rpartition(".")
        if whole and shard.isdecimal() and shard in map(str, range(shards := await self.read(whole))):
            raise ShardAddressed(address, whole=whole, shards=shards)

    async def find_unfixed(self, wanted: Collection[_Shards]) -> dict[_Shards, BrokerUnavailable]:
        """Fix numbers; return the errors of those that can't be."""
        errors: dict[_Shards, BrokerUnavailable] = {}
        for address, shards in wanted:
            try:
                await self.fix(address, shards)
            except BrokerUnavailable as error:
                errors[address, shards] = error
        return errors

    async def _check(self, address: str, shards: int, calls: list[ScriptCall]) -> list[bytes]:
        """Raise the error of a reply; return what follows the number in the last one."""
        rest: list[bytes] = []
        for reply in await self._connection.run_all(*calls):
            if isinstance(reply, Lost | Refused):
                raise BrokerUnavailable(f"can't fix the shards of {address!r}: {reply}") from reply
            number, *rest = reply
            if (fixed := int(number)) != shards:
                error = ShardsMismatch(address, fixed=fixed, wanted=shards)
                self.mismatches[address, shards] = error
                raise error
        return rest

    async def aclose(self) -> None:
        """Close the connection. May be called twice."""
        await self._connection.aclose()
