"""How stored rows go to a publisher, and what its answer means for them."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from silbo.errors import MessageRefused
from silbo.message import Message
from silbo.outbox.rows import Row
from silbo.protocols import Publisher, Sequenced, SequencedPublisher

__all__ = ["Outcome", "outcome_of", "publish_rows"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a broker has answered for.

    Attributes:
        sent: Rows that it has, by their id.
        dead: Rows that it refused for good, and why.
        known: How many of those that were sent it had already.
        refused: The errors and messages of those that are dead.
    """

    sent: Collection[int] = ()
    dead: Mapping[int, str] = field(default_factory=dict)
    known: int = 0
    refused: Sequence[tuple[MessageRefused, Message]] = ()


def outcome_of(rows: Sequence[Row], answer: Sequenced) -> Outcome:
    """What a publisher's answer means for these rows."""
    refused = {row.id: answer.refused[row.sequence or 0] for row in rows if row.sequence in answer.refused}
    return Outcome(
        sent=[row.id for row in rows if row.id not in refused],
        dead={row: str(error) for row, error in refused.items()},
        known=sum(row.sequence in answer.known for row in rows),
        refused=[(refused[row.id], row.message) for row in rows if row.id in refused],
    )


async def publish_rows(publisher: Publisher, source: str, epoch: int, rows: Sequence[Row]) -> Sequenced:
    """Send rows with their sequences; where the publisher knows none, as they are.

    Raises:
        Fenced, BrokerUnavailable, DeliveryUnknown: as :meth:`~silbo.protocols.SequencedPublisher.publish_sequenced`.
    """
    messages = [(row.sequence or 0, row.message) for row in rows]
    if isinstance(publisher, SequencedPublisher):
        return await publisher.publish_sequenced(source, epoch, messages)
    # A call each, for publishers keep the order of their calls.
    answers = await asyncio.gather(*(publisher.publish(message) for _, message in messages), return_exceptions=True)
    refused: dict[int, MessageRefused] = {}
    for (sequence, _), answer in zip(messages, answers, strict=True):
        if isinstance(answer, MessageRefused):
            refused[sequence] = answer
        elif answer is not None:
            raise answer
    return Sequenced(refused=refused)
