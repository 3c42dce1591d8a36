"""Retention: for how long a stream keeps its entries, the policy beside the stream, and who trims."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Literal, TypeAlias, get_args

from silbo._checks import check_count, check_seconds
from silbo._reports import RateLimitedLog
from silbo.brokers.redis.calls import ScriptCall
from silbo.brokers.redis.connection import Refused, pack_words
from silbo.brokers.redis.in_hand import build_given_key
from silbo.brokers.redis.scripts import TRIM
from silbo.errors import RetentionConflict

__all__ = [
    "DEFAULT",
    "NOT_GIVEN",
    "WEEK",
    "NotGiven",
    "Retention",
    "RetentionPolicy",
    "Trim",
    "build_retention_key",
    "build_trim",
    "pack_keep",
]

logger = logging.getLogger(__name__)

Trim: TypeAlias = Literal["age", "acknowledged"]
"""The rule of removal: entries older than ``retain`` go, or also those that every group has acknowledged."""


class NotGiven(Enum):
    """The type of :data:`NOT_GIVEN`."""

    NOT_GIVEN = "not given"


NOT_GIVEN: Final = NotGiven.NOT_GIVEN
"""The value of ``retain`` for a program that does not state it: None states that nothing is removed."""

WEEK: Final = 7 * 24 * 3600.0
"""By default a stream keeps its entries for 7 days, in seconds."""
TRIM_EVERY: Final = 1.0
"""A publisher trims a stream once a second."""
TRIM_BYTES: Final = 4 << 20
"""A publisher trims a stream at the latest when it has added 4 MiB since."""
ASK_EVERY: Final = 10.0
"""A publisher that trims by age alone asks for the stream's policy every 10 seconds."""
DESERTED_AFTER: Final = 60.0
"""A group without a call of a consumer for 60 seconds counts as abandoned if something has waited for it for as long."""
KEPT: Final = 16 * 1024
"""The policies of at most 16,384 streams are remembered; then they are asked for anew. One address may have 1,024 shards."""


def build_retention_key(key: bytes) -> bytes:
    """Return the key of the hash that holds a stream's policy, and what its groups have missed by it."""
    return b"%b:retention" % key


def build_trim(key: bytes, stated: bytes = b"") -> ScriptCall:
    """Return a call that trims a stream by the policy beside it, which is the stated one if there was none."""
    keys = [key, build_given_key(key), build_retention_key(key)]
    return ScriptCall.of(TRIM, keys, stated, b"%d" % (DESERTED_AFTER * 1000))


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """The rule by which a stream keeps its entries.

    Attributes:
        retain: Seconds after which an entry is removed, acknowledged or not; None for never.
        trim: See :data:`Trim`.
        keep_at_least: Seconds for which an entry is kept though every group has acknowledged it.
        max_bytes: The most memory that the stream takes, as Redis counts it; None for any.
        max_messages: The most entries; None for any number.

    Raises:
        ValueError: a value is out of range, or does not go with another.
    """

    retain: float | None = WEEK
    trim: Trim = "age"
    keep_at_least: float = 0.0
    max_bytes: int | None = None
    max_messages: int | None = None

    def __post_init__(self) -> None:
        if self.retain is not None:
            check_seconds("retain", self.retain)
        if self.trim not in get_args(Trim):
            raise ValueError(f"trim is 'age' or 'acknowledged', not {self.trim!r}")
        check_seconds("keep_at_least", self.keep_at_least, zero=True)
        if self.keep_at_least and self.trim == "age":
            raise ValueError("keep_at_least is for trim='acknowledged'; with trim='age' give retain alone")
        if self.retain is not None and self.keep_at_least > self.retain:
            raise ValueError(f"keep_at_least is at most retain, {self.retain:g} s, not {self.keep_at_least:g} s")
        for name in ("max_bytes", "max_messages"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))

    @property
    def trims(self) -> bool:
        """True if something is removed before it is older than ``retain``."""
        return self.trim == "acknowledged" or self.max_bytes is not None or self.max_messages is not None

    def __str__(self) -> str:
        retain = None if self.retain is None else f"{self.retain:.16g}"
        words = [f"retain={retain}", f"trim={self.trim!r}"]
        if self.keep_at_least:
            words.append(f"keep_at_least={self.keep_at_least:.16g}")
        words += [f"{name}={value}" for name, value in self._caps()]
        return ", ".join(words)

    def _caps(self) -> list[tuple[str, int]]:
        caps = [("max_bytes", self.max_bytes), ("max_messages", self.max_messages)]
        return [(name, value) for name, value in caps if value is not None]

    def to_text(self) -> bytes:
        """Return the policy as it stands beside the stream; times are whole milliseconds."""
        retain = "forever" if self.retain is None else f"{max(1, int(self.retain * 1000))}"
        words = [f"retain={retain}", f"trim={self.trim}", f"keep_at_least={int(self.keep_at_least * 1000)}"]
        return " ".join([*words, *[f"{name}={value}" for name, value in self._caps()]]).encode()

    @classmethod
    def of_text(cls, text: bytes) -> RetentionPolicy:
        """Return the policy that stands beside a stream.

        Raises:
            ValueError: the text is none of silbo's.
        """
        try:
            values = dict(word.split("=", 1) for word in text.decode().split())
            return cls(
                retain=None if values["retain"] == "forever" else int(values["retain"]) / 1000,
                trim="acknowledged" if values["trim"] == "acknowledged" else "age",
                keep_at_least=int(values["keep_at_least"]) / 1000,
                max_bytes=int(values["max_bytes"]) if "max_bytes" in values else None,
                max_messages=int(values["max_messages"]) if "max_messages" in values else None,
            )
        except (KeyError, ValueError) as error:
            raise ValueError(f"no policy of a retention: {text.decode(errors='replace')!r}") from error


DEFAULT: Final = RetentionPolicy()
"""The policy of a program that states none: it gives way to the one beside the stream."""


@dataclass(slots=True)
class _Kept:
    """A stream whose policy is known.

    Attributes:
        policy: The policy beside the stream.
        keep: The milliseconds that entries are kept, as a packed argument: empty for ever.
        due_at: The loop's time of the next call.
        size: The bytes that were added since the last one.
    """

    policy: RetentionPolicy
    keep: bytes
    due_at: float
    size: int = 0


class Retention:
    """The retention of a publisher's streams: one policy, checked before the first publish and applied beside later ones.

    The calls that it returns go in the same write as a publish, in front of it: where memory is full they make room.

    Args:
        stated: The policy of the program; None if it states none.
    """

    def __init__(self, stated: RetentionPolicy | None) -> None:
        self.stated: Final = stated or DEFAULT
        self._text = b"" if stated is None else stated.to_text()
        self._kept: dict[bytes, _Kept] = {}
        self._log = RateLimitedLog(logger, every=60.0)

    def first_calls(self, keys: Iterable[bytes]) -> list[ScriptCall]:
        """Return the calls to be answered before anything is added to these streams; pass them to :meth:`note`."""
        return [build_trim(key, self._text) for key in keys if key not in self._kept]

    def due_calls(self, added: Iterable[tuple[bytes, Iterable[bytes]]]) -> list[ScriptCall]:
        """Return the calls that are due, of streams to which these messages are added now; pass them to :meth:`note`."""
        now = asyncio.get_running_loop().time()
        calls = []
        for key, messages in added:
            if (kept := self._kept.get(key)) is None:
                continue
            if kept.policy.trims:
                kept.size += sum(map(len, messages))
            if now >= kept.due_at or kept.size >= TRIM_BYTES:
                kept.due_at = now + (TRIM_EVERY if kept.policy.trims else ASK_EVERY)
                kept.size = 0
                calls.append(build_trim(key, self._text))
        return calls

    def keep_for(self, key: bytes) -> bytes:
        """Return the first argument of what adds to a stream: the milliseconds that entries are kept, packed."""
        kept = self._kept.get(key)
        return pack_keep(self.stated) if kept is None else kept.keep

    def note(self, calls: Sequence[ScriptCall], replies: Sequence[Any]) -> dict[bytes, RetentionConflict]:
        """Note the replies to the calls, as far as there are any; return the errors of streams to which nothing may be added."""
        conflicts: dict[bytes, RetentionConflict] = {}
        for call, reply in zip(calls, replies, strict=True):
            key = call.keys[0]
            if isinstance(reply, list):
                if (conflict := self._note_policy(key, *reply)) is not None:
                    conflicts[key] = conflict
            elif isinstance(reply, Refused) and not reply.is_of_server:  # else the publish itself is refused
                self._note_refusal(key, reply)
        return conflicts

    def _note_policy(
        self, key: bytes, is_other: int, text: bytes, more: int = 0, *deserted: Any
    ) -> RetentionConflict | None:
        try:
            policy = RetentionPolicy.of_text(text) if text else self.stated
        except ValueError as error:
            self._note_refusal(key, error)
            return None
        address = key.decode()
        if is_other:
            conflict = RetentionConflict(address, stated=str(self.stated), kept=str(policy))
            if key not in self._kept:
                return conflict
            # It was changed twice, or put there by another program after FLUSHALL: this program is not stopped in the middle.
            told = "the policy beside %s is another one now (%s), and it is followed; this program states (%s)"
            self._log.write(told, None, address, policy, self.stated, address=address)
        self._keep(key, policy, at_once=bool(more))
        if deserted:
            groups = [group.decode(errors="replace") for group in deserted[::2]]
            self._tell_deserted(address, groups, max(deserted[1::2]) / 1000, policy)
        return None

    def _note_refusal(self, key: bytes, why: Refused | ValueError) -> None:
        text = (
            "the retention of %s can't be looked after, and is tried again every 10 seconds; it needs the rights of silbo's manual,"
            " +xtrim and +memory|usage among them: %s"
        )
        self._log.write(text, None, key.decode(), why, address=key.decode())
        self._keep(key, self.stated, at_once=False, every=ASK_EVERY)

    def _keep(self, key: bytes, policy: RetentionPolicy, *, at_once: bool, every: float | None = None) -> None:
        if key not in self._kept and len(self._kept) >= KEPT:
            self._kept.clear()
        now = asyncio.get_running_loop().time()
        every = every or (TRIM_EVERY if policy.trims else ASK_EVERY)
        self._kept[key] = _Kept(policy=policy, keep=pack_keep(policy), due_at=now if at_once else now + every)

    def _tell_deserted(self, address: str, groups: Sequence[str], age: float, policy: RetentionPolicy) -> None:
        until = "for ever" if policy.retain is None else f"until it is {policy.retain:g} s old"
        self._log.write(
            "no consumer is alive of %s at %s, and nothing is removed of what waits there, %s; the oldest is %.3g s old. Start"
            " the consumers, or remove a group that nobody needs: XGROUP DESTROY",
            None,
            ", ".join(groups),
            address,
            until,
            age,
            address=address,
            groups=groups,
            age=age,
            retain=policy.retain,
        )


def pack_keep(policy: RetentionPolicy) -> bytes:
    """Return the milliseconds that a policy keeps entries as an argument of a script, packed; empty for ever."""
    return pack_words([b"" if policy.retain is None else b"%d" % int(policy.retain * 1000)])
