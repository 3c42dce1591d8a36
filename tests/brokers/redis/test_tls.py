"""TLS: with an authority of the user's own, with client certificates, and refusals that say why.

The servers of the wheels are built without TLS. So what is tested is a proxy before a real Redis, node or Sentinel that ends the TLS.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from itertools import count
from pathlib import Path

import pytest
import trustme
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.sentinel import Sentinel
from redis.crc import key_slot

from silbo.brokers.redis import DeadLetters, RedisInbox, RedisPubSub, RedisStreams
from silbo.brokers.redis.streams import build_stream_key
from silbo.errors import BrokerUnavailable
from silbo.message import Delivery
from tests.support.command_line import silbo
from tests.support.redis_sentinel import port_of, sentinel
from tests.support.redis_streams import eventually, message, number, opened, receive, stored
from tools.redis_cluster import ClusterServers
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
    server: RedisServer | int, certificate: trustme.LeafCert, *, clients: trustme.CA | None = None
) -> AsyncIterator[int]:
    """Serve a server's unix socket, or a port, with TLS on a free port; only to clients with a certificate, if an authority is given."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate.configure_cert(context)
    if clients is not None:
        clients.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
    tasks: set[asyncio.Task[None]] = set()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(OSError):
                while data := await reader.read(1 << 16):
                    writer.write(data)
                    await writer.drain()
        finally:
            writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if isinstance(server, int):
            there, here = await asyncio.open_connection("127.0.0.1", server)
        else:
            there, here = await asyncio.open_unix_connection(server.url.removeprefix("unix://").partition("?")[0])
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


# -- a cluster, and Sentinel --------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.cluster
async def test_every_node_of_a_cluster_is_spoken_to_over_tls(
    cluster: ClusterServers, prefix: str, authority: trustme.CA, ca_file: str
) -> None:
    """Also the one that a MOVED or an ASK leads to; the names of the certificates are checked for each."""
    addresses: dict[int, str] = {}
    for address in (f"orders-{each}" for each in count()):
        _ = addresses.setdefault(cluster.node_of(build_stream_key(address, prefix)).port, address)
        if len(addresses) == 3:
            break
    moving = build_stream_key(addresses[cluster.nodes[0].port], prefix)
    async with AsyncExitStack() as stack:
        certificate = authority.issue_cert(
            "localhost", "127.0.0.1"
        )  # redis-py looks up the localhost of the first node
        ports = {
            node.port: await stack.enter_async_context(tls_before(node.port, certificate)) for node in cluster.nodes
        }
        client = RedisCluster(
            "localhost",
            ports[cluster.nodes[0].port],
            ssl=True,
            ssl_ca_certs=ca_file,
            address_remap=lambda at: ("localhost", ports.get(at[1], at[1])),
        )
        async with (
            RedisStreams(client, app="web", prefix=prefix) as streams,
            RedisPubSub(client, app="web", prefix=prefix, sharded=True) as pubsub,
            RedisInbox(client, prefix=prefix) as inbox,
            DeadLetters(client, prefix=prefix, stream=addresses[cluster.nodes[0].port]) as dead,
            opened(streams.group("billing", start="oldest", streams=list(addresses.values()))) as reader,
            opened(pubsub.subscribe("user.joined")) as listener,
        ):
            await streams.publish(*[message(each, to=to) for each in range(10) for to in addresses.values()])
            items = [item for item in await receive(reader, 30) if isinstance(item, Delivery)]
            assert sorted(map(number, items)) == sorted([*range(10)] * 3)
            (letter,) = [item for item in items if item.address == moving][:1]
            assert await reader.bury(letter, error="broken", attempts=1)
            await reader.ack(*[item for item in items if item is not letter])
            await pubsub.publish(message(2))
            assert [number(item) for item in await receive(listener, 1)] == [2]
            await inbox.remember("billing", ["p-1"])
            assert await inbox.find_handled("billing", ["p-1", "p-2"]) == ["p-1"]
            cluster.move(key_slot(moving.encode()), cluster.nodes[1])
            await streams.publish(message(11, to=addresses[cluster.nodes[0].port]))
            assert [number(item) for item in await receive(reader, 1)] == [11]
            assert (await dead.retry()).returned == 1
    cluster.move(key_slot(moving.encode()), cluster.nodes[0])


@pytest.mark.long
@pytest.mark.cluster
async def test_the_command_line_speaks_tls_to_a_cluster(authority: trustme.CA, ca_file: str, prefix: str) -> None:
    """As a service does, the nodes tell the address at which they are reached."""
    with ClusterServers(masters=1) as cluster:
        (node,) = cluster.nodes
        async with tls_before(node.port, authority.issue_cert("127.0.0.1")) as port:
            node.run("CONFIG", "SET", "cluster-announce-port", port)
            where = ("--redis", f"rediss://127.0.0.1:{port}", "--cluster", "--prefix", prefix)
            sent = await silbo("send", "order.paid", "{}", *where, "--cacert", ca_file)
            assert sent.code == 0, sent
            doctor = await silbo("doctor", *where, "--cacert", ca_file, "--json")
            assert {row["check"]: row["level"] for row in doctor.objects}["cluster"] == "ok"
            unknown = await silbo("groups", *where)
            assert unknown.code == 1 and "certificate verify failed" in unknown.err, unknown


@pytest.mark.long
@pytest.mark.timeout(90)
async def test_sentinel_and_its_master_are_spoken_to_over_tls(
    authority: trustme.CA, ca_file: str, tmp_path: Path
) -> None:
    """Also the new master after a fail-over."""
    tls = {"ssl": True, "ssl_ca_certs": ca_file}
    async with AsyncExitStack() as stack:
        old, new = (stack.enter_context(RedisServer(port=True)) for _ in range(2))
        new_admin = await stack.enter_async_context(Redis.from_url(new.url))
        await new_admin.execute_command("REPLICAOF", "127.0.0.1", port_of(old))

        async def is_in_sync() -> bool:
            return (await new_admin.info("replication"))["master_link_status"] == "up"

        await eventually(is_in_sync)
        plain = await stack.enter_async_context(sentinel(old, tmp_path))
        (control,) = plain.sentinels
        servers = [port_of(old), port_of(new), control.connection_pool.connection_kwargs["port"]]
        ports = {
            port: await stack.enter_async_context(tls_before(port, authority.issue_cert("localhost")))
            for port in servers
        }

        class Outside(Sentinel):
            """The servers know one another by other addresses than the program knows them by."""

            async def discover_master(self, service_name: str) -> tuple[str, int]:
                _, port = await super().discover_master(service_name)
                return "localhost", ports[port]

        manager = Outside([("localhost", ports[servers[2]])], sentinel_kwargs=tls)
        for each in manager.sentinels:
            stack.push_async_callback(each.aclose)
        client = await stack.enter_async_context(manager.master_for("main", **tls))
        streams = await stack.enter_async_context(RedisStreams(client, app="web", timeout=30.0))
        receiver = await stack.enter_async_context(opened(streams.group("billing", start="oldest")))
        await streams.publish(message(1))
        assert [number(item) for item in await receive(receiver, 1)] == [1]
        await eventually(lambda: control.execute_command("SENTINEL", "FAILOVER", "main"))

        async def is_known() -> bool:
            return (await plain.discover_master("main"))[1] == port_of(new)

        await eventually(is_known)
        old.kill()
        await new_admin.connection_pool.disconnect()  # the election has cut it

        async def is_published() -> bool:
            await streams.publish(message(2))
            return True

        await eventually(is_published)
        assert (await stored(new_admin))[-1] == 2

        async def is_read() -> bool:
            return 2 in [number(item) for item in await receiver.receive(10)]

        await eventually(is_read)
