"""The bridge: a listener that turns events into messages, and the routes that name the events and their addresses."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import partial
from typing import Any, Final, Literal, TypeAlias
from uuid import UUID

from silbo._causes import cause
from silbo._checks import check_address, describe_object
from silbo._closing import AsyncCloseable
from silbo._loops import LoopBinding
from silbo._message_observers import observe_publish
from silbo._reports import Availability, ErrorHook, ErrorReporter
from silbo._whistle import IAsyncEventDispatcher
from silbo.dispatch.event_cause import EventCause
from silbo.dispatch.listeners import LAST
from silbo.dispatch.options import Listener
from silbo.dispatch.running import ConfiguredListener
from silbo.dispatch.subscribers import on
from silbo.errors import (
    BrokerRefused,
    BrokerUnavailable,
    DeliveryUnknown,
    LoopConflict,
    MessageRefused,
    PublishError,
    RouteConflict,
    StoreUnavailable,
)
from silbo.event import collected_errors, kind_of
from silbo.health import Health, find_latest
from silbo.message import Message, Origin, check_header
from silbo.names import EventName, Key, check_key, compile_pattern, is_too_long, version_of
from silbo.protocols import JoiningPublisher, Publisher
from silbo.shards import check_shards, place
from silbo.wire.encode import to_message
from silbo.work.unit_of_work import deferred_sends

__all__ = ["Bridge", "Route", "find_bridges", "routing_key"]

logger = logging.getLogger(__name__)

CACHED_NAMES: Final = 1024
"""The most names whose route is cached. Names can be dynamic, so a full cache is emptied."""
UNSENT_LIMIT: Final = 10_000
"""The most messages under way with ``wait=False``."""

Publish: TypeAlias = Callable[[Message], Awaitable[None]]
"""A function that publishes a message."""


# -- routes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Route:
    """The way in which the events of a name, or of every name that a pattern matches, leave the process.

    Attributes:
        pattern: A name, or a pattern: ``*`` is one segment, ``**`` any number.
        kind: The kind as which plain events, and events of a host's own classes, leave; None lets them stay. Events that
            have a kind keep it, and a domain event never leaves.
        to: The address, as ``orders``; None for the broker's default.
        shards: The number of shards that ``to`` is spread over in Redis Streams, so that several processes of a group keep the order
            of its keys: see the manual, "Order per key over many processes". 0 for one stream. Other brokers have partitions of
            their own, or none, and look only at ``to``.
        key: The routing key: the name of an attribute, or a function of the event. None for the key of the event name.
        headers: Headers of the messages; a listener reads them as ``event.origin.headers``. For one that differs from event to
            event: :func:`~silbo.set_header`.

    Raises:
        AddressInvalid: ``to`` is not an address.
        HeaderInvalid: a header has a name that silbo sets, or is no text.
        KeyUnknown: the pattern is an EventName whose class has no attribute ``key``.
        NameInvalid: the pattern has a ``*`` that is not a whole segment.
        TypeError: the pattern is not a text.
        ValueError: there is no such kind; or ``shards`` is too large, or given without ``to``.
    """

    pattern: str | EventName[Any]
    _: KW_ONLY
    kind: Literal["notification", "ecst"] | None = None
    to: str | None = None
    shards: int = 0
    key: Key | None = None
    headers: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise TypeError(f"a route's pattern is a text, as 'order.**', not {self.pattern!r}")
        compile_pattern(str(self.pattern))
        if self.kind not in ("notification", "ecst", None):
            raise ValueError(f'kind is "notification", "ecst" or None, not {self.kind!r}')
        if self.to is not None:
            check_address(self.to)
        if self.shards != 0:
            check_shards(self.shards)
            if self.to is None:
                raise ValueError(
                    f"shards={self.shards} needs the address that is spread over them, as to='orders'; for the default "
                    f"address write RedisStreams(..., shards={self.shards})"
                )
        if not isinstance(self.headers, Mapping):
            raise TypeError(f"headers is a mapping of texts, as {{'tenant': 'acme'}}, not {self.headers!r}")
        for name, value in self.headers.items():
            check_header(name, value)
        if isinstance(self.pattern, EventName):
            check_key(self.pattern, self.pattern.cls, self.key)


class Routes:
    """The routes of a bridge in order: the first that matches a name wins.

    Raises:
        RouteConflict: two routes have the same pattern, so the second would never be used.
        TypeError: ``routes`` is not an iterable of routes.
    """

    def __init__(self, routes: Iterable[Route]) -> None:
        known: dict[str, Route] = {}
        if isinstance(routes, Route | str):
            raise TypeError(f"routes is a list of Route objects: [{routes!r}]")
        for route in routes:
            if not isinstance(route, Route):
                raise TypeError(f"routes takes Route objects, as Route({route!r}), not {route!r}")
            pattern = str(route.pattern)
            if pattern in known:
                raise RouteConflict(pattern, repr(known[pattern]), repr(route))
            known[pattern] = route
        self._routes = [(compile_pattern(pattern), route) for pattern, route in known.items()]
        self._cache: dict[str, Route | None] = {}

    def check_headers(self, check: Callable[[str, str], None]) -> None:
        """Call a function with each header of each route."""
        for _, route in self._routes:
            for name, value in route.headers.items():
                check(name, value)

    def match(self, name: str) -> Route | None:
        """Return the first route that matches an event name, or None."""
        if not self._routes:
            return None
        try:
            return self._cache[name]
        except KeyError:
            found = next((route for pattern, route in self._routes if pattern.fullmatch(str.__str__(name) + ".")), None)
            if is_too_long(name):  # from a dispatcher of Whistle's own; the format refuses its message
                return found
            if len(self._cache) >= CACHED_NAMES:
                self._cache.clear()
            self._cache[str(name)] = found
            return found


def routing_key(event: object, name: str, key: Key | None) -> str | None:
    """Return the routing key of an event as text; None if there is no key, or its value is None.

    Raises:
        MessageRefused: the event lacks the attribute, the function raised an error, or the key is no value with a text.
    """
    if key is None:
        return None
    try:
        value = key(event) if callable(key) else getattr(event, key)
        if value is None or type(value) is str:
            return value
        if type(value) is int or _has_text(value):
            return str(value)
    except Exception as error:  # the key may be any function of the host's
        problem = (
            f"its key function {key!r} raised {error!r}" if callable(key) else f"no attribute for its key: {error}"
        )
        raise MessageRefused(name, problem, field=None if callable(key) else key) from error
    if inspect.iscoroutine(value):
        value.close()  # or Python would warn that nobody awaits it
    raise MessageRefused(
        name,
        f"its key is a {type(value).__qualname__}, which is no value with a text of its own; give a string or a number",
        field=None if callable(key) else key,
    )


_VALUES: Final = (str, int, float, bytes, Decimal, UUID, date, time, timedelta, Enum)


def _has_text(value: object) -> bool:
    """Return True if the text of a key is the same in every process: no ``repr`` with an address, no unordered set."""
    if isinstance(value, _VALUES):
        return True
    if isinstance(value, tuple | list):
        return all(map(_has_text, value))
    if isinstance(value, type) or callable(value) or inspect.isawaitable(value):
        return False
    cls = type(value)
    return cls.__str__ is not object.__str__ or inspect.isfunction(cls.__repr__)


# -- the bridge ---------------------------------------------------------------------------------------------


class Bridge(AsyncCloseable):
    """A subscriber that sends events to a publisher, after every other listener has run.

    Notification and ECST events leave, and plain events that a route gives a kind; domain events never leave. An event stays
    if a listener stopped it, if its dispatch failed (under ``on_error="raise"`` or ``"collect"``; an isolated failure does
    not hold it back), or if a consumer dispatched it: an event that came from outside is not sent out again.

    In a command of a :class:`~silbo.mediator.mediator.Mediator`, messages wait until the command has succeeded; a command that
    fails sends nothing. Only an outbox that stores in the host's transaction gets them at once, to be committed with it.

    Args:
        publisher: A broker, or an outbox in front of one. The host closes it, after the bridge.
        routes: The plain events that leave, other addresses, routing keys; the first route that matches a name wins.
        wait: True lets a dispatch wait until the publisher has the message, and raises an error to its caller. False
            lets the dispatch go on: up to 10,000 messages are under way, in order. A message that can't be sent, or
            exceeds that number, goes to ``on_error``. Leave such a bridge through ``async with`` or :meth:`aclose`, or the
            last messages are lost::

                async with RedisStreams(client, app="web") as streams, Bridge(streams, wait=False) as bridge:
                    dispatcher.add_subscriber(bridge)
                    ...  # at the end the bridge has sent everything, then the streams are closed
        on_error: ``(error, message)``, sync or async: gets the errors in place of the caller or, with ``wait=False``, of
            the log. The message is None if the event could not be made a message.

    A dispatcher of Whistle's own knows no patterns: add :meth:`forward` under each name there, with a higher priority number
    than the other listeners.

    Raises:
        HeaderInvalid: a route has a header that the publisher's format can't carry.
        RouteConflict: two routes have the same pattern.
        TypeError: ``publisher`` is not a publisher.
    """

    def __init__(
        self,
        publisher: Publisher,
        *,
        routes: Iterable[Route] = (),
        wait: bool = True,
        on_error: ErrorHook | None = None,
    ) -> None:
        if not isinstance(publisher, Publisher):
            raise TypeError(
                "a bridge sends to a broker, as RedisStreams(client, app=...) or MemoryBroker(), not to "
                f"{describe_object(publisher)}"
            )
        self.publisher: Final = publisher
        self._joining = publisher if isinstance(publisher, JoiningPublisher) else None
        self._routes = Routes(routes)
        broker = getattr(publisher, "publisher", publisher)  # an outbox has its broker's
        self._has_shards = bool(getattr(broker, "has_shards", False))
        form = getattr(broker, "format", None)
        if (check := getattr(form, "check_header", None)) is not None:
            self._routes.check_headers(check)
        self._wait = wait
        self._send_and_note = self._publish if wait else self._publish_later
        # Without a hook a bridge that waits adds nothing to the publisher's call, unless the last one has failed.
        self._send_quickly = publisher.publish if wait and on_error is None else self._send_and_note
        self._send = self._send_quickly
        self._hook = on_error
        self._report = ErrorReporter(on_error, logger)
        self._outage = Availability()  # of the publisher
        self._under_way: set[asyncio.Task[Any]] = set()
        self._closing: set[asyncio.Task[Any]] = set()  # those under way whose error hook waits in aclose()
        self._binding = LoopBinding("Bridge", is_busy=lambda: bool(self._under_way), forget=self._under_way.clear)

    @property
    def under_way(self) -> int:
        """The number of messages under way with ``wait=False``."""
        return len(self._under_way)

    def health(self) -> Health:
        """Return its state now, from memory: it is connected if the publisher has taken the last message."""
        return Health(
            part="bridge",
            name=self.publisher.app,
            is_connected=not self._outage.is_on,
            away_since=self._outage.since,
            has_room=self.under_way < UNSENT_LIMIT,
            in_hand=self.under_way,
            last_error=find_latest(self._outage.last_error, self._report.last_error),
        )

    async def refresh_health(self) -> None:
        """Do nothing: :meth:`health` knows everything."""

    @on("**", priority=LAST)
    async def forward(self, event: Any) -> None:
        """Send an event if it leaves.

        Raises:
            MessageRefused: the event can't be made a message: its key or payload can't be written.
            LoopConflict: another event loop uses the publisher or, with ``wait=False``, this bridge.
            PublishError: with ``wait``, whatever the publisher raised.
        """
        try:
            message = self._message(event)  # a snapshot: no other task has run since the last listener
        except Exception as error:
            if self._hook is None:
                raise
            await self._report.call_hook(error, None)
            return
        if message is None:
            return
        send = self._send
        later = self._send_and_note
        observers: Sequence[Any] = getattr(event.dispatcher, "_observers", ())
        if observers:
            publish = partial(observe_publish, observers, event.name, self.publisher)
            send = later = partial(self._send_and_note, publish=publish)
        deferred = None if self._joining is not None and self._joining.in_transaction else deferred_sends()
        if deferred is None:
            try:
                await send(message)
            except Exception as error:
                self._note_answer(error)
                raise
        else:
            deferred.append(partial(self._send_deferred, later, message, event, self._registered(event)))

    async def aclose(self) -> None:
        """Wait until all messages under way are sent. May be called twice; the publisher stays open.

        Raises:
            LoopConflict: with ``wait=False``, messages are under way in another event loop.
        """
        if self._under_way:
            self._binding.enter("aclose")
        caller = asyncio.current_task()
        if caller not in self._under_way:
            while self._under_way:
                await asyncio.wait(self._under_way)
            return
        self._closing.add(caller)  # an error hook: it does not wait for others that wait here, for they wait for it
        try:
            while others := self._under_way - self._closing:
                await asyncio.wait(others, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._closing.discard(caller)

    def _message(self, event: Any) -> Message | None:
        """Return the message of an event; None if the event stays.

        Raises:
            MessageRefused: the event leaves but can't be made a message.
        """
        cls = type(event)
        kind = kind_of(cls)
        if kind == "domain":
            return None
        origin = getattr(event, "origin", None)
        if origin is not None and isinstance(origin, Origin):
            return None
        if collected_errors(event):
            return None
        name = event.name
        if not isinstance(name, str):
            raise MessageRefused(name, "only an event whose name is a string can leave the process")
        route = self._routes.match(name)
        to, key = (route.to, route.key) if route else (None, None)
        if kind is None and (route is None or (kind := route.kind) is None):
            return None
        if isinstance(name, EventName):
            key, version = name.key if key is None else key, name.version
        else:
            version = version_of(cls, name)
        if key is not None:
            key = routing_key(event, name, key)
        message = to_message(event, name=name, kind=kind, key=key, to=to, version=version)
        caused_by = cause.get()
        if isinstance(caused_by, EventCause) and caused_by.event is event:  # its own listeners run, this one the last
            caused_by = caused_by.outer
        own = getattr(event, "__silbo_headers__", None)
        if caused_by is not None or route is not None or own is not None:
            headers = {**message.headers, **({} if caused_by is None else caused_by.follow())}
            if route is not None:
                headers.update(route.headers)
            if type(own) is dict:  # a foreign class may have a __getattr__ that has an answer to all
                headers.update(own)
            message = replace(message, headers=headers)
            if route is not None and route.to is not None and route.shards and self._has_shards:
                message = place(message, route.to, route.shards)
        return message

    def __silbo_sends__(self, cls: type, name: object) -> bool:
        """Return True if events of this class and name leave, unless a listener stops them."""
        kind = kind_of(cls)
        route = self._routes.match(name) if isinstance(name, str) else None
        return kind != "domain" and (kind is not None or (route is not None and route.kind is not None))

    def _registered(self, event: Any) -> Listener | None:
        """Return the listener of the dispatch that runs :meth:`forward`: a wrapper with options, or the method itself."""
        dispatcher: Any = getattr(event, "dispatcher", None)
        listeners = dispatcher.get_listeners(event.name) if dispatcher is not None else ()
        return next((listener for listener in listeners if listener == self.forward), None)

    async def _send_deferred(self, send: Publish, message: Message, event: Any, registered: Listener | None) -> None:
        """Send a message that a command has held back, under the options with which :meth:`forward` is registered."""

        async def listener(_: Any) -> None:
            await send(message)

        if isinstance(registered, ConfiguredListener):
            await registered(event, listener=listener)
        else:
            await send(message)

    async def _publish(self, message: Message, publish: Publish | None = None) -> None:
        try:
            await (publish or self.publisher.publish)(message)
            if self._outage.is_on:
                self._note_answer()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._wait or (task is not None and task.cancelling()):
                raise
            error = DeliveryUnknown("its publisher was cancelled, but not by the bridge")
            await self._report("message not sent", error, message, event_name=message.message_name)
        except Exception as error:
            self._note_answer(error)
            if self._wait and self._hook is None:
                raise
            await self._report("message not sent", error, message, event_name=message.message_name)

    def _note_answer(self, error: Exception | None = None) -> None:
        """Note that the publisher has taken a message, or its error: one that says that it can't be reached is an outage."""
        if isinstance(error, BrokerUnavailable | DeliveryUnknown | StoreUnavailable) and not isinstance(
            error, BrokerRefused
        ):
            self._outage.failed("publish", error)
            self._send = self._send_and_note
        elif error is None or isinstance(error, PublishError):
            self._outage.answered("publish")
            self._send = self._send_quickly

    async def _publish_later(self, message: Message, publish: Publish | None = None) -> None:
        try:
            loop = self._binding.enter("forward")
        except LoopConflict as error:
            if self._hook is None:  # a mistake in the program, like an event that can't be made a message
                raise
            await self._report("message not sent", error, message, event_name=message.message_name)
            return
        if len(self._under_way) >= UNSENT_LIMIT:
            full = BrokerUnavailable(f"{UNSENT_LIMIT} messages are under way to the broker; this one was not sent")
            await self._report("message not sent", full, message, event_name=message.message_name)
            return
        # One task for each message: publishers keep the order of their calls, and the error belongs to one message.
        task = loop.create_task(self._publish(message, publish))
        self._under_way.add(task)
        task.add_done_callback(self._end_task)

    def _end_task(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        if task.cancelled():
            self._report.log.write("message not sent: the program ended before the bridge was closed")


def find_bridges(dispatcher: IAsyncEventDispatcher) -> Iterator[Bridge]:
    """Yield the bridges among a dispatcher's listeners."""
    for listeners in dispatcher.get_listeners().values():
        for listener in listeners:
            owner = getattr(inspect.unwrap(listener), "__self__", None)
            if isinstance(owner, Bridge):
                yield owner
