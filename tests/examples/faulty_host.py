"""The demo's host with something wrong in it (`FAULT` says what), so that it can be seen that the demo notices."""

from __future__ import annotations

import os
from typing import Any

from examples.meetings import host, house_rules
from examples.meetings.measure import Counting
from examples.meetings.process import Settings, serve
from silbo import Message

FAULT = os.environ["FAULT"]


class Faulty(Counting):
    """Says that it sent everything, as the real one does; every tenth is lost or sent twice."""

    async def publish(self, *messages: Message) -> None:
        what, _, where = FAULT.partition(" ")
        hit = where == type(self._publisher).__name__ and self.sent % 10 == 0
        if not (hit and what == "lose"):
            await super().publish(*messages)
        else:
            self.sent += len(messages)
        if hit and what == "double":
            await self._publisher.publish(*messages)


async def _nothing(event: Any) -> None:
    return


if __name__ == "__main__":
    host.Counting = Faulty  # type: ignore[misc]
    if FAULT == "not enriched":
        house_rules.add_cost_centre = _nothing
    if FAULT == "not refused":
        house_rules.refuse_banned = _nothing
    if FAULT == "no start":
        raise SystemExit(3)
    serve(host.application(Settings.from_environment()))
