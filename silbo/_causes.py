"""The cause of what is sent next: the received message, or the event of this process, whose listeners this code runs for."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Final, Protocol

__all__ = ["CAUSATION", "CORRELATION", "Cause", "cause"]

CORRELATION: Final = "correlationid"
"""The header with the correlation id: the id of the first message of a conversation. A message without it is the first one.

Source: the CloudEvents extension for correlation, as the next one."""
CAUSATION: Final = "causationid"
"""The header with the causation id: the id of the message whose listener has caused this one."""


class Cause(Protocol):
    """A received message, or an event of this process."""

    def follow(self) -> dict[str, str]:
        """Return the headers of a message that this one has caused: its correlation id and its causation id."""
        ...


cause: Final[ContextVar[Cause | None]] = ContextVar("silbo_cause", default=None)
"""The innermost cause; also in tasks that a listener has started."""
