"""`silbo outbox`: what it shows of a real file, what it changes there, and what it refuses to."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from silbo import Outbox
from silbo.brokers.memory import MemoryBroker
from silbo.stores.sqlite import SQLiteStore
from tests.support.command_line import SILBO, Run, counts, fill, message, settle, silbo, terminal, without


@pytest.fixture
async def store(tmp_path: Path) -> Path:
    """4 rows that were sent, 2 dead ones, 3 that wait."""
    path = tmp_path / "outbox.db"
    await fill(path, 9)
    await settle(path, sent=4, dead=2)
    return path


# -- status -------------------------------------------------------------------------------------------------


async def test_status_says_what_there_is(store: Path) -> None:
    """The same figures for people and for programs; also through the environment, and as sqlite:/// URL."""
    table, program, variable = await asyncio.gather(
        silbo("outbox", "status", "--store", store),
        silbo("outbox", "status", "--store", f"sqlite:///{store}", "--json"),
        silbo("outbox", "status", "--json", env={"SILBO_STORE": str(store)}),
    )
    assert (table.code, program.code, variable.code) == (0, 0, 0)
    assert [line.split() for line in table.out.splitlines()[2:6]] == [
        ["pending", "3"],
        ["sending", "0"],
        ["sent", "4"],
        ["dead", "2"],
    ]
    assert "no relay is at work" in table.out and "--rows dead" in table.out
    status = program.object
    assert status["rows"] == {"pending": 3, "sending": 0, "sent": 4, "dead": 2}
    assert status["leads"] == [] and status["partitions"] == 1 and status["failing"] is None and status["size"] > 0
    assert datetime.fromisoformat(status["oldest_at"]).tzinfo is not None
    sent_at = datetime.fromisoformat(status["oldest_sent_at"])
    assert "a replay reaches back " in table.out and f"{sent_at:%Y-%m-%d %H:%M:%SZ}" in table.out
    assert variable.object == status


async def test_status_says_who_leads_and_what_fails(store: Path) -> None:
    open_store = SQLiteStore(store)
    await open_store.open()
    try:
        lead = await open_store.lead(0, "relay-1", lease=60)
        assert lead is not None
        rows = [row.id for row in await open_store.take(lead, 10)]
        await open_store.postpone(lead, rows, error="Redis is away", delay=30)
        table, program = await asyncio.gather(
            silbo("outbox", "status", "--store", store), silbo("outbox", "status", "--store", store, "--json")
        )
    finally:
        await open_store.aclose()
    assert f"row {rows[0]}, order.paid, attempt 1 failed: Redis is away" in table.out
    assert "relay-1" in table.out and "no relay" not in table.out
    (shown,) = program.object["leads"]
    assert (shown["partition"], shown["owner"], shown["epoch"]) == (0, "relay-1", lead.epoch)
    assert (program.object["failing"]["id"], program.object["failing"]["error"]) == (rows[0], "Redis is away")
    assert datetime.fromisoformat(program.object["next_attempt_at"]) > datetime.fromisoformat(
        program.object["failing"]["state_at"]
    )
    assert program.object["failing"]["event"] == "order.paid"
    assert "number" not in program.out, "no payload: a status goes into logs"


async def test_status_says_what_fails_also_while_it_is_tried_again(store: Path) -> None:
    """What is in a relay's hands for the first time has not failed, what it was refused for before its retry is over."""
    open_store = SQLiteStore(store)
    await open_store.open()
    try:
        lead = await open_store.lead(0, "relay-1", lease=60)
        assert lead is not None
        assert len(await open_store.retry()) == 2
        rows = [row.id for row in await open_store.take(lead, 10)]
        first = await silbo("outbox", "status", "--store", store, "--json")
        await open_store.postpone(lead, rows, error="Redis is away", delay=0)
        await open_store.take(lead, 10)
        again = await silbo("outbox", "status", "--store", store)
    finally:
        await open_store.aclose()
    assert first.object["failing"] is None
    assert f"row {rows[0]}, order.paid, attempt 1 failed: Redis is away" in again.out


async def test_rows_are_listed_page_by_page(store: Path) -> None:
    dead, page, rest, none = await asyncio.gather(
        silbo("outbox", "status", "--store", store, "--rows", "dead"),
        silbo("outbox", "status", "--store", store, "--rows", "sent", "--limit", 3, "--json"),
        silbo("outbox", "status", "--store", store, "--rows", "sent", "--after", 3, "--json"),
        silbo("outbox", "status", "--store", store, "--rows", "sending"),
    )
    assert [row["id"] for row in page.objects] == [1, 2, 3] and [row["id"] for row in rest.objects] == [4]
    assert "there are more: --after 3" in page.err and rest.err == ""
    assert rest.object["message"]["payload"] == {"number": 3} and rest.object["state"] == "sent"
    assert (none.code, none.out, none.err) == (0, "", "no sending rows\n")
    assert len(dead.out.splitlines()) == 2 + 2, "a row is a line where stdout is no terminal"
    assert r"too large\x1b[31m for [bold]anybody" in dead.out, "an error can't steer the terminal"


# -- where there is no store --------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["{}", "sqlite:///{}", "sqlite+aiosqlite:///{}"])
async def test_mistaken_path_is_an_error_and_makes_no_file(tmp_path: Path, url: str) -> None:
    """A typing error must not show an empty outbox where a full one stands beside it."""
    missing = tmp_path / "outbox.bd"
    done = await silbo("outbox", "status", "--store", url.format(missing))
    assert (done.code, done.out) == (1, "")
    assert done.err == f"silbo: {missing}: there is no such file\n"
    assert not list(tmp_path.iterdir())


async def test_file_that_is_no_outbox_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("something else " * 100)
    done = await silbo("outbox", "retry", "--all", "--yes", "--store", other)
    assert done.code == 1 and "notes.txt" in done.err and len(done.err.splitlines()) == 1
    assert other.read_text() == "something else " * 100


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["outbox", "status"], "SILBO_STORE"),
        (["outbox", "status", "--store", "postgresql://db/shop"], "postgresql+asyncpg://"),
        (["outbox", "status", "--store", "mysql+nodriver://db/shop"], "--store"),
        (["outbox", "retry", "--store", "x"], "--all"),
        (["outbox", "retry", "1", "--all", "--store", "x"], "--all"),
        (["outbox", "retry", "one", "--store", "x"], "whole number"),
        (["outbox", "replay", "--store", "x"], "--since"),
        (["outbox", "replay", "--since", "yesterday", "--store", "x"], "2026-03-07"),
        (["outbox", "purge", "pending", "--before", "1h", "--store", "x"], "pending"),
        (["outbox", "purge", "dead", "--store", "x"], "--before"),
        (["outbox"], "COMMAND"),
        ([], "COMMAND"),
        (["relay", "--store", "x"], "SILBO_REDIS_URL"),
        (["relay", "--store", "x", "--redis", "http://localhost"], "redis://"),
        (["relay", "--store", "x", "--redis", "redis://localhost", "--lease", "soon"], "90s"),
        (["relay", "--store", "x", "--redis", "redis://localhost", "--lease", "0"], "90s"),
        (["relay", "--store", "x", "--redis", "redis://localhost", "--prefix", "a b"], "a b"),
    ],
)
def test_wrong_command_exits_with_2_and_says_what_is_missing(arguments: list[str], hint: str, run: Run) -> None:
    done = run(*arguments)
    assert (done.code, done.out) == (2, "")
    assert hint in done.err.splitlines()[-1]


# -- retry, replay, purge -----------------------------------------------------------------------------------


async def test_dead_rows_are_retried(store: Path) -> None:
    one = await silbo("outbox", "retry", 5, "--store", store)
    assert (one.code, one.out) == (0, "1 row will be sent again\n")
    assert await counts(store) == {"pending": 4, "sending": 0, "sent": 4, "dead": 1}
    every = await silbo("outbox", "retry", "--all", "--yes", "--json", "--store", store)
    assert every.object == {"retried": 1}
    assert (await counts(store))["pending"] == 5


async def test_row_that_is_not_dead_is_not_retried(store: Path) -> None:
    done = await silbo("outbox", "retry", 1, 5, 5, 99, "--json", "--store", store)
    assert (done.code, done.object) == (1, {"retried": 1})
    assert "2 of the 3 are no dead rows" in done.err
    one = await silbo("outbox", "retry", 17, "--store", store)
    assert (one.code, one.err) == (1, "silbo: there is no dead row 17\n")
    assert await counts(store) == {"pending": 4, "sending": 0, "sent": 4, "dead": 1}


async def test_sent_rows_are_replayed_from_a_time_on(store: Path) -> None:
    nothing = await silbo("outbox", "replay", "--since", "2h", "--before", "1h", "--yes", "--json", "--store", store)
    assert nothing.object == {"replayed": 0} and (await counts(store))["sent"] == 4
    done = await silbo("outbox", "replay", "--since", "1h", "--yes", "--store", store)
    assert (done.code, done.out) == (0, "4 rows will be sent again\n")
    assert await counts(store) == {"pending": 7, "sending": 0, "sent": 0, "dead": 2}


async def test_replay_of_a_time_that_ends_before_it_begins_is_refused(store: Path) -> None:
    for since, before in (("1h", "2h"), ("now", "now"), ("2999-01-01", "2999-01-02")):
        done = await silbo("outbox", "replay", "--since", since, "--before", before, "--yes", "--store", store)
        assert done.code == 2 and "is not before" in done.err


async def test_duration_counts_back_from_the_clock_of_the_store(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's clock may differ from that of a database."""

    async def read_clock(_: SQLiteStore) -> datetime:
        return datetime.now(UTC) + timedelta(hours=2)

    monkeypatch.setattr(SQLiteStore, "read_clock", read_clock)
    status = await silbo("outbox", "status", "--store", store)
    assert "waits was stored 2 h ago" in status.out and "a replay reaches back 2 h," in status.out
    where = ("--yes", "--json", "--store", store)
    assert (await silbo("outbox", "replay", "--since", "1h", *where)).object == {"replayed": 0}
    assert (await silbo("outbox", "purge", "dead", "--before", "3h", *where)).object == {"purged": 0}
    assert (await silbo("outbox", "purge", "dead", "--before", "1h", *where)).object == {"purged": 2}
    assert (await silbo("outbox", "replay", "--since", "3h", "--before", "1h", *where)).object == {"replayed": 4}


async def test_replay_that_reaches_back_further_than_what_is_kept_says_so(store: Path) -> None:
    """Also without a terminal, where nobody sees the question."""
    status = await silbo("outbox", "status", "--store", store, "--json")
    oldest = status.object["oldest_sent_at"]
    whole = await silbo("outbox", "replay", "--since", oldest, "--yes", "--json", "--store", store)
    assert (whole.code, whole.object, whole.err) == (0, {"replayed": 4}, "")
    nothing = await silbo("outbox", "replay", "--since", "1h", "--yes", "--json", "--store", store)
    assert (nothing.code, nothing.object) == (0, {"replayed": 0})
    assert nothing.err == "silbo: nothing that was sent is kept\n"
    await settle(store, sent=2)
    part = await silbo("outbox", "replay", "--since", "1h", "--yes", "--json", "--store", store)
    assert (part.code, part.object) == (0, {"replayed": 2})
    assert re.fullmatch(r"silbo: what was sent before \d{4}-.*Z is not kept any more, if there was any\n", part.err)


async def test_sent_and_dead_rows_are_purged(store: Path) -> None:
    young = await silbo("outbox", "purge", "dead", "--before", "1h", "--yes", "--json", "--store", store)
    assert young.object == {"purged": 0}
    dead = await silbo("outbox", "purge", "dead", "--before", "now", "--yes", "--store", store)
    assert (dead.code, dead.out) == (0, "2 rows deleted\n")
    sent = await silbo("outbox", "purge", "sent", "--before", "now", "--yes", "--json", "--store", store)
    assert sent.object == {"purged": 4}
    assert await counts(store) == {"pending": 3, "sending": 0, "sent": 0, "dead": 0}


MANY = [
    ["outbox", "retry", "--all"],
    ["outbox", "replay", "--since", "1h"],
    ["outbox", "purge", "dead", "--before", "now"],
]


@pytest.mark.long
@pytest.mark.parametrize("arguments", MANY, ids=lambda arguments: arguments[1])
async def test_what_deletes_or_sends_many_asks(store: Path, arguments: list[str]) -> None:
    """Where nobody can be asked it is refused; a no, a Ctrl-C and an Enter leave everything as it was."""
    before = await counts(store)
    done = await silbo(*arguments, "--store", store)
    assert done.code == 2 and "--yes" in done.err and done.out == ""
    for typed, code in (("n\n", 1), ("\n", 1), ("\x03", 130)):
        async with terminal(*arguments, "--store", store) as screen:
            await screen.until("[y/N]")
            screen.type(typed)
            assert await screen.end() == code, screen.shown
    assert await counts(store) == before
    async with terminal(*arguments, "--store", store) as screen:
        await screen.until("[y/N]")
        screen.type("y\n")
        assert await screen.end() == 0, screen.shown
    assert await counts(store) != before


# -- programs, terminals and pipes --------------------------------------------------------------------------


async def test_without_rich_programs_are_served_and_people_told_what_to_install(store: Path) -> None:
    program, table = await asyncio.gather(
        silbo("outbox", "status", "--json", "--store", store, command=without("rich")),
        silbo("outbox", "status", "--store", store, command=without("rich")),
    )
    assert program.code == 0 and program.object["rows"]["pending"] == 3
    assert (table.code, table.out) == (1, "") and "pip install 'silbo[cli]'" in table.err


async def test_terminal_gets_colours_unless_it_wants_none(store: Path) -> None:
    async with terminal("outbox", "status", "--store", store) as screen:
        assert await screen.end() == 0
    assert "\x1b[1m" in screen.shown
    async with terminal("outbox", "status", "--store", store, env={"NO_COLOR": "1", "TERM": "dumb"}) as screen:
        assert await screen.end() == 0
    assert "pending" in screen.shown and "\x1b[" not in screen.shown


async def test_narrow_terminal_folds_and_cuts_nothing_off(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    await fill(path, 1)
    await settle(path, dead=1)
    async with terminal("outbox", "status", "--rows", "dead", "--store", path, env={"COLUMNS": "40"}) as screen:
        assert await screen.end() == 0
    words = re.sub(r"\x1b\[[\d;]*m", "", screen.shown).split()
    assert {"attempts", "order.paid", "[bold]anybody"} <= set(words) and "…" not in screen.shown


async def test_progress_is_shown_at_a_terminal_only(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    await fill(path, 2500)
    await settle(path, sent=2500)
    async with terminal("outbox", "replay", "--since", "1h", "--yes", "--store", path) as screen:
        assert await screen.end() == 0
    assert "2500/?" in screen.shown and "2,500 rows will be sent again" in screen.shown
    await settle(path, sent=2500)
    done = await silbo("outbox", "replay", "--since", "1h", "--yes", "--json", "--store", path)
    assert (done.code, done.out) == (0, '{"replayed": 2500}\n')
    assert "/?" not in done.err


async def test_reader_that_has_enough_ends_it_quietly(tmp_path: Path) -> None:
    """As `| head -1` does."""
    path = tmp_path / "outbox.db"
    await fill(path, 5000)
    command = (
        f'"$@" outbox status --rows pending --limit 5000 --json --store {path} | head -n 1; exit "${{PIPESTATUS[0]}}"'
    )
    done = await silbo(command=("bash", "-c", command, "-", *SILBO))
    assert json.loads(done.out)["id"] == 1
    assert (done.code, done.err) == (0, "")


async def test_full_disk_behind_stdout_is_a_failure(store: Path) -> None:
    done = await silbo(command=("bash", "-c", f'"$@" outbox status --json --store {store} > /dev/full', "-", *SILBO))
    assert done.code == 1 and "No space left" in done.err


async def test_version_and_help() -> None:
    """Every command explains itself, with examples."""
    version, whole, *commands = await asyncio.gather(
        silbo("--version"),
        silbo("--help"),
        *(silbo("outbox", name, "--help") for name in ("status", "retry", "replay", "purge")),
        silbo("relay", "--help"),
    )
    assert version.out.startswith("silbo ") and "exit codes" in whole.out
    assert all(done.code == 0 and "examples:" in done.out and "  silbo " in done.out for done in commands)


async def test_name_that_the_output_cannot_show_is_no_failure(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    broker = MemoryBroker(app="shop")
    async with Outbox(SQLiteStore(path), broker, relay=False) as outbox:
        await outbox.publish(replace(message(0), message_name="bestellung.bezahlt.€"))
    done = await silbo(
        "outbox", "status", "--rows", "pending", "--store", path, env={"PYTHONIOENCODING": "ascii"}, command=SILBO
    )
    assert done.code == 0 and r"bestellung.bezahlt.\u20ac" in done.out
