"""What a sender keeps account of: a call of ``publish``, and the batch in which its messages go out."""

from __future__ import annotations

import asyncio
from typing import Any, Final, TypeAlias

from silbo.brokers.redis.connection import Refused
from silbo.errors import BrokerUnavailable, DeliveryUnknown, PublishError

__all__ = ["UNANSWERED", "Batch", "Call", "Packet"]

Packet: TypeAlias = "tuple[bytes, bytes]"
"""One message, ready to send: the stream's key (empty for Pub/Sub), and its packed arguments of the script."""

UNANSWERED: Final = object()


class Call:
    """One call of ``publish``: its messages in order, and how far they are."""

    __slots__ = ("answered", "deadline", "failure", "is_open", "is_unknown", "packets", "sent", "size", "taken")

    def __init__(self, packets: list[Packet], answered: asyncio.Future[None], deadline: float) -> None:
        self.packets, self.answered, self.deadline = packets, answered, deadline
        self.size = sum([len(arguments) for _, arguments in packets])
        self.taken = 0  # messages that are sent or in flight
        self.sent = 0  # that Redis has
        self.failure: str | None = None
        self.is_unknown = False
        self.is_open = True

    def error(self) -> PublishError:
        """What the caller gets; new for each caller, for it will carry a traceback."""
        many = len(self.packets)
        if self.sent and not self.is_unknown:
            return DeliveryUnknown(f"{self.sent} of {many} messages were sent, the others were not: {self.failure}")
        if self.is_unknown:
            what = "it" if many == 1 else f"some or all of {many} messages"
            return DeliveryUnknown(f"{self.failure}; {what} may have arrived")
        return BrokerUnavailable(f"{self.failure}; {'not sent' if many == 1 else 'none was sent'}")


class Batch:
    """What goes to one stream in one flush, or to Pub/Sub: the arguments of a script call, and whose they are."""

    __slots__ = ("arguments", "calls", "key", "reply")

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.arguments: list[bytes] = []  # of each message
        self.calls: list[Call] = []  # of each message
        self.reply: Any = UNANSWERED

    def settle(self, server: str, unanswered: str = "") -> None:
        """Tell the calls what became of their messages.

        Args:
            server: Who answered, for the text.
            unanswered: Why there is no answer, if there is none.
        """
        reply = self.reply
        if isinstance(reply, list):
            if reply:
                self._settle_some(server, reply)
            else:
                for call in self.calls:
                    call.sent += 1
        else:
            for call in self.calls:
                call.is_unknown |= reply is UNANSWERED
                call.failure = unanswered if reply is UNANSWERED else f"{server} refused it: {reply}"

    def _settle_some(self, server: str, failures: list[Any]) -> None:
        """The answer is position, error, position, error, ..."""
        texts = dict(zip(failures[::2], failures[1::2], strict=True))
        for position, call in enumerate(self.calls, 1):
            if position in texts:
                call.failure = f"{server} refused it: {texts[position].decode(errors='replace')}"
            else:
                call.sent += 1

    @property
    def is_demoted(self) -> bool:
        """Whether it went to a server that takes no writes any more."""
        return isinstance(self.reply, Refused) and self.reply.code in ("READONLY", "MASTERDOWN", "UNBLOCKED")

    @property
    def is_forgotten(self) -> bool:
        """Whether Redis does not know the script; nothing of the batch was carried out."""
        return isinstance(self.reply, Refused) and self.reply.code == "NOSCRIPT"
