"""Errors without a caller: passed to the host's hook, or logged.

Log records with the same text are written once a second at most. An outage is logged when it begins, once a minute, and
when it ends.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Hashable
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, TypeAlias

from silbo._checks import check_hook
from silbo.errors import (
    BrokerRefused,
    DeliveryGivenUp,
    Fenced,
    Gap,
    LeadLost,
    MessageInvalid,
    PublishError,
    ShardsMismatch,
    StopIncomplete,
)
from silbo.health import LastError, to_moment

__all__ = [
    "Availability",
    "ErrorHook",
    "ErrorReporter",
    "Outage",
    "RateLimitedLog",
    "describe_error",
    "describe_plugins",
    "note_plugin",
]

ErrorHook: TypeAlias = Callable[[Exception, Any], object]
"""Called with ``(error, about)``, sync or async. ``about`` is the message or delivery at fault, or None."""

LOG_EVERY: Final = 1.0
"""Seconds between two log records with the same text: a listener that always fails must not fill a disk."""
OUTAGE_EVERY: Final = 60.0
"""Seconds between two log records about the same outage."""
ERROR_LENGTH: Final = 2_000
"""Characters of an error's text that are logged."""
_PLUGIN_NOTE: Final = "raised in plugin "
_FORESEEN: Final = (PublishError, MessageInvalid, DeliveryGivenUp, Gap, Fenced, LeadLost, StopIncomplete)
"""Errors whose text says everything: they are logged without type and traceback."""


def describe_error(error: BaseException) -> str:
    """Return the error's type and text on one line; the text alone for an error that silbo foresaw."""
    try:
        text = " ".join(str(error).split())[:ERROR_LENGTH]
    except Exception:  # noqa: BLE001  # the host's error class may fail in __str__
        text = "(it has no text)"
    described = text if isinstance(error, _FORESEEN) else f"{type(error).__name__}: {text}".removesuffix(": ")
    return described + describe_plugins(error)


def note_plugin(error: BaseException, plugin: str, place: str) -> None:
    """Add a note to an error that names the plugin in whose listener it was raised; a plugin is named once.

    Args:
        error: The error.
        plugin: The name of the plugin.
        place: The listener, with its file and line.
    """
    note = f"{_PLUGIN_NOTE}{plugin!r} by {place}"
    with suppress(
        Exception
    ):  # an error that takes no notes, as a frozen dataclass: its own kind must not be lost for a note
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)


def describe_plugins(error: BaseException) -> str:
    """Return the plugins that raised an error, or an error within a group, in brackets; empty if none did."""
    errors = [error]
    notes: dict[str, None] = {}
    for one in errors:
        if isinstance(one, BaseExceptionGroup):
            errors += one.exceptions
        with suppress(Exception):  # its notes may be anything
            notes.update(dict.fromkeys(note for note in getattr(one, "__notes__", ()) if note.startswith(_PLUGIN_NOTE)))
    return f" ({'; '.join(notes)})" if notes else ""


class _RateLimit:
    """A rate limit for records of one kind, which counts the records that it withholds."""

    def __init__(self) -> None:
        self._written_at = float("-inf")
        self._unwritten = 0  # records since then
        self._last: Callable[[int], None] | None = None  # of these, the one that flush() writes
        self._flushes_at = float("-inf")

    def write(self, record: Callable[[int], None], every: float, *, later: bool) -> bool:
        """Write a record if the last one was written ``every`` seconds ago or earlier. True if written.

        Args:
            record: Writes the record. Called with the number of records withheld since the last one.
            every: Seconds.
            later: Write the last withheld record when the time is over, if a loop runs in this thread.
        """
        self._unwritten += 1
        now = time.monotonic()
        left = self._written_at + every - now
        if left <= 0:
            self._write(record)
            return True
        if later:
            self._last = record
            if self._flushes_at <= now:
                with suppress(RuntimeError):  # no loop in this thread: the next record says how many were withheld
                    asyncio.get_running_loop().call_later(left, self.flush)
                    self._flushes_at = now + left
        return False

    def flush(self) -> None:
        """Write the last withheld record, if there is one."""
        if self._last is not None:
            self._write(self._last)

    def _write(self, record: Callable[[int], None]) -> None:
        withheld = self._unwritten - 1
        self._unwritten = 0
        self._last = None
        self._written_at = time.monotonic()
        record(withheld)


class RateLimitedLog:
    """A logger that writes records with the same text at most once in ``every`` seconds.

    The last withheld record is written when the time is over. Its text and ``extra["withheld"]`` say how many others
    were left out.
    """

    def __init__(self, logger: logging.Logger, *, every: float = LOG_EVERY) -> None:
        self._logger = logger
        self._every = every
        self._limits: dict[str, _RateLimit] = {}  # by text

    def write(
        self,
        text: str,
        error: BaseException | None = None,
        /,
        *values: object,
        level: int = logging.WARNING,
        **extra: object,
    ) -> None:
        """Log now, or when the time is over.

        Args:
            text: A constant with a ``%s`` for each value. Each text has a rate limit of its own.
            error: Appended to the text, with its traceback unless silbo foresaw the error.
            values: Fill the text.
            level: Of the record.
            extra: Fields of the record.
        """
        limit = self._limits.setdefault(text, _RateLimit())
        limit.write(partial(self._log, level, text, values, error, extra), self._every, later=True)

    def flush(self) -> None:
        """Write the withheld records now, before the loop ends."""
        for limit in self._limits.values():
            limit.flush()

    def _log(
        self,
        level: int,
        text: str,
        values: tuple[object, ...],
        error: BaseException | None,
        extra: dict[str, object],
        withheld: int,
    ) -> None:
        if error is not None:
            text += ": %s"
            values += (describe_error(error),)
        if withheld:
            text += " (and %d more like it)"
            values += (withheld,)
        _log(self._logger, level, text, values, error, {"withheld": withheld, **extra})


class Availability:
    """Notes if one service answers.

    Several callers may notice an outage, each under a key of its own. It ends when each of them has had an answer.

    Attributes:
        is_on: True during an outage.
        last_error: The error that was noted last.
    """

    def __init__(self) -> None:
        self.is_on = False
        self.last_error: LastError | None = None
        self._failing: set[Hashable] = set()  # callers that wait for an answer
        self._began_at = float("-inf")

    @property
    def since(self) -> datetime | None:
        """The time at which the outage began: aware, UTC; None if there is none."""
        return to_moment(self._began_at) if self.is_on else None

    def failed(self, caller: Hashable, error: BaseException) -> None:
        """Note that the service did not answer this caller."""
        if not self._failing:
            self._began_at = time.monotonic()
        self._failing.add(caller)
        self.is_on = True
        self.last_error = _note(error)

    def answered(self, caller: Hashable) -> None:
        """Note that the service answered this caller."""
        self._failing.discard(caller)
        self.is_on = bool(self._failing)


class Outage(Availability):
    """The outages of one service: each is logged when it begins, once a minute, and when it ends.

    Args:
        logger: Gets the records. All are warnings, so that whoever sees the first sees the last.
        service: The name of the service.
        state: The word for its state during the outage.
        extra: Fields of each record.
    """

    def __init__(self, logger: logging.Logger, service: str, state: str = "unavailable", **extra: object) -> None:
        super().__init__()
        self._logger = logger
        self._service = service
        self._state = state
        self._extra = extra
        self._is_logged = False
        self._limit = _RateLimit()

    def failed(self, caller: Hashable, error: BaseException, *, logged: bool = True) -> None:
        """Note that the service did not answer this caller, who will try again.

        Args:
            caller: Any value that tells the callers from one another.
            error: The reason.
            logged: False if the host's hook gets the error in place of the log.
        """
        super().failed(caller, error)
        every = OUTAGE_EVERY if self._is_logged else LOG_EVERY
        if logged and self._limit.write(partial(self._log_failure, error), every, later=False):
            self._is_logged = True

    def answered(self, caller: Hashable) -> None:
        """Note that the service answered this caller."""
        if caller not in self._failing:
            return
        super().answered(caller)
        if not self._failing and self._is_logged:
            self._is_logged = False
            seconds = round(time.monotonic() - self._began_at, 1)
            extra = {"seconds": seconds, **self._extra}
            self._logger.warning("%s back after %g s", self._service, seconds, extra=extra)

    def forget(self, caller: Hashable) -> None:
        """Note that this caller asks no longer: for it there is no outage."""
        super().answered(caller)

    @contextmanager
    def watched(self, caller: Hashable) -> Generator[None]:
        """Note a PublishError inside of the ``with`` as a failure, which is raised again, and its normal end as an answer.

        A BrokerRefused is an answer.
        """
        try:
            yield
        except BrokerRefused:
            self.answered(caller)
            raise
        except PublishError as error:
            self.failed(caller, error)
            raise
        self.answered(caller)

    def _log_failure(self, error: BaseException, withheld: int) -> None:
        # The service answers, and the next attempt is refused as well, until somebody corrects the program or the number.
        needs_person = isinstance(error, ShardsMismatch) and error.fixed > 0
        state = "refuses, and somebody has to act" if needs_person else self._state
        values = (self._service, state, describe_error(error))
        extra = {"withheld": withheld, **self._extra}
        _log(self._logger, logging.WARNING, "%s %s, trying again: %s", values, error, extra)


def _log(
    logger: logging.Logger,
    level: int,
    text: str,
    values: tuple[object, ...],
    error: BaseException | None,
    extra: dict[str, object],
) -> None:
    logger.log(level, text, *values, exc_info=None if isinstance(error, _FORESEEN) else error, extra=extra)


class ErrorReporter:
    """Passes errors to the host's hook, or logs them if there is no hook. An error of the hook itself is logged.

    Args:
        hook: The host's.
        logger: Gets the errors if there is no hook.
        isolate: Runs the hook's coroutine, given with the words "an error hook". By default it is simply awaited.

    Attributes:
        log: For what is logged even if there is a hook.
        last_error: The last error that was reported; no outage.
    """

    def __init__(
        self,
        hook: ErrorHook | None,
        logger: logging.Logger,
        *,
        isolate: Callable[[Coroutine[Any, Any, None], str], Awaitable[None]] | None = None,
    ) -> None:
        self._hook = check_hook("on_error", hook)
        self._isolate = isolate
        self._logger = logger
        self.log: Final = RateLimitedLog(logger)
        self.last_error: LastError | None = None

    async def __call__(self, text: str, error: Exception, about: object, /, *values: object, **extra: object) -> None:
        """Report an error about a message or delivery; ``text``, ``values`` and ``extra`` are for the log alone."""
        self.last_error = _note(error)
        if self._hook is None:
            self.log.write(text, error, *values, level=logging.WARNING, **extra)
        else:
            await self.call_hook(error, about)

    async def report_outage(self, outage: Outage, caller: Hashable, error: Exception) -> None:
        """Report a failed call during an outage: each to the hook, or to the log as often as the outage allows."""
        outage.failed(caller, error, logged=self._hook is None)
        await self.call_hook(error, None)

    async def call_hook(self, error: Exception, about: object) -> None:
        """Pass an error to the hook, if there is one, and never to the log."""
        if self._hook is None:
            return
        call = _call(self._hook, error, about)
        try:
            await (call if self._isolate is None else self._isolate(call, "an error hook"))
        except Exception:
            self._logger.exception("error hook failed")


def _note(error: BaseException) -> LastError:
    return LastError(describe_error(error), datetime.now(UTC))


async def _call(hook: ErrorHook, error: Exception, about: object) -> None:
    answer = hook(error, about)
    if inspect.isawaitable(answer):
        await answer
