"""One message from a host's own loop: dispatched as a consumer would, and every error its caller's."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import AsyncMock

import pytest
import whistle

from silbo import AsyncEventDispatcher, Bridge, ECSTEvent, EventName, receive
from silbo.brokers.memory import MemoryBroker
from silbo.errors import MessageInvalid, OwnMessagesUndecided
from silbo.message import Message, Origin
from silbo.names import MAX_NAME_LENGTH
from silbo.wire.formats import CLOUDEVENTS, DIATOR, JSON
from tests.support.consumer import USER_JOINED, UserJoined, joined

ELSEWHERE = Origin("other", "1")


def raw(format_: Any = JSON, origin: Origin = ELSEWHERE) -> bytes:
    return bytes(format_.encode(joined(7), origin))


@pytest.fixture
def dispatcher() -> AsyncEventDispatcher:
    return AsyncEventDispatcher()


@pytest.mark.parametrize("format_", [JSON, DIATOR, CLOUDEVENTS], ids=lambda format_: type(format_).__name__)
async def test_event_arrives_as_its_class_in_every_format(dispatcher: AsyncEventDispatcher, format_: Any) -> None:
    dispatcher.add_listener(USER_JOINED, listener := AsyncMock())
    event = await receive(dispatcher, raw(format_), events=[USER_JOINED], format=format_)
    listener.assert_awaited_once_with(event)
    assert event == UserJoined(7)
    assert event.name == "user.joined"


async def test_a_name_that_is_too_long_is_refused_in_a_format_of_the_hosts_own(
    dispatcher: AsyncEventDispatcher,
) -> None:
    """No listener of every name hears it, and nothing keeps it."""

    class Own:
        names = "event"

        def decode(self, raw: bytes) -> Message:
            return Message("ecst_event", raw.decode(), "9f62e977-73f7-462b-92cb-8ea658d3bcb5", {})

    own: Any = Own()
    dispatcher.add_listener("**", listener := AsyncMock())
    await receive(dispatcher, "x" * MAX_NAME_LENGTH, format=own)
    with pytest.raises(MessageInvalid, match="1001 characters") as caught:
        await receive(dispatcher, "x" * (MAX_NAME_LENGTH + 1), format=own)
    assert caught.value.field == "message_name"
    listener.assert_awaited_once()


async def test_unknown_name_arrives_with_its_payload(dispatcher: AsyncEventDispatcher) -> None:
    event = await receive(dispatcher, raw().decode())
    assert isinstance(event, ECSTEvent)
    assert event.payload["user_id"] == 7  # type: ignore[attr-defined]  # what arrives without a class has it


async def test_origin_is_known_and_it_is_not_bridged_again(dispatcher: AsyncEventDispatcher) -> None:
    dispatcher.add_subscriber(Bridge(broker := MemoryBroker("web")))
    receiver = await broker.group("g", start="oldest").open()
    event = await receive(dispatcher, raw(), events=[USER_JOINED])
    assert event.origin == ELSEWHERE
    await dispatcher.adispatch(USER_JOINED, UserJoined(8))
    assert len(await receiver.receive(10)) == 1


async def test_whistle_dispatcher_will_do() -> None:
    dispatcher = whistle.AsyncEventDispatcher()
    dispatcher.add_listener("user.joined", listener := AsyncMock())
    assert await receive(dispatcher, raw(), events=[USER_JOINED]) == UserJoined(7)
    listener.assert_awaited_once()


async def test_listener_error_is_the_callers(dispatcher: AsyncEventDispatcher) -> None:
    """Who then leaves the message with its broker."""
    dispatcher.add_listener(USER_JOINED, AsyncMock(side_effect=OSError("no")))
    with pytest.raises(OSError, match="no"):
        await receive(dispatcher, raw(), events=[USER_JOINED])


async def test_cancellation_is_the_callers(dispatcher: AsyncEventDispatcher) -> None:
    dispatcher.add_listener(USER_JOINED, AsyncMock(side_effect=asyncio.CancelledError))
    with pytest.raises(asyncio.CancelledError):
        await receive(dispatcher, raw(), events=[USER_JOINED])


@pytest.mark.parametrize(
    "bad", [None, b"\xff", "[]", JSON.encode(Message("ecst_event", "user.joined", "x", {}), ELSEWHERE)]
)
async def test_malformed_message_is_told_from_a_failing_listener(
    dispatcher: AsyncEventDispatcher, bad: bytes | str | None
) -> None:
    dispatcher.add_listener(USER_JOINED, listener := AsyncMock())
    with pytest.raises(MessageInvalid):
        await receive(dispatcher, bad, events=[USER_JOINED])
    listener.assert_not_awaited()


@pytest.mark.parametrize("decoded", [{"message_name": "user.joined"}, [1], 7])
async def test_what_is_decoded_already_is_refused(dispatcher: AsyncEventDispatcher, decoded: Any) -> None:
    """It is a mistake in the program and not in the message: nothing to be parked."""
    with pytest.raises(TypeError, match=f"bytes or str, not {type(decoded).__name__}"):
        await receive(dispatcher, decoded)


@pytest.mark.parametrize("kind", [bytearray, memoryview])
async def test_bytes_may_be_of_any_kind(dispatcher: AsyncEventDispatcher, kind: Any) -> None:
    assert await receive(dispatcher, kind(raw()), events=[USER_JOINED]) == UserJoined(7)


class TestOwn:
    """What a program has dispatched and bridged comes back to it where it consumes the same topic."""

    own = raw(origin=Origin("web", "1"))

    @pytest.fixture
    def bridged(self, dispatcher: AsyncEventDispatcher) -> AsyncEventDispatcher:
        dispatcher.add_subscriber(Bridge(MemoryBroker("web")))
        return dispatcher

    async def test_has_to_be_decided(self, bridged: AsyncEventDispatcher) -> None:
        with pytest.raises(OwnMessagesUndecided, match="web"):
            await receive(bridged, self.own, events=[USER_JOINED])
        assert await receive(bridged, raw(), events=[USER_JOINED]) == UserJoined(7)  # another's

    async def test_is_skipped(self, bridged: AsyncEventDispatcher) -> None:
        bridged.add_listener(USER_JOINED, listener := AsyncMock())
        assert await receive(bridged, self.own, events=[USER_JOINED], own="skip") is None
        listener.assert_not_awaited()

    async def test_is_handled(self, bridged: AsyncEventDispatcher) -> None:
        assert await receive(bridged, self.own, events=[USER_JOINED], own="handle") == UserJoined(7)

    async def test_is_another_app_where_that_is_said(self, bridged: AsyncEventDispatcher) -> None:
        assert await receive(bridged, self.own, events=[USER_JOINED], app="worker") == UserJoined(7)
        with pytest.raises(OwnMessagesUndecided):
            await receive(bridged, self.own, events=[USER_JOINED], app="web")

    async def test_is_not_what_has_no_origin(self, bridged: AsyncEventDispatcher) -> None:
        """A format without headers says nothing of it: it is heard."""
        event = await receive(bridged, raw(DIATOR), events=[USER_JOINED], format=DIATOR, own="skip")
        assert event == UserJoined(7)

    async def test_is_nothing_else(self, bridged: AsyncEventDispatcher) -> None:
        with pytest.raises(ValueError, match='"skip", "handle" or None'):
            await receive(bridged, self.own, own="ignore")  # type: ignore[arg-type]  # that is the point


async def test_two_classes_for_one_name_are_refused(dispatcher: AsyncEventDispatcher) -> None:
    with pytest.raises(ValueError, match="twice"):
        await receive(dispatcher, raw(), events=[USER_JOINED, EventName("user.joined", ECSTEvent)])
