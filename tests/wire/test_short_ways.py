"""The shorter ways of a sender give the same as the long ones: payloads, ids, messages."""

from __future__ import annotations

import dataclasses
import os
import pickle
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any
from uuid import RFC_4122, UUID

import attrs
import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from silbo.errors import MessageRefused
from silbo.event import IDS_AT_ONCE, ECSTEvent, NotificationEvent, new_id, set_mark
from silbo.message import Message, instance, make_message, own_origin
from silbo.wire.encode import Unwritable, format_time, to_json_value, to_message
from silbo.wire.fields import event_fields
from tests.wire.test_round_trip import class_types


class Word(StrEnum):
    YES = "yes"


class Text(str):
    __slots__ = ()


class Number(int):
    pass


@dataclasses.dataclass
class Data(NotificationEvent):
    one: Any
    two: Any = dataclasses.field(metadata={"wire": "2"})


@attrs.define(slots=False)
class Attrs(ECSTEvent):
    one: Any
    two: Any


class Struct(ECSTEvent, msgspec.Struct, rename="camel"):
    one: Any
    two: Any


EDGES = [2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, -(2**64), 10**5000]
SPECIAL = [*EDGES, "\ud800", "ñ", Word.YES, Text("t"), Number(3), True, None, object(), msgspec.UNSET]
VALUES: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(SPECIAL),
    st.integers(),
    st.text(),
    st.floats(),
    st.lists(st.integers() | st.text() | st.floats(), max_size=2),
)


def long_way(event: Any) -> dict[str, Any] | tuple[str, str]:
    """The payload without id and time, every value by `to_json_value`; or the place and the problem."""
    payload = {}
    for attribute, wire in event_fields(type(event)).payload:
        value = getattr(event, attribute, msgspec.UNSET)
        try:
            if value is not msgspec.UNSET:
                payload[wire] = to_json_value(value)
        except Unwritable as error:
            return error.under(wire).path, error.problem
    return payload


def short_way(event: Any) -> dict[str, Any] | tuple[str, str]:
    try:
        payload = dict(to_message(event, name="thing", kind="ecst").payload)
    except MessageRefused as error:
        return error.field or "", error.problem
    del payload["event_id"], payload["event_timestamp"]
    return payload


def types_of(json: Any) -> Any:
    """The same with the types of the scalars, for 1 == True and "a" == Word("a")."""
    if isinstance(json, dict):
        return {key: types_of(value) for key, value in json.items()}
    return [types_of(item) for item in json] if isinstance(json, list | tuple) else (type(json), json)


@pytest.mark.parametrize("cls", [Data, Attrs, Struct])
def test_a_special_value_is_written_and_refused_as_by_the_long_way(cls: Any) -> None:
    for value in SPECIAL:
        assert types_of(short_way(cls(1, value))) == types_of(long_way(cls(1, value)))


@settings(max_examples=60, deadline=None)
@given(cls=st.sampled_from([Data, Attrs, Struct]), one=VALUES, two=VALUES)
def test_a_field_is_written_and_refused_as_by_the_long_way(cls: Any, one: Any, two: Any) -> None:
    event = cls(one, two)
    assert types_of(short_way(event)) == types_of(long_way(event))


@settings(max_examples=30, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_generated_class_is_written_as_by_the_long_way(data: st.DataObject) -> None:
    event = data.draw(data.draw(class_types(2, (ECSTEvent,))).values)
    if event_fields(type(event)).library not in ("plain", "pydantic"):  # those have no other way
        assert types_of(short_way(event)) == types_of(long_way(event))


# -- ids ----------------------------------------------------------------------------------------------------


def test_ids_are_uuids_of_version_7() -> None:
    """Each bit but those of time, version and variant is 0 in one and 1 in another."""
    texts = {new_id() for _ in range(4 * IDS_AT_ONCE)}
    ids = [UUID(text) for text in texts]
    assert len(texts) == 4 * IDS_AT_ONCE
    assert all(str(found) in texts and found.version == 7 and found.variant == RFC_4122 for found in ids)
    ones, all_ones = 0, ids[0].int
    for found in ids:
        ones |= found.int
        all_ones &= found.int
    fixed = (2**48 - 1) << 80 | 0xF << 76 | 0b11 << 62
    assert (ones ^ all_ones) | fixed == 2**128 - 1


def test_a_forked_process_gives_other_ids() -> None:
    """Both would find the same ids, made ahead."""
    new_id()
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, " ".join([new_id() for _ in range(3)]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = os.read(read, 4096).decode().split()
    os.close(read)
    os.close(write)
    ours = {new_id() for _ in range(2 * IDS_AT_ONCE)}
    assert len(theirs) == 3 and ours.isdisjoint(theirs)


def test_a_forked_process_has_an_origin_of_its_own() -> None:
    """Also where the parent has sent something: its origin is kept between messages."""
    ours = own_origin("web")
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, f"{own_origin('web').instance} {instance()}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = os.read(read, 4096).decode().split()
    os.close(read)
    os.close(write)
    assert ours == own_origin("web") == ("web", instance())
    assert theirs[0] == theirs[1] != ours.instance


# -- times --------------------------------------------------------------------------------------------------


@given(st.integers(0, 4_102_444_800 * 10**9))  # until 2100: a datetime is made of a float
@example(0)
@example(1_700_000_000_000_000_000)
@example(1_700_000_000_000_000_999)
@example(1_700_000_000_999_999_999)
@example(1_700_000_001_000_001_000)
def test_a_time_written_the_short_way_is_like_that_of_the_datetime(clock: int) -> None:
    event = Data(1, 2)
    set_mark(event, "__silbo_time__", clock)
    written = to_message(event, name="n", kind="notification").payload["event_timestamp"]
    assert written == format_time(event.event_timestamp)
    assert to_message(event, name="n", kind="notification").payload["event_timestamp"] == written


def test_a_time_that_was_set_is_written() -> None:
    """The time that a dispatch has noted does not take its place."""
    event = Data(1, 2)
    set_mark(event, "__silbo_time__", 1)
    event.event_timestamp = datetime(2026, 3, 7, tzinfo=UTC)
    written = to_message(event, name="n", kind="notification").payload["event_timestamp"]
    assert written == "2026-03-07T00:00:00Z"


# -- messages -----------------------------------------------------------------------------------------------


def test_a_message_made_the_short_way_is_like_any_other() -> None:
    arguments: tuple[Any, ...] = ("ecst_event", "user.joined", new_id(), {"a": 1}, {"key": "1"}, "orders.3", "User", 16)
    short, usual = make_message(*arguments), Message(*arguments)
    assert type(short) is Message and short == usual and repr(short) == repr(usual)
    assert dataclasses.replace(short, to=None) == dataclasses.replace(usual, to=None)
    assert pickle.loads(pickle.dumps(short)) == usual
    with pytest.raises(dataclasses.FrozenInstanceError):
        short.to = "elsewhere"  # type: ignore[misc]
    assert [field.name for field in dataclasses.fields(Message)] == [*make_message.__annotations__][:-1]
