"""The events of the harness."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from silbo import ECSTEvent, EventName

__all__ = ["APP", "CHARGED", "COUNTED", "STREAM", "Counted", "Fate", "fate_of"]

Fate = Literal["", "fails", "kills"]


@dataclass
class Counted(ECSTEvent):
    """The `number`-th of its `lane`, which is its key; lanes belong to one producer each."""

    lane: str
    number: int
    fate: Fate = ""


COUNTED: Final = EventName("chaos.counted", Counted, key="lane")
CHARGED: Final = EventName("chaos.charged", Counted, key="lane")
"""Some lanes' events have this name; a group with an inbox has an effect of them in a database."""
APP: Final = "chaos"
STREAM: Final = "silbo:{events}"


def fate_of(nth: int, *, fails: int = 0, kills: int = 0) -> Fate:
    """What becomes of a consumer that hears the `nth` event: one in `kills` kills it, one in `fails` fails always."""
    if kills and nth % kills == kills // 2:
        return "kills"
    return "fails" if fails and nth % fails == fails // 3 else ""
