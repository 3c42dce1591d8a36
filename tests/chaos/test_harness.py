"""The harness itself: it sees what it is there to see, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as Lost

from chaos.check import Entry, check_handled, check_stream
from chaos.ledger import Ledger, Reading, read
from chaos.mutants import MUTANTS, Mutant, PatchFailed, copy_tree
from chaos.proxy import DropReplies, Proxy
from chaos.stage import NotInTime, Stage
from chaos.table import make_table

ROOT = Path(__file__).resolve().parents[2]


def entry(number: int, event: str, publication: str | None = None) -> Entry:
    return Entry(f"{number}-1", event, publication or event, "chaos.counted", "lane", number)


@pytest.mark.parametrize(
    ("found", "wrong"),
    [
        ([entry(0, "a"), entry(1, "b")], []),
        ([entry(0, "a")], ["1 lost, not 0"]),
        ([entry(0, "a"), entry(0, "a"), entry(1, "b")], ["1 duplicates, not 0"]),
        ([entry(1, "b"), entry(0, "a")], ["1 inversions, not 0"]),
        ([entry(0, "a"), entry(0, "doubt"), entry(1, "b")], []),  # published anew, as an event of its own
    ],
)
def test_stream_is_held_against_the_ledger(found: list[Entry], wrong: list[str]) -> None:
    stage = Stage("check", 1)
    check_stream(stage, {"a": ("lane", 0), "b": ("lane", 1)}, found)
    assert stage.wrong == wrong


async def test_event_that_nobody_handled_is_seen(tmp_path: Path) -> None:
    stage, ledger = Stage("check", 1), Ledger(tmp_path / "ledger")
    await asyncio.gather(ledger.write("lane 0 a"), ledger.write("lane 0 a"))
    await ledger.close()
    check_handled(stage, ["a", "b"], [tmp_path / "ledger"])
    assert stage.wrong == ["1 not handled, not 0"]
    assert stage.done == {"handled": 1, "redelivered": 1}


async def test_line_that_a_kill_has_torn_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    path.write_text("lane 0 a\nlane 1 ")
    reading = Reading(path)
    assert reading.count() == 1
    ledger = Ledger(path)
    await ledger.write("lane 1 b")
    await ledger.close()
    assert [line[2] for line in read(path)] == ["a", "b"]
    assert reading.count() == 2


async def test_what_does_not_come_in_time_is_said(tmp_path: Path) -> None:
    async with Stage("stage", 1) as stage:
        with pytest.raises(NotInTime, match="a miracle"):
            await stage.until("a miracle", lambda: False, within=0.05)


async def test_leaving_ends_every_program_and_drops_its_folder() -> None:
    async with Stage("stage", 1) as stage:
        server = stage.redis()
        worker = await stage.start(
            "producer", "producer", name="p", url=server.url, ledger=str(stage.ledger("p")), lanes=1, each=10**6
        )
        await worker.ready()
        pids, folder = [worker.pid, server.pid], stage.folder
        assert folder.exists()
    assert not folder.exists()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_table_names_the_server_that_it_really_was() -> None:
    async with Stage("fence", 1) as stage:
        binary = stage.redis().binary
        named = {"battery": "fence", "seed": 1, "done": stage.done, "kept": {}}
    assert f", {binary.product} {binary.version}, " in make_table([named])
    valkey = {"battery": "fence", "seed": 1, "done": {"server": "Valkey 9.1.2"}, "kept": {}}
    assert ", Valkey 9.1.2, " in make_table([valkey])
    assert "Redis" not in make_table([valkey])


async def test_proxy_drops_the_answer_of_what_was_carried_out() -> None:
    async with Stage("proxy", 1) as stage:
        server = stage.redis()
        rule = DropReplies(b"INCRBY", stage.random, share=1.0, most=1, counts=lambda reply: True)
        async with Proxy(server.url, rule) as proxy:
            async with Redis.from_url(proxy.url, retry=Retry(NoBackoff(), 0)) as client:
                with pytest.raises(Lost):
                    await client.incr("counter")
                assert await client.incr("counter") == 2
        assert rule.dropped == 1


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_follows_the_code(mutant: Mutant, tmp_path: Path) -> None:
    """A safeguard that was rewritten would be taken out no more, and `make chaos-mutants` would fail."""
    copy = tmp_path / mutant.path
    copy.parent.mkdir(parents=True)
    copy.write_text((ROOT / mutant.path).read_text())
    mutant.apply(tmp_path)
    assert copy.read_text() != (ROOT / mutant.path).read_text()
    compile(copy.read_text(), mutant.path, "exec")


def test_copy_for_a_mutant_holds_what_a_battery_needs(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "copy")
    uncovered = {key: value for key, value in os.environ.items() if not key.startswith("COV")}  # it is another silbo
    command = [sys.executable, "-m", "chaos", "--help"]
    subprocess.run(command, cwd=tree, env=uncovered, check=True, stdout=subprocess.DEVNULL)


def test_mutant_that_fits_no_more_is_said(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("begin(); end()")
    with pytest.raises(PatchFailed, match="0 times"):
        Mutant("the check", "storm", "one.py", "check()", "").apply(tmp_path)
