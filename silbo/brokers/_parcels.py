"""Messages on their way through a client library that the host brings, and what became of each."""

from __future__ import annotations

import asyncio
from typing import Literal, TypeAlias

from silbo.errors import BrokerUnavailable, DeliveryUnknown, MessageRefused
from silbo.message import Message, instance

__all__ = ["Call", "Parcel", "labels"]


def labels(message: Message, app: str) -> dict[str, str]:
    """What stands beside a message, to be filtered by without decoding it."""
    return {
        "message_type": message.message_type,
        "message_name": message.message_name,
        "message_id": message.message_id,
        "app": app,
        "instance": instance(),
        **message.headers,
    }


_Answer: TypeAlias = Literal["sent", "refused", "unsent", "unknown"]


class Parcel:
    """One message on its way. Whoever sends it says what became of it; the first answer counts.

    Attributes:
        raw: The message, encoded.
        is_handed: To be set before the library gets it. What is not answered for is unknown where it was handed, and not
            sent where it was not.
    """

    __slots__ = ("_answer", "_call", "is_handed", "message", "raw")

    def __init__(self, call: Call, message: Message, raw: bytes) -> None:
        self._call, self.message, self.raw = call, message, raw
        self.is_handed = False
        self._answer: _Answer | None = None

    @property
    def deadline(self) -> float:
        """When its caller is answered at the latest, by the loop's clock."""
        return self._call.deadline

    @property
    def is_open(self) -> bool:
        """Whether it is not answered, and its caller still waits."""
        return self._answer is None and not self._call.answer.done()

    @property
    def has_missed(self) -> bool:
        """Whether it may have to be sent again."""
        return self._answer not in ("sent", "refused")

    def sent(self) -> None:
        """The broker has it."""
        self._settle("sent")

    def refused(self, problem: str) -> None:
        """The broker takes it neither now nor later."""
        if self._answer is None:
            self._call.refuse(MessageRefused(self.message.message_name, problem))
            self._settle("refused")

    def unsent(self, why: str) -> None:
        """The broker surely does not have it."""
        self._settle("unsent", why)

    def unknown(self, why: str) -> None:
        """The broker may have it."""
        self._settle("unknown", why)

    def lost(self, why: str) -> None:
        """It is not answered for."""
        self._settle("unknown" if self.is_handed else "unsent", why)

    def _settle(self, answer: _Answer, why: str = "") -> None:
        if self._answer is None:
            self._answer = answer
            self._call.settle(answer, why)


class Call:
    """One call of ``publish``, and how far its messages are.

    Attributes:
        deadline: When it is answered at the latest, by the loop's clock.
        answer: Of the call, when each of its messages has one.
        refusal: Why messages can't be sent; they don't count among its ``messages``.
        messages: How many are on their way.
    """

    def __init__(self) -> None:
        self.deadline = 0.0
        self.answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.refusal: MessageRefused | None = None
        self.messages = self._sent = self._settled = 0
        self._unsent = self._unknown = ""

    def refuse(self, error: MessageRefused) -> None:
        """One more message can't be sent."""
        if self.refusal is None:
            self.refusal = error
        else:
            self.refusal.add_note(f"and in the same call: {error}")

    def settle(self, answer: _Answer, why: str) -> None:
        """One more of its messages has an answer."""
        self._settled += 1
        self._sent += answer == "sent"
        if answer == "unsent":
            self._unsent = self._unsent or why
        elif answer == "unknown":
            self._unknown = self._unknown or why
        if self._settled < self.messages or self.answer.done():
            return
        if (error := self._error()) is None:
            self.answer.set_result(None)
        else:
            self.answer.set_exception(error)

    def _error(self) -> BrokerUnavailable | DeliveryUnknown | MessageRefused | None:
        many = self.messages
        if self._unknown:
            what = "it" if many == 1 else f"some or all of {many} messages"
            return DeliveryUnknown(f"{self._unknown}; {what} may have arrived")
        if self._unsent and self._sent:
            return DeliveryUnknown(f"{self._sent} of {many} messages were sent, the others were not: {self._unsent}")
        if self._unsent:
            return BrokerUnavailable(
                f"{self._unsent}; {'not sent' if many == 1 else f'none of {many} messages was sent'}"
            )
        return self.refusal
