"""The base of the brokers that publish through a client library of the host's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import ClassVar, Final

from silbo._checks import check_address
from silbo._closing import AsyncCloseable
from silbo.brokers._sender import OutgoingMessage, Sender
from silbo.message import Format, Message, instance, own_origin
from silbo.protocols import Promises

__all__ = ["LibraryBroker", "build_labels"]


class LibraryBroker(AsyncCloseable):
    """A publisher that sends batches through a client library.

    A subclass implements :meth:`_send`, and :meth:`_closes` if it opens something of the library's.

    Args:
        default: The address of messages for which no route chose one.
        app: The program's name, as consumers see it in ``event.origin.app``.
        timeout: Seconds in which a publish returns or raises, and in which ``aclose()`` closes what was opened.
        format: Encodes messages as bytes.

    Attributes:
        kind: The broker's name and kind of address in errors, as ``Kafka topic``.
    """

    kind: ClassVar[str]
    promises: Promises = Promises()

    def __init__(self, default: str, *, app: str, timeout: float, format: Format) -> None:  # noqa: A002  # every broker's
        self.app: Final = check_address(app, "an app")
        self.format: Final = format
        self._timeout = timeout
        self._default = default
        self._sender = Sender(
            self.kind, self._send, self._encode, default=default, timeout=timeout, owner=type(self).__name__
        )

    async def publish(self, *messages: Message) -> None:
        """Send the messages, in this order; return when the broker has confirmed them all.

        Raises:
            MessageRefused: a message can't be sent; the others of the call were.
            BrokerUnavailable: nothing was sent; safe to repeat.
            DeliveryUnknown: some or all may have arrived, or may still arrive.
            LoopConflict: another event loop uses this broker.
        """
        await self._sender.publish(messages)

    def address_of(self, message: Message) -> str:
        """Return the address that a message goes to."""
        return message.to or self._default

    async def aclose(self) -> None:
        """Send the waiting messages, within their deadlines, and close what was opened. May be called twice.

        The program's own client stays open.

        Raises:
            LoopConflict: another event loop uses this broker; it stays open.
        """
        self._sender.check_loop("aclose")
        try:
            await self._sender.aclose()
        finally:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._timeout):
                    # An error means that it is closed already.
                    await asyncio.gather(*(close() for close in self._closes()), return_exceptions=True)

    def _encode(self, message: Message) -> bytes:
        """Return the message as bytes.

        Raises:
            MessageRefused: this broker can't carry the message.
        """
        return self.format.encode(message, own_origin(self.app))

    async def _send(self, address: str, messages: Sequence[OutgoingMessage]) -> None:
        """Give a batch to the library, in this order, and mark the outcome of each message."""
        raise NotImplementedError

    def _closes(self) -> Iterable[Callable[[], Awaitable[object]]]:
        """Forget everything that was opened through the library, and return what closes it."""
        return ()


def build_labels(message: Message, app: str) -> dict[str, str]:
    """Return what stands beside a message, to filter it without decoding it; the message's own headers win."""
    return {
        "message_type": message.message_type,
        "message_name": message.message_name,
        "message_id": message.message_id,
        "app": app,
        "instance": instance(),
        **message.headers,
    }
