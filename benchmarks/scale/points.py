"""The measured points, in one file: the programs that measure write them, the model and the simulation read them."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from tools.redis_binary import find_binary

__all__ = ["FILE", "MissingPoint", "find_point", "write_points"]

FILE: Final = Path(__file__).with_name("points.json")


class MissingPoint(LookupError):
    """A point that no program has measured yet."""

    def __init__(self, part: str, name: str) -> None:
        super().__init__(part, name)
        self.part, self.name = part, name

    def __str__(self) -> str:
        return f"{FILE.name} has no point {self.name!r}; measure it: python -m benchmarks.scale.{self.part}"


def write_points(part: str, points: Mapping[str, object]) -> None:
    """Write what a program has measured, with its setting; its other points stay, and those of other programs."""
    setting = {
        "on": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "redis": str(find_binary()),
        "system": platform.platform(),
    }
    parts = _read(FILE)
    parts |= {part: {**parts.get(part, {}), "setting": setting, **points}}
    _read.cache_clear()
    FILE.write_text(json.dumps({name: parts[name] for name in sorted(parts)}, indent=1) + "\n")


def find_point(part: str, name: str) -> Any:
    """Return a point by the program that measured it, and its name.

    Raises:
        MissingPoint: it was not measured.
    """
    try:
        return _read(FILE)[part][name]
    except KeyError:
        raise MissingPoint(part, name) from None


@lru_cache
def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}
