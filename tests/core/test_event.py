"""The parts that events carry of themselves: ids, times, kinds."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest

from silbo import AsyncEventDispatcher, DomainEvent, ECSTEvent, Event, NotificationEvent
from silbo.event import kind_of
from silbo.wire.encode import to_message


@dataclass
class Told(NotificationEvent):
    number: int = 0


@dataclass(frozen=True)
class Frozen(ECSTEvent):
    number: int = 0


@pytest.mark.parametrize("cls", [Told, Frozen, NotificationEvent, ECSTEvent])
def test_an_event_has_one_id_whoever_asks_first(cls: type[NotificationEvent]) -> None:
    """The message and the event agree, in either order; it is a random UUID."""
    read_first, sent_first = cls(), cls()
    for event in (read_first, sent_first):
        if event is read_first:
            assert isinstance(event.event_id, UUID)
        messages = [to_message(event, name="x", kind="notification") for _ in range(2)]
        assert {message.message_id for message in messages} == {str(event.event_id)}
        assert messages[0].payload["event_id"] == str(event.event_id)
        assert event.event_id.version == 7 and event.event_id.variant == uuid4().variant
        assert event.event_id is event.event_id
    assert read_first.event_id != sent_first.event_id


def test_ids_are_version_7_uuids_in_their_usual_form() -> None:
    """Also those that were first made as text."""
    texts = {to_message(Told(), name="x", kind="notification").message_id for _ in range(2000)}
    assert len(texts) == 2000
    assert all(str(UUID(text)) == text and UUID(text).version == 7 for text in texts)
    assert {text[19] for text in texts} == set("89ab")


def test_a_copy_or_pickle_of_a_sent_event_keeps_its_id() -> None:
    """It is the same fact."""
    event = Told(3)
    sent = to_message(event, name="x", kind="notification").message_id
    for again in (copy.copy(event), copy.deepcopy(event), pickle.loads(pickle.dumps(event))):
        assert str(again.event_id) == sent and again.number == 3


async def test_the_time_is_set_at_the_latest_when_the_first_dispatch_starts() -> None:
    """Not when somebody reads it later; it is aware, in UTC, and stays."""
    d = AsyncEventDispatcher()
    for _ in range(2):  # the second is dispatched directly
        event = Told()
        before = datetime.now(UTC)
        await d.adispatch("x", event)
        after = datetime.now(UTC)
        when = event.event_timestamp
        assert before <= when <= after and when.utcoffset() == timedelta(0)
        await d.adispatch("x", event)
        assert event.event_timestamp is when


def test_a_class_may_declare_id_and_time_itself() -> None:
    """Then they are fields like others."""

    @dataclass
    class Own(NotificationEvent):
        event_id: UUID = field(default_factory=uuid4)

    event = Own()
    assert to_message(event, name="x", kind="notification").message_id == str(event.event_id)


def test_kinds() -> None:
    """Of silbo's classes and those that derive from them; others have none."""
    assert [kind_of(cls) for cls in (Told, Frozen, DomainEvent, Event, int)] == [
        "notification",
        "ecst",
        "domain",
        None,
        None,
    ]
