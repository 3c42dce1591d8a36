"""Overviews for the tests of the page: one whose every text is hostile, and a reader of its HTML."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from typing import Any

from silbo._process import Process
from silbo.consumer.stats import ConsumerStats
from silbo.dispatch.traced import Traced, TracedListener
from silbo.health import Health, LastError
from silbo.operations.groups import ConsumerStatus, GroupStatus, LeftToNewer, OldestInHand
from silbo.operations.listeners import ListenerInfo
from silbo.operations.names import FieldInfo, NameInfo
from silbo.operations.overview import (
    ConsumerOverview,
    DeadMessage,
    DispatcherOverview,
    OutboxOverview,
    Overview,
    StreamOverview,
)
from silbo.operations.plugins import PluginInfo
from silbo.outbox.rows import Lead, OutboxStatus
from silbo.policy import Policy

AT = datetime(2026, 3, 7, 9, 26, tzinfo=UTC)
EVIL = "</style></title></code>\"'><script>document.title='owned'</script><img src=x onerror=document.title='owned'>"
CONTROLS = "\x00\x1b[31m\u202e\udc80\n"
"""A NUL, an escape sequence, a change of direction, half of a surrogate pair, and a new line."""


class Hostile:
    """Hostile texts, each with a number of its own."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> str:
        self.count += 1
        return f"evil-{self.count}{EVIL}{CONTROLS}"


def hostile_overview() -> tuple[Overview, int]:
    """An overview whose texts are hostile, and their number."""
    evil = Hostile()

    async def listener(event: Any) -> None: ...

    listener.__qualname__, listener.__module__ = evil(), evil()

    def info(**changes: Any) -> ListenerInfo:
        texts = {field: evil() for field in ("name", "listener", "plugin", "place", "off") if field not in changes}
        options = {} if "options" in changes else {evil(): evil()}
        return ListenerInfo(**{"priority": 0.0, "options": options, "is_meant": True, **texts, **changes})

    traced = Traced(
        name=evil(),
        outcome="failed",
        duration=0.1,
        waited=0.05,
        ended_at=AT,
        listeners=(
            TracedListener(listener=listener, outcome="failed", duration=0.05, waited=0.01, error=evil()),
            TracedListener(listener=listener, plugin=evil(), reason="failed"),
        ),
        event=evil(),
        refusal=evil(),
    )
    name = NameInfo(
        name=evil(),
        is_declared=False,
        is_consumed=False,
        cls=evil(),
        kind="ecst",
        key=evil(),
        version=2,
        upcasts=(),
        fields=(FieldInfo(name=evil(), type=evil(), is_required=False),),
        description=evil(),
        deprecated=evil(),
        leaves=False,
        listeners=(info(name="never shown"),),
        similar=evil(),
    )
    plugin = PluginInfo(
        name=evil(),
        version=evil(),
        state="off",
        reason=evil(),
        policy=Policy(),
        failures=1,
        tasks=2,
        host_version=None,
        requires=(evil(),),
        before=(),
        after=(),
        settings="",
        package="",
        listeners=(info(listener="-", plugin="-", place="-", off="-", options={}),),
    )
    dead = [
        DeadMessage(
            id=evil(),
            group=evil(),
            name=evil(),
            event_id=evil(),
            error=evil(),
            attempts=3,
            died_at=AT,
            payload=evil(),
        )
        for _ in range(2)
    ]
    status = OutboxStatus(
        counts={"pending": 1, "sending": 0, "sent": 5, "dead": 1},
        size=100,
        oldest_at=AT,
        oldest_sent_at=AT,
        next_attempt_at=None,
        leads={0: Lead(partition=0, owner=evil(), epoch=1, until=AT)},
    )
    health = Health(
        part="consumer",
        name="never shown",
        is_connected=False,
        away_since=AT,
        last_error=LastError(evil(), AT),
    )
    overview = Overview(
        title=evil(),
        at=AT,
        process=Process(evil(), 7),
        dispatchers=[
            DispatcherOverview(
                reference=evil(),
                names=[name],
                others=[info()],
                is_traced=True,
                dispatches=[traced],
                unheard={evil(): 3},
            ),
            DispatcherOverview(reference="second", names=[], others=[], is_traced=False, dispatches=[], unheard={}),
        ],
        plugins=[plugin],
        consumers=[ConsumerOverview(app=evil(), group=evil(), health=health, stats=ConsumerStats(received=4, gaps=1))],
        parts=[replace(health, part="bridge", name=evil(), last_error=LastError(evil(), AT))],
        streams=[
            StreamOverview(
                key=evil(),
                length=3,
                first_at=AT,
                last_at=AT,
                groups=[
                    GroupStatus(
                        stream="never shown",
                        group=evil(),
                        lag=1,
                        lag_is_at_least=True,
                        waiting_since=AT,
                        in_hand=1,
                        oldest=OldestInHand(evil(), AT, evil(), AT, 2, evil()),
                        retrying=1,
                        dead=2,
                        consumers=[
                            ConsumerStatus(evil(), None, 1, AT, True),
                            ConsumerStatus("never shown", Process(evil(), 8), 1, AT, False),
                        ],
                        read_at=AT,
                        newer=LeftToNewer(2, "never shown", AT, evil(), 3),
                    )
                ],
                dead=2,
                letters=dead[:1],
            )
        ],
        outbox=OutboxOverview(status=status, read_at=AT, rows=dead[1:]),
        problems=[evil()],
    )
    return overview, evil.count


EMPTY = {"meta"}


class Page(HTMLParser):
    """Reads a page, and fails where it is not well-formed.

    Attributes:
        tags: The names of its elements.
        attributes: Each attribute with its value, and the element that has it.
        text: All its texts but for the style sheet.
        style: The style sheet.
    """

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text = ""
        self.style = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        assert len({name for name, _ in attrs}) == len(attrs), "no attribute twice"
        if tag not in EMPTY:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, self.getpos()

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["style"]:
            self.style += data
        else:
            self.text += data

    def values(self, attribute: str) -> list[str | None]:
        return [value for _, name, value in self.attributes if name == attribute]
