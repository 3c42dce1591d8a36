"""Scenarios of `make bench-all` alone: kinds of classes, patterns, options, imports, message sizes, backlogs, and growth."""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import sys
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from math import log
from time import perf_counter, process_time
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis

import silbo
from benchmarks import consume
from benchmarks.at_redis import POOL, in_tasks
from benchmarks.dispatch import dispatching, listener, silbo_dispatcher
from benchmarks.redis_publish import MEETING_JOINED, PIPELINE, PREFIX, Encoding, MeetingJoined, by_hand, record
from benchmarks.scenario import Contenders, Scenario, load_peer
from benchmarks.stored import open_client
from benchmarks.timing import Contender, Measured
from silbo import AsyncEventDispatcher, Bridge, EventName, NotificationEvent
from silbo.brokers.redis import RedisStreams

__all__ = ["SCENARIOS"]

NAME = "meeting.joined"
TICK = 0.001
TICKED = 20_000
DOUBLINGS = 5
"""Growth is measured over a number that is doubled five times."""
LINEAR = 1.05
"""The exponent at the most: work that is doubled takes twice the time, and 5 % more for noise."""

Open = Callable[[], AbstractAsyncContextManager[Contenders]]


def plainly(make: Callable[[], Contenders]) -> Open:
    """Return a context that needs no setting."""

    @asynccontextmanager
    async def opened() -> AsyncGenerator[Contenders]:
        yield make()

    return opened


# -- classes of events ----------------------------------------------------------------------------------------


class Plain(NotificationEvent):
    """A class without a library."""

    def __init__(self, meeting_id: int, user_id: int) -> None:
        self.meeting_id = meeting_id
        self.user_id = user_id


def make_attrs() -> type:
    """A class of attrs."""
    import attrs

    @attrs.define(slots=False)
    class OfAttrs(NotificationEvent):
        meeting_id: int
        user_id: int

    return OfAttrs


def make_struct() -> type:
    """A Struct of msgspec."""
    import msgspec

    class OfMsgspec(msgspec.Struct, NotificationEvent, dict=True):
        meeting_id: int
        user_id: int

    return OfMsgspec


def make_pydantic() -> type:
    """A model of pydantic."""
    import pydantic

    class OfPydantic(NotificationEvent, pydantic.BaseModel):
        meeting_id: int
        user_id: int

    return OfPydantic


CLASSES: dict[str, Callable[[], type]] = {
    "dataclass": lambda: MeetingJoined,
    "plain class": lambda: Plain,
    "attrs": make_attrs,
    "msgspec": make_struct,
    "pydantic": make_pydantic,
}


def classes(*, bridged: bool) -> Contenders:
    """A new event of each library's class to 10 listeners, or through the bridge to its bytes."""

    def contender(make: Callable[[], type]) -> Contender:
        cls = make()
        name = EventName(NAME, cls)
        dispatcher = silbo_dispatcher(0 if bridged else 10)
        if bridged:
            dispatcher.add_subscriber(Bridge(Encoding()))
        return dispatching(dispatcher, lambda: cls(meeting_id=17, user_id=4), name)

    return {name: load_peer(partial(contender, make)) for name, make in CLASSES.items()}


# -- patterns and options -------------------------------------------------------------------------------------


def patterns() -> Contenders:
    """One listener of the name; one of a pattern; and one of the name beside a thousand patterns of others."""
    named, of_pattern, among = silbo_dispatcher(1), silbo_dispatcher(0), silbo_dispatcher(1)
    of_pattern.add_listener("meeting.*", listener)
    for number in range(1_000):
        among.add_listener(f"other{number}.**", listener)
    return {
        "a name": dispatching(named, silbo.Event),
        "silbo": dispatching(of_pattern, silbo.Event),
        "beside 1,000 patterns": dispatching(among, silbo.Event),
    }


def options() -> Contenders:
    """One listener with each option, beside one without; and an observer that does nothing."""

    def ignore(error: Exception, event: object, of: object) -> None:
        pass

    found = {"none": dispatching(silbo_dispatcher(1), silbo.Event)}
    given: dict[str, dict[str, Any]] = {
        "timeout=5": {"timeout": 5.0},
        "concurrent=True": {"concurrent": True},
        "on_error='collect'": {"on_error": "collect"},
        "on_error=a callable": {"on_error": ignore},
    }
    for name, of_listener in given.items():
        dispatcher = silbo_dispatcher(0)
        dispatcher.add_listener(NAME, listener, **of_listener)
        found[name] = dispatching(dispatcher, silbo.Event)
    once = silbo_dispatcher(0)

    async def run_once(times: int) -> None:
        for _ in range(times):
            once.add_listener(NAME, listener, once=True)
            await once.adispatch(NAME, silbo.Event())

    return {**found, "once=True, registered each time": run_once}


# -- traces ---------------------------------------------------------------------------------------------------


def traces(*, bridged: bool) -> Contenders:
    """One listener, or a bridge, with and without traces; by hand, spans around the same calls."""

    def event() -> Any:
        return MeetingJoined(17, 4) if bridged else silbo.Event()

    def dispatcher() -> AsyncEventDispatcher:
        made = silbo_dispatcher(0 if bridged else 1)
        if bridged:
            made.add_subscriber(Bridge(Encoding()))
        return made

    def traced(*, sampled: bool) -> Contender:
        from silbo.instrumentation.opentelemetry import instrument

        made = dispatcher()
        instrument(made, tracer_provider=provider(sampled=sampled))
        return dispatching(made, event, MEETING_JOINED)

    def with_spans() -> Contender:
        tracer, made = provider(sampled=True).get_tracer("by hand"), dispatcher()

        async def run(times: int) -> None:
            for _ in range(times):
                with tracer.start_as_current_span("dispatch"), tracer.start_as_current_span("listener"):
                    await made.adispatch(MEETING_JOINED, event())

        return run

    return {
        "not attached": dispatching(dispatcher(), event, MEETING_JOINED),
        "silbo": load_peer(partial(traced, sampled=True)),
        "attached, not sampled": load_peer(partial(traced, sampled=False)),
        "two spans by hand": load_peer(with_spans),
    }


def provider(*, sampled: bool) -> Any:
    """Return a tracer provider whose spans go nowhere when they end."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON

    return TracerProvider(sampler=ALWAYS_ON if sampled else ALWAYS_OFF, shutdown_on_exit=False)


# -- metrics --------------------------------------------------------------------------------------------------


def metrics() -> Contenders:
    """One listener, with and without metrics; by hand, two histograms around the same calls."""

    def measured() -> Contender:
        from opentelemetry.sdk.metrics import MeterProvider

        from silbo.instrumentation.metrics import Metrics

        made = silbo_dispatcher(1)
        made.observe(Metrics(meter_provider=MeterProvider([reader()], shutdown_on_exit=False)))
        return dispatching(made, silbo.Event, MEETING_JOINED)

    def with_histograms() -> Contender:
        from opentelemetry.sdk.metrics import MeterProvider

        meter = MeterProvider([reader()], shutdown_on_exit=False).get_meter("by hand")
        dispatches, listeners = meter.create_histogram("dispatch", "s"), meter.create_histogram("listener", "s")
        made = silbo_dispatcher(1)

        async def run(times: int) -> None:
            for _ in range(times):
                began = perf_counter()
                await made.adispatch(MEETING_JOINED, silbo.Event())
                taken = perf_counter() - began
                listeners.record(taken, {"name": "meeting.joined"})
                dispatches.record(taken, {"name": "meeting.joined"})

        return run

    return {
        "not attached": dispatching(silbo_dispatcher(1), silbo.Event, MEETING_JOINED),
        "silbo": load_peer(measured),
        "two histograms by hand": load_peer(with_histograms),
    }


def reader() -> Any:
    """Return a reader of metrics that nobody asks."""
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    return InMemoryMetricReader()


# -- imports --------------------------------------------------------------------------------------------------

IMPORTS = {
    "redis.asyncio": "import redis.asyncio",
    "silbo": "import silbo",
    "silbo and RedisStreams": "from silbo.brokers.redis import RedisStreams",
    "whistle": "import whistle",
    "blinker": "import blinker",
    "aiosignal": "import aiosignal",
    "pluggy": "import pluggy",
    "pyee": "import pyee.asyncio",
    "psygnal": "import psygnal",
    "Django": "import django.dispatch",
    "bubus": "import bubus",
    "diator": "import diator.events",
    "python-cqrs": "import cqrs",
    "coredis": "import coredis",
    "FastStream": "import faststream.redis",
}


def imports() -> Contenders:
    """A new Python that imports a library, less one that imports asyncio alone."""

    async def start(text: str) -> float:
        started = perf_counter()
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", f"import asyncio\n{text}")
        if await process.wait():
            raise ImportError(text)
        return perf_counter() - started

    def contender(text: str) -> Contender:
        async def run(times: int) -> Measured:
            return Measured(max(1e-6, await start(text) - await start("")))

        return run

    return {name: contender(text) for name, text in IMPORTS.items()}


# -- latencies, sizes, backlogs -------------------------------------------------------------------------------


def open_latencies(concurrency: int) -> Open:
    """Return the context of so many tasks that publish; the time of each publish is noted."""

    @asynccontextmanager
    async def opened() -> AsyncGenerator[Contenders]:
        async with open_client() as (client, _), RedisStreams(client, app="benchmark", prefix=PREFIX) as streams:
            dispatcher = AsyncEventDispatcher()
            dispatcher.add_subscriber(Bridge(streams))

            def noting(publish: Callable[[int], Any], most: int) -> Contender:
                async def run(times: int) -> Measured:
                    taken: list[float] = []
                    left = iter(range(times))

                    async def task() -> None:
                        for number in left:
                            started = perf_counter()
                            await publish(number)
                            taken.append(perf_counter() - started)

                    await asyncio.gather(*[task() for _ in range(min(concurrency, most))])
                    await client.delete(f"{PREFIX}:{{events}}", f"{PREFIX}:{{plain}}")
                    taken.sort()
                    parts = (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999))
                    figures = {key: taken[int(part * len(taken))] for key, part in parts}
                    return Measured(figures["p50"], figures)

                return run

            pool = BlockingConnectionPool(max_connections=POOL, timeout=60, **client.connection_pool.connection_kwargs)
            pooled = Redis.from_pool(pool)
            yield {
                "redis-py, gathered": noting(
                    lambda number: pooled.xadd(f"{PREFIX}:{{plain}}", {"message": by_hand(number)}), POOL
                ),
                "silbo": noting(lambda number: dispatcher.adispatch(MEETING_JOINED, MeetingJoined(17, number)), 10_000),
            }
            await pooled.aclose()

    return opened


@dataclass
class Blob(NotificationEvent):
    """An event with a text."""

    text: str


BLOB = EventName("blob.stored", Blob)


def open_size(size: int) -> Open:
    """Return the context of 100 tasks that publish messages of so many bytes."""

    @asynccontextmanager
    async def opened() -> AsyncGenerator[Contenders]:
        text, key = "x" * size, f"{PREFIX}:{{plain}}"
        async with open_client() as (client, _), RedisStreams(client, app="benchmark", prefix=PREFIX) as streams:
            dispatcher = AsyncEventDispatcher()
            dispatcher.add_subscriber(Bridge(streams))

            async def pipelines(times: int) -> None:
                many = max(1, min(PIPELINE, (1 << 20) // max(size, 1)))
                for start in range(0, times, many):
                    pipeline = client.pipeline(transaction=False)
                    for number in range(start, min(start + many, times)):
                        made = record(number)
                        made["payload"]["text"] = text
                        pipeline.xadd(key, {"message": json.dumps(made)}, maxlen=100)
                    await pipeline.execute()

            silbo_tasks = in_tasks(100, lambda number: dispatcher.adispatch(BLOB, Blob(text)))

            async def ours(times: int) -> None:
                await silbo_tasks(times)
                await client.xtrim(f"{PREFIX}:{{events}}", 100, approximate=False)

            yield {"redis-py, pipelines": pipelines, "silbo": ours}

    return opened


def open_backlog(waiting: int) -> Open:
    """Return the context of a stream in which so many messages wait."""

    @asynccontextmanager
    async def opened() -> AsyncGenerator[Contenders]:
        async with open_client() as (client, _):
            await consume.fill(client, waiting + consume.MORE)
            yield {"by hand": consume.by_hand(client), "silbo": consume.consuming(client)}

    return opened


@asynccontextmanager
async def open_ticker() -> AsyncGenerator[Contenders]:
    """A host's task that wakes each millisecond, beside a loop that consumes at full speed: how late it is."""
    async with open_client() as (client, _):
        await consume.fill(client, TICKED + consume.MORE)

        def ticking(read: Contender) -> Contender:
            async def run(times: int) -> Measured:
                late: list[float] = []

                async def tick() -> None:
                    while True:
                        due = perf_counter() + TICK
                        await asyncio.sleep(TICK)
                        late.append(perf_counter() - due)

                task = asyncio.create_task(tick())
                await read(times)
                task.cancel()
                late.sort()
                figures = {key: late[int(part * len(late))] for key, part in (("p50", 0.5), ("p99", 0.99))}
                return Measured(figures["p99"], figures)

            return run

        yield {"by hand": ticking(consume.by_hand(client)), "silbo": ticking(consume.consuming(client))}


# -- growth ---------------------------------------------------------------------------------------------------


def growing(sizes: Iterator[int], measure: Callable[[int], Any]) -> Contender:
    """Return a contender that gives the exponent of the growth: 1 if twice as many take twice as long."""
    points = list(sizes)

    async def run(times: int) -> Measured:
        taken = []
        for size in points:
            gc.collect()
            taken.append(await measure(size))
        xs, ys = [log(size) for size in points], [log(seconds) for seconds in taken]
        return Measured(statistics.linear_regression(xs, ys).slope)

    return run


def doubled(first: int) -> Iterator[int]:
    """The numbers, the first one doubled again and again."""
    return (first << step for step in range(DOUBLINGS + 1))


async def cpu(work: Any) -> float:
    """Await it; its CPU seconds."""
    started = process_time()
    await work
    return process_time() - started


async def over_listeners(many: int) -> float:
    """One dispatch after another to so many listeners."""
    run = dispatching(silbo_dispatcher(many), silbo.Event)
    await run(5)
    return await cpu(run(200))


async def over_names(many: int) -> float:
    """A dispatch to each of so many names."""
    dispatcher, names = AsyncEventDispatcher(), [f"meeting.{number}" for number in range(many)]
    for name in names:
        dispatcher.add_listener(name, listener)

    async def run() -> None:
        for _ in range(5):
            for name in names:
                await dispatcher.adispatch(name, silbo.Event())

    return await cpu(run())


async def over_patterns(many: int) -> float:
    """So many patterns are registered, and 50 new names dispatched."""
    dispatcher = AsyncEventDispatcher()

    async def run() -> None:
        for number in range(many):
            dispatcher.add_listener(f"meeting{number}.*", listener)
        for number in range(50):
            await dispatcher.adispatch(f"meeting{number}.joined", silbo.Event())

    return await cpu(run())


@asynccontextmanager
async def open_waiting() -> AsyncGenerator[Contenders]:
    """So many messages wait in a stream, and are consumed."""
    async with open_client() as (client, _):

        async def over_waiting(many: int) -> float:
            await consume.fill(client, many)
            return await cpu(_consume(client, many))

        yield {"linear": _constant(1.0), "silbo": growing(doubled(1_000), over_waiting)}


async def _consume(client: Redis, many: int) -> None:
    await consume.consuming(client)(many)


def _constant(figure: float) -> Contender:
    async def run(times: int) -> Measured:
        return Measured(figure)

    return run


def growth(first: int, measure: Callable[[int], Any]) -> Contenders:
    """The exponent beside 1."""
    return {"linear": _constant(1.0), "silbo": growing(doubled(first), measure)}


# -- the rows -------------------------------------------------------------------------------------------------


def row(name: str, group: str, open_: Open, reference: str, subject: str = "silbo", **given: Any) -> Scenario:
    """Return a row of `make bench-all`."""
    return Scenario(
        name=name,
        group=group,
        open=open_,
        reference=reference,
        subject=subject,
        in_bench=False,
        **{"rounds": 9, **given},
    )


CPU = {"unit": "dispatches", "measures": "cpu seconds"}
GROWTH = {"unit": "exponent", "measures": "exponent", "targets": {"linear": LINEAR}, "times": 1, "rounds": 5}
SPEED = {"unit": "messages", "more_is_better": True}

SCENARIOS = [
    row(
        "classes of events, 10 listeners",
        "classes",
        plainly(partial(classes, bridged=False)),
        "dataclass",
        "attrs",
        **CPU,
    ),
    row(
        "classes of events, to messages",
        "classes",
        plainly(partial(classes, bridged=True)),
        "dataclass",
        "attrs",
        **CPU,
    ),
    row("patterns", "dispatch, more", plainly(patterns), "a name", **CPU),
    row("options of a listener", "dispatch, more", plainly(options), "none", "timeout=5", **CPU),
    row("traces, 1 listener", "traces", plainly(partial(traces, bridged=False)), "two spans by hand", **CPU),
    row("traces, a bridge to messages", "traces", plainly(partial(traces, bridged=True)), "two spans by hand", **CPU),
    row("dispatch, Metrics attached", "metrics", plainly(metrics), "two histograms by hand", **CPU),
    row("import", "import", plainly(imports), "redis.asyncio", unit="imports", measures="latency", times=1),
    *(
        row(
            f"latency of a publish, {concurrency:,} at once",
            "latency",
            open_latencies(concurrency),
            "redis-py, gathered",
            unit="p50 until acknowledged",
            measures="latency",
            times=max(3_000, 2 * concurrency),
        )
        for concurrency in (1, 100, 10_000)
    ),
    row(
        "a ticker of 1 ms beside a Streams consumer",
        "latency",
        open_ticker,
        "by hand",
        unit="p99, too late",
        measures="latency",
        targets={"by hand": 1.0},
        times=TICKED,
        notes={"by hand": "XREADGROUP 500, json.loads, the class, XACK: 500 messages hold the loop"},
    ),
    *(
        row(
            f"publish, messages of {text}",
            "sizes",
            open_size(size),
            "redis-py, pipelines",
            times=max(20, min(3_000, 30_000_000 // size // 10)),
            curve=("bytes", size),
            **SPEED,
        )
        for text, size in (("100 B", 100), ("1 kB", 1_000), ("10 kB", 10_000), ("100 kB", 100_000), ("1 MB", 1_000_000))
    ),
    *(
        row(
            f"backlog of {waiting:,}",
            "backlogs",
            open_backlog(waiting),
            "by hand",
            times=waiting,
            rounds=2,
            seconds=3600.0,
            curve=("waiting messages", waiting),
            **SPEED,
        )
        for waiting in (100_000, 1_000_000)
    ),
    row("growth over listeners", "growth", plainly(partial(growth, 64, over_listeners)), "linear", **GROWTH),
    row("growth over names", "growth", plainly(partial(growth, 500, over_names)), "linear", **GROWTH),
    row("growth over patterns", "growth", plainly(partial(growth, 200, over_patterns)), "linear", **GROWTH),
    row("growth over waiting messages", "growth", open_waiting, "linear", **GROWTH),
]
