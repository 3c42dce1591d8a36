"""What has no caller to go to: errors for the host's hook or the log, and outages, told once and not again and again."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Callable, Generator, Hashable
from contextlib import contextmanager, suppress
from typing import Any, Final, TypeAlias

from silbo._checks import check_hook
from silbo.errors import DeliveryGivenUp, Fenced, Gap, LeadLost, MessageInvalid, PublishError

__all__ = ["ErrorHook", "Outage", "QuietLog", "Report", "text_of"]

ErrorHook: TypeAlias = Callable[[Exception, Any], object]
"""``(error, what)``, sync or async."""

LINE_EVERY: Final = 1.0
"""Seconds between two lines of one sort: a listener that always fails must not fill a disk."""
OUTAGE_EVERY: Final = 60.0
"""Seconds between two lines about one outage."""
LONGEST: Final = 2_000
"""Characters of an error in a line."""
_FORESEEN: Final = (PublishError, MessageInvalid, DeliveryGivenUp, Gap, Fenced, LeadLost)
"""Their text says it all: where they were raised inside of silbo, and by what, is no news to anybody."""


def text_of(error: BaseException) -> str:
    """What a line says of an error: its type, unless silbo foresaw it, and its text, on one line."""
    try:
        text = " ".join(str(error).split())[:LONGEST]
    except Exception:  # noqa: BLE001  # an error of the host's whose text is an error, too
        text = "(it has no text)"
    return text if isinstance(error, _FORESEEN) else f"{type(error).__name__}: {text}".removesuffix(": ")


class _Sort:
    """Lines of one sort: when the last was written, and what was withheld since."""

    def __init__(self) -> None:
        self.written = float("-inf")
        self.withheld = 0
        self.last: Callable[[], None] | None = None  # writes the last of those
        self.due = float("-inf")  # when that happens


class QuietLog:
    """A logger that writes a line of each sort at most once in ``every`` seconds.

    What is withheld is not lost: the last of it is written when the time is over, with the number of the others, which
    is ``extra["withheld"]`` as well.
    """

    def __init__(self, logger: logging.Logger, *, every: float = LINE_EVERY) -> None:
        self._logger, self._every = logger, every
        self._sorts: dict[str, _Sort] = {}

    def write(
        self,
        text: str,
        error: BaseException | None = None,
        /,
        *values: object,
        level: int = logging.WARNING,
        **extra: object,
    ) -> None:
        """Log it now or a little later. The text is a constant, and names the sort; ``values`` fill its ``%s``.

        The error stands behind it, with its traceback unless silbo foresaw it.
        """
        sort = self._sorts.setdefault(text, _Sort())
        sort.last = lambda: self._line(sort, level, text, values, error, extra)
        sort.withheld += 1
        now = time.monotonic()
        left = sort.written + self._every - now
        if left <= 0:
            self._tell(sort)
        elif sort.due <= now:
            with suppress(RuntimeError):  # no loop in this thread: then with the next line
                asyncio.get_running_loop().call_later(left, self._tell, sort)
                sort.due = now + left

    def flush(self) -> None:
        """Write what was withheld: nobody may be there when its time comes."""
        for sort in self._sorts.values():
            self._tell(sort)

    def _tell(self, sort: _Sort) -> None:
        tell, sort.last = sort.last, None
        if tell is not None:
            sort.written = time.monotonic()
            tell()

    def _line(
        self,
        sort: _Sort,
        level: int,
        text: str,
        values: tuple[object, ...],
        error: BaseException | None,
        extra: dict[str, object],
    ) -> None:
        withheld, sort.withheld = sort.withheld - 1, 0
        if error is not None:
            text, values = f"{text}: %s", (*values, text_of(error))
        if withheld:
            text, values = f"{text} (and %d more like it)", (*values, withheld)
        trace = None if isinstance(error, _FORESEEN) else error
        self._logger.log(level, text, *values, exc_info=trace, extra={"withheld": withheld, **extra})


class Outage:
    """Something that is away: a line when that begins, one a minute while it lasts, and one when it is over.

    Several can notice it, each known by what it is; it is over when all who noticed have had their answer.

    Args:
        logger: Where the lines go, as warnings all of them: who sees the first is to see the last.
        what: Its name.
        how: What it is while it is away.
        extra: Goes with each line.
    """

    def __init__(self, logger: logging.Logger, what: str, how: str = "unavailable", **extra: object) -> None:
        self._logger, self._what, self._how, self._extra = logger, what, how, extra
        self._noticed: set[Hashable] = set()
        self._is_told = False
        self._since = self._written = float("-inf")
        self._withheld = 0

    def failed(self, by: Hashable, error: BaseException) -> None:
        """It did not answer; that is tried again."""
        now = time.monotonic()
        if not self._noticed:
            self._since = now
        self._noticed.add(by)
        if now - self._written < (OUTAGE_EVERY if self._is_told else LINE_EVERY):
            self._withheld += 1
            return
        self._is_told, self._written, withheld, self._withheld = True, now, self._withheld, 0
        self._logger.warning(
            "%s %s, trying again: %s",
            self._what,
            self._how,
            text_of(error),
            exc_info=None if isinstance(error, _FORESEEN) else error,
            extra={"withheld": withheld, **self._extra},
        )

    def answered(self, by: Hashable) -> None:
        """It did answer."""
        if by not in self._noticed:
            return
        self._noticed.discard(by)
        if not self._noticed and self._is_told:
            self._is_told = False
            seconds = round(time.monotonic() - self._since, 1)
            self._logger.warning("%s back after %g s", self._what, seconds, extra={"seconds": seconds, **self._extra})

    @contextmanager
    def watched(self, by: Hashable) -> Generator[None]:
        """Notice how a call ends: it was answered, or raises what is an outage."""
        try:
            yield
        except PublishError as error:
            self.failed(by, error)
            raise
        self.answered(by)


class Report:
    """Gives errors to a hook; without one to the log. An error of the hook itself is logged, no more."""

    def __init__(self, hook: ErrorHook | None, logger: logging.Logger, *, every: float = LINE_EVERY) -> None:
        self._hook, self._logger = check_hook("on_error", hook), logger
        self.log: Final = QuietLog(logger, every=every)

    async def __call__(self, text: str, error: Exception, what: object, /, *values: object, **extra: object) -> None:
        """Report one error; ``text``, ``values`` and ``extra`` are for the log alone."""
        if self._hook is None:
            self.log.write(text, error, *values, level=logging.WARNING, **extra)
        else:
            await self.tell(error, what)

    async def outage(self, outage: Outage, by: Hashable, error: Exception) -> None:
        """Report an outage: each failure to the hook, or now and then a line in the log."""
        if self._hook is None:
            outage.failed(by, error)
        else:
            await self.tell(error, None)

    async def tell(self, error: Exception, what: object) -> None:
        """Give an error to the hook, where there is one."""
        if self._hook is None:
            return
        try:
            answer = self._hook(error, what)
            if inspect.isawaitable(answer):
                await answer
        except Exception:
            self._logger.exception("error hook failed")
