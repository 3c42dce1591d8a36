"""A line of a relay's log: everything in it, and no more lines than it needs."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from silbo._reports import RateLimitedLog
from silbo.cli.log import LineFormatter
from silbo.errors import BrokerUnavailable


@pytest.fixture
def log() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def logger(log: io.StringIO) -> Iterator[logging.Logger]:
    logger = logging.getLogger("silbo.tests.cli")
    handler = logging.StreamHandler(log)
    handler.setFormatter(LineFormatter())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield logger
    logger.removeHandler(handler)


def test_data_stand_behind_the_text(logger: logging.Logger, log: io.StringIO) -> None:
    logger.info("relay started", extra={"partitions": 0, "broker": "Redis at host:1", "sent": None})
    _, _, line = log.getvalue().partition("Z ")
    assert line == 'INFO relay started partitions=0 broker="Redis at host:1" sent=null\n'


def test_foreseen_error_is_its_text_on_the_same_line(logger: logging.Logger, log: io.StringIO) -> None:
    quiet = RateLimitedLog(logger, every=0.0)
    quiet.write("broker unavailable", BrokerUnavailable("Redis is\naway"), partition=1)
    _, _, line = log.getvalue().partition("Z ")
    assert line == "WARNING broker unavailable: Redis is away partition=1\n"


def test_unforeseen_error_is_not_told_twice(logger: logging.Logger, log: io.StringIO) -> None:
    RateLimitedLog(logger).write("relay failed", RuntimeError("a defect"), partition=1)
    _, _, line = log.getvalue().splitlines()[0].partition("Z ")
    assert line == "WARNING relay failed: RuntimeError: a defect partition=1"


def test_unforeseen_error_comes_with_its_traceback(logger: logging.Logger, log: io.StringIO) -> None:
    try:
        raise RuntimeError("a defect")
    except RuntimeError:
        logger.exception("relay failed")
    first, second, *_ = log.getvalue().splitlines()
    assert first.endswith("ERROR relay failed: a defect") and second.startswith("Traceback")


def test_traceback_steers_no_terminal(logger: logging.Logger, log: io.StringIO) -> None:
    """An error's text may be of a stranger: the last line of a traceback has it."""
    try:
        raise RuntimeError("a\x1b[2Jb\x9b\r\x07\u202e")
    except RuntimeError:
        logger.exception("relay failed")
    *_, last = log.getvalue().splitlines()
    assert last == r"RuntimeError: a\x1b[2Jb\x9b\r\x07\u202e"
    assert all(line.isprintable() for line in log.getvalue().splitlines())
