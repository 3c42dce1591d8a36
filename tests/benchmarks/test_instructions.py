"""`make bench-check`: a path that executes more instructions than committed is red."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from benchmarks import instructions, paths
from benchmarks.instructions import Counts, count_dumps

Check = Callable[..., int]

TOY = """
import os
def needless(): pass
def loop(times):
    for _ in range(times):
        abs(-1)
def slower(times):
    for _ in range(times):
        needless()
        abs(-1)
for contender in (loop, loop, slower):
    contender(100)
    os.getloadavg()
    contender(2000)
    os.getloadavg()
    print(contender.__name__)
"""


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Check:
    """Run `main` on ratios that are given in place of counted."""
    monkeypatch.setattr(instructions, "COMMITTED", tmp_path / "instructions.json")
    monkeypatch.setattr("shutil.which", lambda program: f"/usr/bin/{program}")

    def run(*arguments: str, **ratios: float) -> int:
        def measure(names: Sequence[str]) -> dict[str, Counts]:
            wanted = names or ratios
            return {name: Counts(round(ratios[name] * 1_000_000), 1_000_000) for name in wanted}

        monkeypatch.setattr(instructions, "measure", measure)
        return instructions.main(arguments)

    return run


@pytest.mark.parametrize(("ratio", "code"), [(2.0, 0), (2.05, 0), (2.07, 1), (1.5, 0)])
def test_growth_above_three_percent_is_red(check: Check, ratio: float, code: int) -> None:
    check("--refresh", spawn=2.0, stop=1.0)
    assert check(spawn=ratio, stop=1.0) == code


def test_red_names_path_ratios_and_command(check: Check, capsys: pytest.CaptureFixture[str]) -> None:
    check("--refresh", spawn=2.0, stop=1.0)
    capsys.readouterr()
    check(spawn=2.2, stop=1.0)
    out = capsys.readouterr().out
    [row] = [line for line in out.splitlines() if line.startswith("spawn")]
    assert row.split() == ["spawn", "2.000", "2.200", "+10.00%", "GREW"]
    assert "FAILED, for 1 of 2 paths: spawn" in out
    assert "make bench-check ARGS=--refresh" in out


def test_gain_is_worth_a_refresh(check: Check, capsys: pytest.CaptureFixture[str]) -> None:
    """Else the next change could spend it unseen."""
    check("--refresh", spawn=2.0)
    assert check(spawn=1.9) == 0
    out = capsys.readouterr().out
    assert "shrank" in out
    assert "keep it that way with `make bench-check ARGS=--refresh`" in out


def test_new_path_has_to_be_committed(check: Check) -> None:
    check("--refresh", spawn=2.0)
    assert check(spawn=2.0, stop=1.0) == 1


def test_path_that_is_gone_is_red(check: Check) -> None:
    """A path taken out, or given another name, can't leave its ratio unseen."""
    check("--refresh", spawn=2.0, stop=1.0)
    assert check(spawn=2.0) == 1


def test_refresh_of_one_path_leaves_the_others(check: Check) -> None:
    check("--refresh", spawn=2.0, stop=1.0)
    check("--refresh", "stop", spawn=3.0, stop=1.5)
    assert json.loads(instructions.COMMITTED.read_text())["ratios"] == {"spawn": 2.0, "stop": 1.5}


def test_other_build_compares_nothing_and_says_so(
    check: Check, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check("--refresh", spawn=2.0)
    here = instructions.build()
    monkeypatch.setattr(instructions, "build", lambda: {**here, "whistle": "99.0"})
    assert check(spawn=9.0) == 0
    err = capsys.readouterr().err
    assert "NOTHING WAS COMPARED" in err
    assert "whistle" in err
    assert "99.0" in err


def test_missing_valgrind_measures_nothing_and_says_so(
    check: Check, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A refresh can't do without."""
    check("--refresh", spawn=2.0)
    monkeypatch.setattr("shutil.which", lambda program: None)
    assert check(spawn=9.0) == 0
    assert "NOTHING WAS MEASURED" in capsys.readouterr().err
    assert check("--refresh", spawn=9.0) == 1


def test_each_path_has_its_committed_ratio() -> None:
    committed = json.loads(Path(instructions.__file__).with_suffix(".json").read_text())
    assert list(committed["ratios"]) == list(paths.PATHS)
    assert committed["build"].keys() == instructions.build().keys()


def test_each_path_runs() -> None:
    """Also where valgrind is missing."""
    with asyncio.Runner(loop_factory=paths.Loop) as runner:
        for path in paths.PATHS.values():
            for contender in path.contenders():
                runner.run(_run(contender))


async def _run(contender: paths.Contender) -> None:
    await contender(100)


@pytest.mark.long
@pytest.mark.timeout(180)  # under valgrind all takes fifty times as long
@pytest.mark.skipif(
    shutil.which("valgrind") is None, reason="no valgrind: make bench-check measures nothing, and says so"
)
def test_needless_call_is_counted(tmp_path: Path) -> None:
    """callgrind, on a toy: the same loop has the same count, one call more is seen."""
    toy = tmp_path / "toy.py"
    toy.write_text(TOY)
    names, counts = count_dumps(str(toy))
    assert names == ["loop", "loop", "slower"]
    first, second, slower = counts[1::2][:3]
    assert second == pytest.approx(first, rel=0.01)
    assert slower > 1.2 * second
