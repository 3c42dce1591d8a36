"""The formats: a Message as bytes and back. ``JSON`` is silbo's own; ``DIATOR`` and ``CLOUDEVENTS`` by choice.

What comes in is checked before it is used: size, depth, UTF-8, required keys, types. Unknown keys are ignored, so that
old programs read new messages; of a key that is there twice, the last counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Final, Literal, TypeVar
from uuid import NAMESPACE_URL, UUID, uuid5

import msgspec

from silbo.errors import MessageInvalid, MessageRefused
from silbo.message import Message, Origin
from silbo.wire.encode import (
    MAX_DEPTH,
    MAX_SIZE,
    UNCHANGED,
    UNREADABLE,
    Unwritable,
    invalid,
    is_too_deep,
    plain,
    timestamp,
)

__all__ = ["CLOUDEVENTS", "DIATOR", "JSON", "CloudEventsFormat", "DiatorFormat", "JsonFormat", "to_json"]

MESSAGE_TYPES: Final = ("notification_event", "ecst_event")

_T = TypeVar("_T")
_encode = msgspec.json.Encoder(enc_hook=dict).encode  # any Mapping is a payload


# -- silbo's own --------------------------------------------------------------------------------------------


class _Record(msgspec.Struct):
    message_type: str
    message_name: str
    message_id: str
    payload: dict[str, Any]
    headers: dict[str, str] = {}


class _ByEventName:
    """Channels of the formats whose ``message_name`` is the event name."""

    names: Literal["event", "class"] = "event"
    content_type = "application/json"

    def channel(self, message: Message, prefix: str) -> str:
        """``{prefix}:{message_type}:{event name}``, or ``{prefix}:{address}`` where a route chose one."""
        return f"{prefix}:{message.to or f'{message.message_type}:{message.message_name}'}"

    def channels(self, pattern: str, prefix: str) -> Sequence[str]:
        """One for each kind; without ``*`` in the name they are channels, escaped as PSUBSCRIBE wants it."""
        glob = re.sub(r"\.?\*\*\.?|\*+", "*", re.sub(r"([?\[\]\\])", r"\\\1", pattern))
        return [f"{prefix}:{kind}:{glob}" for kind in MESSAGE_TYPES]


class JsonFormat(_ByEventName):
    """silbo's own: message_type, message_name, message_id, payload, headers."""

    _decoder = msgspec.json.Decoder(_Record)

    def encode(self, message: Message, origin: Origin) -> bytes:
        """See :class:`~silbo.message.Format`. An origin that the message carries already is kept."""
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
        """See :class:`~silbo.message.Format`. ``headers`` may be missing."""
        record = _read(raw, self._decoder)
        _check_depth(record.payload, "payload")
        return Message(record.message_type, record.message_name, record.message_id, record.payload, record.headers)


# -- Diator -------------------------------------------------------------------------------------------------


class DiatorFormat:
    """What Diator 0.1.2 sends: four keys, the class name as ``message_name``, a naive UTC ``event_timestamp``.

    It has no headers, so no publication, version, key or origin: a process can't tell its own messages.

    Args:
        prefix: Of its channels, in place of the broker's.
    """

    names: Literal["event", "class"] = "class"
    content_type = "application/json"
    _decoder = msgspec.json.Decoder(_Record)

    def __init__(self, prefix: str = "python_diator_channel") -> None:
        self.prefix = prefix

    def encode(self, message: Message, origin: Origin) -> bytes:  # it has no place for it
        """See :class:`~silbo.message.Format`."""
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
        """See :class:`~silbo.message.Format`. Its ``message_name`` is ``class_name`` as well."""
        record = _read(raw, self._decoder)
        _check_depth(record.payload, "payload")
        name = record.message_name
        return Message(record.message_type, name, record.message_id, record.payload, class_name=name)

    def channel(self, message: Message, prefix: str) -> str:
        """Diator's: a channel for every single message; ``{prefix}:{address}`` where a route chose one."""
        return f"{prefix}:{message.to}" if message.to else f"{self.prefix}:{message.message_type}:{message.message_id}"

    def channels(self, pattern: str, prefix: str) -> Sequence[str]:  # names are not in its channels
        """Both kinds whole: no name is in a channel of Diator's."""
        return [f"{self.prefix}:{kind}:*" for kind in MESSAGE_TYPES]


# -- CloudEvents --------------------------------------------------------------------------------------------

_HEADERS: Final = {
    "app": "source",
    "instance": "silboinstance",
    "version": "silboversion",
    "publication": "silbopublication",
    "key": "partitionkey",  # CloudEvents' own extension for it
}
_HEADER_OF: Final[dict[str, str]] = {attribute: header for header, attribute in _HEADERS.items()}
_CONTEXT: Final = frozenset(
    {"specversion", "id", "source", "type", "time", "datacontenttype", "dataschema", "subject", "data", "data_base64"}
)
_IS_ATTRIBUTE: Final = re.compile("[a-z0-9]+").fullmatch
_HAS_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f]").search


class _CloudEvent(msgspec.Struct):
    specversion: Literal["1.0"]
    id: Annotated[str, msgspec.Meta(min_length=1)]
    source: Annotated[str, msgspec.Meta(min_length=1)]
    type: Annotated[str, msgspec.Meta(min_length=1)]
    data: dict[str, Any]
    time: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    silbokind: str = "notification_event"


class CloudEventsFormat(_ByEventName):
    """CloudEvents 1.0, JSON, structured mode: the payload is ``data``, the event name ``type``, the app ``source``.

    What CloudEvents has no attribute for goes into extensions: ``silbokind``, ``silboinstance``, ``silboversion``,
    ``silbopublication``; the key into ``partitionkey``. Events of other producers are read too: as notifications; an
    ``id`` that is no UUID gives an ``event_id`` made of it and ``source``, always the same.

    Source: CloudEvents 1.0.2, its JSON event format, and its partitioning extension.
    """

    content_type = "application/cloudevents+json"
    _decoder = msgspec.json.Decoder(dict[str, Any])

    def encode(self, message: Message, origin: Origin) -> bytes:
        """See :class:`~silbo.message.Format`. An origin that the message carries already is kept."""
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
            attribute = _HEADERS.get(header, header)
            if header not in _HEADERS and (attribute in record or attribute in _CONTEXT or not _IS_ATTRIBUTE(header)):
                raise MessageRefused(message.message_name, f"CloudEvents can't carry a header {header!r}")
            if value:
                record[attribute] = value
        for attribute, value in record.items():
            if not value or _HAS_CONTROL(value):
                raise MessageRefused(message.message_name, f"CloudEvents can't carry {attribute} {value!r}")
        record["data"] = message.payload
        return to_json(message, record)

    def decode(self, raw: bytes) -> Message:
        """See :class:`~silbo.message.Format`."""
        record = _read(raw, self._decoder)
        try:
            event = msgspec.convert(record, _CloudEvent)
        except UNREADABLE as error:
            raise _wrong_key(record, _CloudEvent) or invalid(error) from None
        payload = event.data
        _check_depth(payload, "data")
        if "event_id" not in payload and not is_uuid(event.id):
            payload["event_id"] = str(uuid5(NAMESPACE_URL, f"{event.source}#{event.id}"))
        if "event_timestamp" not in payload and event.time is not None:
            try:
                payload["event_timestamp"] = timestamp(event.time)
            except ValueError as error:
                raise MessageInvalid(str(error), field="time") from None
        headers: dict[str, str] = {
            _HEADER_OF.get(attribute, attribute): value
            for attribute, value in record.items()
            if isinstance(value, str) and (attribute in _HEADER_OF or attribute not in _OWN)
        }
        return Message(event.silbokind, event.type, event.id, payload, headers)


_OWN: Final = _CONTEXT | {"silbokind"}


# -- both ways ----------------------------------------------------------------------------------------------


def to_json(message: Message, record: dict[str, Any]) -> bytes:
    """What a message is to be, as JSON.

    Raises:
        MessageRefused: something in it can't be written, or it is too large.
    """
    try:
        for value in message.payload.values():
            if type(value) not in UNCHANGED:
                plain(value)  # msgspec would write null for a NaN
        raw = _encode(record)
    except (Unwritable, TypeError, *UNREADABLE) as error:
        raise _refused(message, error) from None
    if len(raw) > MAX_SIZE:
        raise MessageRefused(message.message_name, f"{len(raw)} bytes as JSON, more than {MAX_SIZE}")
    return raw


def _refused(message: Message, error: Exception) -> MessageRefused:
    try:
        plain(message.payload, 1)
    except Unwritable as found:
        return MessageRefused(message.message_name, found.problem, field=found.path)
    return MessageRefused(message.message_name, f"can't be written as JSON: {error}")


def _read(raw: bytes, decoder: msgspec.json.Decoder[_T]) -> _T:
    if len(raw) > MAX_SIZE:
        raise MessageInvalid(f"{len(raw)} bytes, more than {MAX_SIZE}")
    try:
        return decoder.decode(raw)
    except UNREADABLE as error:
        raise _unreadable(raw, decoder.type, error) from None


def _unreadable(raw: bytes, kind: Any, error: Exception) -> MessageInvalid:
    """Look for the fault ourselves: which errors msgspec has for one, and their texts, is another in each release."""
    try:
        raw.decode()
    except UnicodeDecodeError as found:
        return invalid(found)
    if not isinstance(error, msgspec.ValidationError):
        return invalid(error)
    try:
        record = msgspec.json.decode(raw)
    except UNREADABLE as found:
        return invalid(error if isinstance(found, msgspec.ValidationError) else found)
    return _wrong_key(record, kind) or invalid(error)


def _wrong_key(record: Any, kind: Any) -> MessageInvalid | None:
    """The first required key that a record lacks, or the first value that does not fit; None where both are well."""
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
        except UNREADABLE as error:
            return invalid(error, under=name)
    return None


def _check_depth(payload: dict[str, Any], field: str) -> None:
    if is_too_deep(payload):
        raise MessageInvalid(f"nested more than {MAX_DEPTH} levels deep", field=field)


def is_uuid(text: str) -> bool:
    """Whether this is a UUID as text."""
    try:
        UUID(text)
    except ValueError:
        return False
    return True


JSON: Final = JsonFormat()
DIATOR: Final = DiatorFormat()
CLOUDEVENTS: Final = CloudEventsFormat()
