"""RabbitMQ without its server: what the library refuses to write. The rest is in ``tests/services``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
from pamqp import frame, header

from silbo.brokers.rabbitmq import RabbitMQ
from silbo.errors import MessageRefused
from silbo.testing.conformance import message
from silbo.wire.formats import DIATOR


class Channel:
    """Writes the properties of each message, as the real one does first."""

    def __init__(self) -> None:
        self.published: list[bytes] = []

    async def basic_publish(self, body: bytes, *, properties: Any, **options: object) -> None:
        frame.marshal(header.ContentHeader(body_size=len(body), properties=properties), 1)
        self.published.append(body)


@pytest.mark.parametrize("headers", [{"publication": "p" * 300}, {"tenant": "\ud800"}])
async def test_message_that_can_not_be_written_is_refused_alone(
    headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is neither unknown nor an outage. This format leaves headers out of its bytes."""
    channel = Channel()

    async def give_channel(exchange: str) -> Channel:
        return channel

    async with RabbitMQ(cast("Any", None), "events", app="web", format=DIATOR) as broker:
        monkeypatch.setattr(broker, "_channel", give_channel)
        with pytest.raises(MessageRefused, match="can't be written for RabbitMQ"):
            await broker.publish(message(1), replace(message(2), headers=headers), message(3))
        assert len(channel.published) == 2
