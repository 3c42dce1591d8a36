"""What a consumer counts."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ConsumerStats"]


@dataclass(slots=True)
class ConsumerStats:
    """What a consumer has done so far.

    Attributes:
        received: Deliveries, each counted once however often it is tried.
        claimed: Of these, what had been given out before: to a consumer that is gone, or to this one.
        handled: Whose listeners all ran.
        failed: Attempts in which a listener failed.
        retried: Attempts after such a failure.
        malformed: No message, or it doesn't fit its event class, or has no key where one is needed.
        dead: Became dead letters, after their last attempt or because they are malformed.
        duplicates: Were handled before, as the inbox says: nothing was run.
        skipped: This program's own, and unwanted.
        lost: Taken over by another consumer while they waited for their turn, or were in work.
        gaps: Reports that messages may have been missed.
    """

    received: int = 0
    claimed: int = 0
    handled: int = 0
    failed: int = 0
    retried: int = 0
    malformed: int = 0
    dead: int = 0
    duplicates: int = 0
    skipped: int = 0
    lost: int = 0
    gaps: int = 0
