"""Programs whose wall clock is wound, as after a wrong NTP step or a resumed virtual machine: by Debian's `faketime`."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from functools import cache

__all__ = ["find_library", "wound"]


def wound(by: str) -> Mapping[str, str] | None:
    """The environment of a program whose clock is wound, `by` as in "+1h"; None where `faketime` is not installed."""
    library = find_library()
    if library is None:
        return None
    # The monotonic clock stays as it is: no NTP step changes it.
    return {"LD_PRELOAD": library, "FAKETIME": by, "FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1"}


@cache
def find_library() -> str | None:
    """Return the path of the library that the command `faketime` preloads; None where it is not installed."""
    program = shutil.which("faketime")
    if program is None:
        return None
    told = subprocess.run([program, "-f", "+0", "printenv", "LD_PRELOAD"], capture_output=True, text=True, check=False)
    return told.stdout.strip() or None
