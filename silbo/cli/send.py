"""``silbo send``: its arguments, and sending one message."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Final

from silbo.cli.app_arguments import open_app_of
from silbo.cli.arguments import (
    FORMATS,
    Commands,
    UsageError,
    add_command,
    add_format_option,
    add_json_option,
    add_redis_options,
    parse_address,
)
from silbo.cli.connect import make_redis, refuse_node
from silbo.cli.output import print_note, print_outcome
from silbo.errors import BrokerUnavailable

if TYPE_CHECKING:
    from silbo.brokers.redis.connection import Client
    from silbo.message import Message

__all__ = ["add_to"]

ANSWER_WITHIN: Final = 5.0
"""Redis tells the groups of a stream within 5 seconds."""
EPILOG = """\
With --check the app gives the name's class, kind, key and version: a name that it does not have, a field that
is missing, unknown or of another type is refused, and what is sent is what the app itself would send. Without
it, the payload is sent as it is.

A message in a stream waits for its groups. With --pubsub it goes to the programs that listen at that moment,
and Redis keeps nothing.

examples:
  silbo send order.paid '{"order": 7}' --check shop.web:dispatcher
  silbo send order.paid '{"order": 7}' --to orders --key 7
  silbo send cache.emptied '{}' --pubsub --prefix shop
  jq .payload letter.json | silbo send order.paid -
"""


def add_to(commands: Commands) -> None:
    """Add ``silbo send``."""
    parser = add_command(commands, "send", "send one message to a stream or to Pub/Sub", epilog=EPILOG, run=send)
    parser.add_argument("name", metavar="NAME", help="the event name")
    parser.add_argument("payload", metavar="JSON", help="the event's fields, a JSON object; - reads it from stdin")
    parser.add_argument(
        "--check", metavar="APP", help="module:attribute of an app that has the name, as shop.web:dispatcher"
    )
    parser.add_argument(
        "--app-dir", metavar="FOLDER", default=".", help="the folder to import --check from (the current one)"
    )
    add_redis_options(parser)
    parser.add_argument("--pubsub", action="store_true", help="to Pub/Sub, in place of a stream")
    parser.add_argument(
        "--to",
        metavar="ADDRESS",
        type=parse_address,
        help="the stream's or channel's address (events; for Pub/Sub the channel of the name)",
    )
    parser.add_argument(
        "--kind", choices=["notification", "ecst"], help="the message's kind (that of --check; notification)"
    )
    parser.add_argument("--key", help="the routing key (that of --check; none)")
    parser.add_argument(
        "--app",
        metavar="PROGRAM",
        type=parse_address,
        default="silbo-send",
        help="the sender's name, event.origin.app (silbo-send)",
    )
    add_format_option(parser)
    add_json_option(parser)


async def send(options: argparse.Namespace) -> int:
    """Send one message."""
    from silbo.brokers.redis import RedisPubSub, RedisStreams
    from silbo.brokers.redis.connection import describe_server
    from silbo.brokers.redis.streams import DEFAULT_ADDRESS
    from silbo.shards import place

    message = await _make_message(options)
    format_ = FORMATS[options.format]
    async with make_redis(options) as client:
        await refuse_node(client)
        if not options.pubsub and (shards := await _find_shards(client, _stream_of(message, options.prefix))):
            message = place(message, message.to or DEFAULT_ADDRESS, shards)
        given: dict[str, Any] = {"app": options.app, "prefix": options.prefix, "format": format_}
        broker = RedisPubSub(client, **given) if options.pubsub else RedisStreams(client, **given)
        async with broker:
            await broker.publish(message)
        to = format_.channel(message, options.prefix) if options.pubsub else _stream_of(message, options.prefix)
        if not options.pubsub and not await _has_groups(client, to):
            print_note(f"no group reads {to} yet: if there should be one, compare --prefix and --to")
        where = describe_server(client)
    fields = {
        "name": message.message_name,
        "event_id": message.message_id,
        "kind": message.message_type.removesuffix("_event"),
        "key": message.key,
        "to": to,
    }
    print_outcome(
        fields, f"{message.message_name} sent to {to} ({where}): event {message.message_id}", as_json=options.json
    )
    return 0


async def _make_message(options: argparse.Namespace) -> Message:
    from silbo.operations.send import make_message

    payload = _parse_payload(sys.stdin.read() if options.payload == "-" else options.payload)
    async with AsyncExitStack() as stack:
        app = None if options.check is None else await stack.enter_async_context(open_app_of(options, options.check))
        return make_message(options.name, payload, kind=options.kind, key=options.key, to=options.to, app=app)


def _parse_payload(text: str) -> dict[str, Any]:
    try:
        payload = json.loads(text)
    except ValueError as error:
        raise UsageError(f"the payload is no JSON ({error}): write '{{\"order\": 7}}', in single quotes") from None
    if not isinstance(payload, dict):
        raise UsageError("the payload is no JSON object: write '{\"order\": 7}'")
    return payload


def _stream_of(message: Message, prefix: str) -> str:
    from silbo.brokers.redis.streams import DEFAULT_ADDRESS, build_stream_key

    return build_stream_key(message.to or DEFAULT_ADDRESS, prefix)


async def _find_shards(client: Client, stream: str) -> int:
    """Return the number of shards of the address that has this stream without them; 0 for none, or if that can't be asked."""
    from silbo.operations.redis import opened, read_shards

    async with opened(client, ANSWER_WITHIN) as connection:
        try:
            return await read_shards(connection, stream.encode())
        except BrokerUnavailable:  # sending tells why
            return 0


async def _has_groups(client: Client, stream: str) -> bool:
    """Return True if a stream has a group, or if that can't be asked."""
    from silbo.brokers.redis.calls import Command, ask
    from silbo.operations.redis import opened

    async with opened(client, ANSWER_WITHIN) as connection:
        try:
            (groups,) = await ask(connection, Command(b"XINFO", b"GROUPS", stream.encode()))
        except BrokerUnavailable:
            return True
    return bool(groups)
