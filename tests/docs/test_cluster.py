"""The page on Redis Cluster, on a cluster."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from silbo import AsyncEventDispatcher, Consumer, Event
from silbo.brokers.redis import RedisPubSub
from silbo.message import Message, new_publication
from tests.support.redis_streams import message, number, opened, receive
from tests.support.snippets import execute, shown
from tools.redis_cluster import ClusterServers

pytestmark = pytest.mark.cluster

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "cluster.md"


def to(address: str, prefix: str) -> Message:
    headers = {"publication": new_publication(), "version": "1"}
    return Message("notification_event", f"{prefix}.placed", str(uuid4()), {}, headers, address)


async def test_streams_and_channels_of_the_page(cluster: ClusterServers, prefix: str) -> None:
    heard: list[str] = []
    dispatcher = AsyncEventDispatcher()

    async def hear(event: Event) -> None:
        heard.append(event.name)
        if len(heard) == 2:
            page["consumer"].stop()

    dispatcher.add_listener(f"{prefix}.placed", hear)
    page: dict[str, Any] = {
        "Consumer": Consumer,
        "RedisPubSub": RedisPubSub,
        "dispatcher": dispatcher,
        "order_placed": to("orders", prefix),
        "invoice_paid": to("invoices", prefix),
        "user_joined": message(1, "user.joined"),
    }

    async def run(word: str) -> None:
        code = shown(PAGE, word).replace("redis://localhost:7000", cluster.url)
        await execute(re.sub(r'app="\w+"', rf'\g<0>, prefix="{prefix}"', code), page)

    await run("from_url")
    async with asyncio.timeout(30):
        await run("group(")
    assert heard == [f"{prefix}.placed"] * 2
    await run("pubsub = ")
    pubsub, subscription = page["pubsub"], page["subscription"]
    assert isinstance(pubsub, RedisPubSub)
    async with pubsub, page["streams"], page["client"], opened(subscription) as receiver:
        await pubsub.publish(message(2, "user.joined"))
        assert [number(item) for item in await receive(receiver, 1)] == [2]
