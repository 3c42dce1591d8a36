"""The demo's table, and whether its figures add up."""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

from rich.table import Table

from examples.meetings.traffic import Answer, Plan


@dataclass(frozen=True)
class Side:
    """One way to another program: what the host sent over it, and what that program heard."""

    title: str
    sent: int
    event_ids: list[str]
    milliseconds: list[float]

    def lost(self, wanted: set[str]) -> int:
        """Events that the host confirmed and the program did not hear."""
        return len(wanted.difference(self.event_ids))

    @property
    def doubled(self) -> int:
        """Events heard more than once."""
        return len(self.event_ids) - len(set(self.event_ids))

    def percentile(self, number: int) -> str:
        """Of the time between dispatch and listener."""
        if len(self.milliseconds) < 2:
            return "-"
        return f"{quantiles(self.milliseconds, n=100, method='inclusive')[number - 1]:.1f} ms"


@dataclass(frozen=True)
class Outcome:
    """Everything that was planned and everything that was seen."""

    plan: Plan
    answers: list[Answer]
    dispatched: int
    sides: tuple[Side, Side]
    names: dict[str, int]
    accounts: dict[str, Any]

    @property
    def confirmed(self) -> set[str]:
        """The events that clients were told have happened."""
        return {answer.event_id for answer in self.answers if answer.event_id}

    def count(self, *statuses: int) -> int:
        """Answers with one of these statuses."""
        return sum(answer.status in statuses for answer in self.answers)

    def table(self) -> Table:
        """For people."""
        table = Table()
        table.add_column()
        for title in ("host", *(side.title for side in self.sides)):
            table.add_column(title, justify="right")
        table.add_row("requests", str(len(self.answers)))
        table.add_row("bad, rejected", str(self.count(400, 404, 409, 422)))
        table.add_row("refused by the plugin", str(self.count(403)))
        table.add_row("dispatched", str(self.dispatched), end_section=True)
        table.add_row("sent", "", *(str(side.sent) for side in self.sides))
        table.add_row("received", "", *(str(len(side.event_ids)) for side in self.sides))
        table.add_row("lost", "", *(str(side.lost(self.confirmed)) for side in self.sides))
        table.add_row("doubled", "", *(str(side.doubled) for side in self.sides), end_section=True)
        table.add_row("dispatch to listener, p50", "", *(side.percentile(50) for side in self.sides))
        table.add_row("dispatch to listener, p99", "", *(side.percentile(99) for side in self.sides))
        return table

    def problems(self) -> Iterator[str]:
        """What does not add up, one line each; none when all is well."""
        planned = sum(map(len, self.plan.requests.values()))
        if len(self.answers) != planned:
            yield f"{planned} requests, but {len(self.answers)} answers"
        if wrong := [answer for answer in self.answers if answer.status != answer.request.status]:
            request = wrong[0].request
            yield (
                f"{len(wrong)} answers with another status than expected, first {wrong[0].status} instead of "
                f"{request.status} for POST {request.path} {request.body!r}"
            )
        confirmed = self.confirmed
        if len(confirmed) != self.count(200):
            yield f"{self.count(200)} requests were confirmed, with {len(confirmed)} different event ids"
        if self.dispatched != len(confirmed) + self.count(403):
            yield f"{self.dispatched} dispatched, but {len(confirmed)} confirmed and {self.count(403)} refused"
        for side in self.sides:
            if side.sent != len(confirmed):
                yield f"{side.title}: {len(confirmed)} confirmed, but {side.sent} sent"
            if lost := side.lost(confirmed):
                yield f"{side.title}: {lost} lost"
            if side.doubled:
                yield f"{side.title}: {side.doubled} doubled"
            if strange := set(side.event_ids) - confirmed:
                yield f"{side.title}: {len(strange)} that nobody was told of, refused ones for example"
        if self.names != self.plan.names:
            yield f"{self.sides[0].title}: heard {self.names}, planned {dict(self.plan.names)}"
        wanted = self.plan.accounts
        if wrong_accounts := [one for one in {**wanted, **self.accounts} if wanted.get(one) != self.accounts.get(one)]:
            one = wrong_accounts[0]
            yield (
                f"billing has {len(wrong_accounts)} accounts wrong, first that of meeting {one}: "
                f"{self.accounts.get(one)} instead of {wanted.get(one)}"
            )
