"""Faults of received messages, as MessageInvalid with the field at fault."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import msgspec

from silbo.errors import MessageInvalid
from silbo.wire.encode import MAX_DEPTH

__all__ = ["MSGSPEC_ERRORS", "explain_refusal", "is_too_deep", "to_message_invalid"]

MSGSPEC_ERRORS: Final = (msgspec.MsgspecError, ValueError, OverflowError, RecursionError)
"""The exceptions that msgspec raises for wrong input."""


def is_too_deep(payload: dict[str, Any]) -> bool:
    """Return True if decoded JSON has more levels than MAX_DEPTH."""
    level: list[Any] = [payload]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for container in level
            for item in (container.values() if type(container) is dict else container)
            if type(item) is dict or type(item) is list
        ]
        if not level:
            return False
    return True


def explain_refusal(cls: type, error: Exception, *, under: str = "payload") -> MessageInvalid:
    """Return the error of a host's constructor or validator as ours, with the field if pydantic names it."""
    if isinstance(error, MessageInvalid):
        return error
    details: Callable[[], list[dict[str, Any]]] | None = getattr(error, "errors", None)
    if callable(details) and (found := details()):
        place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in found[0]["loc"])
        return MessageInvalid(found[0]["msg"], field=f"{under}{place}".lstrip(".") or None)
    return MessageInvalid(f"{cls.__qualname__} refuses it: {type(error).__name__}: {error}", field=under or None)


# msgspec names the place inside a value only in its text. If a release words it differently, the error names the whole
# value, with all of msgspec's text.
_WHERE: Final = re.compile(r"(?P<problem>.*?)(?: - at (?:`key` in )?`\$\.?(?P<path>.*?)`)?", re.DOTALL).fullmatch
_MISSING: Final = re.compile(r"Object missing required field `(.*)`", re.DOTALL).fullmatch


def to_message_invalid(error: Exception, *, under: str = "") -> MessageInvalid:
    """Return an error that msgspec raised as ours, with the field if msgspec names it.

    The fault is recognised by the class of the error and told in our words: msgspec's texts change between releases.

    Args:
        error: One of :data:`MSGSPEC_ERRORS`, or another that msgspec lets through (UnicodeError).
        under: The part of the message that was read, as ``payload``.
    """
    if isinstance(error, UnicodeError):
        return MessageInvalid("not UTF-8", field=under or None)
    if isinstance(error, RecursionError):
        return MessageInvalid(f"nested more than {MAX_DEPTH} levels deep", field=under or None)
    if isinstance(error, msgspec.DecodeError) and not isinstance(error, msgspec.ValidationError):
        return MessageInvalid(f"not JSON: {error}", field=under or None)
    match = _WHERE(str(error))
    problem, path = (match["problem"], match["path"]) if match else (str(error), None)
    if missing := _MISSING(problem):
        problem, path = "missing", f"{path}.{missing[1]}" if path else missing[1]
    field = f"{under}{'' if path.startswith('[') or not under else '.'}{path}" if path else under
    return MessageInvalid(problem, field=field or None)
