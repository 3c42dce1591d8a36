"""Errors that have no caller to go to: to the host's hook, or else to the log."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable
from typing import Any, Final, TypeAlias

__all__ = ["ErrorHook", "QuietLog", "Report"]

ErrorHook: TypeAlias = Callable[[Exception, Any], object]
"""``(error, what)``, sync or async."""

LINE_EVERY: Final = 1.0
"""Seconds between two lines about the same thing: a broker that is away must not fill a disk."""


class QuietLog:
    """A logger that writes each text at most once in ``every`` seconds; ``extra["withheld"]`` counts those in between."""

    def __init__(self, logger: logging.Logger, *, every: float = LINE_EVERY) -> None:
        self._logger, self._every = logger, every
        self._written: dict[str, tuple[float, int]] = {}  # text -> when it was last written, withheld since

    def write(self, text: str, error: BaseException | None = None, /, **extra: object) -> None:
        """Log a warning, or count it. The text is a constant; what varies goes into ``extra``."""
        now = time.monotonic()
        last, withheld = self._written.get(text, (now - self._every, 0))
        if now - last < self._every:
            self._written[text] = last, withheld + 1
            return
        self._written[text] = now, 0
        self._logger.warning(text, exc_info=error, extra={"withheld": withheld, **extra})


class Report:
    """Gives errors to a hook; without one to the log. An error of the hook itself is logged, no more."""

    def __init__(self, hook: ErrorHook | None, logger: logging.Logger, *, every: float = LINE_EVERY) -> None:
        self._hook, self._logger = hook, logger
        self.log: Final = QuietLog(logger, every=every)

    async def __call__(self, text: str, error: Exception, what: object, /, **extra: object) -> None:
        """Report one error; ``text`` and ``extra`` are for the log alone."""
        if self._hook is None:
            self.log.write(text, error, **extra)
            return
        try:
            answer = self._hook(error, what)
            if inspect.isawaitable(answer):
                await answer
        except Exception:
            self._logger.exception("error hook failed")
