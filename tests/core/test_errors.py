"""The errors: their attributes and texts survive a copy, and a pickle to another process."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from silbo.errors import BrokerUnavailable, DispatcherClosed, Gap, ListenerTimeout, MessageRefused, MissingExtra

ERRORS = [
    MessageRefused("user.joined", "no such field", field="plan"),
    MessageRefused(name="user.joined", problem="no such field"),
    Gap("events", "cut off", count=3),
    MissingExtra("silbo.brokers.kafka", extra="kafka"),
    ListenerTimeout("listener", 2.0),
    BrokerUnavailable("no answer"),
    DispatcherClosed(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("again", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))], ids=["copy", "pickle"])
def test_an_error_survives_copies_and_pickles(error: Exception, again: Any) -> None:
    """A worker process that can't send its error back leaves its caller waiting."""
    found = again(error)
    assert type(found) is type(error)
    assert (str(found), repr(found), vars(found)) == (str(error), repr(error), vars(error))
