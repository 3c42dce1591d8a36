"""Starts Redis and the three programs, sends the requests, and counts whether everything arrived."""

import argparse
import asyncio
import random
import signal
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from uuid import uuid4

import httpx
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from rich.console import Console
from rich.progress import Progress

from examples.meetings.process import Settings
from examples.meetings.programs import Program, ProgramFailed, running
from examples.meetings.report import Outcome, Side
from examples.meetings.traffic import Plan, send
from tools.redis_server import ExternalRedis, RedisFailed, RedisNotFound, open_redis

HOST, BILLING, BYSTANDER = (f"examples.meetings.{name}" for name in ("host", "billing", "bystander"))
SECONDS_TO_ARRIVE = 10.0
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class RedisAway(Exception):
    """Redis does not answer, or not any more."""


@asynccontextmanager
async def own_corner(url: str) -> AsyncGenerator[tuple[Redis, str]]:
    """A client, and a prefix that nobody else uses; nothing of it is left in Redis afterwards.

    Raises:
        RedisAway: Redis can't be reached, now or later.
    """
    prefix = f"silbo-demo-{uuid4().hex[:8]}"
    try:
        client = Redis.from_url(url, socket_connect_timeout=5, socket_timeout=5, retry=Retry(NoBackoff(), 0))
    except ValueError as error:
        raise RedisAway(f"SILBO_REDIS_URL is no URL of a Redis: {error}") from None
    try:
        async with client:
            await client.ping()
            try:
                yield client, prefix
            finally:
                await client.unlink(stream(prefix))
    except RedisError as error:
        raise RedisAway(f"Redis does not answer: {error}") from None


def stream(prefix: str) -> str:
    """The key of silbo's one stream by default."""
    return f"{prefix}:{{events}}"


async def all_read(client: Redis, prefix: str, billing: Program) -> None:
    """Return when billing has acknowledged the whole stream; or when that takes too long, which the table will show."""
    deadline = time.monotonic() + SECONDS_TO_ARRIVE
    while time.monotonic() < deadline:
        last = (await client.xinfo_stream(stream(prefix)))["last-generated-id"]
        [group] = await client.xinfo_groups(stream(prefix))
        if group["last-delivered-id"] == last and not group["pending"]:
            return
        billing.check()
        await asyncio.sleep(0.05)


@contextmanager
def progress(console: Console, total: int) -> Generator[Callable[[], object]]:
    """A function to call for each answer: it moves a bar in a terminal, and writes a line now and then elsewhere."""
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


async def demo(console: Console, url: str, requests: int, seed: int) -> int:
    """Run it all once: 0 when everything adds up, else 1."""
    started = time.monotonic()
    plan = Plan(requests, seed)
    async with own_corner(url) as (client, prefix):
        settings = Settings(url, prefix)
        async with (
            running(HOST, settings) as host,
            running(BILLING, settings) as billing,
            running(BYSTANDER, settings) as bystander,
            httpx.AsyncClient() as http,
        ):
            host_url, billing_url = (await host.ready())["url"], (await billing.ready())["url"]
            await bystander.ready()
            await client.expire(stream(prefix), 3600)  # whoever is killed tidies nothing away
            console.print(f"Host, billing and a bystander are ready; {requests} requests, seed {seed}")
            try:
                with progress(console, requests) as on_answer:
                    answers = await send(plan, host_url, on_answer)
                await client.publish(f"{prefix}:over", "")
                pubsub = await bystander.report()
                await all_read(client, prefix, billing)
                figures = (await http.get(f"{host_url}/figures")).json()
                streams = (await http.get(f"{billing_url}/figures")).json()
                accounts = (await http.get(f"{billing_url}/accounts")).json()
            except httpx.TransportError as error:
                raise ProgramFailed(f"a program no longer answers, what it wrote is above: {error!r}") from None
    outcome = Outcome(
        plan=plan,
        answers=answers,
        dispatched=figures["dispatched"],
        sides=(
            Side("Pub/Sub to bystander", figures["pubsub"], pubsub["event_ids"], pubsub["milliseconds"]),
            Side("Streams to billing", figures["streams"], streams["event_ids"], streams["milliseconds"]),
        ),
        names=pubsub["names"],
        accounts=accounts,
    )
    console.print(outcome.table())
    problems = list(outcome.problems())
    for problem in problems:
        console.print(f"Does not add up: {problem}", style="bold red", markup=False, soft_wrap=True)
    if not problems:
        console.print(
            f"Everything adds up, and billing's {len(accounts)} accounts are what the requests made of them. "
            f"{time.monotonic() - started:.1f} s",
            soft_wrap=True,
        )
    return 1 if problems else 0


async def until_signal(work: Coroutine[Any, Any, int]) -> int:
    """Do the work; Ctrl-C, SIGTERM or a closed terminal end it in good order, with the exit code that shells give."""
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
    """The exit code, or a line that says why nothing could be run."""
    parser = argparse.ArgumentParser(prog="python -m examples.meetings", description=__doc__)
    parser.add_argument("--requests", type=_positive, default=2000, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=random.randrange(10_000), help="repeats a run; default: by chance")
    options = parser.parse_args(arguments)
    console = Console(highlight=False)
    try:
        with open_redis() as server:
            which = (
                "the one at SILBO_REDIS_URL" if isinstance(server, ExternalRedis) else f"{server.binary}, just for this"
            )
            console.print(f"Redis: {which}")
            signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)  # until the loop can meet them
            return asyncio.run(until_signal(demo(console, server.url, options.requests, options.seed)))
    except (RedisNotFound, RedisFailed, RedisAway, ProgramFailed) as error:
        return str(error)


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number
