"""Reports on deliveries: to the host's hook, or in the log."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

from silbo._host_code import HostCode, OwnTasks
from silbo._message_observers import call_observers, find_observers
from silbo._reports import ErrorHook, ErrorReporter, Outage, describe_error
from silbo._whistle import IAsyncEventDispatcher
from silbo.errors import DeliveryGivenUp, Gap, MessageInvalid, VersionTooNew
from silbo.health import LastError, find_latest
from silbo.message import Delivery

__all__ = ["DeliveryReports"]


class DeliveryReports:
    """Reports on the deliveries of one group; each says which message it is about.

    Attributes:
        log: For what is logged even if there is a hook.
        broker_outage: Outages of the broker.
        inbox_outage: Outages of the inbox.
        storing_outage: Times in which the broker refuses to store failed attempts and dead letters.
    """

    def __init__(
        self,
        hook: ErrorHook | None,
        logger: logging.Logger,
        *,
        dispatcher: IAsyncEventDispatcher,
        tasks: OwnTasks,
        group: str,
        max_attempts: int,
    ) -> None:
        self._report = ErrorReporter(hook, logger, isolate=tasks.isolate)
        self._dispatcher = dispatcher
        self._group = group
        self._max_attempts = max_attempts
        self.log: Final = self._report.log
        self.broker_outage: Final = Outage(logger, "broker", group=group)
        self.inbox_outage: Final = Outage(logger, "inbox", group=group)
        self.storing_outage: Final = Outage(
            logger, "storing of failed deliveries", "refused by the broker; others go on", group=group
        )

    @property
    def last_error(self) -> LastError | None:
        """The last error of a delivery, or of the broker or the inbox."""
        outages = (self.broker_outage, self.inbox_outage, self.storing_outage)
        return find_latest(self._report.last_error, *(outage.last_error for outage in outages))

    async def report_gap(self, gap: Gap) -> None:
        """Report that messages may have been missed."""
        group = f" in group {self._group}" if self._group else ""
        await self._report("gap%s", gap, None, group, address=gap.address, group=self._group)

    async def report_malformed(self, delivery: Delivery, error: MessageInvalid) -> None:
        """Report a delivery that is not a message and never will be."""
        name = _readable_name(delivery)
        extra = self._extra(delivery, name)
        await self._report("%s: malformed", error, delivery, self._describe(delivery, name), **extra)

    async def report_too_new(self, delivery: Delivery, error: VersionTooNew) -> None:
        """Report a message of an unknown version that no other consumer can be left, for the broker keeps no messages."""
        name = _readable_name(delivery)
        described = self._describe(delivery, name)
        await self._report("%s: not handled", error, delivery, described, **self._extra(delivery, name))

    def note_left(self, delivery: Delivery, error: VersionTooNew, wait: float) -> None:
        """Log that a message of an unknown version is left to the others of the group. No hook gets it: it is no failure."""
        name = _readable_name(delivery)
        extra = self._extra(delivery, name) | {"version": error.version, "known": error.known}
        self.log.write(
            "%s has version %d, and this consumer knows no newer one than %d: left to the group's others for %g s",
            None,
            self._describe(delivery, name),
            error.version,
            error.known,
            wait,
            level=logging.WARNING,
            **extra,
        )

    async def report_failure(self, delivery: Delivery, error: Exception, *, attempt: int, then: str) -> None:
        """Report an attempt in which a listener failed.

        Args:
            delivery: As the listeners saw it.
            error: The error of the listener.
            attempt: The number of the attempt, from 1.
            then: The words for what follows: "again in 2 s".
        """
        name = _readable_name(delivery)
        described = self._describe(delivery, name)
        extra = self._extra(delivery, name)
        if not delivery.id:
            await self._report("%s: failed, and is not tried again", error, delivery, described, **extra)
            return
        extra |= {"attempt": attempt, "max_attempts": self._max_attempts}
        values = (described, attempt, self._max_attempts, then)
        await self._report("%s: attempt %d of %d failed, %s", error, delivery, *values, **extra)

    async def report_dead_letter(self, delivery: Delivery, error: BaseException, attempts: int) -> None:
        """Report a dead letter. It is logged even if there is a hook: nothing will try this delivery again.

        The observers of the dispatcher hear of it before the hook does.
        """
        name = _readable_name(delivery)
        given_up = DeliveryGivenUp(name, delivery.id, self._group, attempts, describe_error(error))
        given_up.__cause__ = error
        extra = self._extra(delivery, name) | {"attempts": attempts}
        self.log.write("dead letter", given_up, level=logging.ERROR, **extra)
        call_observers(find_observers(self._dispatcher), "after_dead_letter", delivery, given_up)
        await self._report.call_hook(given_up, delivery)

    def report_slow(self, code: HostCode[Any], seconds: float) -> None:
        """Log that a listener or hook has run for a long time."""
        where = code.place()
        extra: dict[str, Any] = {"place": where, "seconds": round(seconds, 1), "group": self._group}
        about = ""
        if isinstance(code.about, Delivery):
            name = _readable_name(code.about)
            about = f"{self._describe(code.about, name)}: "
            extra |= self._extra(code.about, name)
        self.log.write("%s%s still runs after %.3g s: %s", None, about, code.what, seconds, where, **extra)

    def report_unheard(self, names: Mapping[str, str | None], missed: int = 0) -> None:
        """Log the names in ``events`` that nobody hears, each with a similar name that somebody does hear.

        Args:
            names: The names; a similar one of each, or None.
            missed: Their messages that were acknowledged since the last report; 0 for the report at the start.
        """
        described = (
            f"{name!r}" + (f" (a listener hears {similar!r})" * bool(similar)) for name, similar in names.items()
        )
        text = "nobody hears %s of events=: such messages are acknowledged as unheard%s; is a listener's name misspelt?"
        count = f", {missed:,} since the last warning" if missed else ""
        extra: dict[str, object] = {"event_names": list(names), "group": self._group}
        if missed:
            extra["missed"] = missed
        self.log.write(text, None, ", ".join(described), count, level=logging.WARNING, **extra)

    def _describe(self, delivery: Delivery, name: str) -> str:
        what = name or "a message"
        return f"{what} {delivery.id} in group {self._group}" if delivery.id else f"{what} from {delivery.address}"

    def _extra(self, delivery: Delivery, name: str) -> dict[str, object]:
        return {"event_name": name, "address": delivery.address, "delivery_id": delivery.id, "group": self._group}


def _readable_name(delivery: Delivery) -> str:
    """Return the event's name in printable characters; an empty text if the message can't be read."""
    try:
        name = delivery.message().message_name
    except MessageInvalid:
        return ""
    return name if name.isprintable() else ascii(name)
