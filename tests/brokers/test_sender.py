"""The sender in front of a client library: its order, its deadlines, and a true answer to every call."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar

import pytest

from silbo.brokers import _sender
from silbo.brokers._library_broker import build_labels
from silbo.brokers._sender import QUEUE_BYTES, QUEUE_MESSAGES, OutgoingMessage, Sender
from silbo.errors import BrokerUnavailable, DeliveryUnknown, MessageRefused
from silbo.message import Message, Origin
from silbo.wire.formats import JSON

Step = Callable[[Sequence[OutgoingMessage]], Awaitable[None]]


def message(number: int, *, key: str | None = None, to: str | None = None, size: int = 0) -> Message:
    headers = {"publication": f"p-{number}"} | ({} if key is None else {"key": key})
    return Message("notification_event", f"n{number}", "id", {"pad": "x" * size}, headers, to)


def names(messages: Sequence[OutgoingMessage]) -> list[str]:
    return [outgoing.message.message_name for outgoing in messages]


async def ok(messages: Sequence[OutgoingMessage]) -> None:
    for outgoing in messages:
        outgoing.is_handed_over = True
        outgoing.mark_sent()


async def lost(messages: Sequence[OutgoingMessage]) -> None:
    for outgoing in messages:
        outgoing.is_handed_over = True
    raise OSError("gone")


async def unreachable(messages: Sequence[OutgoingMessage]) -> None:
    raise OSError("nobody there")


async def silent(messages: Sequence[OutgoingMessage]) -> None:
    for outgoing in messages:
        outgoing.is_handed_over = True
    await asyncio.Event().wait()


def encode(message: Message) -> bytes:
    return JSON.encode(message, Origin("web", "1"))


class Library:
    """A client library that does what it is told: with the first batch the first step, and so on; then all is well."""

    def __init__(self, *steps: Step) -> None:
        self.steps = list(steps)
        self.batches: list[tuple[str, list[str]]] = []

    async def send(self, address: str, messages: Sequence[OutgoingMessage]) -> None:
        self.batches.append((address, names(messages)))
        await (self.steps.pop(0) if self.steps else ok)(messages)

    def sender(self, timeout: float = 5.0) -> Sender:
        return Sender("Library", self.send, encode, default="events", timeout=timeout)


class Gate:
    """A step that holds its batch until it is opened."""

    def __init__(self, then: Step = ok) -> None:
        self.entered, self.opened, self.then = asyncio.Event(), asyncio.Event(), then

    async def __call__(self, messages: Sequence[OutgoingMessage]) -> None:
        for outgoing in messages:
            outgoing.is_handed_over = True
        self.entered.set()
        await self.opened.wait()
        await self.then(messages)


async def ends(*publishes: Awaitable[None]) -> list[type | None]:
    """Begin publishes in this order; return the class of each one's error, None for success."""
    answers = await asyncio.gather(*publishes, return_exceptions=True)
    return [None if answer is None else type(answer) for answer in answers]


# -- batches and order --------------------------------------------------------------------------------------


async def test_what_is_published_meanwhile_goes_together_and_in_order() -> None:
    """The more is published at once, the less each message costs."""
    library = Library(gate := Gate())
    sender = library.sender()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(sender.publish([message(0)]))
        await gate.entered.wait()
        for number in range(1, 601):
            tasks.create_task(sender.publish([message(number)]))
        await asyncio.sleep(0)
        gate.opened.set()
    sizes = [len(batch) for _, batch in library.batches]
    assert sizes == [1, 500, 100]
    assert [name for _, batch in library.batches for name in batch] == [f"n{number}" for number in range(601)]


async def test_burst_goes_in_two_halves() -> None:
    """The broker works on one while the other's callers go on."""
    library = Library()
    sender = library.sender()
    await asyncio.gather(*(sender.publish([message(number)]) for number in range(100)))
    assert lengths(library) == [50, 50]


async def test_batch_is_no_larger_than_a_mebibyte() -> None:
    """But for one large message, which goes alone."""
    library = Library()
    await library.sender().publish([message(n, size=size) for n, size in enumerate((600_000, 400_000, 600_000, 10))])
    assert [batch for _, batch in library.batches] == [["n0", "n1"], ["n2", "n3"]]


async def test_addresses_do_not_wait_for_each_other() -> None:
    library = Library(gate := Gate())
    sender = library.sender()
    held = asyncio.create_task(sender.publish([message(1, to="slow")]))
    await gate.entered.wait()
    await sender.publish([message(2), message(3, to="other")])
    assert sorted(library.batches[1:]) == [("events", ["n2"]), ("other", ["n3"])]
    gate.opened.set()
    await held


async def test_message_behind_one_of_its_key_that_missed_does_not_go() -> None:
    """It would come before the other's repeat. Those of other keys go on."""
    library = Library(gate := Gate(lost))
    sender = library.sender()
    publishes = [asyncio.create_task(sender.publish([message(0, key="a")]))]
    await gate.entered.wait()
    later = [message(1, key="a"), message(2, key="b"), message(3)]
    publishes += [asyncio.create_task(sender.publish([one])) for one in later]
    await asyncio.sleep(0)
    gate.opened.set()
    assert await ends(*publishes) == [DeliveryUnknown, BrokerUnavailable, None, None]
    assert library.batches[1:] == [("events", ["n2", "n3"])]
    await sender.publish([message(4, key="a")])


async def test_failed_batches_do_not_walk_through_the_queue_each_time() -> None:
    """Each waiting message is looked at once, however many batches fail before it."""
    looks = 0

    class Counted(Message):
        @property
        def key(self) -> str | None:
            nonlocal looks
            looks += 1
            return self.headers.get("key")

    library = Library(*[unreachable] * 20)
    many = [Counted("notification_event", "n", "id", {}, {"key": f"k{number}"}) for number in range(10_000)]
    with pytest.raises(BrokerUnavailable):
        await library.sender().publish(many)
    assert len(library.batches) == 20
    assert looks <= 2 * len(many)


async def test_message_published_after_a_failure_of_its_key_goes() -> None:
    """Its caller has heard of the failure, or may not care: only those that waited then are held back."""
    library = Library(gate := Gate(lost), second := Gate())
    sender = library.sender()
    publishes = [asyncio.create_task(sender.publish([message(0, key="a")]))]
    await gate.entered.wait()
    publishes += [asyncio.create_task(sender.publish([one])) for one in (message(1, key="b"), message(2, key="a"))]
    await asyncio.sleep(0)
    gate.opened.set()
    await second.entered.wait()
    publishes.append(asyncio.create_task(sender.publish([message(3, key="a")])))
    await asyncio.sleep(0)
    second.opened.set()
    assert await ends(*publishes) == [DeliveryUnknown, None, BrokerUnavailable, None]
    assert library.batches == [("events", ["n0"]), ("events", ["n1"]), ("events", ["n3"])]
    assert not sender._queues["events"]._missed  # forgotten: keys can be many


async def test_queues_of_many_addresses_are_dropped_when_they_are_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent one stays: its next publish is a probe. So does a busy one."""
    monkeypatch.setattr(_sender, "KEPT_QUEUES", 5)
    library = Library(silent, gate := Gate())
    sender = library.sender(timeout=0.5)
    with pytest.raises(DeliveryUnknown):
        await sender.publish([message(0, to="silent")])
    busy = asyncio.create_task(sender.publish([message(1, to="busy")]))
    await gate.entered.wait()
    for number in range(100):
        await sender.publish([message(number, to=f"to-{number}")])
    assert len(sender._queues) <= 8
    assert sender._queues["silent"].is_silent
    assert sender._queues["busy"].is_busy
    gate.opened.set()
    await busy


async def test_message_whose_caller_went_away_is_not_sent() -> None:
    library = Library(gate := Gate())
    sender = library.sender()
    first, second = (asyncio.create_task(sender.publish([message(number)])) for number in (1, 2))
    await gate.entered.wait()
    third = asyncio.create_task(sender.publish([message(3)]))
    await asyncio.sleep(0)
    third.cancel()
    await asyncio.wait([third])
    gate.opened.set()
    await asyncio.gather(first, second)
    await sender.publish([message(4)])
    assert [batch for _, batch in library.batches] == [["n1", "n2"], ["n4"]]


# -- answers ------------------------------------------------------------------------------------------------


async def test_answers_tell_what_surely_was_not_sent_from_what_may_have_been() -> None:
    library = Library(unreachable, lost)
    sender = library.sender()
    with pytest.raises(BrokerUnavailable, match=r"Library 'events': nobody there; none of 2 messages was sent"):
        await sender.publish([message(1), message(2)])
    with pytest.raises(DeliveryUnknown, match=r"Library 'events': gone; it may have arrived"):
        await sender.publish([message(1)])


async def test_what_the_library_did_not_answer_for_is_unknown() -> None:
    async def forgetful(messages: Sequence[OutgoingMessage]) -> None:
        await ok(messages[:1])
        messages[1].is_handed_over = True

    with pytest.raises(DeliveryUnknown, match="did not say"):
        await Library(forgetful).sender().publish([message(1), message(2)])


async def test_call_of_which_a_part_was_sent_is_unknown() -> None:
    async def half(messages: Sequence[OutgoingMessage]) -> None:
        await ok(messages[:1])
        raise OSError("no more")

    with pytest.raises(DeliveryUnknown, match="1 of 2 messages were sent, the others were not: .*no more"):
        await Library(half).sender().publish([message(1), message(2)])


async def test_refusals_are_told_together_and_hold_back_nothing() -> None:
    async def picky(messages: Sequence[OutgoingMessage]) -> None:
        for outgoing in messages:
            if outgoing.message.message_name in ("n1", "n3"):
                outgoing.mark_refused("too odd")
            else:
                outgoing.mark_sent()

    library = Library(picky)
    bad = Message("notification_event", "nan", "id", {"x": float("nan")}, {})
    with pytest.raises(MessageRefused, match="'nan', field 'x'") as caught:
        await library.sender().publish([message(0), bad, message(1), message(2), message(3)])
    assert caught.value.__notes__ == [
        "and in the same call: 'n1': too odd",
        "and in the same call: 'n3': too odd",
    ]
    assert library.batches == [("events", ["n0", "n1", "n2", "n3"])]


async def test_first_answer_counts() -> None:
    async def twice(messages: Sequence[OutgoingMessage]) -> None:
        messages[0].mark_sent()
        messages[0].mark_unknown("late")
        messages[0].mark_refused("late")
        messages[1].mark_unsent("early")

    with pytest.raises(DeliveryUnknown, match="1 of 2 messages were sent, the others were not: early"):
        await Library(twice).sender().publish([message(1), message(2)])


# -- deadlines and silence ----------------------------------------------------------------------------------


async def test_deadline_answers_everybody() -> None:
    """A message that was handed over is unknown; one that was not, or waits behind it, was not sent."""

    async def half(messages: Sequence[OutgoingMessage]) -> None:
        messages[0].is_handed_over = True
        await asyncio.Event().wait()

    library = Library(half)
    sender = library.sender(timeout=0.2)
    first = asyncio.create_task(sender.publish([message(1)]))
    second = asyncio.create_task(sender.publish([message(2)]))
    await asyncio.sleep(0.1)
    third = asyncio.create_task(sender.publish([message(3, key="another")]))
    await asyncio.sleep(0)
    assert library.batches == [("events", ["n1", "n2"])]
    assert await ends(first, second, third) == [DeliveryUnknown, BrokerUnavailable, BrokerUnavailable]
    assert len(library.batches) == 1


async def test_silent_broker_is_tried_by_one_at_a_time() -> None:
    """A broker that has frozen must not hold up every request of a host."""

    async def linger(messages: Sequence[OutgoingMessage]) -> None:
        await ok(messages)
        await asyncio.sleep(0.01)

    library = Library(silent, silent, gate := Gate(linger))
    sender = library.sender(timeout=0.05)
    assert await ends(sender.publish([message(1)])) == [DeliveryUnknown]
    assert await ends(*(sender.publish([message(number)]) for number in (2, 3, 4))) == [
        DeliveryUnknown,
        BrokerUnavailable,
        BrokerUnavailable,
    ]
    assert [batch for _, batch in library.batches] == [["n1"], ["n2"]]
    trying = asyncio.create_task(sender.publish([message(5)]))
    await gate.entered.wait()
    with pytest.raises(BrokerUnavailable, match=r"has not answered since \d\d:\d\d:\d\d UTC; not sent"):
        await sender.publish([message(6)])
    gate.opened.set()
    await trying
    await sender.publish([message(7)])  # at once, although the batch before is only just ending
    assert [batch for _, batch in library.batches][2:] == [["n5"], ["n7"]]
    assert await ends(*(sender.publish([message(number)]) for number in (8, 9))) == [None, None]


async def look_up(messages: Sequence[OutgoingMessage]) -> None:
    """Connect, as every client library does, to a host that has a name."""
    await asyncio.get_running_loop().getaddrinfo("localhost", 1)
    await ok(messages)


async def test_busy_thread_pool_is_named_where_a_broker_does_not_answer(busy_pool: None) -> None:
    """It may keep the library from connecting: the broker does nothing wrong. Named to those too who find it silent."""
    sender = Library(look_up, look_up).sender(timeout=0.05)
    busy = r"not answered since .* UTC \(no new .* host: all 2 threads of the event loop's thread pool are busy; give"
    calls = [asyncio.create_task(sender.publish([message(number)])) for number in range(2)]
    for call in calls:
        with pytest.raises(BrokerUnavailable, match=busy):
            await call
    with pytest.raises(BrokerUnavailable, match=busy):
        await sender.publish([message(3)])
    await sender.aclose()


async def test_try_of_a_silent_broker_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sender, "PROBE_TIMEOUT", 0.3)
    library = Library(silent, silent)
    sender = library.sender(timeout=1.3)
    loop = asyncio.get_running_loop()
    await ends(sender.publish([message(1)]))
    begin = loop.time()
    await ends(sender.publish([message(2)]))
    assert 0.2 < loop.time() - begin < 1.3  # a try of the whole timeout takes longer


async def test_message_that_would_be_late_is_not_begun() -> None:
    """Sent at the last moment it would likely end unknown."""
    library = Library(gate := Gate())
    sender = library.sender(timeout=1.0)
    first = asyncio.create_task(sender.publish([message(1)]))
    await gate.entered.wait()
    second = asyncio.create_task(sender.publish([message(2)]))
    await asyncio.sleep(0.97)
    gate.opened.set()
    assert await ends(first, second) == [None, BrokerUnavailable]
    assert len(library.batches) == 1


async def test_probe_is_sent_however_long_the_timeout_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A share of the timeout may be longer than all the time that a probe has."""
    monkeypatch.setattr(_sender, "PROBE_TIMEOUT", 0.2)
    monkeypatch.setattr(_sender, "LATE", 0.9)
    library = Library(silent)
    sender = library.sender(timeout=0.4)
    assert await ends(sender.publish([message(1)])) == [DeliveryUnknown]
    await sender.publish([message(2)])


def test_timeout_is_seconds() -> None:
    with pytest.raises(ValueError, match="timeout is seconds"):
        Library().sender(timeout=0)


# -- room ---------------------------------------------------------------------------------------------------


async def fill(sender: Sender, gate: Gate, *, messages: int = 0, size: int = 0) -> list[asyncio.Task[None]]:
    """A batch that is held, and behind it calls with so many messages, or with one of this size each, until there is no room."""
    calls = [asyncio.create_task(sender.publish([message(0)]))]
    await gate.entered.wait()
    queue = sender._queues["events"]
    while queue._has_room():
        many = [message(1, size=size)] if size else [message(1)] * messages
        calls.append(asyncio.create_task(sender.publish(many)))
        await asyncio.sleep(0)
    return calls


async def begin(publish: Awaitable[None]) -> asyncio.Task[None]:
    task = asyncio.ensure_future(publish)
    await asyncio.sleep(0)
    return task


def lengths(library: Library) -> list[int]:
    return [len(batch) for _, batch in library.batches]


@pytest.mark.parametrize(("messages", "size"), [(QUEUE_MESSAGES, 0), (0, QUEUE_BYTES)])
async def test_publish_waits_for_room_and_is_not_encoded_meanwhile(messages: int, size: int) -> None:
    """The queue is bounded in messages and in bytes: what waits for room takes no memory of its own."""
    encoded = 0

    def encode_counted(one: Message) -> bytes:
        nonlocal encoded
        encoded += 1
        return bytes(max(1, len(one.payload["pad"])))

    library = Library(gate := Gate())
    sender = Sender("Library", library.send, encode_counted, default="events", timeout=60)
    calls = await fill(sender, gate, messages=messages, size=size)
    before = encoded
    calls += [await begin(sender.publish([message(number)])) for number in (2, 3)]
    (await begin(sender.publish([message(4)]))).cancel()
    assert encoded == before
    gate.opened.set()
    assert await ends(*calls) == [None] * len(calls)
    assert encoded == before + 2
    assert [name for _, batch in library.batches for name in batch][-2:] == ["n2", "n3"]
    assert sender._queues["events"]._bytes == 0


async def test_room_is_given_in_turn_to_those_who_still_wait() -> None:
    library = Library(gate := Gate())
    sender = library.sender(timeout=60)
    calls = await fill(sender, gate, messages=QUEUE_MESSAGES)
    waiting = [await begin(sender.publish([message(number)] * QUEUE_MESSAGES)) for number in (2, 3, 4)]
    waiting[0].cancel()
    gate.opened.set()
    assert await ends(*calls, *waiting[1:]) == [None] * 4
    sent = [name for _, batch in library.batches for name in batch]
    assert sent == ["n0", *["n1"] * QUEUE_MESSAGES, *["n3"] * QUEUE_MESSAGES, *["n4"] * QUEUE_MESSAGES]
    assert max(lengths(library)) == 500


async def test_who_comes_later_gets_no_room_before() -> None:
    library = Library(gate := Gate(), second := Gate())
    sender = library.sender(timeout=60)
    calls = await fill(sender, gate, messages=QUEUE_MESSAGES)
    calls.append(await begin(sender.publish([message(2)])))
    gate.opened.set()
    await second.entered.wait()
    calls.append(await begin(sender.publish([message(3)])))
    second.opened.set()
    assert await ends(*calls) == [None] * 4
    assert [name for _, batch in library.batches for name in batch][-2:] == ["n2", "n3"]


async def test_withdrawn_messages_make_room() -> None:
    """Also when nothing is left then that a batch could take."""
    library = Library(gate := Gate())
    sender = library.sender(timeout=60)
    calls = await fill(sender, gate, messages=QUEUE_MESSAGES)
    waiting = await begin(sender.publish([message(2)]))
    calls[1].cancel()
    gate.opened.set()
    await waiting
    assert [batch for _, batch in library.batches] == [["n0"], ["n2"]]


async def test_queue_that_is_given_up_answers_everybody() -> None:
    """And does not encode first what waits for room."""
    encoded: list[str] = []

    def encode_noted(one: Message) -> bytes:
        encoded.append(one.message_name)
        return encode(one)

    library = Library(gate := Gate(silent))
    sender = Sender("Library", library.send, encode_noted, default="events", timeout=1)
    calls = await fill(sender, gate, messages=QUEUE_MESSAGES)
    waiting = await begin(sender.publish([message(2)] * 2))
    with pytest.raises(BrokerUnavailable, match="has not answered since .*; none of 2 messages was sent"):
        await waiting
    with pytest.raises(BrokerUnavailable, match="has not answered since .*; none of 10000 messages was sent"):
        await calls[1]
    assert await ends(*calls) == [DeliveryUnknown, BrokerUnavailable]
    assert "n2" not in encoded
    assert sender._queues["events"]._has_room()


async def test_message_without_room_is_held_back_like_the_others() -> None:
    """It waited, too, when one of its key missed before it."""
    library = Library(gate := Gate(lost))
    sender = library.sender(timeout=60)
    calls = await fill(sender, gate, messages=QUEUE_MESSAGES)
    calls += [await begin(sender.publish([message(number, key=key)])) for number, key in ((2, None), (3, "a"))]
    gate.opened.set()
    assert await ends(*calls) == [DeliveryUnknown, BrokerUnavailable, BrokerUnavailable, None]
    assert [batch for _, batch in library.batches] == [["n0"], ["n3"]]


@pytest.mark.parametrize("is_full", [False, True])
async def test_error_of_a_hosts_format_is_its_callers(is_full: bool) -> None:
    """Nothing of that call is sent, and the others go on."""

    def encode_some(one: Message) -> bytes:
        if one.message_name == "n3":
            raise KeyError("a defect")
        return encode(one)

    library = Library(gate := Gate())
    sender = Sender("Library", library.send, encode_some, default="events", timeout=60)
    calls = await fill(sender, gate, messages=QUEUE_MESSAGES) if is_full else []
    broken = await begin(sender.publish([message(2), message(3)]))
    calls.append(await begin(sender.publish([message(4)])))
    gate.opened.set()
    with pytest.raises(KeyError, match="a defect"):
        await broken
    assert await ends(*calls) == [None] * len(calls)
    names_sent = [name for _, batch in library.batches for name in batch]
    assert "n2" not in names_sent and "n4" in names_sent


class _CountedFuture(asyncio.Future[None]):
    """A future that counts how often any of its kind was looked at."""

    looks = 0

    def done(self) -> bool:
        _CountedFuture.looks += 1
        return super().done()


@pytest.mark.parametrize("end", ["fail", "cancel", "admit"])
async def test_each_that_waits_for_room_is_looked_at_a_few_times(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost is linear in the number of those that wait, and the same for each way to leave."""
    waiting = 2_000
    library = Library(gate := Gate(silent if end == "fail" else ok))
    sender = library.sender(timeout=0.5 if end == "fail" else 60)
    calls = await fill(sender, gate, messages=QUEUE_MESSAGES)
    loop = asyncio.get_running_loop()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "create_future", lambda: _CountedFuture(loop=loop))
        tasks = [asyncio.ensure_future(sender.publish([message(2)])) for _ in range(waiting)]
        await asyncio.sleep(0)
    _CountedFuture.looks = 0
    if end == "cancel":
        for task in reversed(tasks):
            task.cancel()
    gate.opened.set()
    await ends(*calls, *tasks)
    assert _CountedFuture.looks <= 6 * waiting


# -- a connection of the broker's -----------------------------------------------------------------------------


class Connecting:
    """A library that has to connect, and can be probed without a message."""

    def __init__(self, *steps: Step) -> None:
        self.library = Library(*steps)
        self.connects = 0
        self.reachable = asyncio.Event()
        self.error: Exception | None = None

    async def connect(self) -> None:
        self.connects += 1
        if self.error is not None:
            raise self.error
        await self.reachable.wait()

    def sender(self, timeout: float) -> Sender:
        return Sender("Server", self.library.send, encode, timeout=timeout, connect=self.connect)


async def test_messages_wait_for_a_connection_and_then_go_together() -> None:
    server = Connecting()
    sender = server.sender(timeout=60)
    calls = [await begin(sender.publish([message(number, to=to)])) for number, to in enumerate((None, "a", "b"))]
    calls[1].cancel()
    server.reachable.set()
    assert await ends(calls[0], calls[2]) == [None, None]
    assert server.library.batches == [("", ["n0", "n2"])]


async def test_error_of_connecting_goes_to_all_at_once() -> None:
    """It is an answer: the server is not silent."""
    server = Connecting()
    server.error = ValueError("wrong password")
    sender = server.sender(timeout=60)
    assert await ends(*(sender.publish([message(number)]) for number in range(3))) == [BrokerUnavailable] * 3
    server.error = None
    server.reachable.set()
    await sender.publish([message(3)])


async def test_silent_server_is_probed_without_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sender, "PROBE_PAUSE", 0.01)
    server = Connecting()
    sender = server.sender(timeout=0.1)
    with pytest.raises(BrokerUnavailable, match="has not answered since"):
        await sender.publish([message(1)])
    tries = server.connects
    with pytest.raises(BrokerUnavailable, match="has not answered since .*; not sent"):
        await sender.publish([message(2)])
    async with asyncio.timeout(30):
        while server.connects < tries + 2:
            await asyncio.sleep(0.01)
        server.reachable.set()
        while sender._queues[""].is_busy:
            await asyncio.sleep(0.01)
    await sender.publish([message(3)])
    assert server.library.batches == [("", ["n3"])]


async def test_deadline_that_only_withdrawn_messages_missed_silences_nobody() -> None:
    server = Connecting()
    sender = server.sender(timeout=0.4)
    first = await begin(sender.publish([message(1)]))
    await asyncio.sleep(0.2)
    second = await begin(sender.publish([message(2)]))
    first.cancel()
    await asyncio.sleep(0.3)
    assert server.connects == 2  # the first try has ended, and nobody was told
    assert not second.done()
    server.reachable.set()
    await second


async def test_batch_has_the_time_of_its_own_first_message() -> None:
    """Not that of one whose caller went away while the server was out of reach."""
    server = Connecting(gate := Gate())
    sender = server.sender(timeout=60)
    first = asyncio.ensure_future(sender.publish([message(1)]))
    loop = asyncio.get_running_loop()
    loop.call_soon(lambda: setattr(sender._queues[""]._waiting[0].call, "deadline", loop.time() + 0.2))
    await asyncio.sleep(0)
    second = await begin(sender.publish([message(2)]))
    first.cancel()
    await asyncio.wait([first])
    server.reachable.set()
    await gate.entered.wait()
    await asyncio.sleep(0.3)
    gate.opened.set()
    await second


async def test_closing_does_not_wait_for_a_probe_without_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sender, "PROBE_PAUSE", 3600)
    sender = Connecting().sender(timeout=0.1)
    assert await ends(sender.publish([message(1)])) == [BrokerUnavailable]
    await asyncio.sleep(0.3)
    async with asyncio.timeout(30):
        await sender.aclose()


# -- its task -----------------------------------------------------------------------------------------------


async def test_sender_that_is_ended_from_outside_leaves_nobody_waiting() -> None:
    library = Library(gate := Gate())
    sender = library.sender()
    first = asyncio.create_task(sender.publish([message(1)]))
    await gate.entered.wait()
    second = asyncio.create_task(sender.publish([message(2)]))
    await asyncio.sleep(0)
    closing = asyncio.create_task(sender.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    assert await ends(first, second) == [DeliveryUnknown, BrokerUnavailable]
    with pytest.raises(BrokerUnavailable, match="closed"):
        await sender.publish([message(3)])


async def test_closing_waits_for_what_is_in_line() -> None:
    library = Library(gate := Gate())
    sender = library.sender()
    publishes = [asyncio.create_task(sender.publish([message(number)])) for number in range(3)]
    await gate.entered.wait()
    closing = asyncio.create_task(sender.aclose())
    await asyncio.sleep(0)
    assert not closing.done()
    gate.opened.set()
    assert await ends(*publishes, closing) == [None] * 4


async def test_sender_does_not_live_in_its_callers_context() -> None:
    """Else a request's values would be seen by the library for as long as something is sent."""
    request = ContextVar("request", default="none")
    seen: list[str] = []

    async def look(messages: Sequence[OutgoingMessage]) -> None:
        seen.append(request.get())
        await ok(messages)

    request.set("of the caller")
    await Library(look).sender().publish([message(1)])
    assert seen == ["none"]


def test_labels_keep_an_origin_that_is_there() -> None:
    """An outbox's relay sends what another process has published."""
    stored = Message("ecst_event", "n", "id", {}, {"app": "host", "instance": "7", "key": "k"})
    assert build_labels(stored, "web") == {
        "message_type": "ecst_event",
        "message_name": "n",
        "message_id": "id",
        "app": "host",
        "instance": "7",
        "key": "k",
    }
