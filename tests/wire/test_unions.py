"""Unions of values that JSON writes alike, in every order: each value comes back as itself, or the class is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, Flag, IntEnum, IntFlag, StrEnum
from itertools import permutations
from typing import Any, Literal, Union
from uuid import UUID

import pytest

from silbo import ECSTEvent
from silbo.errors import ClassUnreadable
from silbo.wire.decode import check_class, to_event
from tests.support.wire_classes import wire


class Right(Flag):
    READ = 1
    WRITE = 2


class Bit(IntFlag):
    LOW = 1
    HIGH = 2


class Rank(IntEnum):
    LOW = 1


class Ratio(Enum):
    HALF = 0.5
    WHOLE = 1.0


class Mixed(Enum):
    NUMBER = 1
    TEXT = "b"


class Count(int):
    """A host's own class of numbers."""


class Word(StrEnum):
    YES = "yes"


class Name(str):
    """A host's own class of texts."""

    __slots__ = ()


NUMBERS: dict[Any, Sequence[Any]] = {
    bool: [True, False],
    int: [0, 1, 5],
    float: [0.0, 1.0, 2.5],
    Right: [Right.READ, Right.READ | Right.WRITE],
    Bit: [Bit.LOW, Bit(3)],
    Rank: [Rank.LOW],
    Ratio: [Ratio.HALF, Ratio.WHOLE],
    Mixed: [Mixed.NUMBER, Mixed.TEXT],
    Count: [Count(1)],
    Literal[1]: [1],
}
TEXTS: dict[Any, Sequence[Any]] = {
    str: ["", "yes", "1", "1.50"],
    Word: [Word.YES],
    Mixed: [Mixed.NUMBER, Mixed.TEXT],
    Name: [Name("a")],
    Literal["a"]: ["a"],
    bytes: [b"a", b"abcd"],
    Decimal: [Decimal(1), Decimal("1.50")],
    UUID: [UUID(int=7)],
    datetime: [datetime(2026, 1, 1, tzinfo=UTC)],
    date: [date(2026, 1, 1)],
    time: [time(1, 2)],
    timedelta: [timedelta(seconds=1)],
}
CONTAINERS: dict[Any, Sequence[Any]] = {
    list[int]: [[], [1]],
    list[float]: [[], [1.0]],
    list[Right]: [[Right.READ]],
    tuple[int, float]: [(1, 1.0)],
    dict[str, int]: [{"a": 1}],
    dict[str, float]: [{"a": 1.0}],
    dict[str, bool]: [{"a": True}],
    float: [1.0],
    None: [None],
}


def is_same(one: Any, other: Any) -> bool:
    """True if two values are equal and of the same types all through."""
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(value, other[key]) for key, value in one.items())
    return bool(one == other)


@pytest.mark.parametrize(
    ("members", "many"),
    [(NUMBERS, 2), (NUMBERS, 3), (TEXTS, 2), (CONTAINERS, 2)],
    ids=["numbers", "three numbers", "texts", "containers"],
)
def test_value_of_a_union_comes_back_as_itself_or_the_class_is_refused(
    members: dict[Any, Sequence[Any]], many: int
) -> None:
    """Never as another member's value: for Python, 1 is 1.0 and True, too."""
    wrong: list[str] = []
    accepted = 0
    for hints in permutations(members, many):
        cls: Any = dataclasses.make_dataclass("Told", [("value", Union[hints])], bases=(ECSTEvent,))  # noqa: UP007  # of a tuple
        try:
            check_class(cls)
        except ClassUnreadable:
            continue
        accepted += 1
        for value in [value for hint in hints for value in members[hint]]:
            try:
                again = to_event(wire(cls(value)), cls).value
            except Exception as error:  # whatever it is, the class was accepted
                again = error
            if not is_same(value, again):
                wrong.append(f"{hints}: sent {value!r}, got {again!r}")
    assert not wrong
    assert accepted > 20


@pytest.mark.parametrize(("hint", "number"), [(float | Right, 8), (float | str, 1)])
def test_number_without_a_point_is_still_a_float_if_no_other_member_takes_it(hint: Any, number: int) -> None:
    """Other languages write 8.0 as 8."""
    cls: Any = dataclasses.make_dataclass("Told", [("value", hint)], bases=(ECSTEvent,))
    message = wire(cls(2.5))
    message.payload["value"] = number
    assert is_same(to_event(message, cls).value, float(number))
