"""The sharded channels of Redis Pub/Sub: each is at the node of its slot, and moves with the slot."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any, Final

from redis.asyncio import RedisCluster

from silbo._retry import Backoff
from silbo.brokers._sender import OutgoingMessage
from silbo.brokers.redis.calls import UNANSWERED
from silbo.brokers.redis.connection import Client, Connection, Lost, Refused, connect, wait_for_any
from silbo.brokers.redis.nodes import Address, nodes_of
from silbo.brokers.redis.pubsub_receiver import PubSubReceiver
from silbo.brokers.redis.sender import ClusterSender, MarkedCall
from silbo.errors import BrokerUnavailable, Gap
from silbo.message import Batch, Format

__all__ = ["ShardedChannelReceiver", "ShardedChannelSender"]

WAIT: Final = 0.5
"""A receive waits at most 0.5 seconds for a message."""
RESUBSCRIBE: Final = Backoff(initial=0.02, cap=0.25)
"""The delays between two attempts to subscribe again."""


class ShardedChannelSender(ClusterSender):
    """Sends published messages to sharded channels, each by a command: a script would fail while its slot moves."""

    async def build_calls(self, key: bytes, messages: Sequence[OutgoingMessage]) -> Sequence[MarkedCall]:
        """Return a command for each message."""
        return [_ShardedPublish(key, outgoing) for outgoing in messages]


class _ShardedPublish:
    """The SPUBLISH of one message."""

    __slots__ = ("_is_written", "_outgoing", "keys", "reply")

    def __init__(self, channel: bytes, outgoing: OutgoingMessage) -> None:
        self._outgoing = outgoing
        self._is_written = False
        self.keys = (channel,)
        self.reply: Any = UNANSWERED

    def pack(self, *, by_source: bool) -> bytes:
        """See :class:`~silbo.brokers.redis.calls.Call`."""
        self._is_written = True
        return b"*3\r\n$8\r\nSPUBLISH\r\n%b" % self._outgoing.raw

    def mark_outcomes(self, server: str) -> None:
        """See :class:`~silbo.brokers.redis.sender.MarkedCall`."""
        if self.reply is UNANSWERED:
            self._outgoing.is_handed_over = self._is_written
        elif isinstance(self.reply, Refused):
            self._outgoing.mark_unsent(f"{server} refused it: {_explain(self.reply)}")
        else:
            self._outgoing.mark_sent()


class ShardedChannelReceiver(PubSubReceiver):
    """Subscriptions to sharded channels, over a connection to each node that has one of them.

    A channel whose slot moves, or whose node dies, is subscribed to again by a task, while the others are read; then it has
    a gap.

    Args:
        client: The program's client.
        channels: The channels.
        format: Decodes the messages.
        timeout: Seconds in which a subscription is confirmed, and a PING is answered.
    """

    def __init__(self, client: Client, channels: Sequence[str], format: Format, timeout: float) -> None:  # noqa: A002
        super().__init__(client, format, timeout)
        self._away: dict[str, str] = dict.fromkeys(channels, "")  # not subscribed to, and why
        self._links: list[_Link] = []
        self._subscribing: asyncio.Task[None] | None = None
        self._trouble = ""

    @property
    def away(self) -> tuple[str, ...]:
        """See :class:`~silbo.protocols.Receiver`."""
        return tuple(self._away) if self._links else ()

    async def open(self) -> None:
        """Subscribe to every channel.

        Raises:
            BrokerUnavailable: not all were confirmed in time, or Redis refuses.
        """
        self._binding.enter("open")
        try:
            async with asyncio.timeout(self._timeout):
                await self._subscribe(give_up=True)
        except (Lost, Refused, TimeoutError) as error:
            await self.aclose()
            why = _explain(error) or self._trouble or f"no answer within {self._timeout:g} s"
            raise BrokerUnavailable(f"can't subscribe at {self._server}: {why}") from error
        except BaseException:
            await self.aclose()
            raise
        self._ready.clear()  # no gap: they are the first

    # -- receiving ------------------------------------------------------------------------------------------

    async def _fill(self, limit: int) -> None:
        if not self._ready:
            await self._read(limit)

    async def _read(self, limit: int) -> None:
        """Take what has come over any connection; wait for it, and look after connections that are silent."""
        self._subscribe_again()
        if not self._links:
            assert self._subscribing is not None
            _ = await asyncio.wait([self._subscribing], timeout=WAIT)
            if not self._links:
                raise BrokerUnavailable(f"lost the subscription to {self._server}: {self._trouble}")
        if not await self._take(limit):
            await wait_for_any([link.connection for link in self._links], WAIT)
            await self._take(limit)

    async def _take(self, limit: int) -> bool:
        """Take what has come; return True if there was something."""
        for link in list(self._links):
            try:
                if link.connection.may_have_to_renew:
                    link = await self._renew(link)  # it goes on over another connection
                if replies := await link.connection.read_all(limit, 0):
                    self._sort(link, replies)
                    if not link.channels:
                        self._links.remove(link)
                        await link.connection.drop()
                else:
                    await link.look_after(self._timeout)
            except (Lost, Refused) as error:
                await self._lose(link, f"the connection to its node was lost ({error}) and is back")
        return bool(self._ready)

    def _sort(self, link: _Link, replies: Sequence[Any]) -> None:
        link.note_heard()
        raws: list[bytes] = []
        last: bytes | None = None
        for reply in replies:
            if reply[0] == b"smessage":
                _, channel, raw = reply
                if channel != last:
                    last, raws = channel, []
                    self._ready.append(Batch(channel.decode(errors="replace"), self._format, raws))
                raws.append(raw)
            elif reply[0] == b"sunsubscribe" and (channel := reply[1].decode()) in link.channels:
                link.channels.remove(channel)
                self._lose_channels([channel], "its slot moved to another node", link.node)

    async def _lose(self, link: _Link, reason: str) -> None:
        self._trouble = reason
        self._links.remove(link)
        self._lose_channels(link.channels, reason, link.node)
        await link.connection.drop()

    def _lose_channels(self, channels: Collection[str], reason: str, node: Address | None) -> None:
        self._away.update(dict.fromkeys(channels, reason))
        if node is not None and isinstance(self._client, RedisCluster):
            nodes_of(self._client).doubt(node)
        self._subscribe_again()

    # -- subscribing ----------------------------------------------------------------------------------------

    def _subscribe_again(self) -> None:
        if self._away and not self._closed and (self._subscribing is None or self._subscribing.done()):
            self._subscribing = asyncio.create_task(self._subscribe(give_up=False))

    async def _subscribe(self, *, give_up: bool) -> None:
        """Subscribe to the channels that are away, until none is; or raise what Redis refuses with."""
        attempt = 0
        while self._away:
            for node, channels in (await self._find_nodes(give_up)).items():
                try:
                    async with asyncio.timeout(self._timeout):
                        await self._subscribe_at(node, channels)
                except (Lost, Refused, TimeoutError) as error:
                    self._trouble = str(error) or f"no answer within {self._timeout:g} s"
                    if give_up and isinstance(error, Refused) and not error.is_of_server:
                        raise
            if self._away:
                attempt += 1
                await asyncio.sleep(RESUBSCRIBE.delay(attempt) or 0)

    async def _find_nodes(self, give_up: bool) -> dict[Address | None, list[str]]:
        """Return the channels that are away by their nodes, as far as they can be found."""
        if not isinstance(self._client, RedisCluster):
            return {None: list(self._away)}
        found: dict[Address | None, list[str]] = {}
        for channel in list(self._away):
            try:
                found.setdefault(await nodes_of(self._client).find(channel.encode()), []).append(channel)
            except (Lost, Refused) as error:
                self._trouble = str(error)
                if give_up and isinstance(error, Refused) and not error.is_of_server:
                    raise
        return found

    async def _subscribe_at(self, node: Address | None, channels: Sequence[str]) -> None:
        """Open a connection, and subscribe to the channels that are at this node; a MOVED tells where another one is."""
        link, held, refusals = await self._open_link(node, channels)
        if link.channels:
            self._add(link, held)
        else:
            await link.connection.drop()
        for refused in refusals:
            if refused.code not in ("MOVED", "ASK") or node is None:
                raise refused
            assert isinstance(self._client, RedisCluster)
            nodes_of(self._client).follow(refused, node)

    async def _open_link(
        self, node: Address | None, channels: Collection[str]
    ) -> tuple[_Link, Sequence[Any], Sequence[Refused]]:
        """Return a new connection with those channels that are at the node, what came over it, and the refusals."""
        link = _Link(await self._connect(node), node)
        refusals: list[Refused] = []
        held: list[Any] = []
        try:
            link.connection.stream_replies()
            for channel in channels:  # each in a command of its own: their slots differ
                await link.connection.send(b"SSUBSCRIBE", channel.encode())
            answers = 0
            while answers < len(channels):
                try:
                    reply = await link.connection.read()
                except Refused as refusal:
                    answers += 1
                    refusals.append(refusal)
                    continue
                if reply[0] == b"ssubscribe":
                    answers += 1
                    link.channels.add(reply[1].decode())
                else:
                    held.append(reply)
        except BaseException:
            await link.connection.drop()
            raise
        return link, held, refusals

    async def _renew(self, former: _Link) -> _Link:
        """Return the connection that goes on: a new one if the credentials were renewed. What is published meanwhile comes twice.

        Raises:
            Lost: the former one broke.
        """
        if not await former.connection.needs_successor():
            return former
        try:
            async with asyncio.timeout(self._timeout):
                link, held, _ = await self._open_link(former.node, former.channels)
        except (Lost, Refused, TimeoutError) as error:  # the former one goes on, and a minute later it is tried again
            former.connection.note_not_renewed(error)
            return former
        replaced = link
        try:
            if link.channels == former.channels:  # else a slot has moved, which the former one is told
                async with asyncio.timeout(self._timeout):
                    await former.connection.read_out(lambda replies: self._sort(former, replies))
                self._sort(link, held)
                self._links[self._links.index(former)] = link
                replaced = former
        except TimeoutError:
            raise Lost(f"no answer to a PING within {self._timeout:g} s") from None
        finally:
            await replaced.connection.drop()
        return former if replaced is link else link

    async def _connect(self, node: Address | None) -> Connection:
        if node is None:
            assert not isinstance(self._client, RedisCluster)
            return await connect(self._client)
        assert isinstance(self._client, RedisCluster)
        return await nodes_of(self._client).connect(node)

    def _add(self, link: _Link, held: Sequence[Any]) -> None:
        self._links.append(link)
        for channel in sorted(link.channels):
            self._ready.append(Gap(channel, self._away.pop(channel)))
        self._sort(link, held)

    async def aclose(self) -> None:
        """Close the connections. May be called twice."""
        self._closed = True
        task, self._subscribing = self._subscribing, None
        if task is not None:
            task.cancel()
            with suppress(Exception):
                _ = await asyncio.wait([task])
        links, self._links = self._links, []
        for link in links:
            await link.connection.aclose()


def _explain(error: Exception) -> str:
    """Return the text of an error; say so if the server is too old."""
    text = str(error)
    return f"{text.strip()} (sharded channels need Redis 7)" if "unknown command" in text else text


class _Link:
    """A connection to one node.

    Attributes:
        connection: The connection.
        node: The node; None for a single server.
        channels: The channels that it is subscribed to.
    """

    def __init__(self, connection: Connection, node: Address | None) -> None:
        self.connection = connection
        self.node = node
        self.channels: set[str] = set()
        self._pinged_at: float | None = None
        self.note_heard()

    def note_heard(self) -> None:
        """Note that something came."""
        self._heard_at = asyncio.get_running_loop().time()
        self._pinged_at = None

    async def look_after(self, timeout: float) -> None:
        """Send a PING if nothing has come for long.

        Raises:
            Lost: there is no answer to it.
        """
        now = asyncio.get_running_loop().time()
        if self.connection.heard_at > self._heard_at:
            self._heard_at = self.connection.heard_at
            self._pinged_at = None
        if self._pinged_at is not None:
            if now - self._pinged_at > timeout:
                raise Lost(f"no answer to a PING within {timeout:g} s")
        elif now - self._heard_at > timeout:
            self._pinged_at = now
            await self.connection.send(b"PING")
