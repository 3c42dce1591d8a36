"""The options ``--health-port``, ``--health-host`` and ``--health-file`` of the commands that run for long."""

from __future__ import annotations

import argparse
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

from silbo.health import HasHealth
from silbo.operations.health import show_health

__all__ = ["HEALTH", "add_health_options", "parse_port", "showing_health"]

logger = logging.getLogger(__name__)

HEALTH = """\
health:
  /livez   200 as long as the event loop turns, and nothing else: for a liveness probe
  /readyz  200 if it is connected and has room, else 503 with the reason
  /health  all figures as JSON
  The file of --health-file is touched once a second as long as the event loop turns; its first line is
  "ready" or "not ready".
"""


def add_health_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--health-port", metavar="PORT", type=parse_port, help="answer /livez, /readyz and /health at this port (none)"
    )
    parser.add_argument(
        "--health-host",
        metavar="HOST",
        default="127.0.0.1",
        help="the address of the ports: 0.0.0.0 for all, as probes of Kubernetes need it (127.0.0.1)",
    )
    parser.add_argument(
        "--health-file",
        metavar="FILE",
        help="a file that is touched while the command is alive, and says if it is ready (none)",
    )


@asynccontextmanager
async def showing_health(options: argparse.Namespace, parts: Sequence[HasHealth]) -> AsyncGenerator[None]:
    """Show the health of a command's parts, as its options say, for the block."""
    if options.health_port is None and options.health_file is None:
        yield
        return
    async with show_health(parts, port=options.health_port, host=options.health_host, file=options.health_file) as port:
        if port is not None:
            logger.info("health is shown", extra={"host": options.health_host, "port": port})
        yield


def parse_port(text: str) -> int:
    """Return a port; 0 stands for a free one."""
    if text.isascii() and text.isdigit() and int(text) < 1 << 16:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no port: write a number from 1 to 65535, or 0 for a free one")
