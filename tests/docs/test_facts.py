"""What a page repeats from the code is what the code says."""

from __future__ import annotations

from pathlib import Path

from tests.brokers.redis.support import ACL

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_on_redis_has_the_users_that_the_tests_are_run_as() -> None:
    """Whoever copies the line from the page gets a user that silbo can work as, and no more."""
    lines = ROOT.joinpath("docs/howto/redis.md").read_text().splitlines()
    assert len(ACL) == 2
    for user, rules in ACL.items():
        assert " ".join(f"ACL SETUSER {user} {rules}".split()) in lines
