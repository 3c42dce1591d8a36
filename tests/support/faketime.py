"""Debian's `faketime` for tests; where it is not installed they are skipped, or fail if nothing may be left out."""

from __future__ import annotations

import os

import pytest

from chaos.faketime import find_library

__all__ = ["require_faketime"]


def require_faketime() -> str:
    """Return the path of its library."""
    library = find_library()
    if library is not None:
        return library
    reason = "no `faketime`; install it: apt-get install faketime"
    if os.environ.get("SILBO_LEAVE_OUT") == "nothing":
        pytest.fail(reason)
    pytest.skip(reason)
