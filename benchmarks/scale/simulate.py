"""Shards, nodes and consumers beyond this machine, with keys of which some are hotter than others: discrete events, seeded.

    python -m benchmarks.scale.simulate --rate 20000 --skew 0.5,1 --shards 0,16,64 --consumers 8

Messages come at random moments (Poisson), each with a key (Zipf). A node works one call after another; so does a consumer with its
processor. A consumer's listeners wait side by side, those of one key one after another. Where a key goes, where a shard lies and who
leads it is silbo's own code; what each step takes are the measured points.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import accumulate, product
from typing import Final

from benchmarks.scale.model import (
    FULL,
    Load,
    SetUp,
    above_zero,
    advise,
    find_costs,
    key_shares,
    make_parser,
    members,
    node_of,
    read_load,
)
from benchmarks.scale.points import MissingPoint, find_point
from silbo.cli.rich_output import print_table
from silbo.consumer.consumer import UNACKED
from silbo.shards import MOST_SHARDS, spread

__all__ = ["Result", "find_percentiles", "make_arrivals", "simulate"]

CONCURRENCY: Final = 100
SEED: Final = 1
MESSAGES: Final = 50_000


@dataclass(frozen=True, kw_only=True)
class Result:
    """One simulated run.

    Attributes:
        p50: Median milliseconds from the publish to the end of the listener.
        p99: Their 99th percentile.
        grows: True if messages came faster than they were handled: the latencies have no meaning then but that.
        shard: The share of the messages that the hottest shard had.
        node: The share of its time for which the busiest node's core worked.
        consumer: The same of the busiest consumer process.
        key: The share of the time for which the busiest key had a message in work.
    """

    p50: float
    p99: float
    grows: bool
    shard: float
    node: float
    consumer: float
    key: float


def make_arrivals(load: Load, messages: int, seed: int) -> Iterator[tuple[float, int]]:
    """Return the second and the key of each message; without keys, each has one of its own."""
    dice = random.Random(seed)
    now = 0.0
    weights = list(accumulate(key_shares(load.keys, load.skew)))
    keys = dice.choices(range(load.keys), cum_weights=weights, k=messages) if load.keys else range(messages)
    for key in keys:
        now += dice.expovariate(load.rate)
        yield now, key


def simulate(
    load: Load, setup: SetUp, *, messages: int = MESSAGES, seed: int = SEED, concurrency: int = CONCURRENCY
) -> Result:
    """Send messages through nodes and the consumers of one group; the other groups' reads are the nodes' work, too.

    Raises:
        MissingPoint: a cost that it takes was not measured.
    """
    costs = find_costs(load, setup)
    on_node, until_read = (1e-6 * (costs.add + reads * costs.read) for reads in (load.groups, 1))
    lead = members(setup.shards, setup.consumers) if setup.shards else {}
    spreads = random.Random(seed)
    free: defaultdict[int, float] = defaultdict(float)
    queues: defaultdict[object, list[tuple[float, float, int]]] = defaultdict(list)
    on_shard: defaultdict[int, int] = defaultdict(int)
    on_nodes: defaultdict[int, int] = defaultdict(int)
    last = 0.0
    for at, key in make_arrivals(load, messages, seed):
        shard = spread(str(key), setup.shards) if setup.shards else 0
        node = node_of(shard, setup.nodes) if setup.shards else 0
        begins = max(at, free[node])
        free[node] = begins + on_node
        queues[lead.get(shard) if setup.shards else spreads.randrange(setup.consumers)].append(
            (begins + until_read, at, key)
        )
        on_shard[shard] += 1
        on_nodes[node] += 1
        last = at
    way = find_point("stream", "trickle")["latency"]
    busy = 1e-6 * costs.consumer
    found = [consume(each, busy, load.listener, concurrency) for each in queues.values()]
    taken = [latency for latencies, _ in found for latency in latencies]
    end = max(ended for _, ended in found)
    on_key: defaultdict[int, int] = defaultdict(int)
    for each in queues.values():
        for _, _, key in each:
            on_key[key] += 1
    p50, p99 = find_percentiles([way + 1000 * each for each in taken])
    # Of a queue that grows, the end comes later than the last message by a part of the whole time.
    grows = end - last > 0.05 * last + 10 * load.listener or max(free.values()) - last > 0.05 * last
    return Result(
        p50=p50,
        p99=p99,
        grows=grows,
        shard=max(on_shard.values()) / messages,
        node=max(on_nodes.values()) * on_node / last,
        consumer=max(len(each) for each in queues.values()) * busy / last,
        key=max(on_key.values()) * (load.listener + busy) / last,
    )


def consume(
    queue: Sequence[tuple[float, float, int]], busy: float, waits: float, concurrency: int
) -> tuple[list[float], float]:
    """Handle the messages of one consumer.

    Args:
        queue: When each is there to be read, when it was published, and its key; in order.
        busy: Seconds of the processor for each.
        waits: Seconds for which its listener waits afterwards.
        concurrency: Listeners side by side.

    Returns:
        The seconds from the publish to the end of each listener, and when the last ended.
    """
    behind: dict[int, deque[int]] = {}  # of each key in work, the messages behind
    ready: deque[int] = deque()  # their key is free, and no worker is
    ends: list[tuple[float, int]] = []
    latencies: list[float] = []
    processor = now = 0.0
    read = in_hand = 0
    while len(latencies) < len(queue):
        # The next thing that happens: a message is read, or a listener ends.
        if read < len(queue) and in_hand < UNACKED and (not ends or max(now, queue[read][0]) <= ends[0][0]):
            now = max(now, queue[read][0])
            key = queue[read][2]
            in_hand += 1
            if key in behind:
                behind[key].append(read)
            else:
                behind[key] = deque()
                ready.append(read)
            read += 1
        else:
            now, ended = heappop(ends)
            _, published, key = queue[ended]
            latencies.append(now - published)
            in_hand -= 1
            if behind[key]:
                ready.append(behind[key].popleft())
            else:
                del behind[key]
        while ready and len(ends) < concurrency:
            processor = max(now, processor) + busy
            heappush(ends, (processor + waits, ready.popleft()))
    return latencies, now


def find_percentiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the median and the 99th percentile."""
    ordered = sorted(values)
    return statistics.median(ordered), ordered[int(0.99 * (len(ordered) - 1))]


# -- the command --------------------------------------------------------------------------------------------

COLUMNS: Final = (
    "messages a second",
    "skew",
    "shards",
    "nodes",
    "consumers",
    "hottest shard",
    "busiest node",
    "busiest consumer",
    "hottest key",
    "p50",
    "p99",
)
PAGE: Final = tuple(
    (Load(rate=rate, groups=2, listener=0.002, skew=skew), setup)
    for rate, skew, setup in [
        *(
            (10_000, skew, SetUp(*setup))
            for skew in (0.5, 0.8, 1.0)
            for setup in [(), (16, 1, 4), (64, 1, 4), (64, 1, 16)]
        ),
        *((40_000, 0.5, SetUp(shards, nodes, 16)) for shards, nodes in [(64, 4), (64, 8), (64, 16), (256, 16)]),
    ]
)
"""The rows of the page."""


def row(load: Load, setup: SetUp, result: Result) -> list[str]:
    """Return the cells of one run."""
    loads = [f"{share:.0%}" for share in (result.shard, result.node, result.consumer, result.key)]
    times = ["grows", "grows"] if result.grows else [f"{result.p50:.1f} ms", f"{result.p99:.1f} ms"]
    shards = str(setup.shards) if setup.shards else "one stream"
    return [f"{load.rate:,.0f}", f"{load.skew:g}", shards, str(setup.nodes), str(setup.consumers), *loads, *times]


def table() -> Iterator[str]:
    """Return the lines of the page's table, in Markdown."""
    yield f"| {' | '.join(COLUMNS)} |"
    yield f"|{'---|' * len(COLUMNS)}"
    for load, setup in PAGE:
        yield f"| {' | '.join(row(load, setup, simulate(load, setup)))} |"


def several(read: Callable[[str], float]) -> Callable[[str], list[float]]:
    """Return a type for an argument with several values, as ``0,16,64``."""
    return lambda text: [read(part) for part in text.split(",")]


def read_shards(text: str) -> int:
    """Return a number of shards; 0 for one stream."""
    if not text.isdecimal() or int(text) == 1 or int(text) > MOST_SHARDS:
        raise argparse.ArgumentTypeError(f"give 0 for one stream, or 2 to {MOST_SHARDS} shards, not {text!r}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the arguments, simulate, and print a row for each skew and number of shards."""
    parser = make_parser("python -m benchmarks.scale.simulate", __doc__)
    add = parser.add_argument
    skew = next(action for action in parser._actions if action.dest == "skew")
    skew.type, skew.default, skew.help = several(above_zero("Zipf's exponent", zero=True)), [0.5], "as 0,0.5,1 (0.5)"
    add("--shards", type=several(read_shards), help="as 0,16,64; 0 is one stream (by default what the model says)")
    add("--nodes", type=above_zero("nodes", whole=True), help="masters of a cluster; 1 is one Redis (the model's)")
    add("--consumers", type=above_zero("processes", whole=True), help="of each group (the model's)")
    add("--concurrency", type=above_zero("listeners", whole=True), default=CONCURRENCY, help="(%(default)s)")
    add("--messages", type=above_zero("messages", whole=True), default=MESSAGES, help="in each run (%(default)s)")
    add("--seed", type=int, default=SEED, help="(%(default)s)")
    add("--table", action="store_true", help="print the table of docs/explanation/scale.md instead")
    options = parser.parse_args(arguments)
    try:
        if options.table:
            print("\n".join(table()))
            return 0
        skews, options.skew = options.skew, 0.0
        found = []
        for skew_, shards in product(skews, options.shards or [None]):
            load = replace(read_load(options), skew=skew_)
            setup = advise(replace(load, keep=0))[1].setup
            if shards is not None:
                setup = replace(setup, shards=shards)
            setup = replace(setup, nodes=options.nodes or setup.nodes, consumers=options.consumers or setup.consumers)
            if problem := find_problem(load, setup):
                parser.error(problem)
            result = simulate(
                load, setup, messages=options.messages, seed=options.seed, concurrency=options.concurrency
            )
            found.append(row(load, setup, result))
    except MissingPoint as error:
        print(error, file=sys.stderr)
        return 1
    print_table(COLUMNS, found, numbers=COLUMNS)
    print(f"\nThe model plans for {FULL:.0%} at most. `grows`: messages come faster than they are handled.")
    return 0


def find_problem(load: Load, setup: SetUp) -> str:
    """Return what no such set-up can do, and what to do instead; empty if it can."""
    if not setup.shards and setup.nodes > 1:
        return "one stream lies on one node: give --shards as many as there are nodes, better 4 times as many"
    if not setup.shards and setup.consumers > 1 and load.keys:
        return "on one stream the order of keys needs --consumers 1: give --shards, or --keys 0 where no order matters"
    if setup.shards and setup.consumers > setup.shards:
        return f"of {setup.consumers} consumers only {setup.shards} would lead a shard: give more --shards, or fewer --consumers"
    return ""


if __name__ == "__main__":
    sys.exit(main())
