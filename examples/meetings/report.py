"""The demo's table, and the check that its figures add up."""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

from rich.table import Table

from examples.meetings.ledger import Line
from examples.meetings.traffic import Answer, Plan


@dataclass(frozen=True)
class Outcome:
    """The plan, and the figures that each program has counted by itself.

    Attributes:
        calm: Nothing was killed, so nothing may be missing anywhere.
        accepted: The host's ledger.
        stream: The entries in Redis: a name and an event id for each.
        booked: Billing's ledger.
        dead: The event ids of the dead letters.
        heard: The messages that the bystander heard, by event id.
        milliseconds: Times from the event to the bystander.
        accounts: Billing's answer.
        redelivered: The number of events that billing had in hand when it was killed, and that were delivered again.
    """

    plan: Plan
    calm: bool
    answers: list[Answer]
    accepted: list[Line]
    stream: list[tuple[str, str]]
    booked: list[Line]
    dead: list[str]
    heard: list[str]
    milliseconds: list[float]
    accounts: dict[str, Any]
    redelivered: int = 0

    @property
    def given(self) -> list[str]:
        """Return the events whose clients got an answer. None of these may be lost."""
        return [answer.event_id for answer in self.answers if answer.event_id]

    @property
    def unanswered(self) -> int:
        """Count the requests without an answer, which were sent again. Each may have become an event all the same."""
        return sum(answer.unanswered for answer in self.answers)

    @property
    def handled(self) -> list[str]:
        """Return the events that billing has handled."""
        return [line.event_id for line in self.booked if not line.again]

    @property
    def again(self) -> int:
        """Count the handled events that came again, because a kill came before the acknowledgement."""
        return sum(line.again for line in self.booked)

    @property
    def in_stream(self) -> list[str]:
        """Return the events in the stream."""
        return [event_id for _, event_id in self.stream]

    @property
    def lost(self) -> int:
        """Count the events that were given, and are neither handled nor a dead letter."""
        return len(set(self.given).difference(self.handled, self.dead))

    def count(self, *statuses: int) -> int:
        """Count the answers with one of these statuses."""
        return sum(answer.status in statuses for answer in self.answers)

    def table(self) -> Table:
        """Return the table, for a terminal."""
        table = Table()
        table.add_column()
        for title in ("host", "Streams: billing", "Pub/Sub: bystander"):
            table.add_column(title, justify="right")
        table.add_row("requests", str(len(self.answers)))
        table.add_row("bad, rejected", str(self.count(400, 404, 409, 422)))
        table.add_row("refused by the plugin", str(self.count(403)))
        table.add_row("given", str(len(self.given)), end_section=True)
        missed = len(set(self.given).difference(self.heard))
        table.add_row("in the stream", "", str(len(self.stream)))
        table.add_row("handled", "", str(len(self.handled)), str(len(self.heard)))
        table.add_row("dead letters", "", str(len(self.dead)))
        table.add_row("redelivered", "", str(self.redelivered))
        table.add_row("done before, not again", "", str(self.again))
        table.add_row("lost", "", str(self.lost), str(missed))
        table.add_row("duplicates in the stream", "", str(_doubled(self.in_stream)), end_section=True)
        booked = [(line.written - line.happened) * 1000 for line in self.booked if not line.again]
        for number in (50, 99):
            cells = percentile(booked, number), percentile(self.milliseconds, number)
            table.add_row(f"dispatch to done, p{number}", "", *cells)
        return table

    def remarks(self) -> Iterator[str]:
        """Yield explanations of unusual figures."""
        if self.unanswered:
            more = len(set(self.in_stream).difference(self.given))
            yield (
                f"{self.unanswered} requests got no answer and were sent again. {more} of them had happened all the same: so "
                "many events are in the stream beside those that were given (answered as done)."
            )
        if missed := set(self.given).difference(self.heard):
            yield f"Pub/Sub keeps nothing: the bystander missed {len(missed)} while Redis was away."

    def problems(self) -> Iterator[str]:
        """Return the figures that do not add up, one line each; empty if all do."""
        planned = sum(map(len, self.plan.requests.values()))
        if len(self.answers) != planned:
            yield f"{planned} requests, but {len(self.answers)} answers"
        if wrong := [answer for answer in self.answers if not answer.is_expected]:
            request = wrong[0].request
            yield (
                f"{len(wrong)} answers with another status than expected, first {wrong[0].status} instead of "
                f"{request.status} for POST {request.path} {request.body!r}"
            )
        given = set(self.given)
        if len(given) != self.count(200):
            yield f"{self.count(200)} requests were answered as done, with {len(given)} different event ids"
        if self.lost:
            yield f"{self.lost} lost"
        yield from self._ledgers(given)
        yield from self._stream(given)
        yield from self._bystander(given)
        wanted = self.plan.accounts
        if wrong_accounts := [one for one in {**wanted, **self.accounts} if wanted.get(one) != self.accounts.get(one)]:
            one = wrong_accounts[0]
            yield (
                f"billing has {len(wrong_accounts)} accounts wrong, first that of meeting {one}: "
                f"{self.accounts.get(one)} instead of {wanted.get(one)}"
            )

    def _ledgers(self, given: Collection[str]) -> Iterator[str]:
        accepted = {line.event_id for line in self.accepted}
        if missing := len(set(given) - accepted):
            yield f"{missing} given, but not in the host's ledger"
        if missing := len(accepted.difference(self.in_stream)):
            yield f"{missing} in the host's ledger, but not in the stream"
        if left := len(set(self.in_stream).difference(self.handled, self.dead)):
            yield f"{left} in the stream, but neither handled nor dead"
        if doubled := _doubled(self.handled):
            yield f"{doubled} handled twice"
        if strange := len({*self.handled, *self.dead}.difference(self.in_stream)):
            yield f"{strange} handled or dead, but not in the stream"

    def _stream(self, given: Collection[str]) -> Iterator[str]:
        if doubled := _doubled(self.in_stream):
            yield f"{doubled} duplicates in the stream"
        if (more := len(set(self.in_stream).difference(given))) > self.unanswered:
            yield f"{more} more in the stream than given, but only {self.unanswered} requests were sent again"
        names = Counter(name for name, _ in self.stream)
        if missing := self.plan.names - names:
            yield f"not in the stream: {dict(missing)}"
        if not self.plan.dead_letters <= len(self.dead) <= self.plan.dead_letters + self.unanswered:
            yield f"{self.plan.dead_letters} events that billing can't handle, but {len(self.dead)} dead letters"

    def _bystander(self, given: Collection[str]) -> Iterator[str]:
        if (missed := len(set(given).difference(self.heard))) and self.calm:
            yield f"Pub/Sub: {missed} lost"
        if doubled := _doubled(self.heard):
            yield f"Pub/Sub: {doubled} doubled"
        if strange := len(set(self.heard).difference(self.in_stream)):
            yield f"Pub/Sub: {strange} heard that are not in the stream"


def percentile(milliseconds: list[float], number: int) -> str:
    """Return a percentile as text."""
    if len(milliseconds) < 2:
        return "-"
    return f"{quantiles(milliseconds, n=100, method='inclusive')[number - 1]:.1f} ms"


def _doubled(event_ids: list[str]) -> int:
    return len(event_ids) - len(set(event_ids))
