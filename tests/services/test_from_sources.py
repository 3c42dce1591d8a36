"""The documents' example on RabbitMQ, on a real server."""

from __future__ import annotations

import pytest

from tests.examples.test_from_sources import ORDERS, program

pytestmark = [pytest.mark.rabbitmq, pytest.mark.xdist_group("rabbitmq")]


def test_notification_events_on_rabbitmq() -> None:
    """What the flow of python-cqrs sends to a broker is heard from a queue by another program, in order."""
    done = program("cqrs_rabbitmq")
    assert (done.returncode, done.stdout.splitlines(), done.stderr) == (0, ORDERS, "")
