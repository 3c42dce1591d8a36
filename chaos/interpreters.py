"""Which Pythons this machine has, each with silbo and what it needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

__all__ = ["interpreters"]

ROOT: Final = Path(__file__).resolve().parent.parent
NEEDED: Final = "import hiredis, msgspec, redis, sys, whistle; print('%d.%d' % sys.version_info[:2])"


def interpreters(versions: Sequence[str]) -> dict[str, str | None]:
    """A program for each version, None where none was found: this one, or one of a virtual environment as `make` has it.

    That environment is made where there is none and a plain Python of the version is found.
    """
    return {version: _interpreter(version) for version in versions}


def _interpreter(version: str) -> str | None:
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    folder = ROOT / ".venv" / version
    own = str(folder / "bin" / "python")
    if _is_good(own, version):
        return own
    for plain in _plain(version):
        made = subprocess.run(
            [plain, "tools/make_venv.py", str(folder), "demo"], cwd=ROOT, capture_output=True, check=False
        )
        if made.returncode == 0 and _is_good(own, version):
            return own
    return None


def _plain(version: str) -> Iterator[str]:
    """On the PATH, and where pyenv keeps them."""
    if found := shutil.which(f"python{version}"):
        yield found
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from map(str, sorted(pyenv.glob(f"versions/{version}.*/bin/python"), reverse=True))


def _is_good(python: str, version: str) -> bool:
    try:
        told = subprocess.run([python, "-c", NEEDED], capture_output=True, text=True, check=False, timeout=60)
    except OSError:
        return False
    return told.returncode == 0 and told.stdout.strip() == version
