"""Builds what would be published, into dist/, and checks it; publishes nothing.

    make release

It wants a clean checkout, the version in silbo/__init__.py at the top of CHANGELOG.md with its date, and that version's public API
in tests/docs/api.txt (`make api`). Then it builds sdist and wheel, checks what is in them, installs the wheel in an empty
environment, and runs README's first example there. At the end it prints the files with their SHA-256, and the commands that publish them.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from datetime import UTC, datetime

from silbo import __version__
from tools.api import RECORD, list_api
from tools.check_wheel import IMPORT, ROOT, build, check, run


def main() -> str | None:
    if missing := find_missing():
        return "\n".join(["not ready for a release:", *(f"  {each}" for each in missing)])
    # The same commit gives the same files.
    os.environ.setdefault("SOURCE_DATE_EPOCH", run("git", "log", "-1", "--format=%ct", cwd=str(ROOT)).strip())
    folder = ROOT / "dist"
    shutil.rmtree(folder, ignore_errors=True)
    wheel, sdist = build(folder)
    if wrong := check(wheel, sdist, IMPORT + find_first_example()):
        return wrong
    print(f"silbo {__version__} is built, checked, installed, and ran README's first example:")
    for file in (wheel, sdist):
        print(f"  {hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(ROOT)}")
    print(f"To publish it:\n  git tag v{__version__} && git push origin v{__version__}\n  uv publish dist/*")
    return None


def find_missing() -> list[str]:
    """Return what has to be done before a release."""
    missing: list[str] = []
    if run("git", "status", "--porcelain", cwd=str(ROOT)).strip():
        missing.append("the checkout has changes that are not committed")
    if run("git", "tag", "--list", f"v{__version__}", cwd=str(ROOT)).strip():
        missing.append(f"v{__version__} is released already: raise __version__ in silbo/__init__.py")
    heading = re.search(r"^## (.*)$", ROOT.joinpath("CHANGELOG.md").read_text(), re.MULTILINE)
    dated = re.fullmatch(rf"{re.escape(__version__)} - (\d{{4}}-\d\d-\d\d)", heading[1] if heading else "")
    if dated is None or dated[1] > datetime.now(UTC).date().isoformat():
        missing.append(f"CHANGELOG.md begins with {heading and heading[1]!r}, not with '{__version__} - ' and the day")
    if RECORD.read_text().splitlines()[1:] != list_api():
        missing.append(f"{RECORD.relative_to(ROOT)} is not the public API of today: `make api`")
    return missing


def find_first_example() -> str:
    """Return README's first program."""
    found = re.search(r"^```python\n(.*?)^```", ROOT.joinpath("README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


if __name__ == "__main__":
    sys.exit(main())
