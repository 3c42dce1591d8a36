"""`make bench`: ratios round by round, a reason for each empty cell, and a run that goes on where it was cut short."""

from __future__ import annotations

import asyncio
import json
import platform
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress

from benchmarks import run
from benchmarks.registry import SCENARIOS
from benchmarks.run import Effort
from benchmarks.scenario import Contenders, Missing, Scenario, load_peer
from benchmarks.timing import Measured, compare, find_ratio, find_times
from benchmarks.worker import run as run_scenario


async def nothing(times: int) -> None:
    """Finish at once."""


async def fails(times: int) -> None:
    raise RuntimeError("no such command")


def figures(*each: float) -> Any:
    """Return a contender that measures itself, one figure after another."""
    left = list(each)

    async def contender(times: int) -> Measured:
        return Measured(left.pop(0), {"p99": 2 * each[0]})

    return contender


def scenario(**contenders: Any) -> Scenario:
    @asynccontextmanager
    async def opened() -> AsyncGenerator[Contenders]:
        yield contenders

    return Scenario(name="toy", group="toys", open=opened, reference="by_hand", times=1)


@pytest.mark.long
async def test_ratio_is_taken_round_by_round() -> None:
    """The machine became ten times slower in the second round, for both: the ratio is the same."""
    contenders = {"by hand": figures(0.0, 1.0, 10.0, 1.0), "silbo": figures(0.0, 2.0, 20.0, 2.0)}
    results = await compare(contenders, times=1, rounds=3)
    assert [(result.ratio, result.low, result.high) for result in results] == [(1, 1, 1), (2, 2, 2)]
    assert results[1].each == 2.0
    assert results[1].rounds == [2.0, 20.0, 2.0]


def test_quartiles_are_of_the_ratios() -> None:
    assert find_ratio([1, 2, 3], [1, 1, 1]) == (1, 2, 3)


@pytest.mark.parametrize(("python", "ratio"), [("3.11.9", 1.6), ("3.12.1", 1.9), ("3.14.0", 1.9)])
def test_target_is_that_of_the_running_python(monkeypatch: pytest.MonkeyPatch, python: str, ratio: float) -> None:
    monkeypatch.setattr(platform, "python_version_tuple", lambda: tuple(python.split(".")))
    row = Scenario(name="", group="", open=nothing, reference="", targets={"loop": {"3.11": 1.6, "3.12": 1.9}})  # type: ignore[arg-type]
    assert row.targets_here() == {"loop": ratio}


async def test_peer_that_fails_is_a_cell_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    row = scenario(by_hand=nothing, silbo=nothing, peer=fails, other=Missing("has no streams"))
    await run_scenario(row, 2, 0.01)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [result["name"] for result in last["results"]] == ["by_hand", "silbo"]
    assert last["missing"] == {"peer": "RuntimeError: no such command", "other": "has no streams"}


async def test_silbo_that_fails_is_no_cell() -> None:
    with pytest.raises(RuntimeError, match="no such command"):
        await run_scenario(scenario(by_hand=nothing, silbo=fails), 2, 0.01)


def test_peer_that_is_not_installed_is_a_cell() -> None:
    def load() -> Any:
        import no_such_library  # type: ignore[import-not-found]  # noqa: F401

    missing = load_peer(load)
    assert isinstance(missing, Missing)
    assert "No module named 'no_such_library'" in missing.reason


def test_scenario_runs_in_a_process_of_its_own() -> None:
    with Progress(disable=True) as progress:
        record = run.measure(SCENARIOS["dispatch, 1 listener"], Effort(2, 0.0005), progress)
    run.show("dispatch, 1 listener", record)
    assert {"loop of awaits", "silbo", "whistle"} <= {result["name"] for result in record["results"]}


def test_scenario_that_hangs_fails_with_its_time() -> None:
    hangs = Scenario(name="hangs", group="", open=nothing, reference="", seconds=0.01)  # type: ignore[arg-type]
    with Progress(disable=True) as progress:
        record = run.measure(hangs, Effort(2, 0.01), progress)
    assert record["failed"] == "it was ended after 0.01 seconds"


def test_run_goes_on_where_it_was_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bench.json"
    first = run.open_run(path, again=False)
    first["scenarios"] = {"done": {"results": []}, "broken": {"failed": "it was ended"}}
    run.write(path, first)
    assert list(run.open_run(path, again=False)["scenarios"]) == ["done"]
    assert run.open_run(path, again=True)["scenarios"] == {}
    monkeypatch.setattr(run, "hash_sources", lambda: "other code")
    assert run.open_run(path, again=False)["scenarios"] == {}


def test_run_that_is_done_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    first = run.open_run(path, again=False)
    run.write(path, {**first, "scenarios": {"done": {"results": []}}, "done": True})
    assert run.open_run(path, again=False)["scenarios"] == {}


async def test_first_run_that_is_slow_does_not_decide_on_the_repetitions() -> None:
    """The caches are empty at first: two repetitions in a round would measure nothing."""
    runs = 0

    async def contender(times: int) -> None:
        nonlocal runs
        runs += 1
        if runs == 1:
            await asyncio.sleep(0.1)

    assert await find_times(contender, 0.01) > 100
    assert await find_times(nothing, 0.0001, least=70_000) >= 70_000
