"""Every publisher shows what the public suite asks of it; RabbitMQ does so in tests/services."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

import pytest

from silbo.testing.conformance import CHECKS, Check, Rig
from tests.brokers import rigs

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
