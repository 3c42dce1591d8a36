"""Diator's application on Azure Service Bus: the program makes the client, and closes it itself.

SILBO_AZURE_CONNECTION="Endpoint=sb://..." python -m examples.from_sources.diator_azure --topic meetings
"""

import argparse
import asyncio
import os
import sys

from azure.servicebus.aio import ServiceBusClient

from examples.from_sources.diator_meetings import JoinMeetingCommand, RenameUserCommand, build
from silbo.brokers.azure import AzureServiceBus
from silbo.wire.formats import DIATOR


async def run(client: ServiceBusClient, topic: str) -> None:
    """Send two commands. Their events that leave go to the topic, each within 15 seconds."""
    async with AzureServiceBus(client, topic, app="meetings", timeout=15, format=DIATOR) as broker:
        mediator = build(broker)
        await mediator.send(JoinMeetingCommand(meeting_id=1, user_id=123))
        await mediator.send(RenameUserCommand(user_id=123, username="kend"))


async def main(connection: str, topic: str) -> None:
    """Run it with a client that the program makes."""
    async with ServiceBusClient.from_connection_string(connection) as client:
        await run(client, topic)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m examples.from_sources.diator_azure")
    parser.add_argument("--topic", default="meetings")
    options = parser.parse_args()
    if not (given := os.environ.get("SILBO_AZURE_CONNECTION")):
        sys.exit("Set SILBO_AZURE_CONNECTION to the connection string of a namespace, or of an emulator")
    asyncio.run(main(given, options.topic))
