"""What a process that runs for long tells on stderr: a line for each event, with its data."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Final

from silbo.cli.output import printable

__all__ = ["Lines", "log_to_stderr"]

_OWN: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def log_to_stderr() -> None:
    """For the process: silbo's own lines from INFO on, everybody else's warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("silbo").setLevel(logging.INFO)


class Lines(logging.Formatter):
    """``2026-03-07T09:26:02Z INFO relay started partitions=1 broker="Redis at localhost:6379"``.

    An error that silbo foresaw is its text alone; any other comes with its traceback.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line, or the lines."""
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        fields = {name: value for name, value in vars(record).items() if name not in _OWN}
        fields.pop("withheld", None)  # the text says it
        data = [f" {name}={json.dumps(value, default=str)}" for name, value in fields.items()]
        line = f"{when} {record.levelname} {record.getMessage()}{''.join(data)}"
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return printable(line)
        line = printable(line if str(error) in record.getMessage() else f"{line}: {error}")
        if type(error).__module__.startswith("silbo.") or record.exc_info is None:
            return line
        return f"{line}\n{self.formatException(record.exc_info)}"
