"""Tools of the memory broker's tests: numbered messages, and reading them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from silbo.errors import Gap
from silbo.message import Delivery, Message
from silbo.protocols import Receiver


def message(number: int, *, to: str | None = None, payload: Any = None) -> Message:
    event_id = f"00000000-0000-4000-8000-{number:012}"
    values = {"event_id": event_id, "event_timestamp": "2026-03-07T09:26:02.588855Z", "number": number}
    return Message("ecst_event", "counted", event_id, payload or values, {"publication": f"p-{number}"}, to, "Counted")


def numbers(items: Sequence[Delivery | Gap]) -> list[int]:
    return [item.message().payload["number"] for item in items if isinstance(item, Delivery)]


async def everything(receiver: Receiver) -> list[Delivery]:
    return [item for item in await receiver.receive(1000) if isinstance(item, Delivery)]
