"""How the keys of streams are written."""

from __future__ import annotations

from silbo.errors import AddressInvalid, MessageRefused
from silbo.message import Message
from silbo.routing import check_address

__all__ = ["StreamKeys", "stream_key"]

DEFAULT = "events"
CACHED = 1024


def stream_key(address: str, prefix: str) -> str:
    """``{prefix}:{{address}}``, as ``silbo:{events}``, the braces included.

    They make the address the hash tag, so that whatever belongs to a stream is in its slot; the prefix stands before
    them, so that one ACL pattern covers it all.

    Raises:
        AddressInvalid: it is no address.
    """
    return f"{prefix}:{{{check_address(address)}}}"


class StreamKeys:
    """The key of each message's stream."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._default = stream_key(DEFAULT, prefix).encode()
        self._keys: dict[str, bytes] = {}

    def of(self, message: Message) -> bytes:
        """The default stream's, or the one of the address that a route chose.

        Raises:
            MessageRefused: what it chose is no address.
        """
        if message.to is None:
            return self._default
        key = self._keys.get(message.to)
        if key is None:
            try:
                key = stream_key(message.to, self._prefix).encode()
            except AddressInvalid as error:
                raise MessageRefused(message.message_name, str(error)) from None
            if len(self._keys) >= CACHED:
                self._keys.clear()
            self._keys[message.to] = key
        return key
