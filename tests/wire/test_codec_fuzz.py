"""20,000 mutated messages, in ``make test-long`` 200,000: whatever a decoder is fed, only MessageInvalid comes out.

``SILBO_FUZZ_SEED`` tries another sequence; a failure prints the seed and the bytes.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

import attrs
import msgspec
import pydantic
import pytest

from silbo.errors import MessageInvalid
from silbo.event import ECSTEvent, Event, NotificationEvent
from silbo.message import Format, Message, Origin
from silbo.wire.decode import to_event
from silbo.wire.encode import to_message
from silbo.wire.formats import CLOUDEVENTS, DIATOR, JSON

SEED = int(os.environ.get("SILBO_FUZZ_SEED", "20260307"))
MUTATIONS = int(os.environ.get("SILBO_FUZZ_MUTATIONS", "20000"))
PARTS = 4  # of each format, for the workers of xdist
FORMATS = {"json": JSON, "diator": DIATOR, "cloudevents": CLOUDEVENTS}


class Color(Enum):
    RED = "red"
    MIX = 7


@dataclass
class Address:
    city: str
    geo: tuple[float, float]
    seal: bytes = b""


class Person(pydantic.BaseModel):
    name: str
    photo: bytes


@dataclass(frozen=True)
class Order(ECSTEvent):
    order: UUID
    at: datetime
    price: Decimal
    color: Color
    address: Address
    every: timedelta
    hour: time
    tags: set[str] = field(default_factory=set)
    limits: dict[int, float] = field(default_factory=dict)
    who: UUID | date | int | None = None


@attrs.frozen
class Moved(NotificationEvent):
    address: Address
    wallets: list[Decimal] = attrs.field(factory=list)


class Scored(NotificationEvent, msgspec.Struct, frozen=True):
    score: float
    rank: int = 0


class Met(ECSTEvent, pydantic.BaseModel):
    who: Person
    at: datetime
    pets: list[bytes] = []
    note: str | None = None


class Plain(Event):
    user: UUID

    def __init__(self, user: UUID, *tags: str, more: Any = None) -> None:
        self.user, self.more = user, more


SAMPLES: list[Any] = [
    Order(
        UUID(int=5),
        datetime(2026, 3, 7, 9, 26, 2, 588855, tzinfo=UTC),
        Decimal("1.10"),
        Color.MIX,
        Address("Gomera", (28.1, -17.1), b"\x00"),
        timedelta(days=1, microseconds=3),
        time(9, 26),
        {"a"},
        {1: 0.5},
        date(2026, 3, 7),
    ),
    Moved(Address("kénd", (0.0, 1.0)), [Decimal("0.10")]),
    Scored(0.5),
    Met(who=Person(name="x", photo=b"\xfe"), at=datetime(2026, 3, 7, tzinfo=UTC), pets=[b"x"]),
    Plain(UUID(int=6), more={"a": [1, "x", None]}),
]
CLASSES: list[type | None] = [None, *map(type, SAMPLES)]

# Pieces that parsers, dates, numbers and constructors have stumbled over.
TOKENS = [
    *(b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"-0", b"1e-400", b"9" * 400, b"9" * 5000, b"0.1e1"),
    *(b'"\\ud800"', b'"\\udfff\\ud800"', b'"\\u0000"', b'"\xff"', b"\xc0\x80", b"\xed\xa0\x80", b'"\\x"', b"\x00"),
    *(b"[" * 70, b"[" * 3000, b'{"a":' * 70, b"[[[]]]", b"{}", b"[]", b'""', b",", b":", b'"', b"}", b"]", b"\\"),
    *(b'"0001-01-01T00:00:00+23:59"', b'"9999-12-31T23:59:60Z"', b'"2026-02-30T00:00:00Z"', b'"P999999999999D"'),
    *(b'"sNaN"', b'"1e999999999"', b'"%%%"', b'"{00000000-0000-0000-0000-000000000000}"', b'"__class__"'),
]
VALUES: list[Any] = [
    *(None, True, 0, -1, 1.5, 10**40, 2**63, 1e308, "", "x", "7", "red", "\ud800", "\x00", "event_id", "wire"),
    *([], {}, [[]], {"a": {}}, [None], {"": ""}, "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "P1D"),
    *("2026-03-07T09:26:02.588855Z", "2026-03-07T09:26:02", "5", "sNaN", "Infinity", "=", "AA==", "1e99999999"),
    "00000000-0000-0000-0000-000000000005",
]
KEYS = [
    "__class__",
    "__dict__",
    "_x",
    "dispatcher",
    "stop_propagation",
    "event_id",
    "event_timestamp",
    "more",
    "\ud800",
]


def mutate_bytes(chance: random.Random, raw: bytes) -> bytes:
    mutated = bytearray(raw)
    for _ in range(chance.choice((1, 1, 2, 4, 8))):
        at = chance.randrange(len(mutated) + 1)
        match chance.randrange(6):
            case 0:
                mutated[at : at + 1] = bytes((chance.randrange(256),))
            case 1:
                del mutated[at : at + chance.randrange(1, 20)]
            case 2:
                mutated[at:at] = chance.choice(TOKENS)
            case 3:
                mutated[at : at + chance.randrange(1, 20)] = chance.choice(TOKENS)
            case 4:
                end = at + chance.randrange(1, 60)
                mutated[at:at] = mutated[at:end]
            case _:
                if at < len(mutated):
                    mutated[at] ^= 1 << chance.randrange(8)
    return bytes(mutated)


def mutate_structure(chance: random.Random, raw: bytes) -> bytes:
    whole = json.loads(raw)
    for _ in range(chance.choice((1, 1, 2, 3))):
        containers = [node for node in walk(whole) if isinstance(node, dict | list) and node]
        if not containers:
            break
        node = chance.choice(containers)
        at: Any = chance.choice(list(node) if isinstance(node, dict) else range(len(node)))
        match chance.randrange(4):
            case 0:
                del node[at]
            case 1 if isinstance(node, dict):
                node[chance.choice(KEYS)] = node.pop(at)
            case 2:
                node[at] = [node[at]] if chance.random() < 0.5 else {"a": node[at]}
            case _:
                node[at] = deepcopy(chance.choice(VALUES))
    return json.dumps(whole, separators=(",", ":")).encode()


def walk(node: Any) -> Any:
    yield node
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from walk(inner)


def messages(form: Format) -> list[bytes]:
    """The same bytes in every run, or a seed would say nothing."""
    raws: list[bytes] = []
    for event in SAMPLES:
        event.__dict__.update(event_id=UUID(int=9), event_timestamp=datetime(2026, 3, 7, tzinfo=UTC))
        sent = to_message(event, name="order.placed", kind="ecst")
        sent = replace(sent, headers={"publication": "p-1", "version": "1", "key": "5"})
        raws.append(form.encode(sent, Origin("web", "0" * 32)))
    return raws


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", FORMATS)
def test_only_message_invalid_comes_out_of_mutated_messages(name: str, part: int) -> None:
    """A consumer's loop catches that error alone, so any other one would stop it."""
    print(f"SILBO_FUZZ_SEED={SEED}")
    form, raws = FORMATS[name], messages(FORMATS[name])
    chance = random.Random(f"{SEED} {name} {part}")
    mutations: list[Callable[[random.Random, bytes], bytes]] = [mutate_bytes, mutate_structure]
    read = rebuilt = 0
    rounds = -(-MUTATIONS // (len(FORMATS) * PARTS))
    for number in range(rounds):
        raw = mutations[number % 2](chance, chance.choice(raws))
        try:
            message = form.decode(raw)
            check(message)
            read += 1
            to_event(message, chance.choice(CLASSES))
            rebuilt += 1
        except MessageInvalid as error:
            str(error)
        except Exception as error:
            pytest.fail(f"{error!r} came out of {name}, SILBO_FUZZ_SEED={SEED}: {raw[:2000]!r}")
    assert rounds // 4 < read < rounds, "the mutations are too wild, or too tame, to try anything"
    assert rounds // 20 < rebuilt < read


def check(message: Message) -> None:
    """A decoded message has the types that everybody after it counts on."""
    texts = (
        message.message_type,
        message.message_name,
        message.message_id,
        *message.headers,
        *message.headers.values(),
    )
    assert all(type(text) is str for text in texts)
    assert type(message.payload) is dict
    "".join(texts).encode()
