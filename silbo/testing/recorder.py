"""The recorder behind the fixture ``silbo_events``: what a test dispatched, published, consumed and gave up."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from difflib import get_close_matches
from functools import wraps
from itertools import chain
from typing import Any, Final, Literal, TypeAlias, TypeVar, overload

from silbo._checks import suggest_name
from silbo.bridge import Bridge
from silbo.brokers.memory import DeadLetter
from silbo.consumer.consumer import Consumer
from silbo.dispatch.class_listeners import HandlerClass
from silbo.dispatch.dispatcher import AsyncEventDispatcher
from silbo.dispatch.listeners import Registration
from silbo.dispatch.observers import Call, Dispatch
from silbo.dispatch.options import Listener
from silbo.dispatch.received_event import received
from silbo.dispatch.traced import shorten
from silbo.errors import DeliveryGivenUp, MessageInvalid
from silbo.event import ENVELOPE, declared_fields
from silbo.message import Delivery, Message
from silbo.names import E, EventName, Name, compile_pattern, is_pattern
from silbo.protocols import Publisher
from silbo.testing.clock import Clock
from silbo.testing.recorded_dispatch import RecordedDispatch
from silbo.testing.settle import Watched, settle
from silbo.testing.stand_ins import StandIns
from silbo.wire.encode import Unwritable, to_json_value

__all__ = ["EventRecorder", "Kind"]

Kind: TypeAlias = Literal["dispatched", "published", "consumed", "dead"]
"""The four kinds of records."""

SHOWN: Final = 30
"""The most records that a failed assertion shows: the last ones."""
_KINDS: Final = ("dispatched", "published", "consumed", "dead")
_MISSING: Final = object()

T = TypeVar("T")

_call: ContextVar[Call | None] = ContextVar("silbo_testing_call", default=None)
"""The call of a listener that this code runs in."""


@dataclass(slots=True, eq=False)
class _Record:
    """One record.

    Attributes:
        kind: The kind; an attempt of a delivery is none of the four, unless it succeeds: then it is consumed.
        name: The name of the event.
        value: The event, the message, or the dead letter.
        is_asserted: True if an assertion was met by it.
        dispatch: The dispatch of an event.
    """

    kind: Kind | Literal["attempt"]
    name: Any
    value: Any
    is_asserted: bool = False
    dispatch: RecordedDispatch | None = None


class EventRecorder:
    """Records what the dispatchers, bridges and consumers that it watches do, in order: the fixture ``silbo_events``.

    Each ``assert_...`` takes a name or pattern, and the values of any fields. It is met by the first record of its kind that no
    assertion before it was met by, and returns the event, message or dead letter. So two assertions of one event ask for two of
    them. A failed one shows everything that was recorded, each dispatch with its listeners.
    """

    def __init__(self) -> None:
        self._records: list[_Record] = []
        self._open: dict[Dispatch, RecordedDispatch] = {}
        self._tokens: dict[Call, Token[Call | None]] = {}
        self._watched = Watched(open_dispatches=self._open)
        self._stand_ins: dict[int, StandIns] = {}  # by the id of their dispatcher
        self._undo = ExitStack()
        self._after: int | None = None  # inside of in_order(): the index of the record that the last assertion found
        self._clock: Clock | None = None

    # -- watch ----------------------------------------------------------------------------------------------

    def watch(self, watched: T) -> T:
        """Record what an object does from now on, and return it. At the end of the test it is as it was before.

        Args:
            watched: A dispatcher: its dispatches, those that its consumers make, their dead letters, and what its bridges publish.
                A bridge, an outbox or a broker: what it publishes. A consumer: the same as its dispatcher, and :meth:`settle`
                waits for the deliveries that it has in hand.

        Raises:
            TypeError: The object is none of these.
        """
        given: Any = watched
        if isinstance(given, AsyncEventDispatcher):
            self._watch_dispatcher(given)
        elif isinstance(given, Consumer):
            self._watched.consumers.setdefault(id(given), given)
            self.watch(given.dispatcher)
        elif isinstance(given, Bridge):
            self._watched.bridges.setdefault(id(given), given)
            self._watch_publisher(given.publisher)
            bridge: Any = given
            if getattr(bridge._send, "__self__", None) is given.publisher:  # noqa: SLF001  # it has kept the method
                self._undo.callback(setattr, bridge, "_send", bridge._send)  # noqa: SLF001
                bridge._send = given.publisher.publish  # noqa: SLF001
        elif isinstance(given, Publisher) and not isinstance(given, type):
            self._watch_publisher(given)
        else:
            raise TypeError(
                f"one of silbo's dispatchers, a consumer, a bridge or a publisher can be watched, not {watched!r}"
            )
        return watched

    def _watch_dispatcher(self, dispatcher: AsyncEventDispatcher) -> None:
        if id(dispatcher) not in self._watched.dispatchers:
            self._watched.dispatchers[id(dispatcher)] = dispatcher
            self._undo.callback(dispatcher.observe(self).remove)
            stand_ins = self._stand_ins[id(dispatcher)] = StandIns(dispatcher)
            self._undo.callback(stand_ins.clear)

    def _watch_publisher(self, publisher: Any) -> None:
        if id(publisher) in self._watched.publishers:
            return
        self._watched.publishers[id(publisher)] = publisher
        own = vars(publisher).get("publish", _MISSING) if hasattr(publisher, "__dict__") else _MISSING
        publish = publisher.publish

        @wraps(publish)
        async def publish_and_record(*messages: Message) -> None:
            await publish(*messages)
            self._records += [_Record("published", message.message_name, message) for message in messages]

        try:
            publisher.publish = publish_and_record
        except AttributeError as error:
            raise TypeError(
                f"{publisher!r} takes no attributes, so it can't be watched; watch its bridge's dispatcher, "
                "with a MemoryBroker in its place"
            ) from error
        self._undo.callback(_restore, publisher, own)

    def close(self) -> None:
        """Watch nothing any more: everything is as it was before. May be called twice."""
        self._undo.close()

    # -- time -----------------------------------------------------------------------------------------------

    def freeze(self) -> Clock:
        """Let the time of the test's event loop stand still until the end of the test; return the clock that moves it.

        Raises:
            TypeError: The loop is not asyncio's own.
        """
        if self._clock is None:
            clock = self._clock = Clock().__enter__()
            self._undo.callback(clock.__exit__, None, None, None)
        return self._clock

    async def settle(self, *, within: float = 5.0) -> None:
        """Wait until nothing is running, waiting or due: neither in the event loop, nor in what is watched.

        That is: no dispatch runs, no spawned task, no message is under way in a bridge, none waits in an outbox whose relay runs here,
        no watched consumer has a delivery in hand, and the loop has nothing to do and no timer that is due. Timers that are
        not due by the clock, as those of retries, are not waited for.

        Args:
            within: Seconds of real time, whatever the clock says.

        Raises:
            NotSettled: Something still runs after that time; the error says what.
            StoreUnavailable: The store of a watched outbox can't be asked.
            TypeError: The loop is not asyncio's own.
        """
        await settle(self._watched, within, self._clock)

    # -- stand-ins ------------------------------------------------------------------------------------------

    def mute(self, listener: Listener | HandlerClass) -> Registration:
        """Run nothing in the place of a listener, wherever a watched dispatcher has it, until the end of the test.

        Returns:
            Its ``remove()`` lets the listener run again; so does the end of a ``with`` block.

        Raises:
            ValueError: No watched dispatcher has this listener.
        """
        return self._stand_in(listener, None)

    def replace(self, listener: Listener | HandlerClass, replacement: Listener) -> Registration:
        """Run another listener in the place of one, under its options; see :meth:`mute`.

        Raises:
            TypeError: The replacement is not async.
            ValueError: No watched dispatcher has this listener.
        """
        return self._stand_in(listener, replacement)

    def _stand_in(self, listener: Listener | HandlerClass, replacement: Listener | None) -> Registration:
        having = [
            dispatcher
            for dispatcher in self._watched.dispatchers.values()
            if any(row.listener == listener for row in dispatcher.describe())
        ]
        if not having:
            raise ValueError(
                f"no watched dispatcher has {listener!r} as a listener; add it first, or watch() its dispatcher"
            )
        registrations = [self._stand_ins[id(dispatcher)].add(listener, replacement) for dispatcher in having]

        def remove() -> None:
            for registration in registrations:
                registration.remove()

        return Registration(remove)

    # -- records --------------------------------------------------------------------------------------------

    @overload
    def dispatched(self, name: EventName[E], /, **fields: Any) -> list[E]: ...
    @overload
    def dispatched(self, name: Name | None = None, /, **fields: Any) -> list[Any]: ...
    def dispatched(self, name: Any = None, /, **fields: Any) -> list[Any]:
        """Return the events that were dispatched here, in the order in which their dispatches began.

        Args:
            name: A name or pattern; None for all names.
            fields: Values that the event's attributes have now.
        """
        return self._values("dispatched", name, fields)

    @overload
    def consumed(self, name: EventName[E], /, **fields: Any) -> list[E]: ...
    @overload
    def consumed(self, name: Name | None = None, /, **fields: Any) -> list[Any]: ...
    def consumed(self, name: Any = None, /, **fields: Any) -> list[Any]:
        """Return the events of the messages that consumers, and ``receive()``, have handled: no listener failed."""
        return self._values("consumed", name, fields)

    def published(self, name: EventName[Any] | Name | None = None, /, **fields: Any) -> list[Message]:
        """Return the messages that publishers took, in order. The fields are those of the payload."""
        return self._values("published", name, fields)

    def dead(self, name: EventName[Any] | Name | None = None, /, **fields: Any) -> list[DeadLetter]:
        """Return the deliveries that consumers gave up, in order. The fields are those of the payload."""
        return self._values("dead", name, fields)

    @overload
    def assert_dispatched(self, name: EventName[E], /, **fields: Any) -> E: ...
    @overload
    def assert_dispatched(self, name: Name, /, **fields: Any) -> Any: ...
    def assert_dispatched(self, name: Any, /, **fields: Any) -> Any:
        """Assert that an event was dispatched here, and return it: see :meth:`dispatched`."""
        __tracebackhide__ = True
        return self._assert("dispatched", name, fields)

    @overload
    def assert_consumed(self, name: EventName[E], /, **fields: Any) -> E: ...
    @overload
    def assert_consumed(self, name: Name, /, **fields: Any) -> Any: ...
    def assert_consumed(self, name: Any, /, **fields: Any) -> Any:
        """Assert that the message of an event was handled, and return the event: see :meth:`consumed`."""
        __tracebackhide__ = True
        return self._assert("consumed", name, fields)

    def assert_published(self, name: EventName[Any] | Name, /, **fields: Any) -> Message:
        """Assert that a publisher took a message, and return it: see :meth:`published`."""
        __tracebackhide__ = True
        message: Message = self._assert("published", name, fields)
        return message

    def assert_dead(self, name: EventName[Any] | Name, /, **fields: Any) -> DeadLetter:
        """Assert that a delivery was given up, and return its dead letter: see :meth:`dead`."""
        __tracebackhide__ = True
        letter: DeadLetter = self._assert("dead", name, fields)
        return letter

    def assert_nothing_else(self, *kinds: Kind) -> None:
        """Assert that each record has met an assertion: of these kinds, or of all four.

        Raises:
            AssertionError: Some have not; the text lists them.
            ValueError: There is no such kind.
        """
        __tracebackhide__ = True
        if unknown := [kind for kind in kinds if kind not in _KINDS]:
            raise ValueError(f"the kinds are {', '.join(_KINDS)}, not {unknown[0]!r}")
        left = [record for record in self._records if record.kind in (kinds or _KINDS) and not record.is_asserted]
        if left:
            found = ", ".join(f"{record.name!s} ({record.kind})" for record in left[:SHOWN])
            raise AssertionError(f"there is more than was asserted: {found}\n{self.draw()}")

    @contextmanager
    def in_order(self) -> Generator[None]:
        """Ask in the ``with`` block for records in the order of the assertions, of whatever kinds; others may stand between."""
        before, self._after = self._after, -1
        try:
            yield
        finally:
            self._after = before

    def draw(self) -> str:
        """Return everything that was recorded as text, each dispatch with its listeners: called or not, and why."""
        if not self._records:
            return (
                "Nothing was recorded."
                if self._watched.dispatchers
                else "Nothing was recorded: watch() a dispatcher first."
            )
        lines = [f"Recorded{f' (the last {SHOWN})' * (len(self._records) > SHOWN)}:"]
        for number, record in list(enumerate(self._records, 1))[-SHOWN:]:
            first, *others = self._draw_record(record)
            lines += [f"{number:>3} {record.kind:<10} {first}", *(f"    {line}" for line in others)]
        return "\n".join(lines)

    def _draw_record(self, record: _Record) -> list[str]:
        if record.dispatch is not None:
            return record.dispatch.draw().splitlines()
        if isinstance(record.value, DeadLetter):
            letter = record.value
            return [f"{str(record.name)!r} in group {letter.group} after {letter.attempts} attempts: {letter.error}"]
        return [
            f"{str(record.name)!r} to {record.value.to or 'the default address'}: {shorten(dict(record.value.payload))}"
        ]

    def _values(self, kind: Kind, name: Any, fields: Mapping[str, Any]) -> list[Any]:
        return [record.value for record in self._records if _matches(record, kind, name, fields)]

    def _assert(self, kind: Kind, name: Any, fields: Mapping[str, Any]) -> Any:
        __tracebackhide__ = True
        first = 0 if self._after is None else self._after + 1
        matching = [(at, record) for at, record in enumerate(self._records) if _matches(record, kind, name, fields)]
        for at, record in matching:
            if at >= first and not record.is_asserted:
                record.is_asserted = True
                if self._after is not None:
                    self._after = at
                return record.value
        wanted = f"{kind}: {name!s}" + (
            f" with {', '.join(f'{key}={value!r}' for key, value in fields.items())}" * bool(fields)
        )
        if not matching:
            problem = f"nothing was {wanted}{self._find_mistake(kind, name, fields)}"
        elif all(record.is_asserted for _, record in matching):
            problem = f"only {len(matching)} asserted before, and no other, was {wanted}"
        else:
            problem = f"not in this order (record {matching[-1][0] + 1} comes before record {first}) was {wanted}"
        raise AssertionError(f"{problem}\n{self.draw()}")

    def _find_mistake(self, kind: Kind, name: Any, fields: Mapping[str, Any]) -> str:
        """Return the end of a sentence if the name, or a field, is none that was recorded but like one; else nothing."""
        named = [record.value for record in self._records if _matches(record, kind, name, {})]
        if not named:
            known = [str(record.name) for record in self._records if record.kind == kind]
            near = get_close_matches(str(name), known, n=1)
            return f"; did you mean {near[0]!r}?" if near else ""
        for field in fields:
            known = list(dict.fromkeys(chain.from_iterable(map(_field_names, named))))
            if field not in known and all(_find(value, field) is _MISSING for value in named):
                return f"; it has no {field!r}{suggest_name(field, known)}"
        return ""

    # -- an observer ----------------------------------------------------------------------------------------

    def before_dispatch(self, dispatch: Dispatch) -> None:
        """Record a dispatch of a watched dispatcher, and watch the publishers of its bridges."""
        dispatch.waited = 0.0  # asks for the measurement
        recorded = self._open[dispatch] = RecordedDispatch(dispatch, within=_call.get())
        incoming = received.get()
        is_received = incoming is not None and incoming.has(dispatch.event)
        kind: Literal["dispatched", "attempt"] = "attempt" if is_received else "dispatched"  # until it has been handled
        self._records.append(_Record(kind, dispatch.name, dispatch.event, dispatch=recorded))
        for listener in dispatch.listeners:
            owner = getattr(inspect.unwrap(listener), "__self__", None)
            if isinstance(owner, Bridge):
                self.watch(owner)

    def after_dispatch(self, dispatch: Dispatch) -> None:
        """Record the end of a dispatch; of a received event, if it was handled."""
        recorded = self._open.pop(dispatch)
        recorded.end(lambda listener: any(each.is_muted(listener) for each in self._stand_ins.values()))
        incoming = received.get()
        is_handled = dispatch.outcome in ("completed", "stopped") and incoming is not None and not incoming.isolated
        for record in reversed(self._records):
            if record.dispatch is recorded:
                if record.kind == "attempt" and is_handled:
                    record.kind = "consumed"
                return

    def before_listener(self, call: Call) -> None:
        """Record the beginning of a call."""
        call.waited = 0.0
        self._open[call.dispatch].calls.append(call)
        self._tokens[call] = _call.set(call)

    def after_listener(self, call: Call) -> None:
        """Record the end of a call."""
        _call.reset(self._tokens.pop(call))

    def after_dead_letter(self, delivery: Delivery, error: DeliveryGivenUp) -> None:
        """Record a dead letter of a consumer."""
        letter = DeadLetter(delivery=delivery, group=error.group, error=error.problem, attempts=error.attempts)
        self._records.append(_Record("dead", error.name, letter))


def _restore(publisher: Any, own: Any) -> None:
    if own is _MISSING:
        del publisher.publish
    else:
        publisher.publish = own


def _matches(record: _Record, kind: Kind, name: Any, fields: Mapping[str, Any]) -> bool:
    if record.kind != kind:
        return False
    if isinstance(name, str) and is_pattern(name):
        if not isinstance(record.name, str) or not compile_pattern(name).fullmatch(f"{record.name!s}."):
            return False
    elif name is not None and record.name != name:
        return False
    return all(_has(record.value, field, wanted) for field, wanted in fields.items())


def _has(value: Any, field: str, wanted: Any) -> bool:
    """Return True if a field of a record has this value; on the wire, also as JSON carries it."""
    found = _find(value, field)
    if found is _MISSING:
        return False
    on_wire = isinstance(value, DeadLetter | Message)
    return bool(found == wanted) or (on_wire and found == _to_json(wanted))


def _find(value: Any, field: str) -> Any:
    """Return the value of a field of a record; _MISSING if it has no such field."""
    if isinstance(value, DeadLetter):
        try:
            value = value.delivery.message()
        except MessageInvalid:
            return _MISSING
    if isinstance(value, Message):
        return value.payload.get(field, _MISSING)
    found = getattr(value, field, _MISSING)
    payload = getattr(value, "payload", None)
    if found is _MISSING and isinstance(payload, Mapping):  # a received event without a class of its own
        found = payload.get(field, _MISSING)
    return found


def _field_names(value: Any) -> Iterable[str]:
    """Return the names of the fields of a record, as far as they are known."""
    payload = getattr(value, "payload", None)
    if isinstance(payload, Mapping):
        return map(str, payload)
    declared = declared_fields(type(value))
    own = getattr(value, "__dict__", {}) if declared is None else declared
    return (name for name in own if not name.startswith("_") and name not in ENVELOPE)


def _to_json(value: Any) -> Any:
    try:
        return to_json_value(value)
    except Unwritable:
        return _MISSING
