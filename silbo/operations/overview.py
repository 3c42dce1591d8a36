"""An overview of a host at one moment: its names, listeners, plugins, consumers and dispatches, and its streams and outbox."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Final

from silbo._message_observers import find_observers
from silbo._process import Process, find_process, name_process
from silbo.bridge import find_bridges
from silbo.brokers.redis.calls import CallConnection, Command, ask, to_mapping
from silbo.brokers.redis.connection import Client
from silbo.brokers.redis.dead_letters import DeadLetter, parse_letter
from silbo.consumer.consumer import Consumer
from silbo.consumer.stats import ConsumerStats
from silbo.dispatch.dispatcher import AsyncEventDispatcher
from silbo.dispatch.trace import Trace
from silbo.dispatch.traced import Traced, shorten
from silbo.errors import MessageInvalid, SilboError
from silbo.health import HasHealth, Health
from silbo.message import Format, Message
from silbo.operations.app import App
from silbo.operations.groups import SILENT_AFTER, GroupStatus, read_stream_groups
from silbo.operations.listeners import ListenerInfo, list_listeners
from silbo.operations.names import NameInfo, find_names
from silbo.operations.plugins import PluginInfo, list_plugins
from silbo.operations.redis import AwayNode, choose_streams, opened, read_each, time_of_entry
from silbo.outbox.rows import OutboxStatus, OutboxStore, Row
from silbo.wire.formats import JSON

__all__ = [
    "ConsumerOverview",
    "DeadMessage",
    "DispatcherOverview",
    "OutboxOverview",
    "Overview",
    "StreamOverview",
    "read_overview",
]

DISPATCHES: Final = 20
"""The most dispatches of an overview, the newest."""
DEAD: Final = 20
"""The most dead letters of a stream, and dead rows of an outbox: the newest letters, the oldest rows."""
AT_ONCE: Final = 10
"""Ten names are looked at in one turn of the event loop, for some milliseconds: the host may be at work."""
PAGE: Final = 5
"""Dead letters are read five at once: each may have 1 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatcherOverview:
    """One dispatcher.

    Attributes:
        reference: The reference that leads to it.
        names: Its names, with the listeners of each.
        others: The listeners that are registered for patterns, and for names that are no texts.
        is_traced: True if a :class:`~silbo.Trace` observes it; of several, the first is shown.
        dispatches: The last dispatches that the trace remembers, the newest first.
        unheard: The number of dispatches by each name that no listener is meant for, without the known names whose events leave.
    """

    reference: str
    names: Sequence[NameInfo]
    others: Sequence[ListenerInfo]
    is_traced: bool
    dispatches: Sequence[Traced]
    unheard: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerOverview:
    """One consumer of the host's own process.

    Attributes:
        app: Its app.
        group: Its group; empty if it has none.
        health: Its state.
        stats: Its counts.
    """

    app: str
    group: str
    health: Health
    stats: ConsumerStats


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadMessage:
    """A dead letter, or a dead row of an outbox.

    Attributes:
        id: The id of the letter or row, for ``silbo dead`` or ``silbo outbox``.
        group: The group that gave up; empty for a row.
        name: The event's name; empty if the message can't be read.
        event_id: The event's id, for ``silbo why``; empty if the message can't be read.
        error: The error of the last attempt.
        attempts: The number of attempts.
        died_at: The time when it was given up.
        payload: The payload as JSON, or the bytes of a message that can't be read; None if payloads are not to be shown.
    """

    id: str
    group: str
    name: str
    event_id: str
    error: str
    attempts: int
    died_at: datetime
    payload: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOverview:
    """One stream in Redis.

    Attributes:
        key: Its key.
        length: The number of its entries.
        first_at: The time of the oldest entry; None without one.
        last_at: The time of the newest entry.
        groups: Its groups.
        dead: The number of dead letters of all groups.
        letters: The newest of them.
    """

    key: str
    length: int
    first_at: datetime | None
    last_at: datetime | None
    groups: Sequence[GroupStatus]
    dead: int
    letters: Sequence[DeadMessage]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxOverview:
    """An outbox.

    Attributes:
        status: Its counts, ages and leads.
        read_at: The time of the store's clock, which its times are by.
        rows: The oldest dead rows.
    """

    status: OutboxStatus
    read_at: datetime
    rows: Sequence[DeadMessage]


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """A host at one moment.

    Attributes:
        title: The host's title.
        at: The time by the clock of the process that has read this.
        process: That process.
        dispatchers: The dispatchers.
        plugins: The plugins that are loaded.
        consumers: The consumers of the host's own process.
        parts: The health of its bridges, outboxes and relays.
        streams: The streams; None if no client of Redis was given, or Redis could not be read.
        outbox: The outbox; None if there is no store, or the store could not be read.
        problems: The reasons why Redis or the store could not be read.
    """

    title: str
    at: datetime
    process: Process
    dispatchers: Sequence[DispatcherOverview]
    plugins: Sequence[PluginInfo]
    consumers: Sequence[ConsumerOverview]
    parts: Sequence[Health]
    streams: Sequence[StreamOverview] | None
    outbox: OutboxOverview | None
    problems: Sequence[str]


async def read_overview(
    app: App,
    *,
    client: Client | None = None,
    prefix: str = "silbo",
    store: OutboxStore | None = None,
    payloads: bool = False,
    format: Format = JSON,  # noqa: A002  # the word of every broker
    silent_after: float = SILENT_AFTER,
    timeout: float = 5.0,  # of each step
) -> Overview:
    """Return the overview of a host. Nothing is written. If Redis or the store can't be read, the overview says why.

    Args:
        app: The host's dispatchers, consumers, plugins, outboxes and relays.
        client: The program's client; None leaves the streams out.
        prefix: The broker's prefix.
        store: The outbox's store, open; by default that of the app's first open outbox. Without any, the outbox is left out.
        payloads: If true, payloads are shown; errors always are.
        format: The format of the broker that sent the messages, to read their names.
        silent_after: Seconds without a sign after which a consumer counts as silent: the groups' ``claim_after``.
        timeout: Seconds in which each step is answered.
    """
    problems: list[str] = []
    streams: Sequence[StreamOverview] | None = None
    outbox: OutboxOverview | None = None
    if client is not None:
        try:
            async with opened(client, timeout) as connection:
                away: dict[str, str] = {}

                def on_away(node: AwayNode) -> None:
                    away.setdefault(node.node, str(node))

                async def read(key: bytes) -> StreamOverview:
                    return await _read_stream(connection, key.decode(), silent_after, format, payloads)

                keys = await choose_streams(connection, prefix, None, on_away)
                streams = await read_each(connection, keys, read, on_away)
                problems += away.values()
        except SilboError as error:
            problems.append(str(error))
    if store is None:
        store = next((found.open_store for found in app.outboxes if found.open_store is not None), None)
    if store is not None:
        try:
            outbox = await _read_outbox(store, payloads)
        except (SilboError, RuntimeError) as error:  # RuntimeError: it is not open
            problems.append(str(error))
    process = find_process(name_process("0"))
    assert process is not None, "a name that was made here"
    return Overview(
        title=app.reference,
        at=datetime.now(UTC),
        process=process,
        dispatchers=[await _look_at(app, *each, payloads) for each in app.dispatchers.items()],
        plugins=list_plugins(app) if app.plugins else (),
        consumers=[_look_at_consumer(consumer) for consumer in app.consumers],
        parts=[part.health() for part in _list_parts(app)],
        streams=streams,
        outbox=outbox,
        problems=problems,
    )


async def _look_at(app: App, reference: str, dispatcher: AsyncEventDispatcher, payloads: bool) -> DispatcherOverview:
    consumers = tuple(consumer for consumer in app.consumers if consumer.dispatcher is dispatcher)
    names: list[NameInfo] = []
    for name in find_names(replace(app, dispatchers={reference: dispatcher}, consumers=consumers)):
        names.append(name)
        if len(names) % AT_ONCE == 0:
            await asyncio.sleep(0)
    known = {name.name for name in names}
    leaving = {name.name for name in names if not name.is_heard and not name.reaches_nobody}
    trace = next((observer for observer in find_observers(dispatcher) if isinstance(observer, Trace)), None)
    unheard = {} if trace is None else {_show(name): count for name, count in trace.unheard.items()}
    dispatches = () if trace is None else islice(reversed(trace.dispatches), DISPATCHES)
    return DispatcherOverview(
        reference=reference,
        names=names,
        others=[listener for listener in list_listeners(dispatcher) if listener.name not in known],
        is_traced=trace is not None,
        dispatches=[each if payloads else replace(each, event="") for each in dispatches],
        unheard={name: count for name, count in unheard.items() if name not in leaving},
    )


def _show(name: Any) -> str:
    return str(name) if isinstance(name, str) else shorten(name)


def _list_parts(app: App) -> Iterable[HasHealth]:
    """Return the bridges, outboxes and relays of a host, each once."""
    bridges = (bridge for dispatcher in app.dispatchers.values() for bridge in find_bridges(dispatcher))
    return (*{id(bridge): bridge for bridge in bridges}.values(), *app.outboxes, *app.relays)


def _look_at_consumer(consumer: Consumer) -> ConsumerOverview:
    subscription = consumer.subscription
    return ConsumerOverview(
        app=str(subscription.app),
        group=subscription.name or "",
        health=consumer.health(),
        stats=replace(consumer.stats),
    )


# -- Redis --------------------------------------------------------------------------------------------------


async def _read_stream(
    connection: CallConnection,
    key: str,
    silent_after: float,
    format: Format,  # noqa: A002  # the word of every broker
    payloads: bool,
) -> StreamOverview:
    dead_key = f"{key}:dead".encode()
    reply, dead = await ask(connection, Command(b"XINFO", b"STREAM", key.encode()), Command(b"XLEN", dead_key))
    info = to_mapping(reply)
    first, last = info["first-entry"], info["last-entry"]
    letters = await _read_letters(connection, dead_key, format)
    return StreamOverview(
        key=key,
        length=info["length"],
        first_at=time_of_entry(first[0].decode()) if first else None,
        last_at=time_of_entry(last[0].decode()) if last else None,
        groups=await read_stream_groups(connection, key.encode(), silent_after),
        dead=dead,
        letters=[_from_letter(letter, payloads) for letter in letters],
    )


async def _read_letters(
    connection: CallConnection,
    key: bytes,
    format: Format,  # noqa: A002  # the word of every broker
) -> list[DeadLetter]:
    """Return the newest dead letters."""
    letters: list[DeadLetter] = []
    end = b"+"
    while len(letters) < DEAD:
        (rows,) = await ask(connection, Command(b"XREVRANGE", key, end, b"-", b"COUNT", b"%d" % PAGE))
        letters += [parse_letter(row, format) for row in rows]
        if len(rows) < PAGE:
            break
        end = b"(" + rows[-1][0]
    return letters


def _from_letter(letter: DeadLetter, payloads: bool) -> DeadMessage:
    payload: str | None
    try:
        message = letter.message()
        name, event_id, payload = message.message_name, message.message_id, _show_payload(message)
    except MessageInvalid:
        name, event_id, payload = "", "", letter.raw.decode(errors="backslashreplace")
    return DeadMessage(
        id=letter.id,
        group=letter.group,
        name=name,
        event_id=event_id,
        error=letter.error,
        attempts=letter.attempts,
        died_at=letter.time,
        payload=payload if payloads else None,
    )


# -- an outbox ----------------------------------------------------------------------------------------------


async def _read_outbox(store: OutboxStore, payloads: bool) -> OutboxOverview:
    status = await store.status()
    rows = await store.rows("dead", limit=DEAD) if status.counts["dead"] else ()
    return OutboxOverview(
        status=status, read_at=await store.read_clock(), rows=[_from_row(row, payloads) for row in rows]
    )


def _from_row(row: Row, payloads: bool) -> DeadMessage:
    return DeadMessage(
        id=str(row.id),
        group="",
        name=row.message.message_name,
        event_id=row.message.message_id,
        error=row.error or "",
        attempts=row.attempts,
        died_at=row.state_at,
        payload=_show_payload(row.message) if payloads else None,
    )


def _show_payload(message: Message) -> str:
    return json.dumps(dict(message.payload), default=str, ensure_ascii=False)
