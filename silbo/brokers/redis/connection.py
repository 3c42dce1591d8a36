"""Connections of silbo's own, made from the settings of the user's client."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final, TypeAlias

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ReadOnlyError, RedisError, ResponseError

from silbo._loops import describe_lookup
from silbo.brokers.redis.credentials import ShownCredentials
from silbo.brokers.redis.failures import Lost, OneOfMany, Refused
from silbo.brokers.redis.incoming import Progress, ReplyStream, wait_for_news
from silbo.errors import BrokerUnavailable, ClusterClientNeeded

__all__ = [
    "Client",
    "Connection",
    "Lost",
    "Refused",
    "check_client",
    "connect",
    "describe_server",
    "find_trouble",
    "open_connection",
    "pack_words",
    "to_unavailable",
    "wait_for_any",
]

Client: TypeAlias = Redis | RedisCluster
"""The program's client: for one server, or for a cluster."""

CLOSE_WITHIN: Final = 1.0
"""A connection gets 1 second to close in good order; then it is dropped."""

LOOK_EVERY: Final = 0.02
"""A connection that can't be waited for is looked at every 0.02 seconds."""

# Settings that differ from the user's. A socket timeout would bring asyncio.wait_for into play, which swallows
# cancellations on Python 3.11, and redis-py's retries would outlast deadlines: the callers here do both themselves.
# driver_info: no CLIENT SETINFO, which a restricted user may not run.
_OVERRIDDEN: Final[dict[str, object]] = {
    "protocol": 2,
    "decode_responses": False,
    "retry_on_timeout": False,
    "retry_on_error": [],
    "socket_timeout": None,
    "socket_connect_timeout": None,
    "health_check_interval": 0,
    "driver_info": None,
}
# Settings that only the user's pool can use: notices of maintenance (RESP3 only) and events for its own connections.
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
# Answers of a cluster's node that lead to another node, or that a single server never gives.
_OF_CLUSTER: Final = frozenset({"ASK", "CLUSTERDOWN", "CROSSSLOT", "MOVED", "TRYAGAIN"})
_LAST: Final = b"silbo: the last"
# Errors of a server that is not ready yet.
_NOT_YET: Final = ("LOADING", "MASTERDOWN", "ERR max number of clients")


def check_client(client: object) -> Client:
    """Return the client if it is an asynchronous one, for a single server or a cluster.

    Raises:
        TypeError: it is a synchronous client, or something else.
    """
    if isinstance(client, Redis | RedisCluster):
        return client
    raise TypeError(
        "client is the program's own redis.asyncio.Redis or redis.asyncio.RedisCluster, not "
        f"{type(client).__module__}.{type(client).__qualname__} (the synchronous clients are not supported)"
    )


def describe_server(client: Client) -> str:
    """Return the server that the client connects to, for texts; without credentials."""
    if isinstance(client, RedisCluster):
        first = client.startup_nodes[0]
        return f"Redis Cluster at {first.host}:{first.port}"
    pool = client.connection_pool
    settings: dict[str, Any] = pool.connection_kwargs
    if service := getattr(pool, "service_name", None):  # Sentinel's
        return f"Redis {service}"
    if path := settings.get("path"):
        return f"Redis at {path}"
    return f"Redis at {settings.get('host', 'localhost')}:{settings.get('port', 6379)}"


def find_trouble(client: Client) -> str:
    """Return the reason why a connection to the client's server could not be made in time; empty if none is known."""
    if isinstance(client, RedisCluster):
        return describe_lookup(*(node.host for node in client.startup_nodes))
    pool = client.connection_pool
    sentinels = getattr(getattr(pool, "sentinel_manager", None), "sentinels", ())
    pools = [pool, *(sentinel.connection_pool for sentinel in sentinels)]
    return describe_lookup(*(each.connection_kwargs.get("host") for each in pools))


def to_unavailable(error: BaseException, server: str, text: str) -> BrokerUnavailable:
    """Return the error for a caller whose connection could not be made: one with this text, or the one that names the client to give."""
    return ClusterClientNeeded(server) if isinstance(error, OneOfMany) else BrokerUnavailable(text)


def pack_words(words: Iterable[bytes]) -> bytes:
    """Return the words as the Redis protocol writes them, without the head that counts them."""
    return b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in words])


async def connect(client: Redis) -> Connection:
    """Return a new connection to the client's server, on which Redis has answered a PING.

    A frozen Redis accepts connections through the kernel, so only an answer proves that it is there. No time limit: the
    caller cancels it.

    Raises:
        Lost: Redis can't be reached, or is not ready yet; safe to repeat.
        Refused: wrong credentials, no such database, a certificate that is not trusted, or one of several nodes of a cluster;
            repeating does not help.
    """
    pool = client.connection_pool
    return await open_connection(pool.connection_class, pool.connection_kwargs)


async def open_connection(connection_class: Any, settings: Mapping[str, Any], *, is_node: bool = False) -> Connection:
    """Return a new connection of this class of redis-py's, with the user's settings: see :func:`connect`.

    With ``is_node`` it is one to a node of a cluster, for a caller that follows MOVED and ASK.
    """
    kept = {name: value for name, value in settings.items() if name not in _DROPPED}
    kept |= _OVERRIDDEN | {"retry": Retry(NoBackoff(), 0)}
    credentials = None
    if (provider := kept.get("credential_provider")) is not None:
        credentials = kept["credential_provider"] = ShownCredentials(provider)
    connection = Connection(connection_class(**kept), is_node=is_node, credentials=credentials)
    try:
        await connection.open()
    except BaseException:
        await connection.drop()
        raise
    return connection


_GREETING_OF_NODE: Final = b"*1\r\n$4\r\nPING\r\n"
_GREETING: Final = _GREETING_OF_NODE + b"*1\r\n$5\r\nHELLO\r\n"


class Connection:
    """One connection, for one task at a time.

    Drop it after :class:`Lost`, and after a command whose reply was not read: the next command would get that reply.
    """

    def __init__(
        self, connection: AbstractConnection, *, is_node: bool = False, credentials: ShownCredentials | None = None
    ) -> None:
        self._connection = connection
        self._is_node = is_node
        self._credentials = credentials
        self._transport: asyncio.WriteTransport | None = None
        self._progress: Progress | None = None
        self._replies: ReplyStream | None = None
        self._unreturned: list[Any] = []  # replies of a read_all() that was cancelled

    async def open(self) -> None:
        """Connect, and wait for the answer to a PING: see :func:`connect`."""
        try:
            await self._connection.connect()  # type: ignore[no-untyped-call]  # redis-py has no types there
        except Exception as error:  # credential providers and connect functions are the user's
            refusal = _find_refusal(error)
            if refusal is None or str(refusal).startswith(_NOT_YET):
                raise Lost(str(error) or repr(error)) from error
            raise refusal from error
        self._transport = self._current_transport()
        # In one write: every user may run HELLO, which tells if this is a node of a cluster.
        await self.write(_GREETING_OF_NODE if self._is_node else _GREETING)
        refusal = None
        try:
            await self.read()
        except Refused as error:
            refusal = error
        mode = b"" if self._is_node else await self._read_mode()
        if refusal is not None:
            if refusal.code == "NOAUTH":
                raise refusal
            if str(refusal).startswith(_NOT_YET):
                raise Lost(str(refusal)) from refusal
            # MISCONF, NOPERM and the like: Redis has answered.
        if mode == b"cluster" and await self._is_one_of_many():
            raise OneOfMany(
                "this is one of the nodes of a Redis Cluster: give redis.asyncio.RedisCluster, or --cluster"
            )

    async def _read_mode(self) -> bytes:
        """Return the mode in the reply to HELLO; empty from a server or a proxy that does not tell it."""
        try:
            hello = await self.read()
        except Refused:
            return b""
        fields = hello if isinstance(hello, list) else []
        return next(
            (bytes(value) for name, value in zip(fields[::2], fields[1::2], strict=False) if name == b"mode"), b""
        )

    async def _is_one_of_many(self) -> bool:
        """Return True if other nodes serve slots too: a part of the keys is not here. A proxy before a cluster has all."""
        try:
            rows = await self.execute(b"CLUSTER", b"SLOTS")
        except Refused as refusal:
            return refusal.code == "NOPERM"
        return len({(host, port) for _, _, (host, port, *_), *_ in rows}) > 1

    async def execute(self, *words: bytes) -> Any:
        """Send one command and return its reply, in the shapes of RESP2; texts are bytes.

        Raises:
            Lost: the connection broke.
            Refused: Redis's answer is an error.
        """
        await self.send(*words)
        return await self.read()

    async def send(self, *words: bytes) -> None:
        """Send one command; the caller reads its replies.

        Raises:
            Lost: the connection broke.
        """
        await self.write(b"*%d\r\n%b" % (len(words), pack_words(words)))

    async def write(self, data: bytes) -> None:
        """Send packed commands.

        Raises:
            Lost: the connection broke; all or some of the commands may have arrived.
        """
        try:
            await self._connection.send_packed_command(data, check_health=False)
        except (RedisError, OSError) as error:
            raise Lost(str(error) or repr(error)) from error

    async def read(self, timeout: float | None = None) -> Any:
        """Return the next reply, or None after ``timeout`` seconds; a later read gets a reply that comes after them.

        Raises:
            Lost: the connection broke.
            Refused: the reply is an error.
        """
        if self._replies is not None:
            replies = await self.read_all(1, float("inf") if timeout is None else timeout)
            return replies[0] if replies else None
        try:
            return await self._connection.read_response(timeout=timeout, disconnect_on_error=False)
        except (RedisError, OSError) as error:
            refusal = _find_refusal(error)
            if refusal is not None and not self._is_node and refusal.code in _OF_CLUSTER:
                refusal = Refused(
                    f"{refusal} (this is a node of a Redis Cluster: give redis.asyncio.RedisCluster, or --cluster)"
                )
            raise refusal or Lost(str(error) or repr(error)) from error

    async def read_all(self, limit: int, wait: float) -> list[Any]:
        """Return the replies that have come, at most ``limit``; wait for the first of them, up to so many seconds.

        Raises:
            Lost: the connection broke; the replies before were returned by earlier calls.
            Refused: the next reply is an error.
        """
        stream = self._replies
        if stream is not None:
            ends_at: float | None = None
            while not (replies := stream.take(limit)) and wait > 0:
                now = asyncio.get_running_loop().time()
                if ends_at is None:
                    ends_at = now + wait
                elif now >= ends_at:
                    break
                await stream.wait(ends_at - now)
            return replies
        replies = self._unreturned
        while len(replies) < limit and (not replies or await self.has_unread()):
            try:
                reply = await self.read(0 if replies else wait)
            except (Lost, Refused):
                if not replies:  # else the next call raises it
                    raise
                break
            if reply is None:  # only a part of one has come
                break
            replies.append(reply)
        self._unreturned = []
        return replies

    async def read_out(self, take: Callable[[Sequence[Any]], None]) -> None:
        """Give all that Redis has published until now to ``take``, for a connection with subscriptions that will be replaced.

        Raises:
            Lost: the connection broke; not all was read.
        """
        await self.send(b"PING", _LAST)
        is_last = False
        while not is_last:
            for reply in await self.read_all(1, float("inf")):
                take([reply])
                is_last = reply == [b"pong", _LAST]

    def stream_replies(self) -> None:
        """Read from now on all replies that have come at once, and note when bytes come. Not while a reply is under way.

        Without a transport, for redis-py keeps it in a private place, replies are read one by one.
        """
        transport = self._transport
        if isinstance(transport, asyncio.Transport):
            protocol = transport.get_protocol()
            assert isinstance(protocol, asyncio.Protocol)
            self._progress = self._replies = ReplyStream(protocol, transport)
            transport.set_protocol(self._replies)

    @property
    def replies(self) -> ReplyStream | None:
        """The stream of replies; None before :meth:`stream_replies`, or without a transport."""
        return self._replies

    @property
    def heard_at(self) -> float:
        """The loop's time when bytes came last, if the progress is watched; else minus infinity."""
        return float("-inf") if self._progress is None else self._progress.heard_at

    def watch_progress(self) -> None:
        """Note from now on when bytes come: a large reply over a slow link is under way for long."""
        if self._progress is None and self._transport is not None:
            protocol = self._transport.get_protocol()
            assert isinstance(protocol, asyncio.Protocol)
            self._progress = Progress(protocol)
            self._transport.set_protocol(self._progress)

    @contextmanager
    def extending(self, limit: asyncio.Timeout, seconds: float) -> Generator[None]:
        """Inside of the ``with``, let the limit end about so many seconds after the last bytes, if the progress is watched."""
        progress = self._progress
        if progress is None:
            yield
            return
        progress.limit = limit
        progress.seconds = seconds
        try:
            yield
        finally:
            progress.limit = None

    async def has_unread(self) -> bool:
        """Return True if there is something to read or the server has closed the connection.

        Either makes an idle connection unusable.
        """
        try:
            return await self._connection.can_read()
        except (RedisError, OSError):
            return True

    async def is_usable(self) -> bool:
        """Return True if an idle connection may be used again. It has shown the credentials that are valid now."""
        if await self.has_unread():
            return False
        if self.may_have_to_renew:
            try:
                await self.renew()
            except Lost:
                return False
        return True

    @property
    def may_have_to_renew(self) -> bool:
        """True if it is time to ask the program's credential provider if it has renewed them."""
        return self._credentials is not None and self._credentials.is_due

    async def needs_successor(self) -> bool:
        """Return True if the credentials were renewed, for a connection with subscriptions: it can't show them any more."""
        return self._credentials is not None and await self._credentials.find_renewed() is not None

    def note_not_renewed(self, error: Exception) -> None:
        """Note that there is no successor: this connection goes on with its former credentials, and it is tried again later."""
        if self._credentials is not None:
            self._credentials.note_not_renewed(error)

    async def renew(self) -> None:
        """Show the credentials to Redis if they were renewed: between two commands. If it refuses, the former ones stay valid.

        Raises:
            Lost: the connection broke; nothing else was sent.
        """
        credentials = self._credentials
        if credentials is None or (renewed := await credentials.find_renewed()) is None:
            return
        try:
            await self.execute(b"AUTH", *[word.encode() for word in renewed])
        except Refused as refusal:
            credentials.note_not_renewed(refusal)
        except BaseException:
            await self.drop()  # the answer to AUTH would be taken for another's
            raise
        else:
            credentials.note_shown(renewed)

    async def aclose(self) -> None:
        """Close the connection in good order; :meth:`drop` it if that takes longer than a second."""
        with suppress(Exception):
            async with asyncio.timeout(CLOSE_WITHIN):
                await self._connection.disconnect()
        await self.drop()

    async def drop(self) -> None:
        """Close the connection at once, even if the server does not read: a half-sent command must not arrive later."""
        # redis-py closes a connection whose command was cancelled; but its close() goes on sending what is in the buffer.
        transport = self._transport or self._current_transport()
        if transport is not None:
            transport.abort()
        with suppress(Exception):
            await self._connection.disconnect(nowait=True)

    def _current_transport(self) -> asyncio.WriteTransport | None:
        writer: asyncio.StreamWriter | None = getattr(self._connection, "_writer", None)  # redis-py offers no abort
        return None if writer is None else writer.transport


async def wait_for_any(connections: Sequence[Connection], seconds: float) -> None:
    """Wait until something comes over one of the connections, which stream their replies; at most so many seconds."""
    streams = [connection.replies for connection in connections]
    known = [stream for stream in streams if stream is not None]
    # One without a transport can't be waited for beside others.
    await wait_for_news(known, seconds if len(known) == len(streams) else min(seconds, LOOK_EVERY))


def _find_refusal(error: BaseException) -> Refused | None:
    """Return Redis's error reply if the error was made of one, or the refusal of its certificate; redis-py turns some into connection errors."""
    code: str | None = getattr(error, "status_code", None)
    if code or isinstance(error, ResponseError):
        return Refused(f"{code} {error}" if code else str(error))
    if isinstance(error.__context__, ssl.SSLCertVerificationError):  # ours, not Redis's: no retry would change it
        return Refused(f"TLS {error}")
    cause = error.__cause__  # a failed AUTH over a unix socket
    if cause is None and isinstance(error.__context__, ReadOnlyError):
        cause = error.__context__  # of a demoted master, behind Sentinel
    return _find_refusal(cause) if cause is not None else None
