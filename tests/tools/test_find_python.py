"""The search for a Python that a target needs: it runs what it finds, and says where it has looked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools.server import ROOT

HERE = "{}.{}".format(*sys.version_info)


def find(version: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-S", "tools/find_python.py", version]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def make_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_the_python_that_asks_is_good_enough() -> None:
    done = find(HERE, PATH="")
    assert (done.returncode, done.stdout.strip()) == (0, sys.executable)


def test_shim_that_starts_no_python_is_passed_over_for_one_of_pyenvs(tmp_path: Path) -> None:
    """pyenv puts a python3.99 on the PATH as soon as it has one, and it ends with 127 where another is chosen."""
    shim = make_program(tmp_path / "shims" / "python3.99", "exit 127")
    installed = make_program(tmp_path / "versions" / "3.99.1" / "bin" / "python3.99", "echo 3.99")
    done = find("3.99", PATH=f"{shim.parent}:/usr/bin:/bin", PYENV_ROOT=str(tmp_path))
    assert (done.returncode, done.stdout.strip()) == (0, str(installed))


@pytest.mark.parametrize("says", ["echo 3.98", "echo no ensurepip >&2; exit 1"], ids=["another version", "no venv"])
def test_none_is_told_with_what_to_do(tmp_path: Path, says: str) -> None:
    wrong = make_program(tmp_path / "bin" / "python3.99", says)
    done = find("3.99", PATH=f"{wrong.parent}:/usr/bin:/bin", PYENV_ROOT=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert "no Python 3.99 with venv here" in done.stderr
    assert "pyenv install 3.99" in done.stderr
