"""What an outbox stores: messages as bytes, and the partition of a key."""

from __future__ import annotations

import copy
import pickle
import random
from collections import UserDict
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silbo.errors import MessageRefused
from silbo.message import Format, Message, Origin
from silbo.outbox.rows import Quota, UnreadableMessage, pack, partition_of, unpack
from silbo.wire.encode import MAX_SIZE
from silbo.wire.formats import CLOUDEVENTS, DIATOR, JSON, EncodedMessage
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


ORIGIN = {"app": "web", "instance": "1"}


@pytest.mark.parametrize("form", [JSON, DIATOR, CLOUDEVENTS], ids=["json", "diator", "cloudevents"])
@given(
    payload=st.dictionaries(texts, values, max_size=4),
    headers=st.dictionaries(st.sampled_from(["key", "version", "publication"]), st.sampled_from("abñ"), max_size=3),
    to=st.none() | texts,
    class_name=texts,
)
def test_stored_message_is_sent_as_the_same_bytes(
    form: Format, payload: dict[str, Any], headers: dict[str, str], to: str | None, class_name: str
) -> None:
    """In the format JSON the stored bytes are sent without reading them; the app of whoever sends them does not matter."""
    message = Message("ecst_event", "user.joined", "id", payload, ORIGIN | headers, to, class_name)
    stored = unpack(pack(message, 1).raw)
    assert type(stored) is EncodedMessage
    sender = Origin("relay", "2") if form is JSON else Origin("web", "1")
    assert form.encode(stored, sender) == form.encode(message, sender)
    assert (stored.to, stored.class_name) == (to, class_name)
    assert stored == message and message == stored


def test_stored_message_without_an_origin_is_read() -> None:
    """The broker has to write its own one into it."""
    for headers in ({}, {"app": "web"}, {"instance": "1"}):
        stored = unpack(pack(Message("ecst_event", "user.joined", "id", {"a": 1}, headers), 1).raw)
        assert type(stored) is Message
        assert b'"app":"' in JSON.encode(stored, Origin("web", "1"))


def test_damaged_message_is_read_not_sent_as_it_is() -> None:
    payload = {"name": "Ñandú", "n": 17, "far": [1.5e10, -3], "in": {"a": None, "b": True}, "text": 'a "b" \\ {}[]'}
    raw = pack(Message("ecst_event", "user.joined", "id", payload, {**ORIGIN, "key": "ñ"}, None, "Joined"), 1).raw
    chance = random.Random(7)
    kinds = [type(unpack(damaged)) for _ in range(5_000) if (damaged := mutate_bytes(chance, raw)) != raw]
    assert set(kinds) == {Message, UnreadableMessage}


def test_changed_copy_of_a_stored_message_is_read() -> None:
    """So a publisher that adds a header sends it."""
    message = Message("ecst_event", "user.joined", "id", {"a": 1}, ORIGIN, "orders", "Joined")
    stored = unpack(pack(message, 1).raw)
    changed = replace(stored, headers={**ORIGIN, "trace": "7"})
    assert type(changed) is Message and b'"trace":"7"' in JSON.encode(changed, Origin("web", "1"))
    assert repr(stored).endswith(repr(message).removeprefix("Message"))
    for made in (copy.copy(stored), copy.deepcopy(stored), pickle.loads(pickle.dumps(stored))):
        assert made == message
    with pytest.raises(AttributeError, match="colour"):
        _ = stored.colour  # type: ignore[attr-defined]


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
