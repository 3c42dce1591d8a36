"""What a page repeats from the code is what the code says."""

from __future__ import annotations

import re
from pathlib import Path

from chaos.batteries import BATTERIES
from tests.brokers.redis.support import ACL

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_on_redis_has_the_users_that_the_tests_are_run_as() -> None:
    """Whoever copies the line from the page gets a user that silbo can work as, and no more."""
    lines = ROOT.joinpath("docs/howto/redis.md").read_text().splitlines()
    assert len(ACL) == 2
    for user, rules in ACL.items():
        assert " ".join(f"ACL SETUSER {user} {rules}".split()) in lines


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_each_promise_names_tests_that_exist() -> None:
    """README's table of promises: behind each cell that promises something there is a test, or a battery of chaos."""
    text = ROOT.joinpath("README.md").read_text()
    part = text.partition("<!-- promises -->")[2].partition("<!-- /promises -->")[0]
    promises, tests = (rows(table) for table in re.findall(r"(?:^\|.*\n)+", part, re.MULTILINE))
    assert len(promises) == len(tests) > 10
    for promised, tested in zip(promises, tests, strict=True):
        assert promised[0].startswith(tested[0])
        for promise, names in zip(promised[1:], tested[1:], strict=True):
            if names == "-":
                assert promise in {"-", "lost", "lost with its process", "possible"}, "promised, and not tested"
                continue
            for name in names.split(", "):
                if battery := re.fullmatch(r"chaos `(\w+)`", name):
                    assert battery[1] in BATTERIES
                elif name != "the same":
                    file, _, test = name.strip("`").partition("::")
                    assert f"def {test}(" in ROOT.joinpath("tests", file).read_text(), name
