"""The tables of policies on the page about errors: each combination does what they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest

from silbo import AsyncEventDispatcher, Bridge, ECSTEvent
from silbo.brokers.memory import MemoryBroker
from silbo.message import Message

ROOT = Path(__file__).resolve().parents[2]
POLICIES = ['`"raise"`', '`"collect"`', "a callable"]


class Recorder(MemoryBroker):
    """Remembers the messages that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Message] = []

    async def publish(self, *messages: Message) -> None:
        self.sent += messages


def read_tables() -> tuple[dict[tuple[str, str], str], dict[str, list[str]]]:
    """Return the policy that applies, by the dispatcher's and the listener's; and what each policy does."""
    text = ROOT.joinpath("docs/howto/errors.md").read_text()
    _, _, part = text.partition("## Which policy applies")
    applies, does = (
        [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
        for table in re.findall(r"(?:^\|.*\n)+", part, re.MULTILINE)[:2]
    )
    return {(host, own): policy for host, own, policy in applies}, {policy: cells[:3] for policy, *cells in does}


@pytest.mark.parametrize("binding", [False, True], ids=["", "binding"])
@pytest.mark.parametrize("own", [None, *POLICIES])
@pytest.mark.parametrize("host", POLICIES)
async def test_each_combination_of_policies_does_what_the_page_says(host: str, own: str | None, binding: bool) -> None:
    """A host with plugins that it does not know decides by these tables."""
    applies, does = read_tables()
    asked = ("any, with `binding=True`" if binding and own else "any", "any" if own else "none")
    caller, runs, sends = does[{"the dispatcher's": host, "the listener's": own}[applies[asked]] or ""]
    isolated = AsyncMock()
    given: dict[str | None, Any] = {'`"raise"`': "raise", '`"collect"`': "collect", "a callable": isolated}
    broker = Recorder()
    d = AsyncEventDispatcher(on_error=given[host], binding=binding)
    d.add_listener("x", AsyncMock(side_effect=LookupError), on_error=given.get(own))
    d.add_listener("x", later := AsyncMock())
    d.add_subscriber(Bridge(broker))
    error: Exception | None = None
    try:
        await d.adispatch("x", ECSTEvent())
    except (LookupError, ExceptionGroup) as raised:
        error = raised
    expected = {"the error": LookupError, "an `ExceptionGroup`, at the end": ExceptionGroup, "nothing": type(None)}
    assert type(error) is expected[caller]
    assert {"yes": 1, "no": 0}[runs] == later.await_count
    assert {"yes": 1, "no": 0}[sends] == len(broker.sent)
    assert isolated.await_count == (caller == "nothing")
