"""The options ``--health-port``, ``--health-host`` and ``--health-file`` of the commands that run for long."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import socket
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Final

from silbo.cli.arguments import UsageError
from silbo.health import HasHealth
from silbo.operations.health import show_health

__all__ = [
    "HEALTH",
    "LOOPBACK",
    "add_health_options",
    "check_health_options",
    "naming_port",
    "parse_port",
    "showing_health",
]

logger = logging.getLogger(__name__)

LOOPBACK: Final = "127.0.0.1"
"""The address of the ports without ``--health-host``."""
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
        help="the address of the ports: 0.0.0.0 for all, as probes of Kubernetes need it (127.0.0.1)",
    )
    parser.add_argument(
        "--health-file",
        metavar="FILE",
        help="a file that is touched while the command is alive, and says if it is ready (none)",
    )


def check_health_options(options: argparse.Namespace) -> None:
    """Refuse an address without a port.

    Raises:
        UsageError: There is an address, and no port.
    """
    if options.health_host is not None and options.health_port is None and options.metrics_port is None:
        raise UsageError("--health-host is the address of a port: give --health-port or --metrics-port, too")


@asynccontextmanager
async def showing_health(options: argparse.Namespace, parts: Sequence[HasHealth]) -> AsyncGenerator[None]:
    """Show the health of a command's parts, as its options say, for the block."""
    if options.health_port is None and options.health_file is None:
        yield
        return
    host = options.health_host or LOOPBACK
    async with AsyncExitStack() as stack:
        with naming_port("--health-port", options.health_port, host):
            shown = show_health(parts, port=options.health_port, host=host, file=options.health_file)
            port = await stack.enter_async_context(shown)
        if port is not None:
            logger.info("health is shown", extra={"host": host, "port": port})
        yield


@contextmanager
def naming_port(option: str, port: int | None, host: str) -> Generator[None]:
    """Let the error of an address or a file name the option, and what was given to it.

    Raises:
        OSError: The port is taken, the host has no such address, or the file can't be written.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise OSError(f"--health-file {error.filename}: {error.strerror}") from error
        if port is None:
            raise
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise OSError(f"--health-host {host}: {_describe(error)}") from error
        raise OSError(f"{option} {port}: {_describe(error)}") from error


def _describe(error: OSError) -> str:
    """Return the system's words for an error; asyncio's have the address once more."""
    if error.errno is None or isinstance(error, socket.gaierror):
        return error.strerror or str(error)
    return os.strerror(error.errno)


def parse_port(text: str) -> int:
    """Return a port; 0 stands for a free one."""
    if text.isascii() and text.isdigit() and int(text) < 1 << 16:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no port: write a number from 1 to 65535, or 0 for a free one")
