"""The model of a load and its simulation, beside the points that were measured, and beside one another."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.scale import model, points, simulate, trial
from benchmarks.scale.model import FULL, HOT_KEY, Load, SetUp, find_uses, plan
from benchmarks.scale.points import find_point, write_points
from benchmarks.scale.simulate import consume

Main = Callable[[Sequence[str]], int]


def test_model_and_simulation_meet_what_was_measured() -> None:
    """Points between those that the model is made of, within 30 % or 3 us; and a real run with a hot key, within a tenth."""
    checks = list(trial.list_checks())
    assert len(checks) == 15
    for what, predicted, measured in checks:
        is_simulated = what.startswith("simulated")
        rel, least = (0.1, 0.0) if is_simulated else (0.3, 3.0)
        assert measured == pytest.approx(predicted, rel=rel, abs=least), what


def test_the_real_run_had_a_key_that_was_busy_for_most_of_the_time() -> None:
    measured = find_point("trial", "run")
    assert simulate.simulate(trial.LOAD, trial.SETUP, messages=measured["messages"], seed=trial.SEED).key > 0.6


@pytest.mark.parametrize("setup", [SetUp(), SetUp(16, 1, 4), SetUp(64, 4, 8)])
def test_simulation_has_the_loads_of_the_model(setup: SetUp) -> None:
    load = Load(rate=5000, groups=2, listener=0.002, keys=1000, skew=0.8)
    uses = find_uses(load, setup)
    result = simulate.simulate(load, setup, messages=10_000)
    assert result.node == pytest.approx(uses["a core of a Redis node"], rel=0.05)
    assert result.consumer == pytest.approx(uses["a consumer process"], rel=0.05)
    assert result.key == pytest.approx(uses[HOT_KEY], rel=0.1)


def test_simulated_queue_waits_as_theory_says() -> None:
    """Pollaczek and Khinchine: one server, random arrivals, constant service, 80 % in use."""
    load = Load(rate=800, keys=0)
    queue = [(at, at, key) for at, key in simulate.make_arrivals(load, 30_000, seed=3)]
    latencies, _ = consume(queue, 0.001, 0.0, concurrency=100)
    waited = sum(latencies) / len(latencies) - 0.001
    assert waited == pytest.approx(0.8 * 0.001 / (2 * (1 - 0.8)), rel=0.1)


def test_simulated_node_that_is_too_busy_falls_behind() -> None:
    load = Load(rate=45_000, keys=0, together=1)
    setup = SetUp(consumers=16)
    uses = find_uses(load, setup)
    assert uses["a core of a Redis node"] > 1 > uses["a consumer process"]
    assert simulate.simulate(load, setup, messages=5000).grows


def test_simulated_key_waits_for_itself_alone() -> None:
    queue = [(0.0, 0.0, 1), (0.0, 0.0, 1), (0.0, 0.0, 2)]
    latencies, end = consume(queue, 0.0, 1.0, concurrency=100)
    assert sorted(latencies) == [1.0, 1.0, 2.0]
    assert end == 2.0


def test_simulated_consumer_has_a_thousand_messages_in_hand() -> None:
    """Behind a thousand of one key that wait, the messages of others are not read."""
    queue = [*((0.0, 0.0, 1) for _ in range(1000)), (0.0, 0.0, 2)]
    latencies, _ = consume(queue, 0.0, 1.0, concurrency=100)
    assert latencies[1] == 2.0
    assert latencies.count(2.0) == 2, "the other key's, after the first of the hot key had ended"


def test_no_number_of_shards_helps_one_hot_key() -> None:
    load = Load(rate=2000, listener=0.002, keys=1000, skew=1.5, keep=60)
    assert all(simulate.simulate(load, SetUp(shards, 1, 8), messages=3000).grows for shards in (16, 64, 256))
    found = plan(load)
    assert found.next_limit[0] == HOT_KEY
    assert not found.fits


@pytest.mark.parametrize(
    "load",
    [
        Load(rate=10, keep=60),
        Load(rate=20_000, groups=2, keep=60),
        Load(rate=60_000, size=100, keep=60),
        Load(rate=15_000, keys=0, keep=60, together=100),
    ],
)
def test_plan_is_no_larger_than_needed(load: Load) -> None:
    found = plan(load)
    assert found.fits
    setup = found.setup
    for smaller in (replace(setup, nodes=setup.nodes - 1), replace(setup, consumers=setup.consumers - 1)):
        if smaller.nodes and smaller.consumers:
            assert max(find_uses(load, smaller).values()) > FULL, smaller


def test_order_takes_one_consumer_on_one_stream() -> None:
    """Without an order several consumers share the stream."""
    load = Load(rate=15_000, keep=60, together=100)
    assert plan(load).setup.shards
    unordered = plan(replace(load, keys=0)).setup
    assert not unordered.shards
    assert unordered.consumers > 1


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (model.main, ["--rate", "many"], "argument --rate: give a number of messages a second, above 0, not 'many'"),
        (model.main, ["--rate", "0"], "above 0, not '0'"),
        (model.main, ["--groups", "1.5"], "give a whole number of groups, above 0, not '1.5'"),
        (simulate.main, ["--skew", "0.5,-1"], "give a number of Zipf's exponent, 0 or more, not '-1'"),
        (simulate.main, ["--shards", "1"], "give 0 for one stream, or 2 to 1024 shards, not '1'"),
        (simulate.main, ["--shards", "0", "--nodes", "3"], "give --shards as many as there are nodes"),
        (simulate.main, ["--shards", "0", "--consumers", "3"], "give --shards, or --keys 0"),
        (simulate.main, ["--shards", "4", "--consumers", "8"], "give more --shards, or fewer --consumers"),
    ],
)
def test_wrong_argument_is_answered_with_a_right_one(
    main: Main, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert said in " ".join(capsys.readouterr().err.split())


def test_model_prints_processes_and_limits(capsys: pytest.CaptureFixture[str]) -> None:
    assert model.main(["--rate", "1,000", "--groups", "2", "--outbox", "--inbox"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"relays +1 ", out)
    assert re.search(r"consumers +2 x 1, concurrency=\d", out)
    assert "the memory of a Redis node" in out


def test_model_says_what_carries_no_set_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert model.main(["--rate", "10000", "--keys", "10", "--listener", "10"]) == 1
    assert "Make the listener faster" in " ".join(capsys.readouterr().out.split())


def test_simulation_prints_a_row_for_each_skew_and_number_of_shards(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--rate", "1000", "--skew", "0,0.5", "--shards", "0,16", "--consumers", "1", "--messages", "2000"]
    assert simulate.main(arguments) == 0
    out = capsys.readouterr().out
    assert out.count("1,000") == 4
    assert out.count("one stream") == 2


def test_missing_point_names_the_program_that_measures_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(points, "FILE", tmp_path / "points.json")
    assert model.main([]) == 1
    assert "measure it: python -m benchmarks.scale.stream" in capsys.readouterr().err


def test_points_of_one_program_leave_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points, "FILE", tmp_path / "points.json")
    write_points("stream", {"alone": {"add": 1}, "inbox": {"add": 2}})
    write_points("trial", {"run": {"p50": 2}})
    write_points("stream", {"inbox": {"add": 3}})
    assert find_point("stream", "alone") == {"add": 1}
    assert find_point("stream", "inbox") == {"add": 3}
    assert find_point("trial", "run") == {"p50": 2}
