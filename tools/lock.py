"""Writes requirements/: exact versions, with hashes, of everything that the make targets install.

    python -m tools.lock             keep the versions there are, as long as pyproject.toml allows them
    python -m tools.lock --upgrade   take the newest that pyproject.toml allows

One file for each dependency group of pyproject.toml, and two more: `silbo.txt`, the run-time dependencies alone, and
`oldest.txt`, the lower bounds that pyproject.toml states. A file begins with `-r` lines for the groups that its group
includes and lists only what it adds to them, so that each package stands once. Wheels only: nothing is compiled on
installation. A host that pins its own libraries (ALONE) has a resolution of its own.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any, Final

__all__ = ["FOLDER", "read_pins"]

ROOT: Final = Path(__file__).resolve().parent.parent
FOLDER: Final = ROOT / "requirements"
PROJECT: Final = "pyproject.toml"
OLDEST_PYTHON: Final = "3.11"

WITHOUT_SILBO: Final = {"build", "lock", "redis"}
"""Groups that are installed without silbo's own dependencies."""

ALONE: Final = {"harp": "3.13"}
"""Groups with an environment of their own, and the one Python that they run on: their versions are not those of the others."""

NO_WHEEL: Final = {"harp": ("python-baseconv", "svix-ksuid")}
"""Packages of a group that are published as source alone. Both are pure Python."""

HEADER: Final = "# Written by `make lock` from pyproject.toml. Do not edit.\n"


def main(*options: str) -> str | None:
    if set(options) - {"--upgrade"}:
        return f"usage: python -m tools.lock [--upgrade], not {' '.join(options)}"
    groups: dict[str, list[Any]] = tomllib.loads((ROOT / PROJECT).read_text())["dependency-groups"]
    included = {
        group: [entry["include-group"] for entry in entries if isinstance(entry, dict)]
        for group, entries in groups.items()
    }
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="silbo-lock-") as scratch:
        # One resolution of everything first: it gives each package one version in all files.
        everything = Path(scratch, "everything.txt")
        if "--upgrade" not in options:
            others = {"oldest", *ALONE}
            old = [pin for file in FOLDER.glob("*.txt") if file.stem not in others for pin in read_pins(file)]
            everything.write_text("\n".join(old))
        with_silbo = [group for group in groups if group not in WITHOUT_SILBO and group not in ALONE]
        compile_pins(PROJECT, "--all-extras", *as_options([*with_silbo, "build", "lock"]), output=everything)
        limit = ("--constraint", str(everything))

        write("silbo", compile_pins(PROJECT, *limit))
        for group in groups:
            if group == "redis":
                write(group, compile_pins(*as_options([group]), "--no-deps"))
            elif group in WITHOUT_SILBO:
                write(group, compile_pins(*as_options([group]), *limit))
            elif group in ALONE:
                kept, file = Path(scratch, f"{group}.txt"), FOLDER / f"{group}.txt"
                if "--upgrade" not in options and file.exists():
                    kept.write_text("\n".join(read_pins(file)))
                source = [f"--no-binary={package}" for package in NO_WHEEL[group]]
                compile_pins(PROJECT, *as_options([group]), *source, output=kept, python=ALONE[group])
                write(group, read_pins(kept))
            else:
                above = included[group] or ["silbo"]
                write(group, compile_pins(PROJECT, "--all-extras", *as_options([group]), *limit), *above)
    write("oldest", compile_pins(PROJECT, "--all-extras", *as_options(["test"]), "--resolution=lowest-direct"))
    return None


def as_options(groups: list[str]) -> list[str]:
    return [f"--group={PROJECT}:{group}" for group in groups]


def compile_pins(*arguments: str, output: Path | None = None, python: str = OLDEST_PYTHON) -> list[str]:
    """Resolve for every system and every Python from the oldest on.

    Args:
        arguments: uv's, the project and groups among them.
        output: A file to write to as well; the versions in it stay where they still fit.
        python: The oldest Python.

    Returns:
        One entry for each package and marker, its hashes on lines of their own.
    """
    command = [str(Path(sys.executable).with_name("uv")), "pip", "compile", *arguments]
    command += ["--no-config", "--universal", f"--python-version={python}", "--only-binary=:all:"]
    command += ["--generate-hashes", "--no-header", "--no-annotate", "--quiet"]
    if output:
        command += ["--output-file", str(output)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return split_pins(done.stdout)


def read_pins(file: Path) -> list[str]:
    """The entries of one file in requirements/, without those of the files that it includes."""
    return split_pins(file.read_text())


def split_pins(text: str) -> list[str]:
    pins: list[str] = []
    for line in text.splitlines():
        if line.startswith(" "):
            pins[-1] += f"\n{line}"
        elif line and not line.startswith(("#", "-")):
            pins.append(line)
    return pins


def read_all_pins(file: Path) -> set[str]:
    """The entries of a file in requirements/ and of the files that it includes."""
    pins = set(read_pins(file))
    for line in file.read_text().splitlines():
        if line.startswith("-r "):
            pins |= read_all_pins(file.with_name(line.removeprefix("-r ")))
    return pins


def write(part: str, pins: list[str], *above: str) -> None:
    known = {pin for name in above for pin in read_all_pins(FOLDER / f"{name}.txt")}
    lines = [f"-r {name}.txt" for name in above]
    lines += [f"--no-binary {package}" for package in NO_WHEEL.get(part, ())]
    lines += [pin for pin in pins if pin not in known]
    (FOLDER / f"{part}.txt").write_text(HEADER + "\n" + "".join(f"{line}\n" for line in lines))
    print(f"requirements/{part}.txt: {len(pins)} packages")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
