"""Diator's application on Redis Pub/Sub: the same channels and the same JSON as Diator's own.

    python -m examples.from_sources.diator_redis --redis redis://localhost:6379/3

Without `--redis` it starts a Redis of its own.
"""

import argparse
import asyncio
import json

from redis.asyncio import Redis
from redis.asyncio.client import PubSub

from examples.from_sources.diator_meetings import JoinMeetingCommand, ReadMeetingQuery, RenameUserCommand, build
from silbo import LoggingMiddleware
from silbo.brokers.redis import RedisPubSub
from silbo.mediator.middleware import Handle
from silbo.wire.formats import DIATOR
from tools.redis_server import ExternalRedis, open_redis


class SomeMiddleware:
    """A middleware in the style of Diator 0.0: one method before the handler, one after it."""

    async def process_request(self, request: object) -> None:
        print("before", type(request).__name__)

    async def process_response(self, response: object) -> None:
        print("after, with", response)


class Stopwatch:
    """A middleware in the style of Diator 0.1: it calls the handler."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, request: object, handle: Handle) -> object:
        begin = asyncio.get_running_loop().time()
        try:
            return await handle(request)
        finally:
            self.seconds.append(asyncio.get_running_loop().time() - begin)


async def run(client: Redis) -> None:
    """Send two commands and a query, and print the messages on Redis."""
    async with client.pubsub() as outsider, RedisPubSub(client, app="meetings", format=DIATOR) as broker:
        for kind in ("notification_event", "ecst_event"):
            await outsider.psubscribe(f"python_diator_channel:{kind}:*")
            await outsider.get_message(timeout=5)  # Redis has confirmed it

        stopwatch = Stopwatch()
        mediator = build(broker, middlewares=[LoggingMiddleware(), SomeMiddleware(), stopwatch])
        await mediator.send(JoinMeetingCommand(meeting_id=1, user_id=123))
        meeting = await mediator.send(ReadMeetingQuery(meeting_id=1))
        print("the link is", meeting.link)
        await mediator.send(RenameUserCommand(user_id=123, username="kend"))
        assert len(stopwatch.seconds) == 3

        for _ in range(2):
            channel, data = await next_message(outsider)
            print(channel)
            print(json.dumps(json.loads(data), indent=3))


async def next_message(pubsub: PubSub) -> tuple[str, bytes]:
    """Return the channel and the bytes of one message."""
    async with asyncio.timeout(5):
        while True:
            message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=1)
            if message is not None:
                return message["channel"].decode(), message["data"]


async def main(url: str) -> None:
    """Run it with a client that the program makes, as any host does."""
    async with Redis.from_url(url) as client:
        await run(client)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m examples.from_sources.diator_redis")
    parser.add_argument("--redis", metavar="URL", help="a Redis that is there; without it one is started")
    given: str | None = parser.parse_args().redis
    with ExternalRedis(given) if given else open_redis() as server:
        asyncio.run(main(server.url))
