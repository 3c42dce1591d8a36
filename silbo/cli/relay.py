"""``silbo relay``."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict

from silbo.brokers.redis import RedisStreams
from silbo.brokers.redis.connection import describe_server
from silbo.brokers.redis.streams import DEFAULT_ADDRESS, build_stream_key
from silbo.cli.arguments import (
    FORMATS,
    Commands,
    address,
    command,
    format_option,
    redis_options,
    seconds,
    some_seconds,
    store_option,
)
from silbo.cli.connect import redis_at, store_at
from silbo.cli.log import log_to_stderr
from silbo.outbox.relay import Relay, RelayStats

__all__ = ["add_to"]

logger = logging.getLogger(__name__)

EPILOG = """\
It runs until SIGTERM or Ctrl-C, then sends what waits, for --drain seconds at most,
and exits with 0. A kill -9 loses nothing. Any number may run on one store: of each partition
one leads, the others stand by.

examples:
  silbo relay --store /var/lib/shop/outbox.db --redis redis://localhost
  silbo relay --store postgresql+asyncpg://shop@db/shop --redis rediss://redis:6380 --figures 1m
"""


def add_to(commands: Commands) -> None:
    """Tell the parser."""
    parser = command(commands, "relay", "send what is in an outbox to Redis Streams", epilog=EPILOG, run=relay)
    store_option(parser)
    redis_options(parser)
    parser.add_argument(
        "--app", type=address, default="relay", help="the program's name, for messages that carry none (relay)"
    )
    format_option(parser)
    parser.add_argument(
        "--stream-retain",
        metavar="TIME",
        type=_forever_or_seconds,
        default=7 * 86400.0,
        help="how long Redis keeps an entry of a stream, or forever (7d)",
    )
    parser.add_argument(
        "--retain", metavar="TIME", type=seconds, default=3600.0, help="how long sent rows are kept for a replay (1h)"
    )
    parser.add_argument(
        "--lease", metavar="TIME", type=some_seconds, default=10.0, help="after how long another relay takes over (10s)"
    )
    parser.add_argument(
        "--drain", metavar="TIME", type=seconds, default=5.0, help="how long a stop still sends what waits (5s)"
    )
    parser.add_argument(
        "--figures", metavar="TIME", type=some_seconds, help="log what was sent so often, where it changed (never)"
    )


def _forever_or_seconds(text: str) -> float | None:
    return None if text == "forever" else some_seconds(text)


async def relay(options: argparse.Namespace) -> int:
    """Send until a signal comes."""
    log_to_stderr()
    async with store_at(options.store) as store, redis_at(options.redis) as client:
        streams = RedisStreams(
            client,
            app=options.app,
            prefix=options.prefix,
            format=FORMATS[options.format],
            retain=options.stream_retain,
        )
        running = Relay(store, streams, retain=options.retain, lease=options.lease, drain=options.drain)
        with _stopped_by_signals(running):
            async with running:
                stream = build_stream_key(DEFAULT_ADDRESS, options.prefix)  # a forgotten --prefix shows here
                to = {"broker": describe_server(client), "stream": stream, "format": options.format}
                logger.info("relay started", extra={"partitions": store.partitions, **to})
                figures = asyncio.create_task(_figures(running.stats, options.figures))
                await running.run()
                figures.cancel()
        logger.info("relay stopped", extra=asdict(running.stats))
    return 0


@contextmanager
def _stopped_by_signals(running: Relay) -> Generator[None]:
    """However many come: a wrapper may pass on what the terminal has sent already."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, running.stop)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


async def _figures(stats: RelayStats, every: float | None) -> None:
    told = asdict(stats)
    while every is not None:
        await asyncio.sleep(every)
        if (now := asdict(stats)) != told:
            logger.info("relay figures", extra=now)
            told = now
