"""Names of consumers and relays that tell the process: its host and its pid."""

from __future__ import annotations

import os
import re
import socket
from typing import Final, NamedTuple

__all__ = ["Process", "find_process", "name_process"]

HOST_LENGTH: Final = 64
"""Characters of a host's name that go into a name."""
_match_name = re.compile(r"([\w.-]+):(\d{1,10}):[0-9a-f]+(?:-\d+)?", re.ASCII).fullmatch


class Process(NamedTuple):
    """The host and the pid of a process."""

    host: str
    pid: int


def name_process(unique: str) -> str:
    """Return ``host:pid:unique`` for this process.

    Args:
        unique: Hexadecimal digits that no other process has, perhaps with ``-`` and a number.
    """
    host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:HOST_LENGTH] or "-"
    return f"{host}:{os.getpid()}:{unique}"


def find_process(name: str) -> Process | None:
    """Return the process that a name tells; None for a name that was made in another way."""
    found = _match_name(name)
    return Process(found[1], int(found[2])) if found else None
