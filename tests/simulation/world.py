"""Members of a sharded group, a Redis and a network in virtual time, played from a history of faults.

The members decide with the product's own `Membership`; Redis is `ModelRedis`. One run is a function of its history: the same
history is the same run. What a run must keep is checked while it goes on, and raised as `Broken`.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from random import Random
from typing import Any

from silbo.brokers.redis.members import Beat, Command, Drop, Membership, Read, Release, Renew, Stop, Take, assign
from tests.simulation.redis_model import Fenced, ModelRedis

LEASE = 3.0
DRAIN = 2.0
TIMEOUT = 1.0  # a member waits for a reply
BELL = 0.4  # a read that found nothing is repeated
LATENCY = 0.002
WORK = 0.004  # a listener's
START_TIME = 1_800_000_000.0  # Redis's clock
PREFETCH = 16
UNMOVED = 0.05  # seconds that an entry waits at most in a shard that does not move
BACKLOG = 0.5  # seconds in which what came meanwhile is worked off
SETTLED = 1.0  # seconds until the first members have found one another


class Broken(AssertionError):
    """A promise was broken in a run."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that happens to the world.

    Attributes:
        at: The time.
        kind: "join", "leave", "kill", "freeze", "suspend" (a freeze in which the member's clock stands still as well), "lose"
            (a call), "slow" (a listener), "clock" (Redis's is set),
            "stall" (Redis carries calls out later), "outage" (it loses them).
        member: The position of the member among those that live.
        where: For "kill", "freeze" and "suspend": the name of the call before whose sending it happens, "listener", or "" for at
            once. For "lose": the name of the call.
        how: For "lose": "request", "reply", or "late" (the reply too; Redis carries it out when an entry comes, after `seconds` or more).
        seconds: How long, or how far.
    """

    at: float
    kind: str
    member: int = 0
    where: str = ""
    how: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class History:
    """All that decides a run."""

    seed: int
    members: int
    shards: int
    keys: int
    seconds: float
    faults: tuple[Fault, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    key: int
    number: int  # of the key, from 0
    at: float


class World:
    """One run."""

    def __init__(self, history: History, redis: Callable[[int, int], ModelRedis] = ModelRedis) -> None:
        self.history = history
        self.random = Random(history.seed)
        self.redis = redis(history.shards, int(LEASE * 1000))
        self.now = 0.0
        self.redis_offset = START_TIME
        self._stalled_until = 0.0
        self._away_until = 0.0
        self._held: list[Callable[[], None]] = []
        self._may_be_silent = any(fault.kind in ("stall", "outage") for fault in history.faults)
        self.members: list[SimulatedMember] = []
        self.log: list[str] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._scheduled = 0
        self._joined = 0
        self._published: defaultdict[int, int] = defaultdict(int)
        # The ledger: effects, fenced by epoch.
        self.ledger_epoch: defaultdict[int, int] = defaultdict(int)
        self.ledger: defaultdict[int, int] = defaultdict(int)  # the next number of each key
        self.doubles = 0
        # Seen by an onlooker.
        self.granted: defaultdict[int, list[tuple[float, int, str]]] = defaultdict(list)
        self.waited: list[
            tuple[int, float, float]
        ] = []  # the shard of each entry, when it was published, when it took effect
        self.assigned: list[tuple[float, dict[int, str]]] = []  # to those that live, at each change

    # -- time ---------------------------------------------------------------------------------------------

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        self._scheduled += 1
        heapq.heappush(self._events, (self.now + seconds, self._scheduled, act))

    def redis_now(self) -> int:
        return int((self.now + self.redis_offset) * 1000)

    def on_redis(self, seconds: float, act: Callable[[], None]) -> None:
        """Let Redis act when a call has arrived: not at all while it is away, later while it stalls."""
        self.after(seconds, partial(self._on_redis, act) if self._may_be_silent else act)

    def _on_redis(self, act: Callable[[], None]) -> None:
        if self.now < self._away_until:
            return
        if self.now < self._stalled_until:
            self.after(self._stalled_until - self.now, partial(self._on_redis, act))
        else:
            act()

    def hold(self, act: Callable[[], None]) -> None:
        """Let Redis act when the next entry has come, before anybody has read it: then a late read does the most harm."""
        self._held.append(act)

    def may_lose(self) -> bool:
        """Return True if a call may stay without a reply for too long, though none is lost."""
        return self._may_be_silent

    def latency(self) -> float:
        return LATENCY * (0.5 + self.random.random())

    # -- the run ------------------------------------------------------------------------------------------

    def run(self) -> World:
        history = self.history
        for _ in range(history.members):
            self.join()
        for fault in history.faults:
            self.after(fault.at, partial(self._happen, fault))
        self.after(0.05, self._publish)
        self.after(history.seconds, self._end_faults)
        # Afterwards nothing happens any more, and all must come to rest: a death unnoticed, a lease, a slow listener.
        end = history.seconds + 2 * LEASE + 2
        events = self._events
        while events and events[0][0] <= end:
            self.now, _, act = heapq.heappop(events)
            act()
        self.now = end
        self._check_rest()
        return self

    def join(self) -> None:
        self._joined += 1
        self.members.append(SimulatedMember(self, f"m{self._joined}"))
        self.note_members()

    def living(self) -> list[SimulatedMember]:
        return [member for member in self.members if not member.is_dead and not member.leaves]

    def _publish(self) -> None:
        if self.now >= self.history.seconds:
            return
        key = self.random.randrange(self.history.keys)
        shard = key % self.history.shards
        for _ in range(self.random.choice((1, 1, 1, 3))):
            self.redis.add(shard, Entry(key, self._published[key], self.now))
            self._published[key] += 1
            held, self._held = self._held, []
            for act in held:
                act()
        for member in self.members:
            member.ring(shard)
        self.after(0.02 + self.random.random() * 0.1, self._publish)

    def _end_faults(self) -> None:
        for member in self.members:
            member.disarm()
        if not self.living():
            self.join()

    def _happen(self, fault: Fault) -> None:
        living = self.living()
        self.note(f"{fault}")
        if fault.kind == "join":
            self.join()
        elif fault.kind == "clock":
            self.redis_offset += fault.seconds
        elif fault.kind == "stall":
            self._stalled_until = min(self.now + fault.seconds, self.history.seconds)
        elif fault.kind == "outage":
            self._away_until = min(self.now + fault.seconds, self.history.seconds)
        elif living:
            living[fault.member % len(living)].suffer(fault)

    def note_members(self, without: SimulatedMember | None = None) -> None:
        """Note who lives from now on."""
        names = [member.name for member in self.living() if member is not without]
        self.assigned.append((self.now, assign(names, self.history.shards)))

    # -- the ledger, and the onlooker ---------------------------------------------------------------------

    def note(self, what: str) -> None:
        self.log.append(f"{self.now:8.3f} {what}")

    def take_effect(self, shard: int, epoch: int, entry: Entry) -> bool:
        """Enter an effect into the ledger; False if it refuses the epoch."""
        if epoch < self.ledger_epoch[shard]:
            return False
        self.ledger_epoch[shard] = epoch
        expected = self.ledger[entry.key]
        if entry.number > expected:
            self.fail(f"order: key {entry.key} got {entry.number} before {expected}")
        if entry.number < expected:
            self.doubles += 1
        else:
            self.ledger[entry.key] += 1
            self.waited.append((shard, entry.at, self.now))
        return True

    def note_grant(self, shard: int, epoch: int, member: str) -> None:
        earlier = self.granted[shard]
        if earlier and epoch <= earlier[-1][1]:
            self.fail(f"epoch: {epoch} of shard {shard} is not above {earlier[-1][1]}")
        self.note(f"{member}: takes {shard}, epoch {epoch}")
        earlier.append((self.now, epoch, member))

    def check_epoch(self, what: object, shard: int, epoch: int) -> None:
        """Check that what Redis has just carried out was asked for by the newest epoch."""
        newest = self.granted[shard][-1][1]
        if epoch != newest:
            self.fail(f"fence: {what} of shard {shard} by epoch {epoch}, led by {newest}")

    def fail(self, what: str) -> None:
        self.note(what)
        raise Broken(what)

    def check_standstill(self, longest: float, since: float = 0.0) -> None:
        """Check that a shard that moved stood still for at most so long, and the others not at all."""
        for shard, at, affected_at in self.waited:
            if at < since:
                continue
            if affected_at - at > longest:
                self.fail(f"standstill: an entry of shard {shard} from {at:.3f} took effect at {affected_at:.3f}")
            # A backlog of the move is worked off a moment later.
            if affected_at - at > UNMOVED and not any(
                at - BACKLOG <= each[0] <= affected_at for each in self.granted[shard]
            ):
                self.fail(
                    f"standstill: shard {shard} did not move, and an entry waited from {at:.3f} to {affected_at:.3f}"
                )

    def check_moves(self) -> None:
        """Check that no shard moved but for a member that came or went, once all had found one another."""
        first = [assigned for at, assigned in self.assigned if at == 0.0][-1]
        changes = [first, *[assigned for at, assigned in self.assigned if at > 0.0]]
        for shard, grants in self.granted.items():
            needed = sum(before.get(shard) != after.get(shard) for before, after in pairwise(changes))
            owners = [first[shard], *[owner for at, _, owner in grants if at > SETTLED]]
            moved = sum(before != after for before, after in pairwise(owners))
            if moved > needed:
                self.fail(f"moves: shard {shard} moved {moved} times, {needed} were needed")

    def check_doubles(self) -> None:
        """Check that no effect came twice: nothing was taken away that was in hand."""
        if self.doubles:
            self.fail(f"doubles: {self.doubles}")

    def _check_rest(self) -> None:
        """Check that all came to rest: nothing lost, and everybody of one mind."""
        for position, shard in enumerate(self.redis.shards):
            if shard.given < len(shard.entries) or shard.pending:
                self.fail(
                    f"rest: shard {position} has {len(shard.entries) - shard.given} unread, {dict(shard.pending)} in hand"
                )
        for key, count in self._published.items():
            if self.ledger[key] != count:
                self.fail(f"lost: key {key} had {self.ledger[key]} effects of {count}")
        living = self.living()
        assigned = assign([member.name for member in living], self.history.shards)
        led = {shard: member.name for member in living for shard in member.membership.led}
        if led != assigned:
            self.fail(f"rest: {led} lead, not {assigned}")
        for shard, name in assigned.items():
            if self.redis.shards[shard].lease.owner != name:
                self.fail(f"rest: Redis says that {self.redis.shards[shard].lease.owner} leads {shard}, not {name}")


class Call:
    """A call on its way to Redis and back."""

    __slots__ = ("_carry_out", "_lost", "_member", "_note", "is_answered", "is_over")

    def __init__(
        self,
        member: SimulatedMember,
        carry_out: Callable[[], Any],
        note: Callable[[Any], None],
        lost: Callable[[], None],
    ) -> None:
        self._member = member
        self._carry_out = carry_out
        self._note = note
        self._lost = lost
        self.is_answered = True
        self.is_over = False

    def carry_out(self) -> None:
        reply = self._carry_out()
        if self.is_answered:
            self._member.later(self._member.world.latency(), partial(self._answer, reply))

    def _answer(self, reply: Any) -> None:
        if not self.is_over:
            self.is_over = True
            self._note(reply)

    def give_up(self) -> None:
        if not self.is_over:
            self.is_over = True
            self._lost()


# -- a member -----------------------------------------------------------------------------------------------


class SimulatedMember:
    """A consumer process: the product's `Membership`, a network in front of Redis, and a reader for each shard."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.membership = Membership(name, world.history.shards, lease=LEASE, drain=DRAIN)
        self.readers: dict[int, Reader] = {}
        self.is_dead = False
        self.leaves = False
        self._frozen_until = 0.0
        self._clock = world.random.random() * 1e6
        self._armed: list[Fault] = []
        self._arrived_at: dict[str, float] = {}  # the last call, by connection: calls keep their order
        self._wake_at = float("inf")
        self._work()

    def now(self) -> float:
        return self.world.now + self._clock

    # -- faults -------------------------------------------------------------------------------------------

    def suffer(self, fault: Fault) -> None:
        if fault.kind == "leave":
            self.leaves = True
            self.later(0.0, self._leave)
            self.world.note_members()
        elif fault.where or fault.kind in ("slow", "lose"):
            self._armed.append(fault)
        else:
            self._strike(fault)

    def _strike(self, fault: Fault) -> None:
        self.world.note(f"{self.name}: {fault.kind}")
        if fault.kind == "kill":
            self.is_dead = True
        else:
            until = min(self.world.now + fault.seconds, self.world.history.seconds)
            if until > self._frozen_until:
                if fault.kind == "suspend":
                    self._clock -= until - max(self._frozen_until, self.world.now)
                self._frozen_until = until
                self.world.after(until - self.world.now, self.world.note_members)
        self.world.note_members(without=self)

    def pop_armed(self, kinds: tuple[str, ...], where: str) -> Fault | None:
        """Return the fault that waits here, if any."""
        for fault in self._armed:
            if fault.kind in kinds and fault.where == where:
                self._armed.remove(fault)
                return fault
        return None

    def disarm(self) -> None:
        self._armed.clear()

    def reach(self, where: str) -> None:
        """Come to a place where a fault may wait."""
        if self._armed and (fault := self.pop_armed(("kill", "freeze", "suspend"), where)):
            self._strike(fault)

    # -- time and network ---------------------------------------------------------------------------------

    def later(self, seconds: float, act: Callable[[], None]) -> None:
        """Act later: after the freeze, if the member is frozen then; not at all if it is dead."""

        def begin() -> None:
            if self.is_dead:
                return
            if self.world.now < self._frozen_until:
                self.world.after(self._frozen_until - self.world.now, begin)
            else:
                act()

        self.world.after(seconds, begin)

    def call(
        self, name: str, carry_out: Callable[[], Any], note: Callable[[Any], None], lost: Callable[[], None]
    ) -> None:
        """Send a call to Redis; one of `note` and `lost` follows."""
        if self._armed:
            self.reach(name)
            if self.is_dead:
                return
            if self.world.now < self._frozen_until:  # decided before, sent afterwards
                self.later(0.0, partial(self._send, name, carry_out, note, lost))
                return
        self._send(name, carry_out, note, lost)

    def _send(
        self, name: str, carry_out: Callable[[], Any], note: Callable[[Any], None], lost: Callable[[], None]
    ) -> None:
        world = self.world
        fault = self.pop_armed(("lose",), name)
        call = Call(self, carry_out, note, lost)
        if fault is None:
            connection = name if name in ("read", "ack") else ""
            arrives_at = max(world.now + world.latency(), self._arrived_at.get(connection, 0.0))
            self._arrived_at[connection] = arrives_at
            world.on_redis(arrives_at - world.now, call.carry_out)
        else:
            world.note(f"{self.name}: {fault.how} of {name} lost")
            call.is_answered = False
            if fault.how == "late":
                world.after(fault.seconds, partial(world.hold, call.carry_out))
            elif fault.how == "reply":
                world.on_redis(world.latency(), call.carry_out)
        if fault is not None or world.may_lose():
            self.later(TIMEOUT, call.give_up)

    # -- the membership -----------------------------------------------------------------------------------

    def _leave(self) -> None:
        self.world.note(f"{self.name}: leaves")
        self.membership.leave()
        self._work()

    def _wake(self) -> None:
        self._wake_at = float("inf")
        self._work()

    def _work(self) -> None:
        self.carry_out(self.membership.step(self.now()))
        if self.membership.is_over:
            self.is_dead = True
            return
        at = self.membership.wake_at(self.now()) - self._clock
        if at < self._wake_at - 1e-9:
            self._wake_at = at
            self.later(at - self.world.now, self._wake)

    def carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Read):
                self.readers[command.shard] = Reader(self, command.shard, command.epoch)
            elif isinstance(command, Stop):
                self.readers[command.shard].stop()
            elif isinstance(command, Drop):
                self.world.note(f"{self.name}: drops {command.shard}")
                self.readers.pop(command.shard).drop()
            else:
                self.call(
                    type(command).__name__,
                    partial(self._execute, command),
                    partial(self._note, command),
                    partial(self._lost, command),
                )

    def _execute(self, command: Command) -> Any:
        redis, now = self.world.redis, self.world.redis_now()
        if isinstance(command, Beat):
            return redis.leave(self.name) if command.leaves else redis.beat(now, self.name)
        if isinstance(command, Take):
            epoch, wait = redis.take(now, command.shard, self.name)
            if epoch:
                self.world.note_grant(command.shard, epoch, self.name)
            return epoch, wait / 1000
        assert isinstance(command, Renew | Release)
        arguments = command.shard, self.name, command.epoch
        done = redis.renew(now, *arguments) if isinstance(command, Renew) else redis.release(*arguments)
        if done:
            self.world.check_epoch(command, command.shard, command.epoch)
        return done

    def _note(self, command: Command, reply: Any) -> None:
        membership = self.membership
        if isinstance(command, Beat):
            membership.note_beat(command, reply or {}, self.now())
        elif isinstance(command, Take):
            self.carry_out(membership.note_taken(command, *reply, self.now()))
        elif isinstance(command, Renew):
            self.carry_out(membership.note_renewed(command, reply))
        elif isinstance(command, Release):
            membership.note_released(command)
            self.readers.pop(command.shard, None)
        self._work()

    def _lost(self, command: Command) -> None:
        self.membership.note_lost(command, self.now())
        self._work()

    def note_drained(self, shard: int, epoch: int) -> None:
        self.membership.note_drained(shard, epoch)
        self._work()

    def note_fenced(self, shard: int, epoch: int) -> None:
        self.carry_out(self.membership.note_fenced(shard, epoch))
        self._work()

    def ring(self, shard: int) -> None:
        if reader := self.readers.get(shard):
            reader.ring()


class Reader:
    """Reads one shard under one epoch, and runs a listener for each entry, in lanes by key."""

    def __init__(self, member: SimulatedMember, shard: int, epoch: int) -> None:
        self.member = member
        self.world = member.world
        self.shard = shard
        self.epoch = epoch
        self._after: int | None = -1  # what was given before is read again from here; then new entries
        self._given = -1  # the last that the group was given, as far as this reader knows
        self._lanes: defaultdict[int, deque[tuple[int, Entry]]] = defaultdict(deque)
        self._in_hand: set[int] = set()
        self._is_stopped = False
        self._is_dropped = False
        self._is_reading = False
        self._bell = 0  # for how many bells it has waited; 0 if it does not wait
        self._bells = 0
        self._read()

    # -- reading ------------------------------------------------------------------------------------------

    def ring(self) -> None:
        """Tell of a new entry."""
        if self._bell:
            self._bell = 0
            self.member.later(self.world.latency(), self._read)

    def _ring_at_last(self, bell: int) -> None:
        if self._bell == bell:
            self._bell = 0
            self._read()

    def _read(self) -> None:
        if self._is_stopped or self._is_dropped or self._is_reading or self._bell or len(self._in_hand) >= PREFETCH:
            return
        self._is_reading = True
        self.member.call(
            "read", partial(self._execute_read, self._after, self._given), self._note_read, self._lose_read
        )

    def _execute_read(self, after: int | None, given: int) -> tuple[int, list[int]] | None:
        redis, arguments = self.world.redis, (self.shard, self.member.name, self.epoch)
        try:
            if after is None:
                reply = redis.read_new(*arguments, given, PREFETCH)
            else:
                reply = redis.read_again(*arguments, after, PREFETCH)
        except Fenced:
            return None
        self.world.check_epoch("read", self.shard, self.epoch)
        return reply

    def _note_read(self, reply: tuple[int, list[int]] | None) -> None:
        self._is_reading = False
        if self._is_dropped:
            return
        if reply is None:
            self.member.note_fenced(self.shard, self.epoch)
            return
        if self._is_stopped:  # left to the next leader
            self._check_drained()
            return
        given, ids = reply
        if self._after == -1:
            self._given = given
        elif self._after is None and ids:
            self._given = ids[-1]
        elif self._after is None and given != self._given:  # an earlier read of this reader was carried out late
            self._after = -1
            self._read()
            return
        was_new = self._after is None
        if not was_new:
            self._after = ids[-1] if ids else None
        entries = self.world.redis.shards[self.shard].entries
        for each in ids:
            if each not in self._in_hand:
                self._in_hand.add(each)
                entry: Any = entries[each]
                lane = self._lanes[entry.key]
                lane.append((each, entry))
                if len(lane) == 1:
                    self._begin(entry.key)
        if ids or not was_new:
            self._read()
        elif self.world.redis.shards[self.shard].given < len(entries):
            self._read()  # the bell, a read without a group, finds it at once
        else:
            self._bells += 1
            self._bell = self._bells
            self.member.later(BELL, partial(self._ring_at_last, self._bell))

    def _lose_read(self) -> None:
        self._is_reading = False
        self._after = -1
        if self._is_stopped:
            self._check_drained()
        else:
            self._read()

    # -- listeners ----------------------------------------------------------------------------------------

    def _begin(self, key: int) -> None:
        slow = self.member.pop_armed(("slow",), "")
        self.member.later(WORK / 2 + (slow.seconds if slow else 0), partial(self._affect, key))

    def _affect(self, key: int) -> None:
        self.member.reach("listener")
        self.member.later(0.0, partial(self._take_effect, key))

    def _take_effect(self, key: int) -> None:
        _, entry = self._lanes[key][0]
        if self.world.take_effect(self.shard, self.epoch, entry):
            self.member.later(WORK / 2, partial(self._finish, key))
        else:
            self.member.note_fenced(self.shard, self.epoch)

    def _finish(self, key: int) -> None:
        each, _ = self._lanes[key].popleft()
        self._ack(each)
        if self._lanes[key] and not self._is_dropped:
            self._begin(key)

    def _ack(self, each: int) -> None:
        self.member.call(
            "ack", partial(self._execute_ack, each), partial(self._note_ack, each), partial(self._ack_again, each)
        )

    def _execute_ack(self, each: int) -> bool:
        try:
            self.world.redis.ack(self.shard, self.member.name, self.epoch, [each])
        except Fenced:
            return False
        self.world.check_epoch("ack", self.shard, self.epoch)
        return True

    def _note_ack(self, each: int, done: bool) -> None:
        if not done:
            self.member.note_fenced(self.shard, self.epoch)
            return
        self._in_hand.discard(each)
        self._check_drained()
        self._read()

    def _ack_again(self, each: int) -> None:
        if not self._is_dropped:
            self._ack(each)

    # -- the end ------------------------------------------------------------------------------------------

    def stop(self) -> None:
        self._is_stopped = True
        self._check_drained()

    def _check_drained(self) -> None:
        if self._is_stopped and not self._is_dropped and not self._in_hand and not self._is_reading:
            self.member.note_drained(self.shard, self.epoch)

    def drop(self) -> None:
        self._is_dropped = True
        self._in_hand.clear()
