"""Metrics: what a program does and how it is, as OpenTelemetry has it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import fields, replace
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from redis.asyncio import Redis

from silbo import AsyncEventDispatcher, Bridge, Consumer, Event, EventName, NotificationEvent, Outbox, Plugins
from silbo._retry import Backoff
from silbo.brokers.memory import MemoryBroker
from silbo.brokers.redis import RedisStreams
from silbo.consumer.stats import ConsumerStats
from silbo.errors import BrokerUnavailable, DeliveryUnknown, MessageRefused, OutboxFull
from silbo.health import Health
from silbo.instrumentation import declared_names
from silbo.instrumentation import metrics as module
from silbo.instrumentation.declared_names import DeclaredNames
from silbo.instrumentation.metrics import BUCKETS, Metrics
from silbo.message import Message
from silbo.outbox.relay import RelayStats
from silbo.stores.memory import MemoryStore
from tests.support.consumer import USER_LEFT, Running, UserLeft, begin
from tests.support.relay import message, wait_until


class Measured:
    """Metrics, and what an exporter would read of them."""

    def __init__(self, **options: Any) -> None:
        self._reader = InMemoryMetricReader()
        self.provider = MeterProvider([self._reader])
        self.metrics = Metrics(meter_provider=self.provider, **options)

    def read(self) -> dict[str, list[tuple[Mapping[str, Any], Any]]]:
        """The points of each metric, as their attributes and themselves."""
        data = self._reader.get_metrics_data()
        return {
            metric.name: [(dict(point.attributes or {}), point) for point in metric.data.data_points]
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }

    def values(self, name: str) -> dict[tuple[Any, ...], Any]:
        """The values of a counter or gauge, by the values of their attributes."""
        return {tuple(attributes.values()): point.value for attributes, point in self.read().get(name, [])}

    def counts(self, name: str) -> dict[tuple[Any, ...], int]:
        """The counts of a histogram."""
        return {tuple(attributes.values()): point.count for attributes, point in self.read().get(name, [])}


@pytest.fixture
def measured() -> Measured:
    return Measured(every=0.01)


async def test_dispatches_and_listeners_are_timed_by_name_plugin_and_outcome(measured: Measured) -> None:
    d = AsyncEventDispatcher(observers=[measured.metrics])
    plugins = Plugins(d)

    @d.listen(USER_LEFT, priority=-1)
    async def own(_: object) -> None: ...

    async def failing(_: object) -> None:
        raise ValueError("no")

    async def add(view: Any) -> None:
        view.add_listener(USER_LEFT, failing)

    await plugins.load(add, name="loyalty")
    await d.adispatch(USER_LEFT, UserLeft(1))
    await plugins.aclose()
    assert measured.counts("silbo.dispatch.duration") == {("user.left", "completed", True): 1}
    assert measured.counts("silbo.listener.duration") == {
        ("user.left", "(host)", "completed"): 1,
        ("user.left", "loyalty", "failed"): 1,
    }
    ((_, point),) = measured.read()["silbo.dispatch.duration"]
    assert tuple(point.explicit_bounds) == BUCKETS and BUCKETS[0] == 0.0001 and 0 < point.sum < 30


async def test_names_without_a_declaration_are_one(measured: Measured) -> None:
    """A name can be any text, and each makes series of its own."""
    d = AsyncEventDispatcher(observers=[measured.metrics])
    d.add_listener("user.*", print_nothing)
    for number in range(50):
        await d.adispatch(f"user.{number}", Event())
        await d.adispatch(number, Event())
    assert measured.counts("silbo.dispatch.duration") == {
        ("other", "completed", True): 50,
        ("other", "completed", False): 50,
    }


async def print_nothing(_: object) -> None: ...


async def test_declared_names_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """An EventName, a text that equals one, and a name that the dispatcher or the metrics are given."""
    paid, sent = EventName("order.paid"), EventName("order.sent")
    d = AsyncEventDispatcher(names=[paid], unknown="allow")
    names = DeclaredNames(["order.given"])
    assert [names.label(name, d) for name in ("order.paid", "order.given", "order.sent", 7)] == [
        *("order.paid", "order.given", "other", "other")
    ]
    monkeypatch.setattr(declared_names, "LOOK_EVERY", 0)
    d.add_listener(sent, print_nothing)
    assert names.label("order.sent", d) == "order.sent"
    assert names.label(EventName("order.new"), None) == "order.new"
    monkeypatch.setattr(declared_names, "MOST", 4)
    assert names.label(EventName("order.fifth"), d) == "other"
    assert names.label("order.paid", d) == "order.paid"


async def test_name_that_is_no_text_does_not_end_the_export(measured: Measured) -> None:
    """Half of a surrogate pair can't be written as UTF-8: each scrape would fail."""
    d = AsyncEventDispatcher(observers=[measured.metrics])
    await d.adispatch(EventName("user.\ud800"), Event())
    assert list(measured.counts("silbo.dispatch.duration")) == [("user.?", "completed", False)]


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "published"),
        (MessageRefused("user.left", "too large"), "refused"),
        (OutboxFull(3, 100, "3 messages"), "refused"),
        (DeliveryUnknown("perhaps"), "unknown"),
        (BrokerUnavailable("away"), "unavailable"),
        (RuntimeError("a mistake"), "failed"),
    ],
)
async def test_publishes_are_timed_by_outcome(measured: Measured, error: Exception | None, outcome: str) -> None:
    class Moody(MemoryBroker):
        async def publish(self, *messages: Message) -> None:
            if error is not None:
                raise error

    d = AsyncEventDispatcher(observers=[measured.metrics])
    d.add_subscriber(Bridge(Moody("shop"), on_error=lambda error, message: None))
    await d.adispatch(USER_LEFT, UserLeft(1))
    assert measured.counts("silbo.publish.duration") == {("user.left", outcome): 1}


async def test_only_the_dispatches_of_the_host_are_unheard(measured: Measured) -> None:
    """A shared stream has events for others: what a consumer dispatches of them is no mistake of its program."""
    d, broker = AsyncEventDispatcher(observers=[measured.metrics]), MemoryBroker("other")
    forgotten = EventName("mail.forgotten", UserLeft)

    @d.listen(USER_LEFT)
    async def pass_on(event: Any) -> None:
        await d.adispatch(forgotten, UserLeft(event.user_id))

    await begin(broker)
    sending = AsyncEventDispatcher()
    consumer = Consumer(d, broker.group("billing", start="new"), events=[USER_LEFT])
    async with Bridge(broker) as bridge, Running(consumer):
        await consumer.ready()
        sending.add_subscriber(bridge)
        await sending.adispatch(USER_LEFT, UserLeft(1))
        await sending.adispatch("for.others", NotificationEvent())
        await wait_until(lambda: consumer.stats.unheard == 1 and consumer.stats.handled == 1)
        consumer.stop()
    assert measured.counts("silbo.dispatch.duration") == {
        ("user.left", "completed", True): 1,
        ("mail.forgotten", "completed", False): 1,
        ("other", "completed", True): 1,
    }


async def test_first_publish_of_a_declared_name_has_it(measured: Measured) -> None:
    """The name is written as a plain string; its publish ends before its dispatch does."""
    d = AsyncEventDispatcher(names=[USER_LEFT], observers=[measured.metrics])
    d.add_subscriber(Bridge(MemoryBroker("shop")))
    await d.adispatch("user.left", UserLeft(1))
    assert measured.counts("silbo.publish.duration") == {("user.left", "published"): 1}


async def test_consumer_shows_its_counts_and_its_health(measured: Measured) -> None:
    d, broker = AsyncEventDispatcher(), MemoryBroker("other")

    @d.listen("user.left")
    async def fail(event: Any) -> None:
        if event.user_id == 1:
            raise ValueError("no")

    await begin(broker)
    async with Bridge(broker) as bridge:
        sending = AsyncEventDispatcher()
        sending.add_subscriber(bridge)
        for number in (1, 2, 3):
            await sending.adispatch(USER_LEFT, UserLeft(number))
    consumer = Consumer(
        d, broker.group("billing", start="new"), events=[USER_LEFT], backoff=Backoff(initial=60, cap=60), drain=0
    )
    measured.metrics.watch(consumer, consumer)
    async with measured.metrics:
        await wait_until(lambda: measured.values("silbo.lag") == {("consumer", "billing"): 3})
        async with Running(consumer):
            await wait_until(lambda: measured.values("silbo.consumer.handled") == {("billing",): 2})
            assert measured.values("silbo.consumer.received") == {("billing",): 3}
            assert measured.values("silbo.consumer.failed") == {("billing",): 1}
            await wait_until(lambda: measured.values("silbo.waiting_for_retry") == {("consumer", "billing"): 1})
            await wait_until(lambda: measured.values("silbo.lag") == {("consumer", "billing"): 0})
            assert measured.values("silbo.ready") == measured.values("silbo.connected") == {("consumer", "billing"): 1}
            assert measured.values("silbo.in_hand") == {("consumer", "billing"): 0}
            await wait_until(lambda: measured.values("silbo.oldest.age")[("consumer", "billing")] > 0)
            consumer.stop()
    assert measured.values("silbo.ready") == {}, "nobody looks any more"
    assert measured.values("silbo.consumer.received") == {("billing",): 3}


async def test_lag_is_there_soon_after_a_consumer_has_connected(
    redis: Redis, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its group is made then. A fresh deployment has an alarm that looks at the lag, and not only 15 seconds later."""

    class Counting(Consumer):
        refreshed = 0

        async def refresh_health(self) -> None:
            await super().refresh_health()
            self.refreshed += 1

    for place in ("silbo.health", "silbo.instrumentation.metrics"):
        monkeypatch.setattr(f"{place}.LOOKED_EVERY", 0.01)
    measured = Measured(every=3600)
    async with RedisStreams(redis, app="shop", prefix=prefix) as streams, measured.metrics:
        consumer = Counting(AsyncEventDispatcher(), streams.group("billing", start="new"), own="handle")
        measured.metrics.watch(consumer)
        await wait_until(lambda: consumer.refreshed == 1)
        assert measured.values("silbo.lag") == {}
        async with Running(consumer):
            await wait_until(lambda: measured.values("silbo.lag") == {("consumer", "billing"): 0})
            assert consumer.refreshed == 2


async def test_messages_that_wait_for_a_newer_version_are_shown(measured: Measured) -> None:
    """They are no retries, and in the end dead letters: whoever deploys has to see them."""
    broker = MemoryBroker("web")
    await begin(broker)
    consumer = Consumer(
        AsyncEventDispatcher(), broker.group("billing", start="new"), events=[USER_LEFT], own="handle", drain=0
    )
    measured.metrics.watch(consumer)
    async with measured.metrics, Running(consumer):
        newer = message(1)
        await broker.publish(replace(newer, message_name=str(USER_LEFT), headers={**newer.headers, "version": "2"}))
        await wait_until(lambda: measured.values("silbo.waiting_for_newer") == {("consumer", "billing"): 1})
        assert measured.values("silbo.waiting_for_retry") == {("consumer", "billing"): 0}


async def test_outbox_shows_its_rows_and_its_relay(measured: Measured) -> None:
    async with Outbox(MemoryStore(), MemoryBroker("web")) as outbox:
        measured.metrics.watch(outbox)
        async with measured.metrics:
            await outbox.publish(message(1), message(2))
            await wait_until(lambda: measured.values("silbo.outbox.rows").get(("web", "sent")) == 2)
            assert measured.values("silbo.outbox.rows")[("web", "dead")] == 0
            assert measured.values("silbo.outbox.size") == {("web",): 0}
            assert measured.values("silbo.relay.sent") == {("web",): 2}
            await wait_until(lambda: measured.values("silbo.lag") == {("outbox", "web"): 0})


async def test_consumers_of_one_group_are_shown_together(measured: Measured) -> None:
    d, broker = AsyncEventDispatcher(), MemoryBroker("other")
    first, second = (Consumer(d, broker.group("billing", start="new")) for _ in range(2))
    first.stats.received, second.stats.received = 2, 3
    measured.metrics.watch(first, second)
    assert measured.values("silbo.consumer.received") == {("billing",): 5}
    async with AsyncExitStack() as stack, Running(first):
        await wait_until(lambda: first.health().is_ready)
        await stack.enter_async_context(measured.metrics)
        await wait_until(lambda: len(measured.metrics._seen) == 2)
        assert measured.values("silbo.ready") == {("consumer", "billing"): 0}, "one of them is not"
        async with Running(second):
            await wait_until(lambda: measured.values("silbo.ready") == {("consumer", "billing"): 1})


def test_every_count_is_a_metric(measured: Measured) -> None:
    """A count that is added to the stats is exported, too."""
    for kind, stats in (("consumer", ConsumerStats), ("relay", RelayStats)):
        assert {*(name for name, _ in dict(module._COUNTERS)[kind]), "slow"} == {
            field.name for field in fields(stats)
        }, kind


async def test_figures_that_cannot_be_read_are_missing_alone(
    measured: Measured, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Outbox):
        is_broken = False

        def health(self) -> Health:
            if self.is_broken:
                raise RuntimeError("a mistake")
            return super().health()

        async def refresh_health(self) -> None:
            raise RuntimeError("a mistake")

    async with (
        Broken(MemoryStore(), MemoryBroker("web")) as broken,
        Outbox(MemoryStore(), MemoryBroker("shop")) as outbox,
    ):
        measured.metrics.watch(broken, outbox)
        async with measured.metrics:
            await wait_until(lambda: measured.values("silbo.lag") == {("outbox", "shop"): 0})
            assert measured.values("silbo.ready") == {("outbox", "web"): 1, ("outbox", "shop"): 1}
            broken.is_broken = True
            await wait_until(lambda: measured.values("silbo.ready") == {("outbox", "shop"): 1})
    assert "figures for the metrics can't be read" in caplog.text


async def test_health_is_shown_at_once_and_follows_while_the_broker_is_silent() -> None:
    """A look at the lag may take long; what is known from memory does not wait for it."""

    class Silent(Outbox):
        async def refresh_health(self) -> None:
            await asyncio.Event().wait()

    measured = Measured()
    async with Silent(MemoryStore(), MemoryBroker("web"), relay=False) as outbox, measured.metrics:
        measured.metrics.watch(outbox)
        assert measured.values("silbo.ready") == {("outbox", "web"): 1}
        await outbox.aclose()
        await wait_until(lambda: measured.values("silbo.ready") == {("outbox", "web"): 0})


async def test_mistakes_are_refused(measured: Measured) -> None:
    with pytest.raises(TypeError, match="not 'billing'"):
        measured.metrics.watch("billing")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"write names=\['abc'\]"):
        Metrics(names="abc")
    async with measured.metrics:
        with pytest.raises(RuntimeError, match="entered already"):
            await measured.metrics.__aenter__()
