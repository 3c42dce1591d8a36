"""The counts of a consumer."""

from __future__ import annotations

from dataclasses import dataclass

from silbo.consumer.heard_names import Heard

__all__ = ["ConsumerStats"]


@dataclass(slots=True)
class ConsumerStats:
    """Counts of a consumer since it was made.

    Attributes:
        received: Deliveries, each counted once however often it is tried.
        claimed: Received deliveries that had been given out before: to a consumer that is gone, or to this one.
        handled: Deliveries whose listeners all ran.
        unheard: Deliveries that no listener is meant for: acknowledged, and not among those handled. A listener for ``**`` is
            meant for all names if the dispatcher has only such listeners; beside others it would hide that a name is misspelt.
        failed: Attempts in which a listener failed.
        retried: Attempts after a failed one.
        malformed: Deliveries that are not a message, don't fit their event class, or have no key where one is needed.
        newer: Deliveries of a newer version than this consumer knows: left to the group's others, or reported.
        dead: Deliveries that became dead letters, after their last attempt, because they are malformed, or because no consumer
            of the group knew their version in time.
        duplicates: Deliveries that were handled before, as the inbox says: no listener ran.
        skipped: Unwanted messages of this program's own app.
        lost: Deliveries that another consumer took over while they waited here or were in work.
        gaps: Reports that messages may have been missed.
        slow: Listeners and hooks that run now, and have run for longer than ``slow_after``.
    """

    received: int = 0
    claimed: int = 0
    handled: int = 0
    unheard: int = 0
    failed: int = 0
    retried: int = 0
    malformed: int = 0
    newer: int = 0
    dead: int = 0
    duplicates: int = 0
    skipped: int = 0
    lost: int = 0
    gaps: int = 0
    slow: int = 0

    def count_handled(self, heard: Heard) -> None:
        """Count a delivery whose listeners all ran."""
        if heard is Heard.ON_PURPOSE:
            self.handled += 1
        else:
            self.unheard += 1
