"""The formats of messages as bytes: ``JSON`` is silbo's own and the default; ``DIATOR`` and ``CLOUDEVENTS`` are a choice.

Received bytes are checked before they are used: size, depth, UTF-8, required keys, types. Unknown keys are ignored, so that
old programs read new messages. If a key occurs twice, the last value counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from operator import attrgetter
from typing import Annotated, Any, Final, Literal, TypeVar
from uuid import NAMESPACE_URL, UUID, uuid5

import msgspec

from silbo.errors import HeaderInvalid, MessageInvalid, MessageRefused
from silbo.message import Headed, Message, Origin
from silbo.names import MAX_NAME_LENGTH
from silbo.wire.encode import EVENT_CLASSES, JSON_SCALARS, MAX_DEPTH, MAX_SIZE, Unwritable, format_time, to_json_value
from silbo.wire.faults import MSGSPEC_ERRORS, is_too_deep, to_message_invalid

__all__ = [
    "CLOUDEVENTS",
    "DIATOR",
    "JSON",
    "CloudEventsFormat",
    "DiatorFormat",
    "EncodedMessage",
    "Envelope",
    "JsonFormat",
    "make_encoded_message",
    "open_envelope",
    "to_json",
]

_T = TypeVar("_T")
_encode = msgspec.json.Encoder(enc_hook=dict).encode  # any Mapping is a payload


# -- silbo's own --------------------------------------------------------------------------------------------


class _Record(msgspec.Struct):
    message_type: str
    message_name: Annotated[str, msgspec.Meta(max_length=MAX_NAME_LENGTH)]
    message_id: str
    payload: dict[str, Any]
    headers: dict[str, str] = {}


class Envelope(Headed, msgspec.Struct):
    """A message whose payload is not decoded yet: most of a consumer's questions are about the rest."""

    message_type: str
    message_name: Annotated[str, msgspec.Meta(max_length=MAX_NAME_LENGTH)]
    message_id: str
    payload: msgspec.Raw
    headers: Mapping[str, str] = {}


class EncodedMessage(Message):
    """A message of which the bytes in the format JSON are known, with its origin. They are read when a field is looked at.

    A changed copy, as of ``dataclasses.replace``, is a plain Message.

    Attributes:
        raw: The bytes.
    """

    __slots__ = ("raw",)

    raw: bytes

    def __new__(cls, *values: Any, **fields: Any) -> Message:  # type: ignore[misc]  # for a changed copy
        """Make a plain Message."""
        return Message(*values, **fields)

    def __getattr__(self, name: str) -> Any:  # of a field that has no value yet
        if name not in _Record.__struct_fields__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        try:
            record = _records.decode(self.raw)
        except MSGSPEC_ERRORS as error:
            raise MessageRefused("(unreadable)", f"it can't be read: {error}") from None
        for field in _Record.__struct_fields__:
            _set_field(self, field, getattr(record, field))
        return getattr(self, name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Message) and _values_of(self) == _values_of(other)

    __hash__ = Message.__hash__

    def __reduce__(self) -> tuple[Any, ...]:
        return Message, _values_of(self)


_set_field: Final = object.__setattr__  # a Message is frozen
_new: Final = object.__new__
_set_raw: Final = EncodedMessage.__dict__["raw"].__set__
_set_to: Final = Message.__dict__["to"].__set__
_set_class_name: Final = Message.__dict__["class_name"].__set__
_set_shards: Final = Message.__dict__["shards"].__set__


def make_encoded_message(raw: bytes, to: str | None, class_name: str, shards: int = 0) -> EncodedMessage:
    """Return an EncodedMessage of its bytes, and of the three fields that they don't have."""
    message = _new(EncodedMessage)
    _set_raw(message, raw)
    _set_to(message, to)
    _set_class_name(message, class_name)
    _set_shards(message, shards)
    return message


_values_of: Final = attrgetter(*(field.name for field in fields(Message)))
_records = msgspec.json.Decoder(_Record)
_envelopes = msgspec.json.Decoder(Envelope)
open_envelope: Final = _envelopes.decode
"""Does what ``JSON.open`` does with bytes that it accepts, in half the time. Raises msgspec's errors, and looks at no size."""
_payloads = msgspec.json.Decoder(dict[str, Any])


class _ByEventName:
    """The channels of formats whose ``message_name`` is the event name."""

    names: Literal["event", "class"] = "event"
    content_type = "application/json"

    def channel(self, message: Message, prefix: str) -> str:
        """Return ``{prefix}:{message_type}:{event name}``, or ``{prefix}:{address}`` if a route chose an address."""
        return f"{prefix}:{message.to or f'{message.message_type}:{message.message_name}'}"

    def channels(self, pattern: str, prefix: str) -> Sequence[str]:
        """Return a pattern for each kind, escaped for PSUBSCRIBE; without ``*`` in the name each is a channel."""
        glob = re.sub(r"\.?\*\*\.?|\*+", "*", re.sub(r"([?\[\]\\])", r"\\\1", pattern))
        return [f"{prefix}:{kind}:{glob}" for kind in EVENT_CLASSES]


class JsonFormat(_ByEventName):
    """silbo's own format: message_type, message_name, message_id, payload, headers."""

    def encode(self, message: Message, origin: Origin) -> bytes:
        """Return the bytes, see :class:`~silbo.message.Format`; an origin in the message's headers is kept."""
        if type(message) is EncodedMessage:
            return message.raw
        return to_json(
            message,
            {
                "message_type": message.message_type,
                "message_name": message.message_name,
                "message_id": message.message_id,
                "payload": message.payload,
                "headers": {"app": origin.app, "instance": origin.instance, **message.headers},
            },
        )

    def decode(self, raw: bytes) -> Message:
        """Return the message, see :class:`~silbo.message.Format`; ``headers`` may be missing."""
        return self.complete(self.open(raw), raw)

    def open(self, raw: bytes) -> Envelope:
        """Return the message with its payload as it is: that may be malformed.

        Raises:
            MessageInvalid: the rest is.
        """
        return _decode(raw, _envelopes, _Record)

    def complete(self, envelope: Envelope, raw: bytes) -> Message:
        """Return the message of an envelope and the bytes that it was read from.

        Raises:
            MessageInvalid: the payload is malformed.
        """
        payload = _decode_payload(envelope, raw)
        return Message(envelope.message_type, envelope.message_name, envelope.message_id, payload, envelope.headers)


# -- Diator -------------------------------------------------------------------------------------------------


class DiatorFormat:
    """The format of Diator 0.1.2: four keys, the class name as ``message_name``, a naive UTC ``event_timestamp``.

    It has no headers, so no publication, version, key or origin: a process can't recognise its own messages.

    Args:
        prefix: The prefix of its channels, in place of the broker's.
    """

    names: Literal["event", "class"] = "class"
    content_type = "application/json"

    def __init__(self, prefix: str = "python_diator_channel") -> None:
        self.prefix = prefix

    def encode(self, message: Message, origin: Origin) -> bytes:  # the format has no place for the origin
        """Return the bytes, see :class:`~silbo.message.Format`."""
        payload = dict(message.payload)
        when = payload.get("event_timestamp")
        if isinstance(when, str):
            payload["event_timestamp"] = when.removesuffix("Z")
        return to_json(
            message,
            {
                "message_type": message.message_type,
                "message_name": message.class_name or message.message_name,
                "message_id": message.message_id,
                "payload": payload,
            },
        )

    def decode(self, raw: bytes) -> Message:
        """Return the message, see :class:`~silbo.message.Format`; the class name is its ``message_name`` and ``class_name``."""
        envelope = _decode(raw, _envelopes, _Record)
        name = envelope.message_name
        payload = _decode_payload(envelope, raw)
        return Message(envelope.message_type, name, envelope.message_id, payload, class_name=name)

    def channel(self, message: Message, prefix: str) -> str:
        """Return Diator's channel, one for each message, or ``{prefix}:{address}`` if a route chose an address."""
        return f"{prefix}:{message.to}" if message.to else f"{self.prefix}:{message.message_type}:{message.message_id}"

    def channels(self, pattern: str, prefix: str) -> Sequence[str]:
        """Return a pattern for all messages of each kind: Diator's channels do not contain the name."""
        return [f"{self.prefix}:{kind}:*" for kind in EVENT_CLASSES]


# -- CloudEvents --------------------------------------------------------------------------------------------

_ATTRIBUTE_OF: Final = {
    "app": "source",
    "instance": "silboinstance",
    "version": "silboversion",
    "publication": "silbopublication",
    "key": "partitionkey",  # the extension of CloudEvents for routing keys
}
_HEADER_OF: Final[dict[str, str]] = {attribute: header for header, attribute in _ATTRIBUTE_OF.items()}
_CONTEXT: Final = frozenset(
    {"specversion", "id", "source", "type", "time", "datacontenttype", "dataschema", "subject", "data", "data_base64"}
)
_NOT_HEADERS: Final = _CONTEXT | {"silbokind"}
_IS_ATTRIBUTE: Final = re.compile("[a-z0-9]+").fullmatch
_HAS_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f]").search


class _CloudEvent(msgspec.Struct):
    specversion: Literal["1.0"]
    id: Annotated[str, msgspec.Meta(min_length=1)]
    source: Annotated[str, msgspec.Meta(min_length=1)]
    type: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME_LENGTH)]
    data: dict[str, Any]
    time: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    silbokind: str = "notification_event"


class CloudEventsFormat(_ByEventName):
    """CloudEvents 1.0 as JSON in structured mode: the payload is ``data``, the event name ``type``, the app ``source``.

    The rest goes into extension attributes: ``silbokind``, ``silboinstance``, ``silboversion``, ``silbopublication``; the key
    into ``partitionkey``. Events of other producers are read as notifications. From an ``id`` that is not a UUID, and
    ``source``, an ``event_id`` is made, always the same.

    Source: CloudEvents 1.0.2, its JSON event format, and its partitioning extension.
    """

    content_type = "application/cloudevents+json"
    _decoder = msgspec.json.Decoder(dict[str, Any])

    def check_header(self, name: str, value: str) -> None:
        """Refuse a header of a route that :meth:`encode` would refuse.

        Raises:
            HeaderInvalid: the name or the value can't be in CloudEvents.
        """
        if name in _NOT_HEADERS or name in _HEADER_OF:
            raise HeaderInvalid(name, "CloudEvents have an attribute of that name, so choose another one")
        if not _IS_ATTRIBUTE(name):
            raise HeaderInvalid(name, "CloudEvents carry only names of lower-case letters and digits, as 'tenant'")
        if _HAS_CONTROL(value):
            raise HeaderInvalid(name, "CloudEvents carry no control characters")

    def encode(self, message: Message, origin: Origin) -> bytes:
        """Return the bytes, see :class:`~silbo.message.Format`; an origin in the message's headers is kept."""
        record: dict[str, Any] = {
            "specversion": "1.0",
            "id": message.message_id,
            "source": origin.app,
            "type": message.message_name,
            "datacontenttype": "application/json",
            "silbokind": message.message_type,
            "silboinstance": origin.instance,
        }
        if (when := message.payload.get("event_timestamp")) is not None:
            record["time"] = when
        for header, value in message.headers.items():
            attribute = _ATTRIBUTE_OF.get(header, header)
            if header not in _ATTRIBUTE_OF and (
                attribute in record or attribute in _CONTEXT or not _IS_ATTRIBUTE(header)
            ):
                raise MessageRefused(message.message_name, f"CloudEvents can't carry a header {header!r}")
            if value:
                record[attribute] = value
        for attribute, value in record.items():
            if not value or _HAS_CONTROL(value):
                raise MessageRefused(message.message_name, f"CloudEvents can't carry {attribute} {value!r}")
        record["data"] = message.payload
        return to_json(message, record)

    def decode(self, raw: bytes) -> Message:
        """Return the message, see :class:`~silbo.message.Format`."""
        record = _decode(raw, self._decoder, dict[str, Any])
        try:
            event = msgspec.convert(record, _CloudEvent)
        except MSGSPEC_ERRORS as error:
            raise _find_wrong_key(record, _CloudEvent) or to_message_invalid(error) from None
        payload = event.data
        _check_depth(payload, "data")
        if "event_id" not in payload and not _is_uuid(event.id):
            payload["event_id"] = str(uuid5(NAMESPACE_URL, f"{event.source}#{event.id}"))
        if "event_timestamp" not in payload and event.time is not None:
            try:
                payload["event_timestamp"] = format_time(event.time)
            except ValueError as error:
                raise MessageInvalid(str(error), field="time") from None
        headers: dict[str, str] = {
            _HEADER_OF.get(attribute, attribute): value
            for attribute, value in record.items()
            if isinstance(value, str) and (attribute in _HEADER_OF or attribute not in _NOT_HEADERS)
        }
        version = record.get("silboversion")
        if type(version) is int:  # from a producer that is not silbo: CloudEvents has integers
            headers["version"] = str(version)
        return Message(event.silbokind, event.type, event.id, payload, headers)


# -- JSON and back ------------------------------------------------------------------------------------------


def to_json(message: Message, record: dict[str, Any]) -> bytes:
    """Return a record of a message as JSON bytes.

    Args:
        message: The message, for its payload and the name in errors.
        record: The JSON object that a format makes of it.

    Raises:
        MessageRefused: a value can't be written as JSON, the bytes are more than MAX_SIZE, or the name is too long.
    """
    name = message.message_name
    if len(name) > MAX_NAME_LENGTH:
        raise MessageRefused(f"{name[:60]}...", f"its name has {len(name)} characters, more than {MAX_NAME_LENGTH}")
    try:
        for value in message.payload.values():
            if type(value) not in JSON_SCALARS:
                to_json_value(value)  # msgspec would write null for a NaN
        raw = _encode(record)
    except (Unwritable, TypeError, *MSGSPEC_ERRORS) as error:
        raise _find_unwritable(message, error) from None
    if len(raw) > MAX_SIZE:
        raise MessageRefused(message.message_name, f"{len(raw)} bytes as JSON, more than {MAX_SIZE}")
    return raw


def _find_unwritable(message: Message, error: Exception) -> MessageRefused:
    try:
        to_json_value(message.payload, 1)
    except Unwritable as found:
        return MessageRefused(message.message_name, found.problem, field=found.path)
    return MessageRefused(message.message_name, f"can't be written as JSON: {error}")


def _decode(raw: bytes, decoder: msgspec.json.Decoder[_T], kind: Any) -> _T:
    """Decode bytes; ``kind`` is the type that names the fault in bytes that are refused."""
    if len(raw) > MAX_SIZE:
        raise MessageInvalid(f"{len(raw)} bytes, more than {MAX_SIZE}")
    try:
        return decoder.decode(raw)
    except MSGSPEC_ERRORS as error:
        raise _find_fault(raw, kind, error) from None


def _decode_payload(envelope: Envelope, raw: bytes) -> dict[str, Any]:
    """Decode the payload of an envelope that was read from these bytes."""
    try:
        payload = _payloads.decode(envelope.payload)
    except MSGSPEC_ERRORS as error:
        raise _find_fault(raw, _Record, error) from None
    _check_depth(payload, "payload")
    return payload


def _find_fault(raw: bytes, kind: Any, error: Exception) -> MessageInvalid:
    """Find the fault in bytes that msgspec refused: its errors and their texts differ between releases."""
    try:
        raw.decode()
        msgspec.json.decode(raw, type=kind)
    except UnicodeDecodeError as found:
        return to_message_invalid(found)
    except MSGSPEC_ERRORS as found:
        # With its traceback this frame, and the bytes, would stay until the garbage is collected.
        error = found.with_traceback(None)
    if not isinstance(error, msgspec.ValidationError):
        return to_message_invalid(error)
    try:
        record = msgspec.json.decode(raw)
    except MSGSPEC_ERRORS as found:
        return to_message_invalid(error if isinstance(found, msgspec.ValidationError) else found)
    return _find_wrong_key(record, kind) or to_message_invalid(error)


def _find_wrong_key(record: Any, kind: Any) -> MessageInvalid | None:
    """Find the first required key that a record lacks, or the first value that does not fit; None if there is neither."""
    if not isinstance(record, dict):
        return MessageInvalid("not a JSON object")
    for field in msgspec.structs.fields(kind) if isinstance(kind, type) else ():  # not those of dict[str, Any]
        name = field.encode_name
        if name not in record:
            if field.required:
                return MessageInvalid("missing", field=name)
            continue
        try:
            msgspec.convert(record[name], field.type)
        except MSGSPEC_ERRORS as error:
            return to_message_invalid(error, under=name)
    return None


def _check_depth(payload: dict[str, Any], field: str) -> None:
    if is_too_deep(payload):
        raise MessageInvalid(f"nested more than {MAX_DEPTH} levels deep", field=field)


def _is_uuid(text: str) -> bool:
    try:
        UUID(text)
    except ValueError:
        return False
    return True


JSON: Final = JsonFormat()
DIATOR: Final = DiatorFormat()
CLOUDEVENTS: Final = CloudEventsFormat()
