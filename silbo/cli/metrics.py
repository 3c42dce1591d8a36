"""The option ``--metrics-port`` of the commands that run for long: their metrics, for Prometheus."""

from __future__ import annotations

import argparse
import logging
from collections.abc import AsyncGenerator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager

from silbo._checks import require_extra
from silbo.cli.health import parse_port
from silbo.consumer.consumer import Consumer
from silbo.dispatch.dispatcher import AsyncEventDispatcher
from silbo.outbox.relay import Relay

__all__ = ["add_metrics_option", "showing_metrics"]

logger = logging.getLogger(__name__)


def add_metrics_option(parser: argparse.ArgumentParser) -> None:
    """Add the option. The address of its port is ``--health-host``."""
    parser.add_argument(
        "--metrics-port",
        metavar="PORT",
        type=parse_port,
        help="give Prometheus the metrics at this port, at /metrics; needs silbo[prometheus] (none)",
    )


@asynccontextmanager
async def showing_metrics(
    options: argparse.Namespace, parts: Iterable[Consumer | Relay], dispatchers: Iterable[AsyncEventDispatcher] = ()
) -> AsyncGenerator[None]:
    """Measure what a command runs, and give Prometheus the metrics, for the block."""
    if options.metrics_port is None:
        yield
        return
    with require_extra("--metrics-port", extra="prometheus", libraries=("opentelemetry", "prometheus_client")):
        from opentelemetry.exporter.prometheus import PrometheusMetricReader
        from opentelemetry.sdk.metrics import MeterProvider
        from prometheus_client import start_http_server

        from silbo.instrumentation.metrics import Metrics

    provider = MeterProvider([PrometheusMetricReader()])
    async with AsyncExitStack() as stack:
        stack.callback(provider.shutdown)
        server, thread = start_http_server(options.metrics_port, options.health_host)
        stack.callback(thread.join)
        stack.callback(server.server_close)
        stack.callback(server.shutdown)
        metrics = Metrics(meter_provider=provider)
        metrics.watch(*parts)
        for dispatcher in dispatchers:
            stack.enter_context(dispatcher.observe(metrics))
        await stack.enter_async_context(metrics)
        logger.info("metrics are shown", extra={"host": options.health_host, "port": server.server_port})
        yield
