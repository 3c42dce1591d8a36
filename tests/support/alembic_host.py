"""A host with Alembic, made as its users make it: ``alembic init -t async``, and the line of the recipe."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

RECIPE = """\
from silbo.stores.sqlalchemy import metadata
target_metadata = [metadata]"""


async def alembic(folder: Path, *arguments: str) -> tuple[int, str]:
    """Run it in a host's folder; its exit code and all that it printed."""
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "alembic", *arguments],
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    return process.returncode or 0, out.decode()


async def migrated(folder: Path, url: str) -> str:
    """Make a host on a database, have Alembic find out the tables, and make them; what the migration says."""
    assert (await alembic(folder, "init", "-t", "async", "migrations"))[0] == 0
    ini, env = folder / "alembic.ini", folder / "migrations" / "env.py"
    lines = ini.read_text().splitlines()
    ini.write_text(
        "\n".join(f"sqlalchemy.url = {url}" if line.startswith("sqlalchemy.url") else line for line in lines)
    )
    assert "target_metadata = None" in env.read_text()
    env.write_text(env.read_text().replace("target_metadata = None", RECIPE))
    for command in (["revision", "--autogenerate", "-m", "outbox"], ["upgrade", "head"]):
        code, out = await alembic(folder, *command)
        assert code == 0, out
    (migration,) = (folder / "migrations" / "versions").glob("*.py")
    return migration.read_text()
