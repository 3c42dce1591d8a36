"""The state that the tasks of one consumer share, and the repetition of their broker calls."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar

from silbo._host_code import OwnTasks
from silbo._retry import Backoff, pause
from silbo.consumer.known_publications import KnownPublications
from silbo.consumer.loop_turns import LoopTurns
from silbo.consumer.reports import DeliveryReports
from silbo.consumer.stats import ConsumerStats
from silbo.errors import BrokerRefused, BrokerUnavailable

__all__ = ["BROKER_RETRY", "Pace", "RunState", "Stopped"]

BROKER_RETRY: Final = Backoff(initial=0.05, cap=1.0)
"""Delays between two calls to a broker that is unavailable."""
RECENT: Final = 20
"""The time that deliveries take is the mean of about so many."""

_T = TypeVar("_T")


class Stopped(Exception):
    """The consumer was stopped before the broker answered."""


class Pace:
    """The time that a delivery has taken lately.

    Attributes:
        seconds_each: The seconds; 0 before the first is done.
    """

    def __init__(self) -> None:
        self.seconds_each = 0.0

    def note(self, seconds: float, many: int = 1) -> None:
        """Note the time that so many deliveries have taken."""
        each = seconds / many
        if self.seconds_each:
            each = self.seconds_each + (each - self.seconds_each) * min(1.0, many / RECENT)
        self.seconds_each = each


@dataclass(slots=True)
class RunState:
    """State that the tasks of one consumer share.

    Attributes:
        tasks: The tasks themselves.
        reports: Reports on deliveries and outages.
        stats: Counts.
        stopping: Set by the consumer's ``stop()``.
        known: Publications that the inbox is asked about in batches; None without such an inbox.
        turns: Turns on the event loop.
        pace: The time that a delivery takes.
        has_room: Set when deliveries have left, so that reading may go on.
        low_water: The length of the queue at which reading goes on.
        missed: Handled deliveries of a name in ``events`` that no listener is meant for.
    """

    tasks: OwnTasks
    reports: DeliveryReports
    stats: ConsumerStats
    stopping: asyncio.Event
    known: KnownPublications | None = None
    turns: LoopTurns = field(default_factory=LoopTurns)
    pace: Pace = field(default_factory=Pace)
    has_room: asyncio.Event = field(default_factory=asyncio.Event)
    low_water: int = 0
    missed: int = 0

    async def until_answered(self, caller: str, call: Callable[[], Awaitable[_T]]) -> _T:
        """Repeat a broker call until the broker answers. The call is made once at least, even after a stop.

        Args:
            caller: Names the call for the outage's log records.
            call: Raises BrokerUnavailable if the broker did not answer.

        Raises:
            Stopped: the consumer is stopped, and the broker did not answer.
            BrokerRefused: the broker has answered, and refuses this call.
        """
        outages = 0
        while True:
            self.tasks.check_cancelled()
            try:
                with self.reports.broker_outage.watched(caller):
                    return await call()
            except BrokerRefused:
                raise
            except BrokerUnavailable as error:
                if self.stopping.is_set():
                    raise Stopped from error
            outages += 1
            await pause(BROKER_RETRY.delay(outages), self.stopping)
