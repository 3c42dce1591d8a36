"""The decisions of one member of a sharded group: which shards to take, to keep and to give away.

Without I/O and without a clock: the caller says what time it is, carries out the commands, and tells the replies. So the
simulation in ``tests/simulation`` drives this very code through kills, freezes and lost replies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from hashlib import blake2b
from typing import Final, TypeAlias

__all__ = [
    "FORGET_AFTER",
    "Beat",
    "Command",
    "Drop",
    "Membership",
    "Read",
    "Release",
    "Renew",
    "Stop",
    "Take",
    "assign",
]

BEAT_EVERY: Final = 0.4
"""A member says every 0.4 seconds that it lives, in proportion more often if a lease is shorter than 3 seconds. A planned move stands still
for as long: the next leader learns of it then."""
TAKE_EVERY: Final = 0.1
"""A shard that another member still leads is asked for every 0.1 seconds, and a call that was lost is repeated after as long."""
FORGET_AFTER: Final = 10
"""Redis forgets a member that has been silent for 10 leases."""


# -- the commands -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Beat:
    """Say that this member lives, or that it leaves. Its reply: the members, by the seconds since their last beat."""

    leaves: bool = False


@dataclass(frozen=True, slots=True)
class Take:
    """Take a shard's lease. Its reply: the new epoch, or 0; then the seconds until the present lease is over."""

    shard: int


@dataclass(frozen=True, slots=True)
class Renew:
    """Renew a lease. Its reply: True if this epoch still leads."""

    shard: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Release:
    """Give a shard away. Its reply does not matter."""

    shard: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Read:
    """Begin to read a shard: first what the group was given already, all of which is this member's by now. No reply."""

    shard: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Stop:
    """Read no more of a shard, finish what is in hand, then call :meth:`Membership.note_drained`. No reply."""

    shard: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Read no more of a shard, and forget what is in hand: it is another member's, or will be. No reply."""

    shard: int
    epoch: int


Command: TypeAlias = Beat | Take | Renew | Release | Read | Stop | Drop


# -- the assignment -----------------------------------------------------------------------------------------


def assign(members: Iterable[str], shards: int) -> dict[int, str]:
    """Return the member that each shard belongs to: the same for everybody who knows the same members.

    Rendezvous hashing, balanced: the numbers of shards of two members differ by 1 at most. A member that comes or goes moves
    few shards between the others.
    """
    members = sorted(set(members))
    if not members:
        return {}
    least, above = divmod(shards, len(members))
    pairs = sorted(
        ((_weigh(member, shard), shard, member) for member in members for shard in range(shards)), reverse=True
    )
    found: dict[int, str] = {}
    held: Counter[str] = Counter()
    for _, shard, member in pairs:
        if shard in found or held[member] > least or (held[member] == least and above == 0):
            continue
        above -= held[member] == least
        held[member] += 1
        found[shard] = member
    return found


def _weigh(member: str, shard: int) -> bytes:
    return blake2b(f"{shard} {member}".encode(), digest_size=8).digest()


# -- the member ---------------------------------------------------------------------------------------------


_NEVER: Final = float("inf")


class _State(Enum):
    LED = auto()
    STOPPING = auto()
    DRAINED = auto()


@dataclass(slots=True)
class _Lease:
    """A lease that this member took, by the member's clock."""

    epoch: int
    renewed_at: float  # when the call was sent that took or renewed it
    ask_at: float  # the next renewal or, once it is drained, release; never while that is under way
    stop_until: float = _NEVER
    state: _State = _State.LED


class Membership:
    """One member: the shards that it leads, and what it has to do next.

    Times are seconds of the member's own monotonic clock. For each command that is a call, exactly one of the methods that note
    its reply, or :meth:`note_lost`, is to be called; after each of them, :meth:`step`.

    Args:
        member: The member's name; no other process, and no earlier one, may have the same.
        shards: The number of shards.
        lease: Seconds that a lease lasts without renewal; a silent member counts as dead after as long.
        drain: Seconds that a shard which is given away is waited for; after them it is released with deliveries in hand.
    """

    def __init__(self, member: str, shards: int, *, lease: float, drain: float) -> None:
        self._member = member
        self._shards = shards
        self._lease = lease
        self._drain = drain
        self._beat_every = BEAT_EVERY * min(1.0, lease / 3.0)
        self._leases: dict[int, _Lease] = {}
        self._members: frozenset[str] = frozenset()
        self._mine: frozenset[int] = frozenset()  # the shards that are assigned to this member
        self._trust_at = float("-inf")  # before, a silent member is not taken for dead
        self._known_at = float("-inf")  # when the call was sent whose reply told the members
        self._beat_at = float("-inf")
        self._take_at: dict[int, float] = {}
        self._sent_at: dict[Command, float] = {}  # when each call was sent that is under way
        self._leaves = False
        self._has_left = False

    @property
    def led(self) -> Mapping[int, int]:
        """The epoch of each shard that this member reads."""
        return {shard: lease.epoch for shard, lease in self._leases.items() if lease.state is _State.LED}

    @property
    def held(self) -> Mapping[int, int]:
        """The epoch of each shard whose lease is this member's, as far as it knows: it reads it, or gives it away."""
        return {shard: lease.epoch for shard, lease in self._leases.items()}

    @property
    def is_over(self) -> bool:
        """True if the member has left and has given everything away."""
        return self._has_left and not self._leases and not any(isinstance(call, Take) for call in self._sent_at)

    def is_certain(self, shard: int, epoch: int, now: float) -> bool:
        """Return True if the lease of this epoch was renewed so lately that nobody else can have taken it."""
        lease = self._find(shard, epoch)
        return lease is not None and now < lease.renewed_at + self._lease

    def wants(self, shard: int) -> bool:
        """Return True if this member leads the shard, gives it away, or is to take it."""
        return shard in self._leases or (not self._leaves and shard in self._mine)

    def leave(self) -> None:
        """Give all shards away, and take none any more."""
        if not self._leaves:
            self._leaves = True
            self._beat_at = float("-inf")

    def step(self, now: float) -> list[Command]:
        """Return what to do now. A call without its reply is not given out again."""
        commands: list[Command] = []
        if now >= self._beat_at:
            self._beat_at = _NEVER
            commands.append(Beat(self._leaves))
        for shard, lease in self._leases.items():
            if lease.state is _State.LED and (self._leaves or shard not in self._mine):
                lease.state = _State.STOPPING
                lease.stop_until = now + self._drain
                commands.append(Stop(shard, lease.epoch))
            elif now >= lease.stop_until:
                self.note_drained(shard, lease.epoch)
                commands.append(Drop(shard, lease.epoch))
            if now >= lease.ask_at:
                lease.ask_at = _NEVER
                commands.append((Release if lease.state is _State.DRAINED else Renew)(shard, lease.epoch))
        for shard in self._find_free(now):
            if now >= self._take_at.get(shard, now):
                self._take_at[shard] = _NEVER
                commands.append(Take(shard))
        self._sent_at.update({command: now for command in commands if not isinstance(command, Stop | Drop)})
        return commands

    def wake_at(self, now: float) -> float:
        """Return the time of the next :meth:`step`, if no reply comes before."""
        times = [self._beat_at]
        times += [min(lease.ask_at, lease.stop_until) for lease in self._leases.values()]
        times += [self._take_at.get(shard, now) for shard in self._find_free(now)]
        return min(times)

    def _find_free(self, now: float) -> list[int]:
        """Return the shards to take: none if the members are not known well enough."""
        if self._leaves or now >= self._known_at + self._lease:
            return []
        return [shard for shard in self._mine if shard not in self._leases]

    # -- what happened --------------------------------------------------------------------------------------

    def note_beat(self, command: Beat, ages: Mapping[str, float], now: float) -> None:
        """Note the members by the seconds since their last beat, as Redis has seen them.

        A member that is not named has left; one that has been silent for a lease is dead. But after this member's own beats
        failed for a while, perhaps all failed, and those that it knew to live need a moment to be heard again.
        """
        sent_at = self._sent_at.pop(command)
        if command.leaves:
            self._has_left = True
            return
        if not self._leaves:
            self._beat_at = sent_at + self._beat_every
        if sent_at - self._known_at > self._lease / 3:
            self._trust_at = now + self._lease / 2
        self._known_at = sent_at
        doubtful = self._members if now < self._trust_at else frozenset()
        members = frozenset(member for member, age in ages.items() if age < self._lease or member in doubtful)
        if members != self._members:
            self._members = members
            assigned = assign(members, self._shards)
            self._mine = frozenset(shard for shard, member in assigned.items() if member == self._member)
            self._take_at = {shard: at for shard, at in self._take_at.items() if at == _NEVER}

    def note_taken(self, command: Take, epoch: int, wait: float, now: float) -> list[Command]:
        """Note the reply to a :class:`Take`."""
        sent_at = self._sent_at.pop(command)
        if epoch:
            del self._take_at[command.shard]
            self._leases[command.shard] = _Lease(epoch, sent_at, sent_at + self._lease / 3)
            return [Read(command.shard, epoch)]
        self._take_at[command.shard] = now + min(wait, TAKE_EVERY)
        return []

    def note_renewed(self, command: Renew, is_leading: bool) -> list[Command]:
        """Note the reply to a :class:`Renew`."""
        sent_at = self._sent_at.pop(command)
        if not is_leading:
            return self.note_fenced(command.shard, command.epoch)
        lease = self._find(command.shard, command.epoch)
        if lease is not None:
            lease.renewed_at = sent_at
            if lease.state is not _State.DRAINED:
                lease.ask_at = sent_at + self._lease / 3
        return []

    def note_released(self, command: Release) -> None:
        """Note the reply to a :class:`Release`."""
        del self._sent_at[command]
        if self._find(command.shard, command.epoch) is not None:
            del self._leases[command.shard]

    def note_lost(self, command: Command, now: float) -> None:
        """Note that a call got no reply: it may have been carried out. It is given out again soon."""
        del self._sent_at[command]
        again_at = now + TAKE_EVERY
        if isinstance(command, Beat):
            if command.leaves is self._leaves:
                self._beat_at = again_at
        elif isinstance(command, Take):
            self._take_at[command.shard] = again_at
        else:
            lease = self._find(command.shard, command.epoch)
            if lease is not None and (isinstance(command, Release) or lease.state is not _State.DRAINED):
                lease.ask_at = again_at

    def note_drained(self, shard: int, epoch: int) -> None:
        """Note that nothing of a stopped shard is in hand any more."""
        lease = self._find(shard, epoch)
        if lease is not None and lease.state is _State.STOPPING:
            lease.state = _State.DRAINED
            lease.stop_until = _NEVER
            lease.ask_at = float("-inf")

    def note_fenced(self, shard: int, epoch: int) -> list[Command]:
        """Note that a script refused this epoch: another member leads the shard, or nobody does."""
        lease = self._find(shard, epoch)
        if lease is None:
            return []
        del self._leases[shard]
        return [] if lease.state is _State.DRAINED else [Drop(shard, epoch)]

    def _find(self, shard: int, epoch: int) -> _Lease | None:
        lease = self._leases.get(shard)
        return lease if lease is not None and lease.epoch == epoch else None
