"""``silbo consume``: its arguments, and running a program's consumers until a signal comes."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from silbo.cli.app_arguments import add_app_arguments
from silbo.cli.arguments import Commands, add_command, add_figures_option
from silbo.cli.health import HEALTH, add_health_options, check_health_options, showing_health
from silbo.cli.log import log_figures, log_to_stderr
from silbo.cli.metrics import add_metrics_option, showing_metrics
from silbo.cli.output import print_note
from silbo.cli.signals import stop_at_signals
from silbo.errors import AppInvalid, BrokerUnavailable, StopIncomplete

if TYPE_CHECKING:
    from silbo.consumer.consumer import Consumer

__all__ = ["add_to"]

logger = logging.getLogger(__name__)

EPILOG = f"""\
The consumers run until SIGTERM or Ctrl-C. Then they receive nothing more, finish what they have, for
their drain= at most, and the command exits with 0. What they leave comes again, to another consumer of
the group. They start without Redis and wait for it. If one fails, the others are stopped in good order,
and the command exits with 1.

APP says where Redis is, and which prefix it uses: this command passes it nothing. If APP is an async
context manager, it is entered before the first message, and left after the last.

The log goes to stderr: of silbo from INFO on, of everything else from WARNING on; unless the program
sets up logging itself when it is imported.

{HEALTH}
examples:
  silbo consume shop.billing:consumer
  silbo consume shop.billing:consumer --health-port 8080 --health-host 0.0.0.0
  silbo consume shop.worker:open_consumers --app-dir src --figures 1m
"""


def add_to(commands: Commands) -> None:
    """Add ``silbo consume``."""
    parser = add_command(commands, "consume", "run a program's consumers", epilog=EPILOG, run=consume)
    add_app_arguments(
        parser, "a consumer, a list of them, or an app that holds one", example="shop.billing:consumer", lifespan=False
    )
    add_figures_option(parser)
    add_health_options(parser)
    add_metrics_option(parser)


async def consume(options: argparse.Namespace) -> int:
    """Run the consumers until SIGTERM or SIGINT."""
    from silbo.operations.app import open_app

    check_health_options(options)
    try:
        async with open_app(options.app, app_dir=options.app_dir) as app:
            log_to_stderr()  # a program that has set up logging keeps its own
            if not app.consumers:
                raise AppInvalid(options.app, "it has no consumer: name a silbo.Consumer, or what gives one")
            async with (
                showing_metrics(options, app.consumers, app.dispatchers.values()),
                showing_health(options, app.consumers),
            ):
                await _run(app.consumers, options.figures)
    except StopIncomplete as error:
        # The listener that was left behind would hold up the end of asyncio.run for ever. Its message comes again.
        print_note(f"silbo: {error}")
        sys.stdout.flush()
        os._exit(1)
    return 0


async def _run(consumers: Sequence[Consumer], every: float | None) -> None:
    from silbo.operations.consume import run_consumers

    with stop_at_signals(lambda: _stop(consumers)):
        beside = [asyncio.create_task(_watch(consumer, every)) for consumer in consumers]
        try:
            await run_consumers(consumers)
        finally:
            for task in beside:
                task.cancel()
            for consumer in consumers:
                logger.info("consumer stopped", extra={**_name(consumer), **asdict(consumer.stats)})


def _stop(consumers: Sequence[Consumer]) -> None:
    for consumer in consumers:
        consumer.stop()


async def _watch(consumer: Consumer, every: float | None) -> None:
    """Log that a consumer starts and is connected, then its counts."""
    logger.info("consumer started", extra=_describe(consumer))
    try:
        await consumer.ready()
    except BrokerUnavailable:  # stopped before
        return
    logger.info("consumer connected", extra=_name(consumer))
    await log_figures(logger, "consumer", consumer.stats, every, extra=_name(consumer))


def _name(consumer: Consumer) -> dict[str, str]:
    """Return the group of a consumer, for the log; without one, the app."""
    group = consumer.subscription.name
    return {"group": group} if group else {"app": consumer.subscription.app}


def _describe(consumer: Consumer) -> dict[str, str]:
    """Return what a consumer receives, for the log: a wrong address, prefix or group is seen here."""
    subscription: Any = consumer.subscription
    fields = {"app": str(subscription.app), **_name(consumer)}
    for attribute, word in (("keys", "streams"), ("patterns", "names"), ("channels", "channels")):
        if values := getattr(subscription, attribute, None):
            fields[word] = ", ".join(map(str, values))
    client: Any = getattr(subscription, "client", None)
    if hasattr(client, "connection_pool"):
        from silbo.brokers.redis.connection import describe_server

        fields["broker"] = describe_server(client)
    return fields
