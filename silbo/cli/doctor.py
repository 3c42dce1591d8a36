"""``silbo doctor``: its arguments, and showing what endangers a promise."""

from __future__ import annotations

import argparse
import os
import re
import sys
from contextlib import AsyncExitStack
from shlex import quote
from typing import Final
from urllib.parse import parse_qs, unquote, urlsplit

from silbo._control_characters import escape_controls
from silbo.cli.arguments import (
    Commands,
    add_command,
    add_json_option,
    add_redis_options,
    add_store_option,
    add_stream_option,
    parse_retention,
)
from silbo.cli.connect import make_redis, open_store
from silbo.cli.groups import add_silent_option
from silbo.cli.output import print_as_it_is, print_json, print_line, print_note
from silbo.operations.doctor import Finding, examine
from silbo.operations.formatting import format_count

__all__ = ["add_to", "build_option", "build_redis_cli", "build_redis_options"]

COLOURS: Final = {"ok": "32", "note": "33", "danger": "31"}
"""The colours of the levels, as terminals number them."""

EPILOG = """\
Examines Redis (version, persistence, eviction, memory, replicas, latency, clocks, rights), each
stream with its groups, and with --store the outbox. It writes nothing.
Give it the URL that the programs have: the rights are those of its user.

ok      as it should be
note    worth knowing, or could not be looked at
danger  a promise of silbo's can't be kept; the line below it mends that

Exit code 1 if there is a danger.

examples:
  silbo doctor --redis redis://localhost
  silbo doctor --prefix shop --store outbox.db
  silbo doctor --json | jq -c 'select(.level == "danger")'
"""


def add_to(commands: Commands) -> None:
    """Add ``silbo doctor`` to the commands."""
    parser = add_command(
        commands, "doctor", "what endangers a promise, and the line that mends it", epilog=EPILOG, run=show_findings
    )
    add_redis_options(parser)
    add_store_option(parser)
    add_stream_option(parser)
    parser.add_argument(
        "--retain",
        metavar="TIME",
        type=parse_retention,
        default=7 * 86400.0,
        help="how long the programs let Redis keep an entry of a stream, or forever (7d)",
    )
    add_silent_option(parser)
    add_json_option(parser, "one JSON object for each finding")


async def show_findings(options: argparse.Namespace) -> int:
    """Print the findings as they come; 1 if one of them is a danger."""
    dangers = 0
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(make_redis(options))
        store = await stack.enter_async_context(open_store(options.store)) if options.store else None
        async for finding in examine(
            client,
            store=store,
            prefix=options.prefix,
            stream=options.stream,
            retain=options.retain,
            silent_after=options.silent_after,
            redis_cli=build_redis_cli(options.redis, options),
            redis_options=build_redis_options(options.redis, options),
            store_options=build_option("--store", options.store, "SILBO_STORE"),
        ):
            dangers += finding.level == "danger"
            if options.json:
                print_json({"check": finding.check, "level": finding.level, "text": finding.text, "mend": finding.mend})
            else:
                _print_finding(finding)
    if not options.json:
        print_note("")
        print_note(format_count(dangers, "danger") if dangers else "no danger")
    return 1 if dangers else 0


def build_redis_cli(url: str, options: argparse.Namespace) -> str:
    """Return ``redis-cli`` with the server's address, for a shell; without the password, which is asked for, or in the environment.

    Args:
        url: The URL of ``--redis``, which is a valid one.
        options: The others of ``add_redis_options``.
    """
    parts = urlsplit(url)
    query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    words = ["redis-cli", *(["-c"] if options.cluster else [])]
    if parts.scheme != "unix" and not query and url == os.environ.get("SILBO_REDIS_URL"):
        words += ["-u", '"$SILBO_REDIS_URL"']
    else:
        if parts.scheme == "unix":  # redis-cli -u takes no such URL
            words += ["-s", quote(unquote(parts.path))]
        else:
            words += ["-u", quote(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}")]
        if "db" in query:
            words += ["-n", quote(query["db"])]
        user, password = query.get("username", parts.username), query.get("password", parts.password)
        if user and password:
            words += ["--user", quote(unquote(user))]
        if password:
            words.append("--askpass")
    if options.cacert:
        words += ["--cacert", quote(options.cacert)]
    if options.cert:
        words += ["--cert", quote(options.cert), "--key", quote(options.cert)]
    return " ".join(words)


def build_redis_options(url: str, options: argparse.Namespace) -> str:
    """Return the options that name the server for another command of silbo, for a shell; a space before each."""
    words = build_option("--redis", url, "SILBO_REDIS_URL")
    if options.cluster and os.environ.get("SILBO_CLUSTER", "0") in ("", "0"):
        words += " --cluster"
    for name, path in (("--cacert", options.cacert), ("--cert", options.cert)):
        words += f" {name} {quote(path)}" if path else ""
    return words


def build_option(name: str, url: str | None, variable: str) -> str:
    """Return an option with its URL or path, ``...`` for the password; nothing where the environment has it."""
    if not url or url == os.environ.get(variable):
        return ""
    hidden = re.sub(r"(://[^/:@]*:).*@", r"\1...@", url)
    hidden = re.sub(r"(password=)[^&]*", r"\1...", hidden)
    return f" {name} {quote(hidden)}"


def _print_finding(finding: Finding) -> None:
    level = f"{finding.level:6}"
    if _has_colours():
        level = f"\x1b[{COLOURS[finding.level]}m{level}\x1b[0m"
    print_as_it_is(f"{level}  {escape_controls(f'{finding.check}: {finding.text}')}")
    for line in (finding.mend or "").split("\n"):
        if line:
            print_line(f"        {line}")


def _has_colours() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
