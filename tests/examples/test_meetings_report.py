"""The demo's own arithmetic: the plan of requests, and what counts as not adding up."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from examples.meetings.billing import COST_CENTRES
from examples.meetings.events import MEETING_JOINED, MeetingJoined
from examples.meetings.ledger import Ledger, Line, read
from examples.meetings.report import Outcome, percentile
from examples.meetings.traffic import NOBODY_PAYS, Answer, Gate, Plan, Request
from silbo import AsyncEventDispatcher


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
    assert plan.dead_letters > 5
    assert all(account["cost_centre"] in account["title"] for account in plan.accounts.values())
    assert {account["cost_centre"] for account in plan.accounts.values()} <= COST_CENTRES
    assert NOBODY_PAYS not in COST_CENTRES


@pytest.fixture
def perfect() -> Outcome:
    plan = Plan(300, 1)
    answers = [
        Answer(request, request.status, str(uuid4()) if request.status == 200 else None)
        for requests in plan.requests.values()
        for request in requests
    ]
    given = [answer for answer in answers if answer.event_id]
    dead = [answer.event_id or "" for answer in given if NOBODY_PAYS.encode() in answer.request.body]
    names = [name for name, many in plan.names.items() for _ in range(many)]
    stream = [(name, answer.event_id or "") for name, answer in zip(names, given, strict=True)]
    accepted = [Line(name, event_id, 1.0, 2.0) for name, event_id in stream]
    return Outcome(
        plan=plan,
        calm=True,
        answers=answers,
        accepted=accepted,
        stream=stream,
        booked=[line for line in accepted if line.event_id not in dead],
        dead=dead,
        heard=[event_id for _, event_id in stream],
        milliseconds=[1.0] * len(stream),
        accounts=plan.accounts,
    )


def test_a_perfect_outcome_has_no_problem(perfect: Outcome) -> None:
    assert list(perfect.problems()) == []
    assert list(perfect.remarks()) == []
    assert perfect.lost == 0


Change = Callable[[Outcome], Outcome]


def change(**fields: Callable[[Any], Any]) -> Change:
    return lambda outcome: replace(outcome, **{name: how(getattr(outcome, name)) for name, how in fields.items()})


def answer(**values: Any) -> Change:
    """One that was done is answered otherwise."""

    def otherwise(outcome: Outcome) -> Outcome:
        at = next(at for at, answer in enumerate(outcome.answers) if answer.status == 200)
        answers = [*outcome.answers]
        answers[at] = replace(answers[at], **values)
        return replace(outcome, answers=answers)

    return otherwise


def less(lines: list[Any]) -> list[Any]:
    return lines[1:]


def twice(lines: list[Any]) -> list[Any]:
    return [*lines, lines[0]]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (change(answers=less), "300 requests, but 299 answers"),
        (answer(status=503, event_id=None), "1 answers with another status than expected, first 503 instead of 200"),
        (answer(event_id=None), "requests were answered as done, with"),
        (change(booked=less), "1 lost"),
        (change(dead=less), "1 lost"),
        (change(accepted=less), "1 given, but not in the host's ledger"),
        (change(stream=less), "1 in the host's ledger, but not in the stream"),
        (
            change(stream=lambda stream: [*stream, ("meeting.left", "x")]),
            "1 in the stream, but neither handled nor dead",
        ),
        (change(booked=twice), "1 handled twice"),
        (
            change(booked=lambda lines: [*lines, Line("meeting.left", "x", 1.0, 2.0)]),
            "1 handled or dead, but not in the",
        ),
        (change(stream=twice), "1 duplicates in the stream"),
        (change(stream=lambda stream: [*stream, ("meeting.left", "x")]), "1 more in the stream than given, but only 0"),
        (change(stream=lambda stream: [("x", event_id) for _, event_id in stream]), "not in the stream: {'meeting."),
        (change(dead=lambda dead: [*dead, "x"]), "events that billing can't handle, but"),
        (change(heard=less), "Pub/Sub: 1 lost"),
        (change(heard=twice), "Pub/Sub: 1 doubled"),
        (change(heard=lambda heard: [*heard, "x"]), "Pub/Sub: 1 heard that are not in the stream"),
        (change(accounts=lambda accounts: accounts | {"99": {}}), "billing has 1 accounts wrong"),
        (change(accounts=lambda _: {}), "billing has 32 accounts wrong, first that of meeting 1: None"),
    ],
)
def test_whatever_does_not_add_up_is_told(perfect: Outcome, wrong: Change, told: str) -> None:
    problems = list(wrong(perfect).problems())
    assert any(told in problem for problem in problems), problems


def test_a_request_that_was_sent_again_may_have_happened_twice(perfect: Outcome) -> None:
    """Then there is one event more than was given, everywhere, and nothing is wrong."""
    more = Line("meeting.joined", "x", 1.0, 2.0)
    again = change(stream=lambda stream: [*stream, (more.name, more.event_id)], booked=lambda lines: [*lines, more])(
        answer(unanswered=1)(perfect)
    )
    assert list(again.problems()) == []
    assert any("1 of them had happened all the same" in remark for remark in again.remarks())


def test_a_redelivery_is_counted_and_is_no_second_handling(perfect: Outcome) -> None:
    again = Line(
        *(getattr(perfect.booked[0], name) for name in ("name", "event_id", "happened", "written")), again=True
    )
    outcome = replace(perfect, booked=[*perfect.booked, again])
    assert list(outcome.problems()) == []
    assert outcome.again == 1


def test_pubsub_may_miss_what_is_sent_while_it_is_killed(perfect: Outcome) -> None:
    missed = replace(perfect, calm=False, heard=perfect.heard[5:])
    assert list(missed.problems()) == []
    assert any("missed 5" in remark for remark in missed.remarks())


def test_a_leave_that_was_sent_again_may_find_itself_done() -> None:
    """Its first sending was heard, and only the answer was lost; no other request may be answered otherwise."""
    leave, join = Request("/meetings/1/leave", b"", 200), Request("/meetings/1/join", b"", 200)
    assert Answer(leave, 409, None, unanswered=1).is_expected
    assert not Answer(leave, 409, None).is_expected
    assert not Answer(join, 409, None, unanswered=1).is_expected


def test_percentiles_of_nothing_are_none() -> None:
    """A side that heard nothing is lost events, not a crash."""
    assert percentile([], 99) == "-"
    assert percentile([float(number) for number in range(101)], 50) == "50.0 ms"


# -- what the figures rest on -------------------------------------------------------------------------------


async def joined(dispatcher: AsyncEventDispatcher, user_id: int) -> MeetingJoined:
    return await dispatcher.adispatch(MEETING_JOINED, MeetingJoined(7, user_id))


async def test_ledger_has_what_all_listeners_have_done(tmp_path: Path) -> None:
    """Not what was stopped, and not what failed."""
    dispatcher = AsyncEventDispatcher()
    dispatcher.add_subscriber(ledger := Ledger(tmp_path / "ledger"))

    @dispatcher.listen(MEETING_JOINED)
    async def some(event: MeetingJoined) -> None:
        assert event.user_id != 2
        if event.user_id == 3:
            event.stop_propagation()

    events = [await joined(dispatcher, 1), await joined(dispatcher, 3), await joined(dispatcher, 4)]
    with pytest.raises(AssertionError):
        await joined(dispatcher, 2)
    assert [line.event_id for line in read(tmp_path / "ledger")] == [str(events[0].event_id), str(events[2].event_id)]
    ledger.close()


async def test_an_event_that_is_in_the_ledger_has_no_second_effect(tmp_path: Path) -> None:
    """After a restart neither; it is counted."""
    heard: list[int] = []

    async def listener(event: MeetingJoined) -> None:
        heard.append(event.user_id)

    first = AsyncEventDispatcher()
    first.add_subscriber(ledger := Ledger(tmp_path / "ledger"))
    event = await joined(first, 1)
    ledger.close()  # whoever is killed does not come to this; it changes nothing
    second = AsyncEventDispatcher()
    second.add_listener(MEETING_JOINED, listener)
    second.add_subscriber(ledger := Ledger(tmp_path / "ledger"))
    await second.adispatch(MEETING_JOINED, event)
    assert heard == []
    assert [line.again for line in read(tmp_path / "ledger")] == [False, True]
    ledger.close()


async def test_ledger_tells_its_events_to_those_who_come_after_a_kill(tmp_path: Path) -> None:
    """In their order and each once; a line that was cut off was not written, and does not spoil the next."""
    path, heard = tmp_path / "ledger", []
    first = AsyncEventDispatcher()
    first.add_subscriber(ledger := Ledger(path))
    for user_id in (1, 2, 3):
        event = await joined(first, user_id)
    await first.adispatch(MEETING_JOINED, event)
    ledger.close()
    path.write_bytes(path.read_bytes() + b'{"name":"meeting.jo')

    async def listener(event: MeetingJoined) -> None:
        heard.append((event.meeting_id, event.user_id))

    second = AsyncEventDispatcher()
    second.add_listener(MEETING_JOINED, listener)
    await (ledger := Ledger(path)).replay(second)
    assert heard == [(7, 1), (7, 2), (7, 3)]
    second.add_subscriber(ledger)
    await joined(second, 4)
    assert [line.fields.get("user_id") for line in read(path)] == [1, 2, 3, None, 4]
    ledger.close()


async def test_gate_lets_requests_pass_up_to_its_number() -> None:
    """So what is to happen in the middle does."""
    gate, passed = Gate(2), []

    async def request(number: int) -> None:
        async with gate:
            passed.append(number)

    async with asyncio.TaskGroup() as tasks:
        for number in range(5):
            tasks.create_task(request(number))
        await gate.answered(2)
        for _ in range(10):
            await asyncio.sleep(0)
        assert passed == [0, 1]
        await gate.open(5)
    await gate.answered(5)
    assert passed == [0, 1, 2, 3, 4]
