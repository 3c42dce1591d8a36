"""The log of a command that runs for long: a line on stderr for each record, with the record's data."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

from silbo._control_characters import escape_controls

__all__ = ["LineFormatter", "log_figures", "log_to_stderr"]

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def log_to_stderr() -> None:
    """Set up the logging of this process: silbo's records from INFO on, and warnings of all others, go to stderr.

    A program that has set up logging already, by a handler of its own or a level for silbo, keeps that.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    if (own := logging.getLogger("silbo")).level == logging.NOTSET:
        own.setLevel(logging.INFO)


class LineFormatter(logging.Formatter):
    """``2026-03-07T09:26:02Z INFO relay started partitions=1 broker="Redis at localhost:6379"``.

    Of an error of silbo's own the text is shown; any other error is shown with its traceback.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record; more than one line if there is a traceback."""
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        fields = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        fields.pop("withheld", None)  # the text says it
        data = [f" {name}={json.dumps(value, default=str)}" for name, value in fields.items()]
        line = f"{when} {record.levelname} {record.getMessage()}{''.join(data)}"
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return escape_controls(line)
        line = escape_controls(line if str(error) in record.getMessage() else f"{line}: {error}")
        if type(error).__module__.startswith("silbo.") or record.exc_info is None:
            return line
        lines = self.formatException(record.exc_info).split("\n")  # an error's text may have any character
        return "\n".join((line, *map(escape_controls, lines)))


async def log_figures(
    logger: logging.Logger, what: str, stats: Any, every: float | None, *, extra: Mapping[str, Any] | None = None
) -> None:
    """Log counters when they have changed, at most once in ``every`` seconds; never if that is None.

    Args:
        logger: The logger.
        what: Of what they are, for the line.
        stats: A dataclass of counters, which changes.
        every: Seconds.
        extra: Further fields of the line.
    """
    logged = asdict(stats)
    while every is not None:
        await asyncio.sleep(every)
        if (now := asdict(stats)) != logged:
            logger.info("%s figures", what, extra={**(extra or {}), **now})
            logged = now
