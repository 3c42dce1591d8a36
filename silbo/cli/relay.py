"""``silbo relay``: its arguments, and running a relay until a signal comes."""

from __future__ import annotations

import argparse
import asyncio
import logging
from dataclasses import asdict

from silbo.brokers.redis import RedisStreams
from silbo.brokers.redis.connection import describe_server
from silbo.brokers.redis.retention import NOT_GIVEN
from silbo.brokers.redis.streams import DEFAULT_ADDRESS, build_stream_key
from silbo.cli.arguments import (
    FORMATS,
    Commands,
    add_command,
    add_figures_option,
    add_format_option,
    add_redis_options,
    add_store_option,
    parse_address,
    parse_positive_seconds,
    parse_retention,
    parse_seconds,
)
from silbo.cli.connect import make_redis, make_store, refuse_node
from silbo.cli.health import HEALTH, add_health_options, check_health_options, showing_health
from silbo.cli.log import log_figures, log_to_stderr
from silbo.cli.metrics import add_metrics_option, showing_metrics
from silbo.cli.signals import stop_at_signals
from silbo.outbox.relay import Relay

__all__ = ["add_to"]

logger = logging.getLogger(__name__)

EPILOG = f"""\
The relay runs until SIGTERM or Ctrl-C, then sends what still waits, for --drain at most, and
exits with 0. A kill -9 loses nothing. Any number of relays may run on one store: one leads each
partition, the others stand by. In PostgreSQL they divide several partitions evenly.

{HEALTH}
examples:
  silbo relay --store /var/lib/shop/outbox.db --redis redis://localhost
  silbo relay --store postgresql+asyncpg://shop@db/shop --redis rediss://redis:6380 --figures 1m
"""


def add_to(commands: Commands) -> None:
    """Add ``silbo relay`` to the commands."""
    parser = add_command(commands, "relay", "send what is in an outbox to Redis Streams", epilog=EPILOG, run=run_relay)
    add_store_option(parser)
    add_redis_options(parser)
    parser.add_argument(
        "--app",
        metavar="PROGRAM",
        type=parse_address,
        default="relay",
        help="the program's name, in health and metrics, and for messages that carry none (relay)",
    )
    add_format_option(parser)
    parser.add_argument(
        "--retain",
        metavar="TIME",
        type=parse_retention,
        default=NOT_GIVEN,
        help="how long Redis keeps an entry of a stream, or forever (as the policy beside the stream; 7d)",
    )
    parser.add_argument(
        "--keep-sent",
        metavar="TIME",
        type=parse_seconds,
        default=3600.0,
        help="how long sent rows are kept for a replay (1h)",
    )
    parser.add_argument(
        "--lease",
        metavar="TIME",
        type=parse_positive_seconds,
        default=10.0,
        help="after how long another relay takes over (10s)",
    )
    parser.add_argument(
        "--drain",
        metavar="TIME",
        type=parse_seconds,
        default=5.0,
        help="after a stop, how long it still sends what waits (5s)",
    )
    parser.add_argument(
        "--notify",
        action="store_true",
        help="hear of each commit at once, if the programs store with notify=True (PostgreSQL)",
    )
    add_figures_option(parser)
    add_health_options(parser)
    add_metrics_option(parser)


async def run_relay(options: argparse.Namespace) -> int:
    """Send what is in the outbox until SIGTERM or SIGINT."""
    check_health_options(options)
    log_to_stderr()
    async with make_store(options.store, notify=options.notify) as store, make_redis(options) as client:
        streams = RedisStreams(
            client,
            app=options.app,
            prefix=options.prefix,
            format=FORMATS[options.format],
            retain=options.retain,
        )
        relay = Relay(store, streams, keep_sent=options.keep_sent, lease=options.lease, drain=options.drain)
        await refuse_node(client)
        with stop_at_signals(relay.stop):
            async with relay:
                stream = build_stream_key(DEFAULT_ADDRESS, options.prefix)  # a user who forgot --prefix sees it here
                to = {"broker": describe_server(client), "stream": stream, "format": options.format}
                logger.info("relay started", extra={"partitions": store.partitions, **to})
                figures = asyncio.create_task(log_figures(logger, "relay", relay.stats, options.figures))
                async with showing_metrics(options, [relay]), showing_health(options, [relay]):
                    await relay.run()
                figures.cancel()
        logger.info("relay stopped", extra=asdict(relay.stats))
    return 0
