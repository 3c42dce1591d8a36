"""Class keywords: those of a dataclass have no place in a plain class."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["pass_keywords"]

DATACLASS: Final = frozenset(inspect.signature(dataclass).parameters) - {"cls"}


def pass_keywords(cls: type, keywords: Mapping[str, Any], further: Callable[..., object]) -> None:
    """Go on with ``__init_subclass__``; where it ends with keywords of a dataclass, as python-cqrs has them, say where they belong.

    Raises:
        TypeError: nobody takes the keywords.
    """
    try:
        further(**keywords)
    except TypeError:
        if keywords.keys().isdisjoint(DATACLASS):
            raise
        given = ", ".join(f"{name}={value!r}" for name, value in keywords.items())
        raise TypeError(f"{cls.__qualname__} takes no class keywords: put @dataclass({given}) above it") from None
