"""What an outbox stores: messages as bytes, and the partition of a key."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silbo.errors import MessageRefused
from silbo.message import Message
from silbo.outbox.rows import Quota, pack, partition_of, unpack
from silbo.wire.encode import MAX_SIZE

texts = st.text(st.characters(exclude_categories=["Cs"]))
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@given(
    payload=st.dictionaries(texts, values, max_size=4),
    headers=st.dictionaries(texts, texts, max_size=3),
    to=st.none() | texts,
    names=st.tuples(texts, texts, texts, texts),
)
def test_message_comes_back_as_it_was(
    payload: dict[str, Any], headers: dict[str, str], to: str | None, names: tuple[str, str, str, str]
) -> None:
    kind, name, message_id, class_name = names
    message = Message(kind, name, message_id, payload, headers, to, class_name)
    assert unpack(pack(message, 1).raw) == message


@pytest.mark.parametrize("wrap", [MappingProxyType, UserDict])
def test_any_mapping_is_a_payload(wrap: Any) -> None:
    payload: Mapping[str, Any] = wrap({"user_id": 1})
    message = Message("ecst_event", "user.joined", "id", payload)
    assert unpack(pack(message, 1).raw).payload == {"user_id": 1}


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "payload", [{"odd": object()}, {"odd": "\ud800"}, {"odd": nested(100_000)}, {"odd": float("nan")}]
)
def test_what_can_not_be_written_is_refused(payload: dict[str, Any]) -> None:
    """By the same rules as at the broker: so its publisher hears of it, not a relay."""
    with pytest.raises(MessageRefused, match=r"user\.joined.*odd"):
        pack(Message("ecst_event", "user.joined", "id", payload), 1)


def test_what_is_larger_than_a_message_may_be_is_refused() -> None:
    message = Message("ecst_event", "user.joined", "id", {"text": "x" * MAX_SIZE})
    with pytest.raises(MessageRefused, match="1048576"):
        pack(message, 1)


def test_key_decides_the_partition() -> None:
    """For good: rows are looked for where they were put by an older version."""
    assert [partition_of(key, 8) for key in (None, "", "1", "2", "käse", "customer-17")] == [0, 0, 7, 5, 7, 7]
    assert {partition_of(str(number), 4) for number in range(100)} == {0, 1, 2, 3}
    message = Message("ecst_event", "user.joined", "id", {}, {"key": "2"})
    assert (pack(message, 8).partition, pack(message, 8).key) == (5, "2")


def test_quota_says_what_it_is() -> None:
    assert str(Quota(rows=5, size=7)) == "5 messages or 7 bytes"
