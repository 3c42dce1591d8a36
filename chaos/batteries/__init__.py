"""The batteries: each a function that plays on a stage and says what it found."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from chaos.batteries.cancel import cancel
from chaos.batteries.clocks import clocks
from chaos.batteries.cluster import cluster
from chaos.batteries.data import data
from chaos.batteries.fence import fence
from chaos.batteries.flush import flush
from chaos.batteries.freeze import freeze
from chaos.batteries.loops import loops
from chaos.batteries.machines import machines
from chaos.batteries.outage import outage
from chaos.batteries.patience import patience
from chaos.batteries.poison import poison
from chaos.batteries.replies import replies
from chaos.batteries.restarts import restarts
from chaos.batteries.shards import shards
from chaos.batteries.storm import storm
from chaos.batteries.strays import strays
from chaos.stage import Stage

__all__ = ["BATTERIES", "Battery"]


@dataclass(frozen=True)
class Battery:
    """One of them.

    Attributes:
        run: Plays it; takes the stage, and how large it is.
        title: What it proves, for the table.
        cores: How many it keeps busy.
        short: How large it is in the test suite and with --short.
        of_all: Whether it is one of `all`.
    """

    run: Callable[..., Awaitable[None]]
    title: str
    cores: float = 1.0
    short: Mapping[str, Any] = field(default_factory=dict)
    of_all: bool = True


def soak(stage: Stage) -> Awaitable[None]:
    """The outage, for ten minutes."""
    return outage(stage, seconds=600.0, within=600.0)


BATTERIES: Final[dict[str, Battery]] = {
    "storm": Battery(
        storm,
        "producers, relays, consumers and Redis killed, relays frozen",
        cores=4.0,
        short={"events": 4_000, "lanes": 40, "kills": 2, "pauses": 1},
    ),
    "freeze": Battery(freeze, "Redis frozen", cores=0.5, short={"seconds": (2.0,), "timeout": 1.0}),
    "outage": Battery(outage, "Redis away while a host goes on", short={"seconds": 3.0}),
    "replies": Battery(
        replies,
        "answers of flushes, of reads and of commits that never arrive",
        short={"flushes": 40, "reads": 40, "commits": 40},
    ),
    "machines": Battery(
        machines, "the state machines of the test suite", cores=1.5, short={"outbox": 20, "consumer": 5}
    ),
    "fence": Battery(fence, "a leader frozen in the middle of a batch", cores=0.5, short={"rounds": 2}),
    "poison": Battery(
        poison,
        "events that always fail, and events that kill",
        short={"events": 500, "fails": 50, "kills": 500},
    ),
    "patience": Battery(
        patience,
        "listeners that are slow, and fail at first",
        cores=0.5,
        short={"events": 128, "concurrency": 32, "slow": 1.5},
    ),
    "strays": Battery(
        strays,
        "listeners and hooks that cancel the tasks that run them",
        short={"events": 400, "outages": 2},
    ),
    "loops": Battery(loops, "one broker and one outbox in several event loops", short={"each": 3, "calls": 20}),
    "data": Battery(
        data,
        "data that can't be read or stored",
        short={"events": 200, "damaged": 6, "refused": 6},
    ),
    "clocks": Battery(clocks, "clocks an hour ahead and behind", short={"rounds": 1}),
    "restarts": Battery(restarts, "Redis back from its file with a wrong count", short={"rounds": 2, "events": 100}),
    "flush": Battery(flush, "Redis flushed, its stream or group deleted, or started from an older copy"),
    "cancel": Battery(
        cancel,
        "cancellation at any moment, on each Python",
        cores=4.0,
        short={"many": 100, "versions": ()},
    ),
    "shards": Battery(
        shards,
        "members of a group over shards joined, stopped, killed and frozen",
        cores=4.0,
        short={"shards": 4, "members": (2, 4, 2), "seconds": 14.0, "rate": 200.0, "lanes": 20, "judges_times": False},
        of_all=False,
    ),
    "cluster": Battery(
        cluster,
        "a Redis Cluster whose slots move, and whose masters are replaced, killed and frozen",
        cores=4.0,
        short={"rounds": 1, "rate": 200.0, "flow": 200},
        of_all=False,
    ),
    "soak": Battery(soak, "Redis away for ten minutes", of_all=False),
}
