"""Runs the scenarios one after another, prints their tables, and keeps the figures in a JSON file.

    python -m benchmarks.run [--tier quick|bench|all] [--again] [--list] [--show FILE] [NAME ...]

Each scenario has a process of its own, which runs its contenders in turns. A run that was cut short goes on where it was,
as long as neither the code nor a version has changed. When a whole tier is done, `bench` writes
`benchmarks/results/{Python}.json` and the plots of the documentation.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.registry import SCENARIOS
from benchmarks.scenario import Scenario
from benchmarks.timing import find_ratio
from tools.redis_binary import RedisNotFound, find_binary

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
UNFINISHED = ROOT / "build" / "bench"
PYTHON = ".".join(platform.python_version_tuple()[:2])
LIBRARIES = (
    "silbo",
    "whistle",
    "redis",
    "hiredis",
    "msgspec",
    "aiosignal",
    "blinker",
    "pluggy",
    "pyee",
    "psygnal",
    "django",
    "bubus",
    "diator",
    "python-cqrs",
    "coredis",
    "faststream",
    "sqlalchemy",
)


class Effort(NamedTuple):
    """The time that a tier takes for each scenario.

    Attributes:
        rounds: Interleaved rounds, unless the scenario has its own number.
        slice: Seconds for one contender in one round, where the scenario leaves the repetitions open.
    """

    rounds: int
    slice: float


TIERS = {"quick": Effort(5, 0.02), "bench": Effort(15, 0.05), "all": Effort(15, 0.05)}

console = Console(highlight=False, width=None if sys.stdout.isatty() else 130)


def choose(tier: str, names: Sequence[str]) -> list[Scenario]:
    """Return the scenarios of a tier, or those whose name begins with one of the names."""
    if names:
        return [one for one in SCENARIOS.values() if one.name.startswith(tuple(names))]
    if tier == "quick":
        return [one for one in SCENARIOS.values() if one.in_quick]
    return [one for one in SCENARIOS.values() if one.in_bench or tier == "all"]


# -- one scenario ---------------------------------------------------------------------------------------------


def measure(scenario: Scenario, effort: Effort, progress: Progress) -> dict[str, Any]:
    """Run a scenario's process; its figures, or the reason why there are none."""
    rounds = min(scenario.rounds or effort.rounds, effort.rounds)
    program = [sys.executable, "-m", "benchmarks.worker", scenario.name]
    program += ["--rounds", str(rounds), "--slice", str(effort.slice)]
    task = progress.add_task(scenario.name, total=None)
    started = datetime.now(UTC)
    record: dict[str, Any] = {
        "group": scenario.group,
        "reference": scenario.reference,
        "subject": scenario.subject,
        "unit": scenario.unit,
        "measures": scenario.measures,
        "more_is_better": scenario.more_is_better,
        "targets": scenario.targets_here(),
        "curve": scenario.curve,
        "notes": dict(scenario.notes),
    }
    with subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        errors: list[str] = []
        reader = threading.Thread(target=lambda stream: errors.extend(stream), args=(process.stderr,))
        reader.start()
        limit = threading.Timer(scenario.seconds, process.kill)
        limit.start()
        try:
            for line in read_lines(process.stdout):
                if "rounds" in line:
                    progress.update(task, total=line["rounds"])
                elif "round" in line:
                    progress.update(task, completed=line["round"])
                else:
                    record |= line
        finally:
            if process.poll() is None and "results" not in record:
                process.kill()
            process.wait()
            limit.cancel()
            reader.join()
            progress.remove_task(task)
    if "results" not in record:
        last = next((line.strip() for line in reversed(errors) if line.strip()), "")
        record["failed"] = last or f"it was ended after {scenario.seconds:g} seconds"
        record["log"] = "".join(errors[-40:])
    record["seconds"] = round((datetime.now(UTC) - started).total_seconds(), 1)
    return record


def read_lines(stream: Any) -> Iterator[dict[str, Any]]:
    """Yield the worker's JSON lines; what a peer prints is none."""
    for line in stream:
        try:
            read = json.loads(line)
        except ValueError:
            continue
        if isinstance(read, dict):
            yield read


# -- tables ---------------------------------------------------------------------------------------------------


class Ratio(NamedTuple):
    """One contender against another, with the quartiles over the rounds."""

    low: float
    middle: float
    high: float

    def __str__(self) -> str:
        digits = 2 if self.middle < 100 else 0
        return f"{self.middle:,.{digits}f} ({self.low:,.{digits}f}-{self.high:,.{digits}f})"


def find_ratios(record: Mapping[str, Any], against: str) -> dict[str, Ratio]:
    """Return each contender's ratio to one of them: times as fast, or times the cost."""
    figures = {result["name"]: result["rounds"] for result in record["results"]}
    if against not in figures:
        return {}
    faster = record["more_is_better"]
    return {
        name: Ratio(*(find_ratio(figures[against], own) if faster else find_ratio(own, figures[against])))
        for name, own in figures.items()
    }


def holds(record: Mapping[str, Any], ratio: float, target: float) -> bool:
    """True if the target is reached."""
    return ratio >= target if record["more_is_better"] else ratio <= target


def show_figure(record: Mapping[str, Any], each: float) -> str:
    """Write a contender's median figure."""
    match record["measures"]:
        case "bytes":
            return f"{each:,.0f} B"
        case "exponent":
            return f"{each:.3f}"
        case "latency":
            return f"{each * 1e3:,.2f} ms"
    if record["more_is_better"]:
        return f"{1 / each:,.0f}/s"
    return f"{each * 1e9:,.0f} ns" if each < 1e-4 else f"{each * 1e3:,.2f} ms"


def head_figures(record: Mapping[str, Any]) -> str:
    """Return the head of the column of figures."""
    if not record["more_is_better"]:
        return "each"
    return "per CPU second" if record["measures"] == "cpu seconds" else "speed"


def show(name: str, record: Mapping[str, Any]) -> None:
    """Print one scenario's table."""
    if "failed" in record:
        console.print(f"\n[bold]{name}[/bold]  [red]failed:[/red] {record['failed']}", markup=True)
        return
    against = [record["reference"], *(other for other in record["targets"] if other != record["reference"])]
    table = Table(title=name, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column(record["unit"])
    table.add_column(head_figures(record), justify="right")
    ratios = {other: find_ratios(record, other) for other in against}
    word = "times as fast as" if record["more_is_better"] else "times"
    for other in against:
        table.add_column(f"{word} {other}", justify="right")
    percentiles = list(record["results"][0]["percentiles"])
    for key in percentiles:
        table.add_column(key, justify="right")
    for result in record["results"]:
        own = result["name"] == record["subject"]
        cells = []
        for other in against:
            ratio = ratios[other].get(result["name"])
            text = str(ratio) if ratio is not None else ""
            if own and ratio is not None and (target := record["targets"].get(other)) is not None:
                good = holds(record, ratio.middle, target)
                text = (
                    f"[{'green' if good else 'red'}]{text} {'>=' if record['more_is_better'] else '<='} {target:g}[/]"
                )
            cells.append(text)
        further = [show_figure(record, result["percentiles"][key]) for key in percentiles]
        figure = show_figure(record, result["each"])
        table.add_row(result["name"], figure, *cells, *further, style="bold" if own else "")
    for peer, reason in record["missing"].items():
        table.add_row(peer, "-", f"[dim]{reason.splitlines()[0][:90]}[/]")
    console.print()
    console.print(table)


def show_summary(scenarios: Mapping[str, Mapping[str, Any]]) -> int:
    """Print the targets, row by row; the number of rows that do not hold one."""
    table = Table(title="targets", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in ("scenario", "against", "silbo", "target", ""):
        table.add_column(column, justify="left" if column in ("scenario", "against") else "right")
    missed = 0
    for name, record in scenarios.items():
        if "failed" in record:
            table.add_row(name, "", "", "", "[red]failed[/]")
            missed += 1
            continue
        for other, target in record["targets"].items():
            ratio = find_ratios(record, other).get(record["subject"])
            if ratio is None:
                continue
            good = holds(record, ratio.middle, target)
            missed += not good
            sign = ">=" if record["more_is_better"] else "<="
            table.add_row(
                name, other, str(ratio), f"{sign} {target:g}", "[green]holds[/]" if good else "[red]missed[/]"
            )
    console.print()
    console.print(table)
    return missed


# -- the file -------------------------------------------------------------------------------------------------


def describe_setting() -> dict[str, Any]:
    """Describe the machine and the versions."""
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            versions[library] = "not installed"
    try:
        server = str(find_binary())
    except RedisNotFound:
        server = "none"
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} on {platform.machine()}",
        "processor": find_processor(),
        "cores": os.cpu_count(),
        "redis-server": server,
        "versions": versions,
    }


def find_processor() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def hash_sources() -> str:
    """Return a digest of the code that is measured, and of the code that measures."""
    digest = hashlib.sha256()
    for folder in ("silbo", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def open_run(path: Path, *, again: bool) -> dict[str, Any]:
    """Return the run that was cut short, or a new one."""
    new = {
        "setting": describe_setting(),
        "sources": hash_sources(),
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
        "load": os.getloadavg()[0],
        "done": False,
        "scenarios": {},
    }
    if again or not path.exists():
        return new
    old: dict[str, Any] = json.loads(path.read_text())
    if old["done"]:
        return new
    if (old["setting"], old["sources"]) != (new["setting"], new["sources"]):
        console.print("the code or a version has changed since the run that was cut short: it begins anew")
        return new
    old["scenarios"] = {name: record for name, record in old["scenarios"].items() if "failed" not in record}
    if old["scenarios"]:
        console.print(f"goes on with the run of {old['begun']}: {len(old['scenarios'])} scenarios are done")
    return old


def write(path: Path, run: Mapping[str, Any]) -> None:
    """Write the file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".new")
    scratch.write_text(json.dumps(run, indent=1) + "\n")
    os.replace(scratch, path)


def main() -> int:
    """Run a tier."""
    parser = argparse.ArgumentParser(description="Measure silbo against its peers.")
    parser.add_argument("--tier", choices=TIERS, default="bench", help="how much is measured (default: bench)")
    parser.add_argument("--again", action="store_true", help="begin anew, even if a run was cut short")
    parser.add_argument("--list", action="store_true", help="print the scenarios")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the tables of a file")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="how a scenario's name begins; all of the tier by default"
    )
    options = parser.parse_args()
    if options.show:
        run = json.loads(options.show.read_text())
        for name, record in run["scenarios"].items():
            show(name, record)
        return int(bool(show_summary(run["scenarios"])))
    chosen = choose(options.tier, options.names)
    if options.list:
        for scenario in chosen:
            console.print(f"{scenario.group:<12} {scenario.name}")
        return 0
    path = UNFINISHED / f"{options.tier}-{PYTHON}.json"
    run = open_run(path, again=options.again or bool(options.names))
    console.print(
        f"Python {run['setting']['python']}, {run['setting']['cores']} cores, {run['setting']['redis-server']}"
    )
    bars = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the scenario's process is ended, too
    with Progress(*bars, console=console, transient=True) as progress:
        total = progress.add_task(f"make bench ({options.tier})", total=len(chosen))
        for number, scenario in enumerate(chosen):
            progress.update(total, completed=number)
            run["chosen"] = len(chosen)
            if scenario.name in run["scenarios"]:
                continue
            record = measure(scenario, TIERS[options.tier], progress)
            run["scenarios"][scenario.name] = record
            if not options.names:
                write(path, run)
            show(scenario.name, record)
    missed = show_summary(run["scenarios"])
    if options.names:
        return 0
    run["done"] = True
    write(path, run)
    console.print(f"\nfigures: {path.relative_to(ROOT)}")
    if options.tier == "bench":
        results = RESULTS / f"{PYTHON}.json"
        write(results, run)
        console.print(f"kept as {results.relative_to(ROOT)}; `python -m benchmarks.plots` draws the plots")
    console.print(f"{missed} targets missed" if missed else "every target holds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
