"""Random histories of an outbox: relays that crash, freeze and overtake one another, lost answers, restored stores.

Whatever happens: nothing that was committed is lost, nothing is in the stream twice but what was replayed or is in a store
that was restored, and each key is in the order of commit. ``SILBO_MACHINE_EXAMPLES`` sets how many histories are tried;
with ``SILBO_MACHINE_SHRINK=1`` one that fails is made as short as it can be.
"""

from __future__ import annotations

import asyncio
import copy
import os
import shutil
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from redis import Redis as SyncRedis
from redis.asyncio import Redis

from silbo.brokers.memory import MemoryBroker
from silbo.brokers.redis import RedisStreams
from silbo.errors import BrokerUnavailable, DeliveryUnknown, Fenced, LeadLost, MessageRefused
from silbo.message import Message, Origin
from silbo.outbox import relay as relaying
from silbo.outbox.outbox import Outbox
from silbo.outbox.relay import Outcome, Relay
from silbo.outbox.rows import Lead
from silbo.protocols import Sequenced
from silbo.stores.memory import MemoryStore
from silbo.stores.sqlite import SQLiteStore
from silbo.wire.formats import JSON, JsonFormat

EXAMPLES = int(os.environ.get("SILBO_MACHINE_EXAMPLES", "25"))
SMALLEST = "SILBO_MACHINE_SHRINK" in os.environ
"""Whether to look for the shortest history that fails, which can take five minutes."""
PHASES = [phase for phase in Phase if SMALLEST or phase not in (Phase.shrink, Phase.explain)]
PAST, FAR = datetime(2000, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)
SHM = Path("/dev/shm")
"""In memory: what is tested here is not the disk."""

Fault = Literal["none", "unavailable", "answer lost", "crash before", "crash after", "freeze before", "freeze after"]
FAULTS: Sequence[Fault] = (*3 * ("none",), *get_args(Fault)[1:])
OWNERS = ("a", "b", "c")
OWNER = st.sampled_from(["a", "a", "a", "b", "c"])
MESSAGES = st.lists(st.tuples(st.sampled_from(["a", "b", None]), st.booleans()), min_size=1, max_size=4)
"""Key, and whether it may be odd."""


class Crash(BaseException):
    """The relay's process is gone."""


class Picky(JsonFormat):
    """Refuses odd messages, but for those that somebody has seen to."""

    def __init__(self) -> None:
        self.mended: set[int] = set()

    def encode(self, message: Message, origin: Origin) -> bytes:
        if message.payload["odd"] and message.payload["n"] not in self.mended:
            raise MessageRefused(message.message_name, "too odd")
        return super().encode(message, origin)


# -- where it happens ----------------------------------------------------------------------------------------


class InMemory:
    """A store in memory; a copy of it is made of what it holds."""

    def __init__(self) -> None:
        self.store = MemoryStore()

    async def copied(self) -> None:
        stored = {name: value for name, value in vars(self.store).items() if name != "_binding"}  # the loop stays
        self._copy = copy.deepcopy(stored)

    async def restored(self) -> None:
        vars(self.store).update(copy.deepcopy(self._copy))

    def close(self) -> None: ...


class InFile:
    """A store in an SQLite file; a copy of it is a copy of the file."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(dir=SHM if SHM.is_dir() else None))
        self.store = SQLiteStore(self._folder / "outbox.db")

    async def copied(self) -> None:
        shutil.copy(self.store.path, self._folder / "copy")

    async def restored(self) -> None:
        await self.store.aclose()
        shutil.copy(self._folder / "copy", self.store.path)
        await self.store.open()

    def close(self) -> None:
        shutil.rmtree(self._folder)


class MemoryStream:
    def __init__(self) -> None:
        self.format = Picky()
        self.flush()

    def flush(self) -> None:
        self.broker = MemoryBroker("web", limit=1_000_000, format=self.format)

    def numbers(self) -> list[int]:
        return [delivery.message().payload["n"] for delivery in self.broker._kept]

    def close(self) -> None: ...


class RedisStream:
    def __init__(self, url: str) -> None:
        self.format = Picky()
        self._client, self._prefix = SyncRedis.from_url(url), f"test-{uuid.uuid4().hex[:12]}"
        self.broker = RedisStreams(Redis.from_url(url), app="web", prefix=self._prefix, format=self.format)

    def flush(self) -> None:
        if keys := self._client.keys(f"{self._prefix}:*"):
            self._client.delete(*keys)

    def numbers(self) -> list[int]:
        entries = self._client.xrange(f"{self._prefix}:{{events}}")
        return [JSON.decode(fields[b"message"]).payload["n"] for _, fields in entries]

    def close(self) -> None:
        self.flush()
        self._client.close()


class Faulty:
    """The broker as one relay sees it: one of the next calls goes wrong in one way."""

    app = "web"

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.fault: Fault = "none"
        self.calls_before = 0  # that go well
        self.frozen: asyncio.Future[None] | None = None
        self.froze = asyncio.Event()

    async def publish(self, *messages: Message) -> None:
        raise NotImplementedError

    async def publish_sequenced(self, source: str, epoch: int, messages: Sequence[tuple[int, Message]]) -> Sequenced:
        fault: Fault = "none"
        if self.calls_before:
            self.calls_before -= 1
        else:
            fault, self.fault = self.fault, "none"
        if fault == "unavailable":
            raise BrokerUnavailable("away")
        if fault == "crash before":
            raise Crash
        if fault == "freeze before":
            await self._freeze()
        answer: Sequenced = await self._stream.broker.publish_sequenced(source, epoch, messages)
        if fault == "answer lost":
            raise DeliveryUnknown("the connection broke")
        if fault == "crash after":
            raise Crash
        if fault == "freeze after":
            await self._freeze()
        return answer

    async def _freeze(self) -> None:
        self.frozen = asyncio.get_running_loop().create_future()
        self.froze.set()
        await self.frozen

    async def aclose(self) -> None: ...


class Process:
    """One relay, and what it has in memory."""

    def __init__(self, world: Any, stream: Any, owner: str) -> None:
        self.publisher = Faulty(stream)
        self._store = world.store
        self._owner = owner
        self._relay = Relay(world.store, self.publisher, on_error=lambda *_: None)
        self.lead: Lead | None = None
        self._above = 0
        self._outcome = Outcome()  # to be settled with the next taking
        self.sending: asyncio.Task[Any] | None = None  # frozen in it

    async def takes_the_lead(self) -> None:
        """Nobody's lease ever runs here: anybody may take over at any time."""
        lead = await self._store.lead(0, self._owner, lease=0.0, above=self._above)
        if lead is None:
            return
        if self.lead is None or lead.epoch != self.lead.epoch:  # no renewal
            self._outcome = Outcome()
        self.lead = lead

    async def sends(self, limit: int, fault: Fault, calls_before: int = 0) -> None:
        self.publisher.fault = fault
        self.publisher.calls_before = calls_before
        self.sending = asyncio.get_running_loop().create_task(self._send(limit))
        froze = asyncio.get_running_loop().create_task(self.publisher.froze.wait())
        await asyncio.wait({self.sending, froze}, return_when=asyncio.FIRST_COMPLETED)
        froze.cancel()
        await asyncio.wait({froze})
        if self.sending.done():
            await self.ended()

    async def _send(self, limit: int) -> None:
        assert self.lead is not None

        async def renew() -> None:
            """Nothing: a lease of no seconds is never over for its owner."""

        outcome, self._outcome = self._outcome, Outcome()
        if rows := await self._store.take(self.lead, limit, sent=outcome.sent, dead=outcome.dead):
            self._outcome = await self._relay._send(self.lead, rows, 0.0, renew) or Outcome()

    async def thaws(self) -> None:
        assert self.publisher.frozen is not None
        self.publisher.froze.clear()
        self.publisher.frozen.set_result(None)
        await self.ended()

    async def ended(self) -> None:
        sending, self.sending = self.sending, None
        assert sending is not None
        try:
            await sending
        except (Crash, LeadLost):
            self.lead, self._outcome = None, Outcome()
        except Fenced as error:
            self.lead, self._outcome, self._above = None, Outcome(), error.epoch

    async def crashes(self) -> None:
        if self.sending is not None:
            self.sending.cancel()
            await asyncio.wait({self.sending})
            if not self.sending.cancelled():
                self.sending.exception()  # or asyncio would log it, in the middle of whatever runs then
        self.sending = self.lead = None
        self._outcome = Outcome()
        self.publisher.froze.clear()


# -- what happens --------------------------------------------------------------------------------------------


class Machine(RuleBasedStateMachine):
    """Commits, and what relays do; the numbers of messages are in the order of commit."""

    new_world: ClassVar[Callable[[], Any]]
    new_stream: ClassVar[Callable[[], Any]]

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.world, self.stream = self.new_world(), self.new_stream()
        self.outbox = Outbox(self.world.store, self.stream.broker, relay=False)
        self.run(self.world.store.open(1))
        self.outbox._open = True
        self.processes = {owner: Process(self.world, self.stream, owner) for owner in OWNERS}
        self.copied = False
        self.next = 0
        self.keys: dict[int, str | None] = {}
        self.expected: Counter[int] = Counter()  # how often each is to be in the stream in the end
        self.at_the_copy: set[int] = set()
        self.loose: set[int] = set()  # may be there more often: in a store that was restored
        self.unordered: set[int] = set()  # dead once, so out of their place
        self.flushed: list[int] = []  # what the stream has lost

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    def numbers_in(self, state: Any) -> list[int]:
        rows = self.run(self.world.store.rows(state, limit=100_000))
        return [row.message.payload["n"] for row in rows]

    @initialize()
    def begins(self) -> None: ...

    @rule(messages=MESSAGES)
    def adds(self, messages: list[tuple[str | None, bool]]) -> None:
        made = []
        for key, odd in messages:
            number, self.next = self.next, self.next + 1
            headers = {"publication": f"p-{number}"} | ({"key": key} if key else {})
            made.append(
                Message("ecst_event", "counted", str(number), {"n": number, "odd": odd and number % 3 == 0}, headers)
            )
            self.keys[number] = key
            self.expected[number] = 1
        self.run(self.outbox.publish(*made))

    @rule(
        owner=OWNER,
        anew=st.booleans(),
        limit=st.sampled_from([1, 2, 100]),
        fault=st.sampled_from(FAULTS),
        calls_before=st.integers(0, 2),
    )
    def sends(self, owner: str, anew: bool, limit: int, fault: Fault, calls_before: int = 0) -> None:
        """As the leader that it believes to be, or as a new one; in calls of two rows."""
        process = self.processes[owner]
        if process.sending is None:
            if process.lead is None or anew:
                self.run(process.takes_the_lead())
            self.run(process.sends(limit, fault, calls_before))

    def _frozen(self) -> list[Process]:
        return [process for process in self.processes.values() if process.sending is not None]

    @precondition(lambda self: self._frozen())
    @rule(which=st.integers(0, 2), crashing=st.booleans())
    def frozen_one_wakes_up(self, which: int, crashing: bool) -> None:
        process = self._frozen()[which % len(self._frozen())]
        self.run(process.crashes() if crashing else process.thaws())

    @rule()
    def retries_what_is_dead(self) -> None:
        dead = set(self.numbers_in("dead"))
        self.unordered |= dead
        self.stream.format.mended |= dead
        assert self.run(self.outbox.retry()) == len(dead)

    @rule()
    def replays(self) -> None:
        self.expected.update(self.numbers_in("sent"))
        self.run(self.outbox.replay(since=PAST, before=FAR))

    @rule()
    def broker_loses_everything(self) -> None:
        """And a replay mends it."""
        self._everybody_crashes()
        self.flushed += self.stream.numbers()
        self.stream.flush()
        there = self.run(self.world.store.status()).counts
        self.expected = Counter(dict.fromkeys(self._stored(), 1))
        assert self.run(self.outbox.replay(since=PAST, before=FAR)) == there["sent"]
        self.copied = False  # one from before knows nothing of the loss, and would need a replay of its own

    @rule()
    def is_copied(self) -> None:
        self.run(self.world.copied())
        self.copied, self.at_the_copy = True, set(self._stored())
        self.mended_at_the_copy = set(self.stream.format.mended)

    @precondition(lambda self: self.copied)
    @rule(messages=MESSAGES, fault=st.sampled_from(FAULTS))
    def is_restored_from_the_copy(self, messages: list[tuple[str | None, bool]], fault: Fault) -> None:
        """What was stored since is lost with the store; what is in it may be sent twice; what comes later is as ever.

        The first that is sent then may have the sequences of what was lost.
        """
        self._everybody_crashes()
        self.run(self.world.restored())
        for number in set(self.expected) - self.at_the_copy:
            del self.expected[number]
        self.loose |= set(range(self.next))
        self.stream.format.mended = set(self.mended_at_the_copy)  # who restores one thing restores the program, too
        self.adds(messages)
        self.sends("a", True, 100, fault)

    def _stored(self) -> list[int]:
        return [number for state in ("pending", "sending", "sent", "dead") for number in self.numbers_in(state)]

    def _everybody_crashes(self) -> None:
        for process in self.processes.values():
            self.run(process.crashes())

    def teardown(self) -> None:
        try:
            self._everything_is_sent()
            self._check()
        finally:
            self.run(self.stream.broker.aclose())
            self.run(self.world.store.aclose())
            self.loop.close()
            self.stream.close()
            self.world.close()

    def _everything_is_sent(self) -> None:
        self._everybody_crashes()
        last = self.processes["a"]
        for _ in range(100):
            self.retries_what_is_dead()
            counts = self.run(self.world.store.status()).counts
            if not counts["pending"] + counts["sending"]:
                return
            if last.lead is None:
                self.run(last.takes_the_lead())
            self.run(last.sends(100, "none"))
        raise AssertionError(f"it does not come to an end: {counts}")

    def _check(self) -> None:
        stream = self.stream.numbers()
        found = Counter(stream)
        lost = {number: many for number, many in self.expected.items() if not found[number]}
        assert not lost, f"lost: {lost}"
        wrong = {
            number: (many, self.expected[number])
            for number, many in found.items()
            if many != self.expected[number] and number not in self.loose
        }
        assert not wrong, f"not as often as they should be, found and expected: {wrong}"
        first = [number for number in dict.fromkeys(self.flushed + stream) if number not in self.unordered]
        for key in ("a", "b"):
            its = [number for number in first if self.keys[number] == key]
            assert its == sorted(its), f"key {key} is out of order: {its}"


@pytest.fixture(autouse=True)
def few_rows_in_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relaying, "BATCH", 2)


def histories(world: Callable[[], Any], stream: Callable[[], Any]) -> None:
    class Here(Machine):
        new_world, new_stream = staticmethod(world), staticmethod(stream)

    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=40,
            deadline=None,
            phases=PHASES,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )


@pytest.mark.parametrize("world", [InMemory, InFile], ids=["memory", "sqlite"])
def test_nothing_is_lost_doubled_or_out_of_order(world: Callable[[], Any]) -> None:
    histories(world, MemoryStream)


@pytest.mark.one_server
@pytest.mark.every_redis
@pytest.mark.parametrize("world", [InMemory, InFile], ids=["memory", "sqlite"])
def test_nothing_is_lost_doubled_or_out_of_order_in_a_stream(world: Callable[[], Any], redis_url: str) -> None:
    histories(world, lambda: RedisStream(redis_url))
