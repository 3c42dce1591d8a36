"""Calls of scripts and commands, and a connection on which they follow one another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, Final, Protocol, TypeAlias

from redis.asyncio import RedisCluster

from silbo._checks import check_seconds
from silbo._loops import LoopBinding
from silbo._retry import Backoff
from silbo.brokers.redis.connection import (
    Client,
    Connection,
    Lost,
    Refused,
    connect,
    describe_server,
    find_trouble,
    pack_words,
    to_unavailable,
)
from silbo.brokers.redis.failures import Unreached
from silbo.brokers.redis.key_types import find_wrong_types
from silbo.brokers.redis.nodes import Address, ClusterNodes, nodes_of
from silbo.brokers.redis.scripts import Script
from silbo.errors import BrokerUnavailable

__all__ = [
    "UNANSWERED",
    "Call",
    "CallConnection",
    "Command",
    "DeclaringCall",
    "ScriptCall",
    "MakeCall",
    "ask",
    "run_call",
    "run_calls",
    "run_script",
    "to_mapping",
]

UNANSWERED: Final = object()
"""The reply of a call that has none yet."""
RETRY: Final = Backoff(initial=0.01, cap=0.25)
"""The delays between two attempts at a node that is not ready."""
_NOT_READY: Final = frozenset({"CLUSTERDOWN", "LOADING", "MASTERDOWN", "TRYAGAIN"})
"""Answers of a cluster's node that has done nothing, and will soon be able to, or another one in its place."""
_KEYLESS: Final = frozenset({b"ACL", b"CLUSTER", b"CONFIG", b"INFO", b"PING", b"SCAN", b"TIME"})


class Call(Protocol):
    """A call of a script, or a command.

    Attributes:
        reply: A value, a :class:`Refused`, or ``UNANSWERED``.
        keys: The keys that it uses.
    """

    reply: Any

    @property
    def keys(self) -> Sequence[bytes]:
        """See above."""
        ...

    def pack(self, *, by_source: bool) -> bytes:
        """Return the call as the Redis protocol writes it: a script by its digest, or by its source."""
        ...


class DeclaringCall:
    """A call of a script, which may ask for more keys."""

    __slots__ = ("keys", "reply")

    keys: Sequence[bytes]
    reply: Any

    def declare(self, refusal: Refused) -> bool:
        """Name the keys that the script asks for. True if so: the call is to be repeated, for nothing was done."""
        if refusal.code != "DECLARE":
            return False
        wanted = [key for key in str(refusal).encode().split()[1:] if key not in self.keys]
        self.keys = [*self.keys, *dict.fromkeys(wanted)]
        return bool(wanted)


class ScriptCall(DeclaringCall):
    """One call of a script; ``arguments`` are ``count`` packed words."""

    __slots__ = ("_arguments", "_count", "_script")

    def __init__(self, script: Script, keys: Sequence[bytes], arguments: bytes, count: int) -> None:
        self._script = script
        self.keys = keys
        self._arguments = arguments
        self._count = count
        self.reply = UNANSWERED

    @classmethod
    def of(cls, script: Script, keys: Sequence[bytes], *arguments: bytes) -> ScriptCall:
        """Return a call with these arguments."""
        return cls(script, keys, pack_words(arguments), len(arguments))

    def pack(self, *, by_source: bool) -> bytes:
        """See :class:`Call`."""
        return self._script.pack_call(self.keys, self._arguments, self._count, by_source=by_source)


class Command:
    """One command, most often about one key."""

    __slots__ = ("_words", "reply")

    def __init__(self, *words: bytes) -> None:
        self._words = words
        self.reply: Any = UNANSWERED

    @property
    def keys(self) -> Sequence[bytes]:
        """See :class:`Call`."""
        name = self._words[0]
        if name in _KEYLESS:
            return ()
        if name == b"XREAD":
            rest = self._words[self._words.index(b"STREAMS") + 1 :]
            return rest[: len(rest) // 2]
        return self._words[2:3] if name in (b"XINFO", b"MEMORY") else self._words[1:2]

    def pack(self, *, by_source: bool) -> bytes:  # a command has no source
        """See :class:`Call`."""
        return b"*%d\r\n%b" % (len(self._words), pack_words(self._words))


class AskedCall:
    """A call at the node to which a slot is moving: right behind ASKING, so that nothing can come between.

    A script goes by its source at once, for the repeat after NOSCRIPT would need an ASKING of its own; so does one after DECLARE.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self.keys = call.keys
        self.reply: Any = UNANSWERED

    def pack(self, *, by_source: bool) -> bytes:
        """See :class:`Call`."""
        self._call.reply = UNANSWERED  # the ASK is an answer no longer
        return self._call.pack(by_source=True)


MakeCall: TypeAlias = Callable[Concatenate[Script, Sequence[bytes], ...], ScriptCall]
"""``(script, keys, *arguments)`` returns a call, as ``ScriptCall.of`` does."""


async def run_calls(connection: Connection, calls: Sequence[Call]) -> None:
    """Send the calls in one write, and set the reply of each.

    After SCRIPT FLUSH or a restart Redis answers NOSCRIPT and has carried out nothing of that call: it is repeated by its
    source. So is a script that asks for more keys. Another call must not come between, so the caller keeps the connection until
    this returns. The error of a key of another type does not name the key: a :class:`WrongType` that does so takes its place.

    Raises:
        Lost: the connection broke. Calls that are ``UNANSWERED`` may have been carried out.
    """
    failed: list[Call] = []
    by_source = False
    while calls:
        for call in calls:
            call.reply = UNANSWERED
        await connection.write(b"".join([call.pack(by_source=by_source) for call in calls]))
        refused: list[Call] = []
        for call in calls:
            try:
                call.reply = await connection.read()
            except Refused as refusal:
                call.reply = refusal
                refused.append(call)
        if not (refused or failed):
            return
        calls = []
        for call in refused:
            is_asked_for = isinstance(call, DeclaringCall) and call.declare(call.reply)
            is_unknown = call.reply.code == "NOSCRIPT" and not by_source
            (calls if is_asked_for or is_unknown else failed).append(call)
        by_source = True
    for call in failed:
        if call.reply.code == "WRONGTYPE" and (wrong := await find_wrong_types(connection, call.keys)):
            call.reply = next(iter(wrong.values()))


async def run_script(connection: Connection, script: Script, keys: Sequence[bytes], *arguments: bytes) -> Any:
    """Run one call of a script, and return its reply.

    Raises:
        Lost: the connection broke; perhaps the script ran.
        Refused: Redis's answer is an error.
    """
    return await run_call(connection, ScriptCall.of(script, keys, *arguments))


async def run_call(connection: Connection, call: Call) -> Any:
    """Run one call, and return its reply; raises as :func:`run_script` does."""
    await run_calls(connection, [call])
    if isinstance(call.reply, Refused):
        raise call.reply
    return call.reply


class CallConnection:
    """A connection of silbo's own, opened when it is needed, on which calls follow one another.

    For one event loop at a time. After any trouble the connection is dropped, so that no call gets the late answer to
    another. In a cluster there is a connection to each node that has a part in the calls: each call goes to the node
    that serves its keys now.

    Args:
        client: The program's client.
        timeout: Seconds in which a call is answered, the wait for earlier calls included.
        owner: The name of the class that the user has made, for errors.
        is_patient: True if a reply may be large: the time begins anew as long as bytes of it come.
        node: The node of the cluster to which all calls go; None for the nodes of their keys.
    """

    def __init__(
        self,
        client: Client,
        timeout: float,
        *,
        owner: str = "CallConnection",
        is_patient: bool = False,
        node: Address | None = None,
    ) -> None:
        self._nodes: ClusterNodes | None = None
        if isinstance(client, RedisCluster) and node is None:
            self._nodes = nodes_of(client)
        self._node = node
        self.server: Final = describe_server(client) if node is None else f"Redis at {node[0]}:{node[1]}"
        self._client = client
        self._owner = owner
        self._timeout = check_seconds("timeout", timeout)
        self._is_patient = is_patient
        self._no_answer = f"{self.server} has not answered within {timeout:g} s"
        self._binding = LoopBinding(owner, is_busy=lambda: self.is_busy, forget=self._forget)
        self._closed = False
        self._forget()

    def _forget(self) -> None:  # the connection of another loop can be neither used nor closed in this one
        self._idle: Connection | None = None
        self._lock = asyncio.Lock()
        self._by_node: dict[Address, CallConnection] = {}

    @property
    def is_busy(self) -> bool:
        """True if a call is under way."""
        return self._lock.locked() or any(connection.is_busy for connection in self._by_node.values())

    def deadline(self) -> float:
        """Return the loop's time at which a call that begins now is answered at the latest."""
        return asyncio.get_running_loop().time() + self._timeout

    async def run_all(self, *calls: Call, deadline: float | None = None) -> list[Any]:
        """Run the calls in one write, and return their replies in the same order.

        Returns:
            For each call a value; or a :class:`Refused`: it was not carried out; or a :class:`Lost`: there was no answer,
            perhaps it was carried out. In a cluster, :class:`Unreached` for the calls of a node that can't be reached, if
            others were answered.

        Raises:
            BrokerUnavailable: there was no connection in time; nothing was done, safe to repeat.
            LoopConflict: another event loop uses the connection.
        """
        until = self.deadline() if deadline is None else deadline
        self._binding.enter()
        if self._nodes is not None:
            return await self._run_in_cluster(self._nodes, calls, until)
        try:
            async with asyncio.timeout_at(until):
                await self._lock.acquire()
        except TimeoutError:
            raise BrokerUnavailable(f"{self._no_answer}; nothing was done") from None
        connection: Connection | None = None
        try:
            connection = await self._connect(until)
            trouble = ""
            try:
                async with asyncio.timeout_at(until) as limit:
                    if self._is_patient:
                        connection.watch_progress()
                        with connection.extending(limit, self._timeout):
                            await run_calls(connection, calls)
                    else:
                        await run_calls(connection, calls)
            except Lost as error:
                trouble = f"the connection to {self.server} broke: {error}"
            except TimeoutError:
                trouble = self._no_answer
            replies = [Lost(trouble) if call.reply is UNANSWERED else call.reply for call in calls]
            if not trouble and not any(isinstance(reply, Refused) and reply.is_demotion for reply in replies):
                self._idle, connection = connection, None
            return replies
        finally:
            try:
                if connection is not None:
                    await connection.drop()
            finally:
                self._lock.release()

    async def run(self, call: Call, *, deadline: float | None = None) -> Any:
        """Run one call, and return its reply.

        Raises:
            BrokerUnavailable: there was no answer, and perhaps the call was carried out; or the answer is an error, which
                is the ``__cause__``.
        """
        (reply,) = await self.run_all(call, deadline=deadline)
        if isinstance(reply, Lost):
            raise BrokerUnavailable(str(reply)) from reply
        if isinstance(reply, Refused):
            raise BrokerUnavailable(f"{self.server} refused it: {reply}") from reply
        return reply

    async def run_command(self, *words: bytes) -> Any:
        """Run one command, and return its reply; raises as :meth:`run` does."""
        return await self.run(Command(*words))

    async def aclose(self) -> None:
        """Wait for the call under way, within its deadline, and close the connection. May be called twice."""
        self._binding.enter("aclose")
        self._closed = True
        for by_node in list(self._by_node.values()):
            await by_node.aclose()
        async with self._lock:
            connection, self._idle = self._idle, None
            if connection is not None:
                await connection.aclose()

    async def _connect(self, until: float) -> Connection:
        if self._closed:
            raise BrokerUnavailable("it is closed, and can't be used after aclose(); nothing was done")
        try:
            async with asyncio.timeout_at(until):
                if (idle := self._idle) is not None:
                    is_usable = await idle.is_usable()
                    self._idle = None
                    if is_usable:
                        return idle
                    await idle.drop()
                return await self._open()
        except TimeoutError:
            trouble = find_trouble(self._client)
            raise BrokerUnavailable(
                f"{self._no_answer}{f' ({trouble})' if trouble else ''}; nothing was done"
            ) from None
        except Lost as error:
            raise BrokerUnavailable(f"{self.server} can't be reached ({error}); nothing was done") from error
        except Refused as refusal:
            text = f"{self.server} refused the connection: {refusal}; nothing was done"
            raise to_unavailable(refusal, self.server, text) from refusal

    async def _open(self) -> Connection:
        if self._node is None:
            assert not isinstance(self._client, RedisCluster)
            return await connect(self._client)
        assert isinstance(self._client, RedisCluster)
        return await nodes_of(self._client).connect(self._node)

    # -- in a cluster ---------------------------------------------------------------------------------------

    async def each_node(self) -> list[CallConnection]:
        """Return a connection to each node of a cluster that serves slots, for commands without a key; else this one.

        Raises:
            BrokerUnavailable: no node could be asked which they are; safe to repeat.
        """
        if self._nodes is None:
            return [self]
        self._binding.enter()
        try:
            async with asyncio.timeout(self._timeout):
                await self._nodes.refresh()
        except (Lost, Refused, TimeoutError) as error:
            raise BrokerUnavailable(f"{self.server} can't be reached ({str(error) or self._no_answer})") from error
        return [self._at(address) for address in self._nodes.masters]

    async def node_of(self, key: bytes) -> CallConnection:
        """Return a connection to the node of a cluster that serves the key, for commands without a key; else this one.

        Raises:
            BrokerUnavailable: that node is not known at the moment; safe to repeat.
        """
        if self._nodes is None:
            return self
        self._binding.enter()
        try:
            async with asyncio.timeout(self._timeout):
                return self._at(await self._nodes.find(key))
        except (Lost, Refused, TimeoutError) as error:
            raise BrokerUnavailable(f"{self.server} can't be reached ({str(error) or self._no_answer})") from error

    def _at(self, address: Address) -> CallConnection:
        by_node = self._by_node.get(address)
        if by_node is None:
            by_node = self._by_node[address] = CallConnection(
                self._client, self._timeout, owner=self._owner, is_patient=self._is_patient, node=address
            )
            by_node._closed = self._closed  # a call that was looking for its node meanwhile opens nothing any more
        return by_node

    async def _run_in_cluster(self, nodes: ClusterNodes, calls: Sequence[Call], until: float) -> list[Any]:
        """Run each call at the node of its keys, the nodes side by side; follow slots that move, until the deadline."""
        if self._closed:
            raise BrokerUnavailable("it is closed, and can't be used after aclose(); nothing was done")
        work = [_Routed(call) for call in calls]
        waiting = work
        attempt = 0
        while waiting:
            try:
                async with asyncio.timeout_at(until):
                    if any(each.is_held_up for each in waiting):
                        attempt += 1
                        await asyncio.sleep(RETRY.delay(attempt) or 0)
                    for each in waiting:
                        await each.find_node(nodes)
            except TimeoutError:
                break
            except Refused as refusal:
                raise BrokerUnavailable(
                    f"{self.server} refused the connection: {refusal}; nothing was done"
                ) from refusal
            waiting = [each for each in waiting if not each.is_settled]
            # Not inside of the time limit: each node keeps to it, and knows what was sent.
            await self._run_at_nodes(nodes, [each for each in waiting if not each.is_held_up], until)
            waiting = [each for each in waiting if not each.settle(nodes)]
        replies = [Unreached(self._no_answer) if each.reply is UNANSWERED else each.reply for each in work]
        if replies and all(isinstance(reply, Unreached) for reply in replies):
            raise BrokerUnavailable(str(replies[0])) from replies[0]
        for call, reply in zip(calls, replies, strict=True):
            call.reply = UNANSWERED if isinstance(reply, Lost) else reply
        return replies

    async def _run_at_nodes(self, nodes: ClusterNodes, work: Sequence[_Routed], until: float) -> None:
        by_node: dict[Address, list[_Routed]] = {}
        for each in work:
            assert each.node is not None
            by_node.setdefault(each.node, []).append(each)
        if not by_node.keys() <= self._by_node.keys():
            await self._drop_gone(nodes)
        if len(by_node) == 1:
            await self._run_at_node(*by_node.popitem(), until)
            return
        async with asyncio.TaskGroup() as tasks:
            for node, its_work in by_node.items():
                tasks.create_task(self._run_at_node(node, its_work, until))

    async def _drop_gone(self, nodes: ClusterNodes) -> None:
        """Drop the connections to nodes that have left the cluster: others come in their place."""
        for node, connection in list(self._by_node.items()):
            if not nodes.is_known(node) and not connection.is_busy:
                del self._by_node[node]
                await connection.aclose()

    async def _run_at_node(self, node: Address, work: Sequence[_Routed], until: float) -> None:
        calls = [call for each in work for call in each.calls()]
        try:
            replies = iter(await self._at(node).run_all(*calls, deadline=until))
        except BrokerUnavailable as error:
            for each in work:
                each.reply = Unreached(str(error))
            return
        for each in work:
            if each.is_asking:
                next(replies)
            each.reply = next(replies)


class _Routed:
    """A call on its way through a cluster.

    Attributes:
        node: The node to which it goes next.
        is_asking: True if the node has not taken over the slot yet, and is asked nevertheless.
        is_held_up: True if the node was not ready.
        is_settled: True if nothing more is to be tried.
        reply: The last reply.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._redirected: Address | None = None
        self.node: Address | None = None
        self.is_asking = False
        self.is_held_up = False
        self.is_settled = False
        self.reply: Any = UNANSWERED

    def calls(self) -> list[Call]:
        """Return what is sent: the call, behind ASKING if the slot is on its way."""
        return [Command(b"ASKING"), AskedCall(self._call)] if self.is_asking else [self._call]

    async def find_node(self, nodes: ClusterNodes) -> None:
        """Find the node of the next attempt; give up if it is the one that could not be reached just now."""
        before, self.node = self.node, self._redirected
        self._redirected = None
        self.is_held_up = False
        if self.node is None:
            keys = self._call.keys
            try:
                self.node = await nodes.find(keys[0]) if keys else await nodes.find_any()
            except Lost as error:
                self.reply = Unreached(f"{error}; nothing was done")
                self.is_settled = True
                return
            except Refused as refusal:
                if refusal.code not in _NOT_READY:
                    raise
                self.reply = refusal
                self.is_held_up = True
                return
        self.is_settled = isinstance(self.reply, Unreached) and self.node == before

    def settle(self, nodes: ClusterNodes) -> bool:
        """Look at the reply; return True if it is the last."""
        if self.is_held_up:
            return False
        assert self.node is not None
        reply = self.reply
        self.is_asking = False
        if isinstance(reply, Lost):
            nodes.doubt(self.node)
        elif isinstance(reply, Unreached):
            return False
        elif isinstance(reply, Refused):
            if reply.code in ("MOVED", "ASK"):
                self._redirected = nodes.follow(reply, self.node)
                self.is_asking = reply.code == "ASK" and self._redirected is not None
                return False
            if isinstance(self._call, DeclaringCall) and self._call.declare(reply):  # behind ASKING
                return False
            if reply.code in _NOT_READY or reply.is_demotion:
                nodes.doubt(self.node)
                self.is_held_up = True
                return False
        self.is_settled = True
        return True


async def ask(connection: CallConnection, *calls: Call) -> list[Any]:
    """Run the calls in one write; return their replies.

    Raises:
        BrokerUnavailable: there was no answer, or one of them is an error, which is the ``__cause__``.
    """
    replies = await connection.run_all(*calls)
    for reply in replies:
        if isinstance(reply, Lost | Refused):
            raise BrokerUnavailable(f"{connection.server} did not answer what was asked: {reply}") from reply
    return replies


def to_mapping(flat: Any) -> dict[str, Any]:
    """Return name, value, name, value, ... as a dict with names as text."""
    return {name.decode(): value for name, value in zip(flat[::2], flat[1::2], strict=True)}
