"""Builds sdist and wheel, then installs that wheel in an empty environment and imports it: what users get.

The run-time dependencies are those of requirements/silbo.txt.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

from packaging.metadata import Metadata

ROOT = Path(__file__).resolve().parent.parent

IMPORT = """
import importlib.metadata, importlib.util, pathlib, silbo
assert importlib.metadata.version("silbo") == silbo.__version__
assert (pathlib.Path(silbo.__file__).parent / "py.typed").exists()
for name in silbo.__all__:
    getattr(silbo, name)
(plugin,) = importlib.metadata.entry_points(group="pytest11", name="silbo_pytest")
assert importlib.util.find_spec(plugin.value)
print("installed and imported:", silbo.__file__)
"""


def main() -> str | None:
    with tempfile.TemporaryDirectory(prefix="silbo-wheel-") as scratch:
        return check(*build(Path(scratch)))


def build(folder: Path) -> tuple[Path, Path]:
    """Build into an empty folder; return the wheel and the sdist."""
    # setuptools would take what its list of the last build names, whatever MANIFEST.in says now.
    shutil.rmtree(ROOT / "silbo.egg-info", ignore_errors=True)
    # The wheel is built from the sdist, so an sdist that lacks a file fails here.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT))
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def check(wheel: Path, sdist: Path, program: str = IMPORT) -> str | None:
    """Look into both, install the wheel in an empty environment, and run a program there; return what is wrong."""
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    if wrong := look_into(wheel, sdist, project):
        return wrong
    with tempfile.TemporaryDirectory(prefix="silbo-wheel-") as scratch:
        venv.create(Path(scratch, "venv"), with_pip=True)
        python = str(Path(scratch, "venv", "bin", "python"))
        pip = (python, "-m", "pip", "--disable-pip-version-check")
        requirements = str(ROOT / "requirements" / "silbo.txt")
        run(*pip, "install", "--require-hashes", "--only-binary=:all:", "-r", requirements)
        run(*pip, "install", "--no-deps", str(wheel))
        run(*pip, "check")  # the wheel asks for nothing that is not in that file
        print(run(python, "-I", "-c", program).strip())
        return verify_types(python)


def look_into(wheel: Path, sdist: Path, project: dict[str, Any]) -> str | None:
    """What is wrong with them, if anything."""
    with tarfile.open(sdist) as archive:
        packed = {member.name.partition("/")[2] for member in archive if member.isfile()}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = next(name.partition("/")[0] for name in names if ".dist-info/" in name)
        raw = archive.read(f"{info}/METADATA")
    metadata = Metadata.from_email(raw, validate=True)  # or an index refuses it
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "silbo").rglob("*.py")} | {
        "silbo/py.typed",
        "silbo_pytest.py",
    }
    if missing := wanted - names:
        return f"not in the wheel: {sorted(missing)}"
    tracked = set(run("git", "ls-files", cwd=str(ROOT)).splitlines())  # tests and all that they need
    if missing := (wanted | tracked) - packed:
        return f"not in the sdist (MANIFEST.in): {sorted(missing)}"
    if stray := {name for name in packed - tracked if ".egg-info/" not in name} - {"PKG-INFO"}:
        return f"strays in the sdist (MANIFEST.in): {sorted(stray)}"
    if stray := {name for name in names if not name.startswith(("silbo/", "silbo_pytest.py", f"{info}/"))}:
        return f"strays in the wheel: {sorted(stray)}"
    if not any(name.endswith("/LICENSE") for name in names) or metadata.license_expression != project["license"]:
        return "the wheel lacks its license"
    return None


def verify_types(python: str) -> str | None:
    """Anything public whose type is unknown: what a user's own strict pyright would complain of."""
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--verifytypes", "silbo", "--ignoreexternal"]
    path = f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}"  # the python that it asks is the first there
    told = subprocess.run(
        command, cwd=tempfile.gettempdir(), env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
    )
    report = json.loads(told.stdout)["typeCompleteness"]
    symbols = report["symbols"]
    # An attribute whose type is only inferred counts as ambiguous: nothing that a user would notice.
    bad = [
        symbol for symbol in symbols if symbol["isExported"] and not symbol["isTypeKnown"] | symbol["isTypeAmbiguous"]
    ]
    unknown = [symbol["name"] for symbol in bad]
    return f"of unknown type: {unknown}" if unknown else None if symbols else "no public types were found"


def run(*command: str, cwd: str = tempfile.gettempdir()) -> str:
    """Its output, shown only when it fails."""
    env = os.environ | {"PYTHONSAFEPATH": "1"}  # -m would import what lies about in that folder
    env.pop("PYTHONPATH", None)  # a silbo there would pass for the installed one
    done = subprocess.run(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\nThis failed: {' '.join(command)}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
