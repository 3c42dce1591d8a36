"""`silbo page`: one file that stands alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from tests.support.app_files import SHOP, imports_undone, write
from tests.support.command_line import fill, settle, silbo, terminal, without
from tests.support.overviews import Page
from tools.server import free_port


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with imports_undone(tmp_path):
        yield write(tmp_path, SHOP)


async def test_page_in_a_process(folder: Path, redis: Redis, redis_url: str, prefix: str) -> None:
    """Of a program and of what it has in Redis and in its outbox; without an encoding that knows more than ASCII."""
    await redis.xgroup_create(f"{prefix}:{{events}}", "billing", "0", mkstream=True)
    await fill(folder / "outbox.db", 3)
    await settle(folder / "outbox.db", dead=1)
    done = await silbo(
        *("page", "shop.web:switched_off", "--app-dir", folder, "--store", folder / "outbox.db"),
        *("--redis", redis_url, "--prefix", prefix),
        command=without("rich"),
        env={"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
    )
    assert (done.code, done.err) == (0, "plugin audit: switched off: too slow\n"), "the program's own log"
    page = Page(done.out)
    for text in ("shop.web:switched_off", "order.paid", "an order was paid", "off: too slow", "billing", "dead rows"):
        assert text in page.text
    assert "payload</summary>" not in done.out


async def test_page_is_written_although_redis_is_away(folder: Path) -> None:
    """And the exit code and stderr say so."""
    url = f"redis://localhost:{free_port()}"
    done = await silbo("page", "shop.web:dispatcher", "--app-dir", folder, "--redis", url)
    assert done.code == 1 and done.err.startswith("silbo: ") and "Traceback" not in done.err
    page = Page(done.out)
    assert "Not all could be read" in page.text and "order.paid" in page.text


async def test_payloads_are_shown_if_asked_for(folder: Path) -> None:
    await fill(folder / "outbox.db", 3)
    await settle(folder / "outbox.db", dead=1)
    where = ("page", "shop.web:dispatcher", "--app-dir", folder, "--store", folder / "outbox.db")
    hidden, shown = await silbo(*where), await silbo(*where, "--payloads")
    assert ("payload</summary>" in hidden.out, "payload</summary>" in shown.out) == (False, True)


async def test_terminal_is_no_place_for_a_page(folder: Path) -> None:
    async with terminal("page", "shop.web:dispatcher", "--app-dir", folder) as screen:
        assert await screen.end() == 2
    assert "silbo page APP --output page.html" in screen.shown


async def test_file_is_written_when_the_page_is_whole(folder: Path) -> None:
    """An error leaves the page of yesterday, and nothing beside it."""
    file = folder / "pages" / "page.html"
    file.parent.mkdir()
    file.write_text("yesterday's")
    where = ("--app-dir", folder, "--output", file)
    failed = await silbo("page", "shop.web:nothing", *where)
    assert failed.code == 1 and file.read_text() == "yesterday's"
    done = await silbo("page", "shop.web:dispatcher", *where)
    assert (done.code, done.out, done.err) == (0, "", "")
    assert "order.paid" in Page(file.read_text()).text and list(file.parent.iterdir()) == [file]
    nowhere = await silbo("page", "shop.web:dispatcher", "--app-dir", folder, "--output", folder / "no" / "page.html")
    assert nowhere.code == 1 and "No such file or directory" in nowhere.err
    taken = await silbo("page", "shop.web:dispatcher", "--app-dir", folder, "--output", file.parent)
    assert taken.code == 1 and list(folder.glob(".*")) == []
