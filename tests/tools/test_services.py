"""`make test-services` on a machine that lacks a server: the rest runs, and nobody can overlook what did not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.server import ROOT

PLUGIN = """
from pathlib import Path
from tools import chromium, postgres, rabbitmq

def no_postgres(): raise postgres.PostgresNotFound(f"No PostgreSQL here; {postgres.INSTALL}")
def no_rabbitmq(): raise rabbitmq.RabbitMQNotFound(f"No RabbitMQ here; {rabbitmq.INSTALL}")
def no_chromium(): raise chromium.ChromiumNotFound(f"No Chromium here; {chromium.INSTALL}")

postgres.find_postgres = %s
rabbitmq.find_rabbitmq = no_rabbitmq
chromium.find_chromium = no_chromium
"""
POSTGRES_ALONE = PLUGIN % 'lambda: Path("/somewhere")'
NONE = PLUGIN % "no_postgres"


def services(folder: Path, machine: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A run of what needs RabbitMQ."""
    (folder / "machine.py").write_text(machine)
    inherited = {name: value for name, value in os.environ.items() if name != "SILBO_LEAVE_OUT"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "tests/services/test_from_sources.py", "-p", "machine", "-q", *options],
        cwd=ROOT,
        env=inherited | {"PYTHONPATH": f"{folder}:{ROOT}"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.long
def test_missing_server_is_told_at_the_end_and_the_rest_runs(tmp_path: Path) -> None:
    done = services(tmp_path, POSTGRES_ALONE, "--numprocesses=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 TESTS OF RABBITMQ LEFT OUT" in done.stdout and "0 TESTS OF CHROMIUM LEFT OUT" in done.stdout
    *_, install, _ = done.stdout.splitlines()
    assert "apt-get install chromium" in install, "what is left out is told last"
    assert "POSTGRESQL LEFT OUT" not in done.stdout


@pytest.mark.long
@pytest.mark.parametrize(
    ("machine", "environment", "named"),
    [
        (POSTGRES_ALONE, {"SILBO_LEAVE_OUT": "nothing"}, ["rabbitmq-server"]),
        (NONE, {}, ["rabbitmq-server", "postgresql", "chromium"]),  # nothing would be left
    ],
    ids=["nothing may be left out", "all are missing"],
)
def test_run_that_would_prove_too_little_fails(
    machine: str, environment: dict[str, str], named: list[str], tmp_path: Path
) -> None:
    done = services(tmp_path, machine, **environment)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    for package in named:
        assert f"apt-get install {package}" in done.stderr
