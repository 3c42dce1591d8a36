"""The types of the keys that silbo uses, and keys in their place that are of another type."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from silbo.brokers.redis.connection import Connection, Refused

__all__ = ["WrongType", "find_wrong_types"]

_TYPES: Final = {
    "": "stream",
    "dead": "stream",
    "outbox": "hash",
    "given": "hash",
    "attempts": "hash",
    "live": "hash",
    "shards": "hash",
    "lease": "hash",
}
"""The type of a key, by what stands behind the stream's name in it; others are sorted sets."""
_READS: Final[dict[str, tuple[bytes, ...]]] = {
    "stream": (b"XLEN",),
    "hash": (b"HGET", b""),
    "sorted set": (b"ZSCORE", b""),
}
"""The command, and what follows the key, that reads a key of this type; users of silbo may run it."""
_WORDS: Final = {"zset": "sorted set"}


class WrongType(Refused):
    """A key that silbo uses is of another type: another program's, or written by hand.

    Attributes:
        is_stream: True if the key is that of a stream, with its groups.
    """

    def __init__(self, key: str, expected: str, found: str | None) -> None:
        self.is_stream = key.endswith("}")
        what = "is of another type" if found is None else f"is a {found}"
        super().__init__(
            f"WRONGTYPE the key {key} {what}, and silbo keeps a {expected} there: delete or rename the key, or use another prefix"
        )


def _expected_type(key: str) -> str:
    _, brace, rest = key.partition("}")
    part = rest[1:].partition(":")[0] if brace else "inbox"
    return _TYPES.get(part, "sorted set")


async def find_wrong_types(connection: Connection, keys: Iterable[bytes]) -> dict[bytes, WrongType]:
    """Return those of silbo's keys that are of another type, each with the error that names it.

    Raises:
        Lost: the connection broke.
    """
    wrong: dict[bytes, WrongType] = {}
    for key in keys:
        text = key.decode()
        expected = _expected_type(text)
        command, *rest = _READS[expected]
        try:
            await connection.execute(command, key, *rest)
        except Refused as refusal:
            if refusal.code == "WRONGTYPE":
                wrong[key] = WrongType(text, expected, await _find_type(connection, key))
    return wrong


async def _find_type(connection: Connection, key: bytes) -> str | None:
    """Return the word for a key's type; None if the user may not ask."""
    try:
        found: str = (await connection.execute(b"TYPE", key)).decode()
    except Refused:
        return None
    return _WORDS.get(found, found)
