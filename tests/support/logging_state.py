"""Restoring the logging of this process, which all tests share."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def logging_as_it_was() -> Iterator[None]:
    """Around what sets it, as a program or a page may: afterwards it is as before."""
    root, own = logging.getLogger(), logging.getLogger("silbo")
    handlers, levels = root.handlers[:], (root.level, own.level)
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(levels[0])
        own.setLevel(levels[1])
