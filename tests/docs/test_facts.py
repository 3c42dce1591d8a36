"""What a page repeats from the code is what the code says."""

from __future__ import annotations

import ast
import configparser
import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import silbo
from chaos.batteries import BATTERIES
from silbo import Budget, Consumer, Outbox, Plugins, Quota, Relay, _host_code, bridge
from silbo.brokers import _sender
from silbo.brokers.memory import MemoryBroker
from silbo.brokers.redis import (
    RedisInbox,
    RedisPubSub,
    RedisStreams,
    in_hand,
    read_size,
    retention,
    sharded_group,
    streams,
)
from silbo.cli.main import make_parser
from silbo.consumer import consumer
from silbo.dispatch import extension_points, in_thread
from silbo.instrumentation import opentelemetry
from silbo.names import MAX_NAME_LENGTH
from silbo.shards import MOST_SHARDS
from silbo.stores.sqlalchemy import SQLAlchemyInbox, store
from silbo.stores.sqlite import connection
from silbo.wire import encode
from silbo.work import unit_of_work
from tests.support.redis_streams import ACL
from tests.support.source import parse_source

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_on_redis_has_the_users_that_the_tests_are_run_as() -> None:
    """Whoever copies the line from the page gets a user that silbo can work as, and no more."""
    lines = ROOT.joinpath("docs/howto/redis.md").read_text().splitlines()
    assert len(ACL) == 3
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


CALLS: dict[str, Callable[..., Any]] = {
    **{
        each.__name__: each
        for each in (Quota, Outbox, Consumer, Plugins, RedisStreams, RedisPubSub, RedisInbox, MemoryBroker)
    },
    "SQLAlchemyInbox": SQLAlchemyInbox,
    "in_thread": silbo.in_thread,
}
CONSTANTS = {
    "`RedisStreams(retain=)`": retention.WEEK,  # where no policy is given
    "a lock of an SQLite file": connection.LOCK_TIMEOUT,
    "a transaction of `SQLAlchemyStore`": store.TIMEOUT,
    "messages that wait to be sent": _sender.QUEUE_MESSAGES,
    "bytes of these messages": _sender.QUEUE_BYTES,
    "dead letters": in_hand.DEAD_FOR / 1000,
    "shards of an address": MOST_SHARDS,
    "counts of attempts": in_hand.ATTEMPTS_FOR / 1000,
    "`claim_after` of a group": streams.CLAIM_AFTER,
    "`claim_after` at an address with shards": sharded_group.LEASE,
    "unacknowledged deliveries": consumer.UNACKED,
    "the time between two trims by a publisher, under a policy that trims": retention.TRIM_EVERY,
    "the bytes of a publisher between two trims": retention.TRIM_BYTES,
    'the silence of a group\'s consumers, under `trim="acknowledged"`': retention.DESERTED_AFTER,
    "the messages of one read of a Streams consumer, or one page of dead letters": read_size.READ_BYTES,
    "listeners that a stop has cancelled": _host_code.ENDS_WITHIN,
    "a message": encode.MAX_SIZE,
    "levels of its payload": encode.MAX_DEPTH,
    "characters of an event name": MAX_NAME_LENGTH,
    "characters of `traceparent` or `tracestate`": opentelemetry.LONGEST,
    "characters of the header `baggage`": opentelemetry.LONGEST_BAGGAGE,
    "a pause before an attempt that stays in the sender's trace": opentelemetry.LATE,
    "unknown names that a dispatcher warns of": extension_points.MOST_TOLD,
    "an idle thread of `in_thread`": in_thread.IDLE_FOR,
    "`in_thread(max_threads=)`": in_thread.MAX_THREADS,
    "`Budget(threads=)`, of all `in_thread` listeners of a plugin": Budget().threads,
    "a run that waits for a thread of `in_thread`": in_thread.REPORT_AFTER,
    "unsent messages with `Bridge(wait=False)`": bridge.UNSENT_LIMIT,
    "events that come of other events, in one unit of work": unit_of_work.MAX_FOLLOW_UPS,
}
UNITS = {"s": 1, "hour": 3600, "day": 86400, "days": 86400, "MiB": 1 << 20, "GiB": 1 << 30}


def default(call: Callable[..., Any], name: str) -> Any:
    return inspect.signature(call).parameters[name].default


def test_limits_are_those_of_the_code() -> None:
    """The page on which a user looks up what a program will meet; none of its values is a memory of an older version."""
    text = ROOT.joinpath("docs/reference/limits.md").read_text()
    said = {}
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        for limit, value, past in rows(table):
            number, _, of = value.partition(" ")
            assert limit not in said and past
            said[limit] = float(number.replace(",", "")) * UNITS.get(of, 1)
            assert not of or of in UNITS, value
    there: dict[str, float] = dict(CONSTANTS)
    for limit in said.keys() - CONSTANTS.keys():
        parameter = re.fullmatch(r"`([\w.]+)\((\w+)=\)`", limit)
        assert parameter, f"{limit}: neither a parameter nor one of the constants"
        there[limit] = default(CALLS[parameter[1]], parameter[2])
    assert said == there
    assert len(said) > len(CONSTANTS) + 10


def test_outbox_and_relays_have_the_same_defaults() -> None:
    """As the page on limits says: the outbox's own relay, one of the host's, and `silbo relay`."""
    command = make_parser().parse_args(["relay"])
    for name in ("keep_sent", "lease", "drain"):
        assert default(Outbox, name) == default(Relay, name) == getattr(command, name)
    assert command.retain == default(RedisStreams, "retain")


PUBLIC = [
    "silbo",
    *(f"silbo.brokers.{name}" for name in ("memory", "redis", "kafka", "rabbitmq", "azure")),
    *(f"silbo.stores.{name}" for name in ("memory", "sqlite", "sqlalchemy")),
    "silbo.instrumentation.opentelemetry",
    "silbo.testing",
    "silbo.web",
    *(f"silbo.containers.{name}" for name in ("rodi", "di", "dependency_injector", "dishka")),
]


def attribute(name: str) -> Any:
    """Return the object that a full name stands for."""
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last)


def test_reference_has_every_public_name() -> None:
    """What a program imports can be looked up: by its own directive, or with all of its module."""
    modules, names = set[str](), set[str]()
    for path in ROOT.joinpath("docs/reference").glob("*.md"):
        text = path.read_text()
        current = re.search(r"^\.\. py:currentmodule:: ([\w.]+)$", text, re.MULTILINE)
        for name in re.findall(r"^\.\. (?:auto(?!module)\w+|(?:py:)?(?:data|class)):: ([\w.]+)$", text, re.MULTILINE):
            names.add(name if "." in name or not current else f"{current[1]}.{name}")
        for module, members in re.findall(r"^\.\. automodule:: ([\w.]+)\n   :members:(.*)$", text, re.MULTILINE):
            modules.add(module)
            wanted = members.replace(",", " ").split() or importlib.import_module(module).__all__
            names |= {f"{module}.{member}" for member in wanted}
    documented = {id(attribute(name)) for name in names}  # silbo.Publisher is silbo.protocols.Publisher
    for module in PUBLIC:
        for name in set(importlib.import_module(module).__all__) - {"__version__"}:
            full = f"{module}.{name}"
            assert full in modules or id(attribute(full)) in documented, full


def test_page_on_the_house_names_the_layers_and_files_that_exist() -> None:
    """A newcomer finds the file that a change needs, and the layer it stands in."""
    text = ROOT.joinpath("docs/explanation/house.md").read_text()
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    layers = config["importlinter:contract:layers"]["layers"].strip().splitlines()
    shown = text.partition("```\n")[2].partition("```")[0].splitlines()
    assert [line.partition("  ")[0] for line in shown] == layers
    _, _, table = text.partition("| you want to change | open |")
    named = re.findall(r"`([\w/]+\.py)`", table)
    assert len(named) > 10
    for name in named:
        assert ROOT.joinpath("silbo", name).is_file() or ROOT.joinpath(name).is_file(), name


TOLD_BY = {
    "consumer.consumer": tuple(f"consumer.{file}" for file in ("consumer", "reports", "acknowledgements", "attempts"))
}
"""Modules that write to the logger of one of them."""


def logged(module: str) -> tuple[set[str], set[str]]:
    """The levels and the fields of what a module logs, as its text has them."""
    levels, fields = set[str](), set[str]()
    nodes = [*ast.walk(parse_source(ROOT.joinpath(f"silbo/{module}.py").read_text()))]
    tables = [
        node.value for node in nodes if isinstance(node, ast.Attribute | ast.Subscript)
    ]  # {...}.get(), {...}[name]
    for node in nodes:
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "logging" and node.attr.isupper():
            levels.add(node.attr)
        elif isinstance(node, ast.Dict) and node not in tables:  # extra={...}
            fields |= {key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}
        elif isinstance(node, ast.Call):
            owner, _, called = ast.unparse(node.func).rpartition(".")
            if called in {"info", "warning", "error", "exception"} and owner.endswith("logger"):
                levels.add("ERROR" if called == "exception" else called.upper())
            elif called in {"_report", "write", "Outage", "_end"}:  # that take the fields as keywords
                fields |= {keyword.arg for keyword in node.keywords if keyword.arg} - {"level"}
                if called != "_end":
                    levels.add("WARNING")
                if called == "Outage":
                    fields.add("seconds")
    return levels, fields


def test_log_has_the_fields_that_the_page_names() -> None:
    """What an operator's formatter and alarms are built on: each logger's fields, neither more nor fewer."""
    text = ROOT.joinpath("docs/howto/observe.md").read_text()
    table = text.partition("<!-- log -->\n")[2].partition("<!-- /log -->")[0]
    levels: dict[str, set[str]] = {}
    fields: dict[str, set[str]] = {}
    logger = ""
    for name, level, _, named in rows(table):
        logger = name.strip("`") or logger
        levels.setdefault(logger, set()).add(level.split("`")[1])
        fields.setdefault(logger, set()).update(re.findall(r"`(\w+)`", named))
    writing = {
        ".".join(path.relative_to(ROOT / "silbo").with_suffix("").parts)
        for path in ROOT.joinpath("silbo").rglob("*.py")
        if "getLogger(__name__)" in path.read_text()
    }
    assert set(fields) == {module for module in writing if not module.startswith("cli.")}, (
        "the command line's own lines are its pages'"
    )
    for logger in fields:
        found = [logged(module.replace(".", "/")) for module in TOLD_BY.get(logger, (logger,))]
        assert levels[logger] == set[str]().union(*(those for those, _ in found)), logger
        assert fields[logger] == set[str]().union(*(those for _, those in found)), logger
