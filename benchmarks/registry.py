"""Every scenario that the runner knows, in the order of the table."""

from __future__ import annotations

from benchmarks import at_redis, dispatch, in_process, more, over_shards, pubsub, stored
from benchmarks.scenario import Scenario

__all__ = ["SCENARIOS"]

SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        *in_process.SCENARIOS,
        *dispatch.SCENARIOS,
        *at_redis.SCENARIOS,
        *pubsub.SCENARIOS,
        *stored.SCENARIOS,
        *over_shards.SCENARIOS,
        *more.SCENARIOS,
    )
}
"""By name."""
