"""The attributes of an event, kept and put back: a listener that failed leaves no half-made change."""

from __future__ import annotations

from types import MemberDescriptorType
from typing import Any, Final
from weakref import WeakKeyDictionary

from silbo.event import Refusal

__all__ = ["State", "has_slots", "keep_state", "put_back"]

State = dict[str, Any] | tuple[dict[str, Any] | None, tuple[Any, ...]]
"""The attributes of an event by name; and for a class with slots, the values of these beside them."""

_MADE_LATER: Final = ("event_id", "event_timestamp", "__silbo_id__")
"""Attributes that are made when they are first read: what a listener has read and perhaps sent stays."""
_UNSET: Final = object()

_slots: Final[WeakKeyDictionary[type, tuple[MemberDescriptorType, ...]]] = WeakKeyDictionary()
"""The slots of each class of events; none for most classes."""


def has_slots(cls: type) -> bool:
    """Return True if objects of a class keep attributes outside of their ``__dict__``."""
    found = _slots.get(cls)
    if found is None:
        found = _slots[cls] = _find_slots(cls)
    return bool(found)


def keep_state(event: Any) -> State:
    """Return the attributes of an event as they are now, for :func:`put_back`. Their values are not copied."""
    if not has_slots(type(event)):
        return event.__dict__.copy()  # type: ignore[no-any-return]
    values = tuple(_read(slot, event) for slot in _slots[type(event)])
    return (event.__dict__.copy() if hasattr(event, "__dict__") else None), values


def put_back(event: Any, state: State) -> None:
    """Give an event the attributes that it had when :func:`keep_state` was called."""
    attributes, values = (state, ()) if isinstance(state, dict) else state
    if attributes is not None:
        now = event.__dict__
        kept = {made: now[made] for made in _MADE_LATER if made in now and made not in attributes}
        for stopped in ("__silbo_stopped__", "propagation_stopped"):  # the second on an event that is not silbo's
            if isinstance(now.get(stopped), Refusal):  # of a dispatch inside of the listener
                kept[stopped] = now[stopped]
        now.clear()
        now.update(attributes)
        now.update(kept)
    for slot, value in zip(_slots[type(event)] if values else (), values, strict=True):
        if value is not _UNSET:
            slot.__set__(event, value)
        elif _read(slot, event) is not _UNSET:
            slot.__delete__(event)


def _find_slots(cls: type) -> tuple[MemberDescriptorType, ...]:
    return tuple(
        attribute
        for base in cls.__mro__
        for name, attribute in vars(base).items()
        if isinstance(attribute, MemberDescriptorType) and name not in ("__weakref__", "__dict__")
    )


def _read(slot: MemberDescriptorType, event: Any) -> Any:
    try:
        value = slot.__get__(event, type(event))
    except AttributeError:
        return _UNSET
    # pydantic keeps attributes, and the names of those that were set, in a dict and a set of its own.
    return value.copy() if slot.__name__.startswith("__pydantic") and isinstance(value, dict | set) else value
