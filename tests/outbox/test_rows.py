"""What an outbox stores: messages as bytes, and the partition of a key."""

from __future__ import annotations

import random
from collections import UserDict
from collections.abc import Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from silbo.errors import MessageRefused
from silbo.message import Format, Message, Origin
from silbo.outbox.rows import Quota, UnreadableMessage, _decode, pack, partition_of, unpack
from silbo.wire.encode import MAX_SIZE
from silbo.wire.formats import DIATOR, JSON, EncodedPayload
from tests.wire.test_codec_fuzz import mutate_bytes

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


# -- payloads that are not read ------------------------------------------------------------------------------


@given(payload=st.dictionaries(texts, values, max_size=4), headers=st.dictionaries(texts, texts, max_size=2))
@pytest.mark.parametrize("form", [JSON, DIATOR], ids=["json", "diator"])
def test_unread_payload_is_sent_as_one_that_was_read(
    form: Format, payload: dict[str, Any], headers: dict[str, str]
) -> None:
    message = Message("ecst_event", "user.joined", "id", payload, headers, "orders", "Joined")
    stored = unpack(pack(message, 1).raw)
    assert type(stored.payload) is EncodedPayload
    assert form.encode(stored, Origin("web", "1")) == form.encode(message, Origin("web", "1"))


def read_at_once(raw: bytes) -> Message | None:
    """What `unpack` gives without its short way."""
    try:
        return _decode(raw)
    except (msgspec.DecodeError, UnicodeError, RecursionError, TypeError):
        return None


def test_damaged_message_is_refused_whether_its_payload_is_read_or_not() -> None:
    """But for a number out of range, which is told when the payload is read."""
    payload = {"name": "Ñandú", "n": 17, "far": [1.5e10, -3], "in": {"a": None, "b": True}, "text": 'a "b" \\ {}[]'}
    raw = pack(Message("ecst_event", "user.joined", "id", payload, {"key": "ñ"}, None, "Joined"), 1).raw
    chance = random.Random(7)
    refused = 0
    for _ in range(20_000):
        damaged = mutate_bytes(chance, raw)
        expected, found = read_at_once(damaged), unpack(damaged)
        with suppress(MessageRefused):
            if not isinstance(found, UnreadableMessage):
                dict(found.payload)
            assert isinstance(found, UnreadableMessage) == (expected is None), damaged
            assert expected is None or found == expected
        refused += expected is None
    assert 5_000 < refused < 20_000


@pytest.mark.parametrize(
    "damaged", [b"[1]", b"null", b'{"a":"\xff"}', b"[" * 65 + b"]" * 65, b'{"a":' * 70 + b"1" + b"}" * 70]
)
def test_payload_that_is_no_object_or_too_deep_is_looked_at(damaged: bytes) -> None:
    raw = pack(Message("ecst_event", "user.joined", "id", {"a": 1}), 1).raw.replace(b'{"a":1}', damaged)
    message, read = unpack(raw), read_at_once(raw)
    assert isinstance(message, UnreadableMessage) if read is None else type(message.payload) is dict


def test_number_out_of_range_is_a_refusal_when_it_is_read() -> None:
    """So a relay puts its row aside, whatever the format: any other error would be tried again without an end."""
    message = unpack(pack(Message("ecst_event", "user.joined", "id", {"a": 1}), 1).raw.replace(b":1}", b":1e999}"))
    with pytest.raises(MessageRefused, match=r"user\.joined.*can't be read"):
        DIATOR.encode(message, Origin("web", "1"))


def test_quota_says_what_it_is() -> None:
    assert str(Quota(rows=5, size=7)) == "5 messages or 7 bytes"
