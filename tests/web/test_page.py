"""The page as HTML: well-formed, alone, readable by machines and people, and safe with whatever a text has in it."""

from __future__ import annotations

import re
from base64 import b64encode
from dataclasses import replace
from hashlib import sha256

import pytest

from silbo import AsyncEventDispatcher, Bridge, Consumer, Event, EventName, NotificationEvent, Outbox, Trace
from silbo.brokers.memory import MemoryBroker
from silbo.errors import BrokerUnavailable
from silbo.operations.app import find_app
from silbo.operations.markup import Markup, element, join
from silbo.operations.overview import read_overview
from silbo.operations.page import render_page
from silbo.operations.page_style import CONTENT_SECURITY_POLICY, STYLE
from silbo.outbox.relay import Relay
from silbo.stores.memory import MemoryStore
from tests.support.consumer import Running
from tests.support.overviews import EVIL, Page, hostile_overview
from tests.support.relay import FailingBroker, message, wait_until

ESCAPED = r"\x00\x1b[31m\u202e\udc80\n"
"""The control characters of a hostile text, as the page shows them."""


def test_hostile_text_is_text() -> None:
    """Names, errors, payloads, plugins, groups, hosts: each of them stays a text, wherever it stands."""
    overview, many = hostile_overview()
    page = Page(render_page(overview))
    assert not {"script", "img", "iframe", "object", "embed", "form", "link", "base"} & set(page.tags)
    names = {name for _, name, _ in page.attributes}
    assert not [name for name in names if name.startswith("on")] and not names & {"style", "src", "srcdoc", "action"}
    links = [value for tag, name, value in page.attributes if (tag, name) == ("a", "href")]
    assert all(value is not None and re.fullmatch("#[a-z]+", value) for value in links)
    assert page.values("href") == links
    assert page.tags.count("style") == page.tags.count("title") == 1
    shown = set(map(int, re.findall(r"evil-(\d+)", page.text)))
    assert set(range(1, many + 1)) - shown == set(), "each is shown, as a text"
    assert page.text.count(EVIL) >= many


def test_control_characters_are_shown_as_escapes() -> None:
    """They can't end the page, turn its direction, or break its encoding."""
    html = render_page(hostile_overview()[0])
    assert html.isascii()
    told = Page(html).text.replace("\n", "")
    assert told.isprintable() and ESCAPED in told


def test_page_allows_its_own_style_and_nothing_else() -> None:
    page = Page(render_page(hostile_overview()[0]))
    (policy,) = [
        value for tag, name, value in page.attributes if (tag, name) == ("meta", "content") and "-src" in str(value)
    ]
    assert policy == CONTENT_SECURITY_POLICY and policy.startswith("default-src 'none'; ")
    hashed = b64encode(sha256(page.style.encode()).digest()).decode()
    assert policy.split("; ") == [
        "default-src 'none'",
        f"style-src 'sha256-{hashed}'",
        "base-uri 'none'",  # these two don't follow default-src
        "form-action 'none'",
    ]
    assert "url(" not in page.style and "@import" not in page.style


def test_page_can_be_read_without_seeing_it() -> None:
    """Tables have captions and headings, sections and pictures have names, and the language is told."""
    page = Page(render_page(hostile_overview()[0]))
    tables = page.tags.count("table")
    assert tables == page.tags.count("caption") == page.tags.count("thead") > 5
    scopes = [value for tag, name, value in page.attributes if (tag, name) == ("th", "scope")]
    assert len(scopes) == page.tags.count("th") and set(scopes) == {"col", "row"}
    assert (
        len([1 for tag, name, _ in page.attributes if (tag, name) == ("svg", "aria-label")])
        == page.tags.count("svg")
        == 1
    )
    assert set(page.values("aria-labelledby")) <= set(page.values("id"))
    assert {str(value)[1:] for value in page.values("href")} == set(page.values("aria-labelledby"))
    assert page.values("lang") == ["en"] and page.tags.count("h1") == page.tags.count("main") == 1
    assert page.tags.count("details") == page.tags.count("summary")


def _contrast(first: str, second: str) -> float:
    def luminance(color: str) -> float:
        parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    darker, lighter = sorted((luminance(first), luminance(second)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_have_contrast(scheme: int) -> None:
    """4.5 for texts, and 3 for the bars, as WCAG 2.2 asks for."""
    block = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)[scheme]
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
    for ground in (colours["ground"], colours["raised"]):
        for text in ("text", "quiet", "link", "good", "warn", "bad"):
            assert _contrast(colours[text], ground) >= 4.5, (text, ground)
        assert _contrast(colours["busy"], ground) >= 3
    assert _contrast(colours["busy"], colours["wait"]) >= 3


def test_page_tells_the_state_of_everything() -> None:
    """The words that an operator looks for, next to what they belong to."""
    overview, _ = hostile_overview()
    told = Page(render_page(overview)).text.replace(EVIL, "").replace(ESCAPED, "")
    for words in (
        "1plugin off, of 1",
        "2dead letters",
        "1dead row in the outbox",
        "evil-3 failed, 100.0 ms, 50.0 waiting, refused: evil-7 2026-03-07 09:26:00Z",
        "failedevil-450.0 ms10.0 ms",
        "not calledthe dispatch failed before",
        "not declared; did you mean evil-21?",
        "not connected since 2026-03-07T09:26:00Z",
        "1 gaps",
        "1 or more for 0 s",
        "1 of 2 alive",
        "2 attempts",
        "1 partition led by evil-",
        "The oldest that waits was stored 0 s ago.",
        "5sent rows",
        "given up by evil-",
        "2waiting for a newer version",
        "2 wait for a consumer that knows version 3 of evil-",
    ):
        assert words in told, f"{words!r} is not in {told}"


async def test_bridges_outboxes_and_relays_show_their_health() -> None:
    """Each once. A relay that can't reach its broker is as red as a consumer that can't."""
    first, second, stopped = AsyncEventDispatcher(), AsyncEventDispatcher(), Outbox(MemoryStore(), MemoryBroker("old"))
    broker = FailingBroker("web")
    async with Outbox(MemoryStore(), broker) as outbox:
        bridge = Bridge(outbox)
        first.add_subscriber(bridge)
        second.add_subscriber(bridge)
        relay = Relay(MemoryStore(), MemoryBroker("audit"))
        broker.away = BrokerUnavailable("gone away")
        await outbox.publish(message(1))
        await wait_until(lambda: not outbox.health().is_connected)
        app = find_app([first, second, outbox, relay, stopped], "shop")
        overview = await read_overview(app)
        page = Page(render_page(overview))
        broker.away = None
    assert [(health.part, health.name) for health in overview.parts] == [
        ("bridge", "web"),
        ("outbox", "web"),
        ("outbox", "old"),
        ("relay", "audit"),
    ]
    assert "Bridges, outboxes and relays of this process" in page.text
    assert re.search("outbox webnot connected since 20.*?gone away.*?outbox oldnot running", page.text), page.text


async def test_consumer_shows_what_waits_in_its_hands() -> None:
    broker, name = MemoryBroker("web"), EventName("order.sent", NotificationEvent)
    consumer = Consumer(AsyncEventDispatcher(), broker.group("mail", start="new"), own="handle", events=[name], drain=0)
    async with Running(consumer):
        newer = message(1)
        await broker.publish(replace(newer, message_name="order.sent", headers={**newer.headers, "version": "2"}))
        await wait_until(lambda: consumer.health().waiting_for_newer == 1)
        page = Page(render_page(await read_overview(find_app(consumer, "shop"))))
    assert "1 wait for a newer version" in page.text, page.text


async def test_name_that_leaves_is_nothing_to_mend() -> None:
    """A program that only sends has no listeners: its page is not red. What comes in, or stays and nobody hears, is told."""
    sent, open_, stays = (
        EventName("order.sent", NotificationEvent),
        EventName("order.open"),
        EventName("order.kept", Event),
    )
    dispatcher = AsyncEventDispatcher(names=[sent, open_, stays], observers=[Trace()])
    dispatcher.add_subscriber(Bridge(MemoryBroker(app="web")))
    for name, event in ((sent, NotificationEvent()), (open_, NotificationEvent()), (stays, Event())):
        await dispatcher.adispatch(name, event)
    page = Page(render_page(await read_overview(find_app(dispatcher, "shop"))))
    assert "3event names1name that nobody hears0failed" in page.text
    assert "nobody here; a bridge sends it" in page.text
    assert "nobody here; a bridge sends its events, if their class has a kind" in page.text
    assert re.findall("is one misspelt[?].*?(order[.][a-z]+)1", page.text) == ["order.kept"]
    assert page.values("class").count("bad") == 2, "the figure, and the one name"


async def test_name_that_comes_in_and_leaves_again_still_wants_a_listener() -> None:
    """No bridge sends a received message again."""
    name = EventName("order.sent", NotificationEvent)
    dispatcher = AsyncEventDispatcher()
    dispatcher.add_subscriber(Bridge(MemoryBroker(app="web")))
    consumer = Consumer(dispatcher, MemoryBroker(app="x").group("x", start="new"), events=[name])
    page = Page(render_page(await read_overview(find_app(consumer, "shop"))))
    assert "1event name1name that nobody hears" in page.text


async def test_empty_host_is_told_what_is_missing() -> None:
    overview = await read_overview(find_app(AsyncEventDispatcher(), "shop"))
    page = Page(render_page(overview))
    assert (
        "To see dispatches here, make the dispatcher with AsyncEventDispatcher(observers=[silbo.Trace()])" in page.text
    )
    assert "No names are declared, and none has a listener." in page.text
    assert "table" not in page.tags
    nothing = Page(render_page(replace(overview, dispatchers=[])))
    assert "There is no dispatcher here." in nothing.text


async def test_dispatch_with_many_listeners_is_cut() -> None:
    """The listeners that have failed are shown wherever they are."""

    async def listener(event: object) -> None: ...

    async def fails(event: object) -> None:
        raise LookupError("as told")

    dispatcher = AsyncEventDispatcher(observers=[Trace()])
    for number in range(1000):
        dispatcher.add_listener("order.paid", fails if number == 700 else listener, on_error=lambda *_: None)
    await dispatcher.adispatch("order.paid")
    overview = await read_overview(find_app(dispatcher, "shop"))
    page = Page(render_page(replace(overview, dispatchers=[replace(overview.dispatchers[0], names=[])])))
    assert page.text.count("listener [") == 50 and page.text.count("LookupError: as told") == 1
    assert "1,000 listeners in " in page.text and "and 949 more" in page.text


def test_dead_letters_that_are_alike_are_one_row_with_the_command_that_mends() -> None:
    """Each with its id; with payloads each has a row of its own."""
    overview, _ = hostile_overview()
    stream = overview.streams[0] if overview.streams else None
    assert stream is not None
    letters = [
        replace(stream.letters[0], id=f"{number}-0", group="mail", name="order.paid", error=error, payload=None)
        for number, error in enumerate(("KeyError: 'to'", "OSError: no", "KeyError: 'to'", "KeyError: 'to'"))
    ]
    pages = [
        Page(render_page(replace(overview, streams=[replace(stream, key="shop:{orders}", letters=each)])))
        for each in (letters, [replace(letter, payload="{}") for letter in letters])
    ]
    alone, payloads = (page.text for page in pages)
    assert "; to give them back: silbo dead retry --prefix shop --stream orders --group mail" in alone
    assert alone.count("KeyError: 'to'") == 1 and "0-0and 2 like it2-0, 3-0" in alone
    assert payloads.count("KeyError: 'to'") == 3 and "like it" not in payloads


def test_outbox_without_a_relay_is_red_in_the_figures() -> None:
    overview, _ = hostile_overview()
    assert overview.outbox is not None
    status = replace(overview.outbox.status, leads={})
    html = render_page(replace(overview, outbox=replace(overview.outbox, status=status)))
    assert '<b class="bad">1</b><span>waiting in the outbox, without a relay</span>' in html


def test_long_texts_are_cut() -> None:
    """So that a page with a payload of a megabyte still loads."""
    overview, _ = hostile_overview()
    stream = overview.streams[0] if overview.streams else None
    assert stream is not None
    letter = replace(stream.letters[0], error="e" * 1_000_000, payload="p" * 1_000_000)
    html = render_page(replace(overview, streams=[replace(stream, letters=[letter])]))
    assert len(html) < 100_000 and html.count("... (1,000,000 characters)") == 2


# -- markup -------------------------------------------------------------------------------------------------


def test_every_child_is_escaped_unless_it_is_markup() -> None:
    assert element("p", "<b>", Markup("<i>"), None, 1 < 2, ["&", ("'", element("b"))]) == (
        "<p>&lt;b&gt;<i>True&amp;&#x27;<b></b></p>"
    )
    assert isinstance(join("<"), Markup) and join("<") == "&lt;"
    assert not isinstance(Markup("<i>") + "<", Markup), "a text that was put together is no markup"


def test_attributes_are_escaped() -> None:
    made = element("a", class_='x" onclick="evil()', aria_label="<&>", open=True, title=None, hidden=False)
    assert made == '<a class="x&quot; onclick=&quot;evil()" aria-label="&lt;&amp;&gt;" open></a>'
