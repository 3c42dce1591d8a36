"""The option ``--metrics-port`` of the commands that run for long: their metrics, for Prometheus."""

from __future__ import annotations

import argparse
import logging
from collections.abc import AsyncGenerator, Generator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from socket import AF_INET6
from socketserver import ThreadingMixIn
from threading import Thread
from typing import TYPE_CHECKING, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from silbo._checks import require_extra
from silbo._message_observers import find_observers
from silbo.cli.arguments import UsageError
from silbo.cli.health import LOOPBACK, naming_port, parse_port
from silbo.consumer.consumer import Consumer
from silbo.dispatch.dispatcher import AsyncEventDispatcher
from silbo.outbox.relay import Relay

__all__ = ["add_metrics_option", "showing_metrics"]

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

REQUEST_WITHIN: Final = 5.0
"""A request has to be there within 5 seconds."""

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
        from prometheus_client import REGISTRY, make_wsgi_app

        from silbo.instrumentation.metrics import Metrics

    dispatchers = list(dispatchers)
    is_measured = any(isinstance(each, Metrics) for dispatcher in dispatchers for each in find_observers(dispatcher))
    if is_measured or any(family.name.startswith("silbo_") for family in REGISTRY.collect()):
        raise UsageError(
            "the app has silbo's Metrics already, and each figure would be shown twice: leave out --metrics-port, and "
            "give Prometheus those of the app (prometheus_client.start_http_server); or make no Metrics in the app"
        )
    host = options.health_host or LOOPBACK
    provider = MeterProvider([PrometheusMetricReader()])
    async with AsyncExitStack() as stack:
        stack.callback(provider.shutdown)
        with naming_port("--metrics-port", options.metrics_port, host):
            port = stack.enter_context(_serving(make_wsgi_app(disable_compression=True), host, options.metrics_port))
        metrics = Metrics(meter_provider=provider)
        metrics.watch(*parts)
        for dispatcher in dispatchers:
            stack.enter_context(dispatcher.observe(metrics))
        await stack.enter_async_context(metrics)
        logger.info("metrics are shown", extra={"host": host, "port": port})
        yield


# -- the endpoint -------------------------------------------------------------------------------------------


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True  # the end does not wait for a client that is silent


class _Server6(_Server):
    address_family = AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_WITHIN

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # as it is called above
        """Don't log the requests."""


@contextmanager
def _serving(show: WSGIApplication, host: str, port: int) -> Generator[int]:
    """Answer requests for ``/metrics`` in a thread for the block; give the port."""

    def answer(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if method not in ("GET", "HEAD"):
            start("405 Method Not Allowed", [("Allow", "GET, HEAD")])
            return []
        if path != "/metrics":
            start("404 Not Found", [("Content-Type", "text/plain; charset=utf-8")])
            return [] if method == "HEAD" else [b"there is /metrics\n"]
        shown = show({**environ, "REQUEST_METHOD": "GET"}, start)
        return [] if method == "HEAD" else shown

    server = make_server(host, port, answer, _Server6 if ":" in host else _Server, _Handler)
    thread = Thread(target=server.serve_forever, name="silbo-metrics", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
