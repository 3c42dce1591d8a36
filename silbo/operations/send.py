"""One message by hand: made of a name and a payload, and checked as the program that has the name would."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from silbo._checks import suggest_name
from silbo.bridge import routing_key
from silbo.errors import MessageInvalid, MessageRefused
from silbo.event import kind_of, new_id
from silbo.message import Message, new_publication
from silbo.names import EventName, check_name
from silbo.wire.decode import to_event
from silbo.wire.encode import format_time, to_message
from silbo.wire.fields import EventFields, event_fields

if TYPE_CHECKING:
    from silbo.operations.app import App

__all__ = ["make_message"]

Kind = Literal["notification", "ecst"]


def make_message(
    name: str,
    payload: Mapping[str, Any],
    *,
    kind: Kind | None = None,
    key: str | None = None,
    to: str | None = None,
    app: App | None = None,
) -> Message:
    """Return a message as a bridge would send it.

    With an app, its name gives class, kind, key and version: the payload is rebuilt as an event of the class, and written again, so
    that fields which may be left out are there. Without one, the payload is taken as it is.

    Args:
        name: The event name.
        payload: The fields of the event; ``event_id`` and ``event_timestamp`` are made if they are not among them.
        kind: The kind as which it is sent; by default that of the class, else ``notification``.
        key: The routing key; by default that of the name.
        to: The address; None for the broker's default.
        app: The program that has the name.

    Raises:
        NameInvalid: The name is a pattern, or too long.
        MessageRefused: The app has no such name, its class is a domain event or of another kind, or the payload does not fit.
    """
    check_name(name)
    constant = EventName(name) if app is None else _find_name(name, app)
    cls = constant.cls
    own = None if cls is None else kind_of(cls)
    if own == "domain":
        raise MessageRefused(name, f"{_describe(cls)} is a domain event, and stays in its process")
    if own is not None and kind not in (None, own):
        raise MessageRefused(name, f"{_describe(cls)} is of the kind {own}, not {kind}")
    wanted: Kind = own or kind or "notification"
    identity = str(payload.get("event_id") or new_id())
    if cls is None:
        whole = {"event_id": identity, "event_timestamp": format_time(datetime.now(UTC)), **payload}
        headers = {"publication": new_publication(), "version": str(constant.version)}
        if key is not None:
            headers["key"] = key
        return Message(f"{wanted}_event", name, identity, whole, headers, to)
    _check_fields(name, cls, payload)
    version = {"version": str(constant.version)}
    try:
        event = to_event(Message(f"{wanted}_event", name, identity, dict(payload), version), cls)
    except MessageInvalid as error:
        field = (error.field or "").removeprefix("payload.") or None
        raise MessageRefused(name, f"{error.problem}; events of this name are {_describe(cls)}", field=field) from error
    if key is None:
        key = routing_key(event, name, constant.key)
    return to_message(event, name=name, kind=wanted, key=key, to=to, version=constant.version)


def _find_name(name: str, app: App) -> EventName[Any]:
    """Return the newest version of a name."""
    from silbo.operations.names import find_constants, list_names

    same = [constant for constant in find_constants(app) if str(constant) == name]
    if same:
        return max(same, key=lambda constant: constant.version)
    known = dict.fromkeys(info.name for info in list_names(app))
    if name in known:
        return EventName(name)
    raise MessageRefused(name, f"{app.reference} has no such name{suggest_name(name, known)}")


def _check_fields(name: str, cls: type, payload: Mapping[str, Any]) -> None:
    """Refuse a field that the class does not read: a consumer would ignore it, and with it a misspelt one."""
    fields = event_fields(cls)
    read = None if fields.library == "plain" else _find_read_names(cls, fields)
    if read is None:
        return
    for field in payload:
        if field not in read:
            hint = suggest_name(field, [wire for _, wire in fields.payload])
            raise MessageRefused(name, f"{_describe(cls)} has no such field{hint}", field=field)


def _find_read_names(cls: Any, fields: EventFields) -> set[str] | None:
    """Return the names under which the fields of a class are read; None if any name may be one."""
    names = {"event_id", "event_timestamp", *fields.names.values()}
    if fields.library == "pydantic":
        config = cls.model_config
        aliases = [field.validation_alias for field in cls.__pydantic_fields__.values() if field.validation_alias]
        if config.get("extra") == "allow" or not all(isinstance(alias, str) for alias in aliases):
            return None
        names.update(aliases)
        if config.get("populate_by_name") or config.get("validate_by_name"):
            names |= fields.names.keys()
    return names


def _describe(cls: type | None) -> str:
    return "" if cls is None else f"{cls.__module__}.{cls.__qualname__}"
