"""The deliveries that a consumer has in hand: it was given them and has not acknowledged them."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias

from silbo.brokers.redis.calls import CallConnection, MakeCall, ScriptCall
from silbo.brokers.redis.connection import Lost, Refused
from silbo.brokers.redis.key_types import WrongType
from silbo.brokers.redis.scripts import ACK, BURY, COUNT, KEEP, LEAVE, OFFER
from silbo.brokers.redis.signs_of_life import build_signs_key
from silbo.errors import BrokerRefused, BrokerUnavailable
from silbo.message import Batch, Delivery

__all__ = ["DeliveriesInHand", "build_attempts_key", "build_given_key", "build_offered_key"]

KEPT_AT_ONCE: Final = 100
"""A call keeps at most 100 deliveries: Redis does nothing else meanwhile."""
ATTEMPTS_FOR: Final = 7 * 24 * 3600 * 1000
"""A group's attempts are forgotten 7 days (in milliseconds) after the last count."""
OFFERED_FOR: Final = 24 * 3600 * 1000
"""The time of the first offer of an entry is forgotten after a day (in milliseconds)."""
NOTED: Final = 500
"""The first 500 characters of an attempt's error are noted."""
DEAD_FOR: Final = 30 * 24 * 3600 * 1000
"""Dead letters are kept for 30 days (in milliseconds)."""

_Entry: TypeAlias = tuple[str, str]
"""The address and the id of a delivery."""


def build_attempts_key(key: bytes, group: bytes) -> bytes:
    """Return the key of the hash that counts the attempts of a stream's entries in one group: ``3`` or ``3 the last error``."""
    return b"%b:attempts:%b" % (key, group)


def build_given_key(key: bytes) -> bytes:
    """Return the key of the hash that notes the entries that each group of a stream was given: an id and a number."""
    return b"%b:given" % key


def build_offered_key(key: bytes, group: bytes) -> bytes:
    """Return the key of the sorted set of a stream's entries that one group's consumers have offered, by the first time."""
    return b"%b:offered:%b" % (key, group)


class DeliveriesInHand:
    """The deliveries that one consumer has in hand, until they are acknowledged, dead or another consumer's.

    Its calls need a connection of their own: on the one that reads, Redis holds replies back.

    Args:
        connection: Runs the calls.
        group: The group's name.
        consumer: The consumer's name in the group.
        app: The program's name, for dead letters.
        claim_after: Seconds after which another consumer may take over a delivery that was not kept.
        who: Tells this consumer from another of the same name.
        signed: The consumer's name in a dead letter, for people.
        make_call: Makes its calls.
    """

    def __init__(
        self,
        connection: CallConnection,
        group: bytes,
        consumer: bytes,
        app: str,
        *,
        claim_after: float,
        who: bytes,
        signed: bytes,
        make_call: MakeCall = ScriptCall.of,
    ) -> None:
        self._connection = connection
        self._make_call = make_call
        self._group = group
        self._consumer = consumer
        self._app = app.encode()
        self._claim_after = claim_after
        self._who = who
        self._signed = signed
        # By address and id, the loop's time when it surely was this consumer's.
        self._confirmed_at: defaultdict[str, dict[str, float]] = defaultdict(dict)
        self._attempts: dict[_Entry, int] = {}  # known before a count whose reply has not come
        # Ids by address:
        self._removed: defaultdict[str, set[str]] = defaultdict(set)  # since the last read began
        self._leaving: defaultdict[str, set[str]] = defaultdict(
            set
        )  # acknowledged or made dead letters, perhaps done by now
        self._offered: defaultdict[str, set[str]] = defaultdict(set)  # to the group's other consumers

    def __contains__(self, entry: _Entry) -> bool:
        address, entry_id = entry
        return entry_id in self._confirmed_at[address]

    def __len__(self) -> int:
        return sum(map(len, self._confirmed_at.values()))

    def find_unconfirmed(self, deliveries: Iterable[Delivery], since: float) -> list[Delivery]:
        """Return those that were not surely this consumer's after this loop's time."""
        found = []
        for delivery in deliveries:
            confirmed_at = self._confirmed_at[delivery.address].get(delivery.id)
            if confirmed_at is None or confirmed_at <= since:
                found.append(delivery)
        return found

    def has_all(self, batch: Batch) -> bool:
        """Return True if all of a batch are in hand."""
        return all(map(self._confirmed_at[batch.address].__contains__, batch.ids))

    def begin_read(self) -> None:
        """Note that a read begins: it can't bring entries that were removed before."""
        self._removed.clear()

    def add(self, delivery: Delivery, asked_at: float) -> bool:
        """Add a delivery of the reply to a read that was sent at this loop's time.

        False if it was removed meanwhile: over two connections, a read may overtake an acknowledgement and yet have its
        reply come later. False also for one that is offered to others: its consumer has it.
        """
        address, entry_id = delivery.address, delivery.id
        if entry_id in self._removed[address] or entry_id in self._offered[address]:
            return False
        self._confirmed_at[address][entry_id] = asked_at
        return True

    def add_batch(self, batch: Batch, asked_at: float) -> Batch | None:
        """Add a batch as :meth:`add` does. Return those that were added, if any."""
        address = batch.address
        if not (self._removed[address].isdisjoint(batch.ids) and self._offered[address].isdisjoint(batch.ids)):
            added = [delivery for delivery in batch if self.add(delivery, asked_at)]
            return Batch.of(added) if added else None
        self._confirmed_at[address].update(dict.fromkeys(batch.ids, asked_at))
        return batch

    def remove(self, deliveries: Iterable[Delivery | Batch]) -> None:
        """Remove deliveries that are not this consumer's business any more."""
        for address, ids in _group_by_address(deliveries).items():
            at_address = self._confirmed_at[address]
            for entry_id in ids:
                at_address.pop(entry_id, None)
                if self._attempts:
                    self._attempts.pop((address, entry_id), None)
            self._removed[address].update(ids)
            self._offered[address].difference_update(ids)

    async def ack(self, deliveries: Sequence[Delivery | Batch]) -> None:
        """Acknowledge deliveries, and forget their attempts in the same step."""
        grouped = _group_by_address(deliveries)
        calls = []
        for address, ids in grouped.items():
            key = address.encode()
            entry_ids = [entry_id.encode() for entry_id in ids]
            calls.append(self._make_call(ACK, [key, build_attempts_key(key, self._group)], self._group, *entry_ids))
            self._leaving[address].update(ids)
        try:
            await self._run("acknowledge at", calls, may_be_gone=True)
        finally:
            for address, ids in grouped.items():
                self._leaving[address].difference_update(ids)
        self.remove(deliveries)

    async def keep(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Keep other consumers from taking over deliveries; return those that are another consumer's by now."""
        now = asyncio.get_running_loop().time()
        limit = now - self._claim_after
        entries = [_entry_of(delivery) for delivery in deliveries]
        # Nobody can have claimed an entry that was surely ours a moment ago: if nobody has it, its group was deleted.
        confirmed_at = [self._confirmed_at[address].get(entry_id, limit) for address, entry_id in entries]
        recent = [entry for entry, at in zip(entries, confirmed_at, strict=True) if at > limit]
        others = [entry for entry, at in zip(entries, confirmed_at, strict=True) if at <= limit]
        oldest = {address.encode(): entry_id.encode() for address, entry_id in reversed(entries)}
        lost = await self._keep(recent, b"1", oldest) | await self._keep(others, b"", oldest)
        for address, entry_id in entries:
            if entry_id in self._confirmed_at[address]:  # else it was acknowledged meanwhile
                self._confirmed_at[address][entry_id] = now
            self._offered[address].discard(entry_id)
        taken_over = [delivery for delivery in deliveries if _entry_of(delivery) in lost]
        self.remove(taken_over)
        return taken_over

    async def keep_by(self, call: ScriptCall, deliveries: Sequence[Delivery]) -> bool:
        """Keep everything by one call, which replies 0 if all of it is another consumer's; True if it is this one's."""
        now = asyncio.get_running_loop().time()
        (is_kept,) = await self._run("keep deliveries at", [call])
        if is_kept:
            for confirmed_at in self._confirmed_at.values():
                confirmed_at.update({entry_id: now for entry_id, at in confirmed_at.items() if at < now})
            for address, entry_id in map(_entry_of, deliveries):
                self._offered[address].discard(entry_id)
        return bool(is_kept)

    async def offer(self, deliveries: Sequence[Delivery]) -> list[float | None]:
        """Let other consumers claim deliveries at once; return the seconds since each was first offered, by Redis's clock.

        None for those that another consumer has claimed, or done.
        """
        entries = [_entry_of(delivery) for delivery in deliveries]
        for address, entry_id in entries:
            self._offered[address].add(entry_id)
            self._confirmed_at[address][entry_id] = float("-inf")  # from now on anybody may have it
        pages = [entries[first : first + KEPT_AT_ONCE] for first in range(0, len(entries), KEPT_AT_ONCE)]
        batches = [batch for page in pages for batch in _group_by_key(page).items()]
        written = [self.offer_arguments(key, ids) for key, ids in batches]
        calls = [self._make_call(OFFER, keys, *arguments) for keys, arguments in written]
        replies = await self._run("offer deliveries at", calls, may_be_gone=True)
        offered_for = {
            (key.decode(), entry_id.decode()): milliseconds / 1000
            for (key, ids), reply in zip(batches, replies, strict=True)
            if not isinstance(reply, WrongType)
            for entry_id, milliseconds in zip(ids, reply, strict=True)
            if milliseconds >= 0
        }
        self.remove(delivery for delivery in deliveries if _entry_of(delivery) not in offered_for)
        return [offered_for.get(entry) for entry in entries]

    def find_offered(self, key: bytes, ids: Iterable[bytes]) -> list[bytes]:
        """Return those of a stream's ids that are offered to other consumers."""
        offered = self._offered[key.decode()]
        return [entry_id for entry_id in ids if entry_id.decode() in offered] if offered else []

    def offer_arguments(self, key: bytes, ids: Sequence[bytes]) -> tuple[list[bytes], list[bytes]]:
        """Return the keys and the arguments of the script OFFER for entries of a stream."""
        keys = [key, build_offered_key(key, self._group)]
        after = b"%d" % (self._claim_after * 1000)
        return keys, [self._group, self._consumer, after, b"%d" % OFFERED_FOR, *ids]

    async def take_back(self, key: bytes) -> None:
        """Put all entries of a stream into this consumer's hand again, in a group that was made anew.

        Not those that are being acknowledged or buried: if that was done before the group was deleted, they are handled, and
        would come again.
        """
        address = key.decode()
        leaving = self._leaving[address]
        entries = [(address, entry_id) for entry_id in self._confirmed_at[address] if entry_id not in leaving]
        await self._keep(entries, b"1", {})

    async def _keep(self, entries: Sequence[_Entry], take_back: bytes, oldest: Mapping[bytes, bytes]) -> set[_Entry]:
        pages = [entries[first : first + KEPT_AT_ONCE] for first in range(0, len(entries), KEPT_AT_ONCE)]
        batches = [batch for page in pages for batch in _group_by_key(page).items()]
        calls = [
            self._make_call(KEEP, [key], self._group, self._consumer, take_back, oldest.get(key, b""), *ids)
            for key, ids in batches
        ]
        replies = await self._run("keep deliveries at", calls, may_be_gone=True)
        return {
            (key.decode(), entry_id.decode())
            for (key, ids), lost in zip(batches, replies, strict=True)
            for entry_id in (ids if isinstance(lost, WrongType) else lost)
        }

    async def count(self, delivery: Delivery, error: str = "") -> int:
        """Count one attempt, and note its error; return the number of all. A repeated call after an error counts once."""
        key, entry_id, entry = delivery.address.encode(), delivery.id.encode(), _entry_of(delivery)
        keys = [key, build_attempts_key(key, self._group)]
        if entry not in self._attempts:
            (self._attempts[entry],) = await self._run("read attempts at", [self._make_call(COUNT, keys, entry_id)])
        number = b"%d" % (self._attempts[entry] + 1)
        call = self._make_call(
            COUNT, keys, entry_id, number, b"%d" % ATTEMPTS_FOR, error[:NOTED].encode(errors="replace")
        )
        (known,) = await self._run("count an attempt at", [call], stores=True)
        self._attempts.pop(entry, None)  # perhaps it was removed meanwhile
        return int(known)

    async def bury(self, delivery: Delivery, error: str, attempts: int) -> bool:
        """Make a delivery a dead letter and acknowledge it; False if it is another consumer's, or acknowledged."""
        key = delivery.address.encode()
        keys = [key, build_attempts_key(key, self._group), key + b":dead", build_offered_key(key, self._group)]
        who = [self._group, self._consumer, delivery.id.encode(), b"%d" % DEAD_FOR]
        what = [delivery.raw, error.encode(errors="replace"), b"%d" % attempts, self._app, self._signed]
        leaving = self._leaving[delivery.address]
        leaving.add(delivery.id)
        try:
            (buried,) = await self._run("add a dead letter at", [self._make_call(BURY, keys, *who, *what)], stores=True)
        finally:
            leaving.discard(delivery.id)
        self.remove([delivery])
        return bool(buried)

    async def leave(self, keys: Iterable[bytes], *, unnamed: bool) -> None:
        """Let other consumers claim at once what is in hand; if nothing is, remove a consumer that the user did not name."""
        after = b"%d" % (self._claim_after * 1000)
        remove = b"1" if unnamed else b""
        calls = [
            self._make_call(
                LEAVE,
                [key, build_given_key(key), build_signs_key(key, self._group)],
                self._group,
                self._consumer,
                after,
                remove,
                self._who,
            )
            for key in keys
        ]
        await self._run("take leave of", calls)

    async def run(self, calls: Sequence[ScriptCall]) -> None:
        """Run calls over this consumer's connection, and set the reply of each, which may be an error.

        Raises:
            BrokerUnavailable: there was no connection in time; nothing was done.
        """
        await self._connection.run_all(*calls)

    async def aclose(self) -> None:
        """Close the connection. May be called twice."""
        await self._connection.aclose()

    async def _run(
        self, what: str, calls: Sequence[ScriptCall], *, stores: bool = False, may_be_gone: bool = False
    ) -> list[Any]:
        """Run the calls, and return their replies.

        Args:
            what: Names the act, for texts.
            calls: Calls of scripts.
            stores: True if they store something, which Redis may refuse while it takes acknowledgements.
            may_be_gone: True if a stream whose key is of another type by now is no error, but the reply: what was in hand of it
                is gone, and its other streams go on.
        """
        if not calls:
            return []
        replies = await self._connection.run_all(*calls)
        for reply in replies:
            if may_be_gone and isinstance(reply, WrongType) and reply.is_stream:
                continue
            if isinstance(reply, Lost | Refused):
                is_private = stores and isinstance(reply, Refused) and not reply.is_of_server
                error = BrokerRefused if is_private else BrokerUnavailable
                raise error(f"can't {what} {self._connection.server}: {reply}") from reply
        return replies


def _entry_of(delivery: Delivery) -> _Entry:
    return delivery.address, delivery.id


def _group_by_address(deliveries: Iterable[Delivery | Batch]) -> dict[str, list[str]]:
    """Return the ids by their address."""
    ids: dict[str, list[str]] = defaultdict(list)
    for item in deliveries:
        if isinstance(item, Batch):
            ids[item.address] += item.ids
        else:
            ids[item.address].append(item.id)
    return ids


def _group_by_key(entries: Iterable[_Entry]) -> dict[bytes, list[bytes]]:
    """Return the ids by their stream's key."""
    ids: dict[bytes, list[bytes]] = defaultdict(list)
    for address, entry_id in entries:
        ids[address.encode()].append(entry_id.encode())
    return ids
