"""Every exception and warning that silbo raises: one root, and the builtin a caller would guess.

Three errors answer for a publish: :class:`MessageRefused` (this message, for good),
:class:`BrokerUnavailable` (not sent; safe to repeat) and :class:`DeliveryUnknown` (it may have arrived). An outbox has
:class:`OutboxFull` and :class:`StoreUnavailable` in place of the second.
"""

from __future__ import annotations

from collections.abc import Hashable

__all__ = [
    "AlreadyBound",
    "AddressInvalid",
    "BrokerUnavailable",
    "ContainerMissing",
    "DeliveryGivenUp",
    "DeliveryUnknown",
    "DispatcherClosed",
    "DispatcherConflict",
    "EnvelopeConflict",
    "Fenced",
    "FollowUpsExceeded",
    "Gap",
    "HandlerShared",
    "LeadLost",
    "ListenerTimeout",
    "MessageInvalid",
    "MessageRefused",
    "MissingExtra",
    "NameInvalid",
    "NotAnEvent",
    "OutboxFull",
    "OwnMessagesUndecided",
    "PublishError",
    "RequestUnbound",
    "RouteConflict",
    "SilboError",
    "StartInvalid",
    "StoreInvalid",
    "StoreUnavailable",
    "Unresolvable",
]


class SilboError(Exception):
    """The root of silbo's exceptions."""


class MissingExtra(SilboError, ImportError):
    """A module of silbo was imported whose library is not installed."""

    def __init__(self, module: str, *, extra: str) -> None:
        super().__init__(module, extra)
        self.module, self.extra = module, extra

    def __str__(self) -> str:
        return f"{self.module} needs a library that is not installed: pip install 'silbo[{self.extra}]'"


# -- events, names, dispatch --------------------------------------------------------------------------------


class NameInvalid(SilboError, ValueError):
    """A name with ``*`` was dispatched, a pattern is not one, or classes of events and names do not go together."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(name, problem)
        self.name, self.problem = name, problem

    def __str__(self) -> str:
        return f"{self.name!r}: {self.problem}"


class NotAnEvent(SilboError, TypeError):
    """An object was dispatched that accepts none of the envelope's attributes."""

    def __init__(self, cls: type) -> None:
        super().__init__(cls)
        self.cls = cls

    def __str__(self) -> str:
        return (
            f"{self.cls.__qualname__} objects accept no attributes, so a dispatch can't write name, dispatcher and "
            "propagation_stopped on them; derive the event's class from silbo.Event"
        )


class EnvelopeConflict(SilboError, TypeError):
    """An event class declares a payload field under a name that belongs to the envelope."""

    def __init__(self, cls: type, field: str) -> None:
        super().__init__(cls, field)
        self.cls, self.field = cls, field

    def __str__(self) -> str:
        return (
            f"{self.cls.__qualname__}.{self.field} would be overwritten by the dispatch: {self.field!r} belongs to the "
            f"envelope of an event. Rename the attribute and keep {self.field!r} on the wire: dataclass or attrs "
            f"`{self.field}_: ... = field(metadata={{'wire': {self.field!r}}})`, msgspec "
            f"`{self.field}_: ... = msgspec.field(name={self.field!r})`, pydantic "
            f"`{self.field}_: ... = Field(alias={self.field!r})`"
        )


class ListenerTimeout(SilboError, TimeoutError):
    """A listener ran longer than its ``timeout=``; it was cancelled."""

    def __init__(self, listener: object, timeout: float) -> None:
        super().__init__(listener, timeout)
        self.listener, self.timeout = listener, timeout

    def __str__(self) -> str:
        return f"{self.listener!r} was cancelled: it ran longer than its timeout of {self.timeout:g} s"


class ContainerMissing(SilboError, TypeError):
    """A class was given as a listener to a dispatcher without a container."""

    def __init__(self, cls: type) -> None:
        super().__init__(cls)
        self.cls = cls

    def __str__(self) -> str:
        return (
            f"{self.cls.__qualname__} is a class, and this dispatcher has no container to make one of it. Give it one, "
            "AsyncEventDispatcher(container=...) with an adapter from silbo.containers, or add an object: "
            f"{self.cls.__qualname__}(...)"
        )


class Unresolvable(SilboError, LookupError):
    """A container can't make an object of a class.

    Attributes:
        cls: The class that was asked for.
        container: The adapter.
        problem: What is missing, and what needs it.
    """

    def __init__(self, cls: type, container: object, problem: str) -> None:
        super().__init__(cls, container, problem)
        self.cls, self.container, self.problem = cls, container, problem

    def __str__(self) -> str:
        return f"{type(self.container).__name__} can't make {self.cls.__qualname__}: {self.problem}"


class DispatcherConflict(SilboError, ValueError):
    """A container has a dispatcher, and was to get another one.

    Attributes:
        container: The adapter.
    """

    def __init__(self, container: object) -> None:
        super().__init__(container)
        self.container = container

    def __str__(self) -> str:
        return (
            f"{type(self.container).__name__}: the container has another dispatcher already, and what is dispatched with one "
            "of the two is not heard by the other. Take the one that it has, bootstrap(dispatcher=...), or take it out"
        )


class AlreadyBound(SilboError, ValueError):
    """A request has two handlers, or an event the same one twice.

    Attributes:
        name: Of the class of requests, or of the event.
        taken: Its handler.
        wanted: What was to be its handler, too.
    """

    def __init__(self, name: str, taken: type, wanted: type) -> None:
        super().__init__(name, taken, wanted)
        self.name, self.taken, self.wanted = name, taken, wanted

    def __str__(self) -> str:
        if self.taken is self.wanted:
            return f"{self.name} is bound to {self.taken.__qualname__} already; bind it once"
        return (
            f"{self.name} is handled by {self.taken.__qualname__} already, not also by {self.wanted.__qualname__}: a request "
            "has one handler; what else is to happen hears its events"
        )


class RequestUnbound(SilboError, LookupError):
    """A request was sent that has no handler.

    Attributes:
        cls: Its class.
        bound: The classes of requests that have one.
    """

    def __init__(self, cls: type, bound: tuple[type, ...]) -> None:
        super().__init__(cls, bound)
        self.cls, self.bound = cls, bound

    def __str__(self) -> str:
        base = next((one for one in self.cls.__mro__ if one in self.bound), None)
        derived = "" if base is None else f" ({base.__qualname__} has one, but each class is bound on its own)"
        return (
            f"no handler for {self.cls.__qualname__}{derived}: bind one, request_map.bind({self.cls.__qualname__}, "
            "YourHandler)"
        )


class HandlerShared(SilboError, RuntimeError):
    """Two units of work collected events in one place at the same time, so nobody knows whose they are.

    Attributes:
        cls: The class of the handler.
        shared: What both had: ``"object"``, the handler; or ``"list"``, the one that its ``events`` gives.
    """

    def __init__(self, cls: type, shared: str) -> None:
        super().__init__(cls, shared)
        self.cls, self.shared = cls, shared

    def __str__(self) -> str:
        name = self.cls.__qualname__
        what, register = f"one {name} object", name
        if self.shared == "list":
            what, register = f"the one list that {name}.events gives", "what has the list"
        return (
            f"two units of work collected events in {what} at the same time, so nobody knows whose they are; register {register} "
            "as transient, or as scoped so that each request has its own"
        )


class FollowUpsExceeded(SilboError, RuntimeError):
    """The events that handlers collect bring about more and more events.

    Attributes:
        limit: So many have been dispatched.
        name: What would have been the next one.
    """

    def __init__(self, limit: int, name: str) -> None:
        super().__init__(limit, name)
        self.limit, self.name = limit, name

    def __str__(self) -> str:
        return (
            f"{self.limit} events have followed of the events of one unit of work, and {self.name!r} would be the next: do "
            "two handlers answer each other for ever?"
        )


class DispatcherClosed(SilboError, RuntimeError):
    """The dispatcher was closed: it spawns nothing more and nobody can wait on it."""

    def __str__(self) -> str:
        return "the dispatcher is closed: no spawn() and no wait_for() after aclose()"


# -- what leaves --------------------------------------------------------------------------------------------


class AddressInvalid(SilboError, ValueError):
    """Something is not an address: a channel's or stream's own part of the key, or a prefix or app."""

    def __init__(self, address: object, what: str = "an address") -> None:
        super().__init__(address, what)
        self.address, self.what = address, what

    def __str__(self) -> str:
        return f"{self.address!r} is not {self.what}: use letters, digits and . _ - (no spaces, braces, colons or *)"


class RouteConflict(SilboError, ValueError):
    """Two routes claim one pattern."""

    def __init__(self, pattern: str, taken: str, wanted: str) -> None:
        super().__init__(pattern, taken, wanted)
        self.pattern, self.taken, self.wanted = pattern, taken, wanted

    def __str__(self) -> str:
        return f"two routes for {self.pattern!r}: {self.taken} and {self.wanted}. The first would always win; drop one"


class PublishError(SilboError):
    """A publish that did not succeed: one of those below."""


class MessageRefused(PublishError, ValueError):
    """This message can't be sent, now or later; others are not affected.

    Attributes:
        name: The event name.
        field: The payload field at fault, where one is.
    """

    def __init__(self, name: Hashable, problem: str, *, field: str | None = None) -> None:
        super().__init__(name, problem, field)
        self.name, self.problem, self.field = name, problem, field

    def __str__(self) -> str:
        where = f", field {self.field!r}" if self.field else ""
        return f"{self.name!r}{where}: {self.problem}"


class BrokerUnavailable(PublishError, ConnectionError):
    """The broker can't be reached or refuses everything; nothing of this call was sent. Safe to repeat."""


class DeliveryUnknown(PublishError, ConnectionError):
    """The message was sent, the answer did not come: it may have arrived. Repeating may double it."""


# -- what is stored -----------------------------------------------------------------------------------------


class OutboxFull(PublishError):
    """The outbox has reached its quota: nothing of this call was stored. Safe to repeat, once the relay has caught up.

    Attributes:
        rows: Messages that are stored and not sent.
        size: Their bytes.
    """

    def __init__(self, rows: int, size: int, quota: str) -> None:
        super().__init__(rows, size, quota)
        self.rows, self.size, self.quota = rows, size, quota

    def __str__(self) -> str:
        return (
            f"no room in the outbox: {self.rows} messages ({self.size} bytes) wait to be sent, and its quota is "
            f"{self.quota}; nothing of this call was stored. Look at its relay and its broker, or raise the quota"
        )


class StoreUnavailable(PublishError, ConnectionError):
    """The store can't be read or written: locked, full, read-only, not reachable; nothing of this call was stored."""


class StoreInvalid(SilboError, ValueError):
    """What was opened is no store of this outbox: something else, another version, other partitions."""

    def __init__(self, store: str, problem: str) -> None:
        super().__init__(store, problem)
        self.store, self.problem = store, problem

    def __str__(self) -> str:
        return f"{self.store}: {self.problem}"


class LeadLost(SilboError):
    """Another relay has taken over the partition: the rows are its own to send. Raised to a relay alone."""

    def __init__(self, partition: int, epoch: int) -> None:
        super().__init__(partition, epoch)
        self.partition, self.epoch = partition, epoch

    def __str__(self) -> str:
        return f"partition {self.partition} of the outbox is led by another relay, epoch {self.epoch} is over"


class Fenced(SilboError):
    """The broker has seen a newer leader of this outbox partition; nothing was sent. Raised to a relay alone.

    Attributes:
        epoch: The newest that the broker has seen.
    """

    def __init__(self, source: str, epoch: int) -> None:
        super().__init__(source, epoch)
        self.source, self.epoch = source, epoch

    def __str__(self) -> str:
        return f"{self.source}: the broker has seen epoch {self.epoch} and takes nothing from an older one"


# -- what arrives -------------------------------------------------------------------------------------------


class MessageInvalid(SilboError, ValueError):
    """Received bytes are no valid message, or don't fit the event class.

    Attributes:
        field: The part at fault, as ``payload.user_id`` or ``message_id``; None for the whole.
    """

    def __init__(self, problem: str, *, field: str | None = None) -> None:
        super().__init__(problem, field)
        self.problem, self.field = problem, field

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}" if self.field else self.problem


class OwnMessagesUndecided(SilboError, RuntimeError):
    """A consumer hears the app that its own dispatcher bridges, and does not say what to do with those messages."""

    def __init__(self, app: str) -> None:
        super().__init__(app)
        self.app = app

    def __str__(self) -> str:
        return (
            f"this program bridges and consumes as app {self.app!r}, so it would hear events again whose listeners "
            'have already run where they were dispatched. Say which you want of Consumer or receive(): own="skip" drops '
            'them (replicas that only need other apps\' events); own="handle" runs the listeners again (one program '
            "that dispatches and is also its own background worker)"
        )


class StartInvalid(SilboError, ValueError):
    """Where a consumer group is to begin is not said in a way that is understood."""

    def __init__(self, start: object) -> None:
        super().__init__(start)
        self.start = start

    def __str__(self) -> str:
        hint = {"$": ': write "new"', "0": ': write "oldest"', "0-0": ': write "oldest"', ">": ': write "new"'}
        return (
            f"{self.start!r} is not where a group can start{hint.get(str(self.start), '')}. It is "
            '"new" (what comes from now on), "oldest" (all that is kept) or the id of an entry, as '
            '"1700000000000-0" (what came after it)'
        )


class DeliveryGivenUp(SilboError):
    """A message has become a dead letter: reported to ``on_error``, never raised. ``__cause__`` is the last error.

    Attributes:
        name: The event name; empty where it can't be read.
        delivery_id: What the broker calls it.
        group: Whose dead letter it is.
        attempts: How often its listeners ran; 0 for a malformed one.
        problem: The last error, as text.
    """

    def __init__(self, name: str, delivery_id: str, group: str, attempts: int, problem: str) -> None:
        super().__init__(name, delivery_id, group, attempts, problem)
        self.name, self.delivery_id, self.group = name, delivery_id, group
        self.attempts, self.problem = attempts, problem

    def __str__(self) -> str:
        when = f"after {self.attempts} attempt{'s' * (self.attempts > 1)}" if self.attempts else "at once"
        return f"{self.name or 'a message'} {self.delivery_id} in group {self.group}: given up {when}: {self.problem}"


class Gap(SilboError):
    """Messages may have been missed at an address: reported to ``on_error``, never raised.

    Attributes:
        address: The channel pattern or stream.
        reason: What happened.
        count: How many are missing, where that is known.
    """

    def __init__(self, address: str, reason: str, *, count: int | None = None) -> None:
        super().__init__(address, reason, count)
        self.address, self.reason, self.count = address, reason, count

    def __str__(self) -> str:
        many = "an unknown number of" if self.count is None else str(self.count)
        return f"{self.address}: {many} messages may have been missed: {self.reason}"
