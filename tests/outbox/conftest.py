"""Fixtures of the outbox's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from silbo._retry import Backoff
from silbo.outbox import relay as relaying
from tests.support.relay import FailingBroker, GroupReader


@pytest.fixture
def quick_relay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a relay try again soon."""
    monkeypatch.setattr(relaying, "OUTAGE_RETRY", Backoff(initial=0.005, cap=0.05))
    monkeypatch.setattr(relaying, "STANDBY", 0.02)


@pytest.fixture
def broker() -> FailingBroker:
    return FailingBroker()


@pytest.fixture
async def heard(broker: FailingBroker) -> AsyncIterator[GroupReader]:
    receiver = await broker.group("all", start="oldest").open()
    yield GroupReader(receiver)
    await receiver.aclose()
