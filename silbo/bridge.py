"""The listener that turns events into messages, and the routes that say which events leave, and to where."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, Final, Literal

from silbo._checks import check_address, describe_object
from silbo._closing import AsyncCloseable
from silbo._reports import ErrorHook, ErrorReporter
from silbo._whistle import IAsyncEventDispatcher
from silbo.dispatch.listeners import LAST
from silbo.dispatch.options import Listener
from silbo.dispatch.running import Guard
from silbo.dispatch.subscribers import on
from silbo.errors import BrokerUnavailable, MessageRefused, RouteConflict
from silbo.event import collected_errors, kind_of
from silbo.message import Message, Origin
from silbo.names import EventName, Key, compile_pattern
from silbo.protocols import JoiningPublisher, Publisher
from silbo.wire.encode import to_message
from silbo.work.unit_of_work import held_back

__all__ = ["Bridge", "Route", "find_bridges", "read_routing_key"]

logger = logging.getLogger(__name__)

CACHED_NAMES: Final = 1024
"""Names whose route is kept ready. Names can be dynamic, so the cache is emptied when it is full."""


@dataclass(frozen=True, slots=True)
class Route:
    """What the bridge does with the events of a name, or of every name that a pattern matches.

    Attributes:
        pattern: A name, or a pattern: ``*`` is one segment, ``**`` any number.
        kind: Lets plain events, and those of a host's own classes, leave as this kind. Events that have a kind keep
            theirs, and a domain event never leaves.
        to: The address in place of the broker's default, as ``orders``.
        key: The routing key in place of the event name's own: an attribute's name, or a function of the event.

    Raises:
        AddressInvalid: ``to`` is no address.
        NameInvalid: the pattern has a ``*`` that is not a whole segment.
        ValueError: there is no such kind.
    """

    pattern: str | EventName[Any]
    _: KW_ONLY
    kind: Literal["notification", "ecst"] | None = None
    to: str | None = None
    key: Key | None = None

    def __post_init__(self) -> None:
        compile_pattern(str(self.pattern))
        if self.kind not in ("notification", "ecst", None):
            raise ValueError(f'kind is "notification", "ecst" or None, not {self.kind!r}')
        if self.to is not None:
            check_address(self.to)


class Routes:
    """Routes in order: the first that matches a name wins.

    Raises:
        RouteConflict: two have the same pattern, so that the second would never be used.
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

    def match(self, name: str) -> Route | None:
        """The route of an event name; None where none matches."""
        if not self._routes:
            return None
        try:
            return self._cache[name]
        except KeyError:
            found = next((route for pattern, route in self._routes if pattern.fullmatch(f"{name}.")), None)
            if len(self._cache) >= CACHED_NAMES:
                self._cache.clear()
            self._cache[str(name)] = found
            return found


def read_routing_key(event: object, name: str, key: Key | None) -> str | None:
    """The key of an event as text; None where there is no key, or its value is None.

    Raises:
        MessageRefused: the attribute is missing or the function raised.
    """
    if key is None:
        return None
    try:
        value = key(event) if callable(key) else getattr(event, key)
        return None if value is None else str(value)
    except Exception as error:  # the key may be any function of the host's
        what = f"its key function {key!r} raised {error!r}" if callable(key) else f"no attribute for its key: {error}"
        raise MessageRefused(name, what, field=None if callable(key) else key) from error


UNSENT_LIMIT: Final = 10_000
"""Messages under way at most with ``wait=False``."""


class Bridge(AsyncCloseable):
    """A subscriber that sends events on to a publisher, after every other listener.

    Notification and ECST events leave, and what a route gives a kind; domain events never do. An event stays when a
    listener stopped it, when its dispatch failed (under ``on_error="raise"`` or ``"collect"``; an isolated failure does
    not hold it back), and when a consumer dispatched it: what came from outside is not sent out again.

    In a command of a :class:`~silbo.mediator.mediator.Mediator`, messages wait until the command has succeeded; one that fails sends
    nothing. Only an outbox that stores in the host's transaction has them at once, for they are to be committed with it.

    Args:
        publisher: A broker, or an outbox in front of one. Whoever opened it closes it, after the bridge.
        routes: Which plain events leave, other addresses, routing keys; the first that matches a name wins.
        wait: Whether a dispatch waits until the publisher has the message, so that an error goes to its caller. With
            False it doesn't: up to 10,000 messages are under way, in order; what can't be sent, or comes on
            top of them, goes to ``on_error``. Then leave the bridge through ``async with`` or :meth:`aclose`, or the
            last messages are lost::

                async with RedisStreams(client, app="web") as streams, Bridge(streams, wait=False) as bridge:
                    dispatcher.add_subscriber(bridge)
                    ...  # at the end the bridge has sent everything, then the streams are closed
        on_error: ``(error, message)``, sync or async: gets the errors in place of the caller or, with ``wait=False``,
            of the log. The message is None where none could be made of the event.

    On a dispatcher of Whistle's own, which knows no patterns, add :meth:`forward` under each name, with a priority that
    is higher than the others'.

    Raises:
        RouteConflict: two routes have the same pattern.
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
                f"a bridge sends to a broker, as RedisStreams(client, app=...) or MemoryBroker(), not to {describe_object(publisher)}"
            )
        self.publisher: Final = publisher
        self._joins = publisher if isinstance(publisher, JoiningPublisher) else None
        self._routes, self._wait = Routes(routes), wait
        self._hook, self._report = on_error, ErrorReporter(on_error, logger)
        self._sending: set[asyncio.Task[None]] = set()

    @on("**", priority=LAST)
    async def forward(self, event: Any) -> None:
        """Send an event, if it is one that leaves.

        Raises:
            MessageRefused: it can't be made a message: a key or payload that can't be written.
            PublishError: with ``wait``, whatever the publisher raised.
        """
        try:
            message = self._message(event)  # a snapshot, before anybody else gets a turn
        except Exception as error:  # noqa: BLE001  # raised there, where there is no hook
            await self._failed(error, None)
            return
        if message is None:
            return
        held = None if self._joins is not None and self._joins.in_transaction else held_back()
        if held is None:
            await self._send(message)
        else:
            held.append(partial(self._send_held, message, event, self._registered(event)))

    async def aclose(self) -> None:
        """Wait until everything is sent that was not waited for. Twice is fine; the publisher stays open."""
        while others := self._sending - {asyncio.current_task()}:  # an error hook may close, too
            await asyncio.wait(others)

    def _message(self, event: Any) -> Message | None:
        """What to send of an event; None when it stays.

        Raises:
            MessageRefused: it should leave but can't.
        """
        kind = kind_of(type(event))
        if kind == "domain" or isinstance(getattr(event, "origin", None), Origin):
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
        version = 1
        if isinstance(name, EventName):
            key, version = key or name.key, name.version
        if key is not None:
            key = read_routing_key(event, name, key)
        return to_message(event, name=name, kind=kind, key=key, to=to, version=version)

    def __silbo_sends__(self, event: object, name: object) -> bool:
        """Whether events of this class and name leave, where nothing stops them."""
        kind = kind_of(type(event))
        route = self._routes.match(name) if isinstance(name, str) else None
        return kind != "domain" and (kind is not None or (route is not None and route.kind is not None))

    def _registered(self, event: Any) -> Listener | None:
        """What stands for :meth:`forward` among the listeners of the dispatch: with options, or itself."""
        dispatcher: Any = getattr(event, "dispatcher", None)
        listeners = dispatcher.get_listeners(event.name) if dispatcher is not None else ()
        return next((one for one in listeners if one == self.forward), None)

    async def _send_held(self, message: Message, event: Any, registered: Listener | None) -> None:
        """Send what a command has held back, as :meth:`forward` would have; errors go where its options say."""

        async def send(_: Any) -> None:
            await self._send(message)

        if isinstance(registered, Guard):
            await registered(event, listener=send)
        else:
            await self._send(message)

    async def _send(self, message: Message) -> None:
        if not self._wait:
            await self._send_later(message)
            return
        try:
            await self.publisher.publish(message)
        except Exception as error:  # noqa: BLE001  # raised there, where there is no hook
            await self._failed(error, message)

    async def _failed(self, error: Exception, message: Message | None) -> None:
        if self._hook is None:
            raise error
        await self._report("event not sent", error, message)

    async def _send_later(self, message: Message) -> None:
        if len(self._sending) >= UNSENT_LIMIT:
            error = BrokerUnavailable(f"{UNSENT_LIMIT} messages are under way to the broker; this one was not sent")
            await self._report("message not sent", error, message, event_name=message.message_name)
            return
        # One task each: publishers keep the order of their calls, and tell apart which message failed.
        task = asyncio.get_running_loop().create_task(self._send_unwaited(message))
        self._sending.add(task)
        task.add_done_callback(self._sent)

    async def _send_unwaited(self, message: Message) -> None:
        try:
            await self.publisher.publish(message)
        except Exception as error:  # noqa: BLE001  # whatever it is, there is no caller to raise it to
            await self._report("message not sent", error, message, event_name=message.message_name)

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._sending.discard(task)
        if task.cancelled():
            self._report.log.write("message not sent: the program ended before the bridge was closed")


def find_bridges(dispatcher: IAsyncEventDispatcher) -> Iterator[Bridge]:
    """The bridges among a dispatcher's listeners."""
    for listeners in dispatcher.get_listeners().values():
        for listener in listeners:
            owner = getattr(inspect.unwrap(listener), "__self__", None)
            if isinstance(owner, Bridge):
                yield owner
