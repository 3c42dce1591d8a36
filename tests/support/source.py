"""Python source as a tree."""

from __future__ import annotations

import ast
import gc

__all__ = ["parse_source"]


def parse_source(text: str) -> ast.Module:
    """Return the tree of a module.

    There is no garbage collection meanwhile: what it ends (a greenlet of SQLAlchemy's) can change the depth of the stack that
    Python 3.11 compares before and after, and then ``ast.parse`` raises a SystemError. Source: python/cpython#106905.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(text)
    finally:
        if was_enabled:
            gc.enable()
