"""The health of a running program, shown over HTTP and in a file, to whoever has to restart it or to leave it alone.

A program is alive if its event loop turns, and for no other reason: a long listener or an outage of Redis must not restart a
fleet. It is ready if each of its parts is.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

from silbo._reports import RateLimitedLog
from silbo.health import HasHealth, Health, keep_refreshing

__all__ = ["describe", "explain", "show_health"]

logger = logging.getLogger(__name__)

TOUCHED_EVERY: Final = 1.0
"""The file is touched once a second. It shows by its age for how long the loop has been held."""
REFRESHED_EVERY: Final = 15.0
"""The figures that only the broker or the store knows are read every 15 seconds, and soon after a part has connected."""
REQUEST_WITHIN: Final = 5.0
"""A request has to be there within 5 seconds."""
LONGEST_REQUEST: Final = 8192
"""The head of a request has at most 8,192 bytes."""
READY: Final = "is_ready"
PARTS: Final = "parts"
"""The names in the JSON object that are no attribute of a Health."""


@asynccontextmanager
async def show_health(
    parts: Sequence[HasHealth],
    *,
    port: int | None = None,
    host: str = "127.0.0.1",
    file: str | os.PathLike[str] | None = None,
) -> AsyncGenerator[int | None]:
    """Show the health of a program for the block, over HTTP, in a file, or both; give the port, None without one.

    ``GET /livez`` is answered with 200 as long as the loop turns; ``/readyz`` with 200 if every part is ready, else with 503
    and the reasons; ``/health`` with the figures of all parts as JSON.

    The file is touched once a second as long as the loop turns: its program is alive if it is young. Its first line is
    ``ready`` or ``not ready``; the others have the reasons. It is deleted at the end.

    Args:
        parts: The consumers, relays, outboxes and bridges of the program.
        port: The port of the HTTP endpoint; 0 takes a free one, None makes no endpoint.
        host: The address to listen at. Whoever can reach it reads the texts of errors.
        file: The path of the file; None for none. Each process needs one of its own.

    Raises:
        TypeError: A part has no health.
        OSError: The port is taken, or the file can't be written; ``filename`` is the file's.
    """
    for part in parts:
        if not callable(getattr(part, "health", None)):
            raise TypeError(f"parts are consumers, relays, outboxes and bridges, not {part!r}")
    log = RateLimitedLog(logger, every=60.0)
    async with AsyncExitStack() as stack:
        if file is not None:
            path = Path(file)
            _write_first(path, explain(parts))
            stack.callback(path.unlink, missing_ok=True)
            await stack.enter_async_context(_running(_keep_touching(path, parts, log)))
        bound = None if port is None else await stack.enter_async_context(_serving(parts, host, port))
        report = partial(log.write, "figures for the health can't be read")
        await stack.enter_async_context(_running(keep_refreshing(lambda: parts, REFRESHED_EVERY, report)))
        yield bound


def explain(parts: Sequence[HasHealth]) -> str:
    """Return ``ready``; or ``not ready``, and a line with the reason for each part that is not."""
    found = [health for part in parts if not (health := part.health()).is_ready]
    lines = [f"{health.part} {health.name}: {_explain(health)}" for health in found]
    return "\n".join(["not ready" if found else "ready", *lines, ""])


def _explain(health: Health) -> str:
    """Return the reason why a part is not ready, with its last error if it is not connected."""
    reason = health.explain()
    if health.is_running and not health.is_connected and health.last_error is not None:
        reason += f"; last error: {health.last_error.text}"
    return reason


def describe(parts: Sequence[HasHealth]) -> str:
    """Return the health of all parts as a JSON object; times in ISO 8601, UTC."""
    found = [part.health() for part in parts]
    fields = {
        READY: all(health.is_ready for health in found),
        PARTS: [{**asdict(health), READY: health.is_ready} for health in found],
    }
    return json.dumps(fields, default=_to_json) + "\n"


def _to_json(value: object) -> object:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    raise TypeError(f"{value!r} can't be written as JSON")


@asynccontextmanager
async def _running(work: Coroutine[Any, Any, None]) -> AsyncGenerator[None]:
    """Run a coroutine beside the block; cancel it at the end."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


# -- the file -----------------------------------------------------------------------------------------------


async def _keep_touching(path: Path, parts: Sequence[HasHealth], log: RateLimitedLog) -> None:
    written = ""
    while True:
        text = explain(parts)
        try:
            _touch(path, text, is_new=text != written)
            written = text
        except OSError as error:  # a full disk: the program goes on
            log.write("the health can't be written", error, path=str(path))
        await asyncio.sleep(TOUCHED_EVERY)


def _touch(path: Path, text: str, *, is_new: bool) -> None:
    if not is_new:
        with suppress(FileNotFoundError):  # somebody has deleted it
            os.utime(path)
            return
    _write(path, text)


def _write_first(path: Path, text: str) -> None:
    """Write a file as :func:`_write` does; an error names the file itself, and says if its folder is missing."""
    try:
        _write(path, text)
    except OSError as error:
        reason = error.strerror if path.parent.is_dir() else f"there is no folder {path.parent}: make it first"
        raise OSError(error.errno, reason, str(path)) from error


def _write(path: Path, text: str) -> None:
    """Write a file as a whole: nobody reads a half of it."""
    new = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        new.write_text(text)
        new.replace(path)
    except OSError:
        with suppress(OSError):
            new.unlink()
        raise


# -- the endpoint -------------------------------------------------------------------------------------------


@asynccontextmanager
async def _serving(parts: Sequence[HasHealth], host: str, port: int) -> AsyncGenerator[int]:
    """Answer requests for the block; give the port."""
    answering: dict[asyncio.Task[Any], asyncio.StreamWriter] = {}

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        answering[task] = writer
        try:
            async with asyncio.timeout(REQUEST_WITHIN):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(_respond(head, parts))
                await writer.drain()
        except (
            OSError,
            EOFError,
            TimeoutError,
            asyncio.LimitOverrunError,
        ):  # no request, or nobody waits for the answer
            pass
        finally:
            writer.close()
            del answering[task]

    server = await asyncio.start_server(answer, host, port, limit=LONGEST_REQUEST)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in answering.values():
            writer.transport.abort()  # not a cancellation of its task, which Python 3.11 and 3.12 would log as an error
        if answering:
            await asyncio.wait(tuple(answering))
        await server.wait_closed()


def _respond(head: bytes, parts: Sequence[HasHealth]) -> bytes:
    """Return the response to a request, by the head of it."""
    method, _, rest = head.partition(b" ")
    path = rest.partition(b" ")[0].partition(b"?")[0]
    status, kind, body = HTTPStatus.OK, "text/plain", ""
    if method not in (b"GET", b"HEAD"):
        status = HTTPStatus.METHOD_NOT_ALLOWED
    elif path == b"/livez":
        body = "alive\n"
    elif path == b"/readyz":
        body = explain(parts)
        status = HTTPStatus.OK if body == "ready\n" else HTTPStatus.SERVICE_UNAVAILABLE
    elif path == b"/health":
        kind, body = "application/json", describe(parts)
    else:
        status, body = HTTPStatus.NOT_FOUND, "there is /livez, /readyz and /health\n"
    content = body.encode()
    lines = (
        f"HTTP/1.1 {status.value} {status.phrase}",
        f"Content-Type: {kind}; charset=utf-8",
        f"Content-Length: {len(content)}",
        "Cache-Control: no-store",
        "Connection: close",
    )
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode() + (b"" if method == b"HEAD" else content)
