"""Starts Redis and three programs, sends requests, kills Redis and two of the programs in the middle, and counts the events."""

import argparse
import asyncio
import json
import random
import signal
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import httpx
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from rich.console import Console
from rich.progress import Progress

from examples.meetings import ledger
from examples.meetings.misfortunes import Misfortunes, unsent
from examples.meetings.process import Settings
from examples.meetings.programs import Program, ProgramFailed, running
from examples.meetings.report import Outcome
from examples.meetings.traffic import Answer, Gate, Plan, send
from tools.redis_server import ExternalRedis, RedisServer, external_url
from tools.server import ServerFailed

HOST, BILLING, BYSTANDER = (f"examples.meetings.{name}" for name in ("host", "billing", "bystander"))
SECONDS_TO_ARRIVE = 15.0
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
HELPERS = ("", ":outbox", ":attempts:billing", ":offered:billing", ":given", ":live:billing", ":dead")
"""Endings of the keys that silbo keeps beside a stream; each key begins with the stream's key."""

Server = RedisServer | ExternalRedis


class RedisAway(Exception):
    """Redis does not answer."""


@asynccontextmanager
async def own_corner(url: str) -> AsyncGenerator[tuple[Redis, str]]:
    """Give a client, and a prefix that nobody else uses; delete the keys under it at the end.

    Raises:
        RedisAway: Redis can't be reached, now or later.
    """
    prefix = f"silbo-demo-{uuid4().hex[:8]}"
    keys = [stream(prefix) + helper for helper in HELPERS]
    try:
        # No socket timeout: with one, redis-py can swallow a cancellation on Python 3.11, and so a Ctrl-C.
        client = Redis.from_url(url, socket_connect_timeout=5, socket_timeout=None, retry=Retry(NoBackoff(), 0))
    except ValueError as error:
        raise RedisAway(f"SILBO_REDIS_URL is no URL of a Redis: {error}") from None
    try:
        async with client:
            await answers(client)
            expiring = asyncio.create_task(expire(client, keys))
            try:
                yield client, prefix
            finally:
                expiring.cancel()
                with suppress(RedisError):  # it is away, and so are they
                    await client.unlink(*keys)
    except RedisError as error:
        raise RedisAway(f"Redis does not answer: {error}") from None


async def answers(client: Redis) -> None:
    """Wait until Redis answers.

    Raises:
        RedisAway: Redis did not answer in time.
    """
    try:
        async with asyncio.timeout(5):
            await client.ping()
    except TimeoutError:
        raise RedisAway("Redis does not answer within 5 s") from None


async def expire(client: Redis, keys: list[str]) -> None:
    """Let the keys expire in an hour, because a program that is killed deletes nothing."""
    while True:
        with suppress(RedisError):
            for key in keys:
                await client.expire(key, 3600)
        await asyncio.sleep(0.1)


def stream(prefix: str) -> str:
    """Return the key of the default stream."""
    return f"{prefix}:{{events}}"


async def entries(client: Redis, key: str) -> list[tuple[str, str]]:
    """Return the name and the event id of each message in a stream, read without silbo."""
    rows: Any = await client.xrange(key)
    messages = [json.loads(fields[b"message"]) for _, fields in rows]
    return [(message["message_name"], message["message_id"]) for message in messages]


async def until(done: Callable[[], Awaitable[bool]], program: Program) -> None:
    """Wait until the condition is true; give up after some time, which the table will show."""
    deadline = time.monotonic() + SECONDS_TO_ARRIVE
    while not await done() and time.monotonic() < deadline:
        program.check()
        await asyncio.sleep(0.05)


@contextmanager
def progress(console: Console, total: int) -> Generator[Callable[[], object]]:
    """Return a function to call for each answer: it moves a bar in a terminal, and elsewhere writes a line from time to time."""
    if console.is_terminal:
        with Progress(console=console, transient=True) as bar:
            requests = bar.add_task(f"{total} requests", total=total)
            yield lambda: bar.advance(requests)
    else:
        done = 0

        def count() -> None:
            nonlocal done
            done += 1
            if done * 4 // total > (done - 1) * 4 // total:
                console.print(f"{done} of {total} requests answered")

        yield count


class Demo:
    """One run of the demo."""

    def __init__(self, console: Console, server: Server, folder: Path, plan: Plan, *, calm: bool) -> None:
        self._console, self._server, self._folder, self._plan, self._calm = console, server, folder, plan, calm
        self._requests = sum(map(len, plan.requests.values()))
        self._started = time.monotonic()

    async def run(self) -> int:
        """Run the demo. Returns 0 if all figures add up, else 1."""
        async with own_corner(self._server.url) as (client, prefix):
            settings = Settings(self._server.url, prefix, self._folder)
            async with (
                running(HOST, settings) as host,
                running(BILLING, settings) as billing,
                running(BYSTANDER, settings) as bystander,
            ):
                for program in (host, billing, bystander):
                    await program.ready()
                self._tell(f"host, billing and a bystander are ready for {self._requests} requests")
                try:
                    with progress(self._console, self._requests) as on_answer:
                        answers, in_hand = await self._requests_and_misfortunes(
                            client, prefix, host, billing, on_answer
                        )
                    outcome = await self._collect(client, prefix, answers, host, billing, bystander)
                except httpx.TransportError as error:
                    raise ProgramFailed(f"a program no longer answers: {error!r}") from None
        return self._judge(replace(outcome, redelivered=in_hand))

    async def _requests_and_misfortunes(
        self, client: Redis, prefix: str, host: Program, billing: Program, on_answer: Callable[[], object]
    ) -> tuple[list[Answer], int]:
        gate = Gate(self._requests if self._calm else self._requests // 2)
        misfortunes = Misfortunes(
            requests=self._requests,
            gate=gate,
            server=self._server,
            client=client,
            stream=stream(prefix),
            host=host,
            billing=billing,
            outbox=self._folder / "outbox.db",
            tell=self._tell,
        )
        try:
            async with asyncio.TaskGroup() as tasks:
                sending = tasks.create_task(send(self._plan, host, gate, on_answer))
                happening = None if self._calm else tasks.create_task(misfortunes.happen())
        except ExceptionGroup as group:
            error: Exception = group
            while isinstance(error, ExceptionGroup):
                error = error.exceptions[0]
            raise error from None
        return sending.result(), happening.result() if happening else 0

    async def _collect(
        self, client: Redis, prefix: str, answers: list[Answer], host: Program, billing: Program, bystander: Program
    ) -> Outcome:
        """Wait until everything has arrived, and collect the figures of all programs."""

        async def all_sent() -> bool:
            return not await unsent(self._folder / "outbox.db")

        async def all_read() -> bool:
            last = (await client.xinfo_stream(stream(prefix)))["last-generated-id"]
            [group] = await client.xinfo_groups(stream(prefix))
            return bool(group["last-delivered-id"] == last and not group["pending"])

        async def somebody_hears() -> bool:
            return bool(await client.publish(f"{prefix}:over", ""))

        await until(all_sent, host)
        await host.end()
        await until(all_read, billing)
        await until(somebody_hears, bystander)
        heard = await bystander.report()
        async with httpx.AsyncClient() as http:
            accounts = (await http.get(f"{billing.url}/accounts")).json()
        return Outcome(
            plan=self._plan,
            calm=self._calm,
            answers=answers,
            accepted=ledger.read(self._folder / "host.ledger"),
            stream=await entries(client, stream(prefix)),
            booked=ledger.read(self._folder / "billing.ledger"),
            dead=[event_id for _, event_id in await entries(client, f"{stream(prefix)}:dead")],
            heard=heard["event_ids"],
            milliseconds=heard["milliseconds"],
            accounts=accounts,
        )

    def _judge(self, outcome: Outcome) -> int:
        self._console.print(outcome.table())
        for remark in outcome.remarks():
            self._console.print(remark, soft_wrap=True)
        problems = list(outcome.problems())
        for problem in problems:
            self._console.print(f"Does not add up: {problem}", style="bold red", markup=False, soft_wrap=True)
        if not problems:
            self._console.print(
                f"Everything adds up: 0 lost of {len(outcome.given)} given, and billing's {len(outcome.accounts)} accounts "
                f"are what the requests made of them. {time.monotonic() - self._started:.1f} s",
                soft_wrap=True,
            )
        return 1 if problems else 0

    def _tell(self, what: str) -> None:
        self._console.print(f"{time.monotonic() - self._started:4.1f} s  {what}", soft_wrap=True)


async def until_signal(work: Coroutine[Any, Any, int]) -> int:
    """Do the work. Ctrl-C, SIGTERM or a closed terminal end it in good order, with the exit code that shells use."""
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
    ended_by: list[int] = []

    def end(number: int) -> None:
        if not ended_by:  # a second Ctrl-C changes nothing: the end takes seconds at most
            task.cancel()
        ended_by.append(number)

    for number in ENDINGS:
        loop.add_signal_handler(number, end, number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDINGS)
    try:
        return await task
    except asyncio.CancelledError:
        if not ended_by:
            raise
        return 128 + ended_by[0]


def main(arguments: list[str] | None = None) -> int | str:
    """Return the exit code, or a line that says why the demo could not run."""
    parser = argparse.ArgumentParser(prog="python -m examples.meetings", description=__doc__)
    parser.add_argument("--requests", type=_positive, default=2000, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=random.randrange(10_000), help="repeats a run; default: by chance")
    parser.add_argument("--calm", action="store_true", help="kill nothing, and see what it takes without")
    options = parser.parse_args(arguments)
    console = Console(highlight=False)
    url = external_url()
    try:
        with ExternalRedis(url) if url else RedisServer(appendonly="always") as server:
            which = (
                f"{server.binary} with an append-only file, just for this"
                if isinstance(server, RedisServer)
                else "the one at SILBO_REDIS_URL, which is not killed"
            )
            console.print(f"Redis: {which}; seed {options.seed}")
            signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)  # until the loop can meet them
            # In the server's own folder, where there is one: that goes with us in any case, after a `kill -9` too.
            with TemporaryDirectory(
                prefix="silbo-demo-", dir=server.folder if isinstance(server, RedisServer) else None
            ) as folder:
                plan = Plan(options.requests, options.seed)
                demo = Demo(console, server, Path(folder), plan, calm=options.calm)
                return asyncio.run(until_signal(demo.run()))
    except (ServerFailed, RedisAway, ProgramFailed) as error:
        return str(error)


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number
