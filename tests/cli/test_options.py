"""Options that all commands share, and what a command imports to start."""

from __future__ import annotations

import subprocess
import sys

import pytest
from redis.asyncio import Redis

from tests.cli.conftest import Run
from tests.support.command_line import environment, silbo


async def test_prefix_may_stand_in_the_environment(redis: Redis, redis_url: str, prefix: str) -> None:
    """The option comes before the environment."""
    env = {"SILBO_REDIS_URL": redis_url, "SILBO_PREFIX": prefix}
    found = await silbo("dead", "count", env=env)
    assert found.code == 1 and f"silbo: there is no stream {prefix}:{{events}}: " in found.err
    found = await silbo("dead", "count", "--prefix", f"{prefix}.other", env=env)
    assert f"{prefix}.other:{{events}}" in found.err


def test_wrong_prefix_in_the_environment_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SILBO_PREFIX", "a prefix")
    done = run("dead", "count", "--redis", "redis://localhost:1")
    assert (done.code, done.out) == (2, "") and "'a prefix'" in done.err.splitlines()[-1]


def test_command_imports_no_library_that_it_does_not_need() -> None:
    """It is called again and again, by people and by alarms."""
    program = """
import sys
from silbo.cli.main import make_parser
make_parser("outbox")
print(*{"redis", "rich", "sqlalchemy"}.intersection(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], env=environment({}), capture_output=True, check=True)
    assert done.stdout == b"\n"


@pytest.mark.parametrize(
    ("words", "usage", "hint"),
    [
        (["tail", "--sinc", "1h"], "tail", "unrecognized arguments: --sinc; did you mean --since?"),
        (["dead", "list", "--limt", "3"], "dead list", "unrecognized arguments: --limt 3; did you mean --limit?"),
        (["names", "a:b", "c", "d"], "names", "unrecognized arguments: d"),
        (["--verbos"], "", "the following arguments are required: COMMAND"),
        (["groups", "--redis://:secret@h"], "groups", "unrecognized arguments: --redis:***@h"),
    ],
)
def test_unknown_argument_is_told_by_its_command(words: list[str], usage: str, hint: str, run: Run) -> None:
    """With the usage of the command, and the option that may be meant."""
    done = run(*words)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"usage: silbo {usage}".rstrip())
    assert done.err.splitlines()[-1].startswith(f"silbo {usage}".rstrip() + f": error: {hint}")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["listener"], "there is no command 'listener'; did you mean 'listeners'?"),
        (["dead", "lst"], "there is no command 'lst'; did you mean 'list'?"),
        (["qqq"], "there is no command 'qqq'; known: 'consume', "),
    ],
)
def test_misspelt_command_has_a_hint(words: list[str], hint: str, run: Run) -> None:
    done = run(*words)
    assert (done.code, done.out) == (2, "") and hint in done.err.splitlines()[-1]
