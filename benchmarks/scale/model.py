"""What a load needs: processes, shards, nodes and memory, added up from the measured points.

    python -m benchmarks.scale.model --rate 10000 --size 1000 --groups 2
    python -m benchmarks.scale.model --table

Every cost is a point of ``points.json``, a line between two of them, or a sum of them. A part is planned to be in use for 60 % at
most; the next limit is the part that is nearest to that.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

from redis.crc import key_slot

from benchmarks.scale.points import MissingPoint, find_point
from silbo.brokers.redis.members import assign
from silbo.cli.rich_output import print_table
from silbo.consumer.consumer import UNACKED
from silbo.shards import MOST_SHARDS, build_shard_address, spread

__all__ = [
    "Costs",
    "Load",
    "Plan",
    "SetUp",
    "above_zero",
    "advise",
    "find_costs",
    "find_uses",
    "hottest",
    "key_shares",
    "make_parser",
    "plan",
    "read_load",
    "shard_shares",
]

FULL: Final = 0.6
"""The share of a core, of a node's memory or of a key's time that is planned for. The rest is for peaks, and for points that differ by a
fifth from run to run; and a key's messages wait for 0.75 times as long as a listener takes then, but 4.5 times at 90 %."""
NODE_MEMORY: Final = 32e9
"""Bytes that a Redis node holds."""
LINK: Final = 1.25e9
"""Bytes a second of a node's network: 10 Gbit."""
KEEPS: Final = {
    "7 days": 7 * 86400.0,
    "1 day": 86400.0,
    '1 hour, `trim="acknowledged"`': 3600.0,
    '10 minutes, `trim="acknowledged"`': 600.0,
}
"""The times that the table chooses of. With `trim="acknowledged"` it is the time for which a group may stand still."""
EVEN: Final = 4
"""Shards for each node and each consumer at least: with fewer, some have much more than others."""
GAIN: Final = 0.99
"""More nodes, consumers or shards have to bring 1 % at least."""
MOST_NODES: Final = 10
"""Nodes above which the table says Kafka. A choice, and no measured point: the page says why."""
SLOTS: Final = 16384


# -- the load and the costs ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Load:
    """The messages that are sent, and what is done with each.

    Attributes:
        rate: Messages a second.
        size: Bytes of the event's own fields.
        groups: Consumer groups that each handle all of them.
        listener: Seconds for which a listener waits for something else, as a database.
        work: Seconds of processor time that a listener takes.
        keys: Keys whose order is kept; 0 if none is.
        skew: Zipf's exponent: the n-th key has a share in proportion to 1 / n ** skew. 0 for equal shares.
        together: Messages that one publishing process sends at once.
        keep: Seconds for which Redis keeps a message; for `advise` 0, if it may choose.
        outbox: True if they go through an outbox in PostgreSQL.
        inbox: True if the groups use a RedisInbox.
    """

    rate: float
    size: int = 1000
    groups: int = 1
    listener: float = 0.001
    work: float = 0.0
    keys: int = 100_000
    skew: float = 0.5
    together: int = 10
    keep: float = 7 * 86400.0
    outbox: bool = False
    inbox: bool = False


@dataclass(frozen=True)
class SetUp:
    """What a load is sent to.

    Attributes:
        shards: 0 for one stream.
        nodes: 1 for one Redis, from 2 on the masters of a cluster.
        consumers: Processes of each group.
    """

    shards: int = 0
    nodes: int = 1
    consumers: int = 1


@dataclass(frozen=True)
class Costs:
    """Microseconds of processor time for each message, and the bytes that it takes in Redis.

    Attributes:
        publisher: In the process that publishes.
        add: In Redis, to add it.
        read: In Redis, for each group.
        consumer: In a consumer of each group, with the listener's work.
        relay: In a relay.
        postgres: In PostgreSQL, to add, take, settle and delete it.
        memory: Bytes.
    """

    publisher: float
    add: float
    read: float
    consumer: float
    relay: float
    postgres: float
    memory: float


def find_costs(load: Load, setup: SetUp) -> Costs:
    """Return the costs of a message, from the measured points.

    Raises:
        MissingPoint: one of them was not measured.
    """

    def point(case: str, what: str) -> float:
        return float(find_point("stream", case)[what])

    def more(case: str, what: str, than: str = "100 bytes") -> float:
        return max(0.0, point(case, what) - point(than, what))

    def of_size(what: str) -> float:
        sizes = (100, 1000, 10_000)
        low, high = sizes[:2] if load.size <= sizes[1] else sizes[1:]
        at_low, at_high = (point(f"{size} bytes", what) for size in (low, high))
        return at_low + (at_high - at_low) * (max(load.size, sizes[0]) - low) / (high - low)

    together = 100 if load.outbox else load.together  # a relay sends full batches

    def to_send(what: str) -> float:
        """A flush is a call for each shard that its messages go to. The cost of both: from flushes of 1 on one stream, and of 10 on 16 shards."""
        of_both = more("alone", what)
        calls = count_calls(10, 16) / 10
        call = (more("16 shards, 10 together", what) - 0.1 * of_both) / (calls - 0.1)
        call = min(max(0.0, call), of_both)
        flushes, calls = 1 / together, count_calls(together, max(1, setup.shards)) / together
        return of_size(what) + (of_both - call) * (flushes - 0.01) + call * (calls - 0.01)

    waits = ", listener that waits" if load.listener else ""
    plain = "listener that waits" if load.listener else "100 bytes"
    publisher, add, read, consumer = to_send("publisher"), to_send("add"), of_size("read"), of_size("consumer")
    read += more(plain, "read")
    consumer += more(plain, "consumer")
    memory = of_size("memory")
    if setup.shards:
        read += more(f"16 shards{waits}", "read", plain)
        consumer += more(f"16 shards{waits}", "consumer", plain)
    if setup.nodes > 1:
        publisher, add, read, consumer = (
            cost + more("16 shards, 3 nodes", what, "16 shards")
            for cost, what in [(publisher, "publisher"), (add, "add"), (read, "read"), (consumer, "consumer")]
        )
    if load.inbox:
        read += more(f"inbox{waits}", "read", plain)
        consumer += more(f"inbox{waits}", "consumer", plain)
        memory += load.groups * point("inbox", "inbox memory")
    relay = postgres = 0.0
    if load.outbox:
        relays = find_point("relays", "1 relays")
        publisher = relays["publisher"]
        relay = relays["relays"]
        postgres = sum(relays[name] for name in ("postgres, to add", "postgres", "postgres, to delete"))
    return Costs(publisher, add, read, consumer + 1e6 * load.work, relay, postgres, memory)


def count_calls(messages: int, shards: int) -> float:
    """Return the mean number of shards that so many messages go to."""
    return shards * (1 - (1 - 1 / shards) ** messages)


# -- the shares of keys, shards, nodes and processes --------------------------------------------------------


@lru_cache
def key_shares(keys: int, skew: float) -> Sequence[float]:
    """Return the share of each key, the hottest first; nothing without keys."""
    weights = [1 / (number + 1) ** skew for number in range(keys)]
    total = sum(weights)
    return [weight / total for weight in weights]


@lru_cache
def shard_shares(keys: int, skew: float, shards: int) -> Sequence[float]:
    """Return the share of each shard: silbo's own placement of the keys ``"0"``, ``"1"`` and so on."""
    if not keys or not shards:
        return [1 / max(1, shards)] * max(1, shards)
    found = [0.0] * shards
    if shards < MOST_SHARDS and MOST_SHARDS % shards == 0:  # hash all keys only once
        for shard, share in enumerate(shard_shares(keys, skew, MOST_SHARDS)):
            found[shard % shards] += share
        return found
    for number, share in enumerate(key_shares(keys, skew)):
        found[spread(str(number), shards)] += share
    return found


@lru_cache
def node_of(shard: int, nodes: int) -> int:
    """Return the node of a shard, where the slots are spread over the nodes as `redis-cli --cluster create` does."""
    return key_slot(f"silbo:{{{build_shard_address('events', shard)}}}".encode()) * nodes // SLOTS


@lru_cache
def members(shards: int, consumers: int) -> dict[int, str]:
    """Return the consumer that leads each shard: silbo's own assignment."""
    return assign([f"consumer-{number}" for number in range(consumers)], shards)


def hottest(shares: Sequence[float], owner_of: Callable[[int], object]) -> float:
    """Return the share of the owner that has most."""
    held: defaultdict[object, float] = defaultdict(float)
    for shard, share in enumerate(shares):
        held[owner_of(shard)] += share
    return max(held.values())


# -- the limits ---------------------------------------------------------------------------------------------

NODE_USES: Final[Sequence[str]] = (
    "a core of a Redis node",
    "the memory of a Redis node",
    "the network of a Redis node",
)
CONSUMER_USES: Final[Sequence[str]] = ("a consumer process", "a consumer's 1,000 messages in hand")
HOT_KEY: Final = "the hottest key, whose messages wait for one another"


def find_uses(load: Load, setup: SetUp) -> dict[str, float]:
    """Return the share in use of each part that has a limit: 1 is all of it."""
    costs = find_costs(load, setup)
    shares = shard_shares(load.keys, load.skew, setup.shards)
    node = hottest(shares, lambda shard: node_of(shard, setup.nodes)) if setup.shards else 1.0
    if setup.shards:
        consumer = hottest(shares, members(setup.shards, setup.consumers).__getitem__)
    else:
        consumer = 1 / setup.consumers
    per_node, per_consumer = load.rate * node, load.rate * consumer
    busy = costs.consumer / 1e6
    of_node = [
        per_node * (costs.add + load.groups * costs.read) / 1e6,
        per_node * load.keep * costs.memory / NODE_MEMORY,
        per_node * costs.memory * (1 + load.groups) / LINK,
    ]
    of_consumer = [per_consumer * busy, per_consumer * (load.listener + busy) / UNACKED]
    uses: dict[str, float] = dict(zip((*NODE_USES, *CONSUMER_USES), (*of_node, *of_consumer), strict=True))
    if load.keys:
        uses[HOT_KEY] = load.rate * key_shares(load.keys, load.skew)[0] * (load.listener + busy)
    return uses


@dataclass(frozen=True)
class Plan:
    """What a load needs.

    Attributes:
        publishers: Processes that publish.
        relays: Processes that relay; 0 without an outbox.
        concurrency: Of each consumer, so that listeners that wait do so side by side.
        memory: Bytes in Redis, without replicas.
        uses: The share in use of each part that has a limit.
    """

    load: Load
    setup: SetUp
    costs: Costs
    publishers: int
    relays: int
    concurrency: int
    memory: float
    uses: dict[str, float]

    @property
    def next_limit(self) -> tuple[str, float]:
        """The part that is full next, and the messages a second at which it is."""
        name = max(self.uses, key=self.uses.__getitem__)
        return name, self.load.rate * FULL / self.uses[name]

    @property
    def fits(self) -> bool:
        """True if no part is above what is planned for."""
        return max(self.uses.values()) <= FULL

    def cores(self) -> dict[str, float]:
        """Return the cores that each sort of process keeps busy, over all of its processes."""
        groups, costs = self.load.groups, self.costs
        each = {"publishers": costs.publisher, "relays": costs.relay, "PostgreSQL": costs.postgres}
        each |= {"Redis": costs.add + groups * costs.read, "consumers": groups * costs.consumer}
        return {name: self.load.rate * cost / 1e6 for name, cost in each.items()}


def plan(load: Load) -> Plan:
    """Return the set-up with the fewest nodes, then shards, in which no part is fuller than planned; or the one that comes nearest.

    Raises:
        MissingPoint: a point that it takes was not measured.
    """

    def worst(setup: SetUp, parts: Sequence[str] = (*NODE_USES, *CONSUMER_USES)) -> float:
        uses = find_uses(load, setup)
        return max(uses[part] for part in parts)

    setups: list[SetUp] = []
    for shards in (0, *(1 << power for power in range(4, MOST_SHARDS.bit_length()))):
        setup = _grow(load, SetUp(shards), "nodes", NODE_USES)
        if worst(setup, NODE_USES) <= FULL:
            setup = _grow(load, setup, "consumers", CONSUMER_USES)
        setups.append(setup)
        if setup.nodes == 1 and worst(setup) <= FULL:
            break
    if enough := [setup for setup in setups if worst(setup) <= FULL]:
        best = min(enough, key=lambda setup: (setup.nodes, setup.shards))
    else:
        best = _grow(load, min(setups, key=lambda setup: worst(setup, NODE_USES)), "consumers", CONSUMER_USES)
    costs = find_costs(load, best)
    in_hand = load.rate * (load.listener + costs.consumer / 1e6) / best.consumers
    return Plan(
        load=load,
        setup=best,
        costs=costs,
        publishers=_count(load.rate * costs.publisher / 1e6),
        relays=_count(load.rate * costs.relay / 1e6) if load.outbox else 0,
        concurrency=min(UNACKED, _count(in_hand)) if load.listener else 1,
        memory=load.rate * load.keep * costs.memory,
        uses=find_uses(load, best),
    )


def _count(busy: float) -> int:
    return max(1, math.ceil(busy / FULL))


def _grow(load: Load, setup: SetUp, what: str, uses: Sequence[str]) -> SetUp:
    """Return the set-up with as many nodes or consumers as those uses take, or as bring something."""

    def share_of(number: int) -> float:
        used = find_uses(load, replace(setup, **{what: number}))
        return max(used[name] for name in uses)

    one_stream = 1 if load.keys or what == "nodes" else 1 << 20
    most = setup.shards // EVEN or one_stream
    number = best = min(most, max(1, math.ceil(share_of(1) / FULL)))  # with even shares it is enough
    least = share = share_of(number)
    while share > FULL and number < most:
        number = min(most, max(number + 1, math.floor(number * min(share / FULL, 1.5))))
        share = share_of(number)
        if share < GAIN * least:
            best, least = number, share
    return replace(setup, **{what: best})


# -- the table of the page ----------------------------------------------------------------------------------

ROWS: Final = (
    Load(rate=1, keep=0),
    Load(rate=1_000, groups=2, keep=0),
    Load(rate=1_000, groups=2, keep=0, outbox=True, inbox=True),
    Load(rate=1_000, groups=2, keep=0, size=10_000),
    Load(rate=10_000, groups=2, keep=0),
    Load(rate=10_000, groups=2),
    Load(rate=50_000, groups=2, keep=0),
    Load(rate=100_000, groups=3, keep=0),
    Load(rate=200_000, groups=3, keep=0, size=100),
)
"""The loads of the table; `keep=0` stands for as long as there is room, and that is no less than 10 minutes."""


def advise(load: Load) -> tuple[str, Plan]:
    """Return how long Redis keeps the messages, and the plan. Without a time it is the longest that takes no further nodes."""
    if load.keep:
        return f"{load.keep / 86400:g} days", plan(load)
    *longer, shortest = KEEPS
    found = plan(replace(load, keep=KEEPS[shortest]))
    for name in longer:
        kept = replace(load, keep=KEEPS[name])
        uses = find_uses(kept, found.setup)
        if max(uses[use] for use in NODE_USES) <= FULL:
            memory = load.rate * kept.keep * found.costs.memory
            return name, replace(found, load=kept, uses=uses, memory=memory)
    return shortest, found


def describe(setup: SetUp) -> str:
    """Return a set-up in words."""
    redis = "one Redis" if setup.nodes == 1 else f"a Redis Cluster of {setup.nodes} nodes"
    return f"{setup.shards} shards on {redis}" if setup.shards else f"one stream on {redis}"


COLUMNS: Final = (
    "messages a second, bytes, groups",
    "use",
    "Redis keeps",
    "publishers, consumers of a group",
    "busy cores: publishers, Redis, consumers",
    "GB in Redis",
    "next limit, at messages a second",
)


def table() -> Iterator[str]:
    """Return the lines of the page's table, in Markdown."""
    yield f"| {' | '.join(COLUMNS)} |"
    yield f"|{'---|' * len(COLUMNS)}"
    for load in ROWS:
        keeps, found = advise(load)
        extras = [("a week to replay", load.keep), ("an outbox in PostgreSQL", load.outbox), ("an inbox", load.inbox)]
        sent = ", ".join([f"{load.rate:,.0f}, {load.size:,}, {load.groups}", *(name for name, used in extras if used)])
        use = describe(found.setup)
        if not found.fits:
            use = "**Kafka**"
        elif found.setup.nodes > MOST_NODES:
            use = f"**Kafka**; it would be {use}"
        relays = f" and {found.relays} relay{'s' * (found.relays > 1)}" if load.outbox else ""
        cores = found.cores()
        busy = ", ".join(_shorten(cores[name]) for name in ("publishers", "Redis", "consumers"))
        limit, at = found.next_limit
        processes = f"{found.publishers}{relays}, {found.setup.consumers}"
        cells = [sent, use, keeps, processes, busy, _shorten(found.memory / 1e9), f"{limit}, {_round(at)}"]
        yield f"| {' | '.join(cells)} |"


def _shorten(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 0.1 else "below 0.1"


def _round(value: float) -> str:
    digits = max(0, len(str(int(value))) - 2)
    return f"{round(value, -digits):,.0f}"


# -- the command --------------------------------------------------------------------------------------------


def above_zero(unit: str, *, zero: bool = False, whole: bool = False) -> Callable[[str], float]:
    """Return a type for an argument: a number above 0, or from 0 on."""

    def read(text: str) -> float:
        try:
            value = int(text.replace(",", "")) if whole else float(text.replace(",", ""))
        except ValueError:
            value = -1
        if not (value >= 0 if zero else value > 0) or value == math.inf:
            kind = "a whole number" if whole else "a number"
            raise argparse.ArgumentTypeError(
                f"give {kind} of {unit}, {'0 or more' if zero else 'above 0'}, not {text!r}"
            )
        return value

    return read


def make_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the arguments that describe a load."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rate", type=above_zero("messages a second"), default=1000.0, help="messages a second (%(default)s)")
    add("--size", type=above_zero("bytes", whole=True), default=1000, help="bytes of the event's fields (%(default)s)")
    add("--groups", type=above_zero("groups", whole=True), default=1, help="consumer groups (%(default)s)")
    add(
        "--listener",
        type=above_zero("milliseconds", zero=True),
        default=1.0,
        help="ms that a listener waits (%(default)s)",
    )
    add(
        "--work",
        type=above_zero("milliseconds", zero=True),
        default=0.0,
        help="ms of a core that a listener takes (%(default)s)",
    )
    add(
        "--keys",
        type=above_zero("keys", zero=True, whole=True),
        default=100_000,
        help="keys; 0: no order (%(default)s)",
    )
    add(
        "--skew",
        type=above_zero("Zipf's exponent", zero=True),
        default=0.5,
        help="Zipf's exponent; 0: all alike (%(default)s)",
    )
    return parser


def read_load(options: argparse.Namespace) -> Load:
    """Return the load that the arguments describe."""
    return Load(
        rate=options.rate,
        size=options.size,
        groups=options.groups,
        listener=options.listener / 1000,
        work=options.work / 1000,
        keys=options.keys,
        skew=options.skew,
    )


def show(keeps: str, found: Plan) -> None:
    """Print a plan as two tables."""
    cores, costs, load, setup = found.cores(), found.costs, found.load, found.setup
    print(f"{load.rate:,.0f} messages a second: {describe(setup)}, {found.memory / 1e9:,.2f} GB, kept for {keeps}\n")
    parts = [("publishers", f"{found.publishers}", costs.publisher)]
    if load.outbox:
        parts += [("relays", f"{found.relays}", costs.relay), ("PostgreSQL", "", costs.postgres)]
    parts.append(("Redis", f"{setup.nodes}", costs.add + load.groups * costs.read))
    parts.append(("consumers", f"{load.groups} x {setup.consumers}, concurrency={found.concurrency}", costs.consumer))
    rows = [(name, processes, f"{cores[name]:.2f}", f"{cost:.1f}") for name, processes, cost in parts]
    print_table(("part", "processes", "busy cores", "us a message"), rows, numbers=("busy cores", "us a message"))
    limits = [
        (name, f"{share:.1%}", _round(load.rate * FULL / share) if share else "")
        for name, share in sorted(found.uses.items(), key=lambda use: -use[1])
    ]
    columns = ("part", "in use", f"{FULL:.0%} at messages a second")
    print()
    print_table(columns, limits, numbers=columns[1:])
    if not found.fits:
        name, at = found.next_limit
        print(f"\nNo set-up carries this: {name}, at {_round(at)} messages a second. {_remedy(name)}")


def _remedy(name: str) -> str:
    if name == HOT_KEY:
        return "Make the listener faster, or give that key's messages finer keys."
    return "Send less, keep it for a shorter time, or leave Redis for Kafka: docs/explanation/scale.md."


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the arguments, and print what is needed."""
    parser = make_parser("python -m benchmarks.scale.model", __doc__)
    add = parser.add_argument
    add(
        "--together",
        type=above_zero("messages", whole=True),
        default=10,
        help="messages published at once (%(default)s)",
    )
    add(
        "--keep",
        type=above_zero("days"),
        default=0.0,
        help="days that Redis keeps a message (as long as there is room)",
    )
    add("--outbox", action="store_true", help="through an outbox in PostgreSQL")
    add("--inbox", action="store_true", help="with a RedisInbox in each group")
    add("--table", action="store_true", help="print the table of docs/explanation/scale.md instead")
    options = parser.parse_args(arguments)
    try:
        if options.table:
            print("\n".join(table()))
            return 0
        load = replace(
            read_load(options),
            together=options.together,
            keep=options.keep * 86400,
            outbox=options.outbox,
            inbox=options.inbox,
        )
        keeps, found = advise(load)
    except MissingPoint as error:
        print(error, file=sys.stderr)
        return 1
    show(keeps, found)
    return 0 if found.fits else 1


if __name__ == "__main__":
    sys.exit(main())
