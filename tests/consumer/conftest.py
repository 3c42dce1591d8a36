"""A memory broker, a dispatcher, and somebody who notes what it hears."""

from __future__ import annotations

import pytest

from silbo import (
    AsyncEventDispatcher,
)
from silbo.brokers.memory import MemoryBroker
from tests.support.consumer import Heard


@pytest.fixture
def broker() -> MemoryBroker:
    return MemoryBroker("other")


@pytest.fixture
def d() -> AsyncEventDispatcher:
    return AsyncEventDispatcher()


@pytest.fixture
def heard(d: AsyncEventDispatcher) -> Heard:
    heard = Heard()
    d.add_subscriber(heard)
    return heard
