"""What a consumer tells of its deliveries: to the host's hook, and in the log."""

from __future__ import annotations

import logging
from typing import Final

from silbo._reports import ErrorHook, ErrorReporter, Outage, describe_error
from silbo.errors import DeliveryGivenUp, Gap, MessageInvalid
from silbo.message import Delivery

__all__ = ["Telling"]


class Telling:
    """Every line says which message it is about, in which group.

    Attributes:
        log: For what is only logged.
        broker: Its outages.
        inbox: The same.
    """

    def __init__(self, hook: ErrorHook | None, logger: logging.Logger, *, group: str, max_attempts: int) -> None:
        self._report = ErrorReporter(hook, logger)
        self._group, self._max_attempts = group, max_attempts
        self.log: Final = self._report.log
        self.broker: Final = Outage(logger, "broker", group=group)
        self.inbox: Final = Outage(logger, "inbox", group=group)

    async def gap(self, gap: Gap) -> None:
        """Messages may have been missed."""
        group = f" in group {self._group}" if self._group else ""
        await self._report("gap%s", gap, None, group, address=gap.address, group=self._group)

    async def malformed(self, delivery: Delivery, error: MessageInvalid) -> None:
        """It will never be a message."""
        name = _name(delivery)
        extra = self._extra(delivery, name)
        await self._report("%s: malformed", error, delivery, self._which(delivery, name), **extra)

    async def failed(self, delivery: Delivery, error: Exception, *, attempt: int, then: str) -> None:
        """Its listeners failed, in the attempt that is counted as this one; ``then`` says what follows."""
        name = _name(delivery)
        which, extra = self._which(delivery, name), self._extra(delivery, name)
        if not delivery.id:
            await self._report("%s: failed, and is not tried again", error, delivery, which, **extra)
            return
        extra |= {"attempt": attempt, "max_attempts": self._max_attempts}
        what = (which, attempt, self._max_attempts, then)
        await self._report("%s: attempt %d of %d failed, %s", error, delivery, *what, **extra)

    async def given_up(self, delivery: Delivery, error: BaseException, attempts: int) -> None:
        """It is a dead letter. That is logged even where there is a hook: nobody else will look at it again."""
        name = _name(delivery)
        given_up = DeliveryGivenUp(name, delivery.id, self._group, attempts, describe_error(error))
        given_up.__cause__ = error
        extra = self._extra(delivery, name) | {"attempts": attempts}
        self.log.write("dead letter", given_up, level=logging.ERROR, **extra)
        await self._report.call_hook(given_up, delivery)

    def _which(self, delivery: Delivery, name: str) -> str:
        what = name or "a message"
        return f"{what} {delivery.id} in group {self._group}" if delivery.id else f"{what} from {delivery.address}"

    def _extra(self, delivery: Delivery, name: str) -> dict[str, object]:
        return {"event_name": name, "address": delivery.address, "delivery_id": delivery.id, "group": self._group}


def _name(delivery: Delivery) -> str:
    """The event's name, fit for a line; empty where it can't be read."""
    try:
        name = delivery.message().message_name
    except MessageInvalid:
        return ""
    return name if name.isprintable() else ascii(name)
