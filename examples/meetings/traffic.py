"""The demo's clients: many requests, some of them bad, and the state that they must lead to."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import httpx
import msgspec

from examples.meetings.billing import Account
from examples.meetings.events import MEETING_JOINED, MEETING_LEFT, MEETING_RENAMED
from examples.meetings.house_rules import BANNED
from examples.meetings.programs import Program

MEETINGS = 32
"""So many at once: the requests about one meeting are sent one after another, so their outcome is known beforehand."""

USERS = [user_id for user_id in range(1, 60) if user_id not in BANNED]
TITLES = {"sales": "Weekly numbers", "r&d": "Ünïcode 🚀 review", "legal": 'The "small" print', "people": "面談"}

NOBODY_PAYS = "lottery"
"""A cost centre that billing does not know."""

PATIENCE = 15.0
"""Seconds that a client goes on asking a host that does not answer."""


@dataclass(frozen=True)
class Request:
    """One POST, and the status of its correct answer."""

    path: str
    body: bytes
    status: int


@dataclass(frozen=True)
class Answer:
    """The answer to a request.

    Attributes:
        unanswered: The number of earlier attempts without an answer; each may have taken effect all the same.
    """

    request: Request
    status: int
    event_id: str | None
    unanswered: int = 0

    @property
    def is_expected(self) -> bool:
        """True if the status is the planned one. A repeated leave may also get 409: the first one has taken effect."""
        if self.unanswered and self.request.path.endswith("leave") and self.request.status == 200:
            return self.status in (200, 409)
        return self.status == self.request.status


class Gate:
    """A gate that each request passes: it counts requests and stops them at a number, so that a kill comes in their middle.

    So the kill comes in the middle however fast the machine is.
    """

    def __init__(self, limit: int) -> None:
        self._begun, self._answered, self._limit = 0, 0, limit
        self._changed = asyncio.Condition()

    async def __aenter__(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._begun < self._limit)
            self._begun += 1

    async def __aexit__(self, *_: object) -> None:
        async with self._changed:
            self._answered += 1
            self._changed.notify_all()

    async def answered(self, number: int) -> None:
        """Wait until so many requests were answered."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._answered >= number)

    async def open(self, limit: int) -> None:
        """Let more requests pass."""
        async with self._changed:
            self._limit = limit
            self._changed.notify_all()


class Plan:
    """The requests of each meeting in their order, and the state that they lead to.

    The same seed gives the same plan.
    """

    def __init__(self, requests: int, seed: int) -> None:
        self._dice = random.Random(seed)
        self._accounts = {meeting_id: Account() for meeting_id in range(1, MEETINGS + 1)}
        self.requests: dict[int, list[Request]] = {meeting_id: [] for meeting_id in self._accounts}
        self.names: Counter[str] = Counter()
        """How often each event leaves the host."""
        self.dead_letters = 0
        """How many of them billing can't handle."""

        steps = {self._come_or_go: 64, self._rename: 15, self._unpaid: 1, self._banned: 6, self._leave_unseen: 4}
        steps |= {self._no_json: 4, self._wrong_fields: 3, self._unknown: 3}
        for number in range(requests):
            [step] = self._dice.choices([*steps], weights=[*steps.values()])
            step(number % MEETINGS + 1)

    @property
    def accounts(self) -> dict[str, dict[str, Any]]:
        """Return the accounts that billing must have at the end."""
        known = {str(meeting_id): asdict(account) for meeting_id, account in self._accounts.items()}
        return {meeting_id: account for meeting_id, account in known.items() if account != asdict(Account())}

    def _come_or_go(self, meeting_id: int) -> None:
        account, user_id = self._accounts[meeting_id], self._dice.choice(USERS)
        if user_id in account.members:
            account.members.remove(user_id)
            self._add(meeting_id, "leave", {"user_id": user_id}, event=MEETING_LEFT)
        else:
            account.members.append(user_id)
            account.seats_taken += 1
            self._add(meeting_id, "join", {"user_id": user_id}, event=MEETING_JOINED)

    def _rename(self, meeting_id: int) -> None:
        account = self._accounts[meeting_id]
        account.cost_centre, subject = self._dice.choice([*TITLES.items()])
        account.title = f"[{account.cost_centre}] {subject} {self._dice.randrange(1000)}"
        self._add(meeting_id, "rename", {"title": account.title}, event=MEETING_RENAMED)

    def _unpaid(self, meeting_id: int) -> None:
        self.dead_letters += 1
        self._add(meeting_id, "rename", {"title": f"[{NOBODY_PAYS}] Party"}, event=MEETING_RENAMED)

    def _banned(self, meeting_id: int) -> None:
        self._add(meeting_id, "join", {"user_id": self._dice.choice([*BANNED])}, status=403)

    def _leave_unseen(self, meeting_id: int) -> None:
        self._add(meeting_id, "leave", {"user_id": 1000}, status=409)

    def _no_json(self, meeting_id: int) -> None:
        self._add(meeting_id, "join", self._dice.choice([b"", b'{"user_id": ', b"user 7", b"\xff\xfe"]), status=400)

    def _wrong_fields(self, meeting_id: int) -> None:
        self._add(meeting_id, "join", self._dice.choice([{"user": 7}, {"user_id": "7"}, [7], None]), status=422)

    def _unknown(self, meeting_id: int) -> None:
        where: Any = self._dice.choice([meeting_id, "everywhere", -1])
        action = "dance" if where == meeting_id else "join"
        self.requests[meeting_id].append(Request(f"/meetings/{where}/{action}", b'{"user_id":7}', 404))

    def _add(self, meeting_id: int, action: str, body: Any, *, event: Any = None, status: int = 200) -> None:
        raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
        self.requests[meeting_id].append(Request(f"/meetings/{meeting_id}/{action}", raw, status))
        if event is not None:
            self.names[str(event)] += 1


async def send(plan: Plan, host: Program, gate: Gate, on_answer: Callable[[], object]) -> list[Answer]:
    """Send all requests, over one connection for each meeting.

    Raises:
        ProgramFailed: the host has ended, and is not being started again.
        httpx.TransportError: the host does not answer any more.
    """
    answers: list[Answer] = []

    async def about_one_meeting(requests: list[Request]) -> None:
        for request in requests:
            async with gate:
                answers.append(await _ask(client, host, request))
                on_answer()

    async with httpx.AsyncClient(timeout=10) as client, asyncio.TaskGroup() as meetings:
        for requests in plan.requests.values():
            meetings.create_task(about_one_meeting(requests))
    return answers


async def _ask(client: httpx.AsyncClient, host: Program, request: Request) -> Answer:
    """Send a request until it is answered."""
    unanswered, give_up = 0, time.monotonic() + PATIENCE
    while True:
        try:
            response = await client.post(host.url + request.path, content=request.body)
        except httpx.TransportError as error:
            host.check()
            if time.monotonic() > give_up:
                raise
            unanswered += not isinstance(error, httpx.ConnectError)  # then nobody was there to hear it
            await asyncio.sleep(0.05)
        else:
            event_id = response.json()["event_id"] if response.status_code == 200 else None
            return Answer(request, response.status_code, event_id, unanswered)
