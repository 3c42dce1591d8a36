"""Metrics through OpenTelemetry: dispatches, listeners and publishes as they happen, and the figures of what runs.

``pip install 'silbo[otel]'``; ``silbo[prometheus]`` brings OpenTelemetry's exporter for Prometheus as well. Nothing is measured
before an object of :class:`Metrics` is attached.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from types import TracebackType
from typing import Final, Self, TypeAlias

from silbo._checks import check_seconds, require_extra
from silbo._message_observers import Publishing
from silbo._reports import RateLimitedLog
from silbo.bridge import Bridge
from silbo.consumer.consumer import Consumer
from silbo.consumer.stats import ConsumerStats
from silbo.dispatch.observers import Call, Dispatch
from silbo.dispatch.received_event import received
from silbo.errors import BrokerUnavailable, DeliveryUnknown, MessageRefused, OutboxFull, StoreUnavailable
from silbo.health import LOOKED_EVERY, Health, keep_refreshing
from silbo.instrumentation.declared_names import DeclaredNames
from silbo.outbox.outbox import Outbox
from silbo.outbox.relay import Relay, RelayStats
from silbo.outbox.rows import OutboxStatus

with require_extra("silbo.instrumentation.metrics", extra="otel", libraries=("opentelemetry",)):
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation, get_meter

__all__ = ["BUCKETS", "Metrics"]

logger = logging.getLogger(__name__)

BUCKETS: Final = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
"""The bounds of the buckets of a duration, in seconds: from 100 microseconds to a minute."""
HOST: Final = "(host)"
"""Stands for the plugin of a listener that the host has added; no plugin can have such a name."""

EVENT_NAME: Final = "silbo.event.name"
PLUGIN: Final = "silbo.plugin"
OUTCOME: Final = "silbo.outcome"
HEARD: Final = "silbo.heard"
NAME: Final = "silbo.name"
PART: Final = "silbo.part"
STATE: Final = "silbo.state"
"""The attributes of all metrics."""

Part: TypeAlias = Consumer | Relay | Outbox | Bridge

_PUBLISH_OUTCOMES: Final[tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...]] = (
    (MessageRefused, "refused"),
    (OutboxFull, "refused"),
    (DeliveryUnknown, "unknown"),
    ((BrokerUnavailable, StoreUnavailable), "unavailable"),
)


@dataclass(frozen=True, slots=True)
class _Gauge:
    """A gauge of the health of parts.

    Attributes:
        name: Of the metric.
        unit: As OpenTelemetry writes it.
        description: For people.
        read: Returns the value of one part; None if it has none.
        combine: Returns the value of several parts of one name.
    """

    name: str
    unit: str
    description: str
    read: Callable[[Health], float | None]
    combine: Callable[[Sequence[float]], float]


def _age_of(health: Health) -> float | None:
    """Return the age of the oldest message; 0 if there is none, None if that is not known."""
    if health.oldest_at is not None:
        return max(0.0, (datetime.now(UTC) - health.oldest_at).total_seconds())
    return 0.0 if health.part == "consumer" or health.lag is not None else None


_GAUGES: Final = (
    _Gauge("silbo.connected", "1", "1 if the part is connected", lambda health: int(health.is_connected), min),
    _Gauge(
        "silbo.ready", "1", "1 if the part runs, is connected and has room", lambda health: int(health.is_ready), min
    ),
    _Gauge(
        "silbo.in_hand",
        "{message}",
        "Messages that wait for their turn or are in work",
        lambda health: health.in_hand,
        sum,
    ),
    _Gauge(
        "silbo.waiting_for_retry",
        "{message}",
        "Deliveries that wait for their next attempt",
        lambda health: health.waiting_for_retry,
        sum,
    ),
    _Gauge(
        "silbo.waiting_for_newer",
        "{message}",
        "Deliveries of a newer version than the consumer knows, which wait for another consumer of the group",
        lambda health: health.waiting_for_newer,
        sum,
    ),
    _Gauge(
        "silbo.lag",
        "{message}",
        "Messages that a group was not given yet, or an outbox has not sent; the same in every replica: take the max",
        lambda health: health.lag,
        max,
    ),
    _Gauge(
        "silbo.oldest.age", "s", "Age of the oldest delivery in hand, or of the oldest unsent message", _age_of, max
    ),
)
_COUNTERS: Final[Sequence[tuple[str, Sequence[tuple[str, str]]]]] = (
    (
        "consumer",
        (
            ("received", "Deliveries, each counted once however often it is tried"),
            ("claimed", "Received deliveries that had been given out before"),
            ("handled", "Deliveries whose listeners all ran"),
            ("unheard", "Deliveries that no listener is meant for"),
            ("failed", "Attempts in which a listener failed"),
            ("retried", "Attempts after a failed one"),
            ("malformed", "Deliveries that are not a message, or don't fit their event class"),
            ("newer", "Deliveries of a newer version than the consumer knows"),
            ("dead", "Deliveries that became dead letters"),
            ("duplicates", "Deliveries that the inbox knew"),
            ("skipped", "Unwanted messages of the program's own app"),
            ("lost", "Deliveries that another consumer took over"),
            ("gaps", "Reports that messages may have been missed"),
        ),
    ),
    (
        "relay",
        (
            ("sent", "Messages that the broker has taken"),
            ("known", "Sent messages that the broker had already"),
            ("dead", "Messages that were refused for good"),
            ("postponed", "Batches that failed and were tried again"),
            ("fenced", "Times that the broker refused the relay as an old leader"),
        ),
    ),
)


def _is_of_delivery(dispatch: Dispatch) -> bool:
    """Return True if a consumer dispatches a delivery, and not a listener another event."""
    dispatched = received.get()
    return dispatched is not None and dispatched.has(dispatch.event)


@dataclass(frozen=True, slots=True)
class _Seen:
    """The figures of a part, as they were read last in its event loop."""

    health: Health
    outbox: OutboxStatus | None


class Metrics:
    """An observer that measures a program, for OpenTelemetry.

    As an observer of a dispatcher it times dispatches, listeners and the publishes of bridges. What it :meth:`watch` es is counted,
    and its health shown while the ``async with`` lasts::

        metrics = Metrics()
        dispatcher = AsyncEventDispatcher(observers=[metrics])
        ...
        metrics.watch(consumer, outbox)
        async with metrics:
            await consumer.run()

    Names that are not declared count as ``other``: an event name can be any text, and each makes series of its own. Declared are
    each EventName, and what the dispatcher declares.

    Args:
        meter_provider: OpenTelemetry's; None takes the global one.
        names: Further names that are told apart.
        every: Seconds between two looks at what only Redis and the store know: the lag, and the state of an outbox. All else about
            the health of what is watched is read once a second, from memory.

    Raises:
        TypeError: ``names`` is one text, and not several.
    """

    def __init__(
        self, *, meter_provider: MeterProvider | None = None, names: Iterable[str] = (), every: float = 15.0
    ) -> None:
        self._every = check_seconds("every", every)
        if isinstance(names, str):
            raise TypeError(f"names is a list of names, not {names!r}: write names=[{names!r}]")
        self._names = DeclaredNames(names)
        self._parts: dict[Part, str] = {}  # with their names; replaced as a whole, as _seen is
        self._seen: dict[Part, _Seen] = {}  # read by exporters in threads of their own, so it is replaced as a whole
        self._looking: Sequence[asyncio.Task[None]] = ()
        self._log = RateLimitedLog(logger, every=60.0)
        meter = get_meter("silbo", meter_provider=meter_provider)
        self._dispatches = meter.create_histogram(
            "silbo.dispatch.duration", "s", "Duration of dispatches", explicit_bucket_boundaries_advisory=BUCKETS
        )
        self._listeners = meter.create_histogram(
            "silbo.listener.duration", "s", "Duration of listeners", explicit_bucket_boundaries_advisory=BUCKETS
        )
        self._publishes = meter.create_histogram(
            "silbo.publish.duration",
            "s",
            "Duration of the publishes of bridges",
            explicit_bucket_boundaries_advisory=BUCKETS,
        )
        for kind, counters in _COUNTERS:
            for field, description in counters:
                meter.create_observable_counter(
                    f"silbo.{kind}.{field}", [self._reader_of_count(kind, field)], "{message}", description
                )
            meter.create_observable_gauge(
                f"silbo.{kind}.slow",
                [self._reader_of_count(kind, "slow")],
                "{call}",
                "Listeners and hooks that run for too long now",
            )
        for gauge in _GAUGES:
            meter.create_observable_gauge(gauge.name, [self._reader_of_health(gauge)], gauge.unit, gauge.description)
        meter.create_observable_gauge(
            "silbo.outbox.rows",
            [self._read_rows],
            "{row}",
            "Rows of an outbox; the same in every replica: take the max",
        )
        meter.create_observable_gauge(
            "silbo.outbox.size", [self._read_size], "By", "Bytes of the rows of an outbox that count for its quota"
        )

    # -- what is watched ------------------------------------------------------------------------------------

    def watch(self, *parts: Part) -> None:
        """Show the counts of consumers, relays, outboxes and bridges, and their health within the ``async with``."""
        for part in parts:
            if not isinstance(part, Consumer | Relay | Outbox | Bridge):
                raise TypeError(f"metrics watch a Consumer, Relay, Outbox or Bridge, not {part!r}")
            self._parts = {**self._parts, part: part.health().name}
        if self._looking:
            self._look()

    async def __aenter__(self) -> Self:
        if self._looking:
            raise RuntimeError("these metrics are entered already")
        self._look()
        report = partial(self._log.write, "figures for the metrics can't be read")
        refreshing = keep_refreshing(lambda: self._parts, self._every, report)
        self._looking = [asyncio.create_task(work) for work in (self._keep_looking(), refreshing)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks, self._looking = self._looking, ()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._seen = {}

    def _look(self) -> None:
        """Read the health of all parts: in the loop, for exporters ask in threads of their own."""
        seen: dict[Part, _Seen] = {}
        for part in self._parts:
            try:
                seen[part] = _Seen(part.health(), part.outbox_status if isinstance(part, Relay | Outbox) else None)
            except Exception as error:  # noqa: BLE001  # these figures are missing, and the others go on
                self._log.write("figures for the metrics can't be read", error)
        self._seen = seen

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(min(self._every, LOOKED_EVERY))
            self._look()

    # -- the observer ---------------------------------------------------------------------------------------

    def before_dispatch(self, dispatch: Dispatch) -> None:
        """Find out if the name is declared: its publishes end before the dispatch, and don't have the dispatcher."""
        self._label(dispatch.name, dispatch.event)

    def before_listener(self, call: Call) -> None:
        """Do nothing: a listener is measured at its end."""

    def after_listener(self, call: Call) -> None:
        """Measure a listener."""
        attributes = {
            EVENT_NAME: self._label(call.dispatch.name, call.dispatch.event),
            PLUGIN: call.plugin or HOST,
            OUTCOME: call.outcome,
        }
        self._listeners.record(call.duration, attributes)

    def after_dispatch(self, dispatch: Dispatch) -> None:
        """Measure a dispatch. The consumer counts its unheard deliveries itself: many of a shared stream are meant for others."""
        attributes: dict[str, str | bool] = {
            EVENT_NAME: self._label(dispatch.name, dispatch.event),
            OUTCOME: dispatch.outcome,
            HEARD: dispatch.heard or _is_of_delivery(dispatch),
        }
        self._dispatches.record(dispatch.duration, attributes)

    def after_publish(self, publishing: Publishing) -> None:
        """Measure the publish of a bridge."""
        outcome: str = "published" if publishing.outcome == "completed" else publishing.outcome
        if publishing.error is not None:
            outcome = next((word for kinds, word in _PUBLISH_OUTCOMES if isinstance(publishing.error, kinds)), outcome)
        attributes = {EVENT_NAME: self._names.label(publishing.name), OUTCOME: outcome}
        self._publishes.record(publishing.duration, attributes)

    def _label(self, name: object, event: object) -> str:
        return self._names.label(name, getattr(event, "dispatcher", None))

    # -- callbacks of OpenTelemetry, in any thread ----------------------------------------------------------

    def _reader_of_count(self, kind: str, field: str) -> Callable[[CallbackOptions], Iterable[Observation]]:
        wanted: type = ConsumerStats if kind == "consumer" else RelayStats

        def read(_: CallbackOptions) -> Iterable[Observation]:
            totals: dict[str, int] = {}
            for part, name in self._parts.items():
                stats = getattr(part, "stats", None)
                if isinstance(stats, wanted):
                    totals[name] = totals.get(name, 0) + getattr(stats, field)
            return [Observation(total, {NAME: name}) for name, total in totals.items()]

        return read

    def _reader_of_health(self, gauge: _Gauge) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(_: CallbackOptions) -> Iterator[Observation]:
            found: dict[tuple[str, str], list[float]] = {}
            for seen in self._seen.values():
                value = gauge.read(seen.health)
                if value is not None:
                    found.setdefault((seen.health.part, seen.health.name), []).append(value)
            for (part, name), values in found.items():
                yield Observation(gauge.combine(values), {PART: part, NAME: name})

        return observe

    def _read_rows(self, _: CallbackOptions) -> Iterator[Observation]:
        for seen in self._seen.values():
            if seen.outbox is not None:
                for state, many in seen.outbox.counts.items():
                    yield Observation(many, {NAME: seen.health.name, STATE: state})

    def _read_size(self, _: CallbackOptions) -> Iterator[Observation]:
        for seen in self._seen.values():
            if seen.outbox is not None:
                yield Observation(seen.outbox.size, {NAME: seen.health.name})
