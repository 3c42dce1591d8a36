"""Connections of silbo's own, made from the settings of the user's client."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Final

from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ReadOnlyError, RedisError, ResponseError

__all__ = ["Connection", "Lost", "Refused", "check_client", "connect", "packed", "where"]

CLOSE_WITHIN: Final = 1.0
"""Seconds for a connection to close in good order."""

# The rest of the settings is the user's. A socket timeout would bring asyncio.wait_for into play, which swallows
# cancellations on Python 3.11, and redis-py's retries would outlast deadlines: both are the caller's business here.
# driver_info: no CLIENT SETINFO, which a restricted user may not run.
_OURS: Final[dict[str, object]] = {
    "protocol": 2,
    "decode_responses": False,
    "retry_on_timeout": False,
    "retry_on_error": [],
    "socket_timeout": None,
    "socket_connect_timeout": None,
    "health_check_interval": 0,
    "driver_info": None,
}
# What belongs to the user's pool: notices of maintenance (RESP3 only) and events for its own connections.
_DROPPED: Final = frozenset(
    {
        "event_dispatcher",
        "himport_registry",
        "lib_name",
        "lib_version",
        "maint_notifications_config",
        "maint_notifications_pool_handler",
        "maintenance_notification_hash",
        "maintenance_state",
        "orig_host_address",
        "orig_socket_connect_timeout",
        "orig_socket_timeout",
        "oss_cluster_maint_notifications_handler",
    }
)
_NOT_YET: Final = ("LOADING", "MASTERDOWN", "ERR max number of clients")


class Lost(Exception):
    """There is no connection: it broke, or could not be made. What was sent over it may have been carried out."""


class Refused(Exception):
    """Redis answered with an error: what it answers was not carried out. The text is Redis's own."""

    @property
    def code(self) -> str:
        """The first word, as ``READONLY``."""
        return str(self).partition(" ")[0]


def check_client(client: object) -> Redis:
    """The same client, once it is known to be one that fits.

    Raises:
        TypeError: a synchronous client, a cluster client, or something else.
    """
    if isinstance(client, Redis):
        return client
    raise TypeError(
        f"client is the program's own redis.asyncio.Redis, not {type(client).__module__}.{type(client).__qualname__}"
        " (the synchronous client and Redis Cluster are not supported)"
    )


def where(client: Redis) -> str:
    """What the client is connected to, for people; no credentials."""
    pool = client.connection_pool
    settings: dict[str, Any] = pool.connection_kwargs
    if service := getattr(pool, "service_name", None):  # Sentinel's
        return f"Redis {service}"
    if path := settings.get("path"):
        return f"Redis at {path}"
    return f"Redis at {settings.get('host', 'localhost')}:{settings.get('port', 6379)}"


def packed(words: Iterable[bytes]) -> bytes:
    """Each word as the Redis protocol writes it, without the head that counts them."""
    return b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in words])


async def connect(client: Redis) -> Connection:
    """A new connection to where the client is connected to, on which Redis has answered.

    A frozen Redis accepts connections through the kernel and says nothing, so only an answer tells that it is there. No
    time limit; cancel it.

    Raises:
        Lost: it can't be reached, or is not ready yet.
        Refused: wrong credentials, no such database: waiting does not help.
    """
    pool = client.connection_pool
    settings = {name: value for name, value in pool.connection_kwargs.items() if name not in _DROPPED}
    settings |= _OURS | {"retry": Retry(NoBackoff(), 0)}
    connection = Connection(pool.connection_class(**settings))
    try:
        await connection.open()
    except BaseException:
        await connection.drop()
        raise
    return connection


class Connection:
    """One connection, for one task at a time. After :class:`Lost`, or a reply nobody waited for, drop it."""

    def __init__(self, connection: AbstractConnection) -> None:
        self._connection = connection
        self._transport: asyncio.WriteTransport | None = None

    async def open(self) -> None:
        """See :func:`connect`."""
        try:
            await self._connection.connect()  # type: ignore[no-untyped-call]  # redis-py has no types there
        except Exception as error:  # credential providers and connect functions are the user's
            refusal = _refusal(error)
            if refusal is None or str(refusal).startswith(_NOT_YET):
                raise Lost(str(error) or repr(error)) from error
            raise refusal from error
        self._transport = self._current_transport()
        try:
            await self.ask(b"PING")
        except Refused as refusal:
            if refusal.code == "NOAUTH":
                raise
            if str(refusal).startswith(_NOT_YET):
                raise Lost(str(refusal)) from refusal
            # MISCONF, NOPERM and the like: an answer is what was asked for.

    async def ask(self, *words: bytes) -> Any:
        """Send one command and return its reply, in RESP2's shapes and bytes.

        Raises:
            Lost: the connection broke.
            Refused: Redis's answer is an error.
        """
        await self.command(*words)
        return await self.read()

    async def command(self, *words: bytes) -> None:
        """Send one command; its replies are to be read.

        Raises:
            Lost: the connection broke.
        """
        await self.write(b"*%d\r\n%b" % (len(words), packed(words)))

    async def write(self, data: bytes) -> None:
        """Send packed commands.

        Raises:
            Lost: the connection broke; all or some of it may have arrived.
        """
        try:
            await self._connection.send_packed_command(data, check_health=False)
        except (RedisError, OSError) as error:
            raise Lost(str(error) or repr(error)) from error

    async def read(self, timeout: float | None = None) -> Any:
        """The next reply, or None when ``timeout`` seconds are over; a reply that comes late is still there then.

        Raises:
            Lost: the connection broke.
            Refused: the reply is an error.
        """
        try:
            return await self._connection.read_response(timeout=timeout, disconnect_on_error=False)
        except (RedisError, OSError) as error:
            raise _refusal(error) or Lost(str(error) or repr(error)) from error

    async def has_something(self) -> bool:
        """Whether it has something to read, or the other side has closed it; both make an idle connection unusable."""
        try:
            return await self._connection.can_read()
        except (RedisError, OSError):
            return True

    async def aclose(self) -> None:
        """Close it in good order, or else :meth:`drop` it."""
        with suppress(Exception):
            async with asyncio.timeout(CLOSE_WITHIN):
                await self._connection.disconnect()
        await self.drop()

    async def drop(self) -> None:
        """Close it at once, also when the other side does not read: what is half sent must not arrive later."""
        # redis-py closes what was cancelled, and forgets it; but close() goes on sending what is in the buffer.
        transport = self._transport or self._current_transport()
        if transport is not None:
            transport.abort()
        with suppress(Exception):
            await self._connection.disconnect(nowait=True)

    def _current_transport(self) -> asyncio.WriteTransport | None:
        writer: asyncio.StreamWriter | None = getattr(self._connection, "_writer", None)  # redis-py offers no abort
        return None if writer is None else writer.transport


def _refusal(error: BaseException) -> Refused | None:
    """Redis's error reply, when that is what the error was made of; redis-py makes connection errors of some."""
    code: str | None = getattr(error, "status_code", None)
    if code or isinstance(error, ResponseError):
        return Refused(f"{code} {error}" if code else str(error))
    cause = error.__cause__  # a failed AUTH over a unix socket
    if cause is None and isinstance(error.__context__, ReadOnlyError):
        cause = error.__context__  # what Sentinel's connections make of a demoted master
    return _refusal(cause) if cause is not None else None
