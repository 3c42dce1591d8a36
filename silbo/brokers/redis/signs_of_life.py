"""Signs of life of named consumers: two live consumers of one name are noticed, and both tell."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Final

from silbo._reports import RateLimitedLog
from silbo.brokers.redis.calls import ScriptCall
from silbo.brokers.redis.scripts import SIGN

__all__ = ["SignsOfLife", "build_signs_key"]

logger = logging.getLogger(__name__)

SIGN_EVERY: Final = 1.0
"""A consumer that reads gives a sign of life once a second."""
TOLD_EVERY: Final = 60.0
"""Two consumers of one name are told once a minute."""


def build_signs_key(key: bytes, group: bytes) -> bytes:
    """Return the key of the hash that holds the signs of life of a group's named consumers."""
    return b"%b:live:%b" % (key, group)


class SignsOfLife:
    """The signs of life that one consumer gives under its name, in each of its streams.

    If another consumer has put its sign there after this one did, both live: one that was killed gives no further sign, so
    a restart under the same name is not told. Without a name nothing is done: the names that silbo makes differ.

    Args:
        keys: The keys of the streams.
        group: The group's name.
        consumer: The consumer's name in the group.
        who: Tells this consumer from another of the same name, also in the same process.
        is_named: True if the user chose the name.
        keep: Seconds that Redis keeps the signs of a group in which no consumer gives one.
    """

    def __init__(
        self, keys: Sequence[bytes], group: bytes, consumer: bytes, *, who: bytes, is_named: bool, keep: float
    ) -> None:
        self._keys = keys
        self._group = group
        self._consumer = consumer
        self._who = who
        self._keep = b"%d" % (keep * 1000)
        self._signed_at = dict.fromkeys(keys, b"")  # by Redis's clock, in milliseconds
        self._next_at = float("-inf") if is_named else float("inf")  # by the loop's clock
        self._log = RateLimitedLog(logger, every=TOLD_EVERY)

    def is_due(self) -> bool:
        """Return True if it is time for the next sign."""
        return asyncio.get_running_loop().time() >= self._next_at

    def calls(self) -> list[ScriptCall]:
        """Return the calls that give the next sign; pass their replies to :meth:`note`."""
        self._next_at = asyncio.get_running_loop().time() + SIGN_EVERY
        return [
            ScriptCall.of(
                SIGN,
                [build_signs_key(key, self._group)],
                self._consumer,
                self._who,
                self._signed_at[key],
                self._keep,
            )
            for key in self._keys
        ]

    def note(self, calls: Sequence[ScriptCall]) -> None:
        """Note the replies to the calls, and tell of another consumer. A reply that is an error is tried again later."""
        for key, call in zip(self._keys, calls, strict=True):
            reply: Any = call.reply
            if isinstance(reply, list):
                another, self._signed_at[key], *refusal = reply
                if another:
                    self._tell(key.decode())
                if refusal:
                    self._log.write(
                        "no sign of life can be put into %s, so a second consumer of this name goes unnoticed: %s",
                        None,
                        build_signs_key(key, self._group).decode(),
                        refusal[0].decode(errors="replace"),
                        address=key.decode(),
                        group=self._group.decode(),
                        consumer=self._consumer.decode(),
                    )

    def _tell(self, address: str) -> None:
        group, consumer = self._group.decode(), self._consumer.decode()
        self._log.write(
            "two live consumers have the name %s in group %s at %s: each gets what the other has in hand, so messages are"
            " handled twice; give each process a name of its own in group(consumer=), or no name",
            None,
            consumer,
            group,
            address,
            address=address,
            group=group,
            consumer=consumer,
        )
