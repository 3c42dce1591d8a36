"""The warning for an event that a handler collected and that reaches nobody."""

from __future__ import annotations

import inspect
import logging
from typing import Any
from weakref import WeakKeyDictionary

__all__ = ["warn_if_unhandled"]

logger = logging.getLogger(__name__)

_warned: WeakKeyDictionary[Any, set[Any]] = WeakKeyDictionary()


def warn_if_unhandled(dispatcher: Any, name: Any, event: object) -> None:
    """Log a warning, once for a name on a dispatcher, where nobody would hear the event and no bridge would send it."""
    if any(_reaches(listener, event, name) for listener in dispatcher.get_listeners(name)):
        return
    warned = _warned.setdefault(dispatcher, set())
    if name not in warned:
        warned.add(name)
        logger.warning(
            "nobody handles %s: no listener is registered for it, and no bridge sends it",
            name,
            extra={"event_name": name, "event_class": type(event).__qualname__},
        )


def _reaches(listener: Any, event: object, name: Any) -> bool:
    """Whether it is a listener, other than a bridge that would not send the event."""
    bridge = getattr(inspect.unwrap(listener), "__self__", None)
    sends = getattr(bridge, "__silbo_sends__", None)  # Bridge can't be imported: it imports what imports this
    return sends is None or bool(sends(event, name))
