"""Count the instructions of the core paths, as ratios to loops by hand, and hold them to the committed ratios.

    python -m benchmarks.instructions [--refresh] [NAME ...]

callgrind counts what each contender of `benchmarks.paths` executes. Other than seconds, these counts are nearly the same in
each run, however busy the machine is. A path whose ratio is more than 3 % above the one in `instructions.json` fails.

The ratios belong to one build of Python, one libc, and one version of each library. With others, and without valgrind,
nothing is compared: it says so, and exits with 0.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple

ROOT = Path(__file__).parents[1]
COMMITTED = Path(__file__).with_suffix(".json")
TOLERANCE = 0.03
"""A ratio may be this much above the committed one, as a fraction of it."""
LAYOUTS = 4
"""Processes, each with other memory addresses. The lowest count is taken, for an unlucky address only adds."""
REFRESH = "make bench-check ARGS=--refresh"


class Counts(NamedTuple):
    """Instructions of one path."""

    silbo: int
    by_hand: int

    @property
    def ratio(self) -> float:
        """silbo's, in times of those by hand."""
        return self.silbo / self.by_hand


class Row(NamedTuple):
    """One path, compared.

    Attributes:
        committed: The ratio in the file; None where it is not there.
        measured: The ratio now; None where there is no such path any more.
    """

    name: str
    committed: float | None
    measured: float | None

    @property
    def change(self) -> float:
        """0.01 is one percent more than committed; 0 where one of the two is missing."""
        return self.measured / self.committed - 1 if self.committed and self.measured else 0.0

    @property
    def verdict(self) -> Literal["ok", "GREW", "shrank", "NOT COMMITTED", "NOT MEASURED"]:
        """In capitals it is a failure."""
        if self.committed is None:
            return "NOT COMMITTED"
        if self.measured is None:
            return "NOT MEASURED"
        if self.change > TOLERANCE:
            return "GREW"
        return "shrank" if self.change < -TOLERANCE else "ok"

    @property
    def failed(self) -> bool:
        """True if the check fails because of this path."""
        return self.verdict.isupper()


# -- count --------------------------------------------------------------------------------------------------


def measure(names: Sequence[str] = ()) -> dict[str, Counts]:
    """Count these paths, or all of them, in several processes side by side."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        layouts = list(pool.map(lambda layout: count(layout, names), range(LAYOUTS)))
    return {
        name: Counts(min(one[name].silbo for one in layouts), min(one[name].by_hand for one in layouts))
        for name in layouts[0]
    }


def count(layout: int, names: Sequence[str] = ()) -> dict[str, Counts]:
    """Count in one process."""
    done, counts = count_dumps("-m", "benchmarks.paths", str(layout), *names)
    # Each path has four dumps: before and after silbo's contender, before and after the one by hand.
    return {name: Counts(counts[4 * number + 1], counts[4 * number + 3]) for number, name in enumerate(done)}


def count_dumps(*program: str) -> tuple[list[str], list[int]]:
    """Run Python under callgrind, with an environment of its own, for that has a place in memory, too.

    Returns:
        The lines that it printed, and the instructions before each call of `getloadavg`, since the call before.
    """
    packages = sysconfig.get_path("purelib")
    environment = {"PYTHONHASHSEED": "0", "PYTHONPATH": f"{ROOT}{os.pathsep}{packages}"}
    with TemporaryDirectory(prefix="silbo-instructions-") as folder:
        valgrind = ["valgrind", "--quiet", "--tool=callgrind", "--dump-before=getloadavg"]
        python = [sys.executable, "-S", "-s", "-P", *program]  # -S: no .pth files
        done = subprocess.run(
            [*valgrind, f"--callgrind-out-file={folder}/counts", *python],
            cwd=folder,
            env={**environment, "PATH": os.environ.get("PATH", os.defpath)},
            capture_output=True,
            text=True,
        )
        if done.returncode or done.stderr:
            sys.exit(f"{shlex.join(program)} failed with {done.returncode} under callgrind:\n{done.stderr}")
        return done.stdout.splitlines(), read_counts(path.read_text() for path in Path(folder).iterdir())


def read_counts(dumps: Iterable[str]) -> list[int]:
    """Read the instructions of each of callgrind's dumps, in the order in which they were written."""
    numbered: dict[int, int] = {}
    for dump in dumps:
        part, total = (re.search(rf"^{word}: (\d+)", dump, re.MULTILINE) for word in ("part", "totals"))
        assert part is not None, dump[:200]
        assert total is not None, dump[:200]
        numbered[int(part[1])] = int(total[1])
    return [total for _, total in sorted(numbered.items())]


# -- compare ------------------------------------------------------------------------------------------------


def build() -> dict[str, str]:
    """Name all that the counts depend on, beside the code."""
    options = shlex.split(sysconfig.get_config_var("CONFIG_ARGS") or "")
    flags = [option for option in options if option.startswith(("--enable-", "--with-")) and "/" not in option]
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "compiler": platform.python_compiler(),
        "options": " ".join([*sorted(flags), sysconfig.get_config_var("OPT") or ""]),
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()),
        **{library: version(library) for library in ("msgspec", "whistle")},
    }


def compare(committed: Mapping[str, float], measured: Mapping[str, float]) -> list[Row]:
    """Put the ratios side by side: a row for each path that is in one of the two."""
    return [Row(name, committed.get(name), measured.get(name)) for name in {**measured, **committed}]


def show(rows: Sequence[Row]) -> None:
    """Print the table."""
    print(f"{'instructions, in times of those by hand':<46}  {'committed':>9}  {'measured':>9}  {'change':>8}")
    for row in rows:
        committed, measured = (f"{ratio:.3f}" if ratio else "-" for ratio in (row.committed, row.measured))
        change = f"{row.change:+.2%}" if row.committed and row.measured else "-"
        print(f"{row.name:<46}  {committed:>9}  {measured:>9}  {change:>8}  {row.verdict.replace('ok', '')}".rstrip())


def say_loudly(*lines: str) -> None:
    """Print what nobody should overlook."""
    print("!" * 100, *(f"!!  {line}" for line in lines), "!" * 100, sep="\n", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check or refresh; the exit code."""
    parser = argparse.ArgumentParser(description="Hold the instructions of the core paths to the committed ratios.")
    parser.add_argument("--refresh", action="store_true", help="write the ratios into the file in place of comparing")
    parser.add_argument("names", nargs="*", metavar="NAME", help="a path; all of them by default")
    options = parser.parse_args(arguments)
    if shutil.which("valgrind") is None:
        say_loudly(
            "bench-check: NOTHING WAS MEASURED, for there is no valgrind: apt-get install valgrind, or its like.",
            "A path that has become slower goes in unseen.",
        )
        return int(options.refresh)
    file = json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {"build": {}, "ratios": {}}
    committed, here = file["ratios"], build()
    other = [
        f"{key}: {file['build'].get(key)!r}, here {value!r}"
        for key, value in here.items()
        if file["build"].get(key) != value
    ]
    if other and not options.refresh:
        say_loudly(
            f"bench-check: NOTHING WAS COMPARED, for the ratios in benchmarks/{COMMITTED.name} are of another build:",
            *other,
            "Install what they were measured with. Or go to the commit before your change,",
            f"`{REFRESH}` there, and run this check again on your change with that file.",
        )
        return 0
    measured = {name: round(counts.ratio, 4) for name, counts in measure(options.names).items()}
    if options.names:
        rows = compare({name: committed[name] for name in options.names if name in committed}, measured)
    else:
        rows = compare(committed, measured)
    show(rows)
    if options.refresh:
        kept = committed if options.names and not other else {}
        COMMITTED.write_text(json.dumps({"build": here, "ratios": {**kept, **measured}}, indent=2) + "\n")
        print(f"\nwritten to benchmarks/{COMMITTED.name}: commit it, and say in the message why the ratios changed")
        return 0
    failed = [row.name for row in rows if row.failed]
    if any(row.verdict == "shrank" for row in rows):
        print(f"\nless than committed by more than {TOLERANCE:.0%}: keep it that way with `{REFRESH}`")
    if failed:
        print(f"\nbench-check: FAILED, for {len(failed)} of {len(rows)} paths: {'; '.join(failed)}")
        print(f"Make them as cheap as they were; or, where it is worth it, `{REFRESH}`, and say why in the commit.")
        return 1
    print(f"\nbench-check: no path is more than {TOLERANCE:.0%} above its committed ratio")
    return 0


if __name__ == "__main__":
    sys.exit(main())
