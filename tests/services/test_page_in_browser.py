"""The page in a real browser: it loads nothing, runs nothing, fits on a telephone, and can be read with the keyboard."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from silbo import AsyncEventDispatcher, DomainEvent, EventName, Trace
from silbo.operations.page import render_page
from silbo.web import PageApp
from tests.support.overviews import EVIL, hostile_overview
from tools.server import free_port

pytestmark = [pytest.mark.chromium, pytest.mark.xdist_group("chromium")]


@dataclass
class Paid(DomainEvent):
    card: str = EVIL


class Host:
    """A host whose names, listeners, errors and payloads are hostile, and which serves its page."""

    def __init__(self) -> None:
        self.dispatcher = AsyncEventDispatcher(
            names=[EventName(f"order.paid{EVIL}", Paid, description=EVIL)],
            observers=[Trace(payloads=True)],
            on_error="collect",
        )
        self._is_used = False
        self.page = PageApp(self.dispatcher, title=f"shop{EVIL}", payloads=True)

        async def fails(event: Any) -> None:
            raise LookupError(EVIL)

        fails.__qualname__ = f"fails{EVIL}"
        self.dispatcher.add_listener(f"order.paid{EVIL}", fails)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and not self._is_used:
            self._is_used = True
            with pytest.raises(ExceptionGroup):
                await self.dispatcher.adispatch(f"order.paid{EVIL}", Paid())
        await self.page(scope, receive, send)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The address of a running host."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(Host(), port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = threading.Event()
        while not server.started:
            assert thread.is_alive()
            deadline.wait(0.01)
        yield f"http://localhost:{port}/"
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a file with everything that a page can have."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(render_page(hostile_overview()[0]))
    return path.as_uri()


@pytest.fixture(params=["url", "file"])
def page(request: pytest.FixtureRequest, browser: Any) -> str:
    """Both, one after the other, with logs that begin empty."""
    drain(browser)
    show(browser, 1280)
    address: str = request.getfixturevalue(request.param)
    browser.get(address)
    return address


def drain(browser: Any) -> tuple[list[str], list[str]]:
    """Return the lines of the console and the addresses that were asked for, since the last call."""
    said = [entry["message"] for entry in browser.get_log("browser")]
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return said, asked


def show(browser: Any, width: int, scheme: str = "light") -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def test_page_loads_nothing_and_violates_nothing(page: str, browser: Any) -> None:
    """No request but for itself, and nothing in the console; its style sheet applies, so the policy's hash is right."""
    said, asked = drain(browser)
    assert said == [] and asked == [page]
    assert (
        browser.execute_script("return getComputedStyle(document.querySelector('table')).borderCollapse") == "collapse"
    )


def test_hostile_text_does_nothing(page: str, browser: Any) -> None:
    assert "owned" not in browser.title.removeprefix("shop").removeprefix("evil-1").replace(EVIL, "")
    counts = "return ['script', 'img'].map(tag => document.querySelectorAll(tag).length)"
    assert browser.execute_script(counts) == [0, 0]
    assert EVIL in browser.execute_script("return document.body.textContent")


def test_policy_stops_a_script_that_got_in(file: str, browser: Any, tmp_path: Path) -> None:
    """If some text were not escaped after all. The same script runs in a page without the policy."""
    html = Path(file.removeprefix("file://")).read_text()
    script = "<script>document.title = 'owned'</script><p style='color: red' onclick='x()'>"
    titles = []
    for begin in ("", "<meta http-equiv=none "):
        text = html.replace("</main>", f"{script}</main>")
        path = tmp_path / "page.html"
        path.write_text(text.replace('<meta http-equiv="Content-Security-Policy" ', begin) if begin else text)
        drain(browser)
        browser.get(path.as_uri())
        titles.append(browser.title)
        said, _ = drain(browser)
        assert any("Content Security Policy" in line for line in said) == (not begin), said
    assert titles[0] != "owned" and titles[1] == "owned"


@pytest.mark.parametrize("width", [320, 360, 940, 1280])
def test_page_never_scrolls_sideways(page: str, browser: Any, width: int) -> None:
    """No narrow screen cuts off a part, with all details open and words that have no end."""
    show(browser, width)
    browser.execute_script("document.querySelectorAll('details').forEach(each => { each.open = true })")
    measured = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert measured == [width, width]


def test_bars_are_drawn(file: str, browser: Any) -> None:
    """A dark one and a light one, side by side and within their frame."""
    show(browser, 1280)
    browser.get(file)
    boxes = """
    return ['rect.busy', 'rect.wait', 'svg'].map(each => {
      const box = document.querySelector(each).getBoundingClientRect()
      return [box.left, box.right]
    })
    """
    busy, wait, frame = browser.execute_script(boxes)
    assert frame[0] - 2 <= busy[0] < busy[1] <= wait[1] <= frame[1] + 2
    assert busy[1] - busy[0] > 50 and wait[1] - wait[0] > 20 and abs(wait[0] - busy[1]) < 3


def test_keyboard_reaches_and_opens_everything(page: str, browser: Any) -> None:
    """Each link and each closed part, in the order of the page, with a frame around what has the focus."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.execute_script("document.querySelectorAll('details').forEach(each => { each.open = true })")
    many = browser.execute_script("return document.querySelectorAll('a, summary').length")
    assert many >= 4
    reached = """
    const found = [...document.querySelectorAll('a, summary')]
    return [found.indexOf(document.activeElement), getComputedStyle(document.activeElement).outlineStyle]
    """
    for number in range(many):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        assert browser.execute_script(reached) == [number, "solid"]
    summary = browser.find_elements(By.TAG_NAME, "summary")[0]
    for key in (Keys.ENTER, Keys.SPACE):
        summary.send_keys(key)
    opened = "return document.querySelector('details').open"
    assert browser.execute_script(opened), "closed by one, opened by the other"
    summary.send_keys(Keys.ENTER)
    assert not browser.execute_script(opened)


def test_page_follows_light_and_dark(page: str, browser: Any) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    seen = []
    for scheme in ("light", "dark"):
        show(browser, 1280, scheme)
        seen.append(browser.execute_script(ground))
    assert seen == ["rgb(255, 255, 255)", "rgb(15, 19, 24)"]


def test_reload_shows_the_page_anew(url: str, browser: Any) -> None:
    browser.get(url)
    before = browser.execute_script("return document.querySelectorAll('details.dispatch').length")
    browser.refresh()
    assert before == browser.execute_script("return document.querySelectorAll('details.dispatch').length") == 1
