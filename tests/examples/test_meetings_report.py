"""The demo's own arithmetic: the plan of requests, and what counts as not adding up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest

from examples.meetings.report import Outcome, Side
from examples.meetings.traffic import Answer, Plan


def test_the_same_seed_gives_the_same_plan_and_another_one_another() -> None:
    """A run that failed can be repeated."""
    assert Plan(200, 5).requests == Plan(200, 5).requests
    assert Plan(200, 5).requests != Plan(200, 6).requests


def test_the_plan_has_every_kind_of_request() -> None:
    """Good ones of each event, and each way to be bad."""
    plan = Plan(2000, 1)
    statuses = Counter(request.status for requests in plan.requests.values() for request in requests)
    assert statuses.total() == 2000
    assert statuses.keys() == {200, 400, 403, 404, 409, 422}
    assert plan.names.keys() == {"meeting.joined", "meeting.left", "meeting.renamed"}
    assert plan.names.total() == statuses[200] > 1400
    assert all(account["cost_centre"] in account["title"] for account in plan.accounts.values())


@pytest.fixture
def perfect() -> Outcome:
    plan = Plan(300, 1)
    answers = [
        Answer(request, request.status, str(uuid4()) if request.status == 200 else None)
        for requests in plan.requests.values()
        for request in requests
    ]
    event_ids = [answer.event_id for answer in answers if answer.event_id]
    refused = sum(answer.status == 403 for answer in answers)
    sides = (Side("one", len(event_ids), event_ids, [1.0, 2.0]), Side("other", len(event_ids), event_ids, [1.0, 2.0]))
    return Outcome(plan, answers, len(event_ids) + refused, sides, dict(plan.names), plan.accounts)


def test_a_perfect_outcome_has_no_problem(perfect: Outcome) -> None:
    assert list(perfect.problems()) == []


def _side(**changes: Callable[[Any], Any]) -> Callable[[Outcome], Outcome]:
    def change(outcome: Outcome) -> Outcome:
        one, other = outcome.sides
        values = {name: how(getattr(other, name)) for name, how in changes.items()}
        return replace(outcome, sides=(one, replace(other, **values)))

    return change


def _answer(**values: Any) -> Callable[[Outcome], Outcome]:
    def change(outcome: Outcome) -> Outcome:
        at = next(at for at, answer in enumerate(outcome.answers) if answer.status == 200)
        answers = [*outcome.answers]
        answers[at] = replace(answers[at], **values)
        return replace(outcome, answers=answers)

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda outcome: replace(outcome, answers=outcome.answers[1:]), "300 requests, but 299 answers"),
        (_answer(status=503, event_id=None), "1 answers with another status than expected, first 503 instead of 200"),
        (_answer(event_id=None), "requests were confirmed, with"),
        (lambda outcome: replace(outcome, dispatched=outcome.dispatched - 1), "dispatched, but"),
        (_side(sent=lambda sent: sent - 1), "other: 235 confirmed, but 234 sent"),
        (_side(event_ids=lambda ids: ids[2:]), "other: 2 lost"),
        (_side(event_ids=lambda ids: [*ids, ids[0]]), "other: 1 doubled"),
        (_side(event_ids=lambda ids: [*ids, "x"]), "other: 1 that nobody was told of"),
        (lambda outcome: replace(outcome, names={**outcome.names, "meeting.left": 0}), "one: heard {"),
        (lambda outcome: replace(outcome, accounts={**outcome.accounts, "99": {}}), "billing has 1 accounts wrong"),
        (lambda outcome: replace(outcome, accounts={}), "billing has 32 accounts wrong, first that of meeting 1: None"),
    ],
)
def test_whatever_does_not_add_up_is_told(perfect: Outcome, change: Callable[[Outcome], Outcome], told: str) -> None:
    problems = list(change(perfect).problems())
    assert any(told in problem for problem in problems), problems


def test_percentiles_of_nothing_are_none() -> None:
    """A side that heard nothing is lost events, not a crash."""
    assert Side("one", 1, [], []).percentile(99) == "-"
    assert Side("one", 101, [], [float(number) for number in range(101)]).percentile(50) == "50.0 ms"
