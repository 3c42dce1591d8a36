"""Every exception that silbo raises: one root, each also the builtin that a caller would guess.

A publish raises one of three: :class:`MessageRefused` (this message, for good), :class:`BrokerUnavailable` (not sent; safe
to repeat) and :class:`DeliveryUnknown` (it may have arrived). An outbox raises :class:`OutboxFull` or
:class:`StoreUnavailable` in place of :class:`BrokerUnavailable`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

__all__ = [
    "AddressInvalid",
    "AlreadyBound",
    "AppFailed",
    "AppInvalid",
    "BrokerRefused",
    "BrokerUnavailable",
    "CircularWait",
    "ClassUnreadable",
    "ClusterClientNeeded",
    "ContainerMissing",
    "DeadLetterAmbiguous",
    "DeliveryGivenUp",
    "DeliveryUnknown",
    "DispatcherClosed",
    "DispatcherConflict",
    "EnvelopeConflict",
    "EventMismatch",
    "EventMissing",
    "Fenced",
    "FollowUpsExceeded",
    "Gap",
    "GroupInUse",
    "GroupMissing",
    "HandlerShared",
    "HeaderInvalid",
    "KeyUnknown",
    "LeadLost",
    "ListenerTimeout",
    "LoopBlocked",
    "LoopConflict",
    "MessageInvalid",
    "MessageRefused",
    "MissingExtra",
    "NameInvalid",
    "NameUnknown",
    "NameUnknownWarning",
    "NotAnEvent",
    "NotSettled",
    "OutboxFull",
    "OwnMessagesUndecided",
    "PluginConflict",
    "PluginError",
    "PluginForbidden",
    "PluginInvalid",
    "PluginMissing",
    "PluginOff",
    "PluginSettingsInvalid",
    "PluginUnloaded",
    "PortalClosed",
    "PublishError",
    "RequestUnbound",
    "RetentionConflict",
    "RouteConflict",
    "ShardLost",
    "ShardsMismatch",
    "SilboError",
    "SilboWarning",
    "StartInvalid",
    "StopIncomplete",
    "StoreInvalid",
    "StoreUnavailable",
    "StreamMissing",
    "Unresolvable",
    "VersionTooNew",
]


class SilboError(Exception):
    """The root of silbo's exceptions."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args), self.__dict__


def _rebuild(cls: type[SilboError], args: tuple[object, ...]) -> SilboError:
    return cls.__new__(cls, *args)  # a copy gets its attributes from the original: some are keyword-only in __init__


class SilboWarning(UserWarning):
    """The root of silbo's warnings."""


@dataclass(eq=False)
class MissingExtra(SilboError, ImportError):
    """A module of silbo was imported, and the library that it adapts is not installed."""

    module: str
    _: KW_ONLY
    extra: str

    def __str__(self) -> str:
        return f"{self.module} needs a library that is not installed: pip install 'silbo[{self.extra}]'"


# -- events, names, dispatch --------------------------------------------------------------------------------


@dataclass(eq=False)
class NameInvalid(SilboError, ValueError):
    """A name can't be used: a dispatch under a pattern, a malformed pattern, or a name of two classes of events."""

    name: str
    problem: str

    def __str__(self) -> str:
        return f"{self.name!r}: {self.problem}"


@dataclass(eq=False)
class KeyUnknown(SilboError, ValueError):
    """The routing key of a name or route is no attribute of its event class.

    Attributes:
        name: The event name.
        cls: The event class.
        key: The text that is no attribute.
        similar: A similar attribute; None if there is none.
        fields: The declared fields of the class.
    """

    name: str
    cls: type
    key: str
    _: KW_ONLY
    similar: str | None
    fields: tuple[str, ...]

    def __str__(self) -> str:
        hint = (
            f"did you mean {self.similar!r}?" if self.similar else f"its fields are {', '.join(self.fields) or 'none'}"
        )
        return f"{self.name!r}: {self.cls.__qualname__} has no attribute {self.key!r} for the routing key; {hint}"


@dataclass(eq=False)
class NameUnknown(SilboError, LookupError):
    """A name is not declared in the dispatcher's ``names=``, or a pattern matches no declared name.

    Attributes:
        name: The name or pattern.
        similar: The most similar declared name, or pattern of declared names; None if none is similar.
        plugin: The module that uses the name.
        place: ``file:line`` of the use; empty if it is not known.
    """

    name: Hashable
    similar: str | None
    plugin: str
    place: str

    def __str__(self) -> str:
        what = "matches no declared name" if isinstance(self.name, str) and "*" in self.name else "is not declared"
        hint = "declare it in names= of the dispatcher" if self.similar is None else f"did you mean {self.similar!r}?"
        where = f"{self.plugin}, {self.place}" if self.place else self.plugin
        return f"event {str(self.name)!r} {what}: {hint} (used by {where})"


class NameUnknownWarning(SilboWarning):
    """A warning in place of :class:`NameUnknown`, with the same text, under ``unknown="warn"``."""


@dataclass(eq=False)
class EventMismatch(SilboError, TypeError):
    """An event was dispatched, or a constant was used, of another class than the declared name's.

    Attributes:
        name: The name.
        expected: The classes that are declared for the name.
        event: The class of the event.
    """

    name: str
    expected: tuple[type, ...]
    event: type

    def __str__(self) -> str:
        expected = " or ".join(cls.__qualname__ for cls in self.expected)
        return (
            f"events of {self.name!r} are {expected}, not {self.event.__qualname__}: dispatch an event of that class, or "
            "this one under its own name (a consumer: name it in events=); to listen, use the constant that is declared"
        )


@dataclass(eq=False)
class EventMissing(SilboError, TypeError):
    """A name was dispatched without an event, and its class can't be made without arguments.

    Attributes:
        name: The name.
        cls: The class of its events.
    """

    name: str
    cls: type

    def __str__(self) -> str:
        return (
            f"{self.name!r} was dispatched without an event, and {self.cls.__qualname__}() can't be made without arguments: "
            f"give the dispatch one, {self.cls.__qualname__}(...)"
        )


@dataclass(eq=False)
class NotAnEvent(SilboError, TypeError):
    """An object was dispatched that does not accept the envelope's attributes."""

    cls: type

    def __str__(self) -> str:
        return (
            f"{self.cls.__qualname__} objects accept no attributes, so a dispatch can't write name, dispatcher and "
            "propagation_stopped on them; derive the event's class from silbo.Event"
        )


@dataclass(eq=False)
class EnvelopeConflict(SilboError, TypeError):
    """An event class declares a payload field under a name that belongs to the envelope."""

    cls: type
    field: str

    def __str__(self) -> str:
        return (
            f"{self.cls.__qualname__}.{self.field} would be overwritten by the dispatch: {self.field!r} belongs to the "
            f"envelope of an event. Rename the attribute and keep {self.field!r} on the wire: dataclass or attrs "
            f"`{self.field}_: ... = field(metadata={{'wire': {self.field!r}}})`, msgspec "
            f"`{self.field}_: ... = msgspec.field(name={self.field!r})`, pydantic "
            f"`{self.field}_: ... = Field(alias={self.field!r})`"
        )


@dataclass(eq=False)
class ListenerTimeout(SilboError, TimeoutError):
    """A listener ran longer than its ``timeout=`` and was cancelled, also if it caught the cancellation and returned.

    Attributes:
        timeout: Seconds.
    """

    listener: object
    timeout: float

    def __str__(self) -> str:
        name = getattr(self.listener, "__qualname__", None) or repr(self.listener)
        return f"{name} was cancelled: it ran longer than its timeout of {self.timeout:g} s"


@dataclass(eq=False)
class NotSettled(SilboError, TimeoutError):
    """Something still runs in a test that waits for its end, as ``silbo_events.settle()`` does.

    Attributes:
        within: Seconds of real time after which it was given up.
        running: Words for each thing that runs.
    """

    within: float
    running: tuple[str, ...]

    def __str__(self) -> str:
        return f"not settled within {self.within:g} s; still running:" + "".join(f"\n  {one}" for one in self.running)


@dataclass(eq=False)
class ContainerMissing(SilboError, TypeError):
    """A class was given as a listener to a dispatcher without a container."""

    cls: type

    def __str__(self) -> str:
        return (
            f"{self.cls.__qualname__} is a class, and this dispatcher has no container to make an object of it. Give it a "
            "container, AsyncEventDispatcher(container=...) with an adapter from silbo.containers, or add an object: "
            f"{self.cls.__qualname__}(...)"
        )


@dataclass(eq=False)
class Unresolvable(SilboError, LookupError):
    """A container can't make an object of a class.

    Attributes:
        cls: The class that was asked for.
        container: The adapter.
        problem: What is missing, and what needs it.
    """

    cls: type
    container: object
    problem: str

    def __str__(self) -> str:
        return f"{type(self.container).__name__} can't make {self.cls.__qualname__}: {self.problem}"


@dataclass(eq=False)
class DispatcherConflict(SilboError, ValueError):
    """A second dispatcher was given to a container that has one.

    Attributes:
        container: The adapter.
    """

    container: object

    def __str__(self) -> str:
        return (
            f"{type(self.container).__name__}: the container has another dispatcher already, and listeners of one don't "
            "hear events of the other. Use the container's own, bootstrap(dispatcher=...), or remove it from the container"
        )


@dataclass(eq=False)
class AlreadyBound(SilboError, ValueError):
    """A second handler was bound to a request, or the same handler twice to an event.

    Attributes:
        name: The name of the event, or of the class of requests.
        taken: The handler that is bound.
        wanted: The handler that was to be bound too.
    """

    name: str
    taken: type
    wanted: type

    def __str__(self) -> str:
        if self.taken is self.wanted:
            return f"{self.name} is bound to {self.taken.__qualname__} already; bind it once"
        return (
            f"{self.name} is handled by {self.taken.__qualname__} already, not also by {self.wanted.__qualname__}: a request "
            "has one handler; bind further work to the events that the handler collects"
        )


@dataclass(eq=False)
class RequestUnbound(SilboError, LookupError):
    """A request was sent that has no handler.

    Attributes:
        cls: The class of the request.
        bound: The classes of requests that have a handler.
    """

    cls: type
    bound: tuple[type, ...]

    def __str__(self) -> str:
        base = next((cls for cls in self.cls.__mro__ if cls in self.bound), None)
        derived = "" if base is None else f" ({base.__qualname__} has one, but each class is bound on its own)"
        return (
            f"no handler for {self.cls.__qualname__}{derived}: bind one, request_map.bind({self.cls.__qualname__}, "
            "YourHandler)"
        )


@dataclass(eq=False)
class HandlerShared(SilboError, RuntimeError):
    """A handler, or its list of events, was in use twice at the same time, so it is not known which use its events belong to.

    The events are not sent.

    Attributes:
        cls: The class of the handler.
        shared: ``"object"`` if the handler itself was in use twice, ``"list"`` if it was the list that its ``events`` gives.
    """

    cls: type
    shared: str

    def __str__(self) -> str:
        name = self.cls.__qualname__
        if self.shared == "list":
            return (
                f"{name}.events gives events of a list that another handler had at the same time, so nobody knows whose they "
                "are; give each handler a list of its own"
            )
        return (
            f"one {name} object was in use twice at the same time and has collected events, so nobody knows whose they are; "
            f"register {name} as transient, so that each request and event has its own"
        )


@dataclass(eq=False)
class FollowUpsExceeded(SilboError, RuntimeError):
    """Handlers of events collected more events than one unit of work may have.

    Attributes:
        limit: The most events that may follow; so many have been dispatched.
        name: The name of the next event, which was not dispatched.
    """

    limit: int
    name: str

    def __str__(self) -> str:
        return (
            f"{self.limit} events have followed of the events of one unit of work, and {self.name!r} would be the next: do "
            "two handlers answer each other for ever?"
        )


class DispatcherClosed(SilboError, RuntimeError):
    """``spawn`` or ``wait_for`` was called on a closed dispatcher, or the dispatcher was closed during ``wait_for``."""

    def __str__(self) -> str:
        return "the dispatcher is closed: no spawn() and no wait_for() after aclose()"


@dataclass(eq=False)
class LoopConflict(SilboError, RuntimeError):
    """An object that belongs to one event loop was used in another; its work can't be waited for there.

    Attributes:
        call: The call.
        loop: The loop in which it was made.
        other: The loop to which the object, or the work that it would wait for, belongs.
    """

    call: str
    loop: object
    other: object

    def __post_init__(self) -> None:
        if getattr(self.other, "is_closed", bool)():
            self._state = "is closed: make another object in this loop"
        elif getattr(self.other, "is_running", bool)():
            self._state = (
                "runs in another thread: let that loop make the call (asyncio.run_coroutine_threadsafe(coroutine, its_loop)), "
                "or give each loop an object of its own"
            )
        else:
            self._state = "stands still with work under way: let it end that, or make another object in this loop"

    def __reduce__(self) -> tuple[Any, ...]:  # by the names of the loops, which can't be pickled
        names = {"loop": _name_loop(self.loop), "other": _name_loop(self.other)}
        return _rebuild, (type(self), (self.call, *names.values())), self.__dict__ | names

    def __str__(self) -> str:
        loop, other = _name_loop(self.loop), _name_loop(self.other)
        return f"{self.call} was called in {loop}, and needs what belongs to {other}, which {self._state}"


def _name_loop(loop: object) -> str:
    return loop if isinstance(loop, str) else f"<{type(loop).__name__} at {id(loop):#x}>"


@dataclass(eq=False)
class LoopBlocked(SilboError, RuntimeError):
    """A call that waits was made where an event loop runs, which would stand still until the call ends.

    Attributes:
        call: The call.
        instead: The code to write in its place.
    """

    call: str
    instead: str

    def __str__(self) -> str:
        return f"{self.call} was called where an event loop runs, which it would block. Write: {self.instead}"


@dataclass(eq=False)
class PortalClosed(SilboError, RuntimeError):
    """A portal can't dispatch any more: its event loop has ended, or ended the dispatch, or runs in another process.

    Attributes:
        name: The name that was to be dispatched.
        problem: What happened, and if listeners may have run.
    """

    name: object
    problem: str

    def __str__(self) -> str:
        return f"portal.dispatch({self.name!r}): {self.problem}"


@dataclass(eq=False)
class CircularWait(SilboError, RuntimeError):
    """A listener or hook waits for the end of what waits for that listener or hook.

    Attributes:
        owner: ``"consumer"`` or ``"relay"``.
        call: The call that it waits for.
    """

    owner: str
    call: str

    def __str__(self) -> str:
        return (
            f"code that a {self.owner} runs waits for {self.call} of that {self.owner}, which waits for this code: neither "
            "would ever end. Call stop() and return; wait for the end outside of listeners and hooks"
        )


@dataclass(eq=False)
class StopIncomplete(SilboError, RuntimeError):
    """A run has ended, and left listeners or hooks behind that did not end when they were cancelled.

    Attributes:
        owner: ``"consumer"`` or ``"relay"``.
        seconds: How long it waited for them.
        places: The functions, with file and line.
    """

    owner: str
    seconds: float
    places: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{', '.join(self.places) or 'some code'} did not end within {self.seconds:g} s of being cancelled, and was left "
            f"behind: it catches its cancellation, or waits for run() of the {self.owner} that runs it, which is a circle. "
            "Call stop() and return"
        )


# -- plugins ------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class PluginError(SilboError):
    """The base of the errors about one plugin.

    Attributes:
        plugin: The name of the plugin.
        problem: The fault, and what to do.
    """

    plugin: str
    problem: str

    def __str__(self) -> str:
        return f"plugin {self.plugin!r}: {self.problem}"


class PluginInvalid(PluginError, TypeError):
    """An object is no plugin, states what no plugin can state, or can't be imported (``__cause__`` is the error)."""


class PluginMissing(PluginError, LookupError):
    """A plugin that was named is not there."""


@dataclass(eq=False)
class PluginConflict(PluginError, ValueError):
    """A plugin can't be loaded in this host, or beside another plugin: a wrong version, a name given twice, a circle.

    Attributes:
        circle: The names of a circle, the first one again at the end; else empty.
    """

    _: KW_ONLY
    circle: tuple[str, ...] = ()


@dataclass(eq=False)
class PluginSettingsInvalid(PluginError, ValueError):
    """The settings of a plugin have an unknown key, a wrong type or a missing field.

    Attributes:
        key: The setting at fault, as ``retry.pause``; None if the fault is in no single setting.
    """

    _: KW_ONLY
    key: str | None = None

    def __str__(self) -> str:
        place = "settings" if self.key is None else f"setting {self.key!r}"
        return f"plugin {self.plugin!r}, {place}: {self.problem}"


@dataclass(eq=False)
class PluginOff(PluginError, RuntimeError):
    """A listener was left out: its plugin is switched off, for the reason that ``problem`` gives.

    Attributes:
        pause: Seconds until it is switched on again; None if somebody has to do that.
    """

    _: KW_ONLY
    pause: float | None = None

    def __str__(self) -> str:
        return f"plugin {self.plugin!r} is switched off: {self.problem}"


class PluginUnloaded(PluginError, RuntimeError):
    """A plugin was unloaded: its listener was cancelled, or its ``wait_for`` ended, or it was used after that."""


class PluginForbidden(PluginError):
    """A plugin asked for something through its view of the dispatcher that only the host may do."""


# -- the way out --------------------------------------------------------------------------------------------


@dataclass(eq=False)
class AddressInvalid(SilboError, ValueError):
    """An address, prefix or app has a character that channels and keys can't carry.

    Attributes:
        what: What the value was given as: ``an address``, ``a prefix``.
    """

    address: object
    what: str = "an address"

    def __str__(self) -> str:
        return f"{self.address!r} is not {self.what}: use letters, digits and . _ - (no spaces, braces, colons or *)"


@dataclass(eq=False)
class HeaderInvalid(SilboError, ValueError):
    """A header of a message can't be set: its name belongs to silbo, or its name or value is no text.

    Attributes:
        name: The name of the header.
        problem: The words for what is wrong.
    """

    name: object
    problem: str

    def __str__(self) -> str:
        return f"header {self.name!r} can't be set: {self.problem}"


@dataclass(eq=False)
class RouteConflict(SilboError, ValueError):
    """Two routes have the same pattern."""

    pattern: str
    taken: str
    wanted: str

    def __str__(self) -> str:
        return f"two routes for {self.pattern!r}: {self.taken} and {self.wanted}. The first would always win; drop one"


class PublishError(SilboError):
    """The base of every error that says a publish did not succeed."""


@dataclass(eq=False)
class MessageRefused(PublishError, ValueError):
    """This message can't be sent, now or later; other messages are not affected.

    Attributes:
        name: The event name.
        field: The payload field at fault; None if the fault is in no single field.
    """

    name: Hashable
    problem: str
    _: KW_ONLY
    field: str | None = None

    def __str__(self) -> str:
        where = f", field {self.field!r}" if self.field else ""
        return f"{self.name!r}{where}: {self.problem}"


class BrokerUnavailable(PublishError, ConnectionError):
    """The broker can't be reached or refuses everything; nothing of this call was sent. Safe to repeat."""


class BrokerRefused(BrokerUnavailable):
    """The broker answers, and refuses one step, as storing while its memory is full. Safe to repeat; other steps may pass."""


@dataclass(eq=False)
class ClusterClientNeeded(BrokerUnavailable, TypeError):
    """The program's client is for a single server, and the server is one of the nodes of a Redis Cluster; nothing was done.

    Attributes:
        server: The node, as ``Redis at 10.0.0.1:6379``.
    """

    server: str

    def __str__(self) -> str:
        return (
            f"{self.server} is one of the nodes of a Redis Cluster, and has a part of the streams; nothing was done. Give a "
            "redis.asyncio.RedisCluster in place of the redis.asyncio.Redis"
        )


@dataclass(eq=False)
class ShardLost(BrokerUnavailable):
    """Another process leads the shard by now, in a later epoch. Raised only to a consumer, which drops what it has in hand of it.

    Attributes:
        address: The shard.
        epoch: The epoch that is over.
    """

    address: str
    epoch: int

    def __str__(self) -> str:
        return f"another process leads {self.address} by now: epoch {self.epoch} is over"


@dataclass(eq=False)
class ShardsMismatch(BrokerUnavailable, ValueError):
    """Another number of shards is fixed for the address in Redis; nothing of this call was sent. An outbox keeps what waits.

    Attributes:
        address: The address, as ``orders``.
        fixed: The number that is fixed in Redis: 1 if the address is a stream of its own; 0 if it is being changed.
        wanted: The number that this program says; 1 if it says none.
    """

    address: str
    _: KW_ONLY
    fixed: int
    wanted: int

    def __str__(self) -> str:
        said = f"shards={self.wanted}" if self.wanted > 1 else "no shards"
        if not self.fixed:
            return f"the number of shards of {self.address!r} is being changed, and this program says {said}; it goes on afterwards"
        known = f"has {self.fixed} shards" if self.fixed > 1 else "is one stream without shards"
        return (
            f"{self.address!r} {known} in Redis, and this program says {said}. Say the same number everywhere; to change it, "
            "see the manual, 'Change the number of shards'"
        )


@dataclass(eq=False)
class ShardAddressed(SilboError, ValueError):
    """A shard is named as an address, by a group, a route or a command. Messages find their shard by their key, and groups share them out.

    Attributes:
        address: The shard, as ``orders.3``.
        whole: The address that it is a shard of, as ``orders``.
        shards: The number of shards of that address.
    """

    address: str
    _: KW_ONLY
    whole: str
    shards: int

    def __str__(self) -> str:
        return f"{self.address!r} is one of the {self.shards} shards of {self.whole!r}: write streams=[{self.whole!r}], or to={self.whole!r}, shards={self.shards}"


@dataclass(eq=False)
class RetentionConflict(BrokerUnavailable):
    """The program states another retention than the one that is kept beside the stream; nothing was sent. Safe to repeat.

    Attributes:
        stream: The key of the stream.
        stated: The policy that the program states, as ``retain=3600, trim='age'``.
        kept: The policy that is kept beside the stream.
    """

    stream: str
    _: KW_ONLY
    stated: str
    kept: str

    def __str__(self) -> str:
        return (
            f"{self.stream} has the retention ({self.kept}), and this program states ({self.stated}); nothing was sent. Give "
            "RedisStreams() the same in all programs, or change the stream's first: silbo retention set"
        )


@dataclass(eq=False)
class StreamMissing(SilboError, LookupError):
    """There is no stream of this key: perhaps the prefix is another one, or nothing was sent yet.

    Attributes:
        stream: The key of the stream.
        found: The keys of the streams that exist.
    """

    stream: str
    found: Sequence[str] = ()

    def __str__(self) -> str:
        if not self.found:
            return f"there is no stream {self.stream}: nothing was sent there yet, or the prefix is another one; or Redis refuses writes: silbo doctor tells"
        shown = ", ".join([*self.found[:10], *(["..."] if self.found[10:] else [])])
        return f"there is no stream {self.stream}; there are {shown}: give that prefix and stream"


@dataclass(eq=False)
class DeadLetterAmbiguous(SilboError, LookupError):
    """Several shards of an address have a dead letter of this id; nothing was done.

    Attributes:
        id: The id.
        address: The address.
    """

    id: str
    address: str

    def __str__(self) -> str:
        return (
            f"several shards of {self.address} have a dead letter {self.id}; nothing was done. `silbo dead list --json` shows "
            f"their streams: name the shard, as --stream {self.address}.0"
        )


@dataclass(eq=False)
class GroupMissing(SilboError, LookupError):
    """No stream has a group of this name.

    Attributes:
        group: The group's name.
        streams: The keys of the streams that were looked at.
    """

    group: str
    streams: Sequence[str]

    def __str__(self) -> str:
        return (
            f"there is no group {self.group} at {', '.join(self.streams)}: `silbo groups` shows those that there are; give "
            "one of them, or another prefix or stream"
        )


@dataclass(eq=False)
class GroupInUse(SilboError, RuntimeError):
    """A group can't be set back while its consumers live: they would be given messages again in the midst of others.

    Attributes:
        group: The group's name.
        stream: The key of the stream.
        consumers: The names of the consumers that gave a sign of life lately.
    """

    group: str
    stream: str
    consumers: Sequence[str]

    def __str__(self) -> str:
        return (
            f"nothing was done: {self.group} at {self.stream} has live consumers: {', '.join(self.consumers)}. Stop them and "
            "repeat; one that was killed, or was stopped with messages in hand, counts as gone after 30 seconds "
            "(--silent-after)"
        )


class DeliveryUnknown(PublishError, ConnectionError):
    """The message was sent and no answer came: it may have arrived. Repeating may double it."""


# -- the outbox ---------------------------------------------------------------------------------------------


@dataclass(eq=False)
class OutboxFull(PublishError):
    """The outbox has reached its quota: nothing of this call was stored. Safe to repeat when the relay has caught up.

    Attributes:
        rows: The messages that are stored and not sent.
        size: Their size in bytes.
        quota: The quota, as text.
    """

    rows: int
    size: int
    quota: str

    def __str__(self) -> str:
        return (
            f"no room in the outbox: {self.rows} messages ({self.size} bytes) wait to be sent, and its quota is "
            f"{self.quota}; nothing of this call was stored. Look at its relay and its broker, or raise the quota"
        )


class StoreUnavailable(PublishError, ConnectionError):
    """The store can't be read or written: locked, full, read-only, not reachable. Nothing of this call was stored."""


@dataclass(eq=False)
class StoreInvalid(SilboError, ValueError):
    """The opened file or database is not a store of this outbox: something else, another version, other partitions."""

    store: str
    problem: str

    def __str__(self) -> str:
        return f"{self.store}: {self.problem}"


@dataclass(eq=False)
class LeadLost(SilboError):
    """Another relay has taken over the partition and sends its rows. Raised only to a relay."""

    partition: int
    epoch: int

    def __str__(self) -> str:
        return f"partition {self.partition} of the outbox is led by another relay, epoch {self.epoch} is over"


@dataclass(eq=False)
class Fenced(SilboError):
    """The broker has seen a newer leader of this outbox partition; nothing was sent. Raised only to a relay.

    Attributes:
        source: The name of the partition of the outbox.
        epoch: The newest epoch that the broker has seen.
    """

    source: str
    epoch: int

    def __str__(self) -> str:
        return f"{self.source}: the broker has seen epoch {self.epoch} and takes nothing from an older one"


# -- the way in ---------------------------------------------------------------------------------------------


@dataclass(eq=False)
class MessageInvalid(SilboError, ValueError):
    """Received bytes are not a valid message, or don't fit the event class. Trying again does not help.

    Attributes:
        field: The part at fault, as ``payload.user_id`` or ``message_id``; None for the whole message.
    """

    problem: str
    _: KW_ONLY
    field: str | None = None

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}" if self.field else self.problem


@dataclass(eq=False)
class VersionTooNew(SilboError, ValueError):
    """A received message is of a newer version than this program knows. A newer program can handle it.

    Attributes:
        name: The name of the event.
        version: The version of the message.
        known: The newest version in ``events=``.
    """

    name: str
    version: int
    known: int

    def __str__(self) -> str:
        return (
            f"{self.name!r}: the message has version {self.version}, and this program knows no newer one than {self.known}; "
            "deploy the program that knows it"
        )


@dataclass(eq=False)
class ClassUnreadable(SilboError, TypeError):
    """Events of a class can't be rebuilt from their messages. Raised when the class is first named, as in ``events=``.

    Attributes:
        cls: The event class.
        problem: The reason, with the attribute at fault.
    """

    cls: type
    problem: str

    def __str__(self) -> str:
        return f"{self.cls.__qualname__} can't be rebuilt from messages: {self.problem}"


@dataclass(eq=False)
class OwnMessagesUndecided(SilboError, RuntimeError):
    """A consumer receives messages of the app that its own dispatcher bridges, and ``own=`` is not given."""

    app: str

    def __str__(self) -> str:
        return (
            f"this program bridges and consumes as app {self.app!r}, so it would hear events again whose listeners "
            'have already run where they were dispatched. Say which you want of Consumer or receive(): own="skip" drops '
            'them (replicas that only need other apps\' events); own="handle" runs the listeners again (one program '
            "that dispatches and is also its own background worker)"
        )


@dataclass(eq=False)
class StartInvalid(SilboError, ValueError):
    """The ``start=`` of a consumer group is not a known word or the id of an entry."""

    start: object

    def __str__(self) -> str:
        hint = {"$": ': write "new"', "0": ': write "oldest"', "0-0": ': write "oldest"', ">": ': write "new"'}
        return (
            f"{self.start!r} is not where a group can start{hint.get(str(self.start), '')}. It is "
            '"new" (what comes from now on), "oldest" (all that is kept) or the id of an entry, as '
            '"1700000000000-0" (what came after it)'
        )


@dataclass(eq=False)
class DeliveryGivenUp(SilboError):
    """A message has become a dead letter: reported to ``on_error``, never raised. ``__cause__`` is the last error.

    Attributes:
        name: The event name; empty if it can't be read.
        delivery_id: The broker's id of the delivery.
        group: The group that gave it up.
        attempts: How often its listeners ran; 0 for a malformed message, and for one whose version no consumer of the group
            knew.
        problem: The last error, as text.
    """

    name: str
    delivery_id: str
    group: str
    attempts: int
    problem: str

    def __str__(self) -> str:
        when = f"after {self.attempts} attempt{'s' * (self.attempts > 1)}" if self.attempts else "at once"
        if isinstance(self.__cause__, VersionTooNew):
            when = "as no consumer of the group that knows its version came in time"
        return f"{self.name or 'a message'} {self.delivery_id} in group {self.group}: given up {when}: {self.problem}"


@dataclass(eq=False)
class Gap(SilboError):
    """Messages may have been missed at an address: reported to ``on_error``, never raised.

    Attributes:
        address: The channel pattern or stream.
        reason: What happened.
        count: How many messages are missing; None if that is not known.
    """

    address: str
    reason: str
    _: KW_ONLY
    count: int | None = None

    def __str__(self) -> str:
        many = "an unknown number of" if self.count is None else str(self.count)
        return f"{self.address}: {many} messages may have been missed: {self.reason}"


# -- looking at a program -----------------------------------------------------------------------------------


@dataclass(eq=False)
class AppInvalid(SilboError, ValueError):
    """A reference, as ``shop.web:dispatcher``, leads to no object that can be used.

    Attributes:
        reference: The reference.
        problem: The fault, and what to do.
    """

    reference: str
    problem: str

    def __str__(self) -> str:
        return f"{self.reference!r}: {self.problem}"


@dataclass(eq=False)
class AppFailed(SilboError, RuntimeError):
    """The host's own code has failed while its objects were looked for; ``__cause__`` is the error.

    Attributes:
        reference: The reference that was followed.
        step: The code that failed: ``its import``, ``its call``, ``its start``.
        error: The error.
    """

    reference: str
    step: str
    error: BaseException

    def __str__(self) -> str:
        return f"{self.reference!r}: {self.step} failed: {type(self.error).__name__}: {self.error}".removesuffix(": ")
