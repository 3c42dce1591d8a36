"""Arrivals of a read: deliveries that may go together become batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from silbo.consumer.acknowledgements import Acknowledgements
from silbo.errors import Gap
from silbo.message import Batch, Delivery
from silbo.wire.formats import JsonFormat

__all__ = ["list_deliveries", "note_arrivals"]


def note_arrivals(items: Sequence[Delivery | Batch | Gap], acks: Acknowledgements) -> list[Delivery | Batch | Gap]:
    """Note what has arrived as in hand, and return it without what was in hand before.

    Deliveries of one address that were never given out before become a batch if they came one right after another.
    """
    arrived: list[Delivery | Batch | Gap] = []
    together: list[Delivery] = []
    for item in items:
        if isinstance(item, Batch):
            _add_batch(arrived, together, acks)
            arrived += _add_all(item, acks)
        elif isinstance(item, Gap):
            _add_batch(arrived, together, acks)
            arrived.append(item)
        elif acks.add(item):
            if together and not _may_follow(item, together[0]):
                _add_batch(arrived, together, acks)
            if item.attempt == 1 and type(item.format) is JsonFormat:
                together.append(item)
            else:
                _add_batch(arrived, together, acks)
                arrived.append(item)
    _add_batch(arrived, together, acks)
    return arrived


def _add_all(batch: Batch, acks: Acknowledgements) -> Iterable[Delivery | Batch]:
    if type(batch.format) is not JsonFormat:
        return [delivery for delivery in batch if acks.add(delivery)]
    fresh = acks.add_batch(batch)
    return () if fresh is None else (fresh,)


def _may_follow(item: Delivery, first: Delivery) -> bool:
    return (
        item.address == first.address
        and item.format is first.format
        and bool(item.id) is bool(first.id)
        and item.epoch == first.epoch
    )


def _add_batch(arrived: list[Delivery | Batch | Gap], together: list[Delivery], acks: Acknowledgements) -> None:
    if together:
        batch = Batch.of(together.copy())
        acks.join(batch)
        arrived.append(batch)
        together.clear()


def list_deliveries(items: Iterable[Delivery | Batch | Gap]) -> list[Delivery]:
    """Return all deliveries of a read, for observers."""
    deliveries: list[Delivery] = []
    for item in items:
        if isinstance(item, Batch):
            deliveries += item
        elif not isinstance(item, Gap):
            deliveries.append(item)
    return deliveries
