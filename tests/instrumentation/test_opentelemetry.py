"""Spans: which there are, what they are called, and how they hang together."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from opentelemetry import baggage, context, trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.semconv._incubating.attributes import messaging_attributes
from opentelemetry.semconv.attributes import code_attributes, error_attributes
from opentelemetry.semconv.schemas import Schemas
from opentelemetry.trace import SpanKind, StatusCode
from redis.asyncio import Redis

from silbo import (
    AsyncEventDispatcher,
    Attempt,
    Bridge,
    DomainEvent,
    Event,
    EventName,
    Message,
    NotificationEvent,
    Origin,
    Outbox,
    Plugin,
    Plugins,
    Publishing,
    RelayedBatch,
    Route,
    receive,
    set_header,
)
from silbo._retry import Backoff
from silbo.brokers.memory import MemoryBroker
from silbo.brokers.redis import DeadLetters, RedisPubSub, RedisStreams
from silbo.errors import BrokerUnavailable
from silbo.instrumentation import opentelemetry as instrumentation
from silbo.instrumentation.declared_names import DeclaredNames
from silbo.instrumentation.opentelemetry import SCHEMA_URL, instrument
from silbo.message import Delivery
from silbo.stores.memory import MemoryStore
from silbo.wire.formats import JSON
from tests.support.consumer import QUICK, USER_JOINED, Consumer, Running, joined

TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{SPAN}-01"
JOINED = EventName("user.joined", NotificationEvent)


class Traces:
    """The spans that have ended, in the order of their ends."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    @property
    def spans(self) -> Sequence[ReadableSpan]:
        return self._exporter.get_finished_spans()

    @property
    def names(self) -> list[str]:
        return [span.name for span in self.spans]

    def find(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        [span] = self.find(name)
        return span


@pytest.fixture
def traces() -> Iterator[Traces]:
    traces = Traces()
    yield traces
    traces.provider.shutdown()


@pytest.fixture
def d(traces: Traces) -> AsyncEventDispatcher:
    d = AsyncEventDispatcher()
    instrument(d, tracer_provider=traces.provider)
    return d


def attributes(span: ReadableSpan) -> Mapping[str, Any]:
    assert span.attributes is not None
    return span.attributes


def is_child(span: ReadableSpan, parent: ReadableSpan) -> bool:
    return span.parent is not None and span.parent.span_id == id_of(parent) and same_trace(span, parent)


def same_trace(one: ReadableSpan, other: ReadableSpan) -> bool:
    return one.get_span_context().trace_id == other.get_span_context().trace_id  # type: ignore[union-attr]


def id_of(span: ReadableSpan) -> int:
    return span.get_span_context().span_id  # type: ignore[union-attr]


def linked(span: ReadableSpan) -> list[int]:
    return [link.context.span_id for link in span.links]


def with_headers(number: int, **headers: str) -> Message:
    message = joined(number)
    return replace(message, headers={**message.headers, **headers})


class Collecting:
    """A publisher that keeps what it gets."""

    app = "web"

    def __init__(self) -> None:
        self.messages: list[Message] = []

    async def publish(self, *messages: Message) -> None:
        self.messages += messages

    async def aclose(self) -> None: ...


# -- dispatch and listeners -----------------------------------------------------------------------------------


async def test_a_dispatch_has_a_span_for_each_listener(d: AsyncEventDispatcher, traces: Traces) -> None:
    """The host's own spans hang below the listener that makes them."""
    tracer = traces.provider.get_tracer("host")

    @d.listen(JOINED)
    async def enrich(event: Event) -> None:
        with tracer.start_as_current_span("query"):
            pass

    @d.listen(JOINED, priority=1)
    async def stop(event: Event) -> None:
        event.stop_propagation()

    with tracer.start_as_current_span("request"):
        await d.adispatch(JOINED, NotificationEvent())
    query, first, second, dispatch, request = traces.spans
    assert is_child(query, first) and is_child(first, dispatch) and is_child(second, dispatch)
    assert is_child(dispatch, request) and dispatch.name == "dispatch user.joined"
    assert first.name.startswith("listener ") and first.name.endswith("enrich")
    assert attributes(first)["code.function.name"] == f"{__name__}.{enrich.__qualname__}"
    assert attributes(first)["code.file.path"] == __file__
    assert attributes(first)["code.line.number"] == enrich.__code__.co_firstlineno
    assert attributes(dispatch) == {"silbo.event.name": "user.joined", "silbo.outcome": "stopped"}
    scope = dispatch.instrumentation_scope
    assert scope is not None and (scope.name, scope.schema_url) == ("silbo", SCHEMA_URL)
    assert trace.get_current_span() is trace.INVALID_SPAN


async def test_a_failure_is_on_its_listener_and_on_the_dispatch(d: AsyncEventDispatcher, traces: Traces) -> None:
    """Its text only on the listener: the type is enough for the others."""

    @d.listen(JOINED)
    async def fail(event: Event) -> None:
        raise LookupError("no such plan")

    with pytest.raises(LookupError):
        await d.adispatch(JOINED, NotificationEvent())
    listener, dispatch = traces.spans
    for span in (listener, dispatch):
        assert span.status.status_code is StatusCode.ERROR and attributes(span)["error.type"] == "LookupError"
    assert "no such plan" in str(listener.events[0].attributes) and not dispatch.events


@pytest.mark.parametrize("name", ["user.17.joined", ("a", "tuple"), 17])
async def test_an_undeclared_name_is_other_in_a_span_s_name(d: AsyncEventDispatcher, traces: Traces, name: Any) -> None:
    """A tracing system groups by span names, and names with an id in them are without number."""
    await d.adispatch(name, Event())
    assert traces.names == ["dispatch other"]
    assert attributes(traces.spans[0]).get("silbo.event.name") == (name if isinstance(name, str) else None)


async def test_names_of_the_dispatcher_and_of_the_call_are_declared(traces: Traces) -> None:
    d = AsyncEventDispatcher(names=[JOINED], unknown="warn")
    with instrument(d, names=["user.left"], tracer_provider=traces.provider):
        await d.adispatch("user.joined", NotificationEvent())
        with pytest.warns(match="user.left"):
            await d.adispatch("user.left", NotificationEvent())
    await d.adispatch("user.joined", NotificationEvent())
    assert traces.names == ["dispatch user.joined", "dispatch user.left"], "and none after the end"


async def test_concurrent_listeners_and_nested_dispatches_keep_their_parents(
    d: AsyncEventDispatcher, traces: Traces
) -> None:
    met = asyncio.Barrier(2)

    def listener(name: EventName[Any]) -> Any:
        async def run(event: Event) -> None:
            await met.wait()
            await d.adispatch(name, DomainEvent())

        return run

    for name in (EventName("first", DomainEvent), EventName("second", DomainEvent)):
        d.add_listener(JOINED, listener(name), concurrent=True)
    async with asyncio.timeout(30):
        await d.adispatch(JOINED, NotificationEvent())
    outer = traces.one("dispatch user.joined")
    listeners = [span for span in traces.spans if span.name.startswith("listener")]
    assert len(listeners) == 2 and all(is_child(span, outer) for span in listeners)
    parents = {traces.one(f"dispatch {name}").parent.span_id for name in ("first", "second")}  # type: ignore[union-attr]
    assert parents == {id_of(span) for span in listeners}


async def test_a_plugin_s_listener_names_it(d: AsyncEventDispatcher, traces: Traces) -> None:
    async def hear(event: Event) -> None: ...

    async with Plugins(d) as plugins:
        await plugins.load(Plugin(lambda view: view.add_listener(JOINED, hear), name="mail"))
        await d.adispatch(JOINED, NotificationEvent())
    [listener] = [span for span in traces.spans if span.name.startswith("listener")]
    assert attributes(listener)["silbo.plugin"] == "mail"


# -- publish, store, relay ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wait", [True, False])
async def test_a_publish_has_a_span_whose_context_the_message_carries(
    d: AsyncEventDispatcher, traces: Traces, wait: bool
) -> None:
    publisher = Collecting()
    async with Bridge(publisher, wait=wait, routes=[Route("user.*", to="users")]) as bridge:
        d.add_subscriber(bridge)
        event = NotificationEvent()
        set_header(event, "correlationid", "of the request")
        await d.adispatch(JOINED, event)
        await d.adispatch(JOINED, DomainEvent())
    [message] = publisher.messages
    publish = traces.one("publish user.joined")
    dispatch, _stays = sorted(traces.find("dispatch user.joined"), key=lambda span: span.start_time or 0)
    context_ = publish.get_span_context()
    assert context_ is not None and message.headers["traceparent"].startswith(
        f"00-{context_.trace_id:032x}-{context_.span_id:016x}-"
    )
    assert is_child(publish, dispatch) and publish.kind is SpanKind.PRODUCER
    assert publish.name == "publish user.joined" and attributes(publish) == {
        "messaging.system": "silbo",
        "messaging.operation.name": "publish",
        "messaging.operation.type": "send",
        "messaging.message.id": message.message_id,
        "messaging.message.conversation_id": "of the request",
        "silbo.event.name": "user.joined",
        "silbo.outcome": "completed",
    }
    assert "tracestate" not in message.headers and "baggage" not in message.headers


async def test_a_publish_names_the_address_as_the_attempt_does(traces: Traces, redis: Redis, prefix: str) -> None:
    """Of each broker; one that refuses the address has no name for it. Nothing is sent to Redis here."""
    spans = instrumentation._Spans(traces.provider.get_tracer("x"), DeclaredNames(), None, baggage=False)
    streams = RedisStreams(redis, app="web", prefix=prefix)
    pubsub = RedisPubSub(redis, app="web", prefix=prefix)
    plain, routed, wrong = joined(1), replace(joined(1), to="users"), replace(joined(1), to="not an address")
    addresses = []
    for publisher in (streams, pubsub, MemoryBroker("web"), Outbox(MemoryStore(), streams, relay=False)):
        for message in (plain, routed, wrong) if publisher is streams else (plain, routed):
            publishing = Publishing(name=JOINED, message=message, publisher=publisher)  # type: ignore[arg-type]
            spans.before_publish(publishing)
            spans.after_publish(publishing)
            addresses.append(attributes(traces.spans[-1]).get("messaging.destination.name"))
    assert addresses == [
        *[f"{prefix}:{{events}}", f"{prefix}:{{users}}", None],
        *[f"{prefix}:ecst_event:user.joined", f"{prefix}:users"],
        *["events", "users"],
        *[f"{prefix}:{{events}}", f"{prefix}:{{users}}"],
    ]
    assert attributes(traces.spans[-1])["messaging.system"] == "redis"
    await streams.aclose()
    await pubsub.aclose()


async def test_a_publish_that_fails_says_so(d: AsyncEventDispatcher, traces: Traces) -> None:
    class Away(Collecting):
        async def publish(self, *messages: Message) -> None:
            raise BrokerUnavailable("nobody there")

    d.add_subscriber(Bridge(Away()))
    with pytest.raises(BrokerUnavailable):
        await d.adispatch(JOINED, NotificationEvent())
    publish = traces.one("publish user.joined")
    assert publish.status.status_code is StatusCode.ERROR
    assert attributes(publish)["error.type"] == "silbo.errors.BrokerUnavailable"


async def test_a_trace_that_is_not_sampled_is_carried_on_all_the_same() -> None:
    """Or each process would decide anew, and traces would have holes."""
    publisher, d = Collecting(), AsyncEventDispatcher()
    instrument(d, tracer_provider=TracerProvider(sampler=ALWAYS_OFF))
    d.add_subscriber(Bridge(publisher))
    await d.adispatch(JOINED, NotificationEvent())
    flags = int(publisher.messages[0].headers["traceparent"].rpartition("-")[2], 16)
    assert not flags & 1


async def test_a_relay_sends_the_context_of_the_store_on(d: AsyncEventDispatcher, traces: Traces) -> None:
    """Its batch has links to the messages, and no parent: it belongs to many traces."""
    broker = MemoryBroker("web")
    wire = await broker.group("test", start="new").open()
    async with Outbox(MemoryStore(), broker) as outbox:
        instrument(relay=outbox, tracer_provider=traces.provider)
        d.add_subscriber(Bridge(outbox))
        with traces.provider.get_tracer("host").start_as_current_span("request"):
            await d.adispatch(JOINED, NotificationEvent())
        deliveries: list[Any] = []
        while not deliveries:
            deliveries += await wire.receive(10)
    store, relay = traces.one("store user.joined"), traces.one("relay")
    context_ = store.get_span_context()
    assert context_ is not None
    assert deliveries[0].message().headers["traceparent"].split("-")[2] == f"{context_.span_id:016x}"
    assert attributes(store)["messaging.operation.type"] == "create" and store.kind is SpanKind.PRODUCER
    assert relay.parent is None and linked(relay) == [id_of(store)] and not same_trace(relay, store)
    assert attributes(relay) == {
        "messaging.system": "silbo",
        "messaging.operation.name": "relay",
        "messaging.operation.type": "send",
        "messaging.batch.message_count": 1,
        "silbo.outcome": "completed",
    }


# -- receive, process, retry, bury ----------------------------------------------------------------------------


async def process(
    d: AsyncEventDispatcher, *messages: Message, failing: Callable[[Any], None] = lambda event: None, **options: Any
) -> list[Any]:
    """Consume the messages, the last of which is to be handled; the events in the order of their attempts."""
    broker, events, done = MemoryBroker("other"), [], asyncio.Event()

    @d.listen("user.joined", priority=5)
    async def hear(event: Any) -> None:
        events.append(event)
        failing(event)
        if event.payload["user_id"] == joined_last(messages):
            done.set()

    async with Running(Consumer(d, broker.group("billing", start="new"), **options)):
        await broker.publish(*messages)
        async with asyncio.timeout(30):
            await done.wait()
    return events


def joined_last(messages: Sequence[Message]) -> Any:
    return messages[-1].payload["user_id"]


async def test_an_attempt_is_a_child_of_the_sender_s_span_with_a_link_to_it(
    d: AsyncEventDispatcher, traces: Traces
) -> None:
    """A read is of many senders: it has links only."""
    message = with_headers(1, traceparent=TRACEPARENT, tracestate="vendor=1")
    with traces.provider.get_tracer("host").start_as_current_span("the program's start"):
        await process(d, message)
    attempt = traces.one("process other")
    assert attempt.parent is not None and attempt.parent.span_id == int(SPAN, 16) and attempt.parent.is_remote
    assert attempt.parent.trace_state["vendor"] == "1" and linked(attempt) == [int(SPAN, 16)]
    assert attempt.kind is SpanKind.CONSUMER and attributes(attempt) == {
        "messaging.system": "silbo",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.consumer.group.name": "billing",
        "messaging.destination.name": "events",
        "messaging.message.id": message.message_id,
        "messaging.message.conversation_id": message.message_id,
        "silbo.event.name": "user.joined",
        "silbo.attempt": 1,
        "silbo.delivery.id": "1",
        "silbo.outcome": "completed",
    }
    dispatch = traces.one("dispatch other")
    assert is_child(dispatch, attempt)
    receive = traces.one("receive")
    assert receive.parent is None and linked(receive) == [int(SPAN, 16)] and not same_trace(receive, attempt)
    assert attributes(receive)["messaging.batch.message_count"] == 1


HOSTILE = [
    None,
    "",
    "x",
    f"00-{'0' * 32}-{SPAN}-01",
    f"00-{TRACE}-{'0' * 16}-01",
    f"ff-{TRACE}-{SPAN}-01",
    f"00-{TRACE.upper()}-{SPAN}-01",
    TRACEPARENT + "-more",
    TRACEPARENT + "\n",
    TRACEPARENT + "é",
    TRACEPARENT * 10_000,
    "\x00" * 55,
]


async def test_a_missing_or_hostile_traceparent_begins_a_trace(
    d: AsyncEventDispatcher, traces: Traces, caplog: pytest.LogCaptureFixture
) -> None:
    """Anybody who reaches the stream may write one; the message is handled all the same, and nothing floods the log."""
    headers = [{} if value is None else {"traceparent": value, "tracestate": "a=1"} for value in HOSTILE]
    await process(d, *[with_headers(number, **given) for number, given in enumerate(headers)])
    attempts = traces.find("process other")
    assert len(attempts) == len(HOSTILE)
    for value, attempt in zip(HOSTILE, attempts, strict=True):
        assert attempt.parent is None and not attempt.links, repr(value)[:80]
    assert not any(span.links for span in traces.find("receive"))
    assert not caplog.records


TRACESTATES = {
    "a=" + "x" * 256: 1,
    ",".join(f"k{number}={'x' * 100}" for number in range(10)): 0,
    "a=1," * 100_000: 0,
    "a=1\nforged log line": 0,
    "a=é": 0,
}


async def test_a_long_or_hostile_tracestate_is_left_out(
    d: AsyncEventDispatcher, traces: Traces, caplog: pytest.LogCaptureFixture
) -> None:
    """The trace goes on without."""
    messages = [with_headers(at, traceparent=TRACEPARENT, tracestate=state) for at, state in enumerate(TRACESTATES)]
    await process(d, *messages)
    attempts = traces.find("process other")
    for (state, kept), attempt in zip(TRACESTATES.items(), attempts, strict=True):
        assert attempt.parent is not None and attempt.parent.span_id == int(SPAN, 16)
        assert len(attempt.parent.trace_state) == kept, state[:80]
    assert not caplog.records


async def test_a_long_tracestate_is_not_sent_on(d: AsyncEventDispatcher) -> None:
    """A host may have taken it from a request."""
    publisher = Collecting()
    d.add_subscriber(Bridge(publisher))
    state = trace.TraceState([(f"k{number}", "x" * 200) for number in range(10)])
    remote = trace.SpanContext(int(TRACE, 16), int(SPAN, 16), is_remote=True, trace_state=state)
    token = context.attach(trace.set_span_in_context(trace.NonRecordingSpan(remote)))
    try:
        await d.adispatch(JOINED, NotificationEvent())
    finally:
        context.detach(token)
    headers = publisher.messages[0].headers
    assert headers["traceparent"].split("-")[1] == TRACE and "tracestate" not in headers


async def test_a_tracestate_goes_with_its_traceparent(d: AsyncEventDispatcher, traces: Traces) -> None:
    """It is of the trace that the host has set, which the publish's own replaces."""
    publisher = Collecting()
    d.add_subscriber(Bridge(publisher))
    event = NotificationEvent()
    set_header(event, "traceparent", TRACEPARENT)
    set_header(event, "tracestate", "vendor=1")
    set_header(event, "team", "billing")
    await d.adispatch(JOINED, event)
    headers = publisher.messages[0].headers
    assert headers["traceparent"] != TRACEPARENT and "tracestate" not in headers and headers["team"] == "billing"


async def test_receive_makes_the_span_of_an_attempt(d: AsyncEventDispatcher, traces: Traces) -> None:
    """A host with a loop of its own around another broker has the same trace."""

    @d.listen(JOINED)
    async def fail(event: Event) -> None:
        raise LookupError("as told")

    with pytest.raises(LookupError):
        await receive(
            d, JSON.encode(with_headers(1, traceparent=TRACEPARENT), Origin("web", "1")), events=[USER_JOINED]
        )
    attempt = traces.one("process user.joined")
    assert attempt.parent is not None and attempt.parent.span_id == int(SPAN, 16) and linked(attempt) == [int(SPAN, 16)]
    assert is_child(traces.one("dispatch user.joined"), attempt)
    assert attributes(attempt)["silbo.outcome"] == "failed" and "messaging.consumer.group.name" not in attributes(
        attempt
    )


def fail_at_first(times: int) -> Callable[[Any], None]:
    left = [None] * times

    def fail(event: Any) -> None:
        if left:
            left.pop()
            raise LookupError("as told")

    return fail


async def test_a_soon_retry_stays_in_the_trace(d: AsyncEventDispatcher, traces: Traces) -> None:
    await process(d, with_headers(1, traceparent=TRACEPARENT), failing=fail_at_first(1))
    first, second = traces.find("process other")
    retry = traces.one("retry other")
    assert is_child(retry, first) and linked(retry) == [int(SPAN, 16)] and retry.kind is SpanKind.CLIENT
    assert (
        attributes(retry)["messaging.operation.type"] == "settle" and attributes(retry)["error.type"] == "LookupError"
    )
    assert attributes(retry)["silbo.attempt"] == 1
    assert attributes(retry)["silbo.retry.delay"] <= QUICK.cap
    assert first.status.status_code is StatusCode.ERROR and attributes(second)["silbo.attempt"] == 2
    assert second.parent is not None and second.parent.span_id == int(SPAN, 16)


async def test_a_late_retry_begins_a_trace_and_links(
    d: AsyncEventDispatcher, traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tracing system has taken the sender's trace for complete by then."""
    monkeypatch.setattr(instrumentation, "LATE", 0.001)
    backoff = Backoff(initial=0.05)
    await process(d, with_headers(1, traceparent=TRACEPARENT), failing=fail_at_first(1), backoff=backoff)
    first, second = traces.find("process other")
    assert first.parent is not None and second.parent is None and linked(second) == [int(SPAN, 16)]
    assert not same_trace(first, second)


def test_an_attempt_after_another_consumer_s_links(traces: Traces) -> None:
    """Nobody here knows how long ago that was."""
    spans = instrumentation._Spans(traces.provider.get_tracer("x"), DeclaredNames(), None, baggage=False)
    message = with_headers(1, traceparent=TRACEPARENT)
    group = MemoryBroker("other").group("billing", start="new")
    for pause, has_parent in ((None, False), (1.0, True), (1e6, False)):
        delivery = Delivery(b"", "events", JSON, "1", attempt=2)
        attempt = Attempt(
            delivery=delivery,
            name=JOINED,
            message_id=message.message_id,
            headers=message.headers,
            number=2,
            subscription=group,
            pause=pause,
        )
        spans.before_attempt(attempt)
        spans.after_attempt(attempt)
        assert (traces.spans[-1].parent is not None) is has_parent and linked(traces.spans[-1]) == [int(SPAN, 16)]


def test_attempts_and_links_without_number_are_not_kept(traces: Traces, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another consumer settles most of the attempts that have failed here, and a batch may have thousands of messages."""
    monkeypatch.setattr(instrumentation, "REMEMBERED", 2)
    monkeypatch.setattr(instrumentation, "LINKS", 2)
    spans = instrumentation._Spans(traces.provider.get_tracer("x"), DeclaredNames(), None, baggage=False)
    broker = MemoryBroker("other")
    for number in range(5):
        attempt = Attempt(
            delivery=Delivery(b"", "events", JSON, str(number), attempt=1),
            name=JOINED,
            message_id=str(number),
            headers={},
            number=1,
            subscription=broker.group("billing", start="new"),
            pause=None,
        )
        spans.before_attempt(attempt)
        attempt.outcome, attempt.error = "failed", LookupError()
        spans.after_attempt(attempt)
    assert [at for _, at in spans._failed] == ["3", "4"]
    batch = RelayedBatch(messages=[with_headers(at, traceparent=TRACEPARENT) for at in range(5)], publisher=broker)
    spans.before_relay(batch)
    spans.after_relay(batch)
    assert len(traces.one("relay").links) == 2


async def test_a_dead_letter_has_a_span_below_its_last_attempt(d: AsyncEventDispatcher, traces: Traces) -> None:
    """One that never was a message has none to stand below, and no link."""
    broker, done = MemoryBroker("other"), asyncio.Event()

    @d.listen("**")
    async def fail(event: Any) -> None:
        if event.name == "last":
            done.set()
        else:
            raise LookupError("as told")

    group = broker.group("billing", start="new")
    async with Running(Consumer(d, group, give_up_on=(LookupError,), on_error=lambda *_: None)):
        await broker.publish(with_headers(1, traceparent=TRACEPARENT))
        await broker.publish(replace(joined(2), message_name="user.*"))
        await broker.publish(replace(joined(3), message_name="last"))
        async with asyncio.timeout(30):
            await done.wait()
    attempt = traces.find("process other")[0]
    bury, malformed = traces.one("bury other"), traces.one("bury")
    assert is_child(bury, attempt) and linked(bury) == [int(SPAN, 16)]
    assert attributes(bury)["error.type"] == "LookupError" and attributes(bury)["messaging.operation.type"] == "settle"
    assert attributes(bury)["messaging.consumer.group.name"] == "billing"
    assert malformed.parent is None and not malformed.links
    assert not any("as told" in span.to_json() for span in (attempt, bury)), (
        "an error's text may hold something of a payload"
    )
    assert [attributes(span)["silbo.attempt"] for span in (bury, malformed)] == [1, 0], "as the dead letters say it"


async def test_a_redriven_dead_letter_links(d: AsyncEventDispatcher, traces: Traces, own_redis: Any) -> None:
    """It may be days later: a trace of its own, with a link to the sender's."""
    done, gave_up, failing = asyncio.Event(), asyncio.Event(), [True]

    @d.listen("user.joined")
    async def hear(event: Any) -> None:
        if failing:
            raise LookupError("as told")
        done.set()

    async with (
        Redis.from_url(own_redis.url) as client,
        RedisStreams(client, app="web") as streams,
        DeadLetters(client) as letters,
    ):
        group = streams.group("billing", start="oldest", claim_after=0.3)

        def note(error: Exception, delivery: object) -> None:
            gave_up.set()

        async with Running(Consumer(d, group, own="handle", give_up_on=(LookupError,), on_error=note)):
            await streams.publish(with_headers(1, traceparent=TRACEPARENT))
            async with asyncio.timeout(30):
                await gave_up.wait()
                while not await letters.list():
                    await asyncio.sleep(0.01)
                failing.clear()
                assert (await letters.retry()).returned == 1
                await done.wait()
    first, second = traces.find("process other")
    assert first.parent is not None and first.parent.span_id == int(SPAN, 16)
    assert second.parent is None and linked(second) == [int(SPAN, 16)]
    spans = (first, traces.one("bury other"), second)
    assert [attributes(span)["silbo.attempt"] for span in spans] == [1, 1, 1], (
        "attempts count from 1 again, as in the log"
    )
    assert linked(traces.find("receive")[0]) == [int(SPAN, 16)], "Redis gives deliveries in batches"
    assert attributes(first)["messaging.system"] == "redis"
    assert attributes(first)["messaging.destination.name"] == "silbo:{events}"


# -- baggage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [True, False])
async def test_baggage_is_sent_and_read_only_if_asked_for(traces: Traces, asked: bool) -> None:
    """It lies on disks; and a stranger's would go on to whatever the listeners call."""
    d, publisher, seen = AsyncEventDispatcher(), Collecting(), []
    instrument(d, baggage=asked, tracer_provider=traces.provider)
    d.add_subscriber(Bridge(publisher))
    token = context.attach(baggage.set_baggage("user", "17"))
    try:
        await d.adispatch(JOINED, NotificationEvent())
    finally:
        context.detach(token)
    assert publisher.messages[0].headers.get("baggage") == ("user=17" if asked else None)

    @d.listen("user.joined")
    async def read(event: Any) -> None:
        seen.append(dict(baggage.get_all()))

    await process(
        d,
        with_headers(1, baggage="user=17"),
        with_headers(2, baggage="user=17", traceparent=TRACEPARENT),
        with_headers(3, baggage="user=" + "x" * 10_000),
    )
    assert seen == ([{"user": "17"}] * 2 + [{}] if asked else [{}] * 3)


# -- attaching ------------------------------------------------------------------------------------------------


async def test_long_baggage_is_not_sent(traces: Traces, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later versions of OpenTelemetry leave out the entries past the limit themselves, so a lower one is taken here."""
    monkeypatch.setattr(instrumentation, "LONGEST_BAGGAGE", 20)
    d, publisher = AsyncEventDispatcher(), Collecting()
    instrument(d, baggage=True, tracer_provider=traces.provider)
    d.add_subscriber(Bridge(publisher))
    for length in (15, 16):
        token = context.attach(baggage.set_baggage("user", "x" * length))
        try:
            await d.adispatch(JOINED, NotificationEvent())
        finally:
            context.detach(token)
    assert ["baggage" in message.headers for message in publisher.messages] == [True, False]


def test_instrumenting_twice_or_nothing_is_refused(d: AsyncEventDispatcher) -> None:
    with pytest.raises(ValueError, match="already"):
        instrument(d)
    with pytest.raises(ValueError, match="nothing"):
        instrument()


async def test_a_registration_ends_with_the_relay_s(traces: Traces) -> None:
    broker = MemoryBroker("web")
    wire = await broker.group("test", start="new").open()
    async with Outbox(MemoryStore(), broker) as outbox:
        instrument(relay=outbox, tracer_provider=traces.provider).remove()
        await outbox.publish(joined(1))
        while not await wire.receive(10):
            pass
    assert not traces.names


async def test_a_span_ends_even_if_an_error_has_no_text(d: AsyncEventDispatcher, traces: Traces) -> None:
    """A host's error class may fail in __str__."""

    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    @d.listen(JOINED)
    async def fail(event: Event) -> None:
        raise Mute

    with pytest.raises(Mute):
        await d.adispatch(JOINED, NotificationEvent())
    assert [name.partition(" ")[0] for name in traces.names] == ["listener", "dispatch"]
    assert trace.get_current_span() is trace.INVALID_SPAN


def test_names_are_those_of_the_conventions() -> None:
    """Of the version that the scope states."""
    known = {
        value
        for module in (messaging_attributes, code_attributes, error_attributes)
        for name, value in vars(module).items()
        if name.isupper() and isinstance(value, str)
    }
    source = inspect.getsource(instrumentation)
    used = {word for word in source.replace("'", '"').split('"') if word.startswith(("messaging.", "code.", "error.t"))}
    assert len(used) > 10 and used <= known
    assert SCHEMA_URL in {schema.value for schema in Schemas}


def test_without_the_extra_the_module_names_it() -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from silbo.errors import MissingExtra\n"
        "try:\n import silbo.instrumentation.opentelemetry\n"
        "except MissingExtra as error: print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "silbo[otel]" in out
