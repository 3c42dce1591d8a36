"""Prints the path of a Python of the version that is asked for: `python tools/find_python.py 3.13`.

Looks at the Python that runs this, the PATH, and the versions of pyenv. Runs, as `tools/make_venv.py` does, on whatever
`python3` a machine has.
"""

import os
import subprocess
import sys

TRY = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"  # Debian keeps ensurepip in a package of its own


def main(version: str) -> "str | None":
    for python in list_candidates(version):
        if runs(python, version):
            print(python)
            return None
    return (
        f"no Python {version} with venv here: not on the PATH, and not among the versions of pyenv. "
        f"`pyenv install {version}` or `uv python install {version}` brings one"
    )


def list_candidates(version: str) -> "list[str]":
    """Return the places to look at, the best first; they need not exist."""
    name = f"python{version}"
    found = [sys.executable]
    found += [os.path.join(folder, name) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    versions = os.path.join(os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv"), "versions")
    if os.path.isdir(versions):
        found += [
            os.path.join(versions, folder, "bin", name)
            for folder in sorted(os.listdir(versions), reverse=True)
            if folder.startswith(f"{version}.")
        ]
    return found


def runs(python: str, version: str) -> bool:
    """True if it is a Python of this version that can make an environment. A shim of pyenv's may be none."""
    try:
        told = subprocess.check_output([python, "-c", TRY], stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return False
    return told.decode().strip() == version


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
