"""Traces with OpenTelemetry: a span for each dispatch, listener, publish, batch of a relay, attempt, retry and dead letter.

The message carries the trace in its headers ``traceparent`` and ``tracestate``, so one trace shows the request in one process
and the listeners in the others (``pip install 'silbo[otel]'``)::

    instrument(dispatcher, relay=outbox)

The spans of messages have the names and attributes of OpenTelemetry's conventions for messaging systems, of the version in
:data:`SCHEMA_URL`. These are still in development, so the names may change with a version of silbo, and the URL with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from contextvars import Token
from dataclasses import replace
from importlib.metadata import version
from typing import Any, Final

from silbo._causes import CORRELATION
from silbo._checks import require_extra
from silbo._message_observers import Attempt, Publishing, RelayedBatch, find_observers
from silbo.bridge import Bridge
from silbo.consumer.receive import open_delivery
from silbo.dispatch.dispatcher import AsyncEventDispatcher
from silbo.dispatch.listeners import Registration
from silbo.dispatch.observers import Call, Dispatch
from silbo.dispatch.source import find_source
from silbo.errors import DeliveryGivenUp, MessageInvalid, MessageRefused
from silbo.instrumentation.declared_names import DeclaredNames
from silbo.message import Delivery, Headed, Message
from silbo.outbox.outbox import Outbox
from silbo.outbox.relay import Relay
from silbo.protocols import Subscription

with require_extra("silbo.instrumentation.opentelemetry", extra="otel", libraries=("opentelemetry",)):
    from opentelemetry import context as contexts
    from opentelemetry import trace
    from opentelemetry.baggage.propagation import W3CBaggagePropagator
    from opentelemetry.context import Context
    from opentelemetry.trace import Link, Span, SpanContext, SpanKind, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

__all__ = ["SCHEMA_URL", "instrument"]

SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.44.0"
"""The version of OpenTelemetry's conventions that the names of spans and attributes are of."""
LATE: Final = 10.0
"""Seconds. An attempt after a longer pause, or after an attempt of another consumer, begins a trace of its own and links to the
sender: most tracing systems take a trace for complete after some seconds."""
LONGEST: Final = 512
"""Characters of a trace header that are read or sent: as many as W3C demands."""
LONGEST_BAGGAGE: Final = 8_192
"""Characters of a baggage header that are sent: as many as W3C demands, and as OpenTelemetry reads."""
LINKS: Final = 128
"""Links of a span at most; the SDK keeps no more by default."""
REMEMBERED: Final = 1_000
"""Sources of listeners, and failed attempts that are not settled yet, that are remembered at most."""
_TRACE_HEADERS: Final = ("traceparent", "tracestate")
_SYSTEMS: Final = {"azure": "servicebus", "memory": "silbo"}
"""The ``messaging.system`` of brokers that are not called as their module is."""

_trace_context = TraceContextTextMapPropagator()
_baggage = W3CBaggagePropagator()


def instrument(
    dispatcher: AsyncEventDispatcher | None = None,
    *,
    relay: Relay | Outbox | None = None,
    names: Iterable[str] = (),
    baggage: bool = False,
    tracer_provider: trace.TracerProvider | None = None,
) -> Registration:
    """Make spans for all that a dispatcher, its bridges, its consumers and a relay do from now on.

    Spans are made around dispatches, listeners, publishes (``publish``, or ``store`` with an outbox), attempts of deliveries
    (``process``), and for reads (``receive``), batches of a relay (``relay``), failed attempts (``retry``) and dead letters
    (``bury``). Each message that a bridge sends has the W3C trace context of its publish in its headers.

    Args:
        dispatcher: The dispatcher; its bridges and consumers may be added later.
        relay: The relay; or the outbox, if that has one.
        names: Event names that stand in span names, beside those that the dispatcher declares and those that are dispatched or heard as
            an EventName. All others are ``other`` there.
        baggage: Send the baggage of OpenTelemetry, too, and give it to the listeners on the other side. It then lies in Redis
            and in outboxes, for everybody who reads these.
        tracer_provider: Makes the spans; OpenTelemetry's global one by default.

    Returns:
        The registration; its ``remove()`` ends the instrumentation.

    Raises:
        ValueError: The dispatcher is instrumented already, so each span would be made twice; or there is nothing to instrument.
    """
    if dispatcher is None and relay is None:
        raise ValueError("nothing to instrument: give a dispatcher, a relay, or both")
    if any(isinstance(observer, _Spans) for observer in find_observers(dispatcher)):
        raise ValueError("the dispatcher is instrumented already, and two registrations make each span twice")
    tracer = trace.get_tracer("silbo", version("silbo"), tracer_provider, SCHEMA_URL)
    spans = _Spans(tracer, DeclaredNames(names), dispatcher, baggage=baggage)
    with ExitStack() as registrations:
        if dispatcher is not None:
            registrations.enter_context(dispatcher.observe(spans))
        if relay is not None:
            registrations.enter_context(relay.observe(spans))
        return Registration(registrations.pop_all().close)
    raise AssertionError  # for mypy: an ExitStack might swallow errors


class _Spans:
    """An observer that makes spans."""

    def __init__(
        self, tracer: trace.Tracer, names: DeclaredNames, dispatcher: AsyncEventDispatcher | None, *, baggage: bool
    ) -> None:
        self._tracer = tracer
        self._names = names
        self._dispatcher = dispatcher
        self._with_baggage = baggage
        self._open: dict[object, tuple[Span, Token[Context]]] = {}
        self._sources: dict[
            int, tuple[object, str, Mapping[str, Any]]
        ] = {}  # by the id of the listener, which they hold
        self._failed: dict[tuple[str, str], tuple[Attempt, SpanContext]] = {}  # by address and id: attempts to settle

    # -- dispatch and listeners -----------------------------------------------------------------------------

    def before_dispatch(self, dispatch: Dispatch) -> None:
        """Begin the span of a dispatch."""
        attributes = {} if not isinstance(dispatch.name, str) else {"silbo.event.name": str(dispatch.name)}
        self._begin(dispatch, self._tracer.start_span(f"dispatch {self._label(dispatch.name)}", attributes=attributes))

    def after_dispatch(self, dispatch: Dispatch) -> None:
        """End the span of a dispatch."""
        self._end(dispatch)

    def before_listener(self, call: Call) -> None:
        """Begin the span of a listener. A bridge has none: its publishes have."""
        if isinstance(getattr(call.listener, "__self__", None), Bridge):
            return
        name, attributes = self._describe(call.listener)
        span = self._tracer.start_span(f"listener {name}", attributes=attributes)
        if call.plugin:
            span.set_attribute("silbo.plugin", call.plugin)
        self._begin(call, span)

    def after_listener(self, call: Call) -> None:
        """End the span of a listener."""
        self._end(call, with_exception=True)

    # -- a message on its way -------------------------------------------------------------------------------

    def before_publish(self, publishing: Publishing) -> None:
        """Begin the span of a publish, and write its context into the headers of the message."""
        message = publishing.message
        is_stored = isinstance(publishing.publisher, Outbox)
        operation = "store" if is_stored else "publish"
        attributes = {
            **self._of_operation(operation, "create" if is_stored else "send", publishing.publisher),
            **_of_message(message.message_id, message, publishing.name),
        }
        if (address := _find_address(publishing.publisher, message)) is not None:
            attributes["messaging.destination.name"] = address
        name = f"{operation} {self._label(publishing.name)}"
        self._begin(publishing, self._tracer.start_span(name, kind=SpanKind.PRODUCER, attributes=attributes))
        carrier: dict[str, str] = {}
        _trace_context.inject(carrier)
        if self._with_baggage:
            _baggage.inject(carrier)
        headers = {name: value for name, value in carrier.items() if len(value) <= _longest(name)}
        kept = message.headers
        if "traceparent" in headers:  # a tracestate of the host's belongs to another traceparent, and goes with it
            kept = {name: value for name, value in kept.items() if name not in _TRACE_HEADERS}
        publishing.message = replace(message, headers={**kept, **headers})

    def after_publish(self, publishing: Publishing) -> None:
        """End the span of a publish."""
        self._end(publishing, with_exception=True)

    def before_relay(self, batch: RelayedBatch) -> None:
        """Begin the span of a batch that a relay sends. It has links to the messages, and no parent."""
        attributes = {
            **self._of_operation("relay", "send", batch.publisher),
            "messaging.batch.message_count": len(batch.messages),
        }
        self._begin(batch, self._start_batch("relay", attributes, batch.messages))

    def after_relay(self, batch: RelayedBatch) -> None:
        """End the span of a batch."""
        self._end(batch, with_exception=True)

    # -- deliveries -----------------------------------------------------------------------------------------

    def after_receive(self, deliveries: Sequence[Delivery], subscription: Subscription) -> None:
        """Make the span of a read that has brought deliveries. It has links to their senders, and no parent."""
        attributes = {
            **self._of_operation("receive", "receive", subscription),
            "messaging.batch.message_count": len(deliveries),
        }
        self._start_batch("receive", attributes, _read_envelopes(deliveries[:LINKS])).end()

    def before_attempt(self, attempt: Attempt) -> None:
        """Begin the span of an attempt: a child of the sender's, unless it is late; with a link to the sender in any case."""
        delivery = attempt.delivery
        late = delivery.attempt > 1 and (attempt.pause is None or attempt.pause > LATE)
        without = self._read_baggage(attempt.headers)
        sender = _read_sender(attempt.headers)
        parent = (
            without if late or sender is None else trace.set_span_in_context(trace.NonRecordingSpan(sender), without)
        )
        span = self._tracer.start_span(
            f"process {self._label(attempt.name)}",
            context=parent,
            kind=SpanKind.CONSUMER,
            links=_link(sender),
            attributes={
                **self._of_operation("process", "process", attempt.subscription),
                **_of_delivery(delivery),
                "silbo.attempt": attempt.number,
                **_of_message(attempt.message_id, attempt, attempt.name),
            },
        )
        self._begin(attempt, span, without)

    def after_attempt(self, attempt: Attempt) -> None:
        """End the span of an attempt. Of one that has failed, its retry or burial has to find it."""
        span = self._end(attempt)
        delivery = attempt.delivery
        if span is not None and attempt.outcome == "failed" and delivery.id:
            if len(self._failed) >= REMEMBERED:  # most of them another consumer has by now
                del self._failed[next(iter(self._failed))]
            self._failed[delivery.address, delivery.id] = attempt, span.get_span_context()

    def after_retry(self, delivery: Delivery, error: BaseException, delay: float) -> None:
        """Make the span of a failed attempt that is followed by another one."""
        self._settle("retry", delivery, error, {"silbo.retry.delay": delay})

    def after_dead_letter(self, delivery: Delivery, error: DeliveryGivenUp) -> None:
        """Make the span of a delivery that has become a dead letter."""
        attributes = {"silbo.attempt": error.attempts, "messaging.consumer.group.name": error.group}
        self._settle("bury", delivery, error.__cause__ or error, attributes)

    def _settle(self, operation: str, delivery: Delivery, error: BaseException, attributes: Mapping[str, Any]) -> None:
        """Make the span of a settlement: a child of the attempt's. Without an attempt it has only its link to the sender."""
        attempt, failed = self._failed.pop((delivery.address, delivery.id), (None, None))
        sender: SpanContext | None
        about: dict[str, Any]
        if attempt is None:
            [*envelopes] = _read_envelopes([delivery])
            sender = _read_sender(envelopes[0].headers) if envelopes else None
            about = _of_message(envelopes[0].message_id, envelopes[0], None) if envelopes else {}
        else:
            sender = _read_sender(attempt.headers)
            about = _of_message(attempt.message_id, attempt, attempt.name) | {"silbo.attempt": attempt.number}
        name = operation if attempt is None else f"{operation} {self._label(attempt.name)}"
        span = self._tracer.start_span(
            name,
            context=Context()
            if failed is None
            else trace.set_span_in_context(trace.NonRecordingSpan(failed), Context()),
            kind=SpanKind.CLIENT,
            links=_link(sender),
            attributes={
                **self._of_operation(operation, "settle", None if attempt is None else attempt.subscription),
                **_of_delivery(delivery),
                **about,
                **attributes,
            },
        )
        _note_error(span, error)
        span.end()

    # -- spans ----------------------------------------------------------------------------------------------

    def _begin(self, record: object, span: Span, context: Context | None = None) -> None:
        """Make a span the current one until :meth:`_end` with the same record."""
        self._open[record] = span, contexts.attach(trace.set_span_in_context(span, context))

    def _end(self, record: Any, *, with_exception: bool = False) -> Span | None:
        """End the span of a record with its outcome; return it."""
        span, token = self._open.pop(record, (None, None))
        if span is None or token is None:
            return None
        contexts.detach(token)
        try:
            span.set_attribute("silbo.outcome", record.outcome)
            if record.outcome == "failed":
                _note_error(span, record.error)
                if with_exception:
                    span.record_exception(record.error)
        finally:
            span.end()
        return span

    def _start_batch(self, name: str, attributes: Mapping[str, Any], messages: Iterable[Headed]) -> Span:
        """Start a span without a parent. Its links are only made if it is recorded."""
        span = self._tracer.start_span(name, context=Context(), kind=SpanKind.CLIENT, attributes=attributes)
        if span.is_recording():
            found = (_read_sender(message.headers) for message in messages)
            for sender, _ in zip((one for one in found if one is not None), range(LINKS), strict=False):
                span.add_link(sender)
        return span

    def _label(self, name: object) -> str:
        """Return an event name as it stands in the name of a span."""
        return self._names.label(name, self._dispatcher)

    def _describe(self, listener: Any) -> tuple[str, Mapping[str, Any]]:
        """Return the name of a listener, and the attributes of its source."""
        found = self._sources.get(id(listener))
        if found is None:
            source = find_source(listener)
            attributes: dict[str, Any] = {"code.function.name": f"{source.module}.{source.name}".strip(".")}
            file, _, line = source.place.rpartition(":")
            if file:
                attributes |= {"code.file.path": file, "code.line.number": int(line)}
            if len(self._sources) >= REMEMBERED:
                self._sources.clear()
            found = self._sources[id(listener)] = listener, source.name, attributes
        return found[1:]

    def _of_operation(self, name: str, kind: str, adapter: object) -> dict[str, Any]:
        """Return the attributes of an operation on a publisher, or on what a subscription describes."""
        attributes = {
            "messaging.system": _find_system(adapter),
            "messaging.operation.name": name,
            "messaging.operation.type": kind,
        }
        group = getattr(adapter, "name", None)
        if isinstance(group, str) and group:
            attributes["messaging.consumer.group.name"] = group
        return attributes

    def _read_baggage(self, headers: Mapping[str, str]) -> Context:
        """Return a context without a span; with the sender's baggage if that was asked for."""
        return _baggage.extract(headers, Context()) if self._with_baggage else Context()


def _of_message(message_id: str, headed: Any, name: object) -> dict[str, Any]:
    """Return the attributes of a message: its id, its conversation, and the event name."""
    attributes = {
        "messaging.message.id": message_id,
        "messaging.message.conversation_id": headed.headers.get(CORRELATION, message_id),
    }
    if isinstance(name, str):
        attributes["silbo.event.name"] = str(name)
    return attributes


def _of_delivery(delivery: Delivery) -> dict[str, Any]:
    attributes: dict[str, Any] = {"messaging.destination.name": delivery.address}
    if delivery.id:
        attributes["silbo.delivery.id"] = delivery.id
    return attributes


def _longest(header: str) -> int:
    return LONGEST if header in _TRACE_HEADERS else LONGEST_BAGGAGE


def _read_sender(headers: Mapping[str, str]) -> SpanContext | None:
    """Return the span that a message was sent in; None if its headers tell of none, or are not what W3C allows.

    Anybody may have written them. A tracestate that is too long is left out.
    """
    given = {
        name: value
        for name in _TRACE_HEADERS
        if (value := headers.get(name)) is not None
        and len(value) <= LONGEST
        and value.isascii()
        and value.isprintable()
    }
    sender = trace.get_current_span(_trace_context.extract(given, Context())).get_span_context()
    return sender if sender.is_valid else None


def _link(sender: SpanContext | None) -> list[Link]:
    return [] if sender is None else [Link(sender)]


def _read_envelopes(deliveries: Iterable[Delivery]) -> Iterable[Headed]:
    """Yield the messages of deliveries, without those that are malformed."""
    for delivery in deliveries:
        try:
            yield open_delivery(delivery)
        except MessageInvalid:
            continue


def _find_address(publisher: Any, message: Message) -> str | None:
    """Return the address that a message goes to, in the end; None if its publisher does not tell, or will refuse it."""
    broker = publisher.publisher if isinstance(publisher, Outbox) else publisher
    find: Callable[[Message], str] | None = getattr(broker, "address_of", None)
    try:
        return None if find is None else find(message)
    except MessageRefused:
        return None


def _find_system(adapter: Any) -> str:
    """Return the ``messaging.system`` of a publisher or a subscription; ``silbo`` for one that silbo does not know."""
    if isinstance(adapter, Outbox):
        adapter = adapter.publisher
    for cls in type(adapter).__mro__:
        if cls.__module__.startswith("silbo.brokers."):
            broker = cls.__module__.split(".")[2]
            return _SYSTEMS.get(broker, broker)
    return "silbo"


def _note_error(span: Span, error: BaseException | None) -> None:
    """Write an error's type into a span. Its text stays out: it may have something of a payload in it."""
    kind = type(error)
    span.set_attribute(
        "error.type", kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    )
    span.set_status(StatusCode.ERROR)
