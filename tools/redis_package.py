"""Redis 7.0 from the packages of Debian 12 or Ubuntu 24.04, unpacked beside the servers of the wheels: no wheel has it.

    python -m tools.redis_package       # fetch it, or say why there is none here

apt checks the signatures, and keeps its lists in a folder of ours: neither root nor an earlier `apt-get update` is needed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from tools.redis_binary import CACHE, PACKAGE, RedisNotFound

__all__ = ["fetch_package"]

PACKAGES: Final = ("redis-server=5:7.0.*", "redis-tools=5:7.0.*")
LIBRARIES: Final = ("liblzf1", "libjemalloc2", "liblua5.1-0", "lua-cjson", "lua-bitop")
"""The libraries that its server loads, and that a machine without Redis may lack."""


def fetch_package(cache: Path = CACHE) -> Path:
    """Return the server, downloaded the first time.

    Raises:
        RedisNotFound: The system has no packages of Redis 7.0, or they can't be had.
    """
    server = cache / PACKAGE
    if server.exists():
        return server
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise RedisNotFound(
            "Redis 7.0 comes from packages of Debian 12 or Ubuntu 24.04, and this system has no apt-get"
        )
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        packages, unpacked = Path(scratch, "packages"), Path(scratch, "unpacked")
        for folder in (packages, Path(scratch, "state/lists/partial"), Path(scratch, "cache/archives/partial")):
            folder.mkdir(parents=True)
        apt = ["apt-get", "-q", "-o", f"Dir::State={scratch}/state", "-o", f"Dir::Cache={scratch}/cache"]
        apt += ["-o", "Dir::State::status=/var/lib/dpkg/status", "-o", "APT::Sandbox::User="]
        _run([*apt, "update"], packages)
        _run([*apt, "download", *PACKAGES, *LIBRARIES], packages)
        for package in packages.glob("*.deb"):
            _run(["dpkg-deb", "-x", str(package), str(unpacked)], packages)
        libraries = next(unpacked.glob("usr/lib/*/liblzf.so.1")).parent.relative_to(unpacked)
        program = unpacked / server.name
        program.write_text(
            f'#!/bin/sh\nhome="${{0%/*}}"\nLD_LIBRARY_PATH="$home/{libraries}" exec "$home/usr/bin/redis-server" "$@"\n'
        )
        program.chmod(0o755)
        if not server.exists():  # another process may have been as fast
            os.replace(unpacked, server.parent)
    return server


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=300
    )
    if done.returncode:
        raise RedisNotFound(f"no packages of Redis 7.0 here: {' '.join(command)}\n{done.stdout.strip()}")


if __name__ == "__main__":
    try:
        print(fetch_package())
    except RedisNotFound as error:
        sys.exit(str(error))
