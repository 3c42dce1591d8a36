"""Leases of shards: who leads a shard of a group, in an epoch that only grows; and the calls that only its leader may make.

A lease is the hash ``{shard}:lease:{group}``, beside the shard: its owner, the epoch, and the end of the lease by Redis's clock. Every
script that the leader calls checks owner and epoch: see :attr:`~silbo.brokers.redis.scripts.Script.fenced`. So a process that was frozen
while another took over can neither read nor settle anything, however late its calls come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from silbo.brokers.redis.calls import ScriptCall
from silbo.brokers.redis.connection import Refused
from silbo.brokers.redis.scripts import RELEASE, RENEW, TAKE, Script

__all__ = ["Lease", "build_lease_key", "is_fenced", "make_take_call"]


def build_lease_key(key: bytes, group: bytes) -> bytes:
    """Return the key of the hash that says which member of a group leads a shard."""
    return b"%b:lease:%b" % (key, group)


def is_fenced(error: BaseException) -> bool:
    """Return True if an error says that the lease has another owner or epoch, or was made of one that does."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, Refused) and found.code == "FENCED":
            return True
        found = found.__cause__
    return False


def make_take_call(key: bytes, group: bytes, member: bytes, seconds: float) -> ScriptCall:
    """Return the call that takes the lease of a shard."""
    return ScriptCall.of(TAKE, [build_lease_key(key, group)], member, b"%d" % (seconds * 1000))


@dataclass(frozen=True, slots=True)
class Lease:
    """A lease that a member has taken.

    Attributes:
        key: Of the lease.
        member: The member's name.
        epoch: The epoch.
    """

    key: bytes
    member: bytes
    epoch: int

    def make_call(self, script: Script, keys: Sequence[bytes], *arguments: bytes) -> ScriptCall:
        """Return a call of the script that Redis carries out only while this lease is the last one taken."""
        return ScriptCall.of(script.fenced, [*keys, self.key], *arguments, self.member, b"%d" % self.epoch)

    def make_renew_call(self, seconds: float) -> ScriptCall:
        """Return the call that renews the lease."""
        return ScriptCall.of(RENEW, [self.key], self.member, b"%d" % self.epoch, b"%d" % (seconds * 1000))

    def make_release_call(self) -> ScriptCall:
        """Return the call that ends the lease."""
        return ScriptCall.of(RELEASE, [self.key], self.member, b"%d" % self.epoch)
