"""Every publisher shows what the public suite asks of it; RabbitMQ does so in tests/services."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from silbo import Message, Outbox, Publisher
from silbo.brokers.memory import MemoryBroker
from silbo.errors import BrokerUnavailable, MessageRefused
from silbo.protocols import Promises
from silbo.stores.memory import MemoryStore
from silbo.testing import conformance, rig
from silbo.testing.conformance import CHECKS, Check, Rig
from tests.support import broker_rigs as rigs

RIGS: dict[str, Callable[[], AbstractAsyncContextManager[Rig]]] = {
    "memory": rigs.memory,
    "streams": rigs.streams,
    "pubsub": rigs.pubsub,
    "outbox-memory": rigs.outbox_in_memory,
    "azure": partial(rigs.azure, sessions=False),
    "azure-sessions": partial(rigs.azure, sessions=True),
    "kafka": rigs.kafka,
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("rig", RIGS)
async def test_publisher_conforms(rig: str, check: Check) -> None:
    async with RIGS[rig]() as opened:
        await check(opened)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_outbox_in_sqlite_conforms(check: Check, tmp_path: Path) -> None:
    async with rigs.outbox_in_sqlite(tmp_path) as opened:
        await check(opened)


@pytest.mark.parametrize(
    ("broker", "partitions", "promises"),
    [
        (Promises(), 1, Promises()),
        (Promises(keeps=False), 2, Promises(order="key", keeps=False)),
        (Promises(order="none"), 2, Promises(order="none")),
    ],
)
def test_outbox_promises_what_its_broker_does(broker: Promises, partitions: int, promises: Promises) -> None:
    """Several partitions are sent side by side: then the order is that of each key at most."""
    publisher = MemoryBroker()
    publisher.promises = broker  # type: ignore[misc]  # in place of a broker of each kind
    assert Outbox(MemoryStore(), publisher, partitions=partitions).promises == promises


class Faulty:
    """In front of a good publisher, it breaks a promise."""

    app = "web"

    def __init__(self, good: Publisher, how: str) -> None:
        self.good, self.how = good, how

    async def publish(self, *messages: Message) -> None:
        if self.how == "swallows refusals":
            with suppress(MessageRefused):
                await self.good.publish(*messages)
        elif self.how == "stops at a refusal":
            for message in messages:
                await self.good.publish(message)
        elif self.how == "loses some":
            await self.good.publish(*(message for message in messages if message.payload["n"] != 7))
        elif self.how == "doubles some":
            await self.good.publish(*messages, *(message for message in messages if message.payload["n"] == 7))
        elif self.how == "reverses calls":
            await self.good.publish(*reversed(messages))
        elif self.how == "overtakes":
            await asyncio.sleep(random.random() / 100)
            await self.good.publish(*messages)
        elif self.how == "ignores addresses":
            await self.good.publish(*(replace(message, to=None) for message in messages))
        elif self.how == "loses payloads":
            await self.good.publish(*(replace(message, payload={}) for message in messages))
        elif self.how == "fails at once":
            raise BrokerUnavailable("not sent")
        elif self.how == "raises what it likes":
            raise ConnectionError("reset by peer")
        elif self.how == "does not answer":
            await asyncio.Event().wait()
        elif self.how == "forgets headers":
            await self.good.publish(*(replace(message, headers={}) for message in messages))
        else:
            await self.good.publish(*messages)

    async def aclose(self) -> None:
        if self.how == "closes once":
            self.how = "closed"
        elif self.how == "closed":
            raise RuntimeError("closed already")


EACH = {check.__name__.removeprefix("check_") for check in CHECKS} - {"outage", "freeze", "sequence"}
"""The checks that check something of every publisher."""


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (rig, conformance):
        monkeypatch.setattr(module, "PATIENCE", 0.3)


@pytest.mark.parametrize(
    ("how", "caught"),
    [
        ("swallows refusals", {"refusal"}),
        ("stops at a refusal", {"refusal"}),
        ("loses some", {"batch", "call_order", "concurrency", "cancellation", "closing"}),
        pytest.param(
            "loses payloads",
            {"content", "batch", "call_order", "concurrency", "cancellation", "closing"},
            marks=pytest.mark.long,
        ),
        ("doubles some", {"batch", "call_order", "concurrency", "cancellation"}),
        ("reverses calls", {"batch"}),
        ("overtakes", {"call_order"}),
        ("ignores addresses", {"address"}),
        ("forgets headers", {"content"}),
        ("closes once", {"closing"}),
        ("fails at once", EACH - {"closing"}),
        ("raises what it likes", EACH),
        pytest.param("does not answer", EACH, marks=pytest.mark.long),
        ("does all well", set()),
    ],
)
async def test_suite_notices_a_broken_promise(how: str, caught: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A suite that every publisher passes would prove nothing."""
    impatient(monkeypatch)
    noticed = set()
    for check in CHECKS:
        async with rigs.memory() as good:
            rig = rigs.Received(Faulty(good.publisher, how), good.receivers)  # type: ignore[attr-defined]  # it is one
            try:
                await check(rig)
            except AssertionError:
                noticed.add(check.__name__.removeprefix("check_"))
    assert caught <= noticed
    assert bool(caught) == bool(noticed)


@pytest.mark.parametrize(
    "check", [conformance.check_outage, conformance.check_freeze], ids=lambda check: check.__name__
)
@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("lies that it is away", "though not sent"),
        ("does not answer", "did not answer"),
        ("loses what it confirmed", "lost .* without an error"),
        ("does not return", "the broker is back"),
        ("raises what it likes", "raised ConnectionError.*, and not BrokerUnavailable"),
    ],
)
async def test_suite_notices_a_lie_while_the_broker_is_away(
    check: Check, how: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And brings the broker back, whatever it has noticed: the rigs of other publishers may share it."""
    impatient(monkeypatch)

    class Liar(Faulty):
        is_away = False

        async def publish(self, *messages: Message) -> None:
            if not self.is_away or how == "lies that it is away":
                await self.good.publish(*messages)
            if self.is_away and how in ("lies that it is away", "does not return"):
                raise BrokerUnavailable("not sent")
            if self.is_away and how == "does not answer":
                await asyncio.Event().wait()
            if self.is_away and how == "raises what it likes":
                raise ConnectionError("reset by peer")

    left = False

    @asynccontextmanager
    async def away() -> AsyncIterator[None]:
        nonlocal left
        liar.is_away = True
        yield
        liar.is_away, left = how == "does not return", True

    async with rigs.memory() as good:
        liar = Liar(good.publisher, "")
        with pytest.raises(AssertionError, match=text):
            await check(rigs.Received(liar, good.receivers, away, away))  # type: ignore[attr-defined]  # it is one
    assert left
