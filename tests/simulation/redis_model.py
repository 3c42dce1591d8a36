"""The scripts of shards in Python: what they keep and what they answer, by a clock that the caller moves.

`test_redis_model.py` runs the same calls here and on a real Redis. Each check of a script is a method of its own, for the mutants.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from silbo.brokers.redis.members import FORGET_AFTER


@dataclass(slots=True)
class Lease:
    owner: str = ""
    epoch: int = 0
    until: int = 0  # Redis's milliseconds


@dataclass(slots=True)
class Shard:
    """A stream with one group, and the group's lease."""

    entries: list[object] = field(default_factory=list)  # an entry's id is its position
    given: int = 0  # the group was given the entries before this one
    pending: dict[int, None] = field(default_factory=dict)  # given and not acknowledged, in the order of ids
    lease: Lease = field(default_factory=Lease)


class Fenced(Exception):
    """A script refused the epoch."""


class ModelRedis:
    """Times are Redis's wall clock, in milliseconds."""

    def __init__(self, shards: int, lease: int) -> None:
        self.shards = [Shard() for _ in range(shards)]
        self.lease = lease
        self.members: dict[str, int] = {}

    # -- the checks ---------------------------------------------------------------------------------------

    def is_led(self, shard: int, member: str, epoch: int, script: str) -> bool:
        lease = self.shards[shard].lease
        return lease.owner == member and lease.epoch == epoch

    def is_free(self, lease: Lease, member: str, now: int) -> bool:
        return lease.owner == member or lease.until <= now

    def next_epoch(self, lease: Lease, now: int) -> int:
        return max(lease.epoch + 1, now)

    def bound(self, time: int, latest: int) -> int:
        """Return a time that is not to come: it may be from before the clock was set back."""
        return min(time, latest)

    def is_up_to_date(self, given: int, believed: int) -> bool:
        return given == believed

    def _fence(self, shard: int, member: str, epoch: int, script: str) -> None:
        if not self.is_led(shard, member, epoch, script):
            raise Fenced

    def add(self, shard: int, entry: object) -> None:
        self.shards[shard].entries.append(entry)

    # -- the scripts --------------------------------------------------------------------------------------

    def beat(self, now: int, member: str) -> dict[str, float]:
        """Note a sign of life; return the seconds since each member's last."""
        oldest = now - FORGET_AFTER * self.lease
        self.members = {name: self.bound(at, now) for name, at in self.members.items() if at > oldest}
        self.members[member] = now
        return {name: (now - at) / 1000 for name, at in self.members.items()}

    def leave(self, member: str) -> None:
        self.members.pop(member, None)

    def take(self, now: int, shard: int, member: str) -> tuple[int, int]:
        """Return the new epoch; or 0, and the milliseconds until the present lease is over."""
        lease = self.shards[shard].lease
        lease.until = self.bound(lease.until, now + self.lease)
        if not self.is_free(lease, member, now):
            return 0, lease.until - now
        self.shards[shard].lease = Lease(member, self.next_epoch(lease, now), now + self.lease)
        return self.shards[shard].lease.epoch, 0

    def renew(self, now: int, shard: int, member: str, epoch: int) -> bool:
        if not self.is_led(shard, member, epoch, "renew") or self.shards[shard].lease.until == 0:
            return False
        self.shards[shard].lease.until = now + self.lease
        return True

    def release(self, shard: int, member: str, epoch: int) -> bool:
        if not self.is_led(shard, member, epoch, "release"):
            return False
        self.shards[shard].lease.until = 0
        return True

    def read_again(self, shard: int, member: str, epoch: int, after: int, count: int) -> tuple[int, list[int]]:
        """Return the last that the group was given, and what it was given before and is not acknowledged."""
        self._fence(shard, member, epoch, "read")
        at = self.shards[shard]
        return at.given - 1, [each for each in at.pending if each > after][:count]

    def read_new(self, shard: int, member: str, epoch: int, last: int, count: int) -> tuple[int, list[int]]:
        """Return the last that the group had been given, and new entries: none if that is not what the reader believes."""
        self._fence(shard, member, epoch, "read")
        at = self.shards[shard]
        given = at.given - 1
        if not self.is_up_to_date(given, last):
            return given, []
        ids = list(range(at.given, min(at.given + count, len(at.entries))))
        at.given += len(ids)
        at.pending.update(dict.fromkeys(ids))
        return given, ids

    def ack(self, shard: int, member: str, epoch: int, ids: list[int]) -> None:
        self._fence(shard, member, epoch, "ack")
        for each in ids:
            self.shards[shard].pending.pop(each, None)
