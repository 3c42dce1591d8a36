"""TLS: with an authority of the user's own, with client certificates, and refusals that say why.

The servers of the wheels are built without TLS. So what is tested is a proxy before a real Redis that ends the TLS.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trustme
from redis.asyncio import Redis

from silbo.brokers.redis import RedisInbox, RedisPubSub, RedisStreams
from silbo.errors import BrokerUnavailable
from tests.support.command_line import silbo
from tests.support.redis_streams import message, number, opened, receive
from tools.redis_server import RedisServer

CLOSED = "Connection closed by server|reset by peer"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Path) -> str:
    return written(authority.cert_pem, tmp_path / "ca.pem")


def written(pem: trustme.Blob, path: Path) -> str:
    pem.write_to_path(path)
    return str(path)


@asynccontextmanager
async def tls_before(
    server: RedisServer, certificate: trustme.LeafCert, *, clients: trustme.CA | None = None
) -> AsyncIterator[int]:
    """Serve the server's unix socket with TLS on a free port; only to clients with a certificate, if an authority is given."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate.configure_cert(context)
    if clients is not None:
        clients.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
    path = server.url.removeprefix("unix://").partition("?")[0]
    tasks: set[asyncio.Task[None]] = set()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, here = await asyncio.open_unix_connection(path)
        tasks.update({asyncio.create_task(carry(reader, here)), asyncio.create_task(carry(there, writer))})

    proxy = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield proxy.sockets[0].getsockname()[1]
    finally:
        proxy.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_everything_goes_over_tls(own_redis: RedisServer, authority: trustme.CA, ca_file: str) -> None:
    """Each connection of silbo's own has the TLS settings of the program's client."""
    async with tls_before(own_redis, authority.issue_cert("localhost")) as port:
        async with Redis.from_url(f"rediss://localhost:{port}", ssl_ca_certs=ca_file) as client:
            async with (
                RedisStreams(client, app="web") as streams,
                RedisPubSub(client, app="web") as pubsub,
                RedisInbox(client) as inbox,
                opened(streams.group("g", start="oldest")) as reader,
                opened(pubsub.subscribe()) as listener,
            ):
                await streams.publish(message(1, text="x" * 300_000))  # many records of TLS
                await pubsub.publish(message(2))
                (delivery,) = await receive(reader, 1)
                assert number(delivery) == 1
                await reader.ack(delivery)  # type: ignore[arg-type]  # a delivery
                assert [number(item) for item in await receive(listener, 1)] == [2]
                await inbox.remember("g", ["p-1"])
                assert await inbox.find_handled("g", ["p-1", "p-2"]) == ["p-1"]


async def test_client_certificate_is_shown(
    own_redis: RedisServer, authority: trustme.CA, ca_file: str, tmp_path: Path
) -> None:
    """A server that asks for one refuses who has none. With TLS 1.3 it does so after the handshake, by closing."""
    mine = authority.issue_cert("web")
    file = written(mine.private_key_and_cert_chain_pem, tmp_path / "mine.pem")
    settings = {"ssl_ca_certs": ca_file}
    async with tls_before(own_redis, authority.issue_cert("localhost"), clients=authority) as port:
        async with Redis.from_url(f"rediss://localhost:{port}", **settings) as client:
            async with RedisStreams(client, app="web", timeout=3.0) as streams:
                with pytest.raises(BrokerUnavailable, match=CLOSED):
                    await streams.publish(message(1))
        async with Redis.from_url(f"rediss://localhost:{port}", ssl_certfile=file, **settings) as client:
            async with RedisStreams(client, app="web") as streams:
                await streams.publish(message(1))


@pytest.mark.parametrize(
    ("host", "is_trusted", "why"),
    [
        ("localhost", False, "certificate verify failed: unable to get local issuer certificate"),
        ("redis.example", True, "Hostname mismatch, certificate is not valid for 'localhost'"),
    ],
)
async def test_a_server_that_is_not_trusted_is_told_with_the_reason(
    host: str, is_trusted: bool, why: str, own_redis: RedisServer, authority: trustme.CA, tmp_path: Path
) -> None:
    trusted = authority if is_trusted else trustme.CA()
    file = written(trusted.cert_pem, tmp_path / "ca.pem")
    async with tls_before(own_redis, authority.issue_cert(host)) as port:
        async with Redis.from_url(f"rediss://localhost:{port}", ssl_ca_certs=file) as client:
            async with RedisStreams(client, app="web", timeout=60.0) as streams:  # longer than the test may take
                with pytest.raises(BrokerUnavailable, match=why):
                    await streams.publish(message(1))
                with pytest.raises(BrokerUnavailable, match=why):
                    await streams.group("g", start="new").open()


async def test_the_command_line_has_the_options_of_redis_cli(
    own_redis: RedisServer, authority: trustme.CA, ca_file: str, tmp_path: Path
) -> None:
    mine = written(authority.issue_cert("ops").private_key_and_cert_chain_pem, tmp_path / "mine.pem")
    async with tls_before(own_redis, authority.issue_cert("localhost"), clients=authority) as port:
        where = ("--redis", f"rediss://localhost:{port}/0")
        sent = await silbo("send", "order.paid", "{}", *where, "--cacert", ca_file, "--cert", mine, "--json")
        assert sent.code == 0, sent
        unknown = await silbo("groups", *where)
        assert unknown.code == 1 and "certificate verify failed" in unknown.err, unknown
    plain = await silbo("groups", "--redis", own_redis.url, "--cacert", ca_file)
    assert plain.code == 2 and "rediss://" in plain.err, plain
    absent = await silbo("groups", *where, "--cacert", str(tmp_path / "absent.pem"))
    assert absent.code == 2 and "there is no file" in absent.err, absent
