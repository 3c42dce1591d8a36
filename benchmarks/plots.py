"""Draws the plots of the documentation from the figures of a run, and writes their tables.

    python -m benchmarks.plots [FILE ...] [--to FOLDER]

Four kinds, as SVG: the ratios of each scenario as bars; the cost over a growing number (listeners, names); the speed over
the concurrency; and latency percentiles. Beside them a page part for each Python, `{Python}.inc`: what was measured, the
targets, the cells in which another one is ahead of silbo, the empty cells, and the plots. Figures that did not change give the
same bytes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.run import RESULTS, ROOT, find_ratios, holds, show_figure

FOLDER = ROOT / "docs" / "explanation" / "plots"
SILBO, REFERENCE, PEER = "#d1495b", "#30638e", "#b8c4cc"
SPEED_AXES = ("concurrency",)
"""Plots over these have the speed upwards; those over others the cost."""

mpl.rcParams.update(
    {
        "svg.hashsalt": "silbo",  # else each drawing has other ids
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
    }
)

Records = Mapping[str, Mapping[str, Any]]


def draw_ratios(group: str, records: Records, title: str) -> Figure:
    """Draw the bars of a group, one panel for each scenario: the ratio to the reference, and its quartiles."""
    heights = [0.5 + 0.24 * len(record["results"]) for record in records.values()]
    figure = Figure(figsize=(7.5, sum(heights) + 0.6), layout="constrained")
    panels = figure.subplots(len(records), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, (name, record) in zip(panels, records.items(), strict=True):
        _draw_bars(axes, name, record)
    figure.suptitle(f"{group}: {title}", fontsize=10)
    return figure


def _draw_bars(axes: Axes, name: str, record: Mapping[str, Any]) -> None:
    ratios = find_ratios(record, record["reference"])
    names = [*reversed(ratios)]
    middles = [ratios[one].middle for one in names]
    below = [ratios[one].middle - ratios[one].low for one in names]
    above = [ratios[one].high - ratios[one].middle for one in names]
    known = {record["subject"]: SILBO, record["reference"]: REFERENCE}
    colors = [known.get(one, PEER) for one in names]
    axes.barh(names, middles, xerr=(below, above), color=colors, error_kw={"elinewidth": 0.8, "ecolor": "#555555"})
    if max(middles) / min(middles) > 20:
        axes.set_xscale("log")
    if (target := record["targets"].get(record["reference"])) is not None:
        axes.axvline(target, color=SILBO, linestyle="--", linewidth=0.8)
    word = "speed" if record["more_is_better"] else "cost"
    better = "longer" if record["more_is_better"] else "shorter"
    axes.set_title(f"{name}: {word} in times of {record['reference']} ({better} is better)", fontsize=8, loc="left")


def draw_curve(axis: str, records: Records, title: str) -> Figure:
    """Draw a line for each contender over a growing number."""
    is_speed = axis in SPEED_AXES
    lines: dict[str, list[tuple[float, float]]] = {}
    for record in records.values():
        for result in record["results"]:
            each = 1 / result["each"] if is_speed else result["each"] * 1e6
            lines.setdefault(result["name"], []).append((record["curve"][1], each))
    first = next(iter(records.values()))
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    known = {first["subject"]: SILBO, first["reference"]: REFERENCE}
    for name, points in lines.items():
        xs, ys = zip(*sorted(points), strict=True)
        width = 2.0 if name in known else 1.0
        axes.plot(xs, ys, marker="o", markersize=3, linewidth=width, color=known.get(name), label=name)
    axes.set_xscale("symlog" if any(record["curve"][1] == 0 for record in records.values()) else "log")
    axes.set_yscale("log")
    axes.set_xlabel(axis)
    axes.set_ylabel(f"{first['unit']} a second" if is_speed else "microseconds")
    axes.set_title(title, fontsize=10)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    return figure


def draw_latencies(records: Records, title: str) -> Figure:
    """Draw each contender's percentiles, one panel for each scenario."""
    figure = Figure(figsize=(7.5, 2.4 * len(records) + 0.5), layout="constrained")
    panels = figure.subplots(len(records), 1, squeeze=False)[:, 0]
    for axes, (name, record) in zip(panels, records.items(), strict=True):
        known = {record["subject"]: SILBO, record["reference"]: REFERENCE}
        for result in record["results"]:
            figures = result["percentiles"]
            own = result["name"]
            milliseconds = [figure * 1e3 for figure in figures.values()]
            axes.plot([*figures], milliseconds, marker="o", markersize=3, label=own, color=known.get(own))
        axes.set_yscale("log")
        axes.set_ylabel("milliseconds")
        axes.set_title(name, fontsize=8, loc="left")
        axes.legend(fontsize=7, frameon=False)
    figure.suptitle(title, fontsize=10)
    return figure


def draw_all(run: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw every plot of a run, and write its tables; the files."""
    python = ".".join(run["setting"]["python"].split(".")[:2])
    title = f"Python {run['setting']['python']}, {run['setting']['cores']} cores"
    records = {name: record for name, record in run["scenarios"].items() if "results" in record}
    figures: dict[str, Figure] = {}
    for group in dict.fromkeys(record["group"] for record in records.values()):
        of_group = {name: record for name, record in records.items() if record["group"] == group}
        figures[f"ratios-{group}"] = draw_ratios(group, of_group, title)
    for axis, group in dict.fromkeys((one["curve"][0], one["group"]) for one in records.values() if one["curve"]):
        points = {
            name: one for name, one in records.items() if one["group"] == group and (one["curve"] or "?")[0] == axis
        }
        if len(points) > 1:
            figures[f"{axis}-{group}"] = draw_curve(axis, points, f"{group} over {axis}: {title}")
    latencies = {
        name: record
        for name, record in records.items()
        if record["measures"] == "latency" and record["results"][0]["percentiles"]
    }
    if latencies:
        figures["latencies"] = draw_latencies(latencies, title)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        path = folder / f"{python}-{name.replace(' ', '-').replace('/', '-').lower()}.svg"
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        path.write_text("".join(f"{line.rstrip()}\n" for line in path.read_text().splitlines()))
    plots = sorted(folder.glob(f"{python}-*.svg"))
    page = folder / f"{python}.inc"
    page.write_text(write_tables(run, [path.name for path in plots]))
    return [*plots, page]


# -- tables -----------------------------------------------------------------------------------------------------


def write_tables(run: Mapping[str, Any], plots: Sequence[str]) -> str:
    """Return the page part of one Python."""
    setting, records = run["setting"], {name: one for name, one in run["scenarios"].items() if "results" in one}
    chosen = run.get("chosen", len(run["scenarios"]))
    versions = ", ".join(f"{library} {number}" for library, number in setting["versions"].items())
    server = setting["redis-server"]
    lines = [
        f"Python {setting['python']} on {setting['system']}, {setting['processor']}, {setting['cores']} cores, {server}; {versions}.",
        f"The run began at {run['begun']}, when {run['load']:.1f} other programs wanted a core.",
        "" if run["done"] else f"The run was cut short: it has {len(run['scenarios'])} of {chosen} scenarios.",
        "",
        "| scenario | against | silbo | target | |",
        "|---|---|---|---|---|",
    ]
    for name, record in records.items():
        against = dict.fromkeys([record["reference"], *record["targets"]])
        for other in against:
            ratio = find_ratios(record, other).get(record["subject"])
            if ratio is None:
                continue
            target = record["targets"].get(other)
            sign = ">=" if record["more_is_better"] else "<="
            wanted = "" if target is None else f"{sign} {target:g}"
            verdict = "" if target is None else "holds" if holds(record, ratio.middle, target) else "**missed**"
            word = "x as fast" if record["more_is_better"] else "x"
            lines.append(f"| {name} | {other} | {ratio} {word} | {wanted} | {verdict} |")
    lines += [
        "",
        "Another one is ahead of silbo in these cells:",
        "",
        "| scenario | who | it | silbo |",
        "|---|---|---|---|",
    ]
    lines += find_losing_cells(records)
    lines += ["", "These cells are empty:", "", "| scenario | who | why |", "|---|---|---|"]
    for name, record in run["scenarios"].items():
        if "failed" in record:
            lines.append(f"| {name} | all | {_as_cell(record['failed'])} |")
            continue
        lines += [f"| {name} | {peer} | {_as_cell(reason)} |" for peer, reason in record["missing"].items()]
    notes = {who: note for record in records.values() for who, note in record["notes"].items()}
    lines += ["", *(f"- {who}: {note}" for who, note in notes.items()), ""]
    lines += [line for name in plots for line in (f"![{name}](plots/{name})", "")]
    return "\n".join(lines)


def find_losing_cells(records: Records) -> list[str]:
    """Return a row for each contender that is ahead of silbo by more than their quartiles; limits count, too."""
    rows = []
    for name, record in records.items():
        ratios = find_ratios(record, record["subject"])
        each = {result["name"]: show_figure(record, result["each"]) for result in record["results"]}
        for other, ratio in ratios.items():
            is_ahead = ratio.low > 1 if record["more_is_better"] else ratio.high < 1
            if is_ahead and not other.startswith("silbo"):
                rows.append(f"| {name} | {other} | {each[other]} | {each[record['subject']]} |")
    return rows


def _as_cell(text: str) -> str:
    return text.splitlines()[0].replace("|", "/")[:160]


def main() -> None:
    """Draw the plots of these files, or of all that are kept."""
    parser = argparse.ArgumentParser(description="Draw the plots of the documentation.")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="figures (default: benchmarks/results/)")
    parser.add_argument("--to", type=Path, default=FOLDER, metavar="FOLDER", help="default: docs/explanation/plots/")
    options = parser.parse_args()
    for file in options.files or sorted(RESULTS.glob("*.json")):
        for path in draw_all(json.loads(file.read_text()), options.to):
            print(path)


if __name__ == "__main__":
    main()
