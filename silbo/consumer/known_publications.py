"""Publications that an inbox is asked about, and told of, in batches."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from typing import Any, Final

from silbo._host_code import OwnTasks
from silbo.consumer.heard_names import HeardNames
from silbo.consumer.reports import DeliveryReports
from silbo.errors import Gap, MessageInvalid
from silbo.message import Batch, Delivery, Headed, LedPublication
from silbo.protocols import BatchInbox
from silbo.wire.formats import JSON, JsonFormat

__all__ = ["KnownPublications", "find_batch_inbox", "find_publication"]

ANSWER_HOLDS: Final = 0.5
"""Seconds for which an answer of the inbox counts: another process may handle the publication meanwhile."""
REMEMBERED_EVERY: Final = 0.01
"""Seconds between two calls that remember publications: a process that is killed forgets those that it handled since."""


def find_batch_inbox(inbox: Any) -> BatchInbox | None:
    """Return the inbox if it can be asked in batches; None if it can't, or if a subclass overrides ``handling`` alone."""
    classes = type(inbox).__mro__
    places = [
        next((place for place, cls in enumerate(classes) if method in vars(cls)), len(classes))
        for method in ("find_handled", "remember", "handling")
    ]
    return inbox if max(places[:2]) <= places[2] < len(classes) else None


def find_publication(delivery: Delivery, message: Headed) -> str:
    """Return the publication of a delivery; one of a format without headers is known by its entry."""
    return message.headers.get("publication") or f"{delivery.address}/{delivery.id}"


class KnownPublications:
    """Publications of the deliveries in hand: asked about when they arrive, remembered when they are handled.

    An answer that a publication is new counts once. So the second of two deliveries with one publication is asked about
    again, unless the first is handled and not remembered yet.

    Args:
        inbox: Is asked and told.
        group: The name of the group that it remembers them for.
        heard: Tells which names somebody hears: the others are not asked about.
        reports: Reports what could not be remembered.
        tasks: The tasks of the consumer.
    """

    def __init__(
        self, inbox: BatchInbox, group: str, *, heard: HeardNames, reports: DeliveryReports, tasks: OwnTasks
    ) -> None:
        self._inbox = inbox
        self._group = group
        self._heard = heard
        self._reports = reports
        self._tasks = tasks
        self._answers: dict[str, tuple[bool, float]] = {}  # True if new; the loop's time until which that counts
        self._handled: dict[str, None] = {}  # to be remembered, in their order
        self._has_some = asyncio.Event()
        self._calling = asyncio.Lock()  # or an answer could be older than what was remembered since
        self._failing = False
        self._checks_epochs = bool(getattr(inbox, "checks_epochs", False))

    def label(self, publication: str, address: str, epoch: int | None) -> str:
        """Return a publication as the inbox is asked about it: with its shard and epoch, if it came from one and that is checked."""
        if epoch is None or not self._checks_epochs:
            return publication
        return LedPublication(publication, address, epoch)

    async def ask(self, items: Iterable[Delivery | Batch | Gap]) -> None:
        """Ask about what has arrived. If that fails, :meth:`is_new` asks about each."""
        publications = [] if self._failing else self._list_publications(items)
        if not publications:
            return
        with suppress(Exception):  # raised again when they are asked about one by one
            async with self._calling:
                handled = await self._find_handled(publications)
                now = asyncio.get_running_loop().time()
                while self._answers and (oldest := next(iter(self._answers.items())))[1][1] < now:
                    del self._answers[oldest[0]]  # its delivery went to another consumer, say
                self._answers |= dict.fromkeys(publications, (True, now + ANSWER_HOLDS))
                self._answers |= dict.fromkeys(handled, (False, now + ANSWER_HOLDS))

    def use_answer(self, publication: str) -> bool | None:
        """Return True if the publication is new, for this once; False if the group has handled it; None if it has to be asked."""
        if publication in self._handled:
            return False
        is_new, until = self._answers.get(publication, (True, 0.0))
        if until < asyncio.get_running_loop().time():
            return None
        if is_new:
            del self._answers[publication]
        return is_new

    async def is_new(self, publication: str) -> bool:
        """Return True if the publication is new, for this once; False if the group has handled it.

        Raises:
            MessageInvalid: the inbox can never store it.
            ShardLost: it came from a shard that another process leads by now.
            Exception: the inbox can't be asked.
        """
        answer = self.use_answer(publication)
        if answer is None:
            # Not under the lock: until this delivery is done, nobody else here handles the publication.
            answer = not await self._find_handled([publication])
        return answer

    def note_handled(self, publication: str) -> None:
        """Remember a publication with one of the next calls."""
        self._handled[publication] = None
        self._has_some.set()

    async def flush(self) -> None:
        """Remember all that is noted by now. What the inbox does not store is logged; after a cancellation it is noted still."""
        if not self._handled:
            return
        async with self._calling:
            batch = list(self._handled)
            self._has_some.clear()
            if not batch:  # another flush has done it
                return
            try:
                await self._inbox.remember(self._group, batch)
            except Exception as error:  # noqa: BLE001  # the listeners have run: to try again would double their effects
                self._reports.log.write("handled, but not remembered in the inbox", error)
            for publication in batch:
                del self._handled[publication]
                self._answers.pop(publication, None)  # of a second delivery, which was asked about before

    async def run_remembering(self) -> None:
        """Remember what is noted: at once after a pause, else what has come together in a short time."""
        while True:
            await self._has_some.wait()
            self._tasks.check_cancelled()
            await self.flush()
            await asyncio.sleep(REMEMBERED_EVERY)

    async def _find_handled(self, publications: Sequence[str]) -> Collection[str]:
        try:
            handled = await self._inbox.find_handled(self._group, publications)
        except Exception:
            self._failing = True
            raise
        self._failing = False
        return handled

    def _list_publications(self, items: Iterable[Delivery | Batch | Gap]) -> list[str]:
        found: list[str] = []
        for item in items:
            if isinstance(item, Gap) or type(item.format) is not JsonFormat:
                continue
            for raw in item.raws if isinstance(item, Batch) else (item.raw,):
                try:
                    message = JSON.open(raw)
                except MessageInvalid:
                    continue
                publication = message.headers.get("publication")
                heard = self._heard.recent(message.message_name)
                if publication and (self._heard[message.message_name] if heard is None else heard):
                    found.append(self.label(publication, item.address, item.epoch))
        return found
